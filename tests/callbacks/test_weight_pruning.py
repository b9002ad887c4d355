"""`WeightPruning` in real Trainers: masks hold in every setting, and nothing else changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from own_modules import Classifier, FindAgain, Manual, dataset, make_trainer, squared_error
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import (
    ELSA,
    CalibrationError,
    CubicSchedule,
    LinearSchedule,
    OneShot,
    SparsityMonitor,
    WeightPruning,
    prune,
)
from lightning_prune.pruning.holding import MaskHold

warnings.filterwarnings("ignore", module="lightning")


class ManualPlain(Manual):
    plain_backward = True


class ConvNet(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, padding=1).to(memory_format=torch.channels_last),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(32, 4),
        )


class Compiled(Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.net = torch.compile(self.net, backend="eager")


class WithoutLogs(Classifier):
    """What can be compiled as a whole."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class SkippedStep(L.pytorch.plugins.precision.Precision):
    """Like a gradient scaler that finds an infinity: every third step is left out after backward."""

    count = 0

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        self.count += 1
        if self.count % 3 == 0:
            return closure()
        return super().optimizer_step(optimizer, model, closure, **kwargs)


def scaler() -> MixedPrecision:
    """A real gradient scaler whose scale is too large at first: more than half of the steps are skipped."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3))


class Watch(L.Callback):
    """Look at every moment that counts: weights around each batch and validation, gradients as a step begins."""

    def __init__(self, pruning: WeightPruning) -> None:
        self.pruning = pruning
        self.looks = 0
        self.gradient_looks = 0
        self.sparsities: list[float] = []

    def _zeros(self, module: nn.Module, attribute: str, only: set[int] | None = None) -> None:
        weights = {n.replace("_orig_mod.", ""): p for n, p in module.named_parameters()}
        for name, mask in self.pruning.masks.items():
            value = weights[name].detach() if attribute == "weight" else weights[name].grad
            if value is not None and (only is None or id(weights[name]) in only):
                pruned = value[~mask]
                assert torch.equal(pruned, torch.zeros_like(pruned)), name
                assert not torch.signbit(pruned).any(), name

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._zeros(pl_module, "weight")
        self.sparsities.append(self.pruning.sparsity)
        self.looks += 1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def before_step(optimizer: Any, *_: Any) -> None:
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._zeros(pl_module, "gradient", mine)
            self.gradient_looks += 1

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(before_step)  # after the callback's own, which was there first

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._zeros(pl_module, "weight")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._zeros(pl_module, "weight")


@dataclass
class Setting:
    """One row of the table: a module, the Trainer's arguments, the callback's."""

    name: str
    module: Callable[[], L.LightningModule] = Classifier
    trainer: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] = field(default_factory=lambda: {"score": "gblm"})


SETTINGS = [
    Setting("plain"),
    Setting("magnitude", pruning={"score": "magnitude", "sparsity": 0.7}),
    Setting("random", pruning={"score": "random"}),
    Setting("wanda 2:4", pruning={"score": "wanda", "pattern": "2:4"}),
    Setting("gradient l1", pruning={"score": "gradient", "grad_norm": "l1"}),
    Setting("kfac", pruning={"score": "kfac"}),
    Setting("sparsegpt", pruning={"score": "sparsegpt"}),
    Setting("wanda obs", pruning={"score": "wanda", "update": "obs"}),
    Setting("accumulate", trainer={"accumulate_grad_batches": 3}),
    Setting("clip norm", trainer={"gradient_clip_val": 0.1}),
    Setting("clip value", trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    Setting("bf16-mixed", trainer={"precision": "bf16-mixed"}),
    Setting("bf16-true", trainer={"precision": "bf16-true"}),
    Setting("fused", lambda: Classifier("adamw-fused")),
    Setting("foreach", lambda: Classifier("adamw-foreach")),
    Setting("sgd", lambda: Classifier("sgd")),
    Setting("rmsprop", lambda: Classifier("rmsprop")),
    Setting("skipped step", trainer={"plugins": SkippedStep}),
    Setting("fp16 scaler", trainer={"plugins": scaler}),
    Setting("manual, two optimizers", Manual, pruning={"score": "gblm", "loss_fn": squared_error}),
    Setting("manual, plain backward", ManualPlain, pruning={"score": "kfac", "loss_fn": squared_error}),
    Setting("convolutions", ConvNet),
    Setting("convolutions sparsegpt", ConvNet, pruning={"score": "sparsegpt"}),
    Setting("compiled", Compiled),
    Setting("late", pruning={"score": "wanda", "schedule": OneShot(5)}),
    Setting("linear", pruning={"score": "magnitude", "schedule": LinearSchedule(0, 12, 3)}),
    Setting("cubic", pruning={"score": "gblm", "schedule": CubicSchedule(2, 14, 4)}),
    Setting("cubic kfac", pruning={"score": "kfac", "schedule": CubicSchedule(2, 14, 4)}),
    Setting(
        "cubic, manual",
        Manual,
        pruning={"score": "wanda", "loss_fn": squared_error, "schedule": CubicSchedule(1, 20, 3)},
    ),
]


@pytest.fixture(params=SETTINGS, ids=lambda s: s.name)
def setting(request: pytest.FixtureRequest) -> Setting:
    return request.param


def build(setting: Setting) -> tuple[L.LightningModule, WeightPruning]:
    torch.manual_seed(7)
    module = setting.module()
    return module, WeightPruning(**{"num_samples": 32, "progress": False, **setting.pruning})


@pytest.mark.few_fast(6)
def test_masks_hold_at_every_moment(setting: Setting, tmp_path: Any) -> None:
    module, pruning = build(setting)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    watch = Watch(pruning)
    make_trainer(tmp_path, pruning, watch, **setting.trainer).fit(module)
    assert watch.looks == 24
    assert watch.gradient_looks >= 8
    wanted = setting.pruning.get("sparsity", 0.5)
    assert pruning.sparsity == pytest.approx(wanted, abs=0.02)
    # It trained: what is kept moved, and nothing revived what is pruned.
    for name, parameter in module.named_parameters():
        mask = pruning.masks.get(name.replace("_orig_mod.", ""))
        if mask is not None:
            assert not torch.equal(parameter[mask].detach().float(), before[name][mask].float())
            assert bool((parameter[~mask] == 0).all())


@pytest.mark.few_fast(3)
def test_resume_is_bit_identical(setting: Setting, tmp_path: Any) -> None:
    if setting.name == "skipped step":
        pytest.skip("the stand-in for a scaler keeps a counter that no checkpoint holds")

    def run(path: Any, epochs: int, resume: Any = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        L.seed_everything(3, verbose=False)
        module, pruning = build(setting)
        if hasattr(module, "net"):
            for layer in module.net.modules():  # dropout would need the random state of the interruption
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
        module.train_dataloader = lambda: DataLoader(dataset(), batch_size=8)
        saver = ModelCheckpoint(dirpath=path, filename="at-{epoch}", save_top_k=-1, every_n_epochs=1)
        make_trainer(path, pruning, saver, **{**setting.trainer, "max_epochs": epochs}).fit(module, ckpt_path=resume)
        return {n: p.detach().clone() for n, p in module.named_parameters()}, pruning.masks

    whole, whole_masks = run(tmp_path / "whole", 2)
    run(tmp_path / "part", 1)
    resumed, resumed_masks = run(tmp_path / "rest", 2, tmp_path / "part" / "at-epoch=0.ckpt")
    assert whole_masks.keys() == resumed_masks.keys()
    for name, mask in whole_masks.items():
        assert torch.equal(mask, resumed_masks[name]), name
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("how", ["given to fit", "in place"])
def test_a_compiled_module_is_pruned_as_one_that_is_not(how: str, tmp_path: Any) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module: Any = WithoutLogs(dropout=0.0)
        module.train_dataloader = lambda: DataLoader(dataset(), batch_size=8)
        pruning = WeightPruning("kfac", num_samples=24, schedule=OneShot(3), progress=False)
        monitor = SparsityMonitor(history=False)
        given = module
        if compiled and how == "given to fit":
            given = torch.compile(module, backend="eager")
        elif compiled:
            module.compile(backend="eager")
        trainer = make_trainer(tmp_path, pruning, monitor, max_epochs=1, logger=CSVLogger(tmp_path))
        trainer.fit(given)
        found.append((pruning.masks, dict(module.named_parameters())))
    (masks, weights), (masks_compiled, weights_compiled) = found
    assert masks.keys() == masks_compiled.keys()
    assert all(torch.equal(mask, masks_compiled[name]) for name, mask in masks.items())
    for name, weight in weights.items():
        torch.testing.assert_close(weights_compiled[name], weight, rtol=0, atol=1e-6)


class Overflow(L.Callback):
    """Make the gradient of one pruned weight infinite, as a product in float16 may."""

    def __init__(self, pruning: WeightPruning) -> None:
        self.pruning = pruning

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        name, mask = next(iter(self.pruning.masks.items()))
        pl_module.get_parameter(name).register_hook(lambda gradient: gradient.masked_fill(~mask, torch.inf))


@pytest.mark.parametrize("hooks", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaler", "clipping"])
def test_an_infinite_gradient_of_a_pruned_weight_changes_nothing(
    scaled: bool, hooks: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaler would skip the step, and a norm of infinity would make every gradient NaN."""
    hold = lambda module, masks, hook_gradients: MaskHold(module, masks, hooks)  # noqa: E731
    monkeypatch.setattr("lightning_prune.callbacks.weight_pruning.MaskHold", hold)
    found = []
    for overflow in (False, True):
        torch.manual_seed(0)
        module, pruning = Classifier("sgd", dropout=0.0), WeightPruning("magnitude", sparsity=0.5, progress=False)
        module.train_dataloader = lambda: DataLoader(dataset(), batch_size=8)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
        how = {"plugins": plugin} if scaled else {"gradient_clip_val": 0.1}
        make_trainer(tmp_path, pruning, *([Overflow(pruning)] if overflow else []), max_epochs=1, **how).fit(module)
        assert not scaled or plugin.scaler.get_scale() == 256.0
        found.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_fit_is_that_of_a_model_pruned_by_hand(tmp_path: Any) -> None:
    """Against an independent loop: same masks, AdamW on masked gradients, weights masked after each step."""
    torch.manual_seed(0)
    module = Classifier(dropout=0.0)
    module.train_dataloader = lambda: DataLoader(dataset(), batch_size=8)
    twin = copy.deepcopy(module)
    calibration = [dataset()[:24]]
    pruning = WeightPruning(score="gblm", calibration=calibration, num_samples=24, progress=False)
    make_trainer(tmp_path, pruning, gradient_clip_val=0.5).fit(module)

    prune(twin, [dataset()[:24]], score="gblm", num_samples=24, loss_fn=squared_error)
    masks = {
        n: p.detach() != 0 if n.endswith("weight") else torch.ones_like(p).bool() for n, p in twin.named_parameters()
    }
    optimizer = twin.configure_optimizers()
    for _ in range(2):
        for x, y in DataLoader(dataset(), batch_size=8):
            optimizer.zero_grad()
            F.cross_entropy(twin.net(x), y).backward()
            for name, parameter in twin.named_parameters():
                parameter.grad *= masks[name]
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    parameter *= masks[name]
    for (name, ours), theirs in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7, msg=name)


