"""Families, sizes and units: the table agrees with transformers, and bad input is refused by name."""

import pytest
import structure_models as zoo
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from tiny import packed
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from lightning_prune.structure import mask_units, permute_channels, prune_structured, remove_units
from lightning_prune.structure.families import Family, find_family, known_families, register_family
from lightning_prune.structure.sizes import (
    Sizes,
    check_types,
    goal_count,
    goal_sizes,
    unit_of_heads,
    units_to_remove,
)
from lightning_prune.structure.units import (
    check_removal,
    check_sizes,
    merge_removals,
    read_structure,
    sizes_after,
    unit_indices,
)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_parameter_count_is_that_of_a_fresh_model_of_any_sizes(name):
    structure = read_structure(zoo.make(name))
    shapes = structure.shapes()
    assert shapes.count(structure.sizes) == sum(p.numel() for p in structure.model.parameters())
    span = name in zoo.SPANNING
    sizes = Sizes(40, 19, 5 if span else 4, 5 if span else 2, 2, 8)
    fields = {"gpt2": {"n_inner": 19}, "opt": {"ffn_dim": 19, "word_embed_proj_dim": 40}}.get(
        name, {"intermediate_size": 19} if span else {"intermediate_size": 19, "num_key_value_heads": 2, "head_dim": 8}
    )
    if name == "gpt2":
        fields |= {"n_embd": 40, "n_head": 5, "n_layer": 2}
    else:
        fields |= {"hidden_size": 40, "num_attention_heads": sizes.num_attention_heads, "num_hidden_layers": 2}
    if name in ("smollm3", "gemma3_text"):
        fields |= {"layer_types": None}
    fresh = zoo.make(name, **fields)
    assert read_structure(fresh).sizes == sizes
    assert shapes.count(sizes) == sum(p.numel() for p in fresh.parameters())


@pytest.mark.parametrize("name", zoo.FAMILIES)
@pytest.mark.parametrize("unit_type", ["attention", "ffn", "hidden", "layer"])
def test_a_unit_has_the_weights_that_its_removal_saves(name, unit_type):
    structure = read_structure(zoo.make(name))
    fewer = structure.sizes.without(unit_type, 1)
    saved = structure.shapes().count(structure.sizes) - structure.shapes().count(fewer)
    # A weight of two shrinking dimensions belongs to units of both, so the saving is that of one type alone.
    assert structure.unit_weights(unit_type) * structure.places(unit_type) == saved


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("unit_type", ["attention", "ffn", "hidden"])
def test_units_are_disjoint_and_complete(name, unit_type):
    structure = read_structure(zoo.make(name))
    for slices in structure.slices(unit_type):
        for s in slices:
            assert sorted(s.indices.flatten().tolist()) == list(range(structure.lengths[s.name][s.dim]))


