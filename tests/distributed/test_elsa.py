"""ELSA with real processes: FSDP2 as DDP, also resumed in the middle of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import assert_enforced, assert_same_on_all_ranks, launch, results, share_of_other_masks

pytestmark = pytest.mark.distributed

SETTINGS = {"score": "magnitude", "sparsity": 0.8, "elsa": [9, 2], "max_steps": -1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks ended with, all fits in one launch."""
    out = tmp_path_factory.mktemp("elsa")
    half, whole = ({**SETTINGS, "trainer": {"max_epochs": epochs}} for epochs in (1, 2))  # of 6 steps
    cases = [
        *((out / strategy, strategy, whole) for strategy in ("ddp", "fsdp2")),
        *((out / f"{strategy} half", strategy, half) for strategy in ("ddp", "fsdp2")),
        *(
            (out / f"{strategy} resumed", strategy, {**whole, "resume": str(out / f"{strategy} half" / "end.ckpt")})
            for strategy in ("ddp", "fsdp2")
        ),
    ]
    done = launch(2, *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_agree_and_a_resumed_run_is_the_uninterrupted_one(strategy: str, folder: Path) -> None:
    whole, resumed = results(folder / strategy, 2), results(folder / f"{strategy} resumed", 2)
    for ranks in (whole, resumed):
        assert_same_on_all_ranks(ranks)
        assert_enforced(ranks[0])
    pruned = sum(int((v == 0).sum()) for n, v in whole[0].items() if n.startswith("mask."))
    assert pruned == pytest.approx(0.8 * sum(v.numel() for n, v in whole[0].items() if n.startswith("mask.")), rel=0.01)
    for name, value in whole[0].items():
        assert torch.equal(value, resumed[0][name]), name


def test_shards_are_trained_as_replicas(folder: Path) -> None:
    replicas, shards = (results(folder / strategy, 2)[0] for strategy in ("ddp", "fsdp2"))
    assert share_of_other_masks(replicas, shards) <= 1e-3
    for name, value in replicas.items():
        if name.startswith("weight."):
            close = torch.isclose(value, shards[name], rtol=1e-3, atol=1e-4)
            assert float(close.float().mean()) > 0.999, name
