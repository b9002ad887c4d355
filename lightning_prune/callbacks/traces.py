"""Remember the state of objects, and put it back: what code that is run on the side leaves behind."""

from __future__ import annotations

import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import IOBase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset

from lightning_prune.pruning.batches import tensors_of
from lightning_prune.sharding import is_sharded, local

_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), range, slice})
_SKIPPED_TYPES = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    weakref.ref,
    np.generic,
)
# Libraries whose objects look after themselves: a Trainer, shards of FSDP2, loaders, loggers.
_SKIPPED_PACKAGES = frozenset(
    {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_prune", "accelerate", "logging"}
)
_THREADS = frozenset({"_thread", "threading"})
_MODULE_INTERNALS = frozenset(nn.Module().__dict__)
# What is larger is a data set rather than a state: items of containers, together, and bytes of a tensor.
_MOST_ITEMS = 1_000_000
_MOST_BYTES = 2**30
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = frozenset({"__setitem__", *(f"__i{name}__" for name in _OPERATORS)})


class State:
    """The state of objects, however nested, at the time it is made.

    Containers, attributes, tensors, arrays and random generators are remembered; parameters are only gathered in
    `parameters`, since `WatchedParameters` copies those that are written to.

    Args:
        roots: The objects, by the names that they are called in messages.
        tensors: Whether to copy tensors and arrays; a data set's are many and not written to.

    Attributes:
        parameters: Parameters, tensors as large, and optimizers' states, each with the name of where it was found.
        unknown: Where there is something whose state cannot be put back, and what it is.
    """

    def __init__(self, roots: dict[str, Any], tensors: bool = True) -> None:
        self.tensors = tensors
        self.parameters: list[tuple[str, Tensor]] = []
        self.unknown: dict[str, str] = {}
        self._items = 0
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # holds the objects too, so that no other gets the id of one
        todo = [(value, name) for name, value in roots.items()]
        while todo:
            value, name = todo.pop()
            if type(value) in _ATOMS or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            todo += [(item, path) for item, path in self._remember(value, name) if type(item) not in _ATOMS]

    def put_back(self) -> None:
        """Make everything what it was."""
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _remember(self, value: Any, name: str) -> Iterable[tuple[Any, str]]:
        """Remember one object; returns what it holds."""
        if isinstance(value, nn.Module):
            return self._module(value, name)
        if isinstance(value, Tensor):
            self._tensor(value, name)
        elif isinstance(value, np.ndarray):
            return self._array(value, name)
        elif isinstance(value, (dict, list, deque, set, bytearray)):
            return self._container(value, name)
        elif isinstance(value, (tuple, frozenset)):
            return [(item, name) for item in value]
        elif (undo := _generator_state(value)) is not None:
            self._undo.append(undo)
        elif isinstance(value, _SKIPPED_TYPES):
            pass
        elif isinstance(value, Optimizer):
            return self._optimizer(value, name)
        elif isinstance(value, IOBase) or (isinstance(value, Iterator) and not _is_users(value)):
            self.unknown[name] = type(value).__name__
        elif _is_users(value) or isinstance(value, (Dataset, LRScheduler)):
            return self._object(value, name)
        return ()

    def _module(self, module: nn.Module, name: str) -> Iterable[tuple[Any, str]]:
        attributes = {k: v for k, v in vars(module).items() if k not in _MODULE_INTERNALS}

        def undo() -> None:
            now = vars(module)
            for key in [k for k in now if k not in _MODULE_INTERNALS and k not in attributes]:
                del now[key]
            now.update(attributes)

        self._undo.append(undo)
        # A first forward pass may register hooks, and note in an attribute that it has. FSDP2's does, once and for all,
        # on state dicts, and notes it where nothing is put back.
        for key, hooks in vars(module).items():
            own = key in _MODULE_INTERNALS and key.endswith("hooks") and "state_dict" not in key
            if own and isinstance(hooks, dict):
                self._container(hooks, name)
        held = [(value, f"{name}.{key}") for key, value in attributes.items()]
        for kind in (module._parameters, module._buffers):
            # FSDP2 exchanges its parameters by itself; TorchScript's cannot be exchanged, and are in no dictionary.
            sharded = any(isinstance(value, Tensor) and is_sharded(value) for value in kind.values())
            if isinstance(kind, dict) and not sharded:
                self._container(kind, name)
            held += [(value, f"{name}.{key}") for key, value in kind.items()]
        return held + [(child, f"{name}.{key}") for key, child in module.named_children()]

    def _optimizer(self, optimizer: Optimizer, name: str) -> Iterable[tuple[Any, str]]:
        """Its settings, and its states: as large as the weights, so that only what is written to is copied."""
        for tensor in tensors_of(optimizer.state):
            self._seen[id(tensor)] = tensor
            self.parameters.append((f"{name}.state", tensor))
        return [(optimizer.state, f"{name}.state"), (optimizer.param_groups, f"{name}.param_groups")]

    def _tensor(self, tensor: Tensor, name: str) -> None:
        if not self.tensors or tensor.is_meta:
            return
        plain = type(local(tensor)) is Tensor and tensor.layout == torch.strided and not tensor.is_nested
        if not plain or tensor.numel() * tensor.element_size() > _MOST_BYTES:
            self.parameters.append((name, tensor))
        else:
            held = tensor.detach()
            content = local(held).clone()

            def undo() -> None:
                if not torch.equal(local(held), content):
                    local(held).copy_(content)
                if _storage(tensor) != _storage(held):
                    tensor.data = held

            self._undo.append(undo)

    def _array(self, array: np.ndarray[Any, Any], name: str) -> Iterable[tuple[Any, str]]:
        if array.nbytes > _MOST_BYTES and self.tensors:
            self.unknown[name] = f"array of {array.nbytes / 2**30:.1f} GiB"
        elif self.tensors and array.flags.writeable:
            content = array.copy()
            self._undo.append(lambda: np.copyto(array, content))
        return [(item, name) for item in array.flat] if array.dtype == object else ()

    def _container(self, value: Any, name: str) -> Iterable[tuple[Any, str]]:
        if self._items + len(value) > _MOST_ITEMS:
            self.unknown[name] = f"more than {_MOST_ITEMS:,} items"
            return ()
        self._items += len(value)
        is_dict = isinstance(value, dict)
        content = list(value.items()) if is_dict else list(value)

        def undo() -> None:
            now = [part for item in value.items() for part in item] if is_dict else list(value)
            before = [part for item in content for part in item] if is_dict else content
            if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
                return
            # The same object, since others may hold it.
            value.clear()
            if is_dict:
                for key, item in content:  # as any subclass takes it
                    value[key] = item
            elif isinstance(value, set):
                value.update(content)
            else:
                value.extend(content)

        self._undo.append(undo)
        return [(item[1] if is_dict else item, name) for item in content]

    def _object(self, value: Any, name: str) -> Iterable[tuple[Any, str]]:
        attributes = dict(vars(value)) if hasattr(value, "__dict__") else {}
        if any(type(item).__module__ in _THREADS for item in attributes.values()):
            self.unknown[name] = type(value).__name__  # another thread may be at work in it
            return ()
        slots = _in_slots(value)

        def undo() -> None:
            if attributes or hasattr(value, "__dict__"):
                now = vars(value)
                for key in [k for k in now if k not in attributes]:
                    del now[key]
                now.update(attributes)
            for slot, item in slots.items():
                object.__setattr__(value, slot, item)

        self._undo.append(undo)
        return [(item, f"{name}.{key}") for key, item in {**attributes, **slots}.items()]


def _is_users(value: Any) -> bool:
    """Whether an object is of a class with attributes, outside the libraries that are left alone."""
    package = type(value).__module__.partition(".")[0]
    return package not in _SKIPPED_PACKAGES and (hasattr(value, "__dict__") or bool(list(_slots(type(value)))))


def attributes_of(value: Any) -> dict[str, Any]:
    """All that an object holds by name, in its dictionary or in slots."""
    return {**getattr(value, "__dict__", {}), **_in_slots(value)}


def _in_slots(value: Any) -> dict[str, Any]:
    return {slot: getattr(value, slot) for slot in _slots(type(value)) if hasattr(value, slot)}


def _slots(kind: type) -> Iterator[str]:
    for cls in kind.__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                yield f"_{cls.__name__.lstrip('_')}{name}" if private else name


def _generator_state(value: Any) -> Callable[[], None] | None:
    """What puts a random generator back; None if it is none."""
    if isinstance(value, torch.Generator):
        torch_state = value.get_state()

        def undo() -> None:
            value.set_state(torch_state)

        return undo
    if isinstance(value, random.Random):
        python_state = value.getstate()
        return lambda: value.setstate(python_state)
    if isinstance(value, np.random.RandomState):
        legacy_state = value.get_state()
        return lambda: value.set_state(legacy_state)
    bits = value.bit_generator if isinstance(value, np.random.Generator) else value
    if isinstance(bits, np.random.BitGenerator):
        numpy_state = bits.state
        return lambda: setattr(bits, "state", numpy_state)
    return None


class WatchedParameters(TorchFunctionMode):
    """Copies parameters right before they are written to for the first time.

    Args:
        parameters: Each with its name.

    Attributes:
        changed: Those that were written to, and what they were; by their ids.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.names: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in parameters:
            if pointer := _storage(parameter):
                self.names.setdefault(pointer, []).append((name, parameter))
        self.changed: dict[int, tuple[str, Tensor, Tensor, Tensor | None]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; look at what it will write to first."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        rebinds = name == "__set__" and getattr(getattr(func, "__self__", None), "__name__", "") == "data"
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if rebinds or in_place or kwargs.get("out") is not None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            # Fused steps of optimizers write to their states too.
            written = args if name.startswith("_fused_") else (first,) if rebinds or in_place else ()
            for value in (kwargs.get("out"), *written):
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(tensor, Tensor):
                        self._keep(tensor, copied=not rebinds)
        return func(*args, **kwargs)

    def put_back(self) -> None:
        """Give every parameter that was written to its values, in its own storage."""
        with torch.no_grad():
            for _, parameter, before, content in self.changed.values():
                if content is not None:
                    local(before).copy_(content)
                if _storage(parameter) != _storage(before):
                    parameter.data = before

    def _keep(self, tensor: Tensor, copied: bool) -> None:
        for name, parameter in self.names.get(_storage(tensor), ()):
            before, content = self.changed.get(id(parameter), (name, parameter, parameter.data, None))[2:]
            if copied and content is None and _storage(parameter) == _storage(before):
                content = local(before).clone()
            self.changed[id(parameter)] = (name, parameter, before, content)


def _storage(tensor: Tensor) -> int:
    """Where a tensor's numbers lie; 0 if it has none."""
    try:
        return local(tensor).untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # meta tensors, and classes of other libraries without a storage
        return 0


@contextmanager
def unchanged(roots: dict[str, Any], tensors: bool = True) -> Iterator[State]:
    """Put back the state of objects at the end, see `State`."""
    state = State(roots, tensors)
    try:
        yield state
    finally:
        state.put_back()
