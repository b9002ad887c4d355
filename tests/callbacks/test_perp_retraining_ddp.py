"""PERPRetraining under DDP with real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import perp_worker
import pytest
import torch
from launching import launch_calls
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed


CASES = ("one shot", "reconstruct", "kept weights", "distilled", "schedule")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks ended with, all cases in one launch."""
    out = tmp_path_factory.mktemp("ddp")
    done = launch_calls(2, perp_worker.run, [(out, 2, case) for case in CASES])
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_ranks_merge_the_same_model_as_one_process(case: str, folder: Path, tmp_path: Path) -> None:
    ranks = [load_file(folder / f"{case}-2-{rank}.safetensors") for rank in range(2)]
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
        if name.startswith("mask."):
            assert not ranks[0][name.replace("mask.", "weight.")].view(torch.int32)[~value].any()
    perp_worker.run(tmp_path, 1, case)
    one = load_file(tmp_path / f"{case}-1-0.safetensors")
    assert one.keys() == ranks[0].keys()
    if case in ("reconstruct", "kept weights"):
        # Two ranks step on two batches at once, so they fit differently from one process, but start from the same.
        assert torch.allclose(ranks[0]["errors"][0, 0], one["errors"][0, 0], rtol=1e-4)
        assert bool((ranks[0]["errors"][:, 1] < 0.9 * ranks[0]["errors"][:, 0]).all())
        return
    changed = 0
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(ranks[0][name], value, rtol=1e-3, atol=1e-4)
        else:
            changed += int((value != ranks[0][name]).sum())
    assert changed <= 4  # sums over samples are taken in another order, and scores may swap at the threshold
