"""`prune_structured`: targets are met, the better methods are better, and failures leave no trace."""

import contextlib
import copy
import os
import signal
import warnings

import naive
import numpy as np
import pytest
import structure_models as zoo
import torch
from tiny import snapshot
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lightning_prune
from lightning_prune import CalibrationError, prune_structured
from lightning_prune.structure import oneshot, read_structure, remove_units, save_plain


def data(batches=4, size=2):
    return [{"input_ids": zoo.tokens(seed)[:size]} for seed in range(batches)]


def learned(name="llama", steps=60):
    """A model that has learned something, so that its units differ in use."""
    model = zoo.make(name).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids = torch.arange(64).remainder(61).reshape(4, 16)
    for step in range(steps):
        model(input_ids=ids + 0 * step, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), [{"input_ids": ids}]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("saliency", ["obs", "taylor2"])
def test_what_surrounds_the_call_changes_nothing(mode, saliency):
    expected, model, batches = zoo.make("llama"), zoo.make("llama"), data(2)
    prune_structured(expected, batches, 0.85, ("ffn",), saliency, progress=False)
    with mode():
        prune_structured(model, batches, 0.85, ("ffn",), saliency, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    model(input_ids=zoo.tokens()).logits.sum().backward()  # it can be trained on


def test_an_autocast_around_the_call_meets_the_smaller_weights():
    model, batch = zoo.make("llama"), data(1)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**batch)
        prune_structured(model, data(2), 0.85, ("ffn",), progress=False)
        after = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(after, model(**batch).logits)


def test_a_model_of_inference_mode_is_refused_before_anything_runs():
    with torch.inference_mode():
        model = zoo.make("llama")
    for saliency in ("kfac", "magnitude"):
        with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' was made under torch\.inference_mode"):
            prune_structured(model, None if saliency == "magnitude" else data(2), 0.85, saliency=saliency,
                             compensate=saliency == "kfac", progress=False)  # fmt: skip
    prune_structured(copy.deepcopy(model), data(2), 0.85, progress=False)  # as it says


@pytest.mark.parametrize("compensate", [True, False])
def test_zeros_that_the_re_fit_fills_are_counted(compensate):
    """Of a model that was pruned before; nothing is said where they stay, nor of a dense model."""
    warnings.simplefilter("error")  # until the end of the test
    prune_structured(zoo.make("llama"), data(2), {"intermediate_size": 20}, num_samples=4, progress=False)
    model = zoo.make("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight[torch.arange(weight.shape[0])[:, None] % 2 == torch.arange(weight.shape[1]) % 2] = 0.0
    message = rf"fills {3 * 48 * 20 // 2:,} zeros of pruned weights in 3 layers \(model\.layers\.0\.mlp\.down_proj"
    with pytest.warns(UserWarning, match=message) if compensate else contextlib.nullcontext():
        prune_structured(
            model, data(2), {"intermediate_size": 20}, compensate=compensate, num_samples=4, progress=False
        )
    zeros = {name: int((p == 0).sum()) / p.numel() for name, p in model.named_parameters() if "_proj" in name}
    assert zeros == {name: 0.0 if compensate and "down" in name else 0.5 for name in zeros}


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("name", zoo.FAMILIES)
@pytest.mark.parametrize("saliency", ["kfac", "taylor2", "magnitude"])
def test_every_family(name, saliency, tmp_path):
    model = zoo.make(name)
    total = sum(p.numel() for p in model.parameters())
    types = ("ffn",) if name in (*zoo.SPANNING, *zoo.DIVIDING) else ("attention", "ffn", "hidden")
    report = prune_structured(model, data(2), 0.85, types, saliency, num_samples=4, progress=False)
    assert report.parameters == sum(p.numel() for p in model.parameters()) <= int(0.85 * total)
    assert report.parameters_before == total
    assert report.share > 0.8
    assert report.sizes == read_structure(model).sizes
    assert all(torch.isfinite(p).all() for p in model.parameters())
    save_plain(model, tmp_path)
    torch.testing.assert_close(zoo.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), zoo.logits(model))


