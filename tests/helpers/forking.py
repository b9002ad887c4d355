"""Start processes as forks of one that has imported everything: a moment each, where a new Python takes seconds."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pkgutil
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.multiprocessing import start_processes

import lightning_prune

# What the package imports inside functions only, and torch when it first compiles.
_MORE = (
    "datasets", "lightning.pytorch.cli", "lightning.pytorch.strategies", "peft", "torch._dynamo.backends.debugging",
    "networkx", "torch._inductor.compile_fx", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.utils.data",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
)  # fmt: skip
PRELOADED = (
    "known_packages",
    *(module.name for module in pkgutil.walk_packages(lightning_prune.__path__, "lightning_prune.")),
    *_MORE,
    "known_renamings",
)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(PRELOADED))


def compile_imports() -> None:
    """Import all of it, so that its bytecode is there: of several processes that start at once, each would make it."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # what the lowest versions do not have
            importlib.import_module(name)


def start(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str], log: Path) -> BaseProcess:
    """Start a process that calls a function of a module; what it prints goes to `log`."""
    process = CONTEXT.Process(target=_child, args=(dict(environment), str(log), function, arguments))
    process.start()
    return process


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function of a module with each rank and these arguments, in processes; what one raises is raised."""
    start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


def _child(environment: dict[str, str], log: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # a collection would write to every object of the process forked from, and so copy all its memory
    os.environ.clear()  # it is that of the process forked from, which may be older than a test's
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    function(*arguments)
