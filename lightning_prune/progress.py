"""A progress bar for long work: rich, on stderr, on rank 0, and only where someone can see it."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# What launchers call the rank of a process that has not joined its group yet: torchrun, SLURM, Lightning's own.
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
# This package, and what stands between its functions: decorators, context managers.
_NOT_THE_CALLER = frozenset((__name__.partition(".")[0], "torch", "contextlib"))


class Advance(Protocol):
    """Say that `steps` more units are done."""

    def __call__(self, steps: int = 1) -> None:
        """Move the bar on."""


def is_main_process() -> bool:
    """Whether this is rank 0, or the only process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    named = (os.environ[name] for name in _RANK_VARIABLES if name in os.environ)
    return int(next(named, "0")) == 0


def warn(text: str) -> None:
    """Warn once for all ranks, of what is the same on each, at the line that called this package.

    Args:
        text: The warning; nothing is said where it is empty.
    """
    if not text or not is_main_process():
        return
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLER:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level + 1)


@contextmanager
def progress_bar(description: str, total: int, enabled: bool = True) -> Iterator[Advance]:
    """Show a bar while the block runs; silent on other ranks and in logs that are no terminal."""
    console = Console(stderr=True)
    # The stream is asked too: with FORCE_COLOR, which CI systems set, rich takes a log for a terminal.
    if not (enabled and sys.stderr.isatty() and console.is_interactive and is_main_process()):
        yield lambda steps=1: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps=1: progress.advance(task, steps)
