"""Which weights are found, under which names, and what is refused."""

import warnings

import naive
import numpy as np
import pytest
import torch
import transformers as tf
from tiny import LAYERS, packed
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_prune import CalibrationError, prune
from lightning_prune.naming import clean_name, name_matches
from lightning_prune.pruning.layer_kinds import CONV1D, CONV2D, LINEAR, layer_kind
from lightning_prune.pruning.stacks import find_blocks
from lightning_prune.pruning.targets import DEFAULT_IGNORE, find_targets, select_layers

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
    for module in (nn.Embedding(3, 3), nn.LayerNorm(3), nn.ConvTranspose1d(3, 3, 1), nn.ReLU(), nn.Bilinear(2, 2, 2)):
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
        ("tower.up[0].fc", "tower.up[0]", True),
        ("tower.up0.fc", "up[0]", True),
        ("tower.up[1].fc", "up[0]", False),
    ],
)
def test_name_matches(name, pattern, matches):
    assert name_matches(name, pattern) is matches


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            "embed_tokens",
            r"'embed_tokens' matches no layer that can be pruned, only 'model\.embed_tokens' \(Embedding\)",
        ),
        (nn.Embedding, r"Embedding'> matches no layer that can be pruned, only 'model\.embed_tokens'.*did you mean"),
        ("LlamaMLP", r"only 'model\.layers\.0\.mlp' \(LlamaMLP\); 'model\.layers\.0\.mlp' takes all layers in it"),
    ],
)
def test_what_is_named_and_cannot_be_pruned_is_told_from_what_is_not_there(llama, selector, message):
    with pytest.raises(ValueError, match=message):
        find_targets(llama, targets=[selector])


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_patterns_that_match_nothing_are_refused_with_a_suggestion(llama, argument):
    with pytest.raises(ValueError, match=rf"{argument}='q_prj' matches no layer; did you mean 'q_proj'"):
        find_targets(llama, **{argument: ["q_prj"]})
    with pytest.raises(ValueError, match=rf"{argument}='unlike' matches no layer; did you mean '[a-z]\w+'"):
        find_targets(llama, **{argument: ["unlike"]})


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


def test_embeddings_that_are_tied_by_memory_alone_are_tied():
    """As ``decoder.weight.data = embedding.weight.data`` ties them: two parameters, of one memory."""
    layers = {"embedding": nn.Embedding(6, 4), "body": nn.Linear(4, 4), "decoder": nn.Linear(4, 6)}
    model = nn.ModuleDict(layers)
    layers["decoder"].weight.data = layers["embedding"].weight.data
    assert names_of(model) == ["body"]
    assert select_layers(model).left_out == {"decoder": "head"}
    with pytest.raises(ValueError, match="the weight of 'decoder' is tied to 'embedding', which is not a target"):
        find_targets(model, targets=["decoder"])
    layers["decoder"].weight.data = layers["decoder"].weight.data.clone()
    assert names_of(model) == ["body", "decoder"]


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
    expanded = nn.Linear(3, 3)
    expanded.weight = nn.Parameter(torch.ones(1, 3).expand(3, 3))
    with pytest.raises(ValueError, match="weight of '0' is an expanded tensor, whose rows or columns are the same"):
        find_targets(nn.Sequential(expanded))
    quantized = nn.Linear(3, 3)
    quantized.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight of '0' is quantized \(torch\.int8\)"):
        find_targets(nn.Sequential(quantized))
    with pytest.raises(ValueError, match="weight of '0' has no data"):
        find_targets(nn.Sequential(nn.Linear(3, 3, device="meta")))
    with pytest.raises(ValueError, match=r"weight of '0' is torch\.complex64: scores compare real numbers.*`ignore`"):
        find_targets(nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)))


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


@pytest.mark.parametrize("kind", ["RandLoraConfig", "GraloraConfig"])
def test_a_wrapper_of_peft_that_is_a_linear_itself_is_no_target(llama, kind):
    import peft

    if not hasattr(peft, kind):
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    model = peft.get_peft_model(llama, getattr(peft, kind)(r=4, target_modules=["q_proj", "down_proj"]))
    wrapper = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert isinstance(wrapper, nn.Linear)
    names = [t.name for t in find_targets(model)]
    assert len(names) == 14
    assert sum(name.endswith(".base_layer.weight") for name in names) == 4


