"""Say what a parameter is called: names without wrappers, patterns of names, and what a name tells of its tensor.

Dimensions: O outputs, I inputs of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that a model can be loaded, kept or written in, by what a user calls them."""

HEADS = (
    *("lm_head", "embed_out", "output_projection", "vocab_projector", "generator_lm_head", "text_lm_head"),
    *("predictions.decoder", "lm_loss", "pred_layer", "ctc_head", "seq_relationship", "sop_classifier"),
    *("classifier", "cls_classifier", "distillation_classifier", "classification_head", "class_labels_classifier"),
    *("class_predictor", "class_embed", "score", "qa_outputs", "logits_proj", "head", "mlm_head", "to_logits"),
)
"""What output layers are called in transformers, and in most models of one's own."""

_HEADS = frozenset(tuple(head.split(".")) for head in HEADS)  # of one or two parts

# What wrappers put behind the name of a layer; it says nothing of what the layer is.
_WRAPPED = frozenset({"weight", "base_layer", "original_module", "modules_to_save", "default", "parametrizations"})
# Last components of names. Not ancestors: patch_embeddings.projection and shared_expert.up_proj are layers.
_NO_MATRIX = re.compile(
    r"(\w+_)?(embed(ding)?s?|embd|emb|wte|wpe|shared|bias)|embed_(tokens|positions|in)|"
    r"\w*(pos|position)_(embed|embd|enc|bias|encoding)\w*|positions?(_ids)?|rotary\w*|(tokens|positions)_embed|"
    r"(cls|mask|class|dist|distillation|register|reg)_tokens?|\w*norm\d*|ln(_\w+)?"
)
_BIAS = re.compile(r"(\w+_)?bias(_(k|v|u|ih|hh)(_\w+)?)?")  # the ends of MultiheadAttention, Conformer and LSTM
_CORRECTION = re.compile(r"correction_bias|^expert_bias$")  # of DeepSeek and those after it
_ADAPTER = re.compile(r"(^|[._])lora_\w+([._]|$)")
# Families whose linear layers are transformers' Conv1D, stored (in, out).
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
# Families whose experts are stored (experts, in, out).
_TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"})
_EXPERTS_NAME = re.compile(r"\.experts\.(gate_up_proj|up_proj|down_proj)$")
_CONV1D_NAME = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wraps, any other as it is."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def is_compiled_alone(path: str) -> bool:
    """Whether a module is the one that ``torch.compile`` was called on, by its path in a model.

    >>> is_compiled_alone("layers.0.mlp.experts._orig_mod"), is_compiled_alone("_orig_mod.layers.0.mlp.experts")
    (True, False)
    """
    return path.endswith("._orig_mod")


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a module holds itself, by the names they have there."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def is_head(name: str) -> bool:
    """Whether a layer or tensor belongs to an output layer, by its name.

    Inside of numbered blocks these names mean something else (``layers.0.attention.score``), but for ``lm_head``; and
    what has layers of layers is a model, not its head (``classifier.encoder.layers.0.fc1``).

    >>> is_head("model.lm_head.weight"), is_head("classifier.out_proj"), is_head("layers.0.attention.score")
    (True, True, False)
    """
    parts = [part for part in name.split(".") if part not in _WRAPPED]
    if "lm_head" in parts:
        return True
    numbers = [i for i, part in enumerate(parts) if i and part.isdigit()]
    outside = parts[: numbers[0]] if numbers else parts
    ends = range(max(len(parts) - 2, 0), len(outside) + 1)
    return any(tuple(outside[end - size : end]) in _HEADS for end in ends for size in (1, 2) if end >= size)


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by the name that its module has for it.

    Of attention, recurrent layers, convolutions and experts too. What corrects a router's choice gets no gradient, and
    a table of biases by position is an embedding.

    >>> [is_bias(name) for name in ("bias", "bias_ih_l0", "in_proj_bias", "gate_up_proj_bias", "pos_bias_u")]
    [True, True, True, True, True]
    >>> is_bias("relative_position_bias_table"), is_bias("e_score_correction_bias"), is_bias("weight")
    (False, False, False)
    """
    return _BIAS.fullmatch(name) is not None and _CORRECTION.search(name) is None


def is_prunable(name: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a tensor counts as a weight that a user would prune: a matrix outside embeddings and heads.

    Convolutions, recurrent weights and the 3-D parameters of experts count too, whether they can be pruned or not:
    this is the denominator of every share of pruned weights (`inspect`, model cards, summaries of `WeightPruning`).

    >>> is_prunable("model.layers.0.self_attn.q_proj.weight", (64, 64), torch.float32)
    True
    >>> is_prunable("model.embed_tokens.weight", (1000, 64), torch.float32)
    False
    """
    if len(shape) < 2 or min(shape) < 1 or not dtype.is_floating_point or is_head(name) or _ADAPTER.search(name):
        return False
    parts = name.split(".")
    while len(parts) > 1 and parts[-1] in _WRAPPED:
        parts.pop()
    # The embedding of an image's patches is a convolution.
    return len(shape) >= 4 or _NO_MATRIX.fullmatch(parts[-1]) is None


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
    if tensor.dim() == 3 and model_type in _TRANSPOSED_EXPERTS and _EXPERTS_NAME.search(name) is not None:
        tensor = tensor.transpose(1, 2)
    if tensor.dim() == 4 or (tensor.dim() == 3 and name.endswith(".weight")):  # convolution: groups along its channels
        tensor = tensor.movedim(1, -1)
    # The number of rows is no -1: of a layer without inputs it could be any.
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)


