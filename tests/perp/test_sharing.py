"""Weights that more than one place of a model computes with: what was trained is what is merged, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from perp_models import halve, make_gpt2, pruned, train
from perp_trainers import make_trainer, pruning
from tiny import make_llama, make_tokens, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_prune import PERPRetraining
from lightning_prune.perp import add_adapters, merge, reconstruct
from lightning_prune.perp.layers import sparse_layers

IDS = make_tokens(4, 12)
UP = "model.layers.0.mlp.up_proj"


def tie_parameters(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def tie_memory(model: Any) -> None:
    other = model.model.layers[1].mlp.up_proj
    other.weight = nn.Parameter(model.model.layers[0].mlp.up_proj.weight.data)


def tie_layers(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj


def tie_blocks(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


TIES = [tie_parameters, tie_memory, tie_layers, tie_blocks]


@pytest.mark.parametrize("tie", TIES)
def test_layers_that_share_a_weight_are_refused(tie: Any) -> None:
    model: Any = pruned()
    tie(model)
    before, modules = snapshot(model), [type(m) for m in model.modules()]
    pattern = r"'model\.layers\.0.*model\.layers\.1.*exclude_modules"
    with pytest.raises(ValueError, match=pattern):
        add_adapters(model)
    with pytest.raises(ValueError, match=pattern):
        reconstruct(model, [IDS], make_llama(), progress=False, num_samples=4)
    assert (snapshot(model), [type(m) for m in model.modules()]) == (before, modules)
    if tie is not tie_blocks:
        adapted = add_adapters(model, exclude_modules=["up_proj"])
        train(adapted, IDS)
        expected = adapted(input_ids=IDS).logits
        torch.testing.assert_close(merge(adapted)(input_ids=IDS).logits, expected)


def test_a_head_tied_to_the_embeddings_gets_no_adapter() -> None:
    for model in (pruned(tie_word_embeddings=True), make_gpt2()):
        halve(model)
        with torch.no_grad():
            model.get_output_embeddings().weight[0, 0] = 0.0
        with pytest.raises(ValueError, match=r"'lm_head' is also that of others \(.*embed|'lm_head'.*wte"):
            add_adapters(model, target_modules=["lm_head"])


def test_a_layer_is_trained_whole_or_through_an_adapter() -> None:
    model = pruned()
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = 0.0
    with pytest.raises(ValueError, match=r"'lm_head' is trained whole by train=\('head',\)"):
        add_adapters(model, target_modules=["lm_head"], train=("head",))


class Beside(L.LightningModule):
    """The model's first up_proj is used by a layer of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = make_llama()
        self.own = nn.Linear(1, 1, bias=False)
        self.own.weight = self.model.model.layers[0].mlp.up_proj.weight

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_weight_that_the_lightning_module_shares_is_refused_too(tmp_path: Path) -> None:
    module = Beside()
    with pytest.raises(ValueError, match=r"up_proj' is also that of others \(model\.model\..*, own\.weight\)"):
        make_trainer(tmp_path, PERPRetraining(), pruning()).fit(module, DataLoader(IDS))
    assert isinstance(module.model, LlamaForCausalLM)


def test_shared_biases_are_trained_as_one() -> None:
    model: Any = pruned(mlp_bias=True)
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.bias = first.bias
    adapted = add_adapters(model)
    train(adapted, IDS)
    expected = adapted(input_ids=IDS).logits
    merged: Any = merge(adapted)
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected)
    assert second.bias is first.bias
    assert first.bias.any()
    with pytest.raises(ValueError, match=r"'mlp\.up_proj\.bias' of the block 'model\.layers\.0' is one parameter"):
        reconstruct(model, [IDS], make_llama(mlp_bias=True), progress=False, num_samples=4)


class Functional(nn.Module):
    """Multiplies with the weight of another layer by itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora"])
def test_a_layer_used_functionally_trains_and_merges_as_one_called(adapter: str) -> None:
    models = []
    for functional in (False, True):
        model: Any = pruned()
        if functional:
            for block in model.model.layers:
                block.mlp.up_proj = Functional(block.mlp.up_proj)
        torch.manual_seed(0)
        adapted = add_adapters(model, adapter, r=4)
        losses = train(adapted, IDS)
        expected = adapted(input_ids=IDS).logits
        merged: Any = merge(adapted)
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected)
        assert not list(sparse_layers(merged))
        models.append((losses, [p.detach() for p in merged.parameters()]))
    (called, weights), (used, others) = models
    assert used == pytest.approx(called, rel=1e-5)
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora_prune", "lora"])
def test_a_dense_adapter_is_seen_by_functional_use(adapter: str) -> None:
    adapted = add_adapters(pruned(), adapter, r=4)
    train(adapted, IDS)
    layer = dict(sparse_layers(adapted))[UP]
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(F.linear(x, layer.weight), layer(x))
    with adapted.disable_adapter():
        assert layer.weight is layer.base_weight
