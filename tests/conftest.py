"""What every test takes as given: one thread a process, and fixtures of tiny models."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import known_packages  # noqa: F401
import pytest

# Heavy libraries are imported by functions: with several workers, the process that starts them has to load this file
# first, and needs none of them.
if TYPE_CHECKING:
    from tiny import Reference
    from torch import Tensor, nn

# The tests run in as many processes as there are cores; processes started by tests inherit the variable.
os.environ["OMP_NUM_THREADS"] = "1"


# Started in the background (nohup, some CI systems), a process inherits that Ctrl-C is ignored; some tests send it.
def _hear_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


_hear_interrupts()


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch
    from versions import missing_for

    torch.set_num_threads(1)  # a plugin may have imported it before the variable was set
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few_fast") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        if (reason := missing_for(item.nodeid)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    for several in cases.values():
        number = several[0].get_closest_marker("few_fast").args[0]  # type: ignore[union-attr]
        fast = {place * len(several) // number for place in range(number)}  # spread over all of them
        for place, item in enumerate(several):
            if place not in fast:
                item.add_marker("slow")
    # Files that take long come first, so that no worker is left alone with one at the end.
    weights: Counter[Path] = Counter()
    for item in items:
        long = item.get_closest_marker("slow") or item.get_closest_marker("distributed")
        weights[item.path] += 50 if long else 1
    items.sort(key=lambda item: -weights[item.path])


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, of which a Trainer asks for many: half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def interrupts_come_again() -> Iterator[None]:
    """A Trainer that had Ctrl-C leaves the signal ignored."""
    yield
    _hear_interrupts()


@pytest.fixture(autouse=True)
def no_group_outlives_a_test() -> Iterator[None]:
    """A Trainer that refuses a strategy has started its process group by then, and leaves it to this process."""
    import torch.distributed as dist

    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def what_a_test_registers_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family or an adapter of a test, or of a page that it runs, would be known to the tests after it."""
    from lightning_prune.perp import layers
    from lightning_prune.structure import families

    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    monkeypatch.setattr(layers, "_VARIANTS", dict(layers._VARIANTS))


@pytest.fixture
def llama() -> nn.Module:
    from tiny import make_llama

    return make_llama()


@pytest.fixture
def llama_factory() -> Callable[..., nn.Module]:
    from tiny import make_llama

    return make_llama


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    from tiny import make_tokens

    return make_tokens


@pytest.fixture(scope="session")
def reference() -> Reference:
    """Not to be changed: copy the model."""
    import naive
    from tiny import LAYERS, Reference, make_llama, make_tokens

    model, ids = make_llama().double(), make_tokens(5, 12)
    statistics = naive.statistics(model, [{"input_ids": row[None]} for row in ids], LAYERS)
    weights = {name: model.get_parameter(name).detach().numpy().copy() for name in LAYERS}
    return Reference(model, ids, statistics, weights)
