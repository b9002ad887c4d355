"""`HoldMasksCallback` in transformers' Trainer and in TRL's: masks hold, resume is exact, what cannot be is refused."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import clean_environment, make_llama, make_tokens
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lightning_prune import HoldMasksCallback, load_masks, prune, save_masks
from lightning_prune.errors import CheckpointError

BATCHES = [{"input_ids": make_tokens(2, 12, seed=seed)} for seed in range(2)]
ROWS = [{"input_ids": row, "labels": row} for row in make_tokens(24, 12, seed=9)]


def pruned(sparsity: float = 0.5) -> tuple[nn.Module, dict[str, Tensor]]:
    model = make_llama()
    return model, prune(model, BATCHES, score="magnitude", sparsity=sparsity, progress=False)


def trainer_of(folder: Path, model: nn.Module, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    given = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        **settings,
    }
    args = TrainingArguments(output_dir=str(folder), **given)
    return Trainer(model, args, train_dataset=ROWS, callbacks=list(callbacks))


def assert_held(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert bool((weight[~mask] == 0).all()), name
        assert bool((weight[mask] != 0).all()), name


class Watch(TrainerCallback):
    """Look at gradients before they are clipped, and at weights after each step."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        self.masks, self.steps = masks, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        for name, mask in self.masks.items():
            assert not rest["model"].get_parameter(name).grad[~mask].any(), name

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        assert_held(rest["model"], self.masks)
        self.steps += 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["masks", "file", "zeros"])
@pytest.mark.parametrize("setting", [{}, {"bf16": True, "gradient_accumulation_steps": 2}, {"optim": "sgd"}])
def test_masks_hold_through_training(how: str, setting: dict[str, Any], tmp_path: Path) -> None:
    model, masks = pruned()
    save_masks(masks, tmp_path / "masks.safetensors")
    given: dict[str, Any] = {"masks": masks, "file": tmp_path / "masks.safetensors", "zeros": None}
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    watch = Watch(masks)
    trainer_of(tmp_path / "run", model, HoldMasksCallback(given[how]), watch, **setting).train()
    assert watch.steps == 6
    assert_held(model, masks)
    assert all(bool((model.get_parameter(name) != weight).any()) for name, weight in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("again", ["same masks", "other masks", "zeros"])
def test_a_resumed_run_is_the_uninterrupted_one(again: str, tmp_path: Path) -> None:
    model, masks = pruned()
    trainer = trainer_of(tmp_path, model, HoldMasksCallback(masks))
    trainer.train()
    stored = load_masks(tmp_path / "checkpoint-3" / "masks.safetensors")
    assert stored.keys() == masks.keys()
    assert all(torch.equal(mask, stored[name]) for name, mask in masks.items())

    given = {"same masks": masks, "other masks": pruned(0.2)[1], "zeros": None}[again]
    callback, other = HoldMasksCallback(given), make_llama(seed=7)
    resumed = trainer_of(tmp_path, other, callback, Watch(masks))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert callback.hold is not None
    assert all(torch.equal(mask, callback.hold.masks[name]) for name, mask in masks.items())


@pytest.mark.slow
def test_masks_of_another_folder_must_be_those_of_the_weights(tmp_path: Path) -> None:
    model, masks = pruned()
    trainer_of(tmp_path / "a", model, HoldMasksCallback(masks)).train()
    shutil.move(tmp_path / "a" / "checkpoint-3", tmp_path / "moved")
    for given in (pruned(0.8)[1], pruned()[1] | {"lm_head.weight": torch.zeros(128, 64).bool()}):
        resumed = trainer_of(tmp_path / "b", make_llama(), HoldMasksCallback(given))
        with pytest.raises(ValueError, match="resumed at step 3, but weights that"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "moved"))
    other = make_llama(seed=5)
    callback = HoldMasksCallback(tmp_path / "moved" / "masks.safetensors")
    trainer_of(tmp_path / "b", other, callback).train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_masks_may_change_and_a_second_training_goes_on(tmp_path: Path) -> None:
    model, masks = pruned(0.2)
    callback = HoldMasksCallback(masks)

    class Further(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 2:
                assert callback.hold is not None
                callback.hold.update(prune(model, BATCHES, score="magnitude", sparsity=0.6, progress=False))

    trainer_of(tmp_path, model, callback, Further()).train()
    assert callback.hold is not None
    later = load_masks(tmp_path / "checkpoint-3" / "masks.safetensors")
    assert sum(int((~mask).sum()) for mask in later.values()) > sum(int((~mask).sum()) for mask in masks.values())
    assert_held(model, later)
    trainer_of(tmp_path / "again", model, HoldMasksCallback(), Watch(later)).train()


@pytest.mark.slow
def test_what_cannot_hold_is_refused_before_training(tmp_path: Path) -> None:
    model, masks = pruned()
    with pytest.raises(TypeError, match=r"masks=0\.5 is a float"):
        HoldMasksCallback(0.5)  # type: ignore[arg-type]
    before = {name: p.clone() for name, p in model.named_parameters()}
    narrow = {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3).bool()}
    for given, error, message in [
        (tmp_path / "none.safetensors", CheckpointError, "not an existing file"),
        (narrow, ValueError, "has shape"),
        ({"x.weight": masks["model.layers.0.mlp.up_proj.weight"]}, ValueError, "no such parameter"),
        ({}, ValueError, "masks is empty"),
    ]:
        with pytest.raises(error, match=message):
            trainer_of(tmp_path / "run", model, HoldMasksCallback(given)).train()  # type: ignore[arg-type]
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="none of the 14 layers has one"):
        trainer_of(tmp_path / "run", make_llama(), HoldMasksCallback()).train()


