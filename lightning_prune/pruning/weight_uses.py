"""Find uses of a weight that hooks on its layer do not see, while the first batches run.

A layer's statistics are right if its weight meets its input once a call, and nowhere else. A loss that holds a penalty
on weights, `F.linear(x, layer.weight)` in another module, or a layer whose forward scales its input or output: each
would be wrong in silence. So the functions of torch that receive a weight are watched until every layer has been seen.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from lightning_prune.naming import adapter_in_its_place, is_base_of_adapter, to_ignore
from lightning_prune.pruning.experts import ExpertMatrix
from lightning_prune.pruning.offloading import is_offloaded
from lightning_prune.sharding import local, type_name

_PRODUCTS = frozenset(
    (
        *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("matmul", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "__matmul__", "__rmatmul__", "einsum"),
        *("dot", "vdot", "inner", "vecdot", "linalg_vecdot", "tensordot", "bilinear", "multi_head_attention_forward"),
    )
)
# They may be a product in steps, ``(x[:, None] * weight).sum(-1)``, or scale the weight, or be a penalty.
_ELEMENTWISE = frozenset(
    ("mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__", "neg", "__neg__")
)
# What they return is the weight, or some of it, in another form.
_SAME_VALUES = frozenset(
    (
        *("t", "transpose", "permute", "view", "reshape", "flatten", "contiguous", "clone", "cpu", "cuda"),
        *("to", "type", "type_as", "float", "double", "half", "bfloat16"),
        *("squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as", "expand", "expand_as", "movedim", "swapaxes"),
    )
)
_SOME_VALUES = frozenset(
    (
        *("__getitem__", "narrow", "select", "index_select", "unbind"),
        *("split", "split_with_sizes", "tensor_split", "chunk"),
    )
)
# PEFT adds an adapter to a parameter so (``target_parameters``), and runs the layer with the sum in its place.
_ADAPTING = frozenset(("add", "baddbmm"))
# Products that stand for a call of a layer, and their arguments.
_OF_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ARGUMENTS = {"linear": _OF_CONVOLUTION[:3], **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _OF_CONVOLUTION)}
# What they return gives the weight no gradient.
_WITHOUT_GRADIENT = frozenset(("detach", "__setitem__", "__len__", "__repr__", "__format__", "tolist", "numpy", "item"))
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_ROUNDED = 0.2  # more than quantization to four bits changes a row
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}


class LayerCall:
    """One call of a layer while it runs: its input as it enters, and what its weight made of it."""

    def __init__(self, name: str, layer: nn.Module, x: Tensor, record: Any) -> None:
        self.name, self.layer, self.x, self.record = name, layer, x, record
        self.product: Tensor | None = None
        self.version = 0
        self.instead: Tensor | None = None  # of the weight's shape, in a product while the weight was in none

    def returns_product(self, output: Tensor) -> bool:
        """Whether the layer returns what its weight made as it is."""
        product = self.product
        return product is None or (_same_memory(output, product) and product._version == self.version)


class Watched(Protocol):
    """What the watch needs of the hooks: `lightning_prune.pruning.hooks.Taps`."""

    backward: bool
    of_weights: bool
    watched: bool
    calls: list[LayerCall]
    around: dict[str, tuple[nn.Module, Callable[..., Any], Callable[..., Any]]]

    def fail(self, message: str) -> None: ...  # noqa: D102

    def run_as_layer(  # noqa: D102
        self, name: str, x: Tensor, how: dict[str, Any], product: Callable[[Tensor], Any]
    ) -> Any: ...

    def made_product(self, call: LayerCall, product: Tensor) -> None: ...  # noqa: D102


class WeightUses(TorchFunctionMode):
    """Watches where weights are used.

    A layer that is never called, since what holds it multiplies with its weight (``F.linear(x, self.qkv.weight)``, as
    the attention of Swin and BEiT does), is run as if it were called.

    Args:
        taps: The hooks, which know the layers that are running.
        layers: Names of parameters and the layers that use them, or slices of them.

    Attributes:
        called: Names of weights whose layers have been called.
        functional: Names of those that others multiply with in the place of their layers.
    """

    def __init__(self, taps: Watched, layers: Sequence[tuple[str, Sequence[nn.Module]]]) -> None:
        super().__init__()
        # They hold this too: a circle would keep their sums, large as they are, until Python looks for circles.
        self.taps, self.layers = weakref.proxy(taps), layers
        self.known: dict[int, tuple[Tensor, str]] = {}
        self.stored: dict[str, Tensor] = {}  # weights before the pass
        self.stand_ins: list[tuple[str, str, bool, bool, Tensor]] = []
        self.looked_at: set[str] = set()
        self.called: set[str] = set()
        self.functional: set[str] = set()

    def begin(self) -> None:
        """Forget the last forward pass; parameters may have been replaced since."""
        self.stand_ins = []
        self.known = {id(m.weight): (m.weight, name) for name, modules in self.layers for m in modules}  # type: ignore[misc]
        self.stored = {name: weight for weight, name in self.known.values()}

    def add(self, name: str, layer: nn.Module) -> None:
        """Know the weight that a layer is called with: a shard is another tensor while its layer runs.

        So is what ``torch.func.functional_call`` puts there; warn if these are other numbers.
        """
        weight: Any = layer.weight
        self.known[id(weight)] = weight, name
        if (stored := self.stored.get(name, weight)) is not weight and not _is_adapted(layer):
            self._look_at(name, layer, stored, weight)

    def forget(self, call: LayerCall) -> None:
        """Let go of a weight that was brought for a call which is over; warn if it was not used as it is."""
        if call.product is None and call.instead is not None:
            self._look_at(call.name, call.layer, call.layer.weight, call.instead)  # type: ignore[arg-type]
        if is_offloaded(_holder(call.layer)):
            self.known = {key: known for key, known in self.known.items() if known[1] != call.name}
        elif _is_adapted(call.layer):
            self.known.pop(id(call.layer.weight), None)  # as large as the weight itself

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function; where it is a use that hooks do not see, with a stand-in for the weight."""
        kwargs = kwargs or {}
        if (product := self._as_layer(func, args, kwargs)) is not None:
            return product
        if not self.taps.watched:
            return func(*args, **kwargs)
        call = self.taps.calls[-1] if self.taps.calls else None
        if call is not None and is_offloaded(call.layer):  # its weight has come since the layer was called
            self.add(call.name, call.layer)
        names = {self.known[id(leaf)][1] for leaf in _leaves((*args, *kwargs.values())) if id(leaf) in self.known}
        function = getattr(func, "__name__", "")
        if not names or function in _WITHOUT_GRADIENT or func == _DATA:
            if call is not None and not names and function in _PRODUCTS and call.product is None:
                shape: Any = call.layer.weight.shape
                alike = [a for a in _leaves((*args, *kwargs.values())) if isinstance(a, Tensor) and a.shape == shape]
                call.instead = next((a for a in alike if a is not call.x), call.instead)
            return func(*args, **kwargs)
        if function in _ADAPTING and all(map(is_base_of_adapter, names)):
            return func(*args, **kwargs)
        inside = call is not None and names == {call.name}
        if call is not None and inside and function in _PRODUCTS:
            return self._product(call, func, args, kwargs)
        # A layer may well multiply with its weight part by part, and put the products together.
        if function == "__get__" or function in _SAME_VALUES or (function in _SOME_VALUES and not inside):
            result = func(*args, **kwargs)
            for made in _leaves([result]):
                if isinstance(made, Tensor) and (function != "__get__" or _same_memory(made, args[0])):  # weight.T
                    self.known[id(made)] = made, min(names)
            return result
        elementwise = function in _ELEMENTWISE and not inside
        product = function in _PRODUCTS or (elementwise and self._spreads(args, kwargs))
        unseen = not self.taps.backward or not torch.is_grad_enabled()
        if unseen or (function.endswith("_") and not function.endswith("__")):
            if not self.taps.backward and product and self._with_data(args, kwargs):
                self._refuse(min(names), function)
            result = func(*args, **kwargs)
        else:
            result = func(*self._replaced(args, function, product), **self._replaced(kwargs, function, product))
        if elementwise and not product and isinstance(result, Tensor):  # a scaled weight may still meet data
            self.known[id(result)] = result, min(names)
        return result

    def enter(self, name: str, functional: bool = False) -> None:
        """Note how a layer is used that begins to run; refuse one that is used in both ways."""
        (self.functional if functional else self.called).add(name)
        if name in self.functional and name in self.called:
            self._refuse(name, "linear")

    def _as_layer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a product as a call of the layer that it stands for; None for anything else."""
        names = _ARGUMENTS.get(getattr(func, "__name__", ""))
        if names is None:
            return None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        name = self._holding(given.get("weight"))
        if name is None or name in self.called:
            return None
        if id(given.get("input")) in self.known:  # weights with each other, as penalties have them
            return None
        rest = {key: value for key, value in given.items() if key != "input"}
        return self.taps.run_as_layer(name, given["input"], rest, lambda x: func(x, **rest))

    def _holding(self, weight: Any) -> str | None:
        """The name of a weight that is as its layer holds it now; in a shard's place FSDP2 puts another meanwhile."""
        known, name = self.known.get(id(weight), (None, ""))
        if known is not None and known is self.stored.get(name):
            return name
        if not isinstance(weight, nn.Parameter):
            return None
        return next((name for name, (layer, *_) in self.taps.around.items() if layer.weight is weight), None)

    def _look_at(self, name: str, layer: nn.Module, stored: Tensor, instead: Tensor) -> None:
        """Warn of a layer that multiplies with other numbers than its weight's, as one with a scale of its own does.

        Quantization that is only pretended changes little. Where weights are compared within rows alone, rows may be
        scaled.
        """
        parts = [local(t.detach()) for t in (stored, instead)]
        apart = len({(part.shape, part.device) for part in parts}) > 1 or stored.is_meta  # a shard, or offloaded
        if name in self.looked_at or instead.dim() < 2 or apart:
            return
        self.looked_at.add(name)  # once: nobody should wait for an answer at every batch
        weight, other = (_rows(layer, part).float() for part in parts)
        norms = weight.norm(dim=1)
        factor = (weight * other).sum(1) / norms.square().clamp_min(1e-30)
        changed = (other - factor[:, None] * weight).norm(dim=1) > _ROUNDED * factor.abs() * norms
        if self.taps.backward:
            changed |= (factor - 1).abs() > _ROUNDED
        if bool(changed[norms > 0].any()):
            warnings.warn(
                f"{_layer(name)} ({type_name(_holder(layer))}) does not multiply with its weight as it is stored, and "
                f"scores compare the weight that is stored: fold the change into the weight first, or add "
                f"{to_ignore(name)}",
                stacklevel=2,
            )

    def _spreads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a weight is spread over a tensor with dimensions of its own, as those of a batch are."""
        tensors = [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, Tensor)]
        size = max(t.numel() for t in tensors if id(t) in self.known)
        shape: torch.Size = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
        return shape.numel() > size

    def _with_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a product is of a weight with data, not of weights with each other."""
        tensors = [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, Tensor)]
        # A parameter of one dimension is a bias.
        return any(t.dim() > int(isinstance(t, nn.Parameter)) and id(t) not in self.known for t in tensors)

    def _replaced(self, arguments: Any, function: str, product: bool) -> Any:
        """Arguments with a leaf in a weight's place, whose gradient tells whether the loss depends on this use."""
        if type(arguments) is dict:
            return {key: self._replaced(value, function, product) for key, value in arguments.items()}
        if type(arguments) in (list, tuple):
            return type(arguments)(self._replaced(value, function, product) for value in arguments)
        if id(arguments) not in self.known:
            return arguments
        weight, name = self.known[id(arguments)]
        stand_in = weight.detach().requires_grad_()
        inside = any(call.name == name for call in self.taps.calls)
        self.stand_ins.append((name, function, product, inside, stand_in))
        return stand_in

    def _product(self, call: LayerCall, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        matrices = [a for a in _leaves((*args, *kwargs.values())) if isinstance(a, Tensor) and a.dim() > 1]
        inputs = [a for a in matrices if id(a) not in self.known]
        plain = type(call.layer).forward in _PLAIN or type_name(call.layer) == "Conv1D"
        if call.product is not None or not isinstance(result, Tensor):
            self.taps.fail(
                f"{_layer(call.name)} multiplies its weight more than once a call; add {to_ignore(call.name)}"
            )
        elif not (plain and "forward" not in vars(call.layer)) and not any(_alike(x, call.x) for x in inputs):
            self.taps.fail(
                f"{_layer(call.name)} ({type_name(call.layer)}) multiplies its weight with something other than its "
                f"input, so its statistics cannot be told; add {to_ignore(call.name)}"
            )
        else:
            call.product, call.version = result, result._version
            self.taps.made_product(call, result)
        return result

    def check_gradients(self) -> None:
        """After backward: refuse weights whose gradient is not all in their layers."""
        for name, function, product, inside, stand_in in self.stand_ins:
            matters = self.taps.of_weights or product
            if matters and stand_in.grad is not None and bool((local(stand_in.grad) != 0).any()):
                self._refuse(name, function, inside)
        self.stand_ins = []

    def _refuse(self, name: str, function: str, inside: bool = False) -> None:
        if inside:
            self.taps.fail(
                f"{_layer(name)} changes its weight ({function!r}: a mask, a scale?) before it multiplies with it, so "
                f"the gradient of the weight that is stored cannot be told; add {to_ignore(name)}, or choose a score "
                f"without gradients of weights (kfac, wanda, magnitude){adapter_in_its_place(name)}"
            )
            return
        self.taps.fail(
            f"the weight {name!r} is also used outside its layer's forward pass ({function!r}: a penalty on weights, "
            f"or a function such as F.linear(x, layer.weight)), which calibration cannot see; add {to_ignore(name)}, "
            "pass a loss_fn without that use, or choose a score without statistics (magnitude)"
            f"{adapter_in_its_place(name)}"
        )


def same_gradient(one: Tensor, other: Tensor) -> bool:
    """Whether two gradients agree up to rounding."""
    if one.numel() != other.numel():
        return False
    a, b = one.detach().reshape(-1).float(), other.detach().reshape(-1).float()
    tolerance = max(_TOLERANCE.get(t.dtype, 1e-4) for t in (one, other))
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _holder(layer: nn.Module) -> nn.Module:
    """The module of the model that a layer is, or stands in for."""
    holder: nn.Module = vars(layer).get("holder", (layer,))[0]
    return holder


def _is_adapted(layer: nn.Module) -> bool:
    """Whether a wrapper of PEFT adds its adapter to the weight while the layer runs (``target_parameters``)."""
    return is_parametrized(_holder(layer), layer.name if isinstance(layer, ExpertMatrix) else "weight")


def _rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as a matrix with a row an output, of experts with those of each."""
    if isinstance(layer, ExpertMatrix):
        return (weight.mT if layer.transposed else weight).flatten(0, 1)
    return weight.t() if type_name(layer) == "Conv1D" else weight.flatten(1)


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same values, in whatever shape and precision."""
    if x.numel() != y.numel():
        return False
    return _same_memory(x, y) or same_gradient(local(x), local(y))


def _same_memory(x: Tensor, y: Tensor) -> bool:
    if x is y:
        return True
    x, y = local(x), local(y)
    return x.numel() == y.numel() and x.dtype == y.dtype and x.device == y.device and x.data_ptr() == y.data_ptr()


def _leaves(arguments: Sequence[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from _leaves(argument)
        else:
            yield argument


def _layer(name: str) -> str:
    return repr(name.removesuffix(".weight"))