def test_calibration_leaves_no_trace(tmp_path: Any) -> None:
    """A run whose masks keep everything is bit-identical to a run without the callback."""

    def run(path: Any, *callbacks: L.Callback) -> Classifier:
        L.seed_everything(5, verbose=False)
        module = Classifier()
        make_trainer(path, *callbacks, logger=CSVLogger(path), log_every_n_steps=1).fit(module)
        return module

    plain = run(tmp_path / "plain")
    for score in ("wanda", "gblm", "kfac"):
        pruning = WeightPruning(score=score, sparsity=0.0, num_samples=40, progress=False)
        calibrated = run(tmp_path / score, pruning)
        assert pruning.masks
        assert all(bool(m.all()) for m in pruning.masks.values())
        for (name, a), b in zip(plain.named_parameters(), calibrated.parameters(), strict=True):
            assert torch.equal(a, b), (score, name)
        assert plain.calls == calibrated.calls == 24
        assert plain.losses == calibrated.losses
        assert torch.equal(torch.stack(plain.batches), torch.stack(calibrated.batches))
        assert torch.equal(plain.seen.compute(), calibrated.seen.compute())
        first, second = (
            (tmp_path / p / "lightning_logs" / "version_0" / "metrics.csv").read_text() for p in ("plain", score)
        )
        assert first == second
        assert calibrated.training is False or calibrated.net[0].training == plain.net[0].training


