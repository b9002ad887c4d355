"""Block-wise reconstruction against a float64 simulation, from every source of dense weights, and its failures."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from perp_models import halve, make_gpt2, zeros
from tiny import make_llama, make_tokens, snapshot
from torch import Tensor, nn
from torch.func import functional_call

from lightning_prune import CalibrationError, open_checkpoint, prune
from lightning_prune.perp import add_adapters, reconstruct
from lightning_prune.pruning.stacks import find_blocks

IDS = make_tokens(8, 12)


def batches(padded: bool = False, ids: Tensor = IDS) -> list[dict[str, Tensor]]:
    mask = torch.ones_like(ids)
    if padded:
        mask[::3, -5:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]


def pair(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    dense = make_llama(**changes).to(dtype)
    model = copy.deepcopy(dense)
    return dense, model, halve(model)


def outputs(model: nn.Module, weights: Mapping[str, Tensor], block: int, batch: dict[str, Tensor]) -> Tensor:
    """What one block returns when the whole model runs with some weights replaced."""
    found: list[Tensor] = []
    handle = model.model.layers[block].register_forward_hook(
        lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    functional_call(model, dict(weights), (), {**batch, "use_cache": False})
    handle.remove()
    return found[0]


def first_a(tensor: Tensor) -> Tensor:
    """In place of random initial values: the same for any shape, so that they can be written down again."""
    with torch.no_grad():
        flat = torch.sin(torch.arange(tensor.numel()).float()) / math.sqrt(tensor.shape[1])
        return tensor.copy_(flat.view(tensor.shape))


def simulate(
    dense: nn.Module, pruned: nn.Module, masks: dict[str, Tensor], data: list[Any], adapter: str, teacher: str,
    steps: int, lr: float, seed: int, rank: int,
) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:  # fmt: skip
    """Naive float64 block-wise reconstruction: whole models run, products and sums written out."""
    weights = {n: p.detach().clone() for n, p in pruned.named_parameters()}
    original = {n: p.detach().clone() for n, p in dense.named_parameters()}
    reports = []

    def run(block: int, own: Mapping[str, Tensor]) -> list[Tensor]:
        return [outputs(pruned, own, block, b) for b in data]

    def total(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        each = [((o - t) ** 2).sum(-1) * b["attention_mask"] for o, t, b in zip(ours, theirs, data, strict=True)]
        return sum(e.sum() for e in each)

    def fitted(block: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = f"model.layers.{block}."
        with torch.no_grad():
            if teacher == "dense":
                wanted = [outputs(dense, {}, block, b) for b in data]
            else:
                wanted = run(block, {**weights, **{n: w for n, w in original.items() if n.startswith(prefix)}})
            energy = total(wanted, [torch.zeros_like(w) for w in wanted])
            before = total(run(block, weights), wanted) / energy
        names = [n for n in masks if n.startswith(prefix)]
        norms = {n: weights[n].clone().requires_grad_() for n in weights if n.startswith(prefix) and "norm" in n}
        a, b = {}, {}
        for n in names:
            rows, columns = weights[n].shape
            if adapter == "mask_lora":
                a[n], b[n] = first_a(torch.empty(rank, columns).double()), torch.zeros(rows, rank).double()
            else:
                a[n] = torch.full((rank, columns), 1 / math.sqrt(rank)).double()
                b[n] = torch.full((rows, rank), 1 / math.sqrt(rank)).double()
        trained = [*norms.values(), *(x.requires_grad_() for n in names for x in (a[n], b[n]))]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0, lr=lr)
        tokens = sum(int(d["attention_mask"].sum()) for d in data)

        def effective() -> dict[str, Tensor]:
            products = {n: b[n] @ a[n] for n in names}
            if adapter == "mask_lora":
                changed = {n: weights[n] + 2 * masks[n] * p for n, p in products.items()}
            else:
                changed = {n: weights[n] * p for n, p in products.items()}
            return {**weights, **norms, **changed}

        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < steps:
            order += torch.randperm(len(data), generator=generator).tolist()
        warmup = round(steps / 10)
        for step in range(steps):
            rate = (step + 1) / warmup if step < warmup else 1 - (step - warmup) / (steps - warmup)
            optimizer.param_groups[0]["lr"] = lr * rate
            batch, target = data[order[step]], wanted[order[step]]
            real = batch["attention_mask"].sum()
            error = (
                ((outputs(pruned, effective(), block, batch) - target) ** 2).sum(-1) * batch["attention_mask"]
            ).sum()
            optimizer.zero_grad()
            (error / real / (energy / tokens)).backward()
            optimizer.step()
        with torch.no_grad():
            merged = {n: w.detach().clone() for n, w in effective().items()}
            reports.append((float(before), float(total(run(block, merged), wanted) / energy)))
        return merged

    for block in range(len(pruned.model.layers)):
        weights = fitted(block, weights)
    return weights, reports


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora"])
@pytest.mark.parametrize("teacher", ["dense", "pruned"])
def test_is_the_simulation(adapter: str, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, *args, **kwargs: first_a(tensor))
    dense, model, masks = pair(torch.float64, hidden_size=32, intermediate_size=48)
    data = batches(padded=True)
    settings = {"adapter": adapter, "teacher": teacher, "steps": 20, "seed": 3}
    weights, errors = simulate(dense, model, masks, data, **settings, lr=1e-2, rank=4)
    found = reconstruct(model, data, dense, masks, **settings, learning_rate=1e-2, r=4, progress=False)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-6, atol=1e-8, msg=name)
    for block, (before, after) in zip(found.blocks, errors, strict=True):
        assert block.changed
        assert (block.before, block.after) == pytest.approx((before, after), rel=1e-6)
        assert after < 0.9 * before
    assert found.before == pytest.approx(sum(b for b, _ in errors) / 2)
    assert found.after == pytest.approx(sum(a for _, a in errors) / 2)


def size(values: Tensor) -> float:
    """Root mean square of what is not zero."""
    kept = [float(v) for v in values.detach().flatten() if v != 0]
    return math.sqrt(sum(v * v for v in kept) / len(kept)) if kept else 0.0


def ends(model: nn.Module, weights: Mapping[str, Tensor], block: int, half: int, batch: dict[str, Tensor]) -> Tensor:
    """The hidden states after a Llama block's attention and residual (half 0), or at its end (half 1)."""
    if half == 1:
        return outputs(model, weights, block, batch)
    found: list[Tensor] = []
    norm = model.model.layers[block].post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    functional_call(model, dict(weights), (), {**batch, "use_cache": False})
    handle.remove()
    return found[0]


