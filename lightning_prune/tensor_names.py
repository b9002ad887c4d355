"""What the name of a tensor says of it, where there is no model to ask: pruned or not, where, and which way round.

Dimensions: O outputs, I inputs of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

# Whole name components (split at "." and "_") that mark embeddings, norms, heads and adapters.
_NOT_PRUNABLE = re.compile(
    r"(^|[._])(embed(ding)?s?|embd|emb|wte|wpe|shared|lm_head|embed_(in|out)|score|classifier|"
    r"\w*norm\d*|ln(_\w+)?|lora_\w+|rotary\w*|position\w*)([._]|$)"
)
# Families whose linear layers are transformers' Conv1D, stored (in, out).
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_NAME = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


def is_prunable(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor looks like the weight of a layer that is pruned by default.

    >>> is_prunable("model.layers.0.self_attn.q_proj.weight", (64, 64), torch.float32)
    True
    >>> is_prunable("model.embed_tokens.weight", (1000, 64), torch.float32)
    False
    """
    if len(shape) < 2 or min(shape) < 1 or not dtype.is_floating_point:
        return False
    return _NOT_PRUNABLE.search(name) is None and not name.endswith("bias")


def place(name: str) -> tuple[str, str]:
    """Block and kind of layer of a parameter; the block is empty outside of numbered ones.

    >>> place("model.layers.3.self_attn.q_proj.weight")
    ('model.layers.3', 'q_proj')
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    words = [part for part in parts if part != "weight" and not part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else "", words[-1] if words else "weight"


# Files list tensors by alphabet; tables and pictures list them in the order a token meets them.
_KINDS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "o_proj", "out_proj", "dense"),
    *("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "down_proj", "fc2", "dense_4h_to_h"),
)


def order_kinds(kinds: Iterable[str]) -> list[str]:
    """Kinds of layers without duplicates, attention before MLP where the names are known, others behind.

    >>> order_kinds(["down_proj", "q_proj", "router", "q_proj"])
    ['q_proj', 'down_proj', 'router']
    """
    return sorted(dict.fromkeys(kinds), key=lambda k: _KINDS.index(k) if k in _KINDS else len(_KINDS))


def block_order(name: str) -> tuple[bool, list[tuple[bool, int | str]]]:
    """Sort key that puts ``layers.2`` before ``layers.10`` and what is in no block last."""
    parts: list[tuple[bool, int | str]] = [(p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")]
    return name == "", parts


def as_matrix(name: str, tensor: Tensor, model_type: str | None = None) -> Tensor:
    """A tensor of any shape to ``(O, I)``, with the inputs that form N:M groups next to each other.

    Args:
        name: Its name.
        tensor: A weight, or its mask.
        model_type: Family of the transformers model: some store layers as ``(I, O)``.
    """
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if model_type in _CONV1D_FAMILIES and _CONV1D_NAME.search(name) is not None:
        return tensor.t()
    if tensor.dim() == 4:  # a Conv2d: groups run along the input channels
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
