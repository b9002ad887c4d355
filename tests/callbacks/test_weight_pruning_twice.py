"""Two `WeightPruning` in one Trainer: each its own layers, resumed, exported, inspected, reported, beside others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from perp_trainers import Losses, loader, make_module, make_trainer
from torch import Tensor
from versions import EMAWeightAveraging

from lightning_prune import (
    ELSA,
    CausalLM,
    OneShot,
    PruningAwarePretraining,
    SparsityMonitor,
    WeightPruning,
    export,
    inspect,
)
from lightning_prune.callbacks.perp_retraining import PERPRetraining
from lightning_prune.checkpoints.mask_files import export_masks, load_masks
from lightning_prune.report import report

ATTENTION, MLP = ["self_attn"], ["mlp"]


class Pruning(WeightPruning):
    """A subclass of a user's own."""


def two(kind: type[WeightPruning] = WeightPruning, **settings: Any) -> tuple[WeightPruning, WeightPruning]:
    """Attention at 50 %, FFN at 2:4."""
    given = {"num_samples": 8, "progress": False, **settings}
    return (
        WeightPruning(score="wanda", sparsity=0.5, targets=ATTENTION, **given),
        kind(score="magnitude", pattern="2:4", targets=MLP, **given),
    )


def assert_pruned(weights: dict[str, Tensor]) -> None:
    """Half of every attention matrix, and two of every four in the FFN."""
    attention = [w for n, w in weights.items() if "self_attn" in n]
    mlp = [w for n, w in weights.items() if ".mlp." in n]
    assert len(attention) == 8
    assert len(mlp) == 6
    for weight in attention:
        assert int((weight == 0).sum()) == weight.numel() // 2
    for weight in mlp:
        assert bool(((weight.reshape(-1, 4) == 0).sum(1) == 2).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [WeightPruning, Pruning])
def test_a_run_of_two_is_resumed_exported_inspected_and_told(kind: type[WeightPruning], tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> tuple[CausalLM, list[float], tuple[WeightPruning, ...]]:
        module, losses, pair = make_module(), Losses(), two(kind)
        keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        monitor = SparsityMonitor(every_n_steps=3)
        trainer = make_trainer(tmp_path, *pair, monitor, losses, keep, max_epochs=2)
        trainer.fit(module, loader(12), ckpt_path=ckpt_path)
        return module, losses.values, pair

    whole, losses, pair = fit()
    assert_pruned(dict(whole.named_parameters()))
    assert not pair[0].masks.keys() & pair[1].masks.keys()
    assert all(pruner.finished and pruner.sparsity == 0.5 for pruner in pair)
    checkpoint = tmp_path / "kept" / "epoch=0.ckpt"
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert {pruner.state_key for pruner in pair} <= states.keys()
    assert [len(states[pruner.state_key]["masks"]) for pruner in pair] == [8, 6]

    again, rest, resumed = fit(checkpoint)
    assert rest == losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    for old, new in zip(pair, resumed, strict=True):
        assert all(torch.equal(mask, new.masks[name]) for name, mask in old.masks.items())

    found = inspect(checkpoint, progress=False)
    assert (found.masks, found.resurrected) == (14, 0)
    assert export_masks(checkpoint, tmp_path / "masks.safetensors") == len(load_masks(tmp_path / "masks.safetensors"))
    export(checkpoint, tmp_path / "out", progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "wanda, magnitude" in card
    assert "| N:M pattern | 2:4 in 6 of 14 layers |" in card
    assert "| layers chosen | ['self_attn'] |" in card
    assert json.loads((tmp_path / "out" / "sparsity.json").read_text())["score"] == "wanda, magnitude"
    page = report(checkpoint, tmp_path / "page.html", progress=False).read_text()
    for name in ("q_proj", "down_proj"):
        assert f"layers.0.{'mlp' if 'down' in name else 'self_attn'}.{name}" in page
    assert "wanda, magnitude" in page
    history = [json.loads(line) for line in next(tmp_path.rglob("sparsity*.jsonl")).read_text().splitlines()]
    assert len(history[-1]["layers"]) == 14


def test_masks_that_nobody_would_hold_are_refused(tmp_path: Path) -> None:
    pair = two()
    trainer = make_trainer(tmp_path, *pair, max_epochs=1)
    trainer.fit(make_module(), loader(8))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    for callbacks in (two()[:1], (*two()[:1], WeightPruning(targets=["up_proj"], num_samples=8))):
        with pytest.raises(ValueError, match="which no WeightPruning in the Trainer would hold"):
            make_trainer(tmp_path, *callbacks, max_epochs=2).fit(
                make_module(), loader(8), ckpt_path=tmp_path / "two.ckpt"
            )


def test_one_resumes_with_other_layers(tmp_path: Path) -> None:
    first = two()[0]
    trainer = make_trainer(tmp_path, first, max_epochs=1)
    trainer.fit(make_module(), loader(8))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = WeightPruning(score="wanda", sparsity=0.5, targets=["q_proj"], num_samples=8, progress=False)
    make_trainer(tmp_path, other, max_epochs=2).fit(make_module(), loader(8), ckpt_path=tmp_path / "one.ckpt")
    assert all(torch.equal(mask, other.masks[name]) for name, mask in first.masks.items())


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"targets": ["q_proj"]}, "would both prune 2 weights, first 'model.model.layers.0.self_attn.q_proj.weight'"),
        ({"ignore": ("lm_head", "gate_proj")}, "would both prune 8 weights"),
    ],
)
def test_layers_of_both_are_refused_before_any_is_pruned(second: Any, message: str, tmp_path: Path) -> None:
    module = make_module()
    before = {name: p.clone() for name, p in module.named_parameters()}
    overlapping = WeightPruning(score="magnitude", sparsity=0.5, **second)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, two()[0], overlapping).fit(module, loader())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize(
    ("second", "message"),
    [({"pattern": "3:7"}, "do not divide by 7"), ({"distill_from": "no/such/folder"}, "no/such/folder")],
)
def test_what_the_second_refuses_leaves_the_weights_to_the_first(second: Any, message: str, tmp_path: Path) -> None:
    module = make_module()
    before = {name: p.clone() for name, p in module.named_parameters()}
    other = WeightPruning(score="magnitude", targets=MLP, **second)
    with pytest.raises((ValueError, OSError), match=message):
        make_trainer(tmp_path, two()[0], other).fit(module, loader())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("failure", [ValueError("no loss"), KeyboardInterrupt()])
