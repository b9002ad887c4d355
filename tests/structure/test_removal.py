"""A masked unit and a removed one give the same function, for every family and type; and nothing else changes."""

import copy
import math

import pytest
import structure_models as zoo
import torch
from slow_copies import Slow
from tiny import snapshot
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lightning_prune.checkpoints.sources import load_tokenizer
from lightning_prune.structure import mask_units, read_structure, remove_units, save_plain
from lightning_prune.structure.masking import KeptChannelsNorm, gradients_left, mask_gradients, unit_masks, unmask_norms
from lightning_prune.structure.planning import make_planner
from lightning_prune.structure.units import check_removal, sizes_after


@pytest.mark.few_fast(17)
@pytest.mark.parametrize(("name", "which"), zoo.CASES)
def test_masked_is_sliced_in_float64(name, which, monkeypatch):
    zoo.exact_rms_norms(monkeypatch)
    model, removal = zoo.make(name).double(), zoo.removals(name)[which]
    dense = zoo.logits(model)
    structure = read_structure(model)
    expected = sizes_after(structure, check_removal(structure, removal))
    count = structure.shapes().count(expected)
    mask_units(model, removal)
    masked = zoo.logits(model)
    assert (masked - dense).abs().max() > 1e-3  # the units do matter
    assert remove_units(model, removal) == expected
    torch.testing.assert_close(zoo.logits(model), masked, atol=1e-9, rtol=0)
    assert read_structure(model).sizes == expected
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.few_fast(8)
@pytest.mark.parametrize(("name", "which"), zoo.CASES)
def test_removed_saved_and_loaded_is_an_ordinary_model(name, which, tmp_path):
    model, removal = zoo.make(name), zoo.removals(name)[which]
    masked = copy.deepcopy(model)
    mask_units(masked, removal)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    remove_units(model, removal)
    sliced = zoo.logits(model)
    torch.testing.assert_close(sliced, zoo.logits(masked), atol=3e-4, rtol=3e-4)
    model.save_pretrained(tmp_path)  # as anybody would, without a word to the package
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(loaded) is type(model)
    torch.testing.assert_close(zoo.logits(loaded), sliced, atol=1e-5, rtol=1e-5)
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }
    for net in (model, loaded):
        assert (net.get_output_embeddings().weight is net.get_input_embeddings().weight) == tied
    model_type = name.partition("-")[0]
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    assert loaded.config.model_type == ("mistral" if model_type == "llama" and hidden % heads else model_type)
    for field in ("vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings", "rope_parameters"):
        assert getattr(loaded.config, field, None) == getattr(model.config, field, None)
    generated = [net.generate(zoo.tokens()[:1], max_new_tokens=4, do_sample=False) for net in (model, loaded)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_removal_in_steps_is_removal_at_once(name, monkeypatch):
    """Epsilon, norms and embeddings are rescaled step after step."""
    zoo.exact_rms_norms(monkeypatch)
    at_once, in_steps = zoo.make(name).double(), zoo.make(name).double()
    attention, channels = [[5]] * 3 if name in zoo.SPANNING else [[2]] * 3, [*range(20, 28)]
    remove_units(at_once, {"attention": attention, "hidden": channels, "ffn": [[0, 27]] * 3})
    remove_units(in_steps, {"ffn": [[27]] * 3})
    if name in (*zoo.SPANNING, *zoo.DIVIDING):
        remove_units(in_steps, {"attention": attention, "hidden": channels})
    else:
        remove_units(in_steps, {"hidden": channels[:3]})
        remove_units(in_steps, {"attention": attention, "hidden": [20, 21, 22, 23, 24]})
    remove_units(in_steps, {"ffn": [[0]] * 3})
    torch.testing.assert_close(zoo.logits(in_steps), zoo.logits(at_once), atol=1e-9, rtol=0)
    for (n, p), q in zip(in_steps.named_parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=n)


def test_masks_are_zeros_written_by_hand(monkeypatch):
    """Of a Llama with grouped queries, head by head and channel by channel."""
    model = zoo.make("llama-biases", attention_dropout=0.0)
    by_hand = copy.deepcopy(model)
    attention, ffn, hidden = [[1], [0], [2]], [[3, 4], [5, 27], [0, 1]], [7, 40]
    e = 8
    with torch.no_grad():
        for layer, heads, channels in zip(by_hand.model.layers, attention, ffn, strict=True):
            for kv in heads:
                for head in (2 * kv, 2 * kv + 1):
                    layer.self_attn.q_proj.weight[head * e : (head + 1) * e] = 0
                    layer.self_attn.q_proj.bias[head * e : (head + 1) * e] = 0
                    layer.self_attn.o_proj.weight[:, head * e : (head + 1) * e] = 0
                for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                    projection.weight[kv * e : (kv + 1) * e] = 0
                    projection.bias[kv * e : (kv + 1) * e] = 0
            for f in channels:
                for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    projection.weight[f] = 0
                    projection.bias[f] = 0
                layer.mlp.down_proj.weight[:, f] = 0
            for d in hidden:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.weight[d] = 0
                for p in ("q_proj", "k_proj", "v_proj"):
                    getattr(layer.self_attn, p).weight[:, d] = 0
                for p in ("gate_proj", "up_proj"):
                    getattr(layer.mlp, p).weight[:, d] = 0
                for p in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    p.weight[d] = 0
                    p.bias[d] = 0
        for d in hidden:
            by_hand.model.embed_tokens.weight[:, d] = 0
            by_hand.model.norm.weight[d] = 0
            by_hand.lm_head.weight[:, d] = 0
    removal = {"attention": attention, "ffn": ffn, "hidden": hidden}
    masks = unit_masks(model, removal)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask_units(model, removal)
    for (name, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p, before[name] * masks.get(name, torch.ones(())))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_masked_layer_norm_is_that_of_the_kept_channels(name):
    """Also with the embedding and all else unchanged: the norm itself leaves the others out."""
    model = zoo.make(name).double()
    norm = model.transformer.ln_f if name == "gpt2" else model.model.decoder.final_layer_norm
    weight, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    mask_units(model, {"hidden": [0, 5]})
    x = torch.randn(2, 3, 48, dtype=torch.float64)
    kept = [i for i in range(48) if i not in (0, 5)]
    mean = x[..., kept].mean(-1, keepdim=True)
    variance = (x[..., kept] - mean).square().mean(-1, keepdim=True)
    expected = torch.zeros_like(x)
    expected[..., kept] = (x[..., kept] - mean) / (variance + 1e-5).sqrt() * weight[kept] + bias[kept]
    torch.testing.assert_close(norm(x), expected, atol=1e-12, rtol=0)
    assert isinstance(norm, KeptChannelsNorm)
    mask_units(model, {"hidden": [9]})  # adds to what is masked
    assert 48 - len(norm.kept_channels) == 3
    assert "kept_channels" not in "".join(model.state_dict())
    twin = copy.deepcopy(model)
    torch.testing.assert_close(zoo.logits(twin), zoo.logits(model))
    with pytest.raises(ValueError, match=r"\[0, 5\] are masked but not removed"):
        remove_units(model, {"attention": [[0]] * 3, "hidden": range(9, 17)})
    unmask_norms(model)
    assert type(norm) is nn.LayerNorm


def test_an_average_keeps_the_channels_of_a_masked_layer_norm():
    model = zoo.make("gpt2")
    average = AveragedModel(model, avg_fn=lambda old, new, count: 0.9 * old + 0.1 * new, use_buffers=True)
    for net in (model, average.module):
        mask_units(net, {"hidden": [0, 5]})
    for _ in range(3):
        average.update_parameters(model)
    torch.testing.assert_close(zoo.logits(average.module), zoo.logits(model))


@pytest.mark.parametrize("left_out", [False, True], ids=["final-norm", "no-final-norm"])
def test_channels_go_from_opt_without_weights_in_norms_or_without_the_final_norm(left_out, tmp_path):
    model = zoo.make("opt", layer_norm_elementwise_affine=False, _remove_final_layer_norm=left_out).double()
    removal = {"attention": [[0]] * 3, "hidden": range(9, 17)}
    sliced = copy.deepcopy(model)
    mask_units(model, removal)
    remove_units(sliced, removal)
    torch.testing.assert_close(zoo.logits(sliced), zoo.logits(model), atol=1e-12, rtol=0)
    save_plain(sliced, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(zoo.logits(loaded), zoo.logits(model), atol=1e-12, rtol=0)


def test_kept_channels_are_on_the_device_of_a_model_whose_norms_have_no_weights(monkeypatch):
    monkeypatch.setattr("lightning_prune.structure.masking.check_data", lambda structure: None)
    model = zoo.make("opt", layer_norm_elementwise_affine=False).to("meta")
    mask_units(model, {"hidden": [0, 5]})
    norms = [m for m in model.modules() if isinstance(m, KeptChannelsNorm)]
    assert len(norms) == 7
    assert {norm.kept_channels.device.type for norm in norms} == {"meta"}


@pytest.mark.parametrize(
    ("name", "unit"), [(name, "group") for name in zoo.FAMILIES] + [(name, "head") for name in zoo.RMS_FAMILIES]
)
def test_masked_units_stay_zero_in_training(name, unit):
    """Weight decay, momentum and all: the gradients of most units vanish as a whole; of the others they are masked."""
    model, removal = zoo.make(name), zoo.removals(name)["all"]
    if unit == "head":
        removal = {"attention": zoo.per_layer(2, 1, 1)}
    structure = read_structure(model, unit)
    checked = check_removal(structure, removal)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    masks = unit_masks(model, removal, unit)
    for step in range(4):
        if step == 2:
            mask_units(model, removal, [optimizer], unit)
        model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss.backward()
        if step >= 2:
            mask_gradients(structure, gradients_left(structure, checked))
        optimizer.step()
        optimizer.zero_grad()
    parameters = dict(model.named_parameters())
    assert all(bool((parameters[n][~mask] == 0).all()) for n, mask in masks.items())
    assert all(bool((optimizer.state[parameters[n]]["exp_avg_sq"][~mask] == 0).all()) for n, mask in masks.items())


# -- optimizers and copies ---------------------------------------------------------------------------------------


def trained(model, optimizer, steps=3, seed=0):
    for step in range(steps):
        ids = zoo.tokens(seed + step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1),
    "adam-amsgrad-fused": lambda p: torch.optim.Adam(p, lr=1e-4, amsgrad=True, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-4),
    "one-that-steps-another": lambda p: Slow(torch.optim.AdamW(p, lr=1e-4)),
}


@pytest.mark.few_fast(6)
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", k) for k in OPTIMIZERS] + [(n, "adamw") for n in zoo.FAMILIES if n != "llama"]
)
def test_training_goes_on_as_with_masks(name, kind):
    """Masked and sliced models take the same steps; without hidden channels to the last digits."""
    removal = {k: v for k, v in zoo.removals(name)["all"].items() if k == "ffn"}
    losses = []
    for slicing in (False, True):
        model = zoo.make(name)
        optimizer = OPTIMIZERS[kind](model.parameters())
        trained(model, optimizer)
        mask_units(model, removal, [optimizer])
        if slicing:
            remove_units(model, removal, [optimizer])
        trained(model, optimizer, seed=10)
        losses.append(model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_states_are_those_of_the_sliced_model(name, monkeypatch):
    """Adam's states after slicing are what the sliced model's own gradients would have made them."""
    zoo.exact_rms_norms(monkeypatch)
    removal = zoo.removals(name)["all"]
    masked = zoo.make(name).double()
    mask_units(masked, removal)
    sliced = copy.deepcopy(masked)
    remove_units(sliced, removal)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.0) for m in (masked, sliced)]
    for model, optimizer in zip((masked, sliced), optimizers, strict=True):
        trained(model.train(), optimizer) if name not in zoo.SPANNING else trained(model, optimizer)
    remove_units(masked, removal, optimizers[:1])
    groups = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    assert [p.shape for p in groups[0]] == [p.shape for p in groups[1]]
    assert len(optimizers[0].state) == len(optimizers[1].state)
    for p, q in zip(*groups, strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-9)
        for key, value in optimizers[1].state[q].items():
            torch.testing.assert_close(optimizers[0].state[p][key], value, atol=1e-12, rtol=1e-7, msg=key)


