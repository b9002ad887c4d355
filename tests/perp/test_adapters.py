"""Adapters on a pruned model and their merge: one table of variants, models and dtypes, the same checks for all."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from perp_models import halve, make_gpt2, pruned, train, zeros
from tiny import make_llama, make_tokens, snapshot
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from transformers import RobertaConfig, RobertaForSequenceClassification

from lightning_prune import prune
from lightning_prune.perp import (
    SparsePeftModel,
    adapter_masks,
    add_adapters,
    load_adapter,
    merge,
    remove_adapters,
    save_adapter,
    set_masks,
    trainable_share,
)
from lightning_prune.perp.adapters import trained_state
from lightning_prune.perp.layers import sparse_layers

MERGED = ["mask_lora", "scale_lora", "hira", "lora_prune"]
FAMILIES = ["llama", "gpt2"]
DTYPES = [torch.float32, torch.bfloat16]
PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
IDS = make_tokens(4, 16)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS, use_cache=False).logits
    return y


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", MERGED)
def test_merge_keeps_zeros_and_logits(adapter: str, family: str, dtype: torch.dtype) -> None:
    plain = pruned(family, dtype)
    before, weights = zeros(plain), {n: p.detach().clone() for n, p in plain.named_parameters()}
    model = add_adapters(plain, adapter)
    assert isinstance(model, SparsePeftModel)
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    y = logits(model)
    merged = merge(model)
    assert merged is plain
    assert type(merged).__module__.startswith("transformers.")
    assert {n for n, _ in merged.named_parameters()} == weights.keys()
    assert all(p.requires_grad for p in merged.parameters())
    assert not hasattr(merged, "peft_config")
    for name, zero in zeros(merged).items():
        # A kept weight may round to zero, a pruned one may not come back.
        assert bool((zero | ~before[name]).all()), name
        assert float(zero.float().mean()) == pytest.approx(float(before[name].float().mean()), abs=0.01)
        assert not torch.equal(merged.get_parameter(name), weights[name])
    if adapter != "lora_prune":
        assert torch.equal(logits(merged), y)
    else:
        assert not torch.equal(logits(merged), y)


def make_of_type(model_type: str) -> nn.Module:
    """Families whose target_modules PEFT rewrites (dense layers beside experts) or refuses (out_proj)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24, "topk_group": 1}
    fields = {"state_size": 4} if model_type == "mamba" else {**latent, **experts, **heads, "first_k_dense_replace": 1}
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
    config = AutoConfig.for_model(model_type, **sizes, **fields)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.filterwarnings("ignore:.*get no adapter")
@pytest.mark.parametrize(("model_type", "layer"), [("deepseek_v3", "up_proj"), ("mamba", "out_proj")])
def test_every_pruned_linear_layer_gets_its_adapter_in_any_family(model_type: str, layer: str) -> None:
    plain = make_of_type(model_type)
    masks = prune(plain, score="magnitude", sparsity=0.5, progress=False)
    before = vars(plain.config).copy()
    model = add_adapters(plain, r=4)
    linear = {name for name, m in plain.named_modules() if isinstance(m, nn.Linear) and f"{name}.weight" in masks}
    assert {name for name, _ in sparse_layers(model)} >= linear
    assert any(name.endswith(layer) for name, _ in sparse_layers(model))
    assert vars(plain.config) == before
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    y = logits(model)
    merged = merge(model)
    torch.testing.assert_close(logits(merged), y, rtol=1e-5, atol=1e-5)
    assert all(not bool(p[~masks[n]].any()) for n, p in merged.named_parameters() if n in masks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [*MERGED, "lora"])
def test_adapters_change_nothing_at_the_start(adapter: str, family: str) -> None:
    model = pruned(family)
    y = logits(model)
    torch.testing.assert_close(logits(add_adapters(model, adapter)), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_scale_lora_starts_at_one_and_gains_rank_only_without_symmetry(init: bool | str) -> None:
    model = add_adapters(pruned(), "scale_lora", r=4, init_lora_weights=init)
    train(model, IDS)
    for _, layer in sparse_layers(model):
        a, b = layer.matrices()
        assert torch.linalg.matrix_rank((b @ a).double(), rtol=1e-4) == (1 if init is True else 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "hira"])
