"""Unit saliencies against loops over single weights in float64, written from the formulas."""

import naive
import numpy as np
import pytest
import structure_models as zoo
import torch

from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import INPUT_NORM, OUTPUT_GRAD_NORM
from lightning_prune.structure import mask_units, read_structure, remove_units
from lightning_prune.structure import saliency as module
from lightning_prune.structure.saliency import SaliencyAccumulator, kfac_saliency, reader_targets
from lightning_prune.structure.units import check_removal

HEAD = 8  # dimensions of a head
TYPES = ("attention", "ffn", "hidden", "layer")


def with_gradients(name, seed=0):
    model = zoo.make(name)
    ids = zoo.tokens(seed)
    model(input_ids=ids, labels=ids).loss.backward()
    return model


def score(w, g, kind):
    w, g = w.detach().double().numpy(), g.double().numpy()
    if kind == "magnitude":
        return np.abs(w)
    return np.abs(g * w) if kind == "taylor1" else np.abs(g * w - 0.5 * g**2 * w**2)


def by_hand(model, kind, unit_type):
    """Mean saliency of every unit of a Mistral, from the names of its parts."""
    s = {n: score(p, p.grad, kind) for n, p in model.named_parameters()}
    layers = range(len(model.model.layers))
    rows = []
    for i in layers:
        at, mlp, row = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp", []
        if unit_type == "attention":
            for kv in range(3):
                q, k = slice(kv * 2 * HEAD, (kv + 1) * 2 * HEAD), slice(kv * HEAD, (kv + 1) * HEAD)
                parts = [s[f"{at}.q_proj.weight"][q], s[f"{at}.k_proj.weight"][k], s[f"{at}.v_proj.weight"][k]]
                row.append(np.concatenate([p.ravel() for p in [*parts, s[f"{at}.o_proj.weight"][:, q]]]).mean())
        elif unit_type == "ffn":
            for f in range(28):
                parts = [
                    s[f"{mlp}.gate_proj.weight"][f],
                    s[f"{mlp}.up_proj.weight"][f],
                    s[f"{mlp}.down_proj.weight"][:, f],
                ]
                row.append(np.concatenate(parts).mean())
        elif unit_type == "layer":
            row = [np.concatenate([v.ravel() for n, v in s.items() if n.startswith(f"model.layers.{i}.")]).mean()]
        rows.append(row)
    if unit_type == "layer":
        return np.array(rows).T
    if unit_type != "hidden":
        return np.array(rows)
    channels = []
    for d in range(48):
        parts = []
        for n, v in s.items():
            if v.ndim == 1 or n.endswith(("o_proj.weight", "down_proj.weight")):
                parts.append(v[d].ravel())
            else:
                parts.append(v[:, d])
        channels.append(np.concatenate(parts).mean())
    return np.array([channels])


@pytest.mark.parametrize("kind", ["taylor2", "taylor1", "magnitude"])
def test_means_over_the_weights_of_a_unit(kind, monkeypatch):
    model = with_gradients("mistral")
    for piece in (module._CPU_PIECE, 100):  # whole, and row by row
        monkeypatch.setattr(module, "_CPU_PIECE", piece)
        scores = SaliencyAccumulator(read_structure(model), TYPES, kind)
        scores.add()
        for unit_type, means in scores.means().items():
            np.testing.assert_allclose(means.numpy(), by_hand(model, kind, unit_type), rtol=3e-6)


