"""Checkpoints written before the merge: loaded, inspected and exported as the merged model, to the bit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from perp_models import halve
from perp_trainers import GPT2, LLAMA, loader, make_module, make_trainer, pruning
from tiny import snapshot
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from versions import WEIGHTS_ONLY

from lightning_prune import CausalLM, PERPRetraining, load_merged_state
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
    own = {key: start + key.removeprefix(prefix) if key.startswith(prefix) else key for key in stored["state_dict"]}
    names = {key: names.get(key, name) for key, name in own.items()}
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


class WithTeacher(CausalLM):
    """A second model, whose adapters of PEFT are on the same layers, of the same ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
        self.teacher = get_peft_model(make_module(seed=3).model, config)


@pytest.mark.parametrize("known", [True, False], ids=["", "written by a version that did not say which model it was"])
@pytest.mark.parametrize("form", ["merged", "unmerged"])
def test_adapters_of_peft_on_another_model_stay_its_own(form: str, known: bool, tmp_path: Path) -> None:
    module = WithTeacher(config=LLAMA, learning_rate=1e-2, lr_schedule="constant")
    if not known:  # of the two the one whose layers the state names
        module.teacher.base_model.model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 32, bias=False)
    callbacks = [pruning(ignore=["teacher", "lm_head"]), PERPRetraining(r=2)]
    save = ModelCheckpoint(dirpath=tmp_path, filename="end")
    make_trainer(tmp_path, *callbacks, save, max_epochs=1).fit(module, loader())
    checkpoint = tmp_path / "end.ckpt" if form == "merged" else unmerged(tmp_path / "end.ckpt", tmp_path)
    if not known:
        stored = torch.load(checkpoint, weights_only=True)
        del stored["callbacks"]["PERPRetraining"]["attribute"]
        torch.save(stored, checkpoint)
    state, expected = load_merged_state(checkpoint), module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert inspect(checkpoint, progress=False).masks == 14
    with pytest.raises(
        ValueError, match="49 such as 'teacher.*load it with the class that wrote it" if known else "teach"
    ):
        export(checkpoint, tmp_path / "exported", progress=False)
    if known:
        loaded = WithTeacher.load_from_checkpoint(checkpoint, **WEIGHTS_ONLY)
        assert snapshot(loaded) == snapshot(module)
        other = WithTeacher(config=LLAMA)
        make_trainer(tmp_path).validate(other, loader(), ckpt_path=checkpoint, **WEIGHTS_ONLY, verbose=False)
        assert snapshot(other) == snapshot(module)
        with pytest.raises(ValueError, match=r"put PERPRetraining\(...\)"):
            make_trainer(tmp_path).fit(WithTeacher(config=LLAMA), loader(), ckpt_path=checkpoint, **WEIGHTS_ONLY)


def test_layers_are_known_by_their_whole_name(tmp_path: Path) -> None:
    class Named(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(OrderedDict(layer=nn.Linear(4, 4), block=nn.Sequential()))
            self.net.block.layer = nn.Linear(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    torch.manual_seed(0)
    module = Named()
    options = {"alpha_pattern": {"block.layer": 64}}
    save = ModelCheckpoint(dirpath=tmp_path, filename="end")
    perp = PERPRetraining(r=2, attribute="net", lora_options=options)
    make_trainer(tmp_path, pruning(), perp, save).fit(module, DataLoader(torch.randn(16, 4), batch_size=4))
    state = load_merged_state(unmerged(tmp_path / "end.ckpt", tmp_path, "net."))
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


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
