"""PERPRetraining along a schedule of WeightPruning: retrain, merge, prune further, and begin anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import make_llama, make_tokens, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from versions import WEIGHTS_ONLY, EMAWeightAveraging

from lightning_prune import CausalLM, CubicSchedule, LinearSchedule, OneShot, PERPRetraining, WeightPruning

IDS = make_tokens(24, 12)
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_llama(hidden_size=32, intermediate_size=48).double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def fit(module: L.LightningModule, data: Any, path: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    options = {"max_steps": 6, "accelerator": "cpu", "logger": False, "default_root_dir": path}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    resume, validation = settings.pop("resume", None), settings.pop("val_dataloaders", None)
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = L.Trainer(**{**options, **quiet, **settings}, callbacks=list(callbacks), enable_checkpointing=saves)
    trainer.fit(module, data, validation, ckpt_path=resume, **WEIGHTS_ONLY)
    return trainer


def pruning(schedule: Any, **settings: Any) -> WeightPruning:
    return WeightPruning("magnitude", sparsity=0.6, schedule=schedule, num_samples=8, progress=False, **settings)


def first_a(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        flat = torch.sin(torch.arange(tensor.numel()).float()) / math.sqrt(tensor.shape[1])
        return tensor.copy_(flat.view(tensor.shape))


def simulate(
    adapter: str, updates: dict[int, float], steps: int, rank: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Naive float64 prune-retrain rounds: explicit products, masks by sorting, an optimizer made anew for adapters."""
    model = Module().model
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = [n for n in weights if n.endswith("proj.weight")]
    norms = {n: weights[n].clone().requires_grad_() for n in weights if "norm" in n}
    masks = {n: torch.ones_like(weights[n]) for n in names}

    def begin() -> tuple[dict[str, Tensor], dict[str, Tensor], torch.optim.Optimizer]:
        a, b = {}, {}
        for n in names:
            rows, columns = weights[n].shape
            if adapter == "mask_lora":
                a[n], b[n] = first_a(torch.empty(rank, columns).double()), torch.zeros(rows, rank).double()
            else:
                a[n] = torch.full((rank, columns), 1 / math.sqrt(rank)).double()
                b[n] = torch.full((rows, rank), 1 / math.sqrt(rank)).double()
        matrices = [x.requires_grad_() for n in names for x in (a[n], b[n])]
        return a, b, torch.optim.AdamW(matrices, lr=1e-2, weight_decay=0.0)

    def effective(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        if adapter == "mask_lora":
            return {n: weights[n] + 2 * masks[n] * (b[n] @ a[n]) for n in names}
        return {n: weights[n] * (b[n] @ a[n]) for n in names}

    def prune(sparsity: float) -> None:
        for n in names:
            order = (weights[n].abs() * masks[n] - (1 - masks[n])).flatten().sort(stable=True).indices
            masks[n] = torch.ones(order.numel()).double()
            masks[n][order[: math.floor(sparsity * order.numel())]] = 0.0
            masks[n] = masks[n].view(weights[n].shape)
            weights[n] = weights[n] * masks[n]

    if 0 in updates:
        prune(updates[0])
    a, b, optimizer = begin()
    of_norms = torch.optim.AdamW(norms.values(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        ids = IDS[4 * step : 4 * step + 4]
        own = {**weights, **effective(a, b), **norms}
        loss = functional_call(model, own, (), {"input_ids": ids, "labels": ids}).loss
        optimizer.zero_grad(), of_norms.zero_grad()
        loss.backward()
        optimizer.step(), of_norms.step()
        if step + 1 in updates:
            weights.update({n: w.detach() for n, w in effective(a, b).items()})
            prune(updates[step + 1])
            a, b, optimizer = begin()
    weights.update({n: w.detach() for n, w in {**effective(a, b), **norms}.items()})
    return weights, masks


@pytest.mark.few_fast(4)
@pytest.mark.parametrize("first", ["pruning", "perp"])
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora"])
@pytest.mark.parametrize(
    ("schedule", "updates"),
    [
        (LinearSchedule(start=0, end=4, every=2), {2: 0.3, 4: 0.6}),
        (CubicSchedule(start=0, end=6, every=3), {3: 0.6 * 0.875, 6: 0.6}),
        (OneShot(3), {3: 0.6}),
    ],
)
def test_is_the_simulation(
    schedule: Any, updates: dict[int, float], adapter: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, *args, **kwargs: first_a(tensor))
    module, pruner, perp = Module(), pruning(schedule), PERPRetraining(adapter=adapter, r=4)
    data = DataLoader(IDS, batch_size=4)
    fit(module, data, tmp_path, *([pruner, perp] if first == "pruning" else [perp, pruner]), precision="64-true")
    weights, masks = simulate(adapter, updates, 6, 4)
    for name, p in module.model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-7, atol=1e-9, msg=name)
    assert {n.removeprefix("model.") for n in pruner.masks} == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(pruner.masks[f"model.{name}"], mask.bool())
        assert not module.model.get_parameter(name)[mask == 0].view(torch.int64).any()


class Watch(L.Callback):
    """What the model computes before and after the masks change, and the adapters' optimizer states then."""

    def __init__(self) -> None:
        self.sparsities: list[float] = []
        self.states: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        (pruner,) = (c for c in trainer.callbacks if isinstance(c, WeightPruning))
        adapters = [p for n, p in pl_module.named_parameters() if "lora_" in n]
        self.sparsities.append(round(pruner.sparsity, 2))
        self.states.append(sum(p in trainer.optimizers[0].state for p in adapters))


@pytest.mark.slow
@pytest.mark.parametrize("score", ["wanda", "gblm", "kfac"])
def test_scores_of_every_kind(score: str, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    module, watch = CausalLM(config=LLAMA, learning_rate=1e-2, lr_schedule="constant"), Watch()
    pruner = WeightPruning(
        score, sparsity=0.6, schedule=LinearSchedule(start=0, end=4, every=2), num_samples=8, progress=False
    )
    data = DataLoader([{"input_ids": row} for row in IDS], batch_size=4)
    fit(module, data, tmp_path, pruner, PERPRetraining(), watch)
    assert watch.sparsities == pytest.approx([0.0, 0.3, 0.3, 0.6, 0.6, 0.6], abs=0.02)
    assert watch.states == [28, 0, 28, 0, 28, 28]
    assert all(not module.get_parameter(n)[~m].view(torch.int32).any() for n, m in pruner.masks.items())


SCHEDULES = {
    "saved at an update": LinearSchedule(start=0, end=4, every=2),
    "saved between updates": LinearSchedule(start=1, end=5, every=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resume_in_the_middle_is_bit_identical(schedule: str, settings: dict[str, Any], tmp_path: Path) -> None:
    batches = 2 * settings.get("accumulate_grad_batches", 1)  # an epoch is two steps

    def run(path: Path, resume: Any = None, first: str = "perp") -> dict[str, bytes]:
        L.seed_everything(0 if resume is None else 7, verbose=False)
        module = CausalLM(config=LLAMA, learning_rate=1e-2, lr_schedule="constant")
        pruner = WeightPruning("gblm", sparsity=0.6, schedule=SCHEDULES[schedule], num_samples=8, progress=False)
        save = ModelCheckpoint(dirpath=path, filename="{step}", save_top_k=-1)
        callbacks = [PERPRetraining(seed=0), pruner]
        data = DataLoader([{"input_ids": row} for row in IDS[: 4 * batches]], batch_size=4)
        ordered = callbacks if first == "perp" else callbacks[::-1]
        fit(module, data, path, *ordered, save, resume=resume, max_steps=-1, max_epochs=3, **settings)
        assert all(not module.get_parameter(n)[~m].view(torch.int32).any() for n, m in pruner.masks.items())
        return snapshot(module.model)

    whole = run(tmp_path / "a")
    for step in (2, 4):
        assert run(tmp_path / f"b{step}", tmp_path / "a" / f"step={step}.ckpt") == whole
    for first in ("perp", "pruning"):  # nothing is left to train
        assert run(tmp_path / first, tmp_path / "a" / "step=6.ckpt", first) == whole


class Average(EMAWeightAveraging):
    """Leaves most steps out, those of updates among them."""

    def __init__(self) -> None:
        super().__init__(decay=0.75, update_every_n_steps=3)

    @property
    def weights(self) -> dict[str, Tensor]:
        found = next(m for m in vars(self).values() if isinstance(m, nn.Module))
        return {n.partition("base_model.model.")[2]: p.detach().clone() for n, p in found.named_parameters()}


class Looks(L.Callback):
    """At the average around updates of the masks, and at what is validated."""

    def __init__(self, average: Average, pruner: WeightPruning) -> None:
        self.average, self.pruner, self.sparsity, self.updates, self.validated = average, pruner, 0.0, 0, 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.before, self.sparsity = self.average.weights, self.pruner.sparsity

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        now, model = self.average.weights, dict(pl_module.model.named_parameters())
        if self.pruner.sparsity == self.sparsity:
            return
        self.updates += 1
        for name in (n for n in now if n.endswith("base_layer.weight")):
            layer = name.removesuffix("base_layer.weight")
            a, b = (self.before[f"{layer}lora_{m}.default.weight"] for m in "AB")
            mask = self.pruner.masks[f"model.base_model.model.{name}"]
            expected = (self.before[name] + 2 * b @ a) * mask
            torch.testing.assert_close(now[name], expected, rtol=1e-12, atol=1e-14)
            assert torch.equal(
                now[f"{layer}lora_A.default.weight"], model[f"base_model.model.{layer}lora_A.default.weight"]
            )
            assert not now[f"{layer}lora_B.default.weight"].any()

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for name, mask in self.pruner.masks.items():
            self.validated += 1
            layer = pl_module.get_submodule(name.removesuffix(".base_layer.weight"))
            assert not layer.merged_weight()[~mask].any()


@pytest.mark.slow
def test_averages_are_merged_with_the_model_and_take_its_masks(tmp_path: Path, recwarn: Any) -> None:
    class Validated(Module):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    module, pruner, average = Validated(), pruning(LinearSchedule(start=0, end=6, every=2)), Average()
    looks, data = Looks(average, pruner), DataLoader(IDS, batch_size=4)
    trainer = {"precision": "64-true", "val_check_interval": 1, "limit_val_batches": 1, "val_dataloaders": data}
    fit(module, data, tmp_path, pruner, PERPRetraining(r=4), looks, average, **trainer)
    assert looks.updates == 3
    assert looks.validated
    assert all(not module.get_parameter(n)[~mask].any() for n, mask in pruner.masks.items())
    assert not [w for w in recwarn if "were changed outside optimizer steps" in str(w.message)]


def test_a_merge_that_is_not_finite_stops_before_anything_is_pruned_further(tmp_path: Path) -> None:
    class Break(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                with torch.no_grad():
                    next(p for n, p in pl_module.named_parameters() if "lora_A" in n).fill_(float("inf"))

    module, pruner = Module(), pruning(LinearSchedule(start=0, end=4, every=2))
    data = DataLoader(IDS, batch_size=4)
    with pytest.raises(ValueError, match="not finite: training diverged"):
        fit(module, data, tmp_path, pruner, PERPRetraining(), Break(), precision="64-true")
    assert pruner.masks == {}


@pytest.mark.parametrize(
    ("arguments", "way"),
    [
        ({"adapter": "lora", "merge": False}, "use adapter='mask_lora', or schedule=None"),
        ({"lora_options": {"init_lora_weights": False}}, "leave init_lora_weights out, or schedule=None"),
    ],
)
def test_adapters_that_cannot_begin_anew_are_refused(arguments: dict[str, Any], way: str, tmp_path: Path) -> None:
    module = Module()
    before = snapshot(module)
    with pytest.raises(ValueError, match=way):
        fit(module, DataLoader(IDS, batch_size=4), tmp_path, PERPRetraining(**arguments), pruning(OneShot(2)))
    assert snapshot(module) == before
