"""Block-wise reconstruction against a float64 simulation, from every source of dense weights, and its failures."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from perp_models import halve, make_gpt2, zeros
from tiny import make_llama, make_tokens, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GgufConfig

from lightning_prune import CalibrationError, open_checkpoint, prune
from lightning_prune.perp import add_adapters, reconstruct

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
    dense: nn.Module, pruned: nn.Module, masks: dict[str, Tensor], data: list[Any], adapter: str, targets: str,
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
            if targets == "dense":
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


@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora"])
@pytest.mark.parametrize("targets", ["dense", "pruned"])
def test_is_the_simulation(adapter: str, targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, *args, **kwargs: first_a(tensor))
    dense, model, masks = pair(torch.float64, hidden_size=32, intermediate_size=48)
    data = batches(padded=True)
    settings = {"adapter": adapter, "targets": targets, "steps": 20, "seed": 3}
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "lora_prune", None])
def test_zeros_stay_and_nothing_else_is_left_behind(adapter: str | None, dtype: torch.dtype, family: str) -> None:
    dense = (make_llama() if family == "llama" else make_gpt2()).to(dtype)
    model = copy.deepcopy(dense)
    masks = halve(model)
    before, names, random = zeros(model), [n for n, _ in model.named_parameters()], torch.get_rng_state()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.train()
    found = reconstruct(model, batches(), dense, masks, adapter=adapter, steps=10, learning_rate=1e-2)
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
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0"),
        ({"targets": "both"}, ValueError, "targets='both'"),
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


def test_a_model_read_from_gguf_only_remembers_that_it_was_quantised() -> None:
    dense, model, masks = pair()
    model.is_quantized = True
    with pytest.raises(ValueError, match="is quantised"):
        reconstruct(model, batches(), dense, masks, steps=1)
    model.config.quantization_config = GgufConfig(dequantize=True)
    assert reconstruct(model, batches(), dense, masks, steps=1).blocks
