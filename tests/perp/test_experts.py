"""Adapters of experts that are one parameter: against experts written out one by one in float64, and a whole life."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from experts_models import EXPERTS, WORDS, linear_of, make_moe, write_out
from perp_models import train
from substituted import EXACT, adapted, check_fold, check_merge_in_place, combined
from tiny import make_tokens, snapshot
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.perp import (
    adapter_masks,
    add_adapters,
    load_adapter,
    merge,
    reconstruct,
    save_adapter,
    set_masks,
    trainable_share,
)
from lightning_prune.perp.layers import sparse_layers

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "llama4"]
IDS = make_tokens(3, 10, vocab=WORDS)


def pruned_moe(family: str, implementation: str = "eager", dtype: torch.dtype = torch.float64) -> nn.Module:
    model = make_moe(family, implementation=implementation).train()
    prune(model, score="magnitude", progress=False)
    return model.to(dtype)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS, use_cache=False).logits
    return y


def by_expert(name: str, stack: Tensor, transposed: bool) -> dict[str, Tensor]:
    """The experts' matrices ``[O, I]`` of a stack, by their names in the written-out model."""
    first = linear_of(name)
    return {f"{first}.{e}.weight": matrix.t() if transposed else matrix for e, matrix in enumerate(stack)}


@pytest.mark.few_fast(8)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [*EXACT, "lora_prune", "lora"])
def test_a_step_is_that_of_experts_written_out_in_float64(adapter: str, family: str, implementation: str) -> None:
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # all that grouped products take
    plain = pruned_moe(family, implementation, dtype)
    reference, transposed = write_out(plain, family).double(), family in ("gpt_oss", "llama4")
    scaled = {} if adapter in ("scale_lora", "hira") else {"lora_alpha": 9}
    model = add_adapters(plain, adapter, r=3, train=(), init_lora_weights="gaussian", **scaled)
    layers = {n: layer for n, layer in sparse_layers(model) if "experts" in n}
    assert len(layers) == 4
    assert not {n for n, p in plain.named_parameters() if p.requires_grad and "lora_" not in n}
    generator, leaves, weights = torch.Generator().manual_seed(1), {}, {}
    for name, layer in layers.items():
        a, b = layer.matrices()
        inputs, outputs = layer.base_weight.shape[1:] if transposed else layer.base_weight.shape[:0:-1]
        assert (a.shape, b.shape) == ((EXPERTS, 3, inputs), (EXPERTS, outputs, 3))
        assert a.requires_grad
        assert b.requires_grad
        with torch.no_grad():
            b += 0.3 * torch.randn(b.shape, generator=generator, dtype=b.dtype)
        for e, (linear, w) in enumerate(by_expert(name, layer.base_weight.detach().double(), transposed).items()):
            pair = [matrix.detach()[e].double().clone().requires_grad_() for matrix in (a, b)]
            leaves[name, e] = pair
            weights[linear] = combined(adapter, w.clone(), *pair, 3.0 if scaled else 1.0)
    for name, layer in sparse_layers(model):
        if name not in layers:  # attention, which tests/perp/test_adapters.py looks at
            w, a, b = (m.detach().double() for m in (layer.base_weight, *layer.matrices()))
            weights[f"{name}.weight"] = combined(adapter, w, a, b, 3.0 if scaled else 1.0)
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    expected = torch.func.functional_call(reference, weights, kwargs={"input_ids": IDS, "labels": IDS})
    expected.loss.backward()
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(output.logits.double(), expected.logits, **near)
    for (name, e), pair in leaves.items():
        for own, leaf in zip(layers[name].matrices(), pair, strict=True):
            wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(own.grad[e].double(), wanted, **near, msg=f"{name} {e}")
    if adapter == "lora":
        with pytest.raises(ValueError, match="adapter='lora' cannot be merged"):
            merge(model)
        return
    kept = {name: layer.base_weight.detach() != 0 for name, layer in layers.items()}
    y, merged = logits(model), merge(model)
    for name, mask in kept.items():
        weight = merged.get_parameter(name).detach()
        assert not weight[~mask].view(torch.uint8).any(), name  # +0.0
        for linear, matrix in by_expert(name, weight, transposed).items():
            wanted = weights[linear].detach() * (by_expert(name, mask, transposed)[linear])
            torch.testing.assert_close(matrix.double(), wanted, **near, msg=linear)
    if adapter in EXACT:
        assert torch.equal(logits(merged), y)