@pytest.mark.parametrize("settings", [{}, {"saliency": "obs"}], ids=["default", "obs"])
def test_the_default_is_kfac_with_compensation_of_ffn_channels(settings):
    """Against the formulas in float64: the channels, and the down projections."""
    model, ids = zoo.make("mistral"), [d["input_ids"] for d in data()]
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    samples = [{"input_ids": row[None]} for batch in ids for row in batch]
    found = naive.statistics(model, samples, {f"{n}.weight": n for n in names})
    before = {n: naive.matrix(m, m.weight).copy() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = prune_structured(model, [{"input_ids": i} for i in ids], 0.9, progress=False, num_samples=8, **settings)
    assert list(report.removal) == ["ffn"]
    per_channel = 3 * 48 * 3
    count = -(-(report.parameters_before - int(0.9 * report.parameters_before)) // per_channel)
    assert report.sizes.intermediate_size == 28 - count
    for i, n in enumerate(names):
        w, s = before[n], found[f"{n}.weight"]
        h = s["hessian"]
        ridge = 0.01 * np.mean(np.diag(h))
        importance = s["output_grad_norm"] ** 2
        if settings:
            gone = sorted(naive.surgeon(w, h, importance, [[f] for f in range(28)])[0][:count])
        else:
            gone = sorted(np.argsort((importance[:, None] * w**2).sum(0) * s["input_norm"] ** 2)[:count])
        assert report.removal["ffn"][i].tolist() == gone
        kept = [f for f in range(28) if f not in gone]
        damped = h[np.ix_(kept, kept)] + ridge * np.eye(len(kept))
        expected = w[:, kept] + w[:, gone] @ h[np.ix_(gone, kept)] @ np.linalg.inv(damped)
        np.testing.assert_allclose(model.get_submodule(n).weight.detach().numpy(), expected, atol=2e-4)
        gate = f"model.layers.{i}.mlp.gate_proj"
        np.testing.assert_array_equal(model.get_submodule(gate).weight.detach().double().numpy(), before[gate][kept])


@pytest.mark.slow
def test_compensation_helps_and_every_saliency_beats_the_worst_channels():
    model, batches = learned()

    def loss(net):
        with torch.no_grad():
            return float(net(input_ids=batches[0]["input_ids"], labels=batches[0]["input_ids"]).loss)

    losses = {}
    for saliency in ("kfac", "taylor1", "taylor2", "magnitude"):
        for compensate in (False, True):
            net = copy.deepcopy(model)
            prune_structured(net, batches, {"intermediate_size": 16}, saliency=saliency, compensate=compensate)
            losses[saliency, compensate] = loss(net)
    for saliency in ("kfac", "taylor1", "taylor2", "magnitude"):
        assert losses[saliency, True] < losses[saliency, False]
    assert losses["kfac", True] < losses["magnitude", True]
    assert loss(model) < losses["kfac", True]


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ({"hidden_size": 40, "intermediate_size": 16}, (40, 16, 6, 3, 3)),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, (48, 28, 3, 3, 3)),  # a query head of every group
        ({"num_key_value_heads": 2, "num_hidden_layers": 2}, (48, 28, 4, 2, 2)),
    ],
)
@pytest.mark.parametrize("saliency", ["kfac", "taylor1"])
def test_sizes_as_target(target, sizes, saliency):
    model = zoo.make("qwen3")
    types = ("attention", "ffn", "hidden", "layer")
    report = prune_structured(model, data(), target, types, saliency)
    assert tuple(report.sizes.as_dict().values())[:5] == sizes
    assert "->" in str(report)
    zoo.logits(model)


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("saliency", ["kfac", "taylor2", "magnitude"])
@pytest.mark.parametrize(("family", "heads", "groups"), [("qwen2", 15, 5), ("phi3", 9, 3), ("gemma2", 9, 3)])
@pytest.mark.parametrize("unit", ["group", "head"])
def test_odd_numbers_of_heads_lose_the_idle_ones(family, heads, groups, unit, saliency, tmp_path):
    ratio = heads // groups
    fields = {"hidden_size": 90, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 6}
    model = zoo.make(family, **fields)
    idle = [1, 0, groups - 1] if unit == "group" else [ratio - 1, 0, 1]
    with torch.no_grad():
        for layer, number in zip(zoo.layers_of(model), idle, strict=True):
            columns = layer.self_attn.o_proj.weight.view(90, groups, ratio, 6)
            (columns[:, number] if unit == "group" else columns[:, :, number]).mul_(1e-3)
            rows = layer.self_attn.qkv_proj if family == "phi3" else layer.self_attn.q_proj
            queries = rows.weight[: heads * 6].view(groups, ratio, 6, 90)
            (queries[number] if unit == "group" else queries[:, number]).mul_(0.1)  # for those that look at weights
    before = zoo.logits(model)
    left = {"num_attention_heads": heads - (ratio if unit == "group" else groups)}
    left["num_key_value_heads"] = groups - 1 if unit == "group" else groups
    report = prune_structured(model, data(2), left, ("attention",), saliency, compensate=False, progress=False)
    assert [gone.tolist() for gone in report.removal["attention"]] == [[number] for number in idle]
    assert (report.sizes.num_attention_heads, report.sizes.num_key_value_heads) == tuple(left.values())
    assert (zoo.logits(model) - before).abs().max() < 0.05 * before.abs().max()
    save_plain(model, tmp_path)
    torch.testing.assert_close(zoo.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), zoo.logits(model))