@pytest.mark.parametrize("kind", ["HRAConfig", "HiraConfig"])
def test_an_adapter_that_computes_in_the_place_of_its_layer_is_named(llama, kind):
    import peft

    if not hasattr(peft, kind):
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    model = peft.get_peft_model(llama, getattr(peft, kind)(r=4, target_modules=["q_proj"]))
    batches = [torch.randint(0, 64, (2, 8))]
    with pytest.raises(CalibrationError, match=r"its adapter of PEFT multiplies with the weight by itself"):
        prune(model, batches, score="wanda", num_samples=2, progress=False)
    prune(model, batches, score="wanda", ignore=["q_proj"], num_samples=2, progress=False)


def test_of_layers_that_peft_saves_whole_the_copy_in_use_is_a_target(llama):
    from peft import LoraConfig, get_peft_model

    def saved(names):
        return [n.rpartition("mlp.")[2] for n in names if "layers.0" in n and "down_proj" in n]

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = get_peft_model(llama, config, adapter_name="one")
    model.add_adapter("two", config)
    assert saved(t.name for t in find_targets(model)) == ["down_proj.modules_to_save.one.weight"]
    model.set_adapter("two")
    assert saved(t.name for t in find_targets(model)) == ["down_proj.modules_to_save.two.weight"]
    batches = [torch.randint(0, 64, (2, 8))]
    masks = prune(model, batches, score="wanda", num_samples=2, progress=False)
    assert saved(masks) == ["down_proj.modules_to_save.two.weight"]


def test_base_layer_is_a_name_for_users_too():
    """Beside it are adapters where it is PEFT's, or where they are called as LoRA's are."""

    def beside(**others):
        return names_of(nn.ModuleDict({"base_layer": nn.Linear(4, 4), **others}))

    assert beside(top=nn.Linear(4, 4), side=nn.Conv1d(4, 4, 1)) == ["base_layer", "top", "side"]
    assert beside(lora_A=nn.Linear(4, 2), lora_B=nn.Linear(2, 4)) == ["base_layer"]


def test_what_makes_virtual_tokens_is_no_target(llama):
    from peft import PromptEncoderConfig, get_peft_model

    settings = PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8)
    names = names_of(llama)
    assert names_of(get_peft_model(llama, settings)) == [f"base_model.{name}" for name in names]


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


# -- what is left alone unless it is named ----------------------------------------------------------------------------


def names_of(model, *args, **kwargs):
    return [t.name.removesuffix(".weight") for t in find_targets(model, *args, **kwargs)]


def body_and(**parts):
    """Two layers, and beside them others."""
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), **parts})


BODY = ["body.0", "body.1"]


