"""PERPRetraining of mixtures: experts' adapters through prune, train, checkpoint, resume, merge and export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from experts_models import WORDS, make_moe
from lightning.pytorch.callbacks import ModelCheckpoint
from perp_trainers import Losses, loader, make_trainer, pruning
from tiny import make_tokens, snapshot
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from versions import WEIGHTS_ONLY, WeightAveraging

from lightning_prune import CausalLM, LinearSchedule, PERPRetraining, WeightPruning, export
from lightning_prune.perp.layers import sparse_layers

FAMILIES = ["mixtral", "gpt_oss"]  # out x in; in x out, with biases
IDS = make_tokens(2, 12, vocab=WORDS)


def make_module(family: str, **settings: Any) -> CausalLM:
    L.seed_everything(0, verbose=False)
    config = make_moe(family).config.to_dict() | {"initializer_range": 0.2}
    return CausalLM(config=config, learning_rate=1e-2, lr_schedule="constant", **settings)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits.clone()


class Seen(L.Callback):
    """Logits of the module that trains, by step, and the experts' adapters."""

    def __init__(self) -> None:
        self.logits: dict[int, Tensor] = {}
        self.experts: set[str] = set()
        self.moved = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.logits[trainer.global_step] = logits(pl_module.model)
        layers = {n: layer for n, layer in sparse_layers(pl_module.model) if "experts" in n}
        self.experts |= layers.keys()
        self.moved = sum(bool(layer.matrices()[1].any()) for layer in layers.values())


def fit(folder: Path, family: str, *others: L.Callback, pruner: WeightPruning | None = None, resume: Path | None = None,
        saving: dict[str, Any] | None = None, model: dict[str, Any] | None = None, perp: dict[str, Any] | None = None,
        **trainer: Any) -> tuple[CausalLM, WeightPruning, Seen, Losses]:  # fmt: skip
    module, seen, losses = make_module(family, **(model or {})), Seen(), Losses()
    pruner = pruner or pruning(score="kfac")
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=6, save_top_k=-1, **(saving or {}))
    callbacks = [pruner, PERPRetraining(**{"r": 4, **(perp or {})}), *others, seen, losses, save]
    make_trainer(folder, *callbacks, **{"max_epochs": 2, **trainer}).fit(module, loader(), ckpt_path=resume)
    return module, pruner, seen, losses


def assert_held(module: nn.Module, masks: dict[str, Tensor]) -> None:
    assert sum("experts" in name for name in masks) == 2 * 2
    for name, mask in masks.items():
        weight = module.get_parameter(name).detach()
        assert not (weight[~mask] != 0).any(), name
        assert not torch.signbit(weight[~mask]).any(), name


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", [None, LinearSchedule(0, 8, 4)], ids=["at once", "schedule"])
def test_a_whole_life(schedule: LinearSchedule | None, family: str, tmp_path: Path) -> None:
    def pruner() -> WeightPruning:
        return pruning(score="kfac", **({} if schedule is None else {"schedule": schedule}))

    module, pruned, seen, losses = fit(tmp_path, family, pruner=pruner())
    assert len(seen.experts) == seen.moved == 4
    assert min(losses.values[6:]) < min(losses.values[:6])
    assert_held(module, pruned.masks)
    assert not [name for name, _ in module.named_parameters() if "base_layer" in name or "lora_" in name]

    middle = CausalLM.load_from_checkpoint(tmp_path / "step=6.ckpt").train()
    torch.testing.assert_close(logits(middle.model), seen.logits[6], rtol=0, atol=0)
    resumed, again, _, _ = fit(tmp_path / "again", family, pruner=pruner(), resume=tmp_path / "step=6.ckpt")
    assert snapshot(resumed) == snapshot(module)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruned.masks.items())

    export(tmp_path / "step=6.ckpt", tmp_path / "out", progress=False)
    module.save_pretrained(tmp_path / "final")
    for folder, wanted in (("out", middle.model), ("final", module.model)):
        plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        assert snapshot(plain) == snapshot(wanted)


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        ({}, {"precision": "bf16-mixed"}),
        ({"dtype": "bfloat16"}, {"precision": "bf16-true"}),
        ({"gradient_checkpointing": True}, {"accumulate_grad_batches": 2}),
        ({}, {"gradient_clip_val": 0.1}),
    ],
    ids=["bf16-mixed", "bf16-true", "checkpointing", "clipped"],
)
def test_precisions_and_checkpointing(
    family: str, model: dict[str, Any], trainer: dict[str, Any], tmp_path: Path
) -> None:
    module, pruned, seen, losses = fit(tmp_path, family, model=model, **trainer)
    assert len(seen.experts) == seen.moved == 4
    assert sum(losses.values[6:]) < sum(losses.values[:6])
    assert_held(module, pruned.masks)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_activations_train_the_same(family: str, tmp_path: Path) -> None:
    found = [
        fit(tmp_path / str(checkpointing), family, model={"gradient_checkpointing": checkpointing})[0]
        for checkpointing in (False, True)
    ]
    for name, parameter in found[0].named_parameters():
        torch.testing.assert_close(found[1].get_parameter(name), parameter, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "q_proj"], ["layers.0.mlp.experts.down_proj"]], ids=str)
