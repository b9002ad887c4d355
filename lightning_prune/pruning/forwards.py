"""Run something else in the place of modules' forward passes for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forwards_replaced(others: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While the block runs, each module that is called runs another function; afterwards what it ran before.

    A forward may have been set on the module itself (device maps of accelerate, torch.compile).
    """
    own = {module: vars(module).get("forward") for module in others}
    try:
        for module, other in others.items():
            vars(module)["forward"] = other
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)  # back to the class's method
            else:
                vars(module)["forward"] = forward
