"""Tiny models and their data, for all tests."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# A Llama for CausalLM(config=...), of which a training step takes no time.
TINY = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make_llama(seed: int = 0, **changes: Any) -> nn.Module:
    """A Llama of two blocks with grouped-query attention, weights large enough that nothing is nearly linear."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def make_tokens(samples: int, length: int, vocab: int = 128, seed: int = 1) -> Tensor:
    return torch.randint(vocab, (samples, length), generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module) -> dict[str, bytes]:
    """The bits of every parameter and buffer."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}


PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


BLOCKS = [[f"model.layers.{i}.{p}" for p in PROJECTIONS] for i in range(2)]


LAYERS = {f"{name}.weight": name for block in BLOCKS for name in block}


@dataclass(frozen=True)
class Reference:
    """A Llama in float64 (so that only the package's own rounding is left), its data, and naive results."""

    model: nn.Module
    ids: Tensor
    statistics: dict[str, dict[str, Any]]
    weights: dict[str, Any]


class Packed(Tensor):
    """Integers and a scale that show themselves as a float tensor, as torchao's do."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of Packed")


def packed(layer: nn.Module) -> None:
    """Quantize a layer's weight in place."""
    weight = Packed(torch.ones(layer.weight.shape, dtype=torch.int8), torch.ones(1))
    layer.weight = nn.Parameter(weight, requires_grad=False)


def clean_environment() -> dict[str, str]:
    """For processes that form a group of their own: nothing of an earlier group in this process, such as its port."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in group}