def test_training_step_is_that_of_float64_written_out(adapter: str, family: str) -> None:
    plain = pruned(family).double()
    exact = copy.deepcopy(plain)
    scaling = {"lora_alpha": 12} if adapter == "mask_lora" else {}
    model = add_adapters(plain, adapter, r=4, init_lora_weights="gaussian", **scaling)
    model(input_ids=IDS, labels=IDS).loss.backward()
    leaves, weights = {}, {}
    for name, layer in sparse_layers(model):
        a, b = (m.detach().double().requires_grad_() for m in layer.matrices())
        w = layer.base_weight.detach()
        product = (b @ a).t() if family == "gpt2" else b @ a
        combined = {"mask_lora": w + 3 * (w != 0) * product, "scale_lora": w * product, "hira": w * (1 + product)}
        weights[f"{name}.weight"] = combined[adapter]
        leaves[name] = (a, b, layer)
    out = torch.func.functional_call(exact, weights, kwargs={"input_ids": IDS, "labels": IDS})
    out.loss.backward()
    assert leaves
    for name, (a, b, layer) in leaves.items():
        for own, reference in zip(layer.matrices(), (a, b), strict=True):
            torch.testing.assert_close(own.grad.double(), reference.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_hira_is_that_of_peft_which_merges_it_with_the_same_zeros(family: str) -> None:
    plain = pruned(family)
    other = copy.deepcopy(plain)
    model = add_adapters(plain, "hira", train=(), r=4)
    train(model, IDS)
    layers = dict(sparse_layers(model))
    stock = get_peft_model(other, peft.HiraConfig(r=4, target_modules=list(layers), fan_in_fan_out=family == "gpt2"))
    for name, layer in layers.items():
        theirs = other.get_submodule(name)
        for own, copied in zip(layer.matrices(), (theirs.hira_A, theirs.hira_B), strict=True):
            copied["default"].data.copy_(own.detach())
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
    ours, theirs = merge(model), stock.merge_and_unload()
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(weight, ours.get_parameter(name), rtol=1e-5, atol=1e-7, msg=name)
    assert all(torch.equal(zero, zeros(ours)[name]) for name, zero in zeros(theirs).items())


@pytest.mark.parametrize("adapter", ["mask_lora", "lora_prune"])
def test_an_adapter_on_the_head_is_a_plain_lora_and_merges_densely(adapter: str) -> None:
    plain = pruned()
    with torch.no_grad():
        plain.lm_head.weight[3] = 0.0  # an unused word; nothing of the head is pruned
    weight = plain.lm_head.weight.detach().clone()
    model = add_adapters(plain, adapter, adapt_head=True, r=2)
    assert "lm_head" in dict(sparse_layers(model))
    train(model, IDS)
    a, b = (matrix.detach().double() for matrix in plain.lm_head.matrices())
    y = logits(model)
    merged = merge(model)
    torch.testing.assert_close(merged.lm_head.weight.double(), weight.double() + 2 * b @ a, rtol=1e-5, atol=1e-6)
    assert bool((merged.lm_head.weight[3] != 0).all())
    if adapter == "mask_lora":
        assert torch.equal(logits(merged), y)


def test_a_head_that_cannot_be_adapted_is_refused() -> None:
    tied = make_llama(tie_word_embeddings=True)
    halve(tied)
    for model, arguments, message in (
        (tied, {}, "the weight of 'lm_head' is also that of others"),
        (pruned(), {"adapter": None}, "no adapter to put on the head"),
        (pruned(), {"train": ("head",)}, "would get an adapter too"),
        (pruned().model, {}, "has no output embeddings"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            add_adapters(model, adapt_head=True, **arguments)
        assert snapshot(model) == before


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("adapter", MERGED)
def test_merge_in_place_and_unmerge_give_the_bits_back(adapter: str, safe: bool, dtype: torch.dtype) -> None:
    plain = pruned(dtype=dtype)
    model = add_adapters(plain, adapter)
    train(model, IDS)
    bits, y = snapshot_bits(model), logits(model)
    model.merge_adapter(safe_merge=safe)
    if adapter != "lora_prune":
        assert torch.equal(logits(model), y)
    masks = adapter_masks(model)
    for name, layer in sparse_layers(model):
        assert not layer.base_weight[~masks[f"{name}.weight"]].any()
    model.unmerge_adapter()
    assert snapshot_bits(model) == bits
    assert torch.equal(logits(model), y)
    with model.disable_adapter():
        assert not torch.equal(logits(model), y)


def snapshot_bits(model: nn.Module) -> dict[str, bytes]:
    return {n: p.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "train_parts", "expected"),
    [
        ("llama", (), set()),
        ("llama", ("bias", "norm"), {"norm"}),
        ("llama", ("head",), {"lm_head"}),
        ("llama", ("embedding",), {"embed_tokens"}),
        ("gpt2", ("norm",), {"ln_1", "ln_2", "ln_f"}),
        ("gpt2", ("bias",), {"bias"}),
        ("gpt2", ("head",), {"wte"}),  # tied
        ("gpt2", ("embedding",), {"wte", "wpe"}),
    ],
)
def test_only_adapters_and_the_chosen_parts_train(
    family: str, train_parts: tuple[str, ...], expected: set[str]
) -> None:
    model = add_adapters(pruned(family), train=train_parts)
    own = [name for name in trainable(model) if ".lora_" not in name]
    assert all(any(part in name for part in expected) for name in own)
    assert all(any(part in name for name in own) for part in expected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    stepped = {name for name, p in model.named_parameters() if p in optimizer.state}
    assert stepped == set(trainable(model))
    assert trainable_share(model) == pytest.approx(
        sum(p.numel() for p in optimizer.state)
        / sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    )


def test_zeros_of_matrices_that_are_trained_whole_are_told_of() -> None:
    """One unused word is no pruned weight, and neither is what has a mask."""
    plain = pruned()
    halves = torch.rand(plain.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        plain.lm_head.weight.masked_fill_(halves, 0.0)
        plain.model.embed_tokens.weight[:64] = 0.0
    zeros = int((plain.lm_head.weight == 0).sum())
    for how in ({"train": ("head", "embedding")}, {"train": (), "adapt_head": True}):
        with pytest.warns(UserWarning, match=rf"fills zeros that look pruned: {zeros:,} of 'lm_head\.weight'\. To"):
            remove_adapters(add_adapters(plain, **how))
    whole = {"lm_head.weight": torch.ones_like(plain.lm_head.weight, dtype=torch.bool)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        remove_adapters(add_adapters(plain, masks=whole, train=("head",)))
        remove_adapters(add_adapters(plain, train=("embedding",)))


def test_the_head_of_a_classifier_trains() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = RobertaForSequenceClassification(RobertaConfig(vocab_size=128, **sizes))
    prune(plain, score="magnitude", progress=False)
    model = add_adapters(plain, train=("head",))
    own = {name.removeprefix("base_model.model.") for name in trainable(model) if ".lora_" not in name}
    assert own == {f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")}
    before = plain.classifier.out_proj.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    assert not torch.equal(merge(model).classifier.out_proj.weight, before)
    with pytest.raises(ValueError, match="RobertaModel has no output embeddings, and nothing that is called as"):
        add_adapters(plain.roberta, train=("head",))


@pytest.mark.parametrize("all_frozen", [False, True])
def test_parts_of_a_frozen_teacher_stay_frozen(all_frozen: bool) -> None:
    """Of a model that is frozen whole, as for inference, they are trained."""
    student, teacher = (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)) for _ in range(2))
    model = nn.ModuleDict({"student": student, "teacher": teacher})
    (model if all_frozen else teacher).requires_grad_(False)
    prune(student, score="magnitude", progress=False)
    built = add_adapters(model, train=("bias", "norm"))
    trained = {n.removeprefix("base_model.model.") for n, p in built.named_parameters() if p.requires_grad}
    assert {"student.1.weight", "student.1.bias", "student.0.base_layer.bias"} <= trained
    assert any(name.startswith("teacher") for name in trained) == all_frozen


def test_without_adapters_the_parts_train_alone() -> None:
    plain = pruned()
    before = zeros(plain)
    model = add_adapters(plain, None, train=("norm",))
    assert model is plain
    assert all("norm" in name for name in trainable(model))
    train(model, IDS)
    assert merge(model) is plain
    assert all(torch.equal(z, before[n]) for n, z in zeros(plain).items())
    assert len(trainable(plain)) == len(list(plain.parameters()))


def test_percentage_is_the_papers_on_a_known_shape() -> None:
    # Of a 64-wide Llama block: r (in + out) for each of seven layers, and two norms; plus the last norm.
    model = add_adapters(pruned(), r=2)
    adapters = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    own = sum(p.numel() for p in make_llama().parameters())
    assert trainable_share(model) == pytest.approx((adapters + 5 * 64) / own)


def test_masks_of_prune_are_taken_and_kept_zeros_are_not_pruned() -> None:
    model = make_llama()
    masks = prune(model, None, score="magnitude", sparsity=0.5, progress=False)
    name = "model.layers.0.mlp.up_proj.weight"
    position = masks[name].nonzero()[0].tolist()
    with torch.no_grad():
        model.get_parameter(name)[tuple(position)] = 0.0  # kept, and zero by chance
    wrapped = add_adapters(model, masks=masks)
    assert all(torch.equal(mask, masks[n]) for n, mask in adapter_masks(wrapped).items())
    train(wrapped, IDS)
    assert merge(wrapped).get_parameter(name)[tuple(position)] != 0


def test_set_masks_takes_names_with_and_without_peft() -> None:
    model = make_llama()
    masks = halve(model)
    wrapped = add_adapters(model)
    long = {"base_model.model." + n.replace(".weight", ".base_layer.weight"): m for n, m in masks.items()}
    for given in (masks, long, None):
        set_masks(wrapped, given)
        assert all(torch.equal(mask, masks[n]) for n, mask in adapter_masks(wrapped).items())
    before = snapshot(wrapped)
    with pytest.raises(ValueError, match="not zero"):
        set_masks(wrapped, {n: ~m for n, m in masks.items()})
    with pytest.raises(ValueError, match=r"torch\.bool"):
        set_masks(wrapped, {n: m.float() for n, m in masks.items()})
    assert snapshot(wrapped) == before


def test_layers_without_a_pruned_weight_get_no_adapter() -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = 0.0
    assert [name for name, _ in sparse_layers(add_adapters(model))] == ["model.layers.1.mlp.up_proj"]


def test_peft_selects_layers_ranks_and_scaling() -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "use_rslora": True}
    model = add_adapters(pruned(), r=4, rank_pattern={"up_proj": 2}, **options)
    layers = dict(sparse_layers(model))
    assert sorted(layers) == ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    assert [layers[n].matrices()[0].shape[0] for n in sorted(layers)] == [2, 4]
    assert layers["model.layers.1.self_attn.q_proj"].scaling["default"] == 8 / 2
    train(model, IDS)
    y = logits(model)
    assert torch.equal(logits(merge(model)), y)


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_layers_to_transform_holds_for_the_layers_that_are_chosen_without_names(target_modules: str | None) -> None:
    """PEFT passes over it where it is given whole names."""
    model = add_adapters(pruned(), target_modules=target_modules, layers_to_transform=[1])
    named = add_adapters(pruned(), target_modules=PROJECTIONS, layers_to_transform=[1])
    assert [name for name, _ in sparse_layers(model)] == [name for name, _ in sparse_layers(named)]
    with pytest.raises(ValueError, match=r"layers_to_transform=\[7\] leaves none of the 14 layers"):
        add_adapters(pruned(), layers_to_transform=[7])


def test_a_layer_whose_name_ends_as_that_of_a_pruned_one_gets_no_adapter(tmp_path: Path) -> None:
    """PEFT takes a name for the ends of others: ``0`` for the ReLU ``1.0``, ``fc`` for ``dense.fc``."""

    dense = nn.Sequential(OrderedDict([("1", nn.ReLU()), ("fc", nn.Linear(8, 8))]))
    plain = nn.Sequential(OrderedDict([("fc", nn.Linear(8, 8)), ("1", nn.Linear(8, 8)), ("dense", dense)]))
    with pytest.warns(UserWarning, match=r"dense\.fc\.weight"):
        masks = prune(plain, score="magnitude", ignore=["dense"], progress=False)
    before, again = snapshot(plain), copy.deepcopy(plain)
    model = add_adapters(plain, masks=masks, r=2)
    assert [name for name, _ in sparse_layers(model)] == ["fc", "1"]
    save_adapter(model, tmp_path)
    assert [name for name, _ in sparse_layers(load_adapter(again, tmp_path))] == ["fc", "1"]
    assert snapshot(merge(model)) == before


class Scaled(nn.Linear):
    def forward(self, input: Tensor, scale: float = 2.0) -> Tensor:
        return super().forward(input) * scale


class Written(nn.Linear):
    """As Falcon's."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


@pytest.mark.parametrize("adapter", MERGED)
def test_layers_whose_forward_is_another_are_refused(adapter: str) -> None:
    """The adapter would take its place, in training and out of it: another function, and no error."""
    plain = nn.Sequential(nn.Linear(8, 8), Scaled(8, 8))
    prune(plain, score="magnitude", progress=False)
    before, x = snapshot(plain), torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"forward of '1' \(Scaled\) computes something else.*exclude_modules"):
        add_adapters(plain, adapter, r=2)
    assert snapshot(plain) == before
    expected = plain(x)
    model = add_adapters(plain, adapter, r=2, exclude_modules=["1"])
    assert torch.allclose(model(x), expected, atol=1e-6)
    plain = merge(model)
    plain[1] = nn.Linear(8, 8)
    plain[1].forward = Scaled(8, 8).forward
    with pytest.raises(ValueError, match="forward of '1'"):
        add_adapters(plain, adapter, r=2, target_modules=["1"])


def test_layers_with_a_forward_of_their_own_that_is_linear_are_called_by_keyword_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = Written(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(input=self.up(input=x).relu())
            return y

    plain = Model().bfloat16()
    prune(plain, score="magnitude", progress=False)
    x = torch.randn(3, 8).bfloat16()
    expected = plain(x)
    for adapter in MERGED:
        model = add_adapters(plain, adapter, r=2)
        assert torch.allclose(model(x), expected, atol=0.02)
        with pytest.raises(TypeError):
            dict(sparse_layers(model))["up"](x, 3.0)
        plain = merge(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains_the_same(reentrant: bool) -> None:
    def run(checkpointing: bool) -> list[float]:
        plain = pruned()
        if checkpointing:
            plain.gradient_checkpointing_enable({"use_reentrant": reentrant})
        hooks = list(plain.get_input_embeddings()._forward_hooks)
        torch.manual_seed(3)
        model = add_adapters(plain.train(), train=())
        losses = train(model, IDS)
        assert list(merge(model).get_input_embeddings()._forward_hooks) == hooks  # what PEFT adds is gone
        return losses

    assert run(True) == run(False)


@pytest.mark.slow
def test_compiled_model_trains_the_same() -> None:
    def run(compiled: bool) -> list[float]:
        torch.manual_seed(3)
        model = add_adapters(pruned())
        return train(torch.compile(model, backend="aot_eager") if compiled else model, IDS, steps=3)

    assert run(True) == pytest.approx(run(False), rel=1e-5)


def test_hooks_on_base_layers_see_the_effective_layer() -> None:
    model = add_adapters(pruned())
    train(model, IDS)
    y, seen = logits(model), []
    handles = [
        layer.get_base_layer().register_forward_hook(lambda m, i, o: seen.append(o))
        for _, layer in sparse_layers(model)
    ]
    assert torch.equal(logits(model), y)
    assert len(seen) == len(handles) == 14


def test_remove_adapters_gives_the_old_weights_back() -> None:
    plain = pruned()
    before = snapshot(plain)
    model = add_adapters(plain, train=())
    train(model, IDS)
    model.merge_adapter()
    assert remove_adapters(model) is plain
    assert snapshot(plain) == before


def test_lora_stays_apart() -> None:
    model = add_adapters(pruned(), "lora", lora_dropout=0.1)
    assert train(model, IDS)
    before = snapshot(model)
    for attempt in (lambda: merge(model), model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="would fill the zeros"):
            attempt()
    assert snapshot(model) == before


def test_a_diverged_adapter_is_not_merged() -> None:
    model = add_adapters(pruned())
    *_, (name, layer) = sparse_layers(model)
    with torch.no_grad():
        layer.matrices()[1][0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"'{name}' has values that are not finite"):
        merge(model)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"or bfloat16 \(or eps=1e-4"):  # Adam's 1e-8 is zero in float16
        merge(model.half())


def quantized() -> nn.Module:
    class Quantized(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 96, bias=False)
            self.weight = nn.Parameter(torch.zeros(96, 64, dtype=torch.int8), requires_grad=False)

    model = pruned()
    model.model.layers[0].mlp.up_proj = Quantized()
    return model


def parametrized() -> nn.Module:
    model = pruned()
    l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 3)
    return model


def recurrent() -> nn.Module:
    model = nn.Sequential(nn.LSTM(3, 8), nn.LayerNorm(8))
    prune(model, score="magnitude", progress=False)
    return model


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (pruned, {"adapter": "mask"}, "adapter='mask' must be one of"),
    (pruned, {"train": "norm"}, r"write train=\('norm',\)"),
    (pruned, {"train": ["norms"]}, "unknown part 'norms'"),
    (pruned, {"rank": 4}, "rank=4 is no option of LoRA"),
    (pruned, {"r": 0}, "r=0 must be a whole number"),
    (pruned, {"lora_dropout": 0.1}, "adapter and weight are one matrix"),
    (pruned, {"use_dora": True}, "use_dora=True is not supported"),
    (pruned, {"bias": "all"}, r"use train=\('bias',\)"),
    (pruned, {"modules_to_save": ["norm"]}, "use train, any of"),
    (pruned, {"target_parameters": ["experts"]}, "use target_modules, which names parameters of experts too"),
    (pruned, {"init_lora_weights": "pissa"}, "would fill their zeros"),
    (pruned, {"adapter": "scale_lora", "lora_alpha": 8}, "has no effect on adapter='scale_lora'"),
    (pruned, {"adapter": None, "r": 4}, "adapter=None takes no LoRA options"),
    (pruned, {"adapter": None, "train": ()}, "leaves nothing to train"),
    (pruned, {"target_modules": ["up_pro"]}, "did you mean 'up_proj'"),
    (pruned, {"target_modules": "(("}, "is no regular expression"),
    (pruned, {"target_modules": ["embed_tokens"]}, "is a Embedding"),
    (pruned, {"target_modules": ["up_proj"], "exclude_modules": ["up_proj"]}, "matches no module"),
    (make_llama, {}, "prune the model first"),
    (recurrent, {}, "no layer of Sequential that is pruned can get an adapter.*adapter=None"),
    (make_llama, {"target_modules": ["up_proj"]}, "prune the model first"),
    (make_llama, {"masks": {"model.layers.0.mlp.up_proj.weight": torch.eye(96, 64) > 0}}, "call apply_masks"),
    (pruned, {"masks": {"nothing.weight": torch.ones(2, 2).bool()}}, "belong to another model"),
    (quantized, {}, "is quantized"),
    (parametrized, {}, "is not a plain parameter"),
    (lambda: pruned().to("meta"), {}, "no data"),
    (lambda: get_peft_model(pruned(), LoraConfig(target_modules=["q_proj"])), {}, "has adapters already"),
    (lambda: add_adapters(pruned()), {}, "has adapters already"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("build", "arguments", "message"), BAD, ids=[b[2][:30] for b in BAD])
def test_what_does_not_fit_is_refused_and_nothing_changes(build: Any, arguments: dict[str, Any], message: str) -> None:
    model = build()
    meta = any(p.is_meta for p in model.parameters())
    modules, flags = [type(m) for m in model.modules()], trainable(model)
    before = None if meta else snapshot(model)
    with pytest.raises((TypeError, ValueError), match=message):
        add_adapters(model, **arguments)
    assert [type(m) for m in model.modules()] == modules
    assert trainable(model) == flags
    assert meta or snapshot(model) == before
    if build is pruned:  # and it can be tried again
        add_adapters(model)


def test_a_model_that_accelerate_runs_is_refused_though_its_weights_are_here() -> None:
    model = dispatch_model(pruned(), {"": "cpu"}, force_hooks=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"q_proj' is run by accelerate.*remove_hook_from_submodules"):
        add_adapters(model)
    assert snapshot(model) == before
    remove_hook_from_submodules(model)
    add_adapters(model)


def test_failure_inside_peft_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned()
    before, modules = snapshot(model), [type(m) for m in model.modules()]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lightning_prune.perp.adapters.set_masks", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        add_adapters(model)
    assert snapshot(model) == before
    assert [type(m) for m in model.modules()] == modules
    assert len(trainable(model)) == len(list(model.parameters()))
    assert not hasattr(model, "peft_config")


def test_tied_layers_and_second_adapters_are_refused() -> None:
    model = make_gpt2()
    halve(model)
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(ValueError, match="is also that of others"):
        add_adapters(model, target_modules=["c_fc"])
    wrapped = add_adapters(pruned())
    with pytest.raises(ValueError, match="only one adapter"):
        wrapped.add_adapter("second", LoraConfig(target_modules=["q_proj"]))


def test_merging_needs_adapters() -> None:
    with pytest.raises(ValueError, match="call model = add_adapters"):
        merge(pruned())


def test_code_that_runs_the_body_and_the_head_runs_them_with_adapters() -> None:
    model = add_adapters(pruned())
    train(model, IDS)
    body = model.model(input_ids=IDS)
    assert body.last_hidden_state.shape == (*IDS.shape, 64)
    assert torch.equal(model.lm_head(body.last_hidden_state), model(input_ids=IDS).logits)
    assert model.model is merge(model).model
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune(plain, score="magnitude", progress=False)
    assert add_adapters(plain).model is plain  # it has none of its own


def test_a_model_dequantized_from_gguf_is_taken() -> None:
    """transformers goes on calling it quantized."""
    model = pruned()
    model.is_quantized = True
    model.config.quantization_config = {"quant_method": "gguf"}
    before = zeros(model)
    merged = merge(add_adapters(model))
    assert all(torch.equal(before[name], now) for name, now in zeros(merged).items())


def test_names_of_the_model_that_resemble_pefts_stay_as_they_are() -> None:
    model = nn.ModuleDict({"body": nn.ModuleDict({"base_layers": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})})
    masks = prune(model, score="magnitude", progress=False)
    adapted = add_adapters(model, r=2)
    assert [f"{name}.weight" for name, _ in sparse_layers(adapted)] == list(masks)
    assert {f"{name}.lora_A" for name, _ in sparse_layers(adapted)} <= trained_state(adapted).keys()