def test_an_expert_that_no_token_chose_has_gradients_of_zero() -> None:
    plain = pruned_moe("mixtral", "grouped_mm", torch.float32)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if ".gate.weight" in name:  # of two experts a token, these two
                p.zero_()
    model = add_adapters(plain, r=2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    chosen = 0
    for name, layer in sparse_layers(model):
        if "experts" in name:
            _, b = layer.matrices()
            used = [bool(grad.any()) for grad in b.grad]
            assert sum(used) == 2, name
            chosen += 1
    assert chosen == 4


@pytest.mark.few_fast(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "hira", "lora_prune"])
def test_training_lowers_the_loss_and_the_merge_keeps_zeros(adapter: str, family: str, dtype: torch.dtype) -> None:
    plain = pruned_moe(family, "grouped_mm" if dtype == torch.float32 else "batched_mm", dtype)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = add_adapters(plain, adapter, r=4)
    assert all(m.dtype == torch.float32 for _, layer in sparse_layers(model) for m in layer.matrices())
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    y, masks = logits(model), adapter_masks(model)
    assert sum("experts" in name for name in masks) == 4
    merged = merge(model)
    assert merged is plain
    assert {n for n, _ in merged.named_parameters()} == before.keys()
    assert all(p.requires_grad for p in merged.parameters())
    for name, mask in masks.items():
        weight = merged.get_parameter(name).detach()
        assert torch.equal(mask, before[name] != 0)
        assert not (weight[~mask] != 0).any()
        assert not torch.signbit(weight[~mask]).any()
        changed = (weight != before[name]).flatten(1).any(1)
        assert bool(changed.all()) if "experts" in name and dtype == torch.float32 else bool(changed.any()), name
    assert torch.equal(logits(merged), y) == (adapter != "lora_prune")


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_the_merged_model_is_the_same(family: str) -> None:
    model = add_adapters(pruned_moe(family, "batched_mm", torch.float32), r=4)
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return logits(model), model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False)

    before = run(model)
    assert all(torch.equal(one, other) for one, other in zip(run(merge(model)), before, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["experts", "model"])
def test_compiled_it_trains_the_same(how: str, family: str) -> None:
    losses = []
    for compiled in (False, True):
        plain = pruned_moe(family, "batched_mm")
        for block in plain.model.layers if compiled and how == "experts" else ():
            (block.feed_forward if family == "llama4" else block.mlp).experts.compile(backend="eager")
        torch.manual_seed(0)
        model = add_adapters(plain, r=2)
        losses.append(train(torch.compile(model, backend="aot_eager") if compiled and how == "model" else model, IDS))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_trains_the_same(family: str) -> None:
    losses = []
    for kind in (None, False, True):
        plain = pruned_moe(family, "batched_mm")
        if kind is not None:
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        torch.manual_seed(0)
        losses.append(train(add_adapters(plain, r=2), IDS))
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_experts_that_are_compiled_by_themselves_are_refused() -> None:
    plain = pruned_moe("mixtral")
    for block in plain.model.layers:
        block.mlp.experts = torch.compile(block.mlp.experts, backend="eager")
    before = snapshot(plain)
    for options in ({}, {"target_modules": ["down_proj"]}):
        with pytest.raises(
            ValueError, match=r"experts of 'model\.layers\.0\.mlp\.experts\.\w+' were given to torch.comp"
        ):
            add_adapters(plain, **options)
    assert snapshot(plain) == before
    assert not any("experts" in n for n, _ in sparse_layers(add_adapters(plain, exclude_modules=["experts"])))


def test_a_merge_in_place_gives_the_bits_back() -> None:
    plain = pruned_moe("gpt_oss", "grouped_mm", torch.float32)
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = add_adapters(plain, r=2, train=())
    train(model, IDS)
    check_merge_in_place(model, weights, logits)


@pytest.mark.parametrize("init", [True, False])
def test_fold_begins_anew_from_the_merged_weights(init: bool) -> None:
    model = add_adapters(pruned_moe("mixtral"), r=2, init_lora_weights=init)
    train(model, IDS)
    check_fold(model, logits)


def test_masks_say_what_is_kept_where_a_kept_weight_is_zero() -> None:
    plain = make_moe("mixtral").train()
    masks = prune(plain, score="magnitude", progress=False)
    name = "model.layers.0.mlp.experts.down_proj"
    place = tuple(masks[name].nonzero()[7].tolist())
    with torch.no_grad():
        plain.get_parameter(name)[place] = 0.0
    model = add_adapters(plain, masks=masks)
    assert all(torch.equal(mask, masks[n]) for n, mask in adapter_masks(model).items())
    train(model, IDS)
    assert merge(model).get_parameter(name)[place] != 0
    model = add_adapters(plain, masks=masks)
    with pytest.raises(ValueError, match=rf"{name!r} are pruned by the mask but are not zero"):
        set_masks(model, {name: torch.zeros_like(masks[name])})


# -- which of them


def adapted_experts(model: nn.Module, **options: Any) -> set[str]:
    return {name.removeprefix("model.layers.") for name in adapted(model, **options)}


def test_experts_are_selected_by_their_names() -> None:
    plain = pruned_moe("mixtral")
    attention = {f"{b}.self_attn.{name}_proj" for b in "01" for name in "qkvo"}
    first, second = ({f"{b}.mlp.experts.{name}" for b in "01"} for name in ("gate_up_proj", "down_proj"))
    assert adapted_experts(plain) == attention | first | second
    assert adapted_experts(plain, target_modules="all-linear") == attention
    assert adapted_experts(plain, target_modules=["experts"]) == first | second
    assert adapted_experts(plain, target_modules=["q_proj", "down_proj"]) == second | {
        f"{b}.self_attn.q_proj" for b in "01"
    }
    assert adapted_experts(plain, target_modules=r".*0\.mlp\.experts\.\w+_proj") == {
        n for n in first | second if n[0] == "0"
    }
    assert adapted_experts(plain, exclude_modules=["experts"]) == attention
    assert adapted_experts(plain, exclude_modules=["gate_up_proj"]) == attention | second
    assert adapted_experts(plain, layers_to_transform=[1]) == {n for n in attention | first | second if n[0] == "1"}
    with pytest.raises(ValueError, match=r"target_modules=\['gate_up'\].*did you mean 'gate_up_proj'"):
        add_adapters(plain, target_modules=["gate_up"])


def test_experts_that_are_not_pruned_get_no_adapter() -> None:
    plain = make_moe("qwen3_moe")
    prune(plain, score="magnitude", ignore=["layers.0.mlp.experts", "lm_head"], progress=False)
    names = {name for name in adapted_experts(plain) if "experts" in name}
    assert names == {"1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"}


def test_ranks_and_scalings_of_one_parameter_and_of_all_experts() -> None:
    options = {"rank_pattern": {"down_proj": 5, "0.mlp.experts": 3}, "alpha_pattern": {"experts": 7}}
    model = add_adapters(pruned_moe("gpt_oss"), r=2, **options)
    found = {name: layer.matrices()[0].shape[-2] for name, layer in sparse_layers(model)}
    scalings = {name: layer.combining()["scaling"] for name, layer in sparse_layers(model)}
    for name, rank in found.items():
        expected = 5 if "down_proj" in name else 3 if "layers.0.mlp" in name else 2
        assert rank == expected, name
        assert scalings[name] == ((7 if "experts" in name else 4) / rank), name


def test_experts_alone() -> None:
    """No linear layer has an adapter then."""
    plain = make_moe("gpt_oss").train()
    masks = prune(plain, score="magnitude", targets=["experts"], progress=False)
    model = add_adapters(plain, r=2, train=())
    assert {layer.weight_name(name) for name, layer in sparse_layers(model)} == masks.keys()
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    y = logits(model)
    assert torch.equal(logits(merge(model)), y)


def test_biases_of_experts_are_trained_with_the_others() -> None:
    model = add_adapters(pruned_moe("gpt_oss"), train=("bias",))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "experts" in n and "lora_" not in n}
    assert {name.rpartition(".")[2] for name in trained} == {"gate_up_proj_bias", "down_proj_bias"}
    assert len(trained) == 4


