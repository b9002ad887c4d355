"""The projections inside of torch's attention over real processes: shards cut queries, keys and values anywhere."""

from pathlib import Path
from typing import Any

import pytest
from launching import (
    assert_enforced,
    assert_same_on_all_ranks,
    fit,
    launch_two_steps,
    masks,
    results,
    share_of_other_masks,
)

pytestmark = pytest.mark.distributed

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac": ("ddp", {}),
    "sharded kfac": ("fsdp2", {}),
    "sharded gblm": ("fsdp2", {"score": "gblm", "parallel": {"bf16": True}}),
    "sharded magnitude": ("fsdp2", {"score": "magnitude"}),
    "sharded 2:4": ("fsdp2", {"score": "sparsegpt", "pattern": "2:4"}),
    "sharded exact": ("fsdp2", {"update": "exact"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of every case wrote."""
    return launch_two_steps(tmp_path_factory.mktemp("attention"), CASES, family="attention")


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_one_process(name: str, folder: Path, tmp_path: Path) -> None:
    strategy, settings = CASES[name]
    ranks = results(folder / name, 2)
    assert_same_on_all_ranks(ranks)
    assert_enforced(ranks[0])
    inside = [weight for weight in masks(ranks[0]) if weight.endswith(("in_proj_weight", "out_proj.weight"))]
    assert len(inside) == 4
    for weight in inside if strategy == "fsdp2" else ():
        assert int(ranks[0]["held." + weight.removeprefix("mask.")]) * 2 == ranks[0][weight].numel()
    plain = {key: value for key, value in settings.items() if key != "parallel"}
    (one,) = fit(tmp_path / "one", 1, "single", max_steps=1, family="attention", **plain)
    assert share_of_other_masks(ranks[0], one) <= (2e-2 if "parallel" in settings else 3e-4)
