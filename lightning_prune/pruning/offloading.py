"""Weights that accelerate keeps in main memory or on disk (`device_map`), and brings to a device for each forward pass.

A module's hook knows where its weights are kept. Here they are brought once for a while, and what has become of them
is kept in the place of what was there. A file is never overwritten: a changed weight gets a file of its own.
"""

from __future__ import annotations

import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.naming import own_parameters, to_ignore
from lightning_prune.safety import uninterrupted

Undo = Callable[[], None]


def _hook(module: nn.Module) -> Any:
    """The hook that brings a module's own weights for each forward pass; None if nothing does."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "weights_map", None) is not None:
            return each
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate runs a module, wherever its weights are."""
    return hasattr(module, "_hf_hook")


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights are kept elsewhere than where it runs."""
    return _hook(module) is not None


def device_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where a module's own tensor is when the module runs."""
    return torch.device(_hook(module).execution_device) if tensor.is_meta and is_offloaded(module) else tensor.device


@contextmanager
def at_hand(
    *modules: nn.Module, undo: Callable[[Undo], object] = lambda _: None, discard: bool = False
) -> Iterator[None]:
    """While the block runs, the own weights of modules are where they run; what it changes is kept.

    Modules whose weights are there anyway are left as they are.

    Args:
        modules: The modules, without those inside of them.
        undo: Takes what puts a changed weight back.
        discard: Let go of changes, as happens if the block fails.
    """
    brought: list[tuple[nn.Module, Any, str, Tensor, int]] = []
    hooks = [(m, hook) for m in modules if (hook := _hook(m)) is not None and hook.offload]
    if not hooks:  # most often, and for every layer: holding back Ctrl-C costs more than a small layer does
        yield
        return
    try:
        for module, hook in hooks:
            hook.offload = False
            for name, away in (*own_parameters(module).items(), *module.named_buffers(recurse=False)):
                if not away.is_meta:
                    continue
                # A copy: main memory may be where the module runs.
                here = hook.weights_map[name].to(device_of(module, away), away.dtype, copy=True)
                here = nn.Parameter(here, away.requires_grad) if isinstance(away, nn.Parameter) else here
                setattr(module, name, here)
                brought.append((module, hook, name, away, here._version))
        yield
        with uninterrupted():
            for module, hook, name, _, version in brought:
                here = getattr(module, name).detach()
                if not discard and here._version != version:
                    undo(_keep(hook.weights_map, name, here))
    finally:
        for module, _, name, away, _ in brought:
            setattr(module, name, away)
        for _, hook in hooks:
            hook.offload = True


def put_away(model: nn.Module) -> None:
    """Let go of weights that were brought for a forward pass which failed: a later change of them would be lost."""
    for module in model.modules():
        hook = _hook(module)
        if hook is not None and hook.offload and any(not p.is_meta for p in own_parameters(module).values()):
            hook.post_forward(module, None)


def _place(weights: Any, name: str) -> tuple[Any, str]:
    """The mapping that keeps a tensor (accelerate's loader, or one in memory), and its name there."""
    while hasattr(weights, "prefix"):
        weights, name = weights.dataset, weights.prefix + name
    if name in getattr(weights, "state_dict", {}):
        weights = weights.state_dict
    return weights, name


class _OwnFile:
    """A file that goes when nobody needs it any more, at the end of the process at the latest."""

    def __init__(self, folder: str, name: str, tensor: Tensor) -> None:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{name}.", suffix=".safetensors", delete=False) as file:
            self.path = file.name
        weakref.finalize(self, Path(self.path).unlink, missing_ok=True)
        save_file({name: tensor.cpu().contiguous()}, self.path)

    def __deepcopy__(self, _: Any) -> _OwnFile:
        return self  # shared with the copy of a model


def _keep(weights: Any, name: str, tensor: Tensor) -> Undo:
    """Keep a tensor in the place of another; returns what undoes it."""
    kept, name = _place(weights, name)
    new: Any = tensor.cpu()
    if hasattr(kept, "index"):
        file = _OwnFile(kept.save_folder, name, tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        new = {"safetensors_file": file.path, "weight_name": name, "dtype": dtype, "file": file}
        kept = kept.index
    old, kept[name] = kept[name], new
    return lambda: kept.__setitem__(name, old)


def _identity(weights: Any, name: str) -> tuple[Any, ...]:
    """What tells whether two tensors are kept in one place."""
    kept, name = _place(weights, name)
    if not hasattr(kept, "index"):
        return (kept[name].data_ptr(),)
    entry = kept.index[name]
    return (entry.get("safetensors_file", str(kept.save_folder)), entry.get("weight_name", name))


def check_offloaded(model: nn.Module, weights: Iterable[tuple[str, nn.Module, str]]) -> None:
    """Refuse weights that could not be kept once they are changed.

    Args:
        model: The model.
        weights: Name of each in the model, the module that holds it, and its name there.

    Raises:
        ValueError: offloaded weights that are tied, or lie in the files of a checkpoint without a folder for new ones;
            weights without data that no hook of their own module brings.
    """
    hooks = [(m, hook) for m in model.modules() if (hook := _hook(m)) is not None]
    places = Counter(_identity(hook.weights_map, name) for m, hook in hooks for name in own_parameters(m))
    for name, module, attribute in weights:
        if (hook := _hook(module)) is None:
            if getattr(module, attribute).is_meta:
                raise ValueError(f"{name!r} has no data here (meta device): load the model whole")
            continue
        if places[_identity(hook.weights_map, attribute)] > 1:
            raise ValueError(
                f"{name!r} is tied to another weight, and both are offloaded (device_map): load the model whole, or "
                f"add {to_ignore(name)}"
            )
        kept, _ = _place(hook.weights_map, attribute)
        if hasattr(kept, "index") and kept.save_folder is None:
            raise ValueError(
                f"{name!r} lies in the files of its checkpoint, which are not overwritten: load the model with "
                "offload_folder=, where pruned weights can be kept"
            )
