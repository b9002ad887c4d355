"""The kinds of layers that can be pruned: how each stores its weight as a matrix ``(O, I)`` and meets its inputs.

Dimensions: B samples, T rows (tokens or positions) of a sample, I inputs, O outputs of a layer, G groups of a
convolution (1 of all other layers): the rows of a group meet I inputs of their own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.naming import clean_name, own_parameters
from lightning_prune.pruning.experts import expert_parameters
from lightning_prune.pruning.zeros import CONVOLUTIONS, is_plain_product
from lightning_prune.sharding import type_name


@dataclass(frozen=True)
class LayerKind:
    """How one type of layer stores its weight and meets its inputs.

    Attributes:
        name: Name shown in messages.
        transposed: Whether the parameter stores ``(I, O)``.
        to_matrix: Weight-shaped tensor to a view or copy of shape ``(O, I)``.
        from_matrix: ``(O, I)`` and the parameter's shape to a weight-shaped tensor.
        input_rows: Layer and its input to ``(B, T, G I)``, group after group, each in the order of ``to_matrix``.
        output_rows: A tensor shaped like the layer's output to ``(B, T, O)``.
    """

    name: str
    transposed: bool
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor, torch.Size], Tensor]
    input_rows: Callable[[nn.Module, Tensor], Tensor]
    output_rows: Callable[[Tensor], Tensor]


def _rows(x: Tensor) -> Tensor:
    """``(B, ..., C)`` to ``(B, T, C)``; a 2-D input is one row a sample. Samples of several lengths become one."""
    if x.is_nested:
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.unbind()])[None]
    if x.dim() == 1:
        return x[None, None]
    return x[:, None] if x.dim() == 2 else x.flatten(1, -2)


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """What a convolution adds before and after each dimension; of an odd sum the larger half comes after."""
    if layer.padding == "same":
        sums = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in sums]
    if isinstance(layer.padding, str):  # "valid"
        return [(0, 0)] * len(layer.kernel_size)
    return [(size, size) for size in layer.padding]


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The patches a convolution multiplies with its weight, ``(B, C, [[D,] H,] W)`` to ``(B, T, G*kd*kh*kw*C/G)``.

    Of the first channels alone, whole groups or a part of one, it gives theirs.
    """
    assert isinstance(layer, CONVOLUTIONS)
    size = layer.weight.dim() - 2
    x = x[None] if x.dim() == size + 1 else x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, [side for sizes in reversed(_padding(layer)) for side in sizes], mode=mode)
    for i in range(size):
        span = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        x = x.unfold(2 + i, span, layer.stride[i])[..., :: layer.dilation[i]]
    of_group = min(x.shape[1], layer.in_channels // layer.groups)
    x = torch.unflatten(x, 1, (-1, of_group))  # (B, G, C/G, places, kernel)
    places = range(3, 3 + size)
    return x.permute(0, *places, 1, *(i + size for i in places), 2).flatten(1, size).flatten(2)


def as_called(
    layer: nn.Module,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> nn.Module | None:
    """Return a stand-in for a convolution, of the geometry that its weight is used with; None of other groups."""
    assert isinstance(layer, CONVOLUTIONS)
    if groups != layer.groups:
        return None
    other, size = copy.copy(layer), weight.dim() - 2
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    vars(other).update(
        {name: value if isinstance(value, str) else _for_each(value, size) for name, value in geometry.items()},
        padding_mode="zeros",
    )
    return other


def _for_each(value: Any, size: int) -> tuple[int, ...]:
    """A number for each dimension, of one for all, alone or in a sequence."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * size if len(values) == 1 else values


def _outputs(size: int) -> Callable[[Tensor], Tensor]:
    """What makes rows of the outputs of convolutions over so many dimensions."""
    return lambda y: (y[None] if y.dim() == size + 1 else y).flatten(2).transpose(1, 2)


LINEAR = LayerKind(
    "Linear",
    transposed=False,
    to_matrix=lambda w: w,
    from_matrix=lambda m, _: m,
    input_rows=lambda _, x: _rows(x),
    output_rows=_rows,
)
# A layer of a class of its own that computes what a Linear does, such as torch_geometric's.
LINEAR_ALIKE = replace(LINEAR, name="layer like Linear")
# transformers' Conv1D (GPT-2) is a linear layer that stores its weight transposed.
CONV1D = LayerKind(
    "Conv1D",
    transposed=True,
    to_matrix=lambda w: w.t(),
    from_matrix=lambda m, _: m.t(),
    input_rows=lambda _, x: _rows(x),
    output_rows=_rows,
)
# Channels last, so that N:M groups run along the input channels, as sparse convolution kernels want them.
CONV2D = LayerKind(
    "Conv2d",
    transposed=False,
    to_matrix=lambda w: w.movedim(1, -1).reshape(w.shape[0], w.shape[1:].numel()),
    from_matrix=lambda m, s: m.view(s[0], *s[2:], s[1]).movedim(-1, 1),
    input_rows=_patches,
    output_rows=_outputs(2),
)
CONVOLUTION1D = replace(CONV2D, name="Conv1d", output_rows=_outputs(1))
CONVOLUTION3D = replace(CONV2D, name="Conv3d", output_rows=_outputs(3))

# A matrix that its module multiplies with by itself, without a layer that could be watched.
INNER = replace(LINEAR, name="inner matrix")
# One of an attention that is written out while samples run.
PROJECTION = replace(LINEAR, name="projection")
ATTENTION_MATRICES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

# One expert's slice of a 3-D parameter, `[O, I]` or `[I, O]`; all its tokens come in one list.
EXPERT = LayerKind(
    "expert",
    transposed=False,
    to_matrix=lambda w: w,
    from_matrix=lambda m, _: m,
    input_rows=lambda _, x: x[None],
    output_rows=lambda y: y[None],
)
EXPERT_TRANSPOSED = replace(EXPERT, transposed=True, to_matrix=lambda w: w.t(), from_matrix=lambda m, _: m.t())


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a layer that can be pruned, or None for any other module."""
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, nn.Conv2d):
        return CONV2D
    if isinstance(module, nn.Conv1d):
        return CONVOLUTION1D
    if isinstance(module, nn.Conv3d):
        return CONVOLUTION3D
    # By name, so that the functional core needs no import of transformers.
    if type_name(module) == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    if re.search(r"Linear|Dense", type_name(module)):
        weight = own_parameters(module).get("weight")
        lazy = weight is not None and is_lazy(weight)  # refused later, with what to do
        own = "forward" in vars(module)  # which only a trial of the module itself could tell
        return LINEAR_ALIKE if lazy or (not own and is_plain_product(module)) else None
    return None


def stored_weights(module: nn.Module) -> dict[str, LayerKind]:
    """Names of a module's own parameters that can be pruned, and how each is stored; those of adapters too."""
    if (kind := layer_kind(module)) is not None:
        # Speech models hold a Conv1d with a weight norm: it is left out, and the summary says so.
        plain = kind is not CONVOLUTION1D or "weight" in own_parameters(module)
        return {"weight": kind} if plain else {}
    if isinstance(module, nn.MultiheadAttention):
        return {name: INNER for name in ATTENTION_MATRICES if name in own_parameters(module)}
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return {name: INNER for name in own_parameters(module) if name.startswith("weight_")}
    experts = expert_parameters(module)
    return {name: EXPERT_TRANSPOSED if transposed else EXPERT for name, transposed in experts.items()}


def embeds(module: nn.Module) -> bool:
    """Return whether a module is an embedding, by its type."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    return layer_kind(module) is None and re.search(r"Embeddings?$", type_name(module)) is not None


# Under these names layers of other packages keep quantized weights.
_PACKED = ("qweight", "W_q", "weight_packed", "qzeros")


def packed_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Names and types of layers that multiply with a matrix which is no plain parameter, as quantizing makes them."""
    return [(clean_name(name), type_name(module)) for name, module in model.named_modules() if _is_packed(module)]


def _is_packed(module: nn.Module) -> bool:
    if any(key in _PACKED for key in (*own_parameters(module), *dict(module.named_buffers(recurse=False)))):
        return True
    if not re.search(r"Linear|Conv[123]?[dD]", type_name(module)) or embeds(module):
        return False
    plain = any(is_lazy(p) or (p.dim() > 1 and p.is_floating_point()) for p in module.parameters())
    return not plain and (hasattr(module, "out_features") or any(b.dim() > 1 for b in module.buffers()))
