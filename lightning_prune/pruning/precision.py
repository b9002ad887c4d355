"""Full precision for products that are summed up, solved with or merged, whatever precision the training around has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lightning_prune.safety import ProcessWide


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in IEEE float32 while the block (or the decorated function) runs, on every device.

    Hooks run inside the Trainer's autocast, where ``X^T X`` of float32 tensors would become a half-precision product;
    and after ``torch.set_float32_matmul_precision("high")`` it would be one in TF32, with three digits. Training goes
    on with both. Half-precision tensors stay what they are: widen them first.
    """
    with ExitStack() as stack:
        for kind in _device_types():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_IEEE.changed())
        yield


def _device_types() -> set[str]:
    if not torch.accelerator.is_available():  # asked first: torch 2.6 raises where there is none
        return {"cpu"}
    accelerator = torch.accelerator.current_accelerator()
    return {"cpu"} if accelerator is None else {"cpu", accelerator.type}


@contextmanager
def _ieee_products() -> Iterator[None]:
    backends: tuple[Any, ...] = ()
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9 there is the older switch alone
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    if backends and all(precision in ("none", "ieee") for precision in before):
        yield
        return
    # PyTorch has an older and a newer switch, and refuses to answer once they disagree: turn the one that was used.
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    try:
        if older is None:
            for backend in backends:
                backend.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


_IEEE = ProcessWide(_ieee_products)