def test_parameters_keep_identity_and_lose_gradients():
    model = zoo.make("qwen3")
    before = {n: id(p) for n, p in model.named_parameters()}
    model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss.backward()
    remove_units(model, zoo.removals("qwen3")["hidden"])
    assert {n: id(p) for n, p in model.named_parameters()} == before
    sliced = [p for p in model.parameters() if p.grad is not None]
    assert all(p.grad.shape == p.shape for p in sliced)
    model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss.backward()


def test_a_removed_layer_leaves_the_optimizer():
    model = zoo.make("smollm3")
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}])
    trained(model, optimizer)
    remove_units(model, {"layer": [1]}, [optimizer])
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert set(map(id, optimizer.state)) == {id(p) for p in model.parameters()}
    assert model.config.no_rope_layers == [1, 1]  # those of layers 0 and 2
    assert len(model.config.layer_types) == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    trained(model, optimizer)


# -- the rest ----------------------------------------------------------------------------------------------------


def test_an_optimizer_of_named_parameters_names_those_that_are_left():
    module = nn.ModuleDict({"inner": zoo.make("llama"), "other": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(module.named_parameters())
    remove_units(module, {"layer": [0]}, [optimizer])
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(module.named_parameters())


def test_epsilon_and_weights_of_rms_norms():
    model = zoo.make("llama")
    weight = model.model.norm.weight.detach().clone()
    remove_units(model, {"hidden": range(12)})
    assert model.config.rms_norm_eps == pytest.approx(0.05 * 48 / 36)
    assert model.model.layers[0].input_layernorm.variance_epsilon == model.config.rms_norm_eps
    torch.testing.assert_close(model.model.norm.weight.detach(), weight[12:] * math.sqrt(48 / 36))


def test_one_query_head_of_every_group(tmp_path):
    model = zoo.make("qwen2")
    masked = copy.deepcopy(model)
    removal = {"attention": [[1], [0], [1]]}
    mask_units(masked, removal, attention_unit="head")
    remove_units(model, removal, attention_unit="head")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (3, 3)
    torch.testing.assert_close(zoo.logits(model), zoo.logits(masked), atol=1e-4, rtol=1e-4)
    save_plain(model, tmp_path)
    torch.testing.assert_close(zoo.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), zoo.logits(model))
    assert read_structure(model, "head").units("attention") == 1  # which stays
    with pytest.raises(ValueError, match="at least one must stay"):
        remove_units(model, {"attention": [[0], [0], [0]]}, attention_unit="head")
    with pytest.raises(ValueError, match="attention_unit"):
        read_structure(model, "pair")


@pytest.mark.parametrize("kind", ["adafactor", "unknown"])
def test_optimizers_that_cannot_be_sliced_are_refused_before_anything_changes(kind):
    model = zoo.make("llama")
    if kind == "adafactor":
        optimizer = torch.optim.Adafactor(model.parameters())
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained(model, optimizer, steps=1)
    if kind == "unknown":
        optimizer.state[model.model.norm.weight]["curvature"] = torch.ones(48)
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(ValueError, match=r"Adafactor keeps the state|'curvature'"):
        remove_units(model, {"hidden": [1], "ffn": [[0]] * 3}, [optimizer])
    assert snapshot(model) == before
    assert model.config.to_dict() == config


@pytest.mark.parametrize("removal", [{"attention": [[0]] * 3}, {"hidden": [1]}, {"ffn": [[99]] * 3}])
def test_a_refused_removal_changes_nothing(removal):
    model = zoo.make("gpt2")
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(ValueError, match=r"gpt2|removal"):
        remove_units(model, removal)
    assert snapshot(model) == before
    assert model.config.to_dict() == config


def test_layer_norms_without_weights_take_the_channels_that_stay():
    model = zoo.make("opt", layer_norm_elementwise_affine=False)
    removal = zoo.removals("opt")["attention and stem"]
    masked = copy.deepcopy(model)
    mask_units(masked, removal)
    remove_units(model, removal)
    torch.testing.assert_close(zoo.logits(model), zoo.logits(masked), rtol=1e-4, atol=1e-4)


def test_sizes_that_a_configuration_refuses_are_refused_before_anything_changes(tmp_path):
    # Phi-3's wants as many factors of its rotary embeddings as hidden_size / heads says.
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_type": "longrope", "rope_theta": 1e4}
    model = zoo.make("phi3", rope_parameters={**factors, "original_max_position_embeddings": 32})
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    attention = zoo.removals("phi3")["attention"]
    for removal in (attention, {"hidden": [3]}):
        with pytest.raises(ValueError, match=r"'phi3' cannot be saved with the sizes .*short_factor field must have"):
            remove_units(model, removal)
    with pytest.raises(ValueError, match="'phi3' cannot be saved"):  # whatever the sizes in between
        make_planner(read_structure(model), 0.9, ("attention",))
    assert model.config.to_dict() == config
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    remove_units(model, {**attention, "hidden": range(16)})  # two heads, and their share of the channels
    save_plain(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(zoo.logits(loaded), zoo.logits(model))


def test_layers_that_depend_on_their_number_stay():
    model = zoo.make("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        remove_units(model, {"layer": [1]})


def test_a_llama_is_another_class_only_while_its_heads_do_not_divide(tmp_path):
    model, own = zoo.make("llama"), zoo.make("llama")
    parameters, classes = list(model.parameters()), {type(m) for m in own.modules()}
    before = zoo.logits(model)
    remove_units(model, {"ffn": [[1]] * 3})
    assert {type(m) for m in model.modules()} == classes
    masked = copy.deepcopy(model)
    mask_units(masked, {"hidden": [1]})
    remove_units(model, {"hidden": [1]})
    assert model.config.model_type == "mistral"
    assert model.config.sliding_window is None
    assert not any(type(m).__name__.startswith("Llama") for m in model.modules())
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    torch.testing.assert_close(zoo.logits(model), zoo.logits(masked), atol=3e-4, rtol=3e-4)
    copied = copy.deepcopy(model)
    for net in (model, copied):
        remove_units(net, {"hidden": [0, 1, 2, 3, 4]})  # 42 channels, which six heads divide
        assert {type(m) for m in net.modules()} == classes
        assert net.config.model_type == "llama"
    assert torch.equal(zoo.logits(copied), zoo.logits(model))
    assert before.shape == zoo.logits(model).shape


def test_rotations_that_depend_on_the_heads_dimensions_go_along_to_another_class(tmp_path):
    rotation = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = zoo.make("llama", rope_parameters=rotation, rope_scaling=rotation)  # before transformers 5
    masked = copy.deepcopy(model)
    mask_units(masked, {"hidden": [1]})
    remove_units(model, {"hidden": [1]})
    assert model.config.model_type == "mistral"
    save_plain(model, tmp_path)
    for net in (model, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(zoo.logits(net), zoo.logits(masked), atol=3e-4, rtol=3e-4)


def test_a_class_of_ones_own_is_refused_sizes_that_it_could_not_load():
    class Mine(LlamaForCausalLM):
        pass

    model = Mine(zoo.make("llama").config)
    before = snapshot(model)
    with pytest.raises(ValueError, match="it is a Mine, a class of your own"):
        remove_units(model, {"hidden": [1]})
    assert snapshot(model) == before
    remove_units(model, {"hidden": [0, 1, 2, 3, 4, 5]})  # 42
    assert type(model) is Mine


def test_save_plain_saves_a_tokenizer(tmp_path):
    model = zoo.make("llama")

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    save_plain(model, tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == {"a": 0, "b": 1}
    tokenizer.eos_token = "b"
    tokenizer.save_pretrained(tmp_path / "own")
    loaded = load_tokenizer(tmp_path / "own")
    assert loaded.pad_token == "b"  # to fill batches with, here alone
    save_plain(model, tmp_path / "again", loaded)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").pad_token is None
    loaded.pad_token = "a"  # of the user's own
    save_plain(model, tmp_path / "again", loaded)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").pad_token == "a"
