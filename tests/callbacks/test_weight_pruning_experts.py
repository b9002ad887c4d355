"""Experts through a whole life: pruned in a Trainer, resumed, exported, kept by the next fit, inspected, retrained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from experts_models import EXPERTS, WORDS, make_moe
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import make_tokens
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_prune import ELSA, CausalLM, CubicSchedule, WeightPruning, export, hold_masks, inspect, prune
from lightning_prune.perp import reconstruct
from lightning_prune.report import report

FAMILIES = ["mixtral", "gpt_oss"]  # out x in; in x out, with biases


def make_module(family: str, **settings: Any) -> CausalLM:
    L.seed_everything(0, verbose=False)
    config = make_moe(family).config.to_dict()
    return CausalLM(config=config | {"initializer_range": 0.2}, learning_rate=1e-2, weight_decay=0.1, **settings)


def fit(folder: Path, module: CausalLM, *callbacks: L.Callback, epochs: int = 2, resume: Path | None = None,
        **settings: Any) -> L.Trainer:  # fmt: skip
    rows = [{"input_ids": row} for row in make_tokens(8, 12, vocab=WORDS)]
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, saver], default_root_dir=folder, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=4), ckpt_path=resume)
    return trainer


def assert_held(module: CausalLM, masks: dict[str, torch.Tensor]) -> None:
    """Pruned weights are +0.0, kept ones are not zero, and experts are among them."""
    assert sum("experts" in name for name in masks) == 2 * 2
    for name, mask in masks.items():
        weight = module.get_parameter(name).detach()
        assert torch.equal(weight != 0, mask), name
        assert not torch.signbit(weight[~mask]).any(), name


@pytest.mark.few_fast(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_life(family: str, tmp_path: Path) -> None:
    def pruner() -> WeightPruning:
        return WeightPruning(score="kfac", schedule=CubicSchedule(0, 3, 1), num_samples=4, progress=False)

    module, pruning = make_module(family), pruner()
    fit(tmp_path, module, pruning)
    assert_held(module, pruning.masks)
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)

    resumed, again = make_module(family), pruner()
    fit(tmp_path / "resumed", resumed, again, resume=tmp_path / "epoch=0.ckpt")
    for name, mask in pruning.masks.items():
        assert torch.equal(mask, again.masks[name]), name
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name

    inspection = inspect(tmp_path / "epoch=1.ckpt", progress=False)
    assert inspection.resurrected == 0
    zeros = {report.name: report.zeros for report in inspection.tensors if report.name in pruning.masks}
    assert zeros == {name: int((~mask).sum()) for name, mask in pruning.masks.items()}

    page = report(tmp_path / "epoch=1.ckpt", tmp_path / "page.html", progress=False).read_text(encoding="utf-8")
    assert all(f"layers.{layer}.mlp.experts.down_proj" in page for layer in range(2))

    exported = export(tmp_path / "epoch=1.ckpt", tmp_path / "out", progress=False)
    assert exported.totals(True) == inspection.totals(True)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = make_tokens(2, 10, vocab=WORDS)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, module.model.eval()(ids).logits, rtol=0, atol=0)

    kept, keeping = CausalLM(model=str(tmp_path / "out"), learning_rate=1e-2), WeightPruning(score="keep")
    fit(tmp_path / "kept", kept, keeping, epochs=1)
    assert_held(kept, keeping.masks)
    for name, mask in pruning.masks.items():
        assert torch.equal(mask, keeping.masks[name]), name
    assert any(not torch.equal(p, module.get_parameter(n)) for n, p in kept.named_parameters())


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        ({}, {"precision": "bf16-mixed"}),
        ({"dtype": "bfloat16"}, {"precision": "bf16-true"}),
        ({"gradient_checkpointing": True}, {"accumulate_grad_batches": 2}),
    ],
    ids=["bf16-mixed", "bf16-true", "checkpointing"],
)
def test_masks_hold(family: str, model: dict[str, Any], trainer: dict[str, Any], tmp_path: Path) -> None:
    module = make_module(family, **model)
    pruning = WeightPruning(score="gblm", pattern="2:4", num_samples=4, progress=False)
    fit(tmp_path, module, pruning, epochs=1, **trainer)
    for name, mask in pruning.masks.items():
        weight = module.get_parameter(name).detach()
        assert (weight[~mask] == 0).all(), name
        along = mask.transpose(-1, -2) if family == "gpt_oss" and "experts" in name else mask
        assert (along.unflatten(-1, (-1, 4)).sum(-1) == 2).all(), name
    assert sum("experts" in name for name in pruning.masks) == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sequential", [False, True])
def test_compiled_blocks_give_the_masks_of_plain_ones(family: str, sequential: bool, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        module = make_module(family)
        for block in module.model.model.layers if compiled else ():
            block.compile(backend="eager")
        pruning = WeightPruning(score="wanda", sequential=sequential, num_samples=4, progress=False)
        fit(tmp_path / str(compiled), module, pruning, epochs=1)
        assert_held(module, pruning.masks)
        found.append(pruning.masks)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_elsa_trains_experts_into_their_sparsity(tmp_path: Path) -> None:
    module, pruning = make_module("gpt_oss"), WeightPruning(score="magnitude", sparsity=0.75, schedule=ELSA(3, 1, 0.5))
    fit(tmp_path, module, pruning)
    assert_held(module, pruning.masks)
    for name, mask in pruning.masks.items():
        parts = mask if "experts" in name else mask[None]
        assert all(int((~part).sum()) == part.numel() * 3 // 4 for part in parts), name


@pytest.mark.parametrize("family", FAMILIES)
def test_hold_masks_in_a_loop_of_ones_own(family: str) -> None:
    model = make_moe(family).train()
    masks = prune(model, score="magnitude")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with hold_masks(model, masks, optimizer):
        for _ in range(3):
            ids = make_tokens(2, 8, vocab=WORDS)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name


# -- retraining


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruct_fits_the_kept_weights_of_experts(family: str) -> None:
    model = make_moe(family)
    dense = copy.deepcopy(model)
    masks = prune(model, score="magnitude")
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    batches = [{"input_ids": make_tokens(2, 12, vocab=WORDS, seed=seed)} for seed in range(3)]
    done = reconstruct(
        model, batches, dense, masks, train="all", steps=60, learning_rate=5e-3, num_samples=6, progress=False
    )
    assert done.after < 0.9 * done.before
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight != 0, mask), name
        if "experts" in name:
            assert all(not torch.equal(weight[e], before[name][e]) for e in range(EXPERTS)), name
