"""Which weights are pruned: the layers, their parameter names, and their view as a matrix ``(out, in)``.

Dimensions: B samples, T rows (tokens or positions) of a sample, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from lightning_prune.sharding import Layout, as_shard_of, local

DEFAULT_IGNORE = ("lm_head",)


@dataclass(frozen=True)
class LayerKind:
    """How one type of layer stores its weight and meets its inputs.

    Attributes:
        name: Name shown in messages.
        to_matrix: Weight-shaped tensor to a view or copy of shape ``(O, I)``.
        from_matrix: ``(O, I)`` and the parameter's shape to a weight-shaped tensor.
        input_rows: Layer and its input to ``(B, T, I)``, columns in the order of ``to_matrix``.
        output_rows: A tensor shaped like the layer's output to ``(B, T, O)``.
    """

    name: str
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor, torch.Size], Tensor]
    input_rows: Callable[[nn.Module, Tensor], Tensor]
    output_rows: Callable[[Tensor], Tensor]


def _rows(x: Tensor) -> Tensor:
    """``(B, ..., C)`` to ``(B, T, C)``; a 2-D input is one row a sample."""
    if x.dim() == 1:
        return x[None, None]
    return x[:, None] if x.dim() == 2 else x.flatten(1, -2)


def _conv2d_patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The patches a Conv2d multiplies with its weight, ``(B, C, H, W)`` to ``(B, T, kh*kw*C)``."""
    assert isinstance(layer, nn.Conv2d)
    x = x[None] if x.dim() == 3 else x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel = (layer.kernel_size[0], layer.kernel_size[1])
    stride = (layer.stride[0], layer.stride[1])
    dilation = (layer.dilation[0], layer.dilation[1])
    patches = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (B, C*kh*kw, T)
    b, _, t = patches.shape
    return patches.view(b, x.shape[1], -1, t).permute(0, 3, 2, 1).reshape(b, t, -1)


def _conv2d_outputs(y: Tensor) -> Tensor:
    y = y[None] if y.dim() == 3 else y
    return y.flatten(2).transpose(1, 2)


LINEAR = LayerKind(
    "Linear",
    to_matrix=lambda w: w,
    from_matrix=lambda m, _: m,
    input_rows=lambda _, x: _rows(x),
    output_rows=_rows,
)
# transformers' Conv1D (GPT-2) is a linear layer that stores its weight transposed.
CONV1D = LayerKind(
    "Conv1D",
    to_matrix=lambda w: w.t(),
    from_matrix=lambda m, _: m.t(),
    input_rows=lambda _, x: _rows(x),
    output_rows=_rows,
)
# Channels last, so that N:M groups run along the input channels, as sparse convolution kernels want them.
CONV2D = LayerKind(
    "Conv2d",
    to_matrix=lambda w: w.permute(0, 2, 3, 1).reshape(w.shape[0], w.shape[1:].numel()),
    from_matrix=lambda m, s: m.view(s[0], s[2], s[3], s[1]).permute(0, 3, 1, 2),
    input_rows=_conv2d_patches,
    output_rows=_conv2d_outputs,
)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a layer that can be pruned, or None for any other module."""
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, nn.Conv2d):
        return CONV2D
    # By name, so that the functional core needs no import of transformers.
    if type_name(module) == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    return None


def type_name(module: nn.Module) -> str:
    """Name of a module's class; of one that FSDP2 shards, by making a subclass of it, that of the original class."""
    cls = type(module)
    return (cls.__bases__[-1] if issubclass(cls, FSDPModule) and len(cls.__bases__) > 1 else cls).__name__


