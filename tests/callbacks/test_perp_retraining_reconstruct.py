"""PERPRetraining(reconstruct=...): block by block before training, on the dense weights that WeightPruning found."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from perp_models import halve
from perp_trainers import LLAMA, Losses, loader, make_module, make_trainer, pruning
from tiny import snapshot
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaForCausalLM
from versions import WEIGHTS_ONLY

from lightning_prune import CausalLM, PERPRetraining, prune
from lightning_prune.errors import CheckpointError
from lightning_prune.perp import reconstruct

OPTIONS: dict[str, Any] = {"steps": 6, "learning_rate": 1e-2, "num_samples": 8}


class AtStart(L.Callback):
    """The plain weights when the first batch begins, and what the optimizer holds then."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            named = pl_module.model.named_parameters()
            self.weights = {n: p.detach().clone() for n, p in named if "lora_" not in n}
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            self.same = all(id(p) in held for p in pl_module.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["pruning", "perp"])
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", None])
def test_is_the_function_before_training(adapter: str | None, first: str, tmp_path: Path) -> None:
    samples = [{"input_ids": row["input_ids"][None]} for row in loader().dataset][:8]
    module, start, losses = make_module(), AtStart(), Losses()
    dense = copy.deepcopy(module.model)
    expected = copy.deepcopy(module.model)
    masks = prune(expected, samples, score="wanda", sparsity=0.5, num_samples=8, progress=False)
    calibration = list(loader())[:2]
    r = {} if adapter is None else {"r": 4}
    report = reconstruct(expected, calibration, dense, masks, adapter=adapter, **OPTIONS, **r)

    pruner = pruning(score="wanda", calibration=samples)
    perp = PERPRetraining(adapter=adapter, reconstruct={**OPTIONS, "calibration": calibration}, r=4)
    callbacks = [pruner, perp] if first == "pruning" else [perp, pruner]
    make_trainer(tmp_path, *callbacks, start, losses).fit(module, loader())
    assert perp.reconstruction == report
    found = {n.replace("base_model.model.", "", 1).replace(".base_layer", ""): w for n, w in start.weights.items()}
    assert found.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(found[n], p) for n, p in expected.named_parameters())
    assert start.same  # training goes on with the adapters that the optimizer knows
    assert sum(losses.values[-6:]) < sum(losses.values[:6])
    assert isinstance(module.model, LlamaForCausalLM)
    assert all(not module.get_parameter(n)[~m].view(torch.int32).any() for n, m in pruner.masks.items())
    assert pruner.take_dense_weights() == {}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_all_kept_weights_are_those_of_the_function(precision: str, tmp_path: Path) -> None:
    options = {"train": "all", "epochs": 2, "num_samples": 8, "learning_rate": 3e-3}
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    module, start = make_module(), AtStart()
    module.to(dtype)
    dense, expected, calibration = copy.deepcopy(module.model), copy.deepcopy(module.model), list(loader())[:2]
    masks = prune(expected, calibration, score="magnitude", sparsity=0.5, progress=False)
    report = reconstruct(expected, calibration, dense, masks, **options)
    perp = PERPRetraining(reconstruct={**options, "calibration": calibration})
    pruner = pruning()
    make_trainer(tmp_path, perp, pruner, start, max_epochs=1, precision=precision).fit(module, loader())
    assert perp.reconstruction == report
    assert report.after < report.before
    assert len(report.blocks) == 4
    found = {n.replace("base_model.model.", "", 1).replace(".base_layer", ""): w for n, w in start.weights.items()}
    assert all(torch.equal(found[n], p) for n, p in expected.named_parameters())
    assert all(not module.get_parameter(n)[~m].any() for n, m in pruner.masks.items())