def fit_kept_weights(
    dense: nn.Module, pruned: nn.Module, masks: dict[str, Tensor], data: list[Any], teacher: str, window: str,
    epochs: int, seed: int, learning_rate: float = 0.0, relative_rate: float = 0.0,
) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:  # fmt: skip
    """Naive float64 fit of all kept weights, window after window: whole models run, sums written out."""
    weights = {n: p.detach().clone() for n, p in pruned.named_parameters()}
    original = {n: p.detach().clone() for n, p in dense.named_parameters()}
    reports = []
    tokens = sum(int(d["attention_mask"].sum()) for d in data)
    for block in range(len(pruned.model.layers)):
        prefix = f"model.layers.{block}."
        parts = [(f"{prefix}self_attn", f"{prefix}input_layernorm"), (f"{prefix}mlp", f"{prefix}post_attention")]
        if window == "block":
            parts = [(), (*parts[0], *parts[1])]
        for half, part in enumerate(parts):
            if not part:
                continue
            own = [n for n in weights if n.startswith(part)]

            def total(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
                each = [
                    ((o - t) ** 2).sum(-1) * b["attention_mask"] for o, t, b in zip(ours, theirs, data, strict=True)
                ]
                return sum(e.sum() for e in each)

            with torch.no_grad():
                teaching = {} if teacher == "dense" else {**weights, **{n: original[n] for n in own}}
                source = dense if teacher == "dense" else pruned
                wanted = [ends(source, teaching, block, half, b) for b in data]
                energy = total(wanted, [torch.zeros_like(w) for w in wanted])
                before = total([ends(pruned, weights, block, half, b) for b in data], wanted) / energy
            leaves = {n: weights[n].clone().requires_grad_() for n in own}
            rates = [learning_rate or relative_rate * max(size(leaf), 1e-3) for leaf in leaves.values()]
            groups = [{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves.values(), rates, strict=True)]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            generator = torch.Generator().manual_seed(seed)
            order = [i for _ in range(epochs) for i in torch.randperm(len(data), generator=generator).tolist()]
            warmup = round(len(order) / 10)
            for step, index in enumerate(order):
                rate = (step + 1) / warmup if step < warmup else 1 - (step - warmup) / (len(order) - warmup)
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = peak * rate
                output = ends(pruned, {**weights, **leaves}, block, half, data[index])
                real = data[index]["attention_mask"]
                optimizer.zero_grad()
                error = (((output - wanted[index]) ** 2).sum(-1) * real).sum() / real.sum()
                (error / (energy / tokens)).backward()
                for name, leaf in leaves.items():
                    if name in masks:
                        leaf.grad *= masks[name]
                optimizer.step()
            fitted = {**weights, **{n: leaf.detach() for n, leaf in leaves.items()}}
            with torch.no_grad():
                after = total([ends(pruned, fitted, block, half, b) for b in data], wanted) / energy
            assert after < before
            weights = fitted
            reports.append((float(before), float(after)))
    return weights, reports


@pytest.mark.slow
@pytest.mark.parametrize("window", ["half", "block"])
@pytest.mark.parametrize("teacher", ["dense", "pruned"])
def test_all_kept_weights_are_those_of_the_simulation(teacher: str, window: str) -> None:
    dense, model, masks = pair(torch.float64, hidden_size=32, intermediate_size=48)
    data = batches(padded=True)
    pairs = [{n: t[i : i + 2] for n, t in batch.items()} for batch in data for i in (0, 2)]
    rate = {"relative_rate": 0.05} if window == "half" else {"learning_rate": 1e-2}
    weights, errors = fit_kept_weights(dense, model, masks, pairs, teacher, window, 5, 3, **rate)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    share = 1.0 if window == "block" else 0.25
    options = {"teacher": teacher, "window": window, "epochs": 5, "seed": 3, "share": share, **rate}
    found = reconstruct(model, data, dense, masks, train="all", **options)
    for name, p in model.named_parameters():
        expected = (1 - share) * before[name] + share * weights[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-8, msg=name)
    assert [(b.before, b.after) for b in found.blocks] == [pytest.approx(e, rel=1e-6) for e in errors]
    if window == "half":
        middle = "post_attention_layernorm"
        names = [f"model.layers.{b} {where} {middle}" for b in (0, 1) for where in ("before", "from")]
        assert [b.name for b in found.blocks] == names
    assert all(not model.get_parameter(n)[~m].view(torch.int64).any() for n, m in masks.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_kept_weights_go_half_of_the_way_and_adapters_all_of_it(dtype: torch.dtype) -> None:
    dense, model, masks = pair(dtype)
    dense, model = dense.eval(), model.eval()

    def fitted(**options: Any) -> dict[str, torch.Tensor]:
        other = copy.deepcopy(model)
        reconstruct(other, batches(), dense, masks, learning_rate=1e-2, **options)
        return {name: p.detach() for name, p in other.named_parameters()}

    whole, default = fitted(train="all", share=1.0), fitted(train="all")
    changed = 0
    for name, p in model.named_parameters():
        middle = ((p.detach().double() + whole[name].double()) / 2).to(dtype)
        middle = torch.where(middle == 0, whole[name], middle)  # no weight that is kept looks pruned
        torch.testing.assert_close(default[name], middle, msg=name)
        changed += not torch.equal(middle, whole[name])
    assert changed > 14
    assert all(not default[name][~mask].any() for name, mask in masks.items())
    adapters, all_of_it = fitted(steps=5), fitted(steps=5, share=1)
    assert all(torch.equal(adapters[name], all_of_it[name]) for name in adapters)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kept_weights_narrower_than_float32_are_trained_as_float32(dtype: torch.dtype) -> None:
    dense, model, masks = pair(dtype)
    exact_dense, exact = copy.deepcopy(dense).float(), copy.deepcopy(model).float()
    # Steps far below the last bit of most weights: rounded each by itself they would all be lost.
    options = {"train": "all", "epochs": 20, "learning_rate": 1e-4}
    found = reconstruct(model, batches(), dense, masks, **options)
    expected = reconstruct(exact, batches(), exact_dense, masks, **options)
    assert all(b.changed for b in found.blocks)
    assert found.before - found.after == pytest.approx(expected.before - expected.after, rel=0.1)
    assert found.after < 0.97 * found.before
    assert all(not model.get_parameter(n)[~m].view(torch.int16).any() for n, m in masks.items())


def test_a_fit_means_the_same_whatever_the_size_of_weights() -> None:
    scaled = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")

    def fitted(scale: float) -> tuple[list[float], dict[str, Tensor]]:
        dense, model, masks = pair(torch.float64)
        for each in (dense, model):  # norms follow: it computes the same with larger weights and hidden states
            for name, p in each.named_parameters():
                p.data *= scale if name.endswith(scaled) else 1.0
            for module in each.modules():
                if hasattr(module, "variance_epsilon"):
                    module.variance_epsilon = 0.0
        found = reconstruct(model, batches(), dense, masks, train="all")
        return [b.after / b.before for b in found.blocks], dict(model.named_parameters())

    (one, weights), (other, larger) = fitted(1.0), fitted(16.0)
    assert all(share < 0.999 for share in one)
    assert other == pytest.approx(one, rel=1e-6)
    for name, p in weights.items():
        off = larger[name].detach() - p.detach() * (16.0 if name.endswith(scaled) else 1.0)
        assert float(off.norm()) < 1e-4 * float(larger[name].norm()), name  # AdamW adds 1e-8 to gradients of any size


@pytest.mark.parametrize("adapter", ["mask_lora", None])
def test_adapters_can_be_fitted_half_by_half(adapter: str | None) -> None:
    dense, model, masks = pair()
    before = snapshot(model)
    found = reconstruct(model, batches(), dense, masks, adapter=adapter, window="half", steps=10, learning_rate=1e-2)
    after = snapshot(model)
    assert len(found.blocks) == 4
    assert found.after < found.before
    changed = {n.split(".", 3)[3] for n in before if before[n] != after[n]}
    assert {"input_layernorm.weight", "post_attention_layernorm.weight"} <= changed
    assert ("self_attn.q_proj.weight" in changed) == (adapter is not None)
    assert all(not model.get_parameter(n)[~m].any() for n, m in masks.items())


@pytest.mark.few_fast(2)
@pytest.mark.parametrize(
    ("config", "middle"),
    [
        (("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}), "ln_2"),
        (("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}), "final_layer_norm"),
        (("Gemma2Config", {"intermediate_size": 48, "head_dim": 8}), "pre_feedforward_layernorm"),
        (("GPTNeoXConfig", {"intermediate_size": 48, "use_parallel_residual": False}), "post_attention_layernorm"),
        (("GPTNeoXConfig", {"intermediate_size": 48, "use_parallel_residual": True}), None),
        (("PhiConfig", {"intermediate_size": 48}), None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_halves_are_found_in_other_families(config: tuple[str, dict[str, Any]], middle: str | None) -> None:
    name, changes = config
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes = {} if name == "GPT2Config" else sizes
    torch.manual_seed(0)
    tokens = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    dense = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes, **tokens, **changes))
    model = copy.deepcopy(dense.eval())
    prune(model, batches(), score="magnitude", sparsity=0.5, progress=False)
    masks = {n: p.detach() != 0 for n, p in model.named_parameters() if p.dim() == 2 and bool((p == 0).any())}
    found = reconstruct(model, batches(), dense, train="all", epochs=3, learning_rate=1e-3, progress=False)
    whole = [block for block, _ in find_blocks(model)]
    halves = [f"{block} {where} {middle}" for block in whole for where in ("before", "from")]
    assert [b.name for b in found.blocks] == (whole if middle is None else halves)
    assert found.after < found.before
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in masks.items() if ".embed" not in n)


def test_a_half_that_fitting_would_worsen_is_put_back() -> None:
    dense, model, masks = pair()
    before = snapshot(model)
    found = reconstruct(model, batches(), dense, masks, train="all", learning_rate=3.0)
    assert [block.changed for block in found.blocks] == [False] * 4
    assert snapshot(model) == before


def test_a_window_that_a_rate_would_worsen_is_fitted_at_a_quarter_of_it() -> None:
    dense, model, masks = pair()
    fitted = []
    for rate in (0.16, 0.04):  # the first would worsen every window
        fitted.append(copy.deepcopy(model))
        found = reconstruct(fitted[-1], batches(), dense, masks, train="all", epochs=2, learning_rate=rate)
        assert all(block.changed and block.after < 0.9 * block.before for block in found.blocks)
    assert snapshot(fitted[0]) == snapshot(fitted[1])


@pytest.mark.few_fast(3)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "hira", "lora_prune", None, "all"])
def test_zeros_stay_and_nothing_else_is_left_behind(adapter: str | None, dtype: torch.dtype, family: str) -> None:
    dense = (make_llama() if family == "llama" else make_gpt2()).to(dtype)
    model = copy.deepcopy(dense)
    masks = halve(model)
    before, names, random = zeros(model), [n for n, _ in model.named_parameters()], torch.get_rng_state()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.train()
    way = {"train": "all"} if adapter == "all" else {"adapter": adapter}
    found = reconstruct(model, batches(), dense, masks, **way, steps=10, learning_rate=1e-2)
    assert all(torch.equal(z, before[n]) for n, z in zeros(model).items())
    assert all(not model.get_parameter(n)[~m].view(torch.int16).any() for n, m in masks.items())
    assert [n for n, _ in model.named_parameters()] == names
    assert not frozen.requires_grad
    assert all(p.requires_grad and bool((p.grad == 1).all()) for p in list(model.parameters())[1:])
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not hasattr(model, "peft_config")
    assert found.after < found.before
    assert any(block.changed for block in found.blocks)


@pytest.mark.parametrize("shared", ["module", "weight"])
def test_what_a_block_shares_with_itself_is_fitted_as_one(shared: str) -> None:
    """A gate that is the up projection too, under two names in its block: the dense one's must not be left in it."""
    dense = make_llama()
    for layer in dense.model.layers:
        if shared == "module":
            layer.mlp.up_proj = layer.mlp.gate_proj
        else:
            layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    model = copy.deepcopy(dense)
    masks, names, before = halve(model), [n for n, _ in model.named_parameters()], snapshot(dense)
    result = reconstruct(model, batches(), dense, masks=masks, train="all", window="block", progress=False)
    assert all(block.after < block.before for block in result.blocks)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    assert snapshot(dense) == before


def test_outside_of_blocks_nothing_changes() -> None:
    dense, model, masks = pair()
    before = snapshot(model)
    reconstruct(model, batches(), dense, masks, steps=3)
    after = snapshot(model)
    outside = [n for n in before if ".layers." not in n]
    assert len(outside) >= 3
    assert all(before[n] == after[n] for n in outside)
    assert all(before[n] != after[n] for n in before if ".layers." in n and "inv_freq" not in n)


@pytest.mark.parametrize("source", ["mapping", "pruned weights", "folder", "file", "checkpoint"])
def test_dense_weights_from_anywhere(source: str, tmp_path: Path) -> None:
    dense, model, masks = pair()
    other = copy.deepcopy(model)
    expected = reconstruct(model, batches(), dense, masks, steps=5)
    weights = {n: p.detach().clone() for n, p in dense.named_parameters()}
    given: Any = weights
    if source == "pruned weights":
        given = {n: w for n, w in weights.items() if n in masks}
    elif source in ("folder", "file"):
        dense.save_pretrained(tmp_path)
        given = open_checkpoint(tmp_path if source == "folder" else tmp_path / "model.safetensors")
    elif source == "checkpoint":  # as of a LightningModule
        path = tmp_path / "dense.ckpt"
        torch.save({"state_dict": {f"model.{n}": w for n, w in weights.items()}}, path)
        given = open_checkpoint(path)
    assert reconstruct(other, batches(), given, masks, steps=5) == expected
    assert snapshot(other) == snapshot(model)


def test_dense_weights_are_asked_for_block_by_block() -> None:
    dense, model, masks = pair(num_hidden_layers=3)
    asked: list[int] = []

    held = dict(dense.named_parameters())

    class Weights(Mapping):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(int(name.split(".")[2]))
            return held[name]

        def __iter__(self) -> Iterator[str]:
            return iter(held)

        def __len__(self) -> int:
            return len(held)

    reconstruct(model, batches(), Weights(), masks, steps=1)
    assert list(dict.fromkeys(asked[9:])) == [0, 1, 2]  # the first 9 are those of the check before anything changes
    assert asked == sorted(asked[:9]) + sorted(asked[9:])
    assert len(asked) == 4 * 9


@pytest.mark.slow
def test_masks_default_to_zeros_and_any_score_will_do() -> None:
    dense = make_llama()
    for options in ({"score": "wanda", "pattern": "2:4"}, {"score": "kfac"}, {"score": "sparsegpt"}):
        model = copy.deepcopy(dense)
        masks = prune(model, batches(), **options, progress=False)
        other = copy.deepcopy(model)
        found = reconstruct(model, batches(), dense, masks, steps=10, learning_rate=1e-2)
        assert found == reconstruct(other, batches(), dense, steps=10, learning_rate=1e-2)
        assert snapshot(model) == snapshot(other)
        assert all(block.after < block.before for block in found.blocks)
        assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in masks.items())


def test_a_block_with_nothing_pruned_is_passed_over() -> None:
    dense, model, masks = pair()
    whole = {n: p for n, p in dense.named_parameters() if "layers.0" in n}
    model.load_state_dict(whole, strict=False)
    masks = {n: m for n, m in masks.items() if "layers.1" in n}
    before = snapshot(model.model.layers[0])
    first, second = reconstruct(model, batches(), dense, masks, steps=5, learning_rate=1e-2).blocks
    assert (first.before, first.after, first.changed) == (0.0, 0.0, False)
    assert second.changed
    assert snapshot(model.model.layers[0]) == before


def test_a_block_that_fitting_would_worsen_stays_as_it_was() -> None:
    dense, model, masks = pair()
    before = snapshot(model)
    found = reconstruct(model, batches(), dense, masks, steps=1, learning_rate=3.0)
    assert [block.changed for block in found.blocks] == [False, False]
    assert found.before == found.after
    assert snapshot(model) == before


def test_seed_decides() -> None:
    results = []
    for seed in (0, 0, 1):
        dense, model, masks = pair()
        torch.manual_seed(len(results))  # the global state must not matter
        reconstruct(model, batches(), dense, masks, steps=3, seed=seed, offload="cpu")
        results.append(snapshot(model))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_a_model_need_not_name_its_blocks() -> None:
    results = []
    for named in (True, False):
        dense, model, masks = pair()
        for module in () if named else (*dense.modules(), *model.modules()):
            if hasattr(module, "_no_split_modules"):
                module._no_split_modules = None
        assert bool(find_blocks(model)) is named
        reconstruct(model, batches(), dense, masks, steps=3)
        results.append(snapshot(model))
    assert results[0] == results[1] != snapshot(pair()[1])


@pytest.mark.parametrize("failure", ["interrupt", "nan in training", "nan in data", "empty", "diverged"])
def test_after_a_failure_every_bit_is_as_before(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, masks = pair()
    state, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    step, calls = torch.optim.AdamW.step, []

    def fail(self: Any, *args: Any) -> Any:
        calls.append(0)
        if len(calls) == 7:  # in the second block; the first is merged
            if failure == "interrupt":
                raise KeyboardInterrupt
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.fill_(float("nan"))
        return step(self, *args)

    arguments: dict[str, Any] = {"steps": 5}
    data, error = batches(), CalibrationError
    if failure in ("interrupt", "nan in training"):
        monkeypatch.setattr(torch.optim.AdamW, "step", fail)
        error = KeyboardInterrupt if failure == "interrupt" else ValueError
    elif failure == "nan in data":
        with torch.no_grad():
            model.model.embed_tokens.weight[IDS[0, 0]] = float("nan")
        state = snapshot(model)
    elif failure == "diverged":
        arguments, error = {"steps": 5, "learning_rate": 1e30}, (ValueError, CalibrationError)
    else:
        data = []
    with pytest.raises(error):
        reconstruct(model, data, dense, masks, **arguments)
    assert snapshot(model) == state
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any("base_layer" in n for n, _ in model.named_parameters())
    if failure == "interrupt":
        assert len(calls) == 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adapter": "lora"}, ValueError, "use adapter='mask_lora'"),
        ({"adapter": "x"}, ValueError, "must be one of"),
        ({"train": ("head",)}, ValueError, "'head' is in no decoder block"),
        ({"adapter": None, "train": ()}, ValueError, "leaves nothing to fit"),
        ({"adapter": None, "train": ("bias",)}, ValueError, "leaves nothing to fit"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"steps": 5, "epochs": 1}, ValueError, "give one of them"),
        ({"train": "all", "epochs": 0}, ValueError, "epochs=0"),
        ({"train": "all", "batch_size": 1.5}, ValueError, "batch_size=1.5"),
        ({"train": "all", "share": 0.0}, ValueError, r"share=0.0 must be a number in \(0, 1\]"),
        ({"share": 1.5}, ValueError, "share=1.5"),
        ({"share": "half"}, ValueError, "share='half'"),
        ({"train": "all", "adapter": "hira"}, ValueError, "remove adapter"),
        ({"train": "all", "r": 4}, ValueError, "takes no LoRA options"),
        ({"train": "norm"}, TypeError, "write train="),
        ({"window": "quarter"}, ValueError, "window='quarter' must be one of"),
        ({"teachr": "dense"}, TypeError, "did you mean 'teacher'"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0"),
        ({"learning_rate": "high"}, ValueError, "learning_rate='high' must be a number above 0"),
        ({"train": "all", "relative_rate": -1.0}, ValueError, "relative_rate=-1.0 must be a number above 0"),
        ({"train": "all", "relative_rate": 0.1, "learning_rate": 0.1}, ValueError, "give one of them"),
        ({"train": "all", "learning_rate": None, "relative_rate": None}, ValueError, "give one of them"),
        ({"relative_rate": 0.1}, ValueError, "relative_rate=0.1 with adapter='mask_lora'"),
        ({"teacher": "both"}, ValueError, "teacher='both'"),
        ({"rank_pattern": {"q_proj": 4}}, ValueError, "not supported block by block"),
        ({"target_modules": ["qq_proj"]}, ValueError, "did you mean 'q_proj'"),
        ({"dense": 3}, TypeError, "dense=int"),
        ({"dense": "folder"}, TypeError, r"dense=str must be .*open_checkpoint\(path\)"),
        ({"dense": {}}, ValueError, "dense has no 'model.layers.0.self_attn.q_proj.weight'"),
        ({"dense": "model"}, ValueError, "is the pruned model itself"),
        ({"dense": "pruned"}, ValueError, "are zero in dense too"),
        ({"dense": "wide"}, ValueError, "has shape"),
        ({"masks": "broken"}, ValueError, "are not zero"),
        ({"model": "adapted"}, ValueError, "has adapters already"),
        ({"model": "linear"}, ValueError, "names no decoder blocks"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    dense, model, masks = pair()
    arguments = {"dense": dense, "masks": masks, **arguments}
    if arguments["masks"] == "broken":
        arguments["masks"] = {n: torch.zeros_like(m) for n, m in masks.items()}
    others = {"model": model, "pruned": copy.deepcopy(model), "wide": make_llama(intermediate_size=112)}
    if isinstance(arguments["dense"], str):
        arguments["dense"] = others.get(arguments["dense"], arguments["dense"])
    given = arguments.pop("model", None)
    if given == "adapted":
        model = add_adapters(model)
    elif given == "linear":
        model, arguments["masks"] = nn.Sequential(nn.Linear(4, 4)), None
    before = snapshot(model)
    with pytest.raises(error, match=message):
        reconstruct(model, batches(), **arguments)
    assert snapshot(model) == before


def test_a_model_read_from_gguf_only_remembers_that_it_was_quantized() -> None:
    dense, model, masks = pair()
    model.is_quantized = True
    with pytest.raises(ValueError, match="is quantized"):
        reconstruct(model, batches(), dense, masks, steps=1)
    model.config.quantization_config = transformers.GgufConfig(dequantize=True)
    assert reconstruct(model, batches(), dense, masks, steps=1).blocks


def test_an_autocast_around_the_call_meets_the_weights_as_they_become() -> None:
    """It keeps the weights that it has cast, and knows of no change to them."""
    found = []
    for kept in (True, False):
        dense, model, _ = pair()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kept):
            model(**batches()[0])
            reconstruct(model, batches(), dense, steps=2, progress=False)
            after = model(**batches()[0]).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(after, model(**batches()[0]).logits)
        found.append(snapshot(model))
    assert found[0] == found[1]