@pytest.mark.parametrize(
    "head",
    ["lm_head", "classifier", "score", "qa_outputs", "head", "logits_proj", "ctc_head", "to_logits", "mlm_head"],
)
def test_heads_are_left_alone_unless_named(head):
    model = body_and(**{head: nn.Linear(4, 2)})
    assert names_of(model) == BODY
    assert names_of(model, targets=[nn.Linear]) == BODY  # names everything, and so no head
    assert names_of(model, targets=["*"]) == BODY
    assert names_of(model, targets=[head]) == [head]
    assert names_of(model, targets=["body", head]) == [*BODY, head]
    assert names_of(model, ignore=[]) == [*BODY, head]
    assert names_of(model, ignore=[*DEFAULT_IGNORE, "body.0"]) == ["body.1"]
    assert names_of(model, ignore=["body.0"]) == ["body.1"]  # one more layer to leave is no word for the head
    assert names_of(model, targets=["body", head], ignore=["body.0"]) == ["body.1", head]
    assert names_of(model, targets=[nn.Linear], ignore=["body"]) == [head]
    with pytest.raises(ValueError, match="nothing to prune"):
        names_of(model, targets=[head], ignore=[head])


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (
            lambda c: tf.RobertaForSequenceClassification(c(tf.RobertaConfig)),
            {"classifier.dense", "classifier.out_proj"},
        ),
        (lambda c: tf.DistilBertForSequenceClassification(c(tf.DistilBertConfig)), {"classifier"}),
        (lambda c: tf.BertForQuestionAnswering(c(tf.BertConfig)), {"qa_outputs"}),
        (lambda c: tf.BertForMaskedLM(c(tf.BertConfig)), {"cls.predictions.decoder"}),
        (lambda c: tf.LlamaForSequenceClassification(c(tf.LlamaConfig, pad_token_id=0)), {"score"}),
        (lambda c: tf.ElectraForMaskedLM(c(tf.ElectraConfig)), {"generator_lm_head"}),
        (lambda c: tf.WhisperForConditionalGeneration(tf.WhisperConfig(
            vocab_size=60, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=4,
            decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=1, eos_token_id=2,
            bos_token_id=2, decoder_start_token_id=2)), {"proj_out"}),
    ],
)  # fmt: skip
def test_heads_of_transformers(make, heads):
    sizes = {
        "vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
        "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12, "embedding_size": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    model = make(lambda config, **more: config(**{k: v for k, v in sizes.items() if k in vars(config())}, **more))
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
    assert heads <= layers
    assert set(names_of(model)) == layers - heads


def test_names_of_heads_mean_something_else_inside_blocks_and_around_models(llama):
    attention = nn.ModuleDict({"score": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([attention])})
    assert names_of(model) == ["layers.0.score", "layers.0.head"]
    whole = nn.ModuleDict({"classifier": llama})
    assert names_of(whole) == [f"classifier.{name.removesuffix('.weight')}" for name in LLAMA_NAMES]


def test_heads_are_pruned_where_nothing_else_can_be():
    assert names_of(nn.ModuleDict({"join": nn.Bilinear(4, 4, 4), "head": nn.Linear(4, 4)})) == ["head"]
    tagger = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "head": nn.Linear(4, 4)})
    assert names_of(tagger) == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert [t.name for t in select_layers(tagger, called=True).targets] == ["head.weight"]
    tied = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(ValueError, match="'head' is tied to 'embedding'"):
        find_targets(tied)
    frozen = nn.ModuleDict({"body": nn.Linear(4, 4).requires_grad_(False), "head": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"nothing to prune.*frozen: 'body'; head: 'head'.*targets"):
        find_targets(frozen)


def test_frozen_layers_are_left_alone_unless_named():
    teacher = nn.ModuleDict({"up": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model = body_and(teacher=teacher.requires_grad_(False), up=nn.Linear(4, 4))
    assert names_of(model) == [*BODY, "up"]
    assert names_of(model, targets=["up"]) == ["up"]  # no word for the teacher's alone
    assert names_of(model, targets=["teacher"]) == ["teacher.up"]
    assert names_of(model, targets=["body", "teacher.*"]) == [*BODY, "teacher.up"]
    # Lower layers frozen for fine-tuning; then everything, as after loading for inference.
    model.requires_grad_(True)
    model["body"][0].requires_grad_(False)
    assert names_of(model) == ["body.1", "teacher.up", "up"]
    assert names_of(model, frozen=True) == [*BODY, "teacher.up", "up"]
    model.requires_grad_(False)
    assert names_of(model) == [*BODY, "teacher.up", "up"]


def test_the_frozen_base_of_adapters_is_pruned(llama, llama_factory):
    from peft import LoraConfig, get_peft_model

    from lightning_prune.perp import add_adapters

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama, config)
    assert len(find_targets(model)) == 14
    beside = nn.ModuleDict({"student": nn.Linear(4, 4), "teacher": model.requires_grad_(False)})
    assert names_of(beside) == ["student"]
    pruned = llama_factory()
    with torch.no_grad():
        for target in find_targets(pruned):
            target.weight[:, ::2] = 0
    without = add_adapters(pruned, adapter=None, train=("norm",))
    assert not any(t.weight.requires_grad for t in find_targets(without))
    assert [t.name for t in find_targets(without)] == LLAMA_NAMES


class Tuples(nn.Linear):
    """A linear layer as a router, which returns no tensor."""

    def forward(self, x):
        return super().forward(x), x


class TopKRouter(Tuples):
    pass


class GatedLinear(nn.Linear):
    pass


def test_routers_are_left_alone_unless_named():
    experts = nn.ModuleList([nn.Linear(4, 4)])
    moe = nn.ModuleDict({"gate": nn.Linear(4, 2), "experts": experts, "shared_expert_gate": nn.Linear(4, 1)})
    switch = nn.ModuleDict({"router": nn.ModuleDict({"classifier": nn.Linear(4, 2)}), "experts": experts})
    model = nn.ModuleList([moe, switch, TopKRouter(4, 2), GatedLinear(4, 4), nn.ModuleDict({"gate": nn.Linear(4, 4)})])
    assert names_of(model) == ["0.experts.0", "3", "4.gate"]
    assert names_of(model, targets=["shared_expert_gate", TopKRouter, "router"]) == [
        "0.shared_expert_gate", "1.router.classifier", "2",
    ]  # fmt: skip
    left = select_layers(model).left_out
    assert left == dict.fromkeys(["0.gate", "0.shared_expert_gate", "1.router.classifier", "2"], "router")


def test_attention_is_left_dense_where_it_must_be_seen_and_has_a_forward_of_its_own():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    assert names_of(model) == ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
    assert not select_layers(model, called=True).left_out
    assert len(prune(model, [torch.randn(2, 5, 8)], score="wanda", num_samples=2, progress=False)) == 4
    assert (model.self_attn.out_proj.weight == 0).sum() == 32
    forward = model.self_attn.forward
    model.self_attn.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # someone else's: it may do anything
    unseen = dict.fromkeys(["self_attn.in_proj_weight", "self_attn.out_proj"], "used functionally")
    assert select_layers(model, called=True).left_out == unseen
    before = model.self_attn.out_proj.weight.clone()
    with pytest.warns(UserWarning, match=r"self_attn\.out_proj\.weight \(1 tensor, .*\): used functionally"):
        masks = prune(model, [torch.randn(2, 5, 8)], score="wanda", num_samples=2, progress=False)
    assert list(masks) == ["linear1.weight", "linear2.weight"]
    assert torch.equal(model.self_attn.out_proj.weight, before)


class OwnParameter(nn.Parameter):
    """A plain parameter of a user's own class."""


@pytest.mark.parametrize("part", ["all", "mlp", "one"])
def test_quantized_weights_are_refused_before_calibration(llama, part):
    for name, layer in llama.named_modules():
        chosen = {"all": "_proj", "mlp": "mlp", "one": "1.mlp.up_proj"}[part]
        if isinstance(layer, nn.Linear) and chosen in name:
            packed(layer)
    with pytest.raises(ValueError, match=r"weight of '.*' is quantized \(Packed, torch.float32\)"):
        find_targets(llama)
    if part != "all":
        assert len(names_of(llama, ignore=["lm_head", "mlp"])) == 8


def test_other_forms_of_weights(llama):
    own = nn.Linear(3, 3)
    own.weight = OwnParameter(torch.randn(3, 3))
    assert names_of(nn.Sequential(own)) == ["0"]
    eight = nn.Linear(3, 3)
    eight.weight = nn.Parameter(torch.ones(3, 3).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"is quantized \(torch\.float8_e4m3fn\)"):
        find_targets(nn.Sequential(eight))
    with pytest.raises(ValueError, match="weight of '0' has no shape yet"):
        find_targets(nn.Sequential(nn.LazyLinear(3)))
    prune(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), score="magnitude", ignore=["1"])
    sparse = nn.Linear(3, 3)
    sparse.weight = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"stored as torch\.sparse_coo"):
        find_targets(nn.Sequential(sparse))
    # Packed layers of other packages are no Linear at all.
    gptq = nn.Module()
    gptq.register_buffer("qweight", torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="1 layers such as 'body' are quantized"):
        find_targets(nn.ModuleDict({"body": gptq, "lm_head": nn.Linear(3, 3)}))