def test_of_a_model_pruned_before_and_a_folder(tmp_path: Path) -> None:
    module = make_module()
    module.save_pretrained(tmp_path / "dense")
    halve(module.model)
    perp = PERPRetraining(reconstruct={**OPTIONS, "dense": str(tmp_path / "dense"), "offload": "cpu"})
    trainer = make_trainer(tmp_path, perp, max_epochs=1, precision="bf16-mixed")
    trainer.fit(module, loader())
    assert perp.reconstruction is not None
    assert perp.reconstruction.after < perp.reconstruction.before


def test_a_folder_that_is_not_there_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    module = make_module()
    halve(module.model)
    before = snapshot(module.model)
    perp = PERPRetraining(reconstruct={**OPTIONS, "dense": "nowhere"})
    with pytest.raises(CheckpointError, match="dense='nowhere' does not exist"):
        make_trainer(tmp_path, perp, max_epochs=1).fit(module, loader())
    after = {
        n.removeprefix("base_model.model.").replace(".base_layer.", "."): v for n, v in snapshot(module.model).items()
    }
    assert before == {name: after[name] for name in before}


def test_what_cannot_be_reconstructed_is_refused_before_the_pruner_prunes(tmp_path: Path) -> None:
    module = make_module()
    before = snapshot(module.model)
    with pytest.raises(CheckpointError, match="dense='nowhere' does not exist"):
        make_trainer(tmp_path, pruning(), PERPRetraining(reconstruct={"dense": "nowhere"})).fit(module, loader())
    assert snapshot(module.model) == before
    with pytest.raises(ValueError, match=r"leaves nothing to fit.*reconstruct=\{'train': 'all'\}"):
        PERPRetraining(adapter=None, train=("head",), reconstruct=True)
    PERPRetraining(adapter=None, train=("head",), reconstruct={"train": "all"})


class OwnWords(CausalLM):
    """Its batches have names of its own, and its step counts."""

    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.calls += 1
        self.log("calls", float(self.calls))
        return super().training_step({"input_ids": batch["tokens"]}, batch_idx)

    calibration_loss = None  # type: ignore[assignment]


def test_the_training_step_runs_the_model_on_what_training_reads(tmp_path: Path) -> None:
    found = []
    for kind in (CausalLM, OwnWords):
        L.seed_everything(0, verbose=False)
        module = kind(config=LLAMA, learning_rate=1e-2, lr_schedule="constant")
        name = "tokens" if kind is OwnWords else "input_ids"
        data = DataLoader([{name: row["input_ids"]} for row in loader(8).dataset], batch_size=4)
        perp = PERPRetraining(reconstruct=OPTIONS)
        make_trainer(tmp_path, perp, pruning(), max_epochs=1).fit(module, data)
        found.append(perp.reconstruction)
    assert found[0] == found[1]
    assert module.calls == 2  # those of training alone