def test_fused_and_transposed_weights():
    """GPT-2: queries, keys and values in one matrix with inputs first; units are single heads."""
    model = with_gradients("gpt2")
    scores = SaliencyAccumulator(read_structure(model), ("attention", "ffn"), "taylor2")
    scores.add()
    expected = np.zeros((3, 6))
    for i, block in enumerate(model.transformer.h):
        qkv, bias, out = (
            score(p, p.grad, "taylor2") for p in (*block.attn.c_attn.parameters(), block.attn.c_proj.weight)
        )
        for h in range(6):
            rows = [c + h * HEAD + j for c in (0, 48, 96) for j in range(HEAD)]
            parts = [qkv[:, rows].ravel(), bias[rows], out[h * HEAD : (h + 1) * HEAD].ravel()]
            expected[i, h] = np.concatenate(parts).mean()
    np.testing.assert_allclose(scores.means()["attention"].numpy(), expected, rtol=3e-6)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_steps_add_up(name):
    model = zoo.make(name)
    scores = SaliencyAccumulator(read_structure(model), TYPES)
    single = dict.fromkeys(TYPES, 0.0)
    for step in range(2):
        model.zero_grad()
        model(input_ids=zoo.tokens(step), labels=zoo.tokens(step)).loss.backward()
        scores.add()
        one = SaliencyAccumulator(read_structure(model), TYPES)
        one.add()
        single = {t: single[t] + one.means()[t] for t in TYPES}
    for t, means in scores.means().items():
        torch.testing.assert_close(means, single[t] / 2)
    assert scores.steps == 2


def test_state_travels_and_follows_the_model():
    model = with_gradients("llama")
    structure = read_structure(model)
    scores = SaliencyAccumulator(structure, ("ffn", "hidden"))
    scores.add()
    twin = SaliencyAccumulator(structure, ("ffn", "hidden"))
    twin.load_state_dict(scores.state_dict())
    assert twin.steps == 1
    assert all(torch.equal(twin.means()[t], scores.means()[t]) for t in ("ffn", "hidden"))
    scores.reset()
    assert scores.steps == 0
    assert not scores.sums("ffn").any()
    remove_units(model, {"ffn": [[0]] * 3})
    scores.follow(read_structure(model))
    assert scores.sums("ffn").shape == (3, 27)
    with pytest.raises(ValueError, match=r"\(3, 28\)"):
        scores.load_state_dict(twin.state_dict())
    for bad in ("kfac", "hessian"):
        with pytest.raises(ValueError, match="saliency="):
            SaliencyAccumulator(structure, ("ffn",), bad)


def test_a_running_mean_decays_at_each_reset_and_outlives_a_compaction():
    """By hand: sums s1 and s2 of two steps with a pruning between are kept as 0.75 s1 + s2, for the units that stay."""
    model = with_gradients("llama")
    types = ("attention", "ffn", "hidden", "layer")
    scores = SaliencyAccumulator(read_structure(model), types, decay=0.75)
    scores.add()
    first = {t: scores.sums(t) for t in types}
    scores.reset()
    assert scores.steps == 0  # nothing was seen since, so nothing may be pruned yet
    for p in model.parameters():
        p.grad.mul_(2)
    scores.add()
    alone = SaliencyAccumulator(read_structure(model), types)
    alone.add()
    expected = {t: 0.75 * first[t] + alone.sums(t) for t in types}
    for t in types:
        torch.testing.assert_close(scores.sums(t), expected[t])
        means = expected[t] / (scores.structure.unit_weights(t) * 1.75)
        torch.testing.assert_close(scores.means()[t], means)
    twin = SaliencyAccumulator(read_structure(model), types, decay=0.75)
    twin.load_state_dict(scores.state_dict())
    for t in types:
        torch.testing.assert_close(twin.means()[t], scores.means()[t])

    removal = check_removal(read_structure(model), {"ffn": [[0, 5], [27, 3], [1, 2]], "hidden": [[4]], "layer": [[1]]})
    remove_units(model, removal)
    scores.follow(read_structure(model), removal)
    assert scores.steps == 1
    ffn = torch.stack([expected["ffn"][0, [u for u in range(28) if u not in (0, 5)]],
                       expected["ffn"][2, [u for u in range(28) if u not in (1, 2)]]])  # fmt: skip
    torch.testing.assert_close(scores.sums("ffn"), ffn)
    torch.testing.assert_close(scores.sums("attention"), expected["attention"][[0, 2]])
    torch.testing.assert_close(scores.sums("layer"), expected["layer"][:, [0, 2]])
    hidden = expected["hidden"]
    torch.testing.assert_close(scores.sums("hidden"), torch.cat([hidden[:, :4], hidden[:, 5:]], 1))


def test_steps_that_are_not_finite_do_not_count():
    model = with_gradients("llama")
    scores = SaliencyAccumulator(read_structure(model), ("ffn",))
    scores.add()
    before = scores.sums("ffn")
    model.model.layers[1].mlp.up_proj.weight.grad[3, 4] = torch.nan
    scores.add()
    assert scores.steps == 1
    assert torch.equal(scores.sums("ffn"), before)


