"""Run a recipe in seconds: a tiny model and text in place of what needs a hub, a GPU or time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import TINY

from lightning_prune import CausalLM, TextDataModule
from lightning_prune.cli import main

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
_TALKS = (("Who?", "He.", "And?", "She."), ("Is it?", "No.", "So?", "A."))
_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
_OVERRIDES = {
    "max_steps": "2",
    "accelerator": "cpu",
    "devices": "1",
    "strategy": "auto",
    "precision": "32-true",
    "limit_val_batches": "1",
    "enable_progress_bar": "false",
}
_SCHEDULES = {
    "lightning_prune.CubicSchedule": {"start": 0, "end": 2, "every": 1},
    "lightning_prune.ELSA": {"step": 1, "every_n_steps": 1},
    "lightning_prune.OneShot": {"step": 1},
}


def write_inputs(folder: Path) -> None:
    """Write a text, conversations, and two model folders with a tokenizer and its chat template: dense, and 2:4."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "no", "dog", "there", "at", "all", "that", "day"]
    drawn = torch.randint(len(words), (8000,), generator=torch.Generator().manual_seed(0)).tolist()
    lines = (" ".join(words[i] for i in drawn[start : start + 12]) + ".\n" for start in range(0, len(drawn), 12))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    talks = [zip(("user", "assistant") * 2, talk, strict=True) for talk in _TALKS]
    rows = [{"messages": [{"role": role, "content": word} for role, word in talk]} for talk in talks]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8), encoding="utf-8")
    data = TextDataModule(str(folder / "text.txt"), vocab_size=320, block_size=32, cache_dir=str(folder / "cache"))
    data.setup("fit")
    data.tokenizer.chat_template = _TEMPLATE
    torch.manual_seed(0)
    module = CausalLM(config=TINY)
    module.tokenizer = data.tokenizer
    module.save_pretrained(folder / "dense")
    for layer in module.model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not module.model.lm_head:
            layer.weight.data[:, 0::2] = 0
    module.save_pretrained(folder / "2to4")


def shortened(recipe: Path, tiny: Path, folder: Path) -> Path:
    """Return the recipe with what needs a hub, a GPU or time replaced; everything else as it is."""
    config = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    if "config" in model:
        model["config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    else:
        sparse = config["trainer"]["callbacks"][0]["init_args"].get("score") == "keep"
        model["model"] = data["tokenizer"] = str(tiny / ("2to4" if sparse else "dense"))
    data |= {
        "source": str(tiny / ("chats.jsonl" if "messages_field" in data else "text.txt")),
        "name": None,
        "split": "train",
        "validation": None,
        "block_size": 32,
        "batch_size": 2,
        "cache_dir": str(tiny / "cache"),
    }
    trainer = config["trainer"]
    trainer["default_root_dir"] = str(folder)
    if "val_check_interval" in trainer:  # a checkpoint is written after a validation: at the last batch here as there
        assert trainer["val_check_interval"] * 5 == trainer["max_steps"] * trainer["accumulate_grad_batches"]
        trainer["val_check_interval"] = 2 * trainer["accumulate_grad_batches"]
    for callback in trainer["callbacks"]:
        _shorten(callback["init_args"], tiny, folder)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _shorten(settings: dict[str, Any], tiny: Path, folder: Path) -> None:
    """Shorten what one callback does."""
    if "num_samples" in settings:
        settings["num_samples"] = 4
    if "reconstruct" in settings:
        settings["reconstruct"] |= {"steps": 2, "num_samples": 4}
    if "schedule" in settings:
        settings["schedule"]["init_args"] = _SCHEDULES[settings["schedule"]["class_path"]]
    if "target" in settings:
        settings |= {"target": 0.8, "start": 0, "end": 2, "every_n_steps": 1, "picture": str(folder / "shrink.png")}
    if "distill_from" in settings:
        settings["distill_from"] = str(tiny / "dense")


def fit_shortened(recipe: Path, tiny: Path, folder: Path) -> Path:
    """Run two steps of a recipe through the command line; return the checkpoint."""
    options = [f"--trainer.{option}={value}" for option, value in _OVERRIDES.items()]
    assert main(["fit", "--config", str(shortened(recipe, tiny, folder)), *options]) == 0
    return next(folder.rglob("*.ckpt"))
