"""Tiny models of every family that can be shrunk, with no weight left at a value that hides mistakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

# Three layers, six query heads of eight dimensions in three groups, seven of everything that must not divide.
_COMMON = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 32,
    "rms_norm_eps": 0.05,  # large, so that a wrong epsilon shows
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TYPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 8, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "attention_bias": True},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma-untied": {"head_dim": 8, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {},
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
}
FAMILIES = tuple(_TYPES)
SPANNING = ("gpt2", "opt", "gpt_neox")  # heads span the hidden channels
DIVIDING = ("llama-biases", "gemma2", "gemma3_text")  # heads have to divide the hidden size
RMS_FAMILIES = tuple(name for name in FAMILIES if name not in SPANNING)

# The layers of a Llama's block that read hidden channels.
LLAMA_READERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)


def make(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode, float32; norms, biases and all else drawn at random."""
    model_type = name.partition("-")[0]
    fields = {**_COMMON, **_TYPES[name]}
    if model_type == "gpt2":
        fields = {"vocab_size": 61, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 28, "n_positions": 32}
        fields |= {"bos_token_id": 1, "eos_token_id": 2}
    elif model_type == "opt":
        fields = {
            k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "rms_norm_eps", "num_key_value_heads")
        }
        fields |= {"ffn_dim": 28, "word_embed_proj_dim": 48}
    elif model_type == "gpt_neox":
        fields = {k: v for k, v in fields.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**fields, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() > 1 else 0.5))
            if p.dim() == 1 and not model_type.startswith("gemma"):
                p.add_(0.5)
    return model


def tokens(seed: int = 3) -> Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(seed))


def layers_of(model: Any) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def exact_rms_norms(monkeypatch: Any) -> None:
    """Let the RMS norms of transformers compute in the model's own precision; they go through float32."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

    gemmas = (GemmaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm)

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight + 1 if isinstance(self, gemmas) else self.weight
        epsilon = self.eps if isinstance(self, gemmas) else self.variance_epsilon
        return weight * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm, Phi3RMSNorm, *gemmas):
        monkeypatch.setattr(norm, "forward", forward)


# -- removals ----------------------------------------------------------------------------------------------------

LAYERS = 3


def per_layer(units: int, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(units, generator=generator)[:count] for _ in range(LAYERS)]


def removals(name: str) -> dict[str, dict[str, Any]]:
    """What every family is tried with, by a word for it; 3 groups (6 for GPT-2 and OPT), 28 channels, 48 hidden."""
    spans = name in SPANNING
    attention = per_layer(6 if spans else 3, 1, 1)
    hidden = torch.randperm(48, generator=torch.Generator().manual_seed(2))
    found: dict[str, dict[str, Any]] = {
        "ffn": {"ffn": per_layer(28, 5, 3)},
        "layer": {"layer": torch.tensor([1])},
    }
    if spans:  # a head and its eight channels, or nothing
        found["attention and stem"] = {"attention": attention, "hidden": hidden[:8]}
    elif name in DIVIDING:
        found["attention"] = {"attention": attention}
        found["hidden"] = {"hidden": hidden[:6]}
    else:
        found["attention"] = {"attention": attention}
        found["hidden"] = {"hidden": hidden[:7]}
    found["all"] = {
        "ffn": per_layer(28, 9, 4),
        "layer": torch.tensor([0]),
        "attention": attention,
        "hidden": hidden[:8],
    }
    return found


CASES = [(name, which) for name in FAMILIES for which in removals(name)]