def test_heads_and_channels_of_gpt2_together():
    model = zoo.make("gpt2")
    report = prune_structured(
        model, data(), {"num_attention_heads": 5, "hidden_size": 40}, ("attention", "hidden"), compensate=True
    )
    assert report.sizes.num_attention_heads == report.sizes.num_key_value_heads == 5
    assert model.config.n_embd == 40
    zoo.logits(model)


def test_numbers_and_multiples():
    model = zoo.make("llama")
    total = sum(p.numel() for p in model.parameters())
    report = prune_structured(model, data(), total - 1, round_to=8)
    assert report.sizes.intermediate_size == 24
    assert prune_structured(model, data(), 1.0).removal == {}
    assert prune_structured(model, saliency="magnitude", compensate=False, target=0.9).parameters < report.parameters


def test_taylor_gradients_leave_no_trace():
    model = zoo.make("llama")
    kept = torch.randn_like(model.model.norm.weight)
    model.model.norm.weight.grad = kept
    model.model.embed_tokens.weight.requires_grad_(False)
    model.train()
    state = torch.get_rng_state()
    prune_structured(model, data(), 0.9, saliency="taylor2", compensate=False)
    assert model.model.norm.weight.grad is kept
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for n, p in model.named_parameters() if n != "model.norm.weight")


@pytest.mark.parametrize("saliency", ["taylor1", "taylor2"])
@pytest.mark.parametrize("factor", [1e-5, 1.0, 1e4])
def test_gradients_of_float16_models_neither_vanish_nor_overflow(saliency, factor):
    """They are below the smallest float16 where a loss is the mean over many tokens."""

    def loss(model, batch):
        return model(**batch, labels=batch["input_ids"]).loss.float() * factor

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    found = []
    for dtype in (torch.float32, torch.float16):
        chosen = copy.deepcopy(model).to(dtype)
        how = {"target": {"intermediate_size": 32}, "saliency": saliency, "compensate": False, "loss_fn": loss}
        found.append(prune_structured(chosen, data(), **how, progress=False).removal["ffn"])
    for wanted, units in zip(*found, strict=True):
        assert len(set(wanted.tolist()) ^ set(units.tolist())) <= 4


def test_a_module_that_holds_the_model_and_a_loss_of_ones_own():
    holder = nn.Module()
    holder.model = zoo.make("mistral")
    calls = []

    def loss_fn(model, batch):
        calls.append(model)
        return model(input_ids=batch, labels=batch).loss

    for saliency in ("taylor1", "kfac"):
        prune_structured(holder, [d["input_ids"] for d in data()], 0.95, saliency=saliency, loss_fn=loss_fn)
    assert all(m is holder.model for m in calls)
    assert holder.model.config.intermediate_size < 28


def test_data_that_can_be_read_only_once():
    twice = zoo.make("mistral"), zoo.make("mistral")
    prune_structured(twice[0], iter(data()), 0.8, ("ffn", "hidden"))
    prune_structured(twice[1], data(), 0.8, ("ffn", "hidden"))
    assert snapshot(twice[0]) == snapshot(twice[1])


# -- failures ----------------------------------------------------------------------------------------------------


def interrupted(batches):
    yield batches[0]
    raise KeyboardInterrupt


def nothing(_):
    return iter(())


