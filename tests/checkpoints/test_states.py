"""Checkpoints written before the merge: loaded, inspected and exported as the merged model, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from perp_models import halve
from perp_trainers import GPT2, LLAMA, loader, make_module, make_trainer, pruning
from tiny import snapshot
from transformers import AutoModelForCausalLM
from versions import WEIGHTS_ONLY

from lightning_prune import CausalLM, PERPRetraining
from lightning_prune.checkpoints.export import export
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.cli import main
from lightning_prune.errors import CheckpointError

SETTINGS: dict[str, dict[str, Any]] = {
    "mask_lora": {},
    "scale_lora": {"perp": {"adapter": "scale_lora"}},
    "lora_prune": {"perp": {"adapter": "lora_prune", "r": 4}},
    "norms alone": {"perp": {"adapter": None}},
    "gpt2": {"config": GPT2, "perp": {"lora_alpha": 3}},
    "bf16": {"trainer": {"precision": "bf16-true"}},
    "scalings": {"perp": {"lora_options": {"use_rslora": True, "alpha_pattern": {"q_proj": 7}}}},
    "pruned before": {"pruner": False},
}


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[CausalLM, Path]]:
    """A module merged at fit end and the checkpoint of right before that, neither to be changed; each made once."""
    return cache(lambda name: _fitted(tmp_path_factory.mktemp("fit"), name))


def _fitted(path: Path, name: str) -> tuple[CausalLM, Path]:
    setting = SETTINGS[name]
    module, pruner = make_module(setting.get("config", LLAMA)), pruning()
    if not setting.get("pruner", True):
        halve(module.model)
    callbacks = [pruner] if setting.get("pruner", True) else []
    save = ModelCheckpoint(dirpath=path, filename="end")
    perp = PERPRetraining(**setting.get("perp", {}))
    make_trainer(path, perp, *callbacks, save, max_epochs=1, **setting.get("trainer", {})).fit(module, loader())
    return module, path / "end.ckpt"


def unmerged(checkpoint: Path, folder: Path, prefix: str = "model.") -> Path:
    """A copy of a checkpoint in the form of shards: base weights and adapters under PEFT's names."""
    stored = torch.load(checkpoint, weights_only=True)
    perp = next(state for key, state in stored["callbacks"].items() if key.startswith("PERPRetraining"))
    parts, start = perp.pop("unmerged"), f"{prefix}base_model.model."
    names = {key.replace(start, prefix).replace(".base_layer.", "."): key for key in parts if "lora_" not in key}
    names = {key: names.get(key, start + key.removeprefix(prefix)) for key in stored["state_dict"]}
    stored["state_dict"] = {**{names[key]: t for key, t in stored["state_dict"].items()}, **parts}
    for key, state in stored["callbacks"].items():
        if key.startswith("WeightPruning"):
            state["masks"] = {names[name]: mask for name, mask in state["masks"].items()}
    torch.save(stored, folder / "unmerged.ckpt")
    return folder / "unmerged.ckpt"


FORMS = [
    (name, form) for name in SETTINGS for form in ("merged", "unmerged") if (name, form) != ("norms alone", "unmerged")
]


@pytest.mark.few_fast(5)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_is_the_merged_model(name: str, form: str, fits: Any, tmp_path: Path) -> None:
    module, checkpoint = fits(name)
    merged = snapshot(module.model)
    if form == "unmerged":
        checkpoint = unmerged(checkpoint, tmp_path)
    keys = torch.load(checkpoint, weights_only=True)["state_dict"].keys()
    assert any("lora_A" in key for key in keys) == (form == "unmerged")

    loaded = CausalLM.load_from_checkpoint(checkpoint, weights_only=True)
    if name == "bf16":
        loaded.to(torch.bfloat16)
    assert snapshot(loaded.model) == merged
    assert type(loaded.model) is type(module.model)

    found = export(checkpoint, tmp_path / "exported", progress=False)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    state = {n: p.detach() for n, p in module.model.named_parameters()}
    assert all(torch.equal(p, state[n]) for n, p in exported.named_parameters())
    assert found.sparsity == inspect(tmp_path / "exported", progress=False).sparsity == pytest.approx(0.5, abs=0.01)
    assert found.masks == (None if name == "pruned before" else 14 if name != "gpt2" else 8)
    assert found.resurrected == 0


def test_merged_models_have_the_exact_sparsity_they_had_before(tmp_path: Path) -> None:
    module, pruner = make_module(), pruning(score="wanda", sparsity=None, pattern="2:4")
    make_trainer(tmp_path, pruner, PERPRetraining(), max_epochs=1).fit(module, loader())
    module.save_pretrained(tmp_path / "model")
    found = inspect(tmp_path / "model", progress=False)
    assert found.sparsity == 0.5
    assert found.pattern == "2:4"


@pytest.mark.parametrize("form", ["merged", "unmerged"])
def test_inspect_and_export_take_both_forms(form: str, fits: Any, tmp_path: Path) -> None:
    _, checkpoint = fits("mask_lora")
    if form == "unmerged":
        checkpoint = unmerged(checkpoint, tmp_path)
    found = inspect(checkpoint, progress=False)
    assert found.masks == 14
    assert found.resurrected == 0
    assert found.sparsity == pytest.approx(0.5, abs=0.01)
    assert main(["inspect", str(checkpoint)]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "exported")]) == 0


@pytest.mark.parametrize("form", ["merged", "unmerged"])
def test_validation_takes_it_and_training_says_what_is_missing(form: str, fits: Any, tmp_path: Path) -> None:
    module, checkpoint = fits("mask_lora")
    if form == "unmerged":
        checkpoint = unmerged(checkpoint, tmp_path)
    expected = make_trainer(tmp_path).validate(module, loader(), verbose=False)
    other = make_module(seed=5)
    found = make_trainer(tmp_path).validate(other, loader(), ckpt_path=checkpoint, **WEIGHTS_ONLY, verbose=False)
    assert found == expected
    with pytest.raises(ValueError, match=r"put PERPRetraining\(...\)"):
        make_trainer(tmp_path).fit(make_module(), loader(), ckpt_path=checkpoint, **WEIGHTS_ONLY)


@pytest.mark.parametrize("damage", ["callback", "adapter", "matrix", "layers", "mask"])
def test_what_cannot_be_merged_is_refused(damage: str, fits: Any, tmp_path: Path) -> None:
    checkpoint = unmerged(fits("mask_lora")[1], tmp_path)
    stored = torch.load(checkpoint, weights_only=True)
    key = next(k for k in stored["callbacks"] if k.startswith("PERPRetraining"))
    state, message = stored["callbacks"][key], "damaged"
    if damage == "callback":
        del stored["callbacks"][key]
        message = "did not make"
    elif damage == "adapter":
        state["settings"]["adapter"], message = "lora", "save_adapter"
    elif damage == "matrix":
        del stored["state_dict"][next(k for k in stored["state_dict"] if "lora_A" in k)]
        message = "0 matrices lora_A"
    elif damage == "layers":
        state["layers"], message = {}, "knows no adapter"
    else:
        pruner = next(k for k in stored["callbacks"] if k.startswith("WeightPruning"))
        next(iter(stored["callbacks"][pruner]["masks"].values()))["crc32"] += 1
    torch.save(stored, checkpoint)
    with pytest.raises(CheckpointError, match=message):
        CausalLM.load_from_checkpoint(checkpoint, weights_only=True)
    with pytest.raises(ValueError, match="merge the adapters" if damage == "callback" else message):
        export(checkpoint, tmp_path / "exported", progress=False)
    assert not (tmp_path / "exported").exists()