def test_a_trainer_of_lightning_says_what_holds_masks_there() -> None:
    with pytest.raises(AttributeError, match=r"of transformers' Trainer. .* WeightPruning\(score='keep'\)"):
        L.Trainer(accelerator="cpu", max_steps=1, logger=False, callbacks=[HoldMasksCallback()]).fit(BoringModel())
    assert copy.deepcopy(HoldMasksCallback()).hold is None


def test_trl_trains_sparse(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, masks = pruned()
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    args = trl.SFTConfig(str(tmp_path), **settings, **quiet, dataset_kwargs={"skip_prepare_dataset": True})
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in ROWS])

    from lightning_prune.checkpoints.sources import trained_tokenizer

    tokenizer = trained_tokenizer(["one two three four"] * 40, 120, tmp_path / "tokenizers")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = trl.SFTTrainer(
        model, args, train_dataset=data, processing_class=tokenizer, callbacks=[HoldMasksCallback(masks), Watch(masks)]
    )
    trainer.train()
    other = make_llama(seed=3)
    resumed = trl.SFTTrainer(
        other, args, train_dataset=data, processing_class=tokenizer, callbacks=[HoldMasksCallback()]
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_held(other, masks)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_lightning_is_not_needed() -> None:
    program = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "from lightning_prune import HoldMasksCallback, hold_masks, prune, save_masks\n"
        "HoldMasksCallback()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=clean_environment())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_training_that_was_cut_short_leaves_nothing_on_the_model(error: type, tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            raise error("cut short")

    def train() -> None:
        with pytest.raises(error, match="cut short"):
            trainer_of(tmp_path, model, HoldMasksCallback(masks), Fails()).train()

    model, masks = pruned()
    train()
    gc.collect()
    assert_held(model, masks)
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    name, mask = next(iter(masks.items()))
    assert bool((model.get_parameter(name).grad[~mask] != 0).any())


def test_a_new_model_for_every_training(tmp_path: Path) -> None:
    model, masks = pruned()
    trainer = trainer_of(tmp_path, model, HoldMasksCallback(masks))
    trainer.model_init = lambda: copy.deepcopy(model)  # as in a search for hyper-parameters
    trained = []
    for _ in range(2):
        trainer.train()
        assert_held(trainer.model, masks)
        trained.append(trainer.model)
    trained[0](**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    name, mask = next(iter(masks.items()))
    assert bool((trained[0].get_parameter(name).grad[~mask] != 0).any())