def test_what_is_trained_is_counted() -> None:
    """r (in + out) for every expert, as for a Linear of its size."""
    model = add_adapters(pruned_moe("mixtral"), r=2, train=(), target_modules=["experts"])
    count = 2 * EXPERTS * 2 * ((16 + 2 * 24) + (24 + 16))
    own = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert trainable_share(model) == pytest.approx(count / own)


# -- files


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["mask_lora", "lora", "signed"])
def test_an_adapter_that_was_saved_is_the_same(adapter: str, family: str, tmp_path: Path) -> None:
    plain = pruned_moe(family)
    other = copy.deepcopy(plain)
    model = add_adapters(plain, adapter, r=2, rank_pattern={"experts.down_proj": 3})
    train(model, IDS)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(other, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    again = dict(sparse_layers(loaded))
    for name, layer in sparse_layers(model):
        assert all(torch.equal(x, y) for x, y in zip(layer.matrices(), again[name].matrices(), strict=True))
    assert all(torch.equal(mask, adapter_masks(loaded)[name]) for name, mask in adapter_masks(model).items())
    dense = make_moe(family)
    before = snapshot(dense)
    with pytest.raises(ValueError, match="are not zero"):
        load_adapter(dense, tmp_path)
    assert snapshot(dense) == before


@pytest.mark.parametrize("trained", [False, True], ids=["onto compiled blocks", "from compiled blocks"])
def test_files_are_those_of_the_model_whether_blocks_are_compiled(trained: bool, tmp_path: Path) -> None:
    def build(compiled: bool) -> nn.Module:
        plain = pruned_moe("gpt_oss", "batched_mm")
        for place in range(2 if compiled else 0):
            plain.model.layers[place] = torch.compile(plain.model.layers[place], backend="eager")
        return plain

    ranks = {"0.mlp.experts": 3, "0.self_attn.q_proj": 4}
    model = add_adapters(build(trained), r=2, train=("bias",), rank_pattern=ranks)
    found = {name: layer.matrices()[0].shape[-2] for name, layer in sparse_layers(model)}
    assert sorted(found.values()) == [2] * 9 + [3, 3, 4]
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path)
    loaded = load_adapter(build(not trained), tmp_path)
    assert {name: layer.matrices()[0].shape[-2] for name, layer in sparse_layers(loaded)} == found
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-9, atol=1e-12)