@pytest.mark.parametrize("saliency", ["kfac", "taylor2"])
@pytest.mark.parametrize(
    ("source", "error"),
    [(interrupted, KeyboardInterrupt), (nothing, CalibrationError)],
)
def test_failures_leave_the_model_bit_identical(saliency, source, error):
    model = zoo.make("llama")
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(error):
        prune_structured(model, source(data()), 0.8, saliency=saliency)
    assert snapshot(model) == before
    assert model.config.to_dict() == config
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("kind", "dead"), [("ffn", "mlp.up_proj"), ("attention", "self_attn.v_proj")])
def test_units_that_give_nothing_are_the_first_to_go(kind, dead):
    """Units of a layer whose inputs are all zero: also where every one of its units is such."""
    model = zoo.make("llama")
    with torch.no_grad():
        model.model.layers[1].get_submodule(dead).weight.zero_()
        for name, p in model.named_parameters():
            if kind == "ffn" and name.endswith("mlp.up_proj.weight"):
                p[:3] = 0.0
    report = prune_structured(model, data(), 0.95, [kind], num_samples=4)
    assert all(p.isfinite().all() for p in model.parameters())
    if kind == "ffn":
        assert all({0, 1, 2} <= set(lost.tolist()) for i, lost in enumerate(report.removal["ffn"]) if i != 1)


@pytest.mark.parametrize("saliency", ["kfac", "taylor2"])
def test_nan_in_the_loss(saliency):
    model = zoo.make("llama")
    before = snapshot(model)

    def loss_fn(net, batch):
        return net(**batch, labels=batch["input_ids"]).loss * float("nan")

    with pytest.raises(CalibrationError, match="not finite"):
        prune_structured(model, data(), 0.8, saliency=saliency, loss_fn=loss_fn)
    assert snapshot(model) == before


@pytest.mark.parametrize("how", ["error", "Ctrl-C"])
def test_a_failing_removal_undoes_the_compensation(how, monkeypatch):
    model = zoo.make("llama")
    before = snapshot(model)

    def broken(*args, **kwargs):
        if how == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        raise MemoryError

    monkeypatch.setattr(oneshot, "remove_units", broken)
    with pytest.raises((MemoryError, KeyboardInterrupt)):
        prune_structured(model, data(), 0.8)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.5}, "target=1.5"),
        ({"target": 0.01}, "leave at least"),
        ({"types": ("head",)}, "types="),
        ({"saliency": "wanda"}, "saliency='wanda'"),
        ({"round_to": -1}, "round_to=-1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"rounds": 2.0}, "rounds=2.0"),
        ({"attention_unit": "pair"}, "attention_unit='pair'"),
        ({"batches": None}, "pass batches"),
        ({"model": "folder"}, r"^model='folder' of type str is no model: pass.*from_pretrained"),
        ({"model": None}, "^model=None of type NoneType is no model"),
        ({"loss_fn": 3}, "^loss_fn=3 of type int cannot be called"),
        ({"types": None}, "^types=None must be"),
    ],
)
def test_bad_arguments_are_refused_before_data_is_read(arguments, message):
    def unread():
        raise AssertionError
        yield

    with pytest.raises((ValueError, TypeError), match=message):
        prune_structured(**{"model": zoo.make("llama"), "batches": unread(), **arguments})


# -- rounds ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("saliency", ["obs", "kfac", "taylor2"])
def test_rounds_are_calls_with_smaller_and_smaller_targets(saliency, monkeypatch):
    types, at_once, one_by_one, passed = ("attention", "ffn", "hidden"), zoo.make("qwen3"), zoo.make("qwen3"), []

    def noting(model, *args, **kwargs):
        sizes = remove_units(model, *args, **kwargs)
        passed.append(sum(p.numel() for p in model.parameters()))
        return sizes

    monkeypatch.setattr(oneshot, "remove_units", noting)
    total = sum(p.numel() for p in at_once.parameters())
    report = prune_structured(at_once, data(), int(0.7 * total), types, saliency, rounds=3)
    largest = 3 * 48 * 8 * 6  # a group of two heads in each of three layers
    assert len(passed) == 3
    for done, parameters in enumerate(passed, 1):
        assert -largest < parameters - (total + (int(0.7 * total) - total) * done / 3) <= 1
    monkeypatch.undo()
    for target in passed:
        last = prune_structured(one_by_one, data(), target, types, saliency)
    assert snapshot(at_once) == snapshot(one_by_one)
    assert at_once.config.to_dict() == one_by_one.config.to_dict()
    assert (report.parameters_before, report.parameters, report.sizes) == (total, passed[-1], last.sizes)


