"""What a user is told: of a checkpoint's other settings, of sparsity that is not reached, of metrics that mislead."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from averaging import assert_zero, magnitude, module
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint, Timer
from lightning.pytorch.strategies import DDPStrategy
from own_modules import Classifier, Manual, dataset, make_trainer, squared_error
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import CubicSchedule, LinearSchedule, OneShot, WeightPruning
from lightning_prune.pruning.targets import DEFAULT_IGNORE
from lightning_prune.schedules import Schedule


def said(made: L.LightningModule, pruning: WeightPruning, path: Path, *callbacks: Any, **trainer: Any) -> list[str]:
    """The callback's own warnings during a fit."""
    resume = trainer.pop("ckpt_path", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(path, pruning, *callbacks, **trainer).fit(made, ckpt_path=resume)
    return [text for w in caught if (text := str(w.message)).startswith("WeightPruning:")]


# -- resume ----------------------------------------------------------------------------------------------------------

BEFORE: dict[str, Any] = {"score": "gblm", "sparsity": 0.5, "num_samples": 16}
CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"sparsity": 0.8}, ["sparsity=0.5 (here 0.8)"]),
    ({"score": "magnitude"}, ["score='gblm' (here 'magnitude')"]),
    ({"sparsity": None, "pattern": "2:4"}, ["pattern='unstructured' (here '2:4')"]),
    ({"group": "layer"}, ["group=None (here 'layer')"]),
    ({"allocation": {"net.0": 0.7}}, ["allocation=None (here \"{'net.0': 0.7}\")"]),
    ({"allocation": "owl"}, ["allocation=None (here 'owl')"]),
    ({"update": "obs"}, ["update=None (here 'obs')"]),
    ({"schedule": OneShot(3)}, ["schedule='OneShot(step=0)' (here 'OneShot(step=3)')"]),
    ({"targets": ["net.0", "net.3"]}, ["targets=None (here \"['net.0', 'net.3']\")"]),
    ({"targets": [nn.Linear]}, ["targets=None (here \"['Linear']\")"]),
    ({"ignore": ["net.5"]}, [f"ignore={str(list(DEFAULT_IGNORE))!r} (here \"['net.5']\")"]),
    ({"alpha": 10.0, "grad_norm": "l1"}, ["alpha=100.0 (here 10.0)", "grad_norm='l2' (here 'l1')"]),
    ({"seed": 4, "num_samples": 8}, ["seed=0 (here 4)", "num_samples=16 (here 8)"]),
]
SAME: list[dict[str, Any]] = [
    {},
    {"group": "row"},
    {"allocation": "uniform"},
    {"sparsity": None},
    {"sparsity": np.float64(0.5)},
    {"progress": False},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    saver = ModelCheckpoint(path, filename="end")
    make_trainer(path, WeightPruning(**BEFORE, progress=False), saver, max_epochs=1).fit(module())
    return path / "end.ckpt"


@pytest.mark.few_fast(6)
@pytest.mark.parametrize(("change", "named"), CHANGES, ids=lambda v: "+".join(v) if isinstance(v, dict) else "")
def test_each_other_setting_is_named_with_both_values(
    change: dict[str, Any], named: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    pruning = WeightPruning(**{**BEFORE, "progress": False, **change})
    texts = said(module(), pruning, tmp_path, ckpt_path=checkpoint, max_epochs=2)
    assert len([t for t in texts if "checkpoint's masks are kept" in t]) == 1
    assert texts[0].count("(here ") == len(named)
    assert all(words in texts[0] for words in named), texts[0]
    assert "fit without ckpt_path" in texts[0]


@pytest.mark.slow
@pytest.mark.parametrize("change", SAME, ids=str)
def test_the_same_settings_are_no_news(change: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    pruning = WeightPruning(**{**BEFORE, "progress": False, **change})
    assert said(module(), pruning, tmp_path, ckpt_path=checkpoint, max_epochs=2) == []


def test_a_schedule_goes_on_from_a_checkpoint_of_less_sparsity(checkpoint: Path, tmp_path: Path) -> None:
    pruning = WeightPruning(score="magnitude", sparsity=0.8, schedule=LinearSchedule(14, 20, 2), progress=False)
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    made = module()
    (text,) = said(made, pruning, tmp_path, ckpt_path=checkpoint, max_epochs=2)
    assert "sparsity=0.5 (here 0.8)" in text
    assert pruning.sparsity == pytest.approx(0.8, abs=2e-3)
    for name, mask in pruning.masks.items():  # what was pruned stays pruned
        assert not bool((mask & (before[name] == 0)).any())
    assert_zero(dict(made.named_parameters()), pruning.masks)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "kfac"])
def test_a_schedule_that_asks_for_less_revives_nothing(score: str, checkpoint: Path, tmp_path: Path) -> None:
    """Sparsity 0.3 after 0.5, by rows or layers or over all: masks may only shrink what is left."""
    schedule = LinearSchedule(12, 20, 2)
    pruning = WeightPruning(score=score, sparsity=0.3, schedule=schedule, num_samples=16, progress=False)
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    (text,) = said(module(), pruning, tmp_path, ckpt_path=checkpoint, max_epochs=2)
    assert "sparsity=0.5 (here 0.3)" in text
    assert pruning.sparsity == pytest.approx(0.5, abs=0.01)
    for name, mask in pruning.masks.items():
        assert not bool((mask & (before[name] == 0)).any())


def test_layers_that_are_no_targets_any_more_keep_their_zeros(checkpoint: Path, tmp_path: Path) -> None:
    pruning = WeightPruning(score="magnitude", sparsity=0.7, targets=["net.0"], schedule=OneShot(14), progress=False)
    made = module()
    said(made, pruning, tmp_path, ckpt_path=checkpoint, max_epochs=2)
    assert set(pruning.masks) == {"net.0.weight", "net.3.weight", "net.5.weight"}
    assert float((made.net[0].weight == 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    assert float((made.net[3].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


# -- schedules that training does not reach --------------------------------------------------------------------------

LATE: list[tuple[str, Any, dict[str, Any]]] = [
    ("max_steps", OneShot(100), {"max_steps": 5}),
    ("epochs", OneShot(25), {}),
    ("limit", OneShot(9), {"limit_train_batches": 4}),
    ("limit share", OneShot(13), {"limit_train_batches": 0.5}),
    ("accumulation", OneShot(9), {"accumulate_grad_batches": 3}),
    ("gradual", LinearSchedule(0, 48, 4), {}),
    ("cubic", CubicSchedule(20, 30, 2), {}),
]


class Stop(L.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 6


class Slow(L.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(0.05)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(dataset())


@pytest.mark.parametrize(("schedule", "trainer"), [row[1:] for row in LATE], ids=[row[0] for row in LATE])
def test_a_schedule_that_cannot_end_in_time_is_said_at_the_start_and_at_the_end(
    schedule: Schedule, trainer: dict[str, Any], tmp_path: Path
) -> None:
    pruning = magnitude(schedule)
    start, end = said(module(), pruning, tmp_path, **trainer)
    steps = trainer.get("max_steps", 24 if not trainer else 8 if len(trainer) and "limit" not in str(trainer) else None)
    assert f"ends at step {schedule.end}, but training ends at step" in start
    assert ("nothing will be pruned" in start) == (pruning.sparsity == 0)
    if steps is not None:
        assert f"training ended at step {steps}" in end
    assert "not the 50.00% that were asked for" in end
    assert ("the model is dense" in end) == (pruning.sparsity == 0)


@pytest.mark.parametrize(
    ("made", "callbacks", "trainer"),
    [
        (module, [Stop], {"min_epochs": 0}),
        (module, [lambda: Timer({"milliseconds": 200}, interval="step"), Slow], {}),
        (Manual, [], {"max_epochs": 1}),
        (module, [lambda: GradientAccumulationScheduler({0: 2, 1: 4})], {}),
    ],
    ids=["stopped", "time", "manual", "accumulation that changes"],
)
def test_what_cannot_be_known_is_said_at_the_end(made: Any, callbacks: Any, trainer: Any, tmp_path: Path) -> None:
    pruning = WeightPruning(score="magnitude", schedule=OneShot(24), loss_fn=squared_error, progress=False)
    if made is Manual:
        pruning.schedule = OneShot(40)
    (text,) = said(made(), pruning, tmp_path, *(make() for make in callbacks), **trainer)
    assert "the model is dense, not the 50.00% that were asked for" in text


def test_a_fit_that_has_nothing_to_train_is_said_too(tmp_path: Path) -> None:
    texts = said(module(), magnitude(OneShot(3)), tmp_path, limit_train_batches=0)
    assert ["the model is dense" in text for text in texts] == [True]


@pytest.mark.few_fast(4)
@pytest.mark.parametrize("scores", [{"score": "kfac"}, {"score": "wanda"}, {"score": "wanda", "pattern": "2:4"}])
@pytest.mark.parametrize("schedule", [None, OneShot(5), OneShot(24)])
def test_a_schedule_that_is_reached_is_no_news(scores: dict[str, Any], schedule: Any, tmp_path: Path) -> None:
    pruning = WeightPruning(**scores, schedule=schedule, num_samples=16, progress=False)
    assert not pruning.finished
    assert said(module(), pruning, tmp_path, max_epochs=2) == []
    assert pruning.finished


@pytest.mark.parametrize(
    "trainer", [{"max_steps": -1, "max_epochs": -1}, {"max_steps": -1, "max_epochs": 500}, {"max_steps": 30}], ids=str
)
def test_an_end_that_is_open_is_no_news(trainer: dict[str, Any], tmp_path: Path) -> None:
    class End(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 26

    made = module()
    made.train_dataloader = lambda: DataLoader(Endless(), batch_size=8)
    pruning = WeightPruning(score="magnitude", schedule=OneShot(25), progress=False)
    assert said(made, pruning, tmp_path, End(), **{"max_epochs": -1, **trainer}) == []
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_second_fit_begins_with_what_the_first_has_pruned(tmp_path: Path) -> None:
    made, pruning = module(), magnitude(LinearSchedule(2, 8, 2))
    said(made, pruning, tmp_path, max_steps=10)
    first = pruning.masks
    assert said(made, pruning, tmp_path, max_steps=5) == []  # its schedule would begin anew, with less
    assert all(torch.equal(first[name], mask) for name, mask in pruning.masks.items())


# -- weights that nothing trains -------------------------------------------------------------------------------------


class WithTeacher(Classifier):
    """A teacher that is no part of the optimizer, frozen or not."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.teacher = nn.Linear(16, 4).requires_grad_(not frozen)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


@pytest.mark.parametrize(
    ("frozen", "settings", "news"),
    [
        (False, {}, True),
        (True, {}, False),
        (False, {"ignore": ["teacher"]}, False),
        (False, {"targets": ["teacher"]}, False),  # it alone, so it is meant
    ],
)
def test_a_teacher_that_is_pruned_is_named(frozen: bool, settings: dict[str, Any], news: bool, tmp_path: Path) -> None:
    pruning = WeightPruning(score="magnitude", progress=False, **settings)
    told = [text for text in said(WithTeacher(frozen), pruning, tmp_path, max_steps=1) if "no optimizer" in text]
    assert ["1 of the 4" in text and "'teacher.weight'" in text for text in told] == [True] * news


# -- metrics while a schedule prunes ---------------------------------------------------------------------------------


@pytest.mark.few_fast(4)
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: ModelCheckpoint(p, monitor="val_loss"), "ModelCheckpoint(monitor='val_loss') takes less sparse"),
        (lambda p: ModelCheckpoint(p, monitor="val_loss", save_top_k=-1), "ModelCheckpoint(monitor='val_loss')"),
        (lambda p: EarlyStopping("val_loss", patience=50), "EarlyStopping(monitor='val_loss') takes the loss"),
    ],
)
@pytest.mark.parametrize("schedule", [None, OneShot(5), CubicSchedule(2, 10, 2)])
def test_a_monitored_metric_is_warned_of_once(make: Any, named: str, schedule: Any, tmp_path: Path) -> None:
    texts = said(module(), magnitude(schedule), tmp_path, make(tmp_path))
    assert len(texts) == (schedule is not None)
    assert all(named in text and "WeightPruning.finished" in text for text in texts)


@pytest.mark.parametrize(
    "make",
    [lambda p: ModelCheckpoint(p, monitor="val_loss", save_top_k=0, save_last=True), lambda p: ModelCheckpoint(p)],
)
def test_checkpoints_that_do_not_choose_are_no_news(make: Any, tmp_path: Path) -> None:
    assert said(module(), magnitude(OneShot(5)), tmp_path, make(tmp_path)) == []


@pytest.mark.slow
def test_the_recipe_chooses_among_finished_models(tmp_path: Path) -> None:
    class Judged(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            # Pruning makes it worse, so that the dense model is the best by far.
            worse = float((self.net[0].weight == 0).float().mean()) * 100 + self.current_epoch
            self.log("val_loss", loss + worse)
            self.log("val_loss_pruned", loss + worse if pruning.finished else torch.inf)

    for name, dense in (("val_loss", True), ("val_loss_pruned", False)):
        pruning = magnitude(LinearSchedule(12, 36, 12))
        best = ModelCheckpoint(tmp_path / name, monitor=name)
        stop = EarlyStopping("val_loss_pruned", patience=9, check_finite=False)
        make_trainer(tmp_path, pruning, best, stop, max_epochs=6).fit(Judged(dropout=0.0))
        state = torch.load(best.best_model_path, weights_only=True)
        chosen = magnitude()
        chosen.load_state_dict(state["callbacks"]["WeightPruning"])
        assert (chosen.sparsity < 0.49) == dense
        if not dense:
            assert state["global_step"] == 36  # the first that is finished is the best of them


# -- processes that end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["popen", "fork", "spawn"])
def test_masks_that_stay_in_processes_of_a_fit_are_told(method: Any) -> None:
    trainer: Any = SimpleNamespace(strategy=DDPStrategy(start_method=method), callbacks=[])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WeightPruning().setup(trainer, Classifier(), "test")
        WeightPruning().setup(trainer, Classifier(), "fit")
    texts = [text for w in caught if "WeightPruning:" in (text := str(w.message))]
    assert len(texts) == (method != "popen")
    assert all(f"start_method={method!r}" in text and "WeightPruning(score='keep')" in text for text in texts)