def test_an_adapter_of_other_experts_is_refused(tmp_path: Path) -> None:
    model = add_adapters(pruned_moe("mixtral"), r=2)
    save_adapter(model, tmp_path)
    other = pruned_moe("gpt_oss")
    with pytest.raises(ValueError, match="belongs to another model"):
        load_adapter(other, tmp_path)
    assert not [module for module in other.modules() if hasattr(module, "base_layer")]


def test_a_merged_model_is_a_plain_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = add_adapters(pruned_moe("qwen3_moe", "grouped_mm", torch.float32), r=2)
    train(model, IDS)
    merged = merge(model)
    merged.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(p, merged.get_parameter(n)) for n, p in plain.named_parameters())


# -- block by block


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("window", "adapter"), [("block", "mask_lora"), ("half", "scale_lora"), ("half", "signed")])
def test_reconstruct_fits_experts_through_their_adapters(window: str, adapter: str, family: str) -> None:
    model = make_moe(family).float()
    dense = copy.deepcopy(model)
    masks = prune(model, score="magnitude", progress=False)
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    batches = [{"input_ids": make_tokens(2, 12, vocab=WORDS, seed=seed)} for seed in range(3)]
    options = {"steps": 40, "learning_rate": 5e-3, "num_samples": 6, "progress": False, "r": 4, "adapter": adapter}
    alone = reconstruct(copy.deepcopy(model), batches, dense, masks, exclude_modules=["experts"], **options)
    done = reconstruct(model, batches, dense, masks, window=window, **options)
    assert done.after < 0.8 * done.before
    assert done.after < alone.after
    assert not [module for module in model.modules() if hasattr(module, "base_layer")]
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].view(torch.int32).any(), name
        if "experts" in name:
            assert all(not torch.equal(weight[e], before[name][e]) for e in range(EXPERTS)), name


# -- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "lora_prune", "lora_dropout": 0.1}, r"lora_dropout=0\.1 must be 0 for 'model.*exclude_modules"),
        ({"adapter": "lora", "lora_dropout": 0.1, "target_modules": ["experts"]}, r"lora_dropout=0\.1 must be 0"),
    ],
)
def test_what_experts_do_not_take_is_refused(options: dict[str, Any], message: str) -> None:
    plain = pruned_moe("mixtral")
    before = snapshot(plain)
    with pytest.raises(ValueError, match=message):
        add_adapters(plain, **options)
    assert snapshot(plain) == before
    assert not hasattr(plain, "peft_config")
    model = add_adapters(plain, **{**options, "target_modules": None}, exclude_modules=["experts"])
    assert not any("experts" in name for name, _ in sparse_layers(model))


def test_experts_without_data_and_shared_ones_are_refused() -> None:
    plain = pruned_moe("mixtral")
    plain.model.layers[1].mlp.experts.down_proj = plain.model.layers[0].mlp.experts.down_proj
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(ValueError, match=rf"the weight of {re.escape(repr(name))} is also that of others"):
        add_adapters(plain)
    plain = pruned_moe("mixtral")
    plain.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj' has no data"):
        add_adapters(plain, target_modules=["experts"])
    assert not hasattr(plain, "peft_config")