def test_targets_name_parameters_of_experts(targets: list[str], tmp_path: Path) -> None:
    module, pruned, seen, _ = fit(tmp_path, "mixtral", pruner=pruning(targets=targets))
    experts = [name for name in pruned.masks if "experts" in name]
    assert len(experts) == len(seen.experts) == len(targets)
    assert all(not module.get_parameter(name)[~mask].any() for name, mask in pruned.masks.items())


def test_an_allocation_names_one_expert(tmp_path: Path) -> None:
    name = "layers.0.mlp.experts.gate_up_proj"
    module, pruned, _, _ = fit(tmp_path, "gpt_oss", pruner=pruning(allocation={f"{name}.3": 0.75}), max_steps=2)
    mask = pruned.masks[f"model.model.{name}"]
    shares = [float((~part).double().mean()) for part in mask]
    assert shares[3] == 0.75
    assert max(shares[:3]) < 0.5  # all others make up for it
    assert not module.get_parameter(f"model.model.{name}")[~mask].any()


def test_weights_only_and_a_model_pruned_before(tmp_path: Path) -> None:
    first, masks, _, _ = fit(tmp_path / "first", "gpt_oss")
    module = copy.deepcopy(first)
    seen, keeping = Seen(), WeightPruning(score="keep", progress=False)
    for name, callbacks in {"alone": [PERPRetraining(r=2)], "beside": [keeping, PERPRetraining(r=2)]}.items():
        save = ModelCheckpoint(dirpath=tmp_path / name, every_n_train_steps=3, save_weights_only=True)
        make_trainer(tmp_path, *callbacks, seen, save, max_steps=3).fit(module, loader())
        assert_held(module, masks.masks)
        assert len(seen.experts) == 4
        loaded = CausalLM.load_from_checkpoint(save.best_model_path, **WEIGHTS_ONLY)
        assert snapshot(loaded) == snapshot(module)


def test_an_average_is_merged_as_an_average(tmp_path: Path) -> None:
    module, pruned, _, _ = fit(tmp_path, "mixtral", WeightAveraging())
    assert_held(module, pruned.masks)
    loaded = CausalLM.load_from_checkpoint(tmp_path / "step=12.ckpt", **WEIGHTS_ONLY)
    assert_held(loaded, pruned.masks)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_it_trains_the_same(family: str, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        module, losses = make_module(family), Losses()
        if compiled:
            module.compile(backend="aot_eager")
        trainer = make_trainer(tmp_path, pruning(), PERPRetraining(r=4), losses, max_steps=4)
        trainer.fit(module, loader())
        found.append(losses.values)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
