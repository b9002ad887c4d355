"""Which weights are found, under which names, and what is refused."""

import naive
import numpy as np
import pytest
import torch
from conftest import LAYERS
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_prune.targets import (
    CONV1D,
    CONV2D,
    LINEAR,
    clean_name,
    find_blocks,
    find_targets,
    layer_kind,
    name_matches,
)

LLAMA_NAMES = list(LAYERS)


def tiny_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def test_llama_targets_are_the_projections_in_order(llama):
    found = find_targets(llama)
    assert [t.name for t in found] == LLAMA_NAMES
    for target in found:
        assert target.weight is llama.get_parameter(target.name)
        assert target.shape == tuple(target.weight.shape)
        assert target.numel == target.weight.numel()
        assert target.kind is LINEAR
        assert target.modules == (target.module,)


def test_gpt2_targets_are_conv1d_with_a_transposed_matrix():
    model = tiny_gpt2()
    found = {t.name: t for t in find_targets(model)}
    assert len(found) == 8
    target = found["transformer.h.0.attn.c_attn.weight"]
    assert target.kind is CONV1D
    assert target.shape == (48, 16)
    assert torch.equal(target.matrix(), model.transformer.h[0].attn.c_attn.weight.t())
    assert torch.equal(target.to_parameter(target.matrix()), target.weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_matrix_runs_along_the_channels(groups):
    layer = nn.Conv2d(4, 6, (3, 2), groups=groups)
    (target,) = find_targets(nn.Sequential(layer))
    assert target.kind is CONV2D
    assert target.shape == (6, 4 // groups * 6)
    np.testing.assert_array_equal(target.matrix().double().numpy(), naive.matrix(layer, layer.weight))
    assert torch.equal(target.to_parameter(target.matrix()), target.weight)


def test_other_modules_are_no_layers():
    for module in (nn.Embedding(3, 3), nn.LayerNorm(3), nn.Conv1d(3, 3, 1), nn.ReLU(), nn.Bilinear(2, 2, 2)):
        assert layer_kind(module) is None


def test_a_bare_layer_is_a_model():
    (target,) = find_targets(nn.Linear(3, 2))
    assert target.name == "weight"


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["q_proj"], ["lm_head"], [n for n in LLAMA_NAMES if "q_proj" in n]),
        (["model.layers.1.mlp"], ["lm_head"], [n for n in LLAMA_NAMES if "layers.1.mlp" in n]),
        (["layers.0.*"], ["lm_head"], [n for n in LLAMA_NAMES if "layers.0" in n]),
        (["*_proj"], ["self_attn"], [n for n in LLAMA_NAMES if "mlp" in n]),
        ([nn.Linear], ["lm_head", "layers.0", "up_proj"], [n for n in LLAMA_NAMES if ".1." in n and "up" not in n]),
        (["Linear"], ["LlamaMLP", "lm_head"], [n for n in LLAMA_NAMES if "self_attn" in n or "mlp" in n]),
        (None, [], [*LLAMA_NAMES, "lm_head.weight"]),
        (["lm_head"], [], ["lm_head.weight"]),
    ],
)
def test_selection(llama, targets, ignore, expected):
    assert [t.name for t in find_targets(llama, targets, ignore)] == expected


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("model.layers.1.mlp.up_proj", "layers.1", True),
        ("model.layers.10.mlp.up_proj", "layers.1", False),
        ("model.layers.10.mlp.up_proj", "layers.1*", True),
        ("model.layers.1.mlp.up_proj", "up", False),
        ("model.layers.1.mlp.up_proj", "up_*", True),
        ("model.layers.1.mlp.up_proj", "model", True),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.mlp.up_proj", "MLP", False),
        ("lm_head", "head", False),
    ],
)
def test_name_matches(name, pattern, matches):
    assert name_matches(name, pattern) is matches


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_patterns_that_match_nothing_are_refused_with_a_suggestion(llama, argument):
    with pytest.raises(ValueError, match=rf"{argument}='q_prj' matches no layer; did you mean 'q_proj'"):
        find_targets(llama, **{argument: ["q_prj"]})


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_bare_strings_and_other_types_are_refused(llama, argument):
    with pytest.raises(TypeError, match=rf"{argument} must be a sequence, got the string 'q_proj'"):
        find_targets(llama, **{argument: "q_proj"})
    with pytest.raises(TypeError, match=rf"{argument} takes module types and name patterns, got 3"):
        find_targets(llama, **{argument: [3]})


