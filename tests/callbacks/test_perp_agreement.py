"""Adapters of an earlier fit are trained on where they are those that are asked for, and refused by name if not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from convolution_models import make_images, make_vision
from perp_models import halve
from perp_trainers import loader, make_module, make_trainer, pruning
from tiny import snapshot
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, PERPRetraining, prune
from lightning_prune.perp import add_adapters, load_adapter, save_adapter
from lightning_prune.perp.layers import sparse_layers


def left_on(path: Path, pruner: Any = None, **settings: Any) -> CausalLM:
    """A module with adapters of a fit that did not merge them."""
    module = make_module()
    if pruner is None:
        halve(module.model)
    others = [] if pruner is None else [pruner]
    make_trainer(path, *others, PERPRetraining(merge=False, **{"r": 2, **settings}), max_steps=1).fit(module, loader())
    return module


def go_on(path: Path, module: CausalLM, *others: Any, **settings: Any) -> set[str]:
    """Train on for a step, and say what has an adapter."""
    perp = PERPRetraining(merge=False, **{"r": 2, **settings})
    make_trainer(path, *others, perp, max_steps=1).fit(module, loader())
    return {name for name, _ in sparse_layers(module.model)}


QUERIES = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (QUERIES, {}, r"'model\.layers\.0\.mlp\.down_proj' has no adapter from an earlier fit, .* asks for one \(targ"),
        ({}, QUERIES, r"'model\.layers\.0\.mlp\.down_proj' has an adapter from an earlier fit, .* asks for none"),
        (QUERIES, {"target_modules": ["k_proj"]}, r"'model\.layers\.0\.self_attn\.k_proj' has no adapter .* for one"),
        ({}, {"lora_options": {"exclude_modules": ["q_proj"]}}, r"0\.self_attn\.q_proj' has an adapter .* none"),
        ({}, {"adapt_head": True}, r"'lm_head' has no adapter from an earlier fit, .* asks for one"),
        ({"lora_options": {"layers_to_transform": [0]}}, {}, r"layers\.1\.mlp\.down_proj' has no adapter"),
        ({}, {"lora_options": {"rank_pattern": {"k_proj": 3}}}, r"k_proj' .* has the rank 2, but .* 3 \(r"),
        ({}, {"lora_options": {"alpha_pattern": {"k_proj": 1}}}, r"k_proj' .* is scaled by 2, but .* 0\.5 \("),
        ({}, {"lora_options": {"use_rslora": True}}, r"made with use_rslora=False, but this PERPRetraining has True"),
        ({}, {"lora_options": {"init_lora_weights": "gaussian"}}, r"with init_lora_weights=True, .* has 'gaussian'"),
        ({"adapter": "lora_prune"}, {"adapter": "lora_prune", "lora_options": {"lora_dropout": 0.5}}, "dropout=0.0"),
        ({}, {"adapter": "hira"}, "made with adapter='mask_lora', but this PERPRetraining has 'hira'"),
        ({}, {"train": ("norm",)}, r"made with train=\['bias', 'norm'\], but this PERPRetraining has \['norm'\]"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.few_fast(4)
def test_others_than_those_that_are_asked_for_are_refused(
    first: dict[str, Any], then: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module = left_on(tmp_path, **first)
    before, records = snapshot(module), dict(vars(module.model.get_base_model()))
    with pytest.raises(ValueError, match=f"{message}.*merge what is there first"):
        go_on(tmp_path, module, **then)
    assert snapshot(module) == before
    assert vars(module.model.get_base_model()) == records


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {}),
        (QUERIES, {"target_modules": r".*\.q_proj"}),
        (QUERIES, {"target_modules": ["self_attn.q_proj"]}),
        ({}, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}),
        ({"lora_options": {"exclude_modules": ["q_proj"]}}, {"lora_options": {"exclude_modules": ".*q_proj"}}),
        ({"lora_options": {"rank_pattern": {"k_proj": 3}}}, {"lora_options": {"rank_pattern": {".*k_proj": 3}}}),
        ({"lora_alpha": 4}, {}),
        ({"adapt_head": True}, {"adapt_head": True}),
    ],
    ids=str,
)
@pytest.mark.few_fast(3)
def test_the_same_asked_for_in_other_words_are_trained_on(
    first: dict[str, Any], then: dict[str, Any], tmp_path: Path
) -> None:
    module = left_on(tmp_path, **first)
    layers = dict(sparse_layers(module.model))
    before = {name: layer.matrices()[1].detach().clone() for name, layer in layers.items()}
    assert go_on(tmp_path, module, **then) == layers.keys()
    assert all(layer is layers[name] for name, layer in sparse_layers(module.model))
    assert not any(torch.equal(layer.matrices()[1], before[name]) for name, layer in layers.items())


@pytest.mark.slow
def test_beside_a_pruner_its_targets_are_asked_for(tmp_path: Path) -> None:
    pruner = pruning(targets=["q_proj", "up_proj"])
    module = left_on(tmp_path, pruner)
    layers = {name for name, _ in sparse_layers(module.model)}
    assert len(layers) == 4
    assert go_on(tmp_path, module, pruner) == layers
    assert go_on(tmp_path, module) == layers  # what is pruned
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.down_proj' has no adapter from an earlier fit"):
        go_on(tmp_path, module, pruning())
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up_proj' has an adapter from an earlier fit"):
        go_on(tmp_path, module, pruning(targets=["q_proj"]))


@pytest.mark.slow
def test_dense_layers_may_have_an_adapter_or_none(tmp_path: Path) -> None:
    module = make_module()
    prune(module.model, score="magnitude", targets=["q_proj"], progress=False)
    module.model = add_adapters(module.model, r=2, target_modules=["q_proj", "k_proj"])
    assert len(go_on(tmp_path, module)) == 4


def test_adapters_of_ones_own_hand_have_its_default_rank(tmp_path: Path) -> None:
    module = make_module()
    halve(module.model)
    module.model = add_adapters(module.model)
    assert len(go_on(tmp_path, module, r=16)) == 14
    with pytest.raises(ValueError, match="made with r=16, but this PERPRetraining has 2"):
        go_on(tmp_path, module)


@pytest.mark.slow
def test_ranks_of_small_kernels_are_those_that_they_get(tmp_path: Path) -> None:
    class Vision(CausalLM):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(config={"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
                                     "num_hidden_layers": 1, "num_attention_heads": 1})  # fmt: skip
            self.model = model

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            return self.model(**batch).loss

    def fit(module: Vision, **settings: Any) -> None:
        images = make_images()
        data = DataLoader([{name: t[i] for name, t in images.items()} for i in range(8)], batch_size=4)
        make_trainer(tmp_path, PERPRetraining(merge=False, **settings), max_steps=1).fit(module, data)

    plain = make_vision("convnext")
    prune(plain, score="magnitude", progress=False)
    module = Vision(plain)
    for _ in range(2):
        fit(module)
    ranks = {layer.matrices()[0].shape[-2] for _, layer in sparse_layers(module.model)}
    assert len(ranks) > 1
    save_adapter(module.model, tmp_path / "adapter")
    plain = make_vision("convnext")
    prune(plain, score="magnitude", progress=False)
    module = Vision(load_adapter(plain, tmp_path / "adapter"))
    fit(module)
    with pytest.raises(ValueError, match=r"has the rank 8, but this PERPRetraining gives it 4 \(r"):
        fit(module, lora_options={"rank_pattern": {".*": 4}})
