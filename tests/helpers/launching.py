"""Start workers of several processes and read what they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import worker
from safetensors.torch import load_file
from tiny import clean_environment

WORKER = Path(__file__).with_name("worker.py")
Case = tuple[Path, str, dict[str, Any]]  # folder, strategy, settings


def launch(devices: int, *cases: Case, timeout: float = 300, script: Path = WORKER) -> subprocess.CompletedProcess:
    """Run cases one after the other in the same processes."""
    for folder, _, _ in cases:
        folder.mkdir(parents=True, exist_ok=True)
    environment = clean_environment()
    arguments = json.dumps([[str(folder), strategy, settings] for folder, strategy, settings in cases])
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(script), str(devices), arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def results(folder: Path, devices: int) -> list[dict[str, torch.Tensor]]:
    """What each rank wrote."""
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(devices)]


def fit(out: Path, devices: int, strategy: str, **settings: Any) -> list[dict[str, torch.Tensor]]:
    """One case; with one device, in this process."""
    if devices == 1 and strategy == "single":
        out.mkdir(parents=True)
        worker.run(out, devices, strategy, settings)
    else:
        done = launch(devices, (out, strategy, settings))
        assert done.returncode == 0, done.stderr[-3000:]
    return results(out, devices)


def masks(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The masks a rank wrote."""
    return {name: value.bool() for name, value in state.items() if name.startswith("mask.")}


def assert_enforced(state: dict[str, torch.Tensor]) -> None:
    """Pruned weights are zero, and not all weights are."""
    for name, mask in masks(state).items():
        weight = state["weight." + name.removeprefix("mask.")]
        assert bool((weight[~mask] == 0).all()), name
        assert bool((weight[mask] != 0).any()), name


def assert_same_on_all_ranks(ranks: list[dict[str, torch.Tensor]]) -> None:
    """Bit-identical masks and weights."""
    for name, value in ranks[0].items():
        if not name.startswith("held."):
            assert all(torch.equal(value, other[name]) for other in ranks), name


def share_of_other_masks(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Share of weights whose masks differ."""
    mine, theirs = masks(one), masks(other)
    assert mine.keys() == theirs.keys()
    return sum(int((m != theirs[n]).sum()) for n, m in mine.items()) / sum(m.numel() for m in mine.values())
