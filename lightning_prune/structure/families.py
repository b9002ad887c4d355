"""What the removal of units needs to know of an architecture, as a table: one `Family` a model type.

Every parameter is listed with what its dimensions run over, so that masks, saliency, slicing and parameter counts all
follow from the same lines. The axes are

- ``d`` hidden channels, ``f`` FFN channels, ``ff`` those of two matrices in one (gates, then what they gate),
- ``q`` rows of the query heads (heads * head_dim), ``kv`` those of the key and value heads,
- ``qkv`` queries, keys and values in one matrix, in this order, ``heads`` the three of each head together,
- ``x`` experts,
- ``-`` anything that never shrinks (vocabulary, positions, one head's dimensions, channels of experts).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

AXES = ("d", "f", "ff", "q", "kv", "qkv", "heads", "x", "-")
Norm = Literal["rmsnorm", "rmsnorm_plus_one", "layernorm"]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``config.model_type`` of transformers.
        layers: Name of the list of decoder layers.
        types: Types of units that can be removed.
        inside: Parameters of a layer, named from the layer, and their axes, one for each dimension. Names that a model
            does not have (optional biases) are no error; parameters that are not listed are.
        outside: The other parameters, named from the model.
        norms: Names of the normalizations over the hidden channels in a layer.
        final_norm: Name of the last one, named from the model.
        norm: ``"rmsnorm"``, ``"rmsnorm_plus_one"`` (multiplies with 1 + weight) or ``"layernorm"``.
        eps_field: Field of the configuration with epsilon of the RMS norms.
        head_norms: RMS norms over one head's dimensions that share this epsilon, and the projection that feeds each.
        scaled_embedding: Name of the embedding that is multiplied by ``sqrt(hidden size)``, if there is one; its
            buffer ``embed_scale`` holds the factor.
        fields: Fields of the configuration that hold a size, where they are not named as the size is.
        per_layer_fields: Fields of the configuration that hold a list with one entry a layer.
        requires: Fields of the configuration and the values the table is right for.
        heads_span_hidden: The architecture takes head_dim for hidden_size / heads, so that the two must agree.
        heads_divide_hidden: The configuration refuses hidden_size % heads != 0, although the model would run.
        saved_as: Family with the same parameters that a model is saved as where its own configuration refuses.
        layer_index_matters: Field of the configuration that makes a layer depend on its number; while it is true,
            layers cannot be removed.
    """

    model_type: str
    layers: str
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    norms: tuple[str, ...]
    final_norm: str
    norm: Norm = "rmsnorm"
    eps_field: str | None = None
    head_norms: Mapping[str, str] = field(default_factory=dict)
    scaled_embedding: str | None = None
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    per_layer_fields: tuple[str, ...] = ()
    requires: Mapping[str, Any] = field(default_factory=dict)
    heads_span_hidden: bool = False
    heads_divide_hidden: bool = False
    saved_as: str | None = None
    layer_index_matters: str | None = None
    types: tuple[str, ...] = ("attention", "ffn", "hidden", "layer")

    def __post_init__(self) -> None:
        for name, axes in {**self.inside, **self.outside}.items():
            if unknown := set(axes.split()) - set(AXES):
                raise ValueError(f"family {self.model_type!r}: {name!r} has the axes {sorted(unknown)}; use {AXES}")
        if self.norm != "layernorm" and self.eps_field is None:
            raise ValueError(f"family {self.model_type!r}: norm={self.norm!r} needs eps_field (its epsilon changes)")

    def fields_of(self, size: str) -> tuple[str, ...]:
        """Fields of the configuration that hold a size."""
        return self.fields.get(size, (size,))


