"""Adapters on disk: what comes back is what was saved, and nothing else takes it for a LoRA."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from perp_models import pruned, train
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_tokens, snapshot
from torch import nn

from lightning_prune.perp import SparsePeftModel, adapter_masks, add_adapters, load_adapter, merge, save_adapter
from lightning_prune.perp.storage import CONFIG_FILE, check_sum

IDS = make_tokens(4, 16)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_adapter(add_adapters(pruned("llama")), "~/adapter")
    load_adapter(pruned("llama"), "~/adapter")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()} == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.few_fast(4)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "hira", "lora_prune", "lora", None])
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
    assert {p.name.split("-")[0] for p in tmp_path.iterdir()} == {CONFIG_FILE, "perp_adapter", "perp_masks"}
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


def stored(folder: Path, what: str) -> Path:
    (path,) = folder.glob(f"perp_{what}*.safetensors")
    return path


def damage_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["perp"].update(changes)
    config["perp"]["crc32"] = check_sum(config["perp"])
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def change_options(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    damage_config(folder, options={**config["perp"]["options"], **changes})


def change_file(folder: Path, what: str, change: Any) -> None:
    """Change a file, and give the configuration its new check sum."""
    change(path := stored(folder, what))
    files = json.loads((folder / CONFIG_FILE).read_text())["perp"]["files"]
    files[what]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    damage_config(folder, files=files)


def change_weights(folder: Path, change: Any) -> None:
    def changed(path: Path) -> None:
        state = load_file(path)
        change(state)
        save_file(state, path)

    change_file(folder, "adapter", changed)


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def change_digit(folder: Path) -> None:
    path = folder / CONFIG_FILE
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))


KEY = "model.layers.0.mlp.up_proj.lora_A"
UP = r"model\.layers\.0\.mlp\.up_proj"
HANGS = "(.*.*.*.*.*.*.*.*.*.*)*x"
DAMAGE: list[tuple[Any, Any, type[Exception], str]] = [
    (make_llama, lambda f: None, ValueError, "call apply_masks"),
    (lambda: pruned(intermediate_size=64), lambda f: None, ValueError, "has shape"),
    (lambda: pruned(num_hidden_layers=1), lambda f: None, ValueError, "belongs to another model"),
    (lambda: pruned(num_hidden_layers=3), lambda f: None, ValueError, "missing from the folder"),
    (lambda: pruned("gpt2"), lambda f: None, ValueError, "belongs to another model"),
    (pruned, lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, "holds no adapter_config"),
    (pruned, lambda f: stored(f, "adapter").unlink(), FileNotFoundError, "not saved completely"),
    (pruned, lambda f: stored(f, "masks").unlink(), FileNotFoundError, "not saved completely"),
    (pruned, lambda f: (f / CONFIG_FILE).write_text("{"), ValueError, "is damaged"),
    (pruned, lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), ValueError, "is damaged"),
    (pruned, lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe{"), ValueError, "is damaged"),
    (pruned, change_digit, ValueError, "check sum is another"),
    (pruned, lambda f: stored(f, "adapter").write_bytes(b"1234567890"), ValueError, "is damaged"),
    (pruned, lambda f: flip(stored(f, "adapter"), -1), ValueError, "check sum is another"),
    (pruned, lambda f: flip(stored(f, "adapter"), -5000), ValueError, "check sum is another"),
    (pruned, lambda f: flip(stored(f, "masks"), -1), ValueError, "check sum is another"),
    (pruned, lambda f: cut(stored(f, "adapter")), ValueError, "check sum is another"),
    (pruned, lambda f: change_file(f, "adapter", cut), ValueError, "is damaged"),
    (pruned, lambda f: change_file(f, "masks", cut), ValueError, "is damaged"),
    (pruned, lambda f: change_file(f, "masks", lambda path: flip(path, -1)), ValueError, "is damaged"),
    (pruned, lambda f: damage_config(f, version=9), ValueError, "has version 9"),
    (pruned, lambda f: damage_config(f, adapter="mask"), ValueError, "adapter='mask' must be one of"),
    (pruned, lambda f: damage_config(f, train=["all"]), ValueError, "unknown part 'all'"),
    (pruned, lambda f: damage_config(f, files={"adapter": {"name": "../x", "sha256": ""}}), ValueError, "'files' must"),
    (pruned, lambda f: damage_config(f, options={"target_modules": ".*"}), ValueError, "no list of names"),
    (pruned, lambda f: damage_config(f, options={"r": 2, "target_modules": ["up_proj"]}), ValueError, "is no module"),
    (pruned, lambda f: change_options(f, target_modules=[HANGS]), ValueError, "is no module"),
    (pruned, lambda f: change_options(f, rank_pattern={HANGS: 4}), ValueError, "is not run"),
    (pruned, lambda f: change_options(f, alpha_pattern={HANGS: 4}), ValueError, "is not run"),
    (pruned, lambda f: change_options(f, rank_pattern={UP: -4}), ValueError, "has -4 for"),
    (pruned, lambda f: change_options(f, alpha_pattern={UP: 1e30}), ValueError, "has 1e[+]30 for"),
    (pruned, lambda f: change_options(f, rank_pattern={"up_proj": 4}), ValueError, "by its whole name"),
    (pruned, lambda f: change_options(f, r=10**9), ValueError, "the rank 1000000000, but"),
    (pruned, lambda f: change_options(f, r=-4), ValueError, "r=-4 must be"),
    (pruned, lambda f: change_options(f, r="4"), ValueError, "r='4' must be"),
    (pruned, lambda f: change_options(f, lora_alpha=float("nan")), ValueError, "lora_alpha=nan must be"),
    (pruned, lambda f: change_options(f, lora_alpha=1e30), ValueError, r"lora_alpha=1e\+30 must be"),
    (pruned, lambda f: change_options(f, lora_alpha=[8]), ValueError, r"lora_alpha=\[8\] must be"),
    (pruned, lambda f: change_options(f, init_lora_weights="pissa"), ValueError, "init_lora_weights='pissa' must be"),
    (pruned, lambda f: change_options(f, use_dora=True), ValueError, "the option 'use_dora'"),
    (
        pruned,
        lambda f: change_options(f, auto_mapping={"parent_library": "os"}),
        ValueError,
        "the option 'auto_mapping'",
    ),
    (pruned, lambda f: change_options(f, megatron_core="os"), ValueError, "the option 'megatron_core'"),
    (pruned, lambda f: change_weights(f, lambda s: s.pop(KEY)), ValueError, "missing from the folder"),
    (pruned, lambda f: change_weights(f, lambda s: s.update(x=s[KEY].clone())), ValueError, "not in the model"),
    (pruned, lambda f: change_weights(f, lambda s: s.update({KEY: s[KEY].int()})), ValueError, "is damaged"),
    (pruned, lambda f: change_weights(f, lambda s: s.update({KEY: s[KEY][0].clone()})), ValueError, "has shape"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained adapter, not to be changed."""
    folder, model = tmp_path_factory.mktemp("saved"), add_adapters(pruned(), r=4, lora_alpha=8)
    train(model, IDS)
    save_adapter(model, folder)
    return folder