def clean_name(name: str) -> str:
    """A parameter or module name without what ``torch.compile`` and checkpoint wrappers put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def clean_path(path: str) -> str:
    """`clean_name` of a module's path, which may itself be what a wrapper put there.

    >>> clean_path("layers.0._orig_mod.up_proj._orig_mod")
    'layers.0.up_proj'
    """
    return clean_name(f"{path}.").removesuffix(".")


def name_matches(name: str, pattern: str) -> bool:
    """Whether a module name, one of its ancestors, or the tail of either is a pattern or matches it, shell-style.

    >>> name_matches("model.layers.0.mlp.up_proj", "up_proj")
    True
    >>> name_matches("model.layers.0.mlp.up_proj", "layers.0")
    True
    >>> name_matches("model.layers.10.mlp.up_proj", "layers.1")
    False
    >>> name_matches("tower.up[0]", "up[0]")  # a key of a ModuleDict
    True
    >>> name_matches("mlp.experts.base_layer.base_layer.down_proj", "experts.down_proj")  # adapters come and go
    True
    """
    forms = [form.split(".") for form in dict.fromkeys((name, without_base_layers(name)))]
    tails = (".".join(p[start:end]) for p in forms for end in range(1, len(p) + 1) for start in range(end))
    return any(tail == pattern or fnmatchcase(tail, pattern) for tail in tails)


_PEFT_PREFIX = "base_model.model."
_IN_PEFT = re.compile(r"^(.*\.)?base_model\.model\.")
_BASE_LAYER = re.compile(r"\.base_layer(?=\.|$)")


def to_ignore(*names: str) -> str:
    """Say what goes into `ignore` for layers, and for the like of one in all blocks, which the same reason concerns.

    >>> to_ignore("backbone.layers.0.mixer.dt_proj.weight")
    "'backbone.layers.0.mixer.dt_proj' to `ignore` ('backbone.layers.*.mixer.dt_proj' for all blocks)"
    >>> to_ignore("up.weight", "down.weight")
    "'up', 'down' to `ignore`"
    >>> to_ignore("model.base_model.model.head.up.base_layer.weight")  # adapters come and go
    "'head.up' to `ignore`"
    """
    layers = [without_base_layers(_IN_PEFT.sub("", name).removesuffix(".weight")) for name in names]
    text = f"{', '.join(map(repr, layers))} to `ignore`"
    parts = layers[0].split(".")
    # A number at the end is a part of a Sequential, whose others are something else.
    pattern = ".".join("*" if part.isdigit() and part is not parts[-1] else part for part in parts)
    return text + (f" ({pattern!r} for all blocks)" if len(layers) == 1 and pattern != layers[0] else "")


def and_alike(names: Sequence[str], others: Iterable[str]) -> str:
    """Say what takes all of several layers into `ignore`; nothing of a single one.

    Args:
        names: The layers, or their weights.
        others: Those that no pattern is to match.

    >>> and_alike(["a.0.down.weight", "a.1.down.weight", "b.up.weight"], ["a.0.up.weight"])
    "; it is one of 3 layers like this, and ignore=['a.*.down', 'b.up'] takes all of them"
    """
    if len(names) < 2:
        return ""
    layers, rest = ([to_name.removesuffix(".weight") for to_name in group] for group in (names, others))
    found: dict[str, None] = {}
    for layer in layers:
        parts = layer.split(".")
        pattern = ".".join("*" if part.isdigit() and part is not parts[-1] else part for part in parts)
        if pattern in found or not any(name_matches(other, pattern) for other in rest):
            found[pattern] = None
        else:
            found[layer] = None
    return f"; it is one of {len(layers)} layers like this, and ignore={list(found)!r} takes all of them"


def is_base_of_adapter(name: str) -> bool:
    """Whether a parameter belongs to a layer that a wrapper of PEFT stands around."""
    return _BASE_LAYER.search(name) is not None


def adapter_in_its_place(name: str) -> str:
    """Say what to do about a layer whose adapter of PEFT computes in its place (HiRA, HRA); nothing of other layers."""
    if not is_base_of_adapter(name):
        return ""
    return (
        "; or its adapter of PEFT multiplies with the weight by itself: merge it first (merge_and_unload), or prune "
        "before it is put on"
    )


def without_base_layers(name: str) -> str:
    """A name without what PEFT's wrappers of layers, or several around the same one, put into it.

    >>> without_base_layers("mlp.experts.base_layer.base_layer.down_proj")
    'mlp.experts.down_proj'
    """
    return _BASE_LAYER.sub("", name)


def plain_name(name: str) -> str:
    """A parameter's or module's name without what PEFT and ``torch.compile`` put into it.

    >>> plain_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> plain_name("base_model.model.base_layers.0.weight")  # a name that PEFT did not give
    'base_layers.0.weight'
    """
    return without_base_layers(clean_name(name).removeprefix(_PEFT_PREFIX))


def has_class(value: object, name: str) -> bool:
    """Whether an object is of a class of this name, or of one made from it: for classes that are heavy to import."""
    return any(kind.__name__ == name for kind in type(value).__mro__)