@pytest.mark.parametrize("unit", ["group", "head"])
def test_the_report_of_rounds_numbers_units_as_before_the_first(unit):
    """What is left is what the dense model had there; layers that went early too."""
    model, dense = zoo.make("qwen3"), zoo.make("qwen3")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if unit == "group" else {"num_attention_heads": 3}
    target = {"num_hidden_layers": 2, "intermediate_size": 9, "hidden_size": 41, **heads}
    types = ("attention", "ffn", "hidden", "layer")
    report = prune_structured(model, data(), target, types, "magnitude", False, rounds=5, attention_unit=unit)
    assert report.sizes == read_structure(model).sizes
    remove_units(dense, report.removal, attention_unit=unit)
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)  # norms are rescaled at once, or in parts
    torch.testing.assert_close(zoo.logits(model), zoo.logits(dense))


def test_all_query_heads_but_one_go_in_the_first_of_two_rounds():
    model = zoo.make("qwen2")
    target = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 5}
    report = prune_structured(model, data(), target, ("attention", "ffn"), "magnitude", False, rounds=4)
    assert (report.sizes.num_attention_heads, report.sizes.intermediate_size) == (3, 5)
    zoo.logits(model)


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gemma"])
@pytest.mark.parametrize("how", ["data", "Ctrl-C"])
def test_a_failure_in_a_later_round_leaves_the_model_bit_identical(family, how, monkeypatch):
    """Classes, sizes, layers and ties too; gradients and parameters are the same objects."""
    model = zoo.make(family)
    types, target = ("attention", "ffn", "hidden"), 0.7
    if family in ("gpt2", "gemma3_text"):
        types, target = ("ffn", "layer"), {"num_hidden_layers": 1, "intermediate_size": 9}
    model(input_ids=zoo.tokens()).logits.sum().backward()
    before, config, kinds = snapshot(model), model.config.to_dict(), [type(part) for part in model.modules()]
    parameters, gradients = list(model.parameters()), [p.grad for p in model.parameters()]
    printed, expected, removals = str(model), zoo.logits(model), []
    hook = model.register_forward_hook(lambda *_: None)

    def fails_at_last(*args, **kwargs):
        removals.append(remove_units(*args, **kwargs))
        if len(removals) == 3:
            if how == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            raise CalibrationError("told to")

    monkeypatch.setattr(oneshot, "remove_units", fails_at_last)
    with pytest.raises((CalibrationError, KeyboardInterrupt)):
        prune_structured(model, data(), target, types, "taylor1", rounds=3)
    assert removals[-1].intermediate_size < 28
    assert removals[-1].num_hidden_layers == (1 if "layer" in types else 3)
    assert snapshot(model) == before
    assert model.config.to_dict() == config
    assert [type(part) for part in model.modules()] == kinds
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    hook.remove()
    assert not model._forward_hooks
    assert str(model) == printed
    assert torch.equal(zoo.logits(model), expected)
    monkeypatch.undo()
    prune_structured(model, data(), target, types, "taylor1", rounds=2)  # and can be pruned


def test_a_failure_leaves_hooks_with_their_handles_and_shared_parts_of_the_configuration(monkeypatch):
    model, calls = zoo.make("llama"), []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(args))
    model.config.told = told = {"by": ["us"]}

    def broken(*args, **kwargs):
        remove_units(*args, **kwargs)
        raise MemoryError

    monkeypatch.setattr(oneshot, "remove_units", broken)
    with pytest.raises(MemoryError):
        prune_structured(model, data(2), 0.8, ("hidden",), num_samples=4)
    assert model.config.told is told
    calls.clear()
    zoo.logits(model)
    assert len(calls) == 1
    handle.remove()
    zoo.logits(model)
    assert len(calls) == 1


def test_nothing_is_measured_once_the_last_unit_has_gone():
    model, layers = zoo.make("llama"), []

    def loss_fn(model, batch):
        layers.append(model.config.num_hidden_layers)
        return model(**batch, labels=batch["input_ids"]).loss

    report = prune_structured(model, data(2), 0.8, ("layer",), "taylor1", False, loss_fn=loss_fn, rounds=3)
    assert (report.sizes.num_hidden_layers, layers) == (2, [3, 3])


def test_heads_that_span_the_hidden_size_cannot_go_in_rounds():
    target = {"num_attention_heads": 4, "hidden_size": 32}
    with pytest.raises(ValueError, match=r"prune_structured in one round with final sizes as target, .* head_dim"):
        prune_structured(zoo.make("gpt2"), data(), target, ("attention", "hidden"), rounds=2)


def test_it_is_a_public_name():
    assert lightning_prune.prune_structured is prune_structured
    assert "prune_structured" in lightning_prune.__all__