def test_a_head_beside_layers_that_torch_has_quantized_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear})
    with pytest.raises(ValueError, match=r"1 layers such as 'body\.0' are quantized: prune before quantizing"):
        find_targets(nn.ModuleDict({"body": quantized, "lm_head": nn.Linear(3, 3)}))


def test_a_quantized_teacher_is_a_frozen_teacher(llama):
    for layer in llama.modules():
        if isinstance(layer, nn.Linear):
            packed(layer)
    model = body_and(teacher=llama.requires_grad_(False))
    assert names_of(model) == BODY


def test_all_layers_that_one_reason_refuses_are_named_at_once():
    def block():
        return nn.ModuleDict({"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 8, 1), "c": nn.Conv2d(8, 3, 1)})

    model = nn.Sequential(block(), block(), nn.Conv2d(8, 8, 3, groups=8))
    message = r"27 inputs of '0\.a\.weight' do not divide by 4.*one of 3 layers like this, and ignore=\['\*\.a', '2'\]"
    with pytest.raises(ValueError, match=message):
        prune(model, score="magnitude", pattern="2:4")
    assert len(prune(model, score="magnitude", pattern="2:4", ignore=["*.a", "2"])) == 4
    for name in ("0.a", "1.a", "1.b"):
        nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    message = (
        r"'0\.a' is not a plain parameter \(weight_norm.*one of 3 layers like this, and ignore=\['\*\.a', '1\.b'\]"
    )
    with pytest.raises(ValueError, match=message):
        find_targets(model)
    assert len(find_targets(model, ignore=["*.a", "1.b"])) == 4


def test_where_nothing_can_be_pruned_what_is_there_is_named():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="weights of other kinds are not pruned: 2 ConvTranspose2d"):
        find_targets(model)