@dataclass(frozen=True)
class Target:
    """One weight to prune.

    Attributes:
        name: The parameter's name in the model, without the prefixes of ``torch.compile``.
        module: The layer. The weight is read from it each time: a parameter may be replaced (sharding).
        kind: How the layer stores its weight.
        modules: All layers that use this one parameter (more than one where layers are tied).

    Of a sharded parameter (DTensor), `matrix` is this rank's part; `shape` and `numel` are of the whole.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    modules: tuple[nn.Module, ...]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is now."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of the matrix."""
        size = self.weight.shape
        if self.kind is CONV1D:
            return size[1], size[0]
        return size[0], size[1:].numel()

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.weight.numel()

    @property
    def layout(self) -> Layout | None:
        """How the parameter is sharded, or None."""
        weight = self.weight
        return Layout(weight, transposed=self.kind is CONV1D) if isinstance(weight, DTensor) else None

    def matrix(self) -> Tensor:
        """The weight as ``(O, I)``, detached, in its own dtype."""
        return self.kind.to_matrix(local(self.weight.detach()))

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """A matrix, shaped as `matrix` gives it, back to the parameter's shape and layout."""
        weight = self.weight
        return as_shard_of(weight, self.kind.from_matrix(matrix, local(weight).shape).contiguous())

    def part(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape and layout as a matrix, as `matrix` gives the weight."""
        return self.kind.to_matrix(local(tensor))


def clean_name(name: str) -> str:
    """A parameter or module name without what ``torch.compile`` and checkpoint wrappers put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def name_matches(name: str, pattern: str) -> bool:
    """Whether a module name, one of its ancestors, or the tail of either matches a shell-style pattern.

    >>> name_matches("model.layers.0.mlp.up_proj", "up_proj")
    True
    >>> name_matches("model.layers.0.mlp.up_proj", "layers.0")
    True
    >>> name_matches("model.layers.10.mlp.up_proj", "layers.1")
    False
    """
    parts = name.split(".")
    return any(
        fnmatchcase(".".join(parts[start:end]), pattern) for end in range(1, len(parts) + 1) for start in range(end)
    )


def find_targets(
    model: nn.Module,
    targets: Sequence[str | type[nn.Module]] | None = None,
    ignore: Sequence[str | type[nn.Module]] = DEFAULT_IGNORE,
) -> list[Target]:
    """Find the weights to prune.

    Args:
        model: Any module.
        targets: Layer types, type names, or patterns of module names (``"q_proj"``, ``"layers.0.*"``).
            Default: every Linear, Conv1D (transformers) and Conv2d.
        ignore: The same, left out. Default: ``lm_head``. Embeddings, norms and biases are never pruned;
            of a PEFT layer only the base layer is.

    Returns:
        One entry a parameter, in the model's order; layers that share a parameter share the entry. Layers without any
        weights, such as ``Linear(16, 0)``, have none.

    Raises:
        ValueError: nothing is left to prune; a pattern matches no layer; a weight is also used by a module
            that is not a target (tied embeddings), is quantised, parametrised, or has no data (meta device).
    """
    _reject_bare_string("targets", targets)
    _reject_bare_string("ignore", ignore)
    layers = dict(_candidates(model))
    if targets is not None:
        _require_matches("targets", targets, layers)
    if tuple(ignore) != DEFAULT_IGNORE:
        _require_matches("ignore", ignore, dict(model.named_modules()))
    chosen = {
        name: module
        for name, module in layers.items()
        if not _is_empty(module)
        and (targets is None or _selected(name, module, targets))
        and not _selected(name, module, ignore)
    }
    if not chosen:
        raise ValueError(
            f"nothing to prune: targets={targets!r}, ignore={ignore!r} leave none of the "
            f"{len(layers)} Linear, Conv1D and Conv2d layers of {type(model).__name__}; "
            "widen `targets` or shorten `ignore`"
        )
    return _group_by_parameter(model, chosen)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that can be pruned, by clean name.

    Adapters beside a PEFT ``base_layer`` are passed over, and averages of the weights inside the model, which follow
    what they average.
    """
    adapters: set[nn.Module] = set()
    for parent in model.modules():
        if isinstance(parent, AveragedModel) and parent is not model:
            adapters.update(parent.modules())
        base = getattr(parent, "base_layer", None)
        if isinstance(base, nn.Module):
            inside = set(base.modules())
            adapters.update(m for m in parent.modules() if m not in inside and m is not parent)
    for name, module in model.named_modules():
        if module not in adapters and layer_kind(module) is not None:
            yield clean_name(name), module


def _is_empty(module: nn.Module) -> bool:
    """Whether a layer has no weights at all, as ``Linear(16, 0)``: nothing to prune, and no samples reach it."""
    weight = module._parameters.get("weight")
    return weight is not None and not weight.numel() and not weight.is_meta


def _reject_bare_string(argument: str, value: object) -> None:
    if isinstance(value, str):
        raise TypeError(f"{argument} must be a sequence, got the string {value!r}; write {argument}=[{value!r}]")


def _selected(name: str, module: nn.Module, selectors: Sequence[str | type[nn.Module]]) -> bool:
    return any(
        (name_matches(name, s) or type_name(module) == s) if isinstance(s, str) else isinstance(module, s)
        for s in selectors
    )


def _require_matches(argument: str, selectors: Sequence[str | type[nn.Module]], layers: dict[str, nn.Module]) -> None:
    for selector in selectors:
        if not isinstance(selector, (str, type)):
            raise TypeError(f"{argument} takes module types and name patterns, got {selector!r}")
        if not any(_selected(clean_name(name), module, [selector]) for name, module in layers.items()):
            tails = {n.rsplit(".", 1)[-1] for n in layers}
            near = difflib.get_close_matches(str(selector), tails, n=3) or sorted(tails)[:8]
            raise ValueError(f"{argument}={selector!r} matches no layer; did you mean {', '.join(map(repr, near))}?")


def _group_by_parameter(model: nn.Module, chosen: dict[str, nn.Module]) -> list[Target]:
    names = {id(p): clean_name(n) for n, p in model.named_parameters(remove_duplicate=True)}
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((clean_name(name), module))
    grouped: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in chosen.items():
        grouped.setdefault(id(_checked_weight(name, module)), []).append((name, module))

    found = []
    for key, layers in grouped.items():
        inside = {id(module) for _, module in layers}
        outside = [name for name, module in users[key] if id(module) not in inside]
        if outside:
            raise ValueError(
                f"the weight of {layers[0][0]!r} is tied to {', '.join(map(repr, outside))}, which is not a "
                f"target: pruning one would prune both; add {layers[0][0]!r} to `ignore`, or untie them"
            )
        kinds = {layer_kind(module) for _, module in layers}
        kind = kinds.pop()
        if kinds or kind is None:
            raise ValueError(f"tied layers of different types cannot be pruned: {[n for n, _ in layers]}")
        modules = tuple(module for _, module in layers)
        found.append(Target(names[key], modules[0], kind, modules))
    return found


def _checked_weight(name: str, module: nn.Module) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"the weight of {name!r} is not a plain parameter (torch.nn.utils.prune or parametrize?); "
            "make it permanent first (prune.remove, remove_parametrizations), or ignore the layer"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"the weight of {name!r} is quantised ({weight.dtype}); prune before quantising, or ignore the layer"
        )
    if weight.is_meta:
        raise ValueError(f"the weight of {name!r} has no data (meta device); load or initialise the model first")
    return weight


def block_classes(model: nn.Module) -> set[str]:
    """Names of the decoder block classes of the transformers models inside `model` (``_no_split_modules``)."""
    return {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks, in order, found by ``_no_split_modules`` of a transformers model inside `model`.

    Returns:
        Clean name and module of each block; empty if there are none. Of several stacks the longest is taken.
    """
    stacks: list[list[tuple[str, nn.Module]]] = [[]]
    classes = block_classes(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            blocks = [
                (clean_name(f"{name}.{i}"), child)
                for i, child in enumerate(module)
                if type_name(getattr(child, "_orig_mod", child)) in classes
            ]
            if blocks and len(blocks) == len(module):
                stacks.append(blocks)
    return max(stacks, key=len)
