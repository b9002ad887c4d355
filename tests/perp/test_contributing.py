"""The adapter of CONTRIBUTING.md, as it stands there, is held to what the built-in ones are held to."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from perp_models import pruned, train, zeros
from perp_trainers import loader, make_module, make_trainer, pruning
from tiny import make_tokens, snapshot
from torch import Tensor, nn

from lightning_prune import CausalLM, PERPRetraining
from lightning_prune.errors import CheckpointError
from lightning_prune.perp import (
    CombinedLinear,
    add_adapters,
    load_adapter,
    merge,
    reconstruct,
    register_adapter,
    save_adapter,
)
from lightning_prune.perp import layers as variants

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
IDS = make_tokens(4, 16)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS, use_cache=False).logits
    return y


@pytest.fixture
def _registered() -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", TEXT.partition("## An adapter of your own")[2].partition("\n## ")[0], re.S
    )
    assert len(code.splitlines()) < 50
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"model": pruned()})


@pytest.mark.slow
@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 4])
def test_trains_and_merges_without_losing_a_zero(rank: int, family: str, dtype: torch.dtype) -> None:
    plain = pruned(family, dtype)
    before, weights, start = zeros(plain), {n: p.detach().clone() for n, p in plain.named_parameters()}, logits(plain)
    model = add_adapters(plain, "signed", train=(), r=rank, lora_alpha=6)
    assert torch.equal(logits(model), start)
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    # What the page says it computes, in float64 from the trained matrices.
    expected = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CombinedLinear):
            a, b = (m.detach().double() for m in layer.matrices())
            product = (b @ a).t() if family == "gpt2" else b @ a
            name = name.removeprefix("base_model.model.") + ".weight"
            expected[name] = weights[name].double() * (6 / rank * product).exp()
    assert expected.keys() == before.keys()
    y = logits(model)
    merged = merge(model)
    assert torch.equal(logits(merged), y)
    for name, zero in zeros(merged).items():
        assert bool((zero | ~before[name]).all()), name
        weight = merged.get_parameter(name).detach()
        assert not torch.equal(weight, weights[name])
        torch.testing.assert_close(weight.double(), expected[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.usefixtures("_registered")
def test_gradients_are_those_of_the_plain_formula() -> None:
    model = add_adapters(pruned(), "signed", r=2).double()
    train(model, IDS, steps=1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    exact = copy.deepcopy(model)
    exact.zero_grad()
    for layer in exact.modules():
        if isinstance(layer, CombinedLinear):
            layer.forward = plain_forward(layer)
    exact(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in exact.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def plain_forward(layer: CombinedLinear) -> Any:
    (scaling,) = layer.scaling.values()

    def forward(x: Tensor) -> Tensor:
        a, b = layer.matrices()
        return nn.functional.linear(x, layer.base_weight * (scaling * b @ a).exp())

    return forward


@pytest.mark.usefixtures("_registered")
def test_comes_back_from_its_folder_only_where_it_is_registered(tmp_path: Path) -> None:
    model = add_adapters(pruned(), "signed", r=1)
    train(model, IDS)
    save_adapter(model, tmp_path)
    loaded = load_adapter(pruned(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert train(loaded, IDS) == train(model, IDS)  # and training goes on as it would have
    assert snapshot(merge(loaded)) == snapshot(merge(model))
    del variants._VARIANTS["signed"]
    fresh = pruned()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=r"adapter='signed' must be one of .* registered first"):
        load_adapter(fresh, tmp_path)
    assert snapshot(fresh) == before


class Unmerged(L.Callback):
    """Keeps what a checkpoint is that nobody merges when it is written, as under FSDP2."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks[:2]}  # type: ignore[attr-defined]
        self.parts = copy.deepcopy({"state_dict": pl_module.state_dict(), "callbacks": states})