class Augmented(Dataset):
    """Draws from the global random generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = [random.randrange(64), int(np.random.randint(64)), int(torch.randint(64, ()))]
        return {"input_ids": torch.tensor([index, *drawn])}


def test_training_draws_what_it_would_draw_without(tmp_path: Path) -> None:
    class Seen(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batches.append(batch["input_ids"])

    runs = []
    for options in (OPTIONS, False):
        module, batches = make_module(), list[torch.Tensor]()
        perp = PERPRetraining(r=4, reconstruct=options)
        L.seed_everything(0, verbose=False)
        make_trainer(tmp_path, pruning(), perp, Seen(), max_epochs=1).fit(module, DataLoader(Augmented(), 4))
        runs.append(torch.cat(batches))
    assert torch.equal(*runs)


def test_hooks_on_batches_leave_no_trace(tmp_path: Path) -> None:
    class Own(CausalLM):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.seen.append(len(batch["input_ids"]))
            self.average.mul_(0.5).add_(1.0)
            return batch

    L.seed_everything(0, verbose=False)
    module: Any = Own(config=LLAMA, learning_rate=1e-2, lr_schedule="constant")
    module.seen = []
    module.register_buffer("average", torch.zeros(()))
    perp = PERPRetraining(reconstruct={**OPTIONS, "steps": 1}, r=4)
    make_trainer(tmp_path, pruning(), perp, max_steps=1).fit(module, loader())
    assert perp.reconstruction is not None
    assert module.seen == [4]  # of the step alone
    assert module.average == 1.0


def test_a_compiled_model(tmp_path: Path) -> None:
    """In all but that nothing is compiled, which would take long."""
    found, reports = [], []
    for compiled in (False, True):
        module = make_module()
        if compiled:
            module.model = torch.compile(module.model, backend="eager")
        model, perp = module.model, PERPRetraining(reconstruct={**OPTIONS, "steps": 2}, r=4)
        with torch.compiler.set_stance("force_eager"):
            make_trainer(tmp_path, pruning(), perp, max_steps=1).fit(module, loader())
        assert module.model is model
        assert not hasattr(model, "peft_config")  # for another fit
        reports.append(perp.reconstruction)
        found.append([p.detach() for p in model.parameters()])
    assert reports[0] == reports[1]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_resume_does_not_reconstruct_again(tmp_path: Path) -> None:
    def run(path: Path, epochs: int, resume: Any = None) -> tuple[dict[str, bytes], PERPRetraining]:
        module, perp = make_module(seed=0 if resume is None else 7), PERPRetraining(reconstruct=OPTIONS)
        save = ModelCheckpoint(dirpath=path, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(path, perp, pruning(score="wanda"), save, max_epochs=epochs)
        trainer.fit(module, loader(), ckpt_path=resume, **WEIGHTS_ONLY)
        return snapshot(module.model), perp

    whole, _ = run(tmp_path / "a", 2)
    resumed, perp = run(tmp_path / "b", 2, tmp_path / "a" / "epoch=0.ckpt")
    assert resumed == whole
    assert perp.reconstruction is None


@pytest.mark.slow
@pytest.mark.parametrize("first", ["pruning", "perp"])
def test_a_callback_that_goes_back_before_training_is_no_resume(first: str, tmp_path: Path) -> None:
    def fit(*finders: L.Callback) -> tuple[AtStart, PERPRetraining]:
        start, perp = AtStart(), PERPRetraining(r=4, reconstruct=OPTIONS)
        pruner = pruning()
        both = [pruner, perp] if first == "pruning" else [perp, pruner]
        make_trainer(tmp_path, *both, *finders, start, max_steps=1).fit(make_module(), loader())
        return start, perp

    finder = LearningRateFinder(num_training_steps=2, early_stop_threshold=None, update_attr=False)
    (start, perp), (expected, alone) = fit(finder), fit()
    assert perp.reconstruction == alone.reconstruction
    assert alone.reconstruction is not None
    assert all(torch.equal(weight, start.weights[n]) for n, weight in expected.weights.items())


def test_a_second_fit_has_no_dense_weights(tmp_path: Path) -> None:
    module, pruner, perp = make_module(), pruning(), PERPRetraining(reconstruct=OPTIONS)
    make_trainer(tmp_path, perp, pruner, max_epochs=1).fit(module, loader())
    with pytest.raises(ValueError, match="pruned before this fit"):
        make_trainer(tmp_path, perp, pruner, max_epochs=1).fit(module, loader())


def test_interrupted_reconstruction_leaves_pruned_weights_and_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise RuntimeError("power cut")

    module, pruner = make_module(), pruning()
    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(tmp_path, PERPRetraining(reconstruct=OPTIONS), pruner).fit(module, loader())
    monkeypatch.undo()
    assert pruner.masks
    make_trainer(tmp_path, pruner, PERPRetraining()).fit(module, loader())  # takes the adapters up
    assert isinstance(module.model, LlamaForCausalLM)
    assert all(not module.get_parameter(n)[~m].any() for n, m in pruner.masks.items())
