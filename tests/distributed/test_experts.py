"""Experts over real processes: statistics and masks of one process, though ranks see different experts."""

from __future__ import annotations

import os
import re
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from experts_models import WORDS, make_moe
from launching import (
    assert_enforced,
    assert_same_on_all_ranks,
    fit,
    launch_calls,
    launch_two_steps,
    masks,
    results,
    share_of_other_masks,
)
from torch import nn

from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import ALL_STATISTICS
from lightning_prune.pruning.targets import ExpertTarget, find_targets
from lightning_prune.ranks import Ranks

pytestmark = pytest.mark.distributed


def routed_by_token(groups: int = 2) -> nn.Module:
    """A Mixtral whose tokens below 32 go to experts 0 and 1, the others to 2 and 3; in one group all go to 0 and 1."""
    model = make_moe("mixtral")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 8.0
        model.model.embed_tokens.weight[WORDS // 2 :, 0] = -8.0 if groups == 2 else 8.0
        for layer in model.model.layers:
            layer.mlp.gate.weight[:, 0] = torch.tensor([4.0, 4.0, -4.0, -4.0])
    return model


def sequences(rank: int) -> list[torch.Tensor]:
    """Three samples of one rank, of one half of the tokens."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(1, WORDS // 2, (1, 7), generator=generator) + rank * (WORDS // 2) for _ in range(3)]


def gather(model: nn.Module, samples: list[torch.Tensor], ranks: Ranks | None) -> Any:
    targets = [t for t in find_targets(model) if isinstance(t, ExpertTarget)]
    batches = [{"input_ids": ids} for ids in samples]
    return collect(model, batches, targets, ALL_STATISTICS, num_samples=len(batches), ranks=ranks, progress=False)


def check(address: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # together they reach every expert
        model = routed_by_token()
        expected = gather(model, sequences(0) + sequences(1), None)
        for lockstep in (False, True):
            found = gather(model, sequences(rank), Ranks(lockstep=lockstep))
            for name, statistics in expected.items():
                assert statistics.get("input_norm").any(), name
                for key in ALL_STATISTICS:
                    torch.testing.assert_close(found[name].get(key), statistics.get(key), rtol=1e-10, atol=1e-12)
    model = routed_by_token(groups=1)
    message = r"no calibration token was routed to 8 of the experts' matrices"
    for ranks, samples in ((None, sequences(0) + sequences(1)), (Ranks(), sequences(rank))):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = gather(model, samples, ranks)
        expected = found if ranks is None else expected
        assert [re.match(message, str(one.message)) is not None for one in told] == [True] * (rank == 0)  # once for all
    for name, statistics in expected.items():
        for key in ALL_STATISTICS:
            torch.testing.assert_close(found[name].get(key), statistics.get(key), rtol=1e-10, atol=1e-12)
    dist.destroy_process_group()


def test_statistics_of_experts_that_only_one_rank_uses(tmp_path: Path) -> None:
    done = launch_calls(2, check, [(f"file://{tmp_path}/meeting",)])
    assert done.returncode == 0, done.stderr[-3000:]


# Name: strategy, settings. With fully_shard a rank holds two of the four experts, or half of every one.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac": ("ddp", {"score": "kfac", "family": "mixtral"}),
    "magnitude": ("ddp", {"score": "magnitude", "family": "gpt_oss"}),
    "alps": ("ddp", {"score": "wanda", "update": "alps", "sequential": True, "family": "gpt_oss"}),
    "sharded kfac": ("fsdp2", {"score": "kfac", "family": "mixtral"}),
    "sharded gblm": ("fsdp2", {"score": "gblm", "family": "gpt_oss", "checkpointing": True}),
    "sharded global": (
        "fsdp2",
        {"score": "gradient", "group": "global", "family": "mixtral", "targets": ["experts"]},
    ),
    "sharded magnitude": ("fsdp2", {"score": "magnitude", "family": "gpt_oss", "parallel": {"bf16": True}}),
    "sharded 2:4": ("fsdp2", {"score": "sparsegpt", "pattern": "2:4", "sequential": True, "family": "gpt_oss"}),
    "sharded obs": ("fsdp2", {"score": "wanda", "update": "obs", "family": "mixtral"}),
    "sharded rows": ("fsdp2", {"score": "gblm", "family": "mixtral", "parallel": {"expert_dim": 1}}),
    "sharded columns": (
        "fsdp2",
        {"score": "kfac", "update": "obs", "family": "mixtral", "parallel": {"expert_dim": 2}},
    ),
    "sharded exact": ("fsdp2", {"score": "wanda", "update": "exact", "sequential": True, "family": "mixtral"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of every case wrote."""
    return launch_two_steps(tmp_path_factory.mktemp("experts"), CASES)


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_one_process(name: str, folder: Path, tmp_path: Path) -> None:
    strategy, settings = CASES[name]
    ranks = results(folder / name, 2)
    assert_same_on_all_ranks(ranks)
    assert_enforced(ranks[0])
    experts = [weight for weight in masks(ranks[0]) if "experts" in weight]
    assert len(experts) == 4
    for weight in experts if strategy == "fsdp2" else ():
        assert int(ranks[0]["held." + weight.removeprefix("mask.")]) * 2 == ranks[0][weight].numel()
    plain = {key: value for key, value in settings.items() if key not in ("parallel", "checkpointing")}
    (one,) = fit(tmp_path / "one", 1, "single", max_steps=1, **plain)
    assert share_of_other_masks(ranks[0], one) <= (5e-3 if settings.get("update") == "alps" else 3e-4)
