"""Adapters on disk: what comes back is what was saved, and nothing else takes it for a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokens, snapshot
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from perp_models import pruned, train
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_prune.perp import SparsePeftModel, adapter_masks, add_adapters, load_adapter, merge, save_adapter
from lightning_prune.perp.storage import CONFIG_FILE, MASKS_FILE, WEIGHTS_FILE

IDS = make_tokens(4, 16)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "lora_prune", "lora", None])
def test_round_trip(adapter: str | None, family: str, tmp_path: Path) -> None:
    parts = ("bias", "norm", "head") if family == "llama" else ("bias", "norm", "embedding")
    options: dict[str, Any] = {"r": 4, "use_rslora": True} if adapter in ("mask_lora", "lora") else {}
    model = add_adapters(pruned(family), adapter, train=parts, **options)
    train(model, IDS)
    save_adapter(model, tmp_path / "adapter")
    fresh = pruned(family)
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    assert train(loaded, IDS) == train(model, IDS)  # and training goes on as it would have
    if adapter not in ("lora", None):
        assert snapshot(merge(loaded)) == snapshot(merge(model))


def test_methods_of_peft_are_ours_and_options_survive(tmp_path: Path) -> None:
    model = add_adapters(pruned(), target_modules=["up_proj"], layers_to_transform=[1], rank_pattern={"up_proj": 3})
    train(model, IDS)
    model.save_pretrained(tmp_path, safe_serialization=True)
    loaded = SparsePeftModel.from_pretrained(pruned(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(TypeError, match="safe_serialization"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TypeError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert snapshot(model.merge_and_unload()) == snapshot(loaded.merge_and_unload())


def test_plain_peft_refuses_the_folder(tmp_path: Path) -> None:
    save_adapter(add_adapters(pruned()), tmp_path)
    attempts = (
        lambda: PeftModel.from_pretrained(pruned(), tmp_path),
        lambda: PeftConfig.from_pretrained(str(tmp_path)),
        lambda: AutoPeftModelForCausalLM.from_pretrained(str(tmp_path)),
        lambda: pruned().load_adapter(str(tmp_path)),
    )
    for attempt in attempts:
        with pytest.raises((KeyError, ValueError), match="load_adapter"):
            attempt()
    # Nor is there a file that a program which reads no type would take for a LoRA's weights.
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, MASKS_FILE}
    assert not {"r", "lora_alpha", "target_modules"} & json.loads((tmp_path / CONFIG_FILE).read_text()).keys()


def test_masks_are_those_of_training_not_the_zeros_of_the_base(tmp_path: Path) -> None:
    model = pruned()
    masks = {n: p != 0 for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n}
    name = "model.layers.0.mlp.up_proj.weight"
    position = tuple(masks[name].nonzero()[0].tolist())
    for m in (model, base := pruned()):
        with torch.no_grad():
            m.get_parameter(name)[position] = 0.0  # kept, and zero by chance
    wrapped = add_adapters(model, masks=masks)
    save_adapter(wrapped, tmp_path)
    assert adapter_masks(load_adapter(base, tmp_path))[name][position]


def damage_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["perp"].update(changes)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    change(state)
    save_file(state, folder / WEIGHTS_FILE)


def flip_mask(folder: Path) -> None:
    path = folder / MASKS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


KEY = "model.layers.0.mlp.up_proj.lora_A"
DAMAGE: list[tuple[Any, Any, type[Exception], str]] = [
    (make_llama, lambda f: None, ValueError, "call apply_masks"),
    (lambda: pruned(intermediate_size=64), lambda f: None, ValueError, "has shape"),
    (lambda: pruned(num_hidden_layers=1), lambda f: None, ValueError, "belong to another model"),
    (lambda: pruned(num_hidden_layers=3), lambda f: None, ValueError, "missing from the folder"),
    (lambda: pruned("gpt2"), lambda f: None, ValueError, "belong to another model"),
    (pruned, lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, "holds no adapter_config"),
    (pruned, lambda f: (f / WEIGHTS_FILE).unlink(), FileNotFoundError, "not saved completely"),
    (pruned, lambda f: (f / MASKS_FILE).unlink(), FileNotFoundError, "not saved completely"),
    (pruned, lambda f: (f / CONFIG_FILE).write_text("{"), ValueError, "is damaged"),
    (pruned, lambda f: (f / WEIGHTS_FILE).write_bytes(b"1234567890"), ValueError, "is damaged"),
    (pruned, flip_mask, ValueError, "is damaged"),
    (pruned, lambda f: damage_config(f, version=9), ValueError, "has version 9"),
    (pruned, lambda f: damage_config(f, adapter="mask"), ValueError, "adapter='mask' must be one of"),
    (pruned, lambda f: damage_config(f, options={"target_modules": ".*"}), ValueError, "no list of names"),
    (pruned, lambda f: damage_config(f, options={"r": 2, "target_modules": ["up_proj"]}), ValueError, "another model"),
    (pruned, lambda f: change_weights(f, lambda s: s.pop(KEY)), ValueError, "missing from the folder"),
    (pruned, lambda f: change_weights(f, lambda s: s.update(x=s[KEY].clone())), ValueError, "not in the model"),
]


@pytest.mark.parametrize(("build", "damage", "error", "message"), DAMAGE)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    build: Any, damage: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    saved = add_adapters(pruned())
    train(saved, IDS)
    save_adapter(saved, tmp_path)
    damage(tmp_path)
    model = build()
    before, modules = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before
    assert [type(m) for m in model.modules()] == modules
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_peft_is_sent_to_peft(tmp_path: Path) -> None:
    get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load it with peft\.PeftModel"):
        load_adapter(pruned(), tmp_path)


def test_saving_needs_a_folder_and_adapters(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_adapter(add_adapters(pruned()), tmp_path / "file")
    with pytest.raises(ValueError, match="call model = add_adapters"):
        save_adapter(pruned(), tmp_path)
