"""Tiny mixture-of-experts models of transformers, and copies whose experts are written out as Linear layers."""

import copy

import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS, WORDS = 4, 64
_SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def make_moe(family: str, seed: int = 0, implementation: str = "eager") -> nn.Module:
    """A model of float64 whose experts and routers differ from each other."""
    torch.manual_seed(seed)
    two = {"num_experts_per_tok": 2, "experts_implementation": implementation}
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**_SIZES, **two, num_local_experts=EXPERTS))
    elif family == "qwen2_moe":
        shared = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SIZES, **two, **shared, num_experts=EXPERTS))
    elif family == "qwen3_moe":
        more = {"moe_intermediate_size": 12, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **two, **more, num_experts=EXPERTS))
    elif family == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**_SIZES, **two, num_experts=EXPERTS))
    elif family == "gpt_oss":
        # Full attention, and rotary embeddings without the scaling that is meant for long texts.
        plain = {"layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        model = GptOssForCausalLM(GptOssConfig(**_SIZES, **two, **plain, num_local_experts=EXPERTS))
    elif family == "llama4":
        one = {"num_experts_per_tok": 1, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1}
        model = Llama4ForCausalLM(Llama4TextConfig(**_SIZES, **one, num_local_experts=EXPERTS))
    else:
        raise ValueError(family)
    for name, parameter in model.named_parameters():
        if "experts" in name or "router" in name or ".gate.weight" in name:
            nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


class WrittenOut(nn.Module):
    """The experts of one layer as a list of Linear layers; each token goes through its own by itself."""

    def __init__(self, experts: nn.Module, transposed: bool, gate: object) -> None:
        super().__init__()
        self.gate, self.sorted = gate, type(experts).__name__.startswith("Llama4")
        self.first = nn.ModuleList(self._layers(experts, "gate_up_proj", transposed))
        self.second = nn.ModuleList(self._layers(experts, "down_proj", transposed))

    @staticmethod
    def _layers(experts: nn.Module, name: str, transposed: bool) -> list[nn.Linear]:
        layers = []
        for index, matrix in enumerate(getattr(experts, name)):
            weight = (matrix.t() if transposed else matrix).detach().clone()
            bias = getattr(experts, f"{name}_bias", None)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
            layer.weight = nn.Parameter(weight)
            if bias is not None:
                layer.bias = nn.Parameter(bias[index].detach().clone())
            layers.append(layer)
        return layers

    def expert(self, index: int, row: torch.Tensor) -> torch.Tensor:
        return self.second[index](self.gate(self.first[index](row)))

    def forward(self, hidden, index=None, weights=None):
        if self.sorted:
            stacked = hidden.view(len(self.first), -1, hidden.shape[-1])
            rows = [
                self.expert(e, row[None])[0] if bool((row != 0).any()) else torch.zeros_like(row)
                for e, states in enumerate(stacked)
                for row in states
            ]
            return torch.stack(rows)
        rows = []
        for token, (chosen, shares) in enumerate(zip(index.tolist(), weights, strict=True)):
            terms = [
                share * self.expert(e, hidden[token : token + 1])[0] for e, share in zip(chosen, shares, strict=True)
            ]
            rows.append(torch.stack(terms).sum(0))
        return torch.stack(rows)


def silu_gate(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def gpt_oss_gate(gate_up):
    """The formula of gpt-oss: interleaved, clamped at 7, with sigmoid(1.702 x)."""
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def write_out(model: nn.Module, family: str) -> nn.Module:
    """A copy of a model whose experts are Linear layers, named ``...experts.first.0`` and ``...experts.second.0``."""
    model = copy.deepcopy(model)
    transposed, gate = family in ("gpt_oss", "llama4"), gpt_oss_gate if family == "gpt_oss" else silu_gate
    for module in list(model.modules()):
        child = getattr(module, "experts", None)
        if child is not None and hasattr(child, "gate_up_proj"):
            module.experts = WrittenOut(child, transposed, gate)
    return model


def linear_of(name: str) -> str:
    """The layer of the written-out model that one expert's matrix is, by the name of the matrix."""
    return name.replace("gate_up_proj", "first").replace("down_proj", "second")