def test_where_the_second_fails_in_calibration_the_first_is_put_back(failure: BaseException, tmp_path: Path) -> None:
    def fail(module: Any, batch: Any) -> Tensor:
        raise failure

    module, first = make_module(), two()[0]
    before = {name: p.clone() for name, p in module.named_parameters()}
    second = WeightPruning(score="wanda", targets=MLP, num_samples=8, progress=False, loss_fn=fail)
    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path, first, second).fit(module, loader())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not first.masks
    assert not first.finished
    make_trainer(tmp_path, first, two()[1], max_epochs=1).fit(module, loader())  # prunes anew
    assert_pruned(dict(module.named_parameters()))


def test_what_cannot_be_beside_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distill_from is given to two"):
        make_trainer(tmp_path, *two(distill_from=make_module().model)).fit(make_module(), loader())
    with pytest.raises(ValueError, match="beside two WeightPruning is not supported"):
        make_trainer(tmp_path, *two(), PruningAwarePretraining(target=0.9)).fit(make_module(), loader())
    with pytest.raises(RuntimeError, match="state_key"):  # Lightning's
        make_trainer(tmp_path, two()[0], two()[0])


def test_the_summary_does_not_worry_over_what_the_other_prunes(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    make_trainer(tmp_path, *two(), max_epochs=1).fit(make_module(), loader(8))
    assert not [w for w in recwarn if "candidates" in str(w.message)]
    with pytest.warns(UserWarning, match="candidates"):
        make_trainer(tmp_path, two()[0], max_epochs=1).fit(make_module(), loader(8))


@pytest.mark.few_fast(1)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("later", [False, True])
def test_adapters_beside_two(order: tuple[int, ...], later: bool, tmp_path: Path) -> None:
    first, second = two(schedule=OneShot(2) if later else None)
    callbacks: list[L.Callback] = [first, second, PERPRetraining(r=4)]
    module = make_module()
    before = {name: p.clone() for name, p in module.named_parameters()}
    make_trainer(tmp_path, *(callbacks[i] for i in order), max_epochs=1).fit(module, loader())
    weights = dict(module.named_parameters())
    assert weights.keys() == before.keys()
    assert_pruned(weights)
    for name, mask in (first.masks | second.masks).items():
        assert bool((weights[name][mask] != before[name][mask]).any()), name


def test_averages_and_a_schedule_beside_two(tmp_path: Path) -> None:
    """One trains into its sparsity, one prunes at once; the average of the weights keeps both masks."""
    attention = WeightPruning(
        score="magnitude", sparsity=0.5, targets=ATTENTION, schedule=ELSA(step=4, every_n_steps=2)
    )
    ffn, average = two()[1], EMAWeightAveraging(decay=0.5)
    module = make_module()
    make_trainer(tmp_path, attention, ffn, average, max_epochs=2).fit(module, loader())
    assert attention.finished
    assert_pruned(dict(module.named_parameters()))  # which are the average by now


def test_model_pruning_of_lightning_is_refused_before_any_weight_changes(tmp_path: Path) -> None:
    module = make_module()
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    theirs = ModelPruning(
        "l1_unstructured", [(m, "weight") for n, m in module.named_modules() if "_proj" in n], amount=0.5
    )
    with pytest.raises(ValueError, match="ModelPruning takes weights away"):
        make_trainer(tmp_path, WeightPruning(score="magnitude"), theirs).fit(module, loader())
    assert all(torch.equal(weight, before[name]) for name, weight in module.named_parameters())
    make_trainer(tmp_path, theirs, max_epochs=1).fit(module, loader())  # what is advised
    zeros = {name: weight == 0 for name, weight in module.named_parameters() if "_proj" in name}
    make_trainer(tmp_path, keep := WeightPruning(score="keep")).fit(module, loader())
    assert keep.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(torch.equal(module.get_parameter(name) == 0, zero) for name, zero in zeros.items())