def test_masked_units_are_worth_nothing_and_frozen_weights_count_as_zero():
    model = zoo.make("llama")
    mask_units(model, {"ffn": [[4]] * 3})
    model.model.embed_tokens.weight.requires_grad_(False)
    model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss.backward()
    scores = SaliencyAccumulator(read_structure(model), ("ffn", "hidden"))
    scores.add()
    assert bool((scores.means()["ffn"][:, 4] == 0).all())
    assert bool((scores.means()["ffn"][:, 5] > 0).all())


def test_bfloat16_gradients_do_not_underflow():
    model = with_gradients("llama").to(torch.bfloat16)
    for p in model.parameters():
        p.grad = p.grad * 1e-25
    scores = SaliencyAccumulator(read_structure(model), ("ffn",), "taylor1")
    scores.add()
    assert bool((scores.means()["ffn"] > 0).all())


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_kfac_is_the_sum_over_rows_of_the_readers(name):
    model = zoo.make(name)
    ids = zoo.tokens()
    if name == "gpt2":
        layers, attention, ffn, hidden = "transformer.h", "attn.c_proj", "mlp.c_proj", ("attn.c_attn", "mlp.c_fc")
        # Weights of one unit, in one layer (in the model, for hidden).
        weights = {"ffn": 2 * 48 + 1, "attention": 4 * 48 * HEAD + 3 * HEAD}
        weights["hidden"] = 14 + 61 + 32 + 3 * (4 * 48 + 2 * 28 + 2)
    else:
        layers, attention, ffn, hidden = "model.layers", "self_attn.o_proj", "mlp.down_proj", zoo.LLAMA_READERS
        weights = {"ffn": 3 * 48, "attention": 2 * 48 * (2 + 1) * HEAD}
        weights["hidden"] = 7 + 2 * 61 + 3 * (2 * 48 + 2 * 24 + 3 * 28)
    readers = {
        "ffn": [[f"{layers}.{i}.{ffn}"] for i in range(3)],
        "attention": [[f"{layers}.{i}.{attention}"] for i in range(3)],
        "hidden": [[f"{layers}.{i}.{n}" for i in range(3) for n in hidden] + ["lm_head"]],
    }
    names = {f"{n}.weight": n for places in readers.values() for names in places for n in names}
    reference = naive.statistics(model, [{"input_ids": row[None]} for row in ids], names)
    structure = read_structure(model)
    statistics = collect(
        model, [{"input_ids": ids}], reader_targets(structure, TYPES), {INPUT_NORM, OUTPUT_GRAD_NORM}, num_samples=2
    )
    got = kfac_saliency(structure, statistics, TYPES)
    per_unit = {"ffn": 1, "hidden": 1, "attention": (2 if name == "mistral" else 1) * HEAD}
    expected = {}
    for unit_type, places in readers.items():
        rows = []
        for names in places:
            total = 0.0
            for n in names:
                linear, found = model.get_submodule(n), reference[f"{n}.weight"]
                w = naive.matrix(linear, linear.weight)
                inputs = (found["output_grad_norm"][:, None] ** 2 * w**2).sum(0) * found["input_norm"] ** 2
                total = total + inputs.reshape(-1, per_unit[unit_type]).sum(1)
            rows.append(total)
        expected[unit_type] = np.array(rows)
        np.testing.assert_allclose(
            got[unit_type].numpy(), expected[unit_type] / weights[unit_type], rtol=1e-4, atol=1e-12
        )
    layer = (expected["attention"].sum(1) + expected["ffn"].sum(1))[None]
    prefix = structure.family.layers
    numel = sum(p.numel() for n, p in model.named_parameters() if n.startswith(f"{prefix}.0."))
    np.testing.assert_allclose(got["layer"].numpy(), layer / numel, rtol=1e-4)
    for unit_type in TYPES:
        alone = kfac_saliency(structure, statistics, [unit_type])
        assert alone.keys() == {unit_type}
        assert torch.equal(alone[unit_type], got[unit_type])
