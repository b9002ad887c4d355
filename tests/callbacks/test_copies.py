"""Callbacks are copied and pickled, by tools for sweeps and parallel runs: during a fit, after it, before it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from pruning_aware_models import batches, make_module, make_trainer
from torch import nn

from lightning_prune import (
    CausalLM,
    LinearSchedule,
    PERPRetraining,
    PruningAwarePretraining,
    SparsityMonitor,
    WeightPruning,
)

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}
GROUPS: dict[str, Callable[[], list[L.Callback]]] = {
    "pruning": lambda: [WeightPruning(score="magnitude", progress=False), SparsityMonitor()],
    "late": lambda: [WeightPruning(score="magnitude", schedule=LinearSchedule(1, 5, 2), progress=False)],
    "retraining": lambda: [
        WeightPruning(score="magnitude", progress=False, targets=["q_proj", "up_proj"]),
        PERPRetraining(merge=False, r=2),
    ],
    "shrinking": lambda: [PruningAwarePretraining(target=0.8)],
}


class CopiesDuringFit(L.Callback):
    def __init__(self, how: Callable[[Any], Any]) -> None:
        self.how = how
        self.copies: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self.copies = self.how([c for c in trainer.callbacks if c is not self])


@pytest.mark.slow
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_copies_hold_what_the_callback_knew_and_can_be_used(
    group: Callable[[], list[L.Callback]], how: Callable[[Any], Any], tmp_path: Path
) -> None:
    callbacks = group()
    how(callbacks)  # before a fit
    module, during = make_module(), CopiesDuringFit(how)
    make_trainer(*callbacks, during, max_steps=6, default_root_dir=tmp_path).fit(module, batches())
    assert [type(c) for c in during.copies] == [type(c) for c in callbacks]
    after = how(callbacks)
    for theirs, ours in zip(after, callbacks, strict=True):
        if isinstance(ours, WeightPruning):
            assert theirs.sparsity == ours.sparsity == 0.5
            assert theirs.masks.keys() == ours.masks.keys() != set()
            assert all(torch.equal(theirs.masks[name], mask) for name, mask in ours.masks.items())
        if isinstance(ours, PruningAwarePretraining):
            assert theirs.history == ours.history
            assert len(ours.history) > 1
    for copied in (during.copies, after):  # a model of its own is pruned for itself
        fresh = make_module(seed=9)
        make_trainer(*copied, max_steps=6, default_root_dir=tmp_path).fit(fresh, batches())
        for callback in copied:
            if isinstance(callback, WeightPruning):
                assert callback.sparsity == 0.5
                for name, mask in callback.masks.items():
                    assert not torch.equal(mask, callbacks[0].masks[name])
                    assert bool((weight(fresh, name)[~mask] == 0).all())
            if isinstance(callback, PruningAwarePretraining):
                assert callback.history[0].parameters == callbacks[0].history[0].parameters


def weight(module: nn.Module, name: str) -> torch.Tensor:
    return dict(module.named_parameters())[name].detach()


def test_a_copy_taken_during_a_fit_is_not_changed_by_it(tmp_path: Path) -> None:
    pruning, during = GROUPS["late"]()[0], CopiesDuringFit(copy.deepcopy)
    make_trainer(pruning, during, max_steps=6).fit(make_module(), batches())
    (copied,) = during.copies
    assert copied.sparsity == pytest.approx(0.25, abs=1e-3)  # of step 3, halfway from 1 to 5
    assert pruning.sparsity == 0.5
    assert copied.sparsity == sum(int((~m).sum()) for m in copied.masks.values()) / sum(
        m.numel() for m in copied.masks.values()
    )


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [*COPIES.values(), saved_and_loaded], ids=[*COPIES, "torch.save"])
def test_module_and_callback_that_are_copied_together_go_on(how: Callable[[Any], Any]) -> None:
    """Pruned weights stay zero although the schedule of the next fit has not begun yet."""
    module, pruning = make_module(), WeightPruning(score="magnitude", schedule=LinearSchedule(1, 5), progress=False)
    make_trainer(pruning, max_steps=6).fit(module, batches())
    module.trainer = None
    model, copied = how((module.model, pruning))
    again = make_module()
    again.model = model
    make_trainer(copied, max_steps=1).fit(again, batches())
    for name, mask in pruning.masks.items():
        assert torch.equal(copied.masks[name], mask)
        assert bool((weight(again, name)[~mask] == 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copied_shrinking_goes_on_with_its_own_module(how: Callable[[Any], Any]) -> None:
    module, shrinking = make_module(), PruningAwarePretraining(target=0.6)
    make_trainer(shrinking, max_steps=2).fit(module, batches())
    assert module.model.num_parameters() < shrinking.history[0].parameters
    before = len(shrinking.history)
    copied = how(shrinking)
    make_trainer(copied, max_steps=40).fit(module, batches())
    assert copied.history[:before] == shrinking.history[:before]  # the share is one of the size at the very beginning
    assert module.model.num_parameters() <= 0.6 * shrinking.history[0].parameters
    assert module.model.num_parameters() > 0.5 * shrinking.history[0].parameters


def test_lightning_causal_models_are_copied_with_their_trainer() -> None:
    module, pruning = make_module(), WeightPruning(score="magnitude", progress=False)
    trainer = make_trainer(pruning, max_steps=2)
    trainer.fit(module, batches())
    assert isinstance(copy.deepcopy(module), CausalLM)
    assert copy.deepcopy(trainer.callbacks)[0].sparsity == 0.5