@pytest.mark.slow
@pytest.mark.usefixtures("_registered")
def test_in_a_trainer(tmp_path: Path) -> None:
    module, save = make_module(), ModelCheckpoint(dirpath=tmp_path, filename="end")
    perp, trained = PERPRetraining(adapter="signed", r=1, train=()), Unmerged()
    callbacks = [pruning(), perp, trained, save]
    start = snapshot(module.model)
    make_trainer(tmp_path, *callbacks, max_epochs=1).fit(module, loader())
    merged = snapshot(module.model)
    assert merged != start
    assert type(module.model).__module__.startswith("transformers.")
    for name, mask in callbacks[0].masks.items():
        assert bool((module.get_parameter(name)[~mask].view(torch.int32) == 0).all()), name
    # The checkpoint was written before the merge, as the merged model; others hold what is to be merged yet.
    unmerged = torch.load(tmp_path / "end.ckpt", weights_only=True) | trained.parts
    torch.save(unmerged, tmp_path / "unmerged.ckpt")
    for name in ("end", "unmerged"):
        loaded = CausalLM.load_from_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
        assert snapshot(loaded.model) == merged
    del variants._VARIANTS["signed"]
    loaded = CausalLM.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert snapshot(loaded.model) == merged
    # The name means something only where it is registered.
    with pytest.raises(CheckpointError, match=r"adapter='signed' must be one of .* registered first"):
        CausalLM.load_from_checkpoint(tmp_path / "unmerged.ckpt", weights_only=True)


@pytest.mark.usefixtures("_registered")
def test_block_by_block() -> None:
    dense = pruned()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, zero in zeros(dense).items():
            dense.get_parameter(name)[zero] = 0.05
    before = zeros(model)
    done = reconstruct(model, [{"input_ids": IDS}], dense, adapter="signed", train=(), steps=20, progress=False)
    assert done.after < done.before
    assert all(bool((zero | ~before[name]).all()) for name, zero in zeros(model).items())


def test_nan_where_pruned_stays_out_of_outputs_and_gradients() -> None:
    class Divided(CombinedLinear):
        adapter = "divided"

        @staticmethod
        def combine(weight: Tensor, product: Tensor) -> Tensor:
            return weight * (weight + product) / weight  # 0 / 0 where pruned

    register_adapter(Divided)
    model = add_adapters(pruned(), "divided", train=())
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    assert all(bool(p.isfinite().all()) for p in merge(model).parameters())


def variant(name: Any, function: Any) -> type[CombinedLinear]:
    return type("Mine", (CombinedLinear,), {"adapter": name, "combine": staticmethod(function)})


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        (None, lambda w, p: w + p, "must be the name of the variant"),
        ("", lambda w, p: w + p, "must be the name of the variant"),
        ("mask_lora", lambda w, p: w + p, "is the name of a built-in variant"),
        ("mine", lambda w, p: (w + p).sum(), "shape and dtype of weight"),
        ("mine", lambda w, p: (w + p).double(), "shape and dtype of weight"),
        ("mine", lambda w, p: None, "shape and dtype of weight"),
        ("mine", lambda w, p: w.mul_(2) + p, "changes weight in place"),
        ("mine", lambda w, p: w * 1, "no gradient by product"),
        ("mine", lambda w, p: w + p - p.mean() + p.mean(0) * 0 + p.flip(0) * 0, "element by element"),
        ("mine", lambda w, p: w * p, "must be weight where product is zero"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_registered(name: Any, function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_adapter(variant(name, function))
    assert "mine" not in variants.variant_names()


@pytest.mark.parametrize("layer", ["signed", nn.Linear, None])
def test_only_a_subclass_is_taken(layer: Any) -> None:
    with pytest.raises(TypeError, match="subclass of lightning_prune"):
        register_adapter(layer)


def test_one_without_a_function_says_so() -> None:
    with pytest.raises(ValueError, match="Mine must define combine"):
        register_adapter(type("Mine", (CombinedLinear,), {"adapter": "mine"}))


def test_one_that_starts_elsewhere_brings_its_own_values() -> None:
    class Ones(CombinedLinear):
        adapter, scaled = "ones", False

        @staticmethod
        def combine(weight: Tensor, product: Tensor) -> Tensor:
            return weight * product

        @torch.no_grad()
        def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
            for matrix in self.matrices():
                nn.init.constant_(matrix, self.r[adapter_name] ** -0.5)

    register_adapter(Ones)
    model = pruned()
    start = logits(model)
    torch.testing.assert_close(logits(add_adapters(model, "ones", r=4)), start, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has no effect on adapter='ones'"):
        add_adapters(pruned(), "ones", lora_alpha=8)
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1 must be 0 for adapter='ones'"):
        add_adapters(pruned(), "ones", lora_dropout=0.1)
