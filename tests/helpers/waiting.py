"""Find, on a CPU, what would have the host wait for a GPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique", "_unique2")


class Waits(TorchDispatchMode):
    """Notes operations whose results the host needs: numbers, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        if name in _WAITING or any(i is not None and str(i.dtype) in ("torch.bool", "torch.uint8") for i in indices):
            self.operations.append(name)
        return func(*args, **(kwargs or {}))