def test_nothing_left_to_prune_is_refused(llama):
    with pytest.raises(ValueError, match="nothing to prune"):
        find_targets(llama, targets=["q_proj"], ignore=["self_attn"])
    with pytest.raises(ValueError, match="nothing to prune"):
        find_targets(nn.Embedding(4, 4))


def test_tied_embeddings_are_refused_unless_ignored(llama_factory):
    model = llama_factory(tie_word_embeddings=True)
    assert [t.name for t in find_targets(model)] == LLAMA_NAMES
    with pytest.raises(ValueError, match=r"'lm_head' is tied to 'model\.embed_tokens', which is not a target"):
        find_targets(model, ignore=[])


def test_tied_layers_are_one_target_under_the_first_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    found = find_targets(model)
    assert [t.name for t in found] == ["0.weight", "1.weight"]
    assert found[0].modules == (model[0], model[2])
    with pytest.raises(ValueError, match="'0' is tied to '2'"):
        find_targets(model, targets=["0", "1"])


def test_tied_layers_of_different_types_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="tied layers of different types"):
        find_targets(model)


def test_weights_that_cannot_be_pruned_are_refused():
    from torch.nn.utils import parametrizations, prune

    pruned = nn.Linear(3, 3)
    prune.random_unstructured(pruned, "weight", 0.5)
    normed = parametrizations.weight_norm(nn.Linear(3, 3))
    for layer in (pruned, normed):
        with pytest.raises(ValueError, match="weight of '0' is not a plain parameter"):
            find_targets(nn.Sequential(layer))
    quantised = nn.Linear(3, 3)
    quantised.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight of '0' is quantised \(torch\.int8\)"):
        find_targets(nn.Sequential(quantised))
    with pytest.raises(ValueError, match="weight of '0' has no data"):
        find_targets(nn.Sequential(nn.Linear(3, 3, device="meta")))


@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_compiled_models_have_clean_names(llama, part):
    model = llama
    if part == "whole":
        model = torch.compile(model, backend="eager")
    else:
        for i in range(2):
            llama.model.layers[i] = torch.compile(llama.model.layers[i], backend="eager")
    assert [t.name for t in find_targets(model)] == LLAMA_NAMES
    assert [name for name, _ in find_blocks(model)] == ["model.layers.0", "model.layers.1"]
    assert clean_name("_orig_mod.a._orig_mod.b._checkpoint_wrapped_module.weight") == "a.b.weight"


def test_only_the_base_layers_of_a_lora_model_are_targets(llama):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama, config)
    names = [t.name for t in find_targets(model)]
    assert len(names) == 14
    assert not any("lora" in name for name in names)
    assert sum(name.endswith(".base_layer.weight") for name in names) == 4
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" in names
    chosen = [t.name for t in find_targets(model, targets=["q_proj"])]
    assert chosen == [n for n in names if "q_proj" in n]


def test_targets_read_the_parameter_anew():
    model = nn.Sequential(nn.Linear(3, 3))
    (target,) = find_targets(model)
    model[0].weight = nn.Parameter(torch.zeros(3, 3))
    assert target.weight is model[0].weight
    assert not target.matrix().requires_grad


def test_find_blocks(llama):
    assert find_blocks(llama) == [("model.layers.0", llama.model.layers[0]), ("model.layers.1", llama.model.layers[1])]
    assert [name for name, _ in find_blocks(tiny_gpt2())] == ["transformer.h.0", "transformer.h.1"]
    assert find_blocks(nn.Sequential(nn.Linear(2, 2))) == []

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama

    assert [name for name, _ in find_blocks(Wrapper())] == ["model.model.layers.0", "model.model.layers.1"]