def test_checkpoint_is_that_of_the_plain_module(tmp_path: Any) -> None:
    module, pruning = build(SETTINGS[0])
    saver = ModelCheckpoint(dirpath=tmp_path, filename="end", save_last=False)
    make_trainer(tmp_path, pruning, saver).fit(module)
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    plain = Classifier()
    assert checkpoint["state_dict"].keys() == plain.state_dict().keys()
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    make_trainer(tmp_path / "plain", max_epochs=3).fit(plain, ckpt_path=tmp_path / "end.ckpt")  # without the callback
    state = checkpoint["callbacks"]["WeightPruning"]
    assert sum(e["bits"].numel() for e in state["masks"].values()) == sum(
        (p.numel() + 7) // 8 for n, p in module.named_parameters() if n in state["masks"]
    )


@pytest.mark.few_fast(1)
@pytest.mark.parametrize("damage", ["bits", "short", "shape", "name"])
def test_damaged_masks_are_refused_by_name(damage: str, tmp_path: Any) -> None:
    module, pruning = build(SETTINGS[0])
    saver = ModelCheckpoint(dirpath=tmp_path, filename="end")
    make_trainer(tmp_path, pruning, saver).fit(module)
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    masks = checkpoint["callbacks"]["WeightPruning"]["masks"]
    entry = masks["net.3.weight"]
    if damage == "bits":
        entry["bits"][0] ^= 1
    elif damage == "short":
        entry["bits"] = entry["bits"][:-1]
    elif damage == "shape":
        entry["shape"] = [24, 31]
    else:
        masks["net.9.weight"] = masks.pop("net.3.weight")
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    fresh, again = build(SETTINGS[0])
    with pytest.raises(ValueError, match=r"net\.[39]\.weight"):
        make_trainer(tmp_path / "again", again, max_epochs=3).fit(fresh, ckpt_path=tmp_path / "damaged.ckpt")


