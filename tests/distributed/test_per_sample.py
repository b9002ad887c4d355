"""Ranks of one calibration decide alike how their batches are run, and fail alike."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import launch_calls
from per_sample_losses import autograd, data, in_batch_negatives, penalty, squares, two_layers

from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import GRADIENTS
from lightning_prune.pruning.targets import find_targets
from lightning_prune.ranks import Ranks

pytestmark = pytest.mark.distributed


def mean_squares(model: Any, batch: Any) -> torch.Tensor:
    return squares(model, batch).mean()


def alone(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return [row[None] for batch in batches for row in batch]


def gather(batches: list[torch.Tensor], loss: Any, lockstep: bool) -> Any:
    model = two_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collect(
            model, batches, find_targets(model), GRADIENTS, num_samples=sum(map(len, batches)), loss_fn=loss,
            ranks=Ranks(lockstep=lockstep), progress=False,
        )  # fmt: skip


def check(address: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for lockstep in (False, True):
        for sizes in ((6, 6), (3, 5), (1, 4)):
            every = [[torch.randn(size, 4, 6, generator=torch.Generator().manual_seed(size + i)) for i in range(2)]
                     for size in sizes]  # fmt: skip
            for loss in (squares, mean_squares):
                found = gather(every[rank], loss, lockstep)
                expected = autograd(two_layers(), alone(every[0] + every[1]), loss)
                for name, value in expected.items():
                    torch.testing.assert_close(found[name].gradient_l2.double(), value, rtol=1e-3, atol=1e-6)
        # The first batch of rank 0 has one sample, which tells nothing: it follows rank 1.
        every = [[torch.randn(1, 6), *data(5, 6)], data(6, 6, count=3)]
        found = gather(every[rank], in_batch_negatives, lockstep)
        expected = autograd(two_layers(), [*every[0][1:], *every[1]], in_batch_negatives)
        for name, value in expected.items():
            torch.testing.assert_close(found[name].gradient_l2.double(), value, rtol=1e-3, atol=1e-6)
        # One rank fails: in its data, in its loss, by a loss that cannot be calibrated on, by zero gradients of all.
        for mine, loss, message in (
            ([] if rank else data(4, 6), squares, "calibration saw no sample"),
            (data(4, 6), penalty if rank else squares, "create_graph"),
            (data(4, 6), (lambda m, b: squares(m, b) * float("nan")) if rank else squares, "not finite"),
            (data(4, 6), lambda m, b: squares(m, b) * 0, "zero in 2 of 2 layers"),
        ):
            with pytest.raises(CalibrationError, match=message):
                gather(mine, loss, lockstep)
    dist.destroy_process_group()


def test_ranks_decide_alike(tmp_path: Path) -> None:
    done = launch_calls(2, check, [(f"file://{tmp_path}/meeting",)])
    assert done.returncode == 0, done.stderr[-3000:]