# Llama and all that name their parts the same way. Which biases there are differs, and is optional anyway.
_LLAMA = Family(
    model_type="llama",
    layers="model.layers",
    inside={
        "input_layernorm.weight": "d",
        "self_attn.q_proj.weight": "q d",
        "self_attn.q_proj.bias": "q",
        "self_attn.k_proj.weight": "kv d",
        "self_attn.k_proj.bias": "kv",
        "self_attn.v_proj.weight": "kv d",
        "self_attn.v_proj.bias": "kv",
        "self_attn.o_proj.weight": "d q",
        "self_attn.o_proj.bias": "d",
        "post_attention_layernorm.weight": "d",
        "mlp.gate_proj.weight": "f d",
        "mlp.gate_proj.bias": "f",
        "mlp.up_proj.weight": "f d",
        "mlp.up_proj.bias": "f",
        "mlp.down_proj.weight": "d f",
        "mlp.down_proj.bias": "d",
    },
    outside={"model.embed_tokens.weight": "- d", "model.norm.weight": "d", "lm_head.weight": "- d"},
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="model.norm",
    eps_field="rms_norm_eps",
    per_layer_fields=("layer_types", "no_rope_layers"),
    heads_divide_hidden=True,
    saved_as="mistral",
)
_MISTRAL = replace(_LLAMA, model_type="mistral", heads_divide_hidden=False, saved_as=None)
_QWEN2 = replace(_MISTRAL, model_type="qwen2")
_SMOLLM3 = replace(_MISTRAL, model_type="smollm3")
_QWEN3 = replace(
    _MISTRAL,
    model_type="qwen3",
    inside={**_LLAMA.inside, "self_attn.q_norm.weight": "-", "self_attn.k_norm.weight": "-"},
    head_norms={"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"},
)
_GEMMA = replace(
    _MISTRAL, model_type="gemma", norm="rmsnorm_plus_one", scaled_embedding="model.embed_tokens", per_layer_fields=()
)
_GEMMA2 = replace(
    _GEMMA,
    model_type="gemma2",
    inside={
        **_LLAMA.inside,
        "pre_feedforward_layernorm.weight": "d",
        "post_feedforward_layernorm.weight": "d",
    },
    norms=(*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    per_layer_fields=("layer_types",),
    heads_divide_hidden=True,
)
_GEMMA3 = replace(
    _GEMMA2,
    model_type="gemma3_text",
    inside={**_GEMMA2.inside, "self_attn.q_norm.weight": "-", "self_attn.k_norm.weight": "-"},
    head_norms=_QWEN3.head_norms,
)
_PHI3 = replace(
    _MISTRAL,
    model_type="phi3",
    inside={
        "input_layernorm.weight": "d",
        "self_attn.qkv_proj.weight": "qkv d",
        "self_attn.o_proj.weight": "d q",
        "post_attention_layernorm.weight": "d",
        "mlp.gate_up_proj.weight": "ff d",
        "mlp.down_proj.weight": "d f",
    },
)
_GPT_NEOX = Family(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    inside={
        "input_layernorm.weight": "d",
        "input_layernorm.bias": "d",
        "attention.query_key_value.weight": "heads d",
        "attention.query_key_value.bias": "heads",
        "attention.dense.weight": "d q",
        "attention.dense.bias": "d",
        "post_attention_layernorm.weight": "d",
        "post_attention_layernorm.bias": "d",
        "mlp.dense_h_to_4h.weight": "f d",
        "mlp.dense_h_to_4h.bias": "f",
        "mlp.dense_4h_to_h.weight": "d f",
        "mlp.dense_4h_to_h.bias": "d",
    },
    outside={
        "gpt_neox.embed_in.weight": "- d",
        "gpt_neox.final_layer_norm.weight": "d",
        "gpt_neox.final_layer_norm.bias": "d",
        "lm_head.weight": "- d",
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="gpt_neox.final_layer_norm",
    norm="layernorm",
    heads_span_hidden=True,
)
_GPT2 = Family(
    model_type="gpt2",
    layers="transformer.h",
    inside={
        "ln_1.weight": "d",
        "ln_1.bias": "d",
        "attn.c_attn.weight": "d qkv",  # Conv1D: inputs first
        "attn.c_attn.bias": "qkv",
        "attn.c_proj.weight": "q d",
        "attn.c_proj.bias": "d",
        "ln_2.weight": "d",
        "ln_2.bias": "d",
        "mlp.c_fc.weight": "d f",
        "mlp.c_fc.bias": "f",
        "mlp.c_proj.weight": "f d",
        "mlp.c_proj.bias": "d",
    },
    outside={
        "transformer.wte.weight": "- d",
        "transformer.wpe.weight": "- d",
        "transformer.ln_f.weight": "d",
        "transformer.ln_f.bias": "d",
        "lm_head.weight": "- d",
    },
    norms=("ln_1", "ln_2"),
    final_norm="transformer.ln_f",
    norm="layernorm",
    fields={"intermediate_size": ("n_inner",)},
    requires={"add_cross_attention": False},
    heads_span_hidden=True,
    layer_index_matters="scale_attn_by_inverse_layer_idx",
)
_OPT = Family(
    model_type="opt",
    layers="model.decoder.layers",
    inside={
        "self_attn_layer_norm.weight": "d",
        "self_attn_layer_norm.bias": "d",
        "self_attn.q_proj.weight": "q d",
        "self_attn.q_proj.bias": "q",
        "self_attn.k_proj.weight": "kv d",
        "self_attn.k_proj.bias": "kv",
        "self_attn.v_proj.weight": "kv d",
        "self_attn.v_proj.bias": "kv",
        "self_attn.out_proj.weight": "d q",
        "self_attn.out_proj.bias": "d",
        "final_layer_norm.weight": "d",
        "final_layer_norm.bias": "d",
        "fc1.weight": "f d",
        "fc1.bias": "f",
        "fc2.weight": "d f",
        "fc2.bias": "d",
    },
    outside={
        "model.decoder.embed_tokens.weight": "- d",
        "model.decoder.embed_positions.weight": "- d",
        "model.decoder.final_layer_norm.weight": "d",
        "model.decoder.final_layer_norm.bias": "d",
        "lm_head.weight": "- d",
    },
    norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="model.decoder.final_layer_norm",
    norm="layernorm",
    fields={"intermediate_size": ("ffn_dim",), "hidden_size": ("hidden_size", "word_embed_proj_dim")},
    requires={"do_layer_norm_before": True},
    heads_span_hidden=True,
)

# Mixtures of experts. The channels of an expert stay, and so do the hidden ones.
_ATTENTION = {name: axes for name, axes in _LLAMA.inside.items() if not name.startswith("mlp.")}
_EXPERTS = {"mlp.gate.weight": "x d", "mlp.experts.gate_up_proj": "x - d", "mlp.experts.down_proj": "x d -"}
_MIXTRAL = replace(_MISTRAL, model_type="mixtral", inside={**_ATTENTION, **_EXPERTS}, types=("attention", "expert"))
_DENSE_LAYERS = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_QWEN2_MOE = replace(
    _MIXTRAL,
    model_type="qwen2_moe",
    inside={
        **_MIXTRAL.inside,
        "mlp.shared_expert.gate_proj.weight": "- d",
        "mlp.shared_expert.up_proj.weight": "- d",
        "mlp.shared_expert.down_proj.weight": "d -",
        "mlp.shared_expert_gate.weight": "- d",
    },
    requires=_DENSE_LAYERS,
)
_QWEN3_MOE = replace(
    _MIXTRAL,
    model_type="qwen3_moe",
    inside={**_MIXTRAL.inside, "self_attn.q_norm.weight": "-", "self_attn.k_norm.weight": "-"},
    head_norms=_QWEN3.head_norms,
    requires=_DENSE_LAYERS,
)
_OLMOE = replace(  # its norms are over all heads of a token at once
    _MIXTRAL,
    model_type="olmoe",
    inside={**_MIXTRAL.inside, "self_attn.q_norm.weight": "q", "self_attn.k_norm.weight": "kv"},
    types=("expert",),
)
_GPT_OSS = replace(
    _MIXTRAL,
    model_type="gpt_oss",
    inside={
        **_ATTENTION,
        "self_attn.sinks": "-",
        "mlp.router.weight": "x d",
        "mlp.router.bias": "x",
        "mlp.experts.gate_up_proj": "x d -",
        "mlp.experts.gate_up_proj_bias": "x -",
        "mlp.experts.down_proj": "x - d",
        "mlp.experts.down_proj_bias": "x d",
    },
    types=("expert",),
)

_DENSE = (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _SMOLLM3, _GEMMA, _GEMMA2, _GEMMA3, _PHI3, _GPT2, _OPT, _GPT_NEOX)
_MIXTURES = (_MIXTRAL, _QWEN2_MOE, _QWEN3_MOE, _OLMOE, _GPT_OSS)
_FAMILIES = {family.model_type: family for family in (*_DENSE, *_MIXTURES)}


def known_families() -> tuple[str, ...]:
    """Model types that can be shrunk."""
    return tuple(_FAMILIES)


def register_family(family: Family) -> None:
    """Make an architecture known; one of the same model type is replaced."""
    _FAMILIES[family.model_type] = family


def find_family(config: Any) -> Family:
    """The family of a transformers model or configuration.

    Raises:
        ValueError: it is not known, or set up in a way its table does not describe.
    """
    config = getattr(config, "config", config)
    model_type = getattr(config, "model_type", None)
    if model_type not in _FAMILIES:
        near = difflib.get_close_matches(str(model_type), _FAMILIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"no description of the architecture {model_type!r}{hint}; known are {', '.join(map(repr, _FAMILIES))}. "
            "Another one is a table of its parameters: register_family(Family(...)), see CONTRIBUTING.md, 'A family of "
            "your own'"
        )
    family = _FAMILIES[model_type]
    for name, value in family.requires.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"{model_type!r} with {name}={getattr(config, name)!r} is not described; only {name}={value!r} is"
            )
    return family