def test_query_heads_follow_their_group():
    # 6 heads in 3 groups, 2 dimensions each: group 1 is heads 2 and 3, rows 4 to 7; keys and values rows 2 and 3.
    sizes = Sizes(12, 5, 6, 3, 1, 2)
    group = unit_indices(sizes, "attention")
    assert group["q"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert group["kv"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert group["qkv"][1].tolist() == [4, 5, 6, 7, 12 + 2, 12 + 3, 18 + 2, 18 + 3]
    head = unit_indices(sizes, "attention", "head")
    assert head["q"].tolist() == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert "kv" not in head


def test_readers_are_the_layers_that_take_units_as_inputs():
    structure = read_structure(zoo.make("gpt2"))
    assert structure.readers("ffn") == [[f"transformer.h.{i}.mlp.c_proj"] for i in range(3)]
    assert structure.readers("attention") == [[f"transformer.h.{i}.attn.c_proj"] for i in range(3)]
    layers = [f"transformer.h.{i}.{n}" for i in range(3) for n in ("attn.c_attn", "mlp.c_fc")]
    assert structure.readers("hidden") == [[*layers, "lm_head"]]
    llama = read_structure(zoo.make("mistral")).readers("hidden")[0]
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert llama == [*(f"model.layers.{i}.{n}" for i in range(3) for n in parts), "lm_head"]


@pytest.mark.slow
def test_the_model_is_found_in_a_module_that_holds_it():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = zoo.make("llama")
            self.other = nn.Linear(2, 2)

    holder = Holder()
    structure = read_structure(holder)
    assert structure.model is holder.inner
    assert structure.prefix == "inner."
    assert read_structure(torch.compile(holder.inner)).model is holder.inner
    assert "model.norm.weight" in structure.axes
    with pytest.raises(ValueError, match="0 transformers models"):
        read_structure(nn.Linear(2, 2))
    holder.second = zoo.make("llama")
    with pytest.raises(ValueError, match=r"2 transformers models.*inner.*second"):
        read_structure(holder)


# -- refusals ----------------------------------------------------------------------------------------------------


def test_unknown_architecture_names_the_known_ones():
    model = PhiForCausalLM(
        PhiConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"'phi'.*'llama'.*'opt'.*CONTRIBUTING"):
        read_structure(model)
    assert set(known_families()) >= {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gpt2", "opt"}


def test_parameters_that_the_table_does_not_know_are_refused():
    with pytest.raises(ValueError, match=r"project_out.*not in the description"):
        read_structure(zoo.make("opt", word_embed_proj_dim=16))
    with pytest.raises(ValueError, match="do_layer_norm_before=False"):
        read_structure(zoo.make("opt", do_layer_norm_before=False))
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        read_structure(zoo.make("gpt2", add_cross_attention=True))
    adapted = get_peft_model(zoo.make("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="Merge or remove adapters"):
        read_structure(adapted)


def one_layer(layers):
    layers[1] = layers[0]


def one_parameter(layers):
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def one_module(layers):
    layers[1].mlp.up_proj = layers[1].mlp.gate_proj


def one_memory(layers):
    layers[2].mlp.up_proj.weight.data = layers[0].mlp.up_proj.weight.data


@pytest.mark.parametrize("share", [one_layer, one_parameter, one_module, one_memory])
def test_layers_that_share_a_parameter_are_refused(share):
    """Each layer loses units of its own choice, so a shared matrix would lose those of one, or of both."""
    model = zoo.make("llama")
    share(model.model.layers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"layers.* and .*layers.* are one parameter, or two in the same memory"):
        prune_structured(model, target={"intermediate_size": 20}, saliency="magnitude", compensate=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_that_are_not_alike_are_refused(layer):
    """Counts are those of the first, and the configuration has a bias for all or none."""
    model = zoo.make("llama")
    model.model.layers[layer].mlp.down_proj.bias = nn.Parameter(torch.zeros(48))
    with pytest.raises(ValueError, match=r"layers 0 and 1 of 'model\.layers' .* alone has 'mlp\.down_proj\.bias'"):
        read_structure(model)


class Linear4bit(nn.Module):
    """A layer that keeps its weight in a buffer."""

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("codes", torch.zeros(layer.weight.shape, dtype=torch.int8))


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "lm_head"])
def test_weights_that_are_not_plain_numbers_are_refused(name):
    """They would keep their sizes while the others shrink."""
    model = zoo.make("mistral")
    for change in (packed, lambda layer: model.set_submodule(name, Linear4bit(layer))):
        change(model.get_submodule(name))
        with pytest.raises(ValueError, match=f"'{name}.* (Packed|.Linear4bit.).*dequantize"):
            prune_structured(
                model, target={"hidden_size": 32}, types=("hidden",), saliency="magnitude", compensate=False
            )
        assert model.config.hidden_size == 48


def test_a_family_with_wrong_axes_is_refused():
    with pytest.raises(ValueError, match="axes"):
        Family("x", "layers", {"w": "d z"}, {}, (), "norm", eps_field="eps")
    with pytest.raises(ValueError, match="eps_field"):
        Family("x", "layers", {"w": "d f"}, {}, (), "norm")


def test_registering_replaces_and_adds():
    family = find_family(zoo.make("mistral"))
    register_family(family)
    assert find_family(zoo.make("mistral")) is family


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        ({"heads": [0]}, "unit types"),
        ({"ffn": [[0], [1]]}, "one for each of the 3 layers"),
        ({"ffn": [[0], [1], [2, 3]]}, "every layer must lose as many"),
        ({"ffn": [[0], [1], [28]]}, "0 to 27"),
        ({"ffn": [[0, 0], [1, 2], [2, 3]]}, "at most once"),
        ({"attention": [[0, 1, 2]] * 3}, "all 3 units"),
        ({"hidden": torch.arange(48)}, "all 48 units"),
        ({"layer": [0, 1, 2]}, "all 3 units"),
        ({"layer": [-1]}, "0 to 2"),
        ({"hidden": torch.arange(32) < 1}, r"'hidden'\] has bool values.*mask\.nonzero"),
        ({"ffn": [[0.5]] * 3}, r"'ffn'\] has float32 values"),
        ({"ffn": None}, r"'ffn'\]=None must be"),
        ({"hidden": "all"}, r"'hidden'\] has 'all', which are no indices"),
    ],
)
def test_removals_that_do_not_fit_are_refused(removal, message):
    with pytest.raises(ValueError, match=message):
        check_removal(read_structure(zoo.make("llama")), removal)


def test_removals_are_normalized_and_merged():
    structure = read_structure(zoo.make("llama"))
    checked = check_removal(structure, {"ffn": [[3, 1]] * 3, "hidden": [], "layer": [torch.tensor([1])]})
    assert list(checked) == ["ffn", "layer"]
    assert checked["ffn"][2].tolist() == [1, 3]
    merged = merge_removals(structure, checked, {"ffn": [[0], [2], [5]], "hidden": [4]})
    assert [t.tolist() for t in merged["ffn"]] == [[0, 1, 3], [1, 2, 3], [1, 3, 5]]
    assert merged["hidden"][0].tolist() == [4]
    with pytest.raises(ValueError, match="as many"):  # a unit named twice counts once
        merge_removals(structure, checked, {"ffn": [[1], [2], [5]]})


def test_heads_that_span_the_hidden_size_go_with_it():
    structure = read_structure(zoo.make("gpt2"))
    with pytest.raises(ValueError, match=r"remove 8 hidden channels with every head"):
        check_sizes(structure, sizes_after(structure, check_removal(structure, {"attention": [[0]] * 3})))
    both = check_removal(structure, {"attention": [[0]] * 3, "hidden": range(8)})
    check_sizes(structure, sizes_after(structure, both))


def test_a_llama_with_biases_must_stay_divisible():
    structure = read_structure(zoo.make("llama-biases"))
    with pytest.raises(ValueError, match=r"its 6 heads do not divide.*biases"):
        check_sizes(structure, sizes_after(structure, check_removal(structure, {"hidden": [0]})))
    plain = read_structure(zoo.make("llama"))
    check_sizes(plain, sizes_after(plain, check_removal(plain, {"hidden": [0]})))


# -- targets -----------------------------------------------------------------------------------------------------


def test_targets():
    structure = read_structure(zoo.make("llama"))
    sizes, shapes = structure.sizes, structure.shapes()
    total = shapes.count(sizes)
    assert goal_count(0.5, sizes, shapes) == total // 2
    assert goal_count(total - 1, sizes, shapes) == total - 1
    for bad in (0.0, 1.5, 1, total + 1, True, "half"):
        with pytest.raises(ValueError, match="target="):
            goal_count(bad, sizes, shapes)
    wanted = goal_sizes({"num_attention_heads": 4, "hidden_size": 40}, sizes)
    assert (wanted.num_attention_heads, wanted.num_key_value_heads, wanted.hidden_size) == (4, 2, 40)
    assert units_to_remove(sizes, wanted, "group") == {"attention": 1, "hidden": 8}
    assert goal_sizes({"num_key_value_heads": 1}, sizes).num_attention_heads == 2
    heads = goal_sizes({"num_attention_heads": 3, "num_key_value_heads": 3}, sizes)
    assert unit_of_heads(sizes, heads) == "head"
    assert units_to_remove(sizes, heads, "head") == {"attention": 1}
    for bad in ({"width": 3}, {"hidden_size": 49}, {"hidden_size": 0}, {"hidden_size": 4.0}):
        with pytest.raises(ValueError, match="target"):
            goal_sizes(bad, sizes)
    with pytest.raises(ValueError, match="from \\(6, 3\\) to \\(2, 2\\)"):
        goal_sizes({"num_attention_heads": 2, "num_key_value_heads": 2}, sizes)


def test_types():
    assert check_types(["hidden", "attention"]) == ("attention", "hidden")
    with pytest.raises(TypeError, match="types="):
        check_types("ffn")
    for bad in ((), ("head",)):
        with pytest.raises(ValueError, match="types="):
            check_types(bad)


def test_table_names_every_parameter_of_a_model_from_the_hub_configuration():
    """SmolLM2-135M's sizes, on the meta device."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    structure = read_structure(model)
    assert structure.shapes().count(structure.sizes) == 134_515_008


def _ragged(name):
    try:
        model = zoo.make(name, per_layer_config={1: {"intermediate_size": 20}})
    except Exception as error:
        return "per-layer attribute" not in str(error)
    return len({layer.mlp.up_proj.weight.shape for layer in model.model.layers}) > 1


@pytest.mark.parametrize("name", zoo.RMS_FAMILIES)
def test_no_class_of_a_family_reads_sizes_of_single_layers(name):
    """Why FFN sizes that differ between layers are refused; when this fails they can be supported."""
    assert not _ragged(name)


@pytest.mark.parametrize("offloaded", ["model.embed_tokens", "model.norm", "lm_head"])
def test_what_is_not_in_memory_is_refused_before_anything_changes(offloaded, tmp_path):
    model = zoo.make("mistral")
    disk_offload(model.get_submodule(offloaded), str(tmp_path), torch.device("cpu"))
    before = model(zoo.tokens()).logits
    batches = [{"input_ids": zoo.tokens()}]
    for change in (
        lambda: permute_channels(model, batches, progress=False),
        lambda: prune_structured(model, batches, 0.9, ("hidden",), progress=False),
        lambda: prune_structured(model, batches, 0.9, saliency="magnitude", progress=False),
        lambda: mask_units(model, {"hidden": [0]}),
        lambda: remove_units(model, {"hidden": [0]}),
    ):
        with pytest.raises(ValueError, match=rf"'{offloaded}.weight' has no data here.*load the whole model"):
            change()
    assert torch.equal(model(zoo.tokens()).logits, before)
