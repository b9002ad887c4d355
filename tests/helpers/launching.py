"""Start workers of several processes and read what they wrote."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import worker
from forking import start
from safetensors.torch import load_file
from tiny import clean_environment

from lightning_prune.cli import main

Case = tuple[Path, str, dict[str, Any]]  # folder, strategy, settings


@dataclass(frozen=True)
class Launched:
    """What processes ended with: the first exit status that is not zero, and all that they printed."""

    returncode: int
    stderr: str


def launch(devices: int, *cases: Case, timeout: float = 300, run: Callable[..., Any] = worker.run) -> Launched:
    """Run cases one after the other in the same processes, `run` being what workers of `worker`'s kind do."""
    for folder, _, _ in cases:
        folder.mkdir(parents=True, exist_ok=True)
    return launch_calls(devices, run, [(folder, devices, strategy, settings) for folder, strategy, settings in cases],
                        timeout=timeout)  # fmt: skip


def launch_two_steps(folder: Path, cases: dict[str, tuple[str, dict[str, Any]]], **common: Any) -> Path:
    """Fit named cases (strategy and settings) for two steps on two ranks; returns the folder that holds theirs."""
    done = launch(
        2, *((folder / n, strategy, {"max_steps": 2, **common, **how}) for n, (strategy, how) in cases.items())
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def launch_calls(devices: int, run: Callable[..., Any], calls: list[tuple[Any, ...]], timeout: float = 300) -> Launched:
    """Call a function of a module several times, in processes that Lightning takes for those of a launcher."""
    environment = clean_environment() | {
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "WORLD_SIZE": str(devices), "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(devices)]
        ranks = [
            start(_calls, run, calls, environment=environment | {"LOCAL_RANK": str(rank)}, log=log)
            for rank, log in enumerate(logs)
        ]
        return _ended(ranks, folder, timeout)


def _ended(ranks: list[BaseProcess], folder: str, timeout: float) -> Launched:
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    said = "".join(log.read_text(errors="replace") for log in sorted(Path(folder).iterdir()))
    assert not late, f"{len(late)} of {len(ranks)} processes did not end in {timeout} s:\n{said[-3000:]}"
    return Launched(next((code for p in ranks if (code := p.exitcode or 0)), 0), said)


def launch_command(nodes: int, devices: int, arguments: list[str], timeout: float = 300) -> Launched:
    """Run a command of the command line on several nodes, with the variables that torchrun sets."""
    port, world = str(free_port()), nodes * devices
    with TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            environment = clean_environment() | {
                "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank % devices), "WORLD_SIZE": str(world),
                "GROUP_RANK": str(rank // devices), "LOCAL_WORLD_SIZE": str(devices), "TORCHELASTIC_RUN_ID": "none",
            }  # fmt: skip
            ranks.append(start(_command, arguments, environment=environment, log=Path(folder) / str(rank)))
        return _ended(ranks, folder, timeout)


def _command(arguments: list[str]) -> None:
    sys.exit(main(arguments))


def _calls(run: Callable[..., Any], calls: list[tuple[Any, ...]]) -> None:
    for call in calls:
        run(*call)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
