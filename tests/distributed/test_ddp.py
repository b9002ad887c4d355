"""DDP with real processes over gloo: the same masks on every rank, those of one process on the same samples."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from launching import assert_enforced, assert_same_on_all_ranks, fit, launch, masks, share_of_other_masks
from safetensors.torch import load_file

from lightning_prune.pruning.masks import unpack_masks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("ddp", {"score": "gblm"}),
        ("ddp", {"score": "kfac"}),
        ("ddp_static_graph", {"score": "gblm", "pattern": "2:4"}),
        ("ddp_bucket_view", {"score": "wanda", "gradual": True, "trainer": {"accumulate_grad_batches": 2}}),
        ("ddp_find_unused", {"score": "sparsegpt", "sequential": True}),
        ("ddp", {"score": "kfac", "update": "obs", "sequential": True, "checkpointing": True}),
    ],
    ids=["gblm", "kfac", "static-graph 2:4", "bucket-view gradual", "find-unused sparsegpt", "kfac obs"],
)
def test_ranks_agree_with_each_other_and_with_one_process(
    strategy: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**settings, "max_steps": 4}
    ranks = fit(tmp_path / "two", 2, strategy, **settings)
    assert_same_on_all_ranks(ranks)
    assert_enforced(ranks[0])
    if settings.get("gradual"):
        return  # later masks depend on weights trained on other batches
    (one,) = fit(tmp_path / "one", 1, "single", **settings)
    # Sums over samples are taken in another order, so scores a rounding away from the threshold may swap.
    assert share_of_other_masks(ranks[0], one) <= 2e-4


def test_resume_keeps_masks_at_another_world_size(tmp_path: Path) -> None:
    before = fit(tmp_path / "two", 2, "ddp", score="gblm", max_steps=2)[0]
    (after,) = fit(tmp_path / "one", 1, "single", score="gblm", max_steps=6, resume=str(tmp_path / "two" / "end.ckpt"))
    for name, mask in masks(before).items():
        assert torch.equal(mask, masks(after)[name])
    assert_enforced(after)


def test_a_rank_that_fails_stops_all_with_its_error(tmp_path: Path) -> None:
    started = time.monotonic()
    done = launch(2, (tmp_path, "ddp", {"score": "gblm", "fail_on_rank": 1}))
    assert done.returncode != 0
    assert time.monotonic() - started < 100
    assert "the loss of a calibration sample is not finite" in done.stderr
    assert "rank 1 failed" in done.stderr


def test_too_few_samples_for_the_ranks_is_refused(tmp_path: Path) -> None:
    done = launch(2, (tmp_path, "ddp", {"score": "wanda", "num_samples": 1}))
    assert done.returncode != 0
    assert "num_samples=1 must be at least one for each of the 2 ranks" in done.stderr


def test_spawned_processes_return_sparse_weights_and_a_checkpoint_with_masks(tmp_path: Path) -> None:
    out = tmp_path / "spawn"
    out.mkdir()
    worker.run(out, 2, "ddp_forkserver", {"score": "gblm", "max_steps": 2})
    weights = load_file(out / "rank0.safetensors")
    saved = torch.load(out / "end.ckpt", weights_only=True)
    state = next(value for key, value in saved["callbacks"].items() if key.startswith("WeightPruning"))
    for name, mask in unpack_masks(state["masks"]).items():
        assert int((~mask).sum()) == mask.numel() // 2
        assert bool((weights["weight." + name][~mask] == 0).all()), name