@pytest.mark.few_fast(12)
@pytest.mark.parametrize(("build", "damage", "error", "message"), DAMAGE)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    build: Any, damage: Any, error: type[Exception], message: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    model = build()
    before, modules = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before
    assert [type(m) for m in model.modules()] == modules
    assert all(p.requires_grad for p in model.parameters())


def test_patterns_are_stored_as_names_and_nothing_that_hangs_is_run(tmp_path: Path) -> None:
    options = {
        "target_modules": r".*layers\.\d+\.mlp\.(up|down)_proj",
        "rank_pattern": {r"layers\.0.*up_proj": 3},
        "alpha_pattern": {"down_proj": 5},
        "r": 2,
    }
    model = add_adapters(pruned(), **options)
    train(model, IDS)
    save_adapter(model, tmp_path)
    found = json.loads((tmp_path / CONFIG_FILE).read_text())["perp"]["options"]
    assert found["target_modules"] == [f"model.layers.{i}.mlp.{m}_proj" for i in (0, 1) for m in ("down", "up")]
    assert found["rank_pattern"] == {r"model\.layers\.0\.mlp\.up_proj": 3}
    loaded = load_adapter(pruned(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert snapshot(merge(loaded)) == snapshot(merge(model))


OPERATIONS = ("replace", "rename", "unlink", "open", "fsync", "mkdir")


def killed_at(number: int, work: Any) -> bool:
    """Do work in a process that is killed right before its n-th file operation; whether that came."""
    child = os.fork()
    if not child:
        left = number

        def strike(name: str, original: Any) -> Any:
            def operation(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return original(*args, **kwargs)

            return operation

        for name in OPERATIONS:
            setattr(os, name, strike(name, getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_the_old_or_the_new_adapter_loads_wherever_saving_was_killed(tmp_path: Path) -> None:
    def check_sum_of(model: nn.Module) -> int:
        return zlib.crc32(logits(model).numpy().tobytes())

    first, second = add_adapters(pruned(), r=2), add_adapters(pruned(), r=3)
    train(first, IDS)
    train(second, IDS)
    wanted = {check_sum_of(first), check_sum_of(second)}
    found, number = [], 0
    while True:
        folder = tmp_path / str(number)
        save_adapter(first, folder)
        killed = killed_at(number, lambda: save_adapter(second, folder))  # noqa: B023
        found.append(check_sum_of(load_adapter(pruned(), folder)))
        assert found[-1] in wanted
        # The next attempt leaves nothing of those before it.
        save_adapter(second, folder)
        assert len([path for path in folder.iterdir() if "perp" in path.name]) == 2
        number += 1
        if not killed:
            break
    assert number > 8
    assert set(found) == wanted
    assert found == sorted(found, key=found.index)  # first the old one, from one moment on the new one


def test_a_save_that_fails_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = add_adapters(pruned(), r=2), add_adapters(pruned(), r=3)
    save_adapter(first, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def fail(path: Path, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fail)  # of the configuration, when all else is written
    with pytest.raises(OSError, match="no space"):
        save_adapter(second, tmp_path)
    assert calls
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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