def test_validate_before_fit_and_fit_twice(tmp_path: Any) -> None:
    module, pruning = build(SETTINGS[0])
    trainer = make_trainer(tmp_path, pruning)
    trainer.validate(module, verbose=False)
    assert pruning.masks == {}
    trainer.fit(module)
    first = pruning.masks
    trainer = make_trainer(tmp_path, pruning)
    trainer.fit(module)
    assert all(torch.equal(first[n], m) for n, m in pruning.masks.items())
    assert pruning.sparsity == pytest.approx(0.5, abs=0.01)  # it does not compound
    other, _ = build(SETTINGS[0])
    torch.manual_seed(99)
    for p in other.parameters():
        nn.init.normal_(p)
    make_trainer(tmp_path, pruning).fit(other)  # another module is pruned for itself
    assert any(not torch.equal(first[n], m) for n, m in pruning.masks.items())


def test_masks_of_a_tested_checkpoint_are_not_those_of_another_module(tmp_path: Any) -> None:
    class Tested(Classifier):
        test_step, test_dataloader = Classifier.validation_step, Classifier.val_dataloader

    pruning, alone = (WeightPruning(score="magnitude", sparsity=0.5) for _ in range(2))
    trainer = make_trainer(tmp_path, pruning, max_epochs=1)
    trainer.fit(Tested())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    make_trainer(tmp_path, pruning).test(Tested(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    torch.manual_seed(99)
    other = Tested()
    twin = copy.deepcopy(other)
    make_trainer(tmp_path, pruning, max_epochs=0).fit(other)
    make_trainer(tmp_path, alone, max_epochs=0).fit(twin)
    assert pruning.masks.keys() == alone.masks.keys()
    assert all(torch.equal(mask, pruning.masks[n]) for n, mask in alone.masks.items())


@pytest.mark.few_fast(1)
@pytest.mark.parametrize("schedule", [None, LinearSchedule(0, 30, 5), ELSA(30, 4)], ids=str)
@pytest.mark.parametrize("finder", [0, 1])
def test_what_goes_back_to_a_checkpoint_in_the_midst_of_a_fit_changes_nothing(
    finder: int, schedule: Any, tmp_path: Any
) -> None:
    def fit(*callbacks: L.Callback) -> tuple[L.LightningModule, WeightPruning]:
        torch.manual_seed(0)
        module, pruning = Classifier(dropout=0.0), WeightPruning("magnitude", 0.5, schedule=schedule, progress=False)
        both = [pruning, *callbacks] if finder else [*callbacks, pruning]
        trainer = make_trainer(tmp_path, *both, Watch(pruning), max_epochs=4)
        trainer.fit(module, DataLoader(dataset(), batch_size=8))
        return module, pruning

    module, pruning = fit(FindAgain())
    expected, alone = fit()
    assert pruning.finished
    assert all(torch.equal(mask, pruning.masks[n]) for n, mask in alone.masks.items())
    assert all(torch.equal(p, expected.get_parameter(n)) for n, p in module.named_parameters())


@pytest.mark.parametrize(
    ("schedule", "at"), [(LinearSchedule(2, 6, 2), 4), (LinearSchedule(2, 6, 2), 6), (ELSA(6, 3), 3), (ELSA(6, 3), 6)]
)
def test_a_checkpoint_from_between_a_step_and_its_update_resumes_with_the_update(
    schedule: Any, at: int, tmp_path: Any
) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == at:
                trainer.save_checkpoint(tmp_path / "between.ckpt")

    def fit(*before: L.Callback, path: Any = None) -> tuple[L.LightningModule, WeightPruning]:
        torch.manual_seed(0)
        module, pruning = Classifier(dropout=0.0), WeightPruning("magnitude", 0.8, schedule=schedule, progress=False)
        data = DataLoader(dataset(), batch_size=96)  # an epoch is one step, at whose end a run can be resumed
        make_trainer(tmp_path, *before, pruning, max_epochs=8).fit(module, data, ckpt_path=path)
        return module, pruning

    whole, expected = fit(Save())
    module, pruning = fit(path=tmp_path / "between.ckpt")
    assert pruning.finished
    assert all(torch.equal(mask, pruning.masks[n]) for n, mask in expected.masks.items())
    assert all(torch.equal(p, whole.get_parameter(n)) for n, p in module.named_parameters())


def test_an_update_that_failed_is_made_when_the_fit_is_resumed(tmp_path: Any) -> None:
    module = Classifier()
    failing = WeightPruning("wanda", 0.8, num_samples=8, schedule=LinearSchedule(0, 4, 2), progress=False)
    failing.calibration = [dataset()[:8]]
    saver = OnExceptionCheckpoint(tmp_path, "failed")

    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                failing.calibration = [(torch.full((8, 16), float("nan")), dataset()[:8][1])]

    with pytest.raises(CalibrationError):
        make_trainer(tmp_path, failing, Spoil(), saver, enable_checkpointing=True).fit(module)
    pruning = WeightPruning("wanda", 0.8, num_samples=8, schedule=LinearSchedule(0, 4, 2), progress=False)
    make_trainer(tmp_path, pruning).fit(Classifier(), ckpt_path=tmp_path / "failed.ckpt")
    assert pruning.finished


def test_callback_added_to_a_dense_run_catches_up(tmp_path: Any) -> None:
    """A checkpoint without masks: pruned at once to the schedule's present sparsity, old momentum cleared."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="dense")
    make_trainer(tmp_path, saver, max_epochs=1).fit(Classifier("sgd"))
    pruning = WeightPruning(score="wanda", num_samples=32, schedule=LinearSchedule(0, 24, 12), progress=False)
    watch = Watch(pruning)
    module = Classifier("sgd")
    make_trainer(tmp_path, pruning, watch).fit(module, ckpt_path=tmp_path / "dense.ckpt")
    assert watch.sparsities[0] == pytest.approx(0.25, abs=0.01)  # 12 of 24 steps
    assert pruning.sparsity == pytest.approx(0.5, abs=0.01)


def test_keep_trains_a_model_that_is_sparse_already(tmp_path: Any) -> None:
    torch.manual_seed(0)
    module = Classifier()
    wanted = prune(module, score="magnitude", sparsity=0.6)
    pruning = WeightPruning(score="keep")
    watch = Watch(pruning)
    make_trainer(tmp_path, pruning, watch).fit(module)
    assert all(torch.equal(wanted[n], m) for n, m in pruning.masks.items())
    dense = Classifier()
    with pytest.raises(ValueError, match="none of the 3 layers has one"):
        make_trainer(tmp_path, WeightPruning(score="keep")).fit(dense)


def test_sparsity_follows_the_schedule_and_only_grows(tmp_path: Any) -> None:
    class Trace(L.Callback):
        def __init__(self) -> None:
            self.points: dict[int, float] = {}
            self.last: dict[str, Tensor] = {}

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.points[trainer.global_step] = pruning.sparsity
            for name, mask in pruning.masks.items():
                assert not (mask & ~self.last.get(name, mask)).any()
            self.last = pruning.masks
            for optimizer in trainer.optimizers:
                for name, parameter in module.named_parameters():
                    if name in self.last:
                        for key in ("exp_avg", "exp_avg_sq"):
                            assert bool((optimizer.state[parameter][key][~self.last[name]] == 0).all())

    pruning = WeightPruning(
        score="kfac", sparsity=0.8, num_samples=32, schedule=CubicSchedule(4, 16, 4), progress=False
    )
    module, trace = Classifier(), Trace()
    make_trainer(tmp_path, pruning, trace).fit(module)
    for step, sparsity in trace.points.items():
        update = max((s for s in (4, 8, 12, 16) if s <= step), default=None)
        wanted = 0.0 if update is None else 0.8 * (1 - (1 - (update - 4) / 12) ** 3)
        assert sparsity == pytest.approx(wanted, abs=1e-3), step


class ChangeWhatIsFrozen(L.Callback):
    """Freezes the first layer in the middle of training, and unfreezes the last."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.net[0].requires_grad_(trainer.global_step < 3)
        pl_module.net[5].requires_grad_(trainer.global_step >= 3)


@pytest.mark.parametrize("score", ["magnitude", "kfac"])
def test_what_is_frozen_along_the_way_changes_nothing_in_what_is_pruned(score: str, tmp_path: Any) -> None:
    """The summary at fit start says which layers are pruned: all of those reach the sparsity, and no other is begun."""
    torch.manual_seed(0)
    module = Classifier()
    module.net[5].requires_grad_(False)
    schedule = LinearSchedule(start=0, end=6, every=2)
    pruning = WeightPruning(score, 0.5, num_samples=8, schedule=schedule, progress=False)
    make_trainer(tmp_path, pruning, ChangeWhatIsFrozen(), max_steps=8).fit(module)
    zeros = {name: int((p == 0).sum()) for name, p in module.named_parameters() if p.dim() == 2}
    assert list(pruning.masks) == ["net.0.weight", "net.3.weight"]
    assert zeros["net.0.weight"] + zeros["net.3.weight"] == (32 * 16 + 24 * 32) // 2
    assert zeros["net.5.weight"] == 0
    assert pruning.finished
    assert not module.net[0].weight.requires_grad
    assert module.net[5].weight.requires_grad


def test_something_else_reviving_weights_is_repaired_and_said(tmp_path: Any) -> None:
    class Vandal(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[0].weight.data.fill_(1.0)

    module, pruning = build(SETTINGS[0])
    with pytest.warns(UserWarning, match="outside optimizer steps"):
        make_trainer(tmp_path, pruning, Vandal()).fit(module)
    mask = pruning.masks["net.0.weight"]
    assert bool((module.net[0].weight[~mask] == 0).all())


class Masters(torch.optim.SGD):
    """Steps copies of the parameters, as optimizers for half precision do, and writes them back."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = list(parameters)
        self.copies = [p.detach().clone() for p in self.parameters]
        super().__init__(self.copies, lr=0.1, momentum=0.9)

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for copied, p in zip(self.copies, self.parameters, strict=True):
            copied.grad = p.grad.clone()
        super().step()
        with torch.no_grad():
            for copied, p in zip(self.copies, self.parameters, strict=True):
                p.copy_(copied)
                p.grad = None
        return loss


def test_an_optimizer_that_steps_copies_of_the_weights(tmp_path: Any, recwarn: Any) -> None:
    class Copied(Classifier):
        def configure_optimizers(self) -> Masters:
            return Masters(self.parameters())

    module, pruning = Copied(dropout=0.0), WeightPruning("magnitude", schedule=LinearSchedule(0, 6, 2), progress=False)
    trainer = make_trainer(tmp_path, pruning, Watch(pruning), max_steps=8)
    trainer.fit(module, DataLoader(dataset(), batch_size=8))
    assert pruning.finished
    assert not [w for w in recwarn if "outside optimizer steps" in str(w.message)]


def test_failed_calibration_leaves_the_module_as_it_was(tmp_path: Any) -> None:
    def broken(module: nn.Module, batch: Any) -> Tensor:
        return squared_error(module, batch) * float("nan")

    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="not finite"):
        make_trainer(tmp_path, WeightPruning(loss_fn=broken, num_samples=8, progress=False)).fit(module)
    for name, value in module.state_dict().items():
        if not name.startswith("seen"):
            assert torch.equal(value, before[name]), name
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "nonsense"}, "score='nonsense' is unknown"),
        ({"sparsity": 1.5}, r"sparsity=1.5 must be a number in \[0, 1\]"),
        ({"sparsity": "half"}, "sparsity='half'"),
        ({"pattern": "4:2"}, "pattern='4:2'"),
        ({"pattern": "2:4", "schedule": CubicSchedule(0, 10)}, "one sparsity"),
        ({"pattern": "1:4", "sparsity": 0.5}, "prunes 0.7500"),
        ({"score": "sparsegpt", "schedule": LinearSchedule(0, 10)}, "prunes once"),
        ({"score": "keep", "sparsity": 0.5}, "takes the zeros as they are"),
        ({"score": "keep", "schedule": LinearSchedule(0, 10)}, "at fit start: leave schedule out"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"group": "column"}, "group='column'"),
        ({"update": "sgd"}, "update='sgd'"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"grad_norm": "l3"}, "grad_norm='l3'"),
        ({"allocation": "all"}, "allocation='all'"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        WeightPruning(**arguments)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (Classifier, {"pattern": "3:7"}, r"16 inputs of 'net.0.weight' do not divide by 7"),
        (Classifier, {"sequential": True, "score": "wanda"}, "names no decoder blocks"),
        (Classifier, {"targets": ["conv"]}, "targets='conv' matches no layer"),
        (Classifier, {"ignore": ["net.7"]}, "ignore='net.7' matches no layer"),
        (Manual, {}, "manual optimization"),
        (Manual, {"schedule": OneShot(4)}, "manual optimization"),
    ],
)
def test_what_does_not_fit_the_module_is_refused_before_training(
    module: type[Classifier], arguments: dict[str, Any], message: str, tmp_path: Any
) -> None:
    made = module()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, WeightPruning(**arguments, progress=False)).fit(made)
    assert all(torch.equal(v, before[n]) for n, v in made.state_dict().items() if not n.startswith("seen"))
    assert made.calls == 0


def test_fsdp1_is_refused_and_the_way_named() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match=r"does not support FSDPStrategy.*ModelParallelStrategy"):
        WeightPruning().setup(trainer, Classifier(), "fit")
