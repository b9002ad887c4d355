"""The projections of torch's MultiheadAttention, which it multiplies with by itself: each a layer of its own.

It keeps the matrices of queries, keys and values as one parameter (or three, where keys and values have other widths),
and the output's in a Linear that is never called. So while samples run, every product passes through a module that
hooks can be put on; attention itself stays torch's.

Dimensions: B samples, T tokens, E channels of the queries, I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.pruning.forwards import forwards_replaced
from lightning_prune.safety import ProcessWide

_PARAMETERS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
OUTPUT = 3


class Projection(nn.Module):
    """One matrix of an attention as a linear layer. It is no part of the model.

    Args:
        attention: The module that multiplies with it.
        index: Queries' (0), keys' (1), values' (2) or the output's (`OUTPUT`).
    """

    def __init__(self, attention: nn.MultiheadAttention, index: int) -> None:
        super().__init__()
        # In tuples, or they would be parts of it.
        self.inside = (attention,)
        self.holder: tuple[nn.Module] = (output_layer(attention) if index == OUTPUT else attention,)
        self.index = index
        self.packed = index != OUTPUT and attention.in_proj_weight is not None
        self.name = "weight" if index == OUTPUT else "in_proj_weight" if self.packed else _PARAMETERS[index]

    @property
    def attention(self) -> nn.MultiheadAttention:
        """The module that multiplies with it."""
        return self.inside[0]

    @property
    def weight(self) -> Tensor:
        """What the matrix is, or is a part of, as it is now: gathered while a sharded model runs.

        A parameter if it is pruned; beside such ones it may be computed (parametrizations).
        """
        weight: Tensor = getattr(self.holder[0], self.name)
        return weight

    @property
    def bounds(self) -> tuple[int, int]:
        """Start and stop of its rows in the parameter."""
        size = self.attention.embed_dim
        return (self.index * size, (self.index + 1) * size) if self.packed else (0, size)

    def forward(self, x: Tensor) -> Tensor:
        """Project ``[..., I]`` to ``[..., E]``."""
        start, stop = self.bounds
        weight = self.weight.detach()[start:stop]  # frozen while statistics are collected
        if self.index == OUTPUT:
            return F.linear(x, weight, output_layer(self.attention).bias)
        bias = self.attention.in_proj_bias
        return F.linear(x, weight, None if bias is None else bias.chunk(3)[self.index])


def output_layer(attention: nn.MultiheadAttention) -> nn.Linear:
    """The layer that holds the output's matrix, which an adapter may stand around."""
    base = getattr(attention.out_proj, "base_layer", None)
    return base if isinstance(base, nn.Linear) else attention.out_proj


def can_be_written_out(attention: nn.MultiheadAttention) -> bool:
    """Whether it computes what torch's own class does."""
    return type(attention).forward is nn.MultiheadAttention.forward and "forward" not in vars(attention)


@contextmanager
def projections_written_out(projections: Iterable[Projection]) -> Iterator[None]:
    """While the block runs, the attentions that some projections belong to call each of their own as a module.

    Args:
        projections: Known from outside, to put hooks on.
    """
    known: dict[nn.MultiheadAttention, dict[int, Projection]] = {}
    for projection in projections:
        known.setdefault(projection.attention, {})[projection.index] = projection
    others: dict[nn.Module, Callable[..., Any]] = {
        attention: partial(_run, attention, [found.get(i) or Projection(attention, i) for i in range(4)])
        for attention, found in known.items()
    }
    with without_fast_path(), forwards_replaced(others):
        yield


@contextmanager
def _fast_path_off() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_FAST_PATH_OFF = ProcessWide(_fast_path_off)


def without_fast_path() -> AbstractContextManager[None]:
    """Have torch's encoders call their parts as modules, on tensors that keep their padding."""
    return _FAST_PATH_OFF.changed()


def _run(
    attention: nn.MultiheadAttention,
    projections: list[Projection],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What MultiheadAttention returns, with torch's own function between the projections.

    Args:
        attention: The module.
        projections: Its four.
        query: ``[B, T, E]``, or ``[T, B, E]`` unless `batch_first`, or ``[T, E]``.
        key: The same, with other T and I perhaps.
        value: The same.
        key_padding_mask: See `torch.nn.MultiheadAttention`, as the others.
        need_weights: Whether to return the weights.
        attn_mask: Of pairs of tokens.
        average_attn_weights: Over heads.
        is_causal: A hint.
    """
    *inputs, output = projections
    turned = attention.batch_first and query.dim() == 3
    states = [projection(x) for projection, x in zip(inputs, (query, key, value), strict=True)]
    q, k, v = (x.transpose(0, 1) if turned else x for x in states)
    # Its products change no number, but for the rounding of TF32.
    one = torch.eye(attention.embed_dim, dtype=q.dtype, device=q.device)
    mixed, weights = F.multi_head_attention_forward(
        q, k, v, attention.embed_dim, attention.num_heads, None, None, attention.bias_k, attention.bias_v,
        attention.add_zero_attn, attention.dropout, one, None, training=attention.training,
        key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
        use_separate_proj_weight=True, q_proj_weight=one, k_proj_weight=one, v_proj_weight=one,
        average_attn_weights=average_attn_weights, is_causal=is_causal,
    )  # fmt: skip
    return output(mixed.transpose(0, 1) if turned else mixed), weights
