import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from forking import start
from safetensors.torch import save_file
from tiny import TINY

from lightning_prune import CausalLM
from lightning_prune.callbacks.fit_end import check_saving
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.cli import _measure, main, parser_of
from lightning_prune.pruning.masks import pack_masks
from lightning_prune.results import Table
from lightning_prune.text.data import EMBEDDED

# LightningCLI notices that these tests pass arguments while pytest has some of its own.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(tmp_path):
    """A training of two steps; model and data class are the defaults."""
    text = tmp_path / "text.txt"
    text.write_text(EMBEDDED["austen"].read_text(encoding="utf-8")[20_000:40_000], encoding="utf-8")
    data = {"source": str(text), "vocab_size": 320, "block_size": 32, "batch_size": 2}
    pruning = {"class_path": "WeightPruning", "init_args": {"score": "magnitude", "sparsity": 0.5}}
    content = {
        "seed_everything": 1,
        "model": {"init_args": {"config": TINY}},
        "data": {"init_args": data | {"cache_dir": str(tmp_path / "cache")}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "limit_val_batches": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "run"),
            "callbacks": [pruning],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def run(*args):
    command = [sys.executable, "-c", "import sys; from lightning_prune.cli import main; sys.exit(main())", *args]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def write_model(folder):
    weight = torch.ones(8, 8)
    weight[:, ::2] = 0
    save_file({"layers.0.fc.weight": weight, "embed.weight": torch.ones(4, 8)}, folder / "model.safetensors")
    return folder


# -- inspect


def test_inspect_prints_tables_and_json(tmp_path, capsys):
    write_model(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "50.00% of 64 prunable weights" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    out = capsys.readouterr()
    plain = json.loads(out.out)
    assert plain == inspect(tmp_path).to_dict()
    assert out.err == ""
    assert main(["inspect", str(tmp_path), "--json", "--all"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 2


def test_inspect_fails_where_masks_are_broken(tmp_path, capsys):
    masks = pack_masks({"fc.weight": torch.zeros(4, 4, dtype=torch.bool)})
    checkpoint = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"fc.weight": torch.eye(4)},
        "callbacks": {"WeightPruning": {"masks": masks}},
    }
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert main(["inspect", str(tmp_path / "a.ckpt")]) == 1
    assert "4 of 16 masked weights are not zero" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_inspect_starts_without_lightning_and_transformers(tmp_path):
    write_model(tmp_path)
    code = (
        "import sys\nfrom lightning_prune.cli import main\n"
        f"assert main(['inspect', {str(tmp_path)!r}, '--json']) == 0\n"
        "heavy = {'lightning', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# -- errors, version, help


def test_a_target_is_a_number_or_a_mapping():
    for text, target in (("0.9", 0.9), ("100000", 100000), ('{"bytes": 5, "x": "y"}', {"bytes": 5, "x": "y"})):
        assert parser_of("shrink").parse_args(["a", "b", "--target", text]).target == target


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect"], "required: path"),
        (["export", "a.ckpt", "b", "--over"], "unrecognized arguments: --over"),
        (["--nonsense"], "nonsense"),
        (["inspect", "/no/such/path"], "does not exist"),
        (["inspect", "x", "--nonsense"], "nonsense"),
        (["sparsify"], "invalid choice"),
        (["quickstart", "--seed", "x"], "seed"),
        (["shrink", "a", "b", "--target", "half"], "must be a number, or JSON such as"),
        (["shrink", "a", "b", "--target", "true"], "must be a number, or JSON such as"),
        (["quickstart", "--steps", "0"], "steps=0 must be a whole number of at least 1"),
        (["fit", "--config", "/no/such.yaml"], "File does not exist"),
        (["fit"], "Exactly one of model and config"),
        (["fit", "--model.learning_rat", "1"], "learning_rat"),
        (["fit", "--model.learning_rate", "fast"], "learning_rate"),
        (["fit", "--model.learning_rate", "-1", "--model.model", "gpt2"], "must be above 0"),
        (["fit", "--trainer.callbacks+=WeightPruning", "--trainer.callbacks.score=best"], "best"),
        (["fit", "--trainer.callbacks+=WeightPruning", "--trainer.callbacks.sparcity=0.5"], "sparcity"),
        (["fit", "--trainer.callbacks+=Prunning"], "no class Prunning is known; give its import path"),
        (["validate", "--ckpt_path", "/no/such.ckpt", "--model.config", json.dumps(TINY)], "no/such.ckpt"),
        (["--trainer.max_steps=3", "fit"], "'--trainer.max_steps=3' must follow the command"),
        (["--model.config", "{}", "fit"], "'--model.config' must follow the command"),
        (["--config", "a.yaml"], "'--config' must follow the command"),
        (["fit", "--confg", "a.yaml"], "whose --help lists them"),
        (["predict", "--save_pretrained=a", "--model.config", json.dumps(TINY)], "save_pretrained='a' is of fit"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if args[0] == "validate":
        args = [*args, "--data.vocab_size=320", "--data.block_size=32", f"--data.cache_dir={tmp_path}"]
    assert main(args) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("lightning-prune: error: ")
    assert message in lines[0]
    assert "NoneType" not in lines[0]
    assert "class_path entry" not in lines[0]  # what jsonargparse tried
    assert len(set(lines[0].split(": "))) == len(lines[0].split(": "))  # once for each type that it tried


def test_a_file_before_the_command_needs_a_section_for_it(config, capsys):
    assert main(["--config", str(config), "fit"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "outside of a section 'fit'" in line
    assert "lightning-prune fit --config FILE" in line


@pytest.mark.slow
@pytest.mark.parametrize("wider", [False, True])
def test_a_checkpoint_of_another_model_is_told_in_one_line(wider, config, tmp_path, capsys):
    module = L.LightningModule()
    if wider:
        module = CausalLM(config=TINY | {"vocab_size": 320, "intermediate_size": 64})
        module.hparams.clear()
    else:
        module.other = torch.nn.Linear(2, 2)
    saved = {"state_dict": module.state_dict(), "pytorch-lightning_version": L.__version__, "global_step": 0}
    torch.save(saved | {"loops": {}, "epoch": 0, "optimizer_states": [], "lr_schedulers": []}, tmp_path / "other.ckpt")
    assert main(["fit", "--config", str(config), "--ckpt_path", str(tmp_path / "other.ckpt")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lightning-prune: error: the checkpoint is of another model: ")
    assert ("6 weights" if wider else "23 weights") in line
    assert len(line) < 500


@pytest.mark.slow
def test_the_process_prints_no_traceback():
    done = run("inspect", "/no/such/path")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("LIGHTNING_PRUNE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="does not exist"):
        main(["inspect", "/no/such/path"])


def test_errors_that_are_nobodys_input_are_not_hidden(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("lightning_prune.checkpoints.inspection.open_checkpoint", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["inspect", "x"])


def test_a_traceback_is_offered_where_another_package_has_raised(monkeypatch, capsys):
    """Messages of this one say all there is to say, of whatever type they are."""
    assert main(["quickstart", "--steps", "0"]) == 2
    assert "TRACEBACK" not in capsys.readouterr().err
    monkeypatch.setattr("lightning_prune.checkpoints.inspection.open_checkpoint", lambda path: json.loads("x"))
    assert main(["inspect", "x"]) == 2
    assert "(LIGHTNING_PRUNE_TRACEBACK=1 shows where)" in capsys.readouterr().err


def test_letters_that_an_output_does_not_have_are_escaped(monkeypatch, tmp_path):
    """It ended with an error at the first of them, after the work."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    (tmp_path / "Präzision").mkdir()
    assert main(["inspect", str(write_model(tmp_path / "Präzision"))]) == 0
    sys.stdout.flush()
    assert "Pr\\xe4zision" in written.getvalue().decode().replace("\n", "")


def test_results_are_on_disk_before_they_are_shown(monkeypatch, tmp_path):
    """`| head` takes less than all, and Ctrl-C may come."""

    def evaluate(model):
        return SimpleNamespace(tables=lambda: [Table("A", ("b",), [("c",)])], to_dict=lambda: {"a": 1})

    def closed(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr("rich.console.Console.print", closed)
    with pytest.raises(BrokenPipeError):
        _measure(evaluate, {"model": "a", "output": [str(tmp_path / "results.json")]})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}


def test_a_file_that_is_no_configuration(tmp_path, capsys):
    """jsonargparse says all that is in it, and of bytes not which file they are in."""
    for content in ("It is a truth universally acknowledged " * 1000, "- 1", ""):
        (tmp_path / "novel.txt").write_text(content)
        assert main(["fit", "--config", str(tmp_path / "novel.txt")]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "--config file must hold settings by name" in line
        assert line.endswith(repr(content[:60].strip()))
    (tmp_path / "model.bin").write_bytes(b"\x00\xff" * 100)
    assert main(["fit", "--config", str(tmp_path / "model.bin")]) == 2
    assert "a file is not UTF-8 text ('utf-8' codec" in capsys.readouterr().err


def test_the_module_runs_as_the_command_does(monkeypatch, capsys):
    """It did nothing, and ended well."""
    monkeypatch.setattr(sys, "argv", ["lightning-prune", "--version"])
    with pytest.warns(RuntimeWarning, match="found in sys.modules"), pytest.raises(SystemExit, match="0"):
        runpy.run_module("lightning_prune.cli", run_name="__main__")
    assert version("lightning-prune") in capsys.readouterr().out


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert version("lightning-prune") in capsys.readouterr().out
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "inspect", "export", "quickstart"):
        assert command in text
    assert main([]) == 2
    assert "inspect" in capsys.readouterr().err
    assert main(["fit", "--help"]) == 0
    assert "--trainer.max_steps" in capsys.readouterr().out


def test_help_says_defaults_that_equal_true_and_false():
    texts = {name: " ".join(parser_of(name).format_help().split()) for name in ("shrink", "quickstart")}
    assert "on the smaller model. Default 1." in texts["shrink"]
    assert "layers that lose inputs. Default on." in texts["shrink"]
    assert "give the same result. Default 0." in texts["quickstart"]
    assert "False" not in texts["shrink"]  # of a flag


# -- Lightning's commands


def test_fit_validate_and_export(config, tmp_path, capsys):
    assert main(["fit", "--config", str(config), "--save_pretrained", str(tmp_path / "model")]) == 0
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    inspection = inspect(checkpoint)
    assert (inspection.sparsity, inspection.masks, inspection.resurrected) == (0.5, 14, 0)
    assert f"lightning-prune evaluate {tmp_path / 'model'} --text FILE" in capsys.readouterr().out
    assert inspect(tmp_path / "model").sparsity == 0.5
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| score | magnitude |" in card
    assert "| val_perplexity | " in card

    capsys.readouterr()
    # The architecture comes from the checkpoint.
    data = yaml.safe_load(config.read_text())["data"]["init_args"]
    options = [f"--data.{name}={value}" for name, value in data.items()]
    trainer = ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=2", "--trainer.logger=false"]
    trainer.append(f"--trainer.default_root_dir={tmp_path / 'other'}")
    assert main(["validate", "--ckpt_path", str(checkpoint), *options, *trainer]) == 0
    assert "val_perplexity" in capsys.readouterr().out

    module = CausalLM.load_from_checkpoint(checkpoint, weights_only=True)
    module.save_pretrained(tmp_path / "saved")
    assert main(["export", str(checkpoint), str(tmp_path / "exported")]) == 0
    assert inspect(tmp_path / "exported").sparsity == 0.5
    for file in (f for f in (tmp_path / "saved").iterdir() if f.name not in ("README.md", "sparsity.json")):
        assert (tmp_path / "exported" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_resume_from_the_command_line(config, tmp_path):
    # As Lightning allows, a file for all commands may come before the command.
    content = {"fit": yaml.safe_load(config.read_text())}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["--config", str(tmp_path / "all.yaml"), "fit"]) == 0
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    command = ["fit", "--config", str(config), "--ckpt_path", str(checkpoint), "--trainer.max_steps=4"]
    assert main(command) == 0
    resumed = next(path for path in (tmp_path / "run").rglob("*.ckpt") if "step=4" in path.name)
    inspection = inspect(resumed)
    assert (inspection.sparsity, inspection.resurrected) == (0.5, 0)


@pytest.mark.slow
def test_a_checkpoint_that_no_command_line_wrote(config, tmp_path, capsys):
    """Its hyper-parameters name no class; the model's class is the configured one."""
    import lightning as L

    module = CausalLM(config=TINY)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert main(["validate", "--config", str(config), "--ckpt_path", str(tmp_path / "a.ckpt")]) == 0


MODULE = """
import lightning as L, torch

class Toy(L.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.fc = torch.nn.Linear(width, width)
    def training_step(self, batch, batch_idx):
        return self.fc(batch).square().mean()
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 8), batch_size=2)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


VALIDATION = """
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.fc(batch).square().mean())
"""


@pytest.mark.slow
@pytest.mark.parametrize("validation", ["", VALIDATION], ids=["no validation", "no data for validation"])
def test_any_module_and_no_data_module(validation, tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_module_of_the_test.py").write_text(MODULE + validation)
    monkeypatch.delitem(sys.modules, "toy_module_of_the_test", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = [
        "--model=toy_module_of_the_test.Toy",
        "--data=null",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        "--trainer.callbacks+=WeightPruning",
        "--trainer.callbacks.score=wanda",
        "--trainer.callbacks.num_samples=4",
        "--trainer.logger=false",
    ]
    assert main(["fit", *options, "--save_pretrained", "model"]) == 2  # it has no such method
    capsys.readouterr()
    assert main(["fit", *options]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (hint,) = re.findall(r"lightning-prune (.*)", capsys.readouterr().out)  # for it there is no export and no text
    assert hint == f"inspect {checkpoint}"
    assert main(hint.split()) == 0
    assert inspect(checkpoint).resurrected == 0
    assert inspect(checkpoint).sparsity == 0.5


def test_a_folder_that_nothing_can_be_saved_to_is_refused_before_training(config, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    assert main(["fit", "--config", str(config), "--save_pretrained", str(tmp_path / "thesis")]) == 2
    assert "holds other things than a model (no config.json); choose" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize("place", ["here", "disk", "own", "runs"])
def test_a_folder_that_a_model_is_moved_into_is_not_refused(place, tmp_path, monkeypatch):
    """`save_pretrained` writes into what it cannot exchange, and leaves what is beside a model."""
    folder, access = tmp_path / "out", os.access
    folder.mkdir()
    if place == "here":
        monkeypatch.chdir(folder)
    elif place == "disk":  # such as a volume of a container
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    elif place == "own":  # where the folder around it is another user's
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
        make = tempfile.mkdtemp

        def denied(suffix, prefix, folder):
            if Path(folder) == tmp_path:
                raise PermissionError(13, "Permission denied")
            return make(suffix, prefix, folder)

        monkeypatch.setattr(tempfile, "mkdtemp", denied)
    else:
        (folder / "checkpoint-10").mkdir()
        (folder / "config.json").write_text("{}")
    module = CausalLM(config=TINY)
    check_saving(module, str(folder))
    module.save_pretrained(folder)
    assert (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_a_file_that_says_where_fit_saves_serves_the_other_commands(config, tmp_path, capsys):
    content = yaml.safe_load(config.read_text()) | {"save_pretrained": str(tmp_path / "model")}
    config.write_text(yaml.safe_dump(content))
    assert main(["validate", "--config", str(config)]) == 0
    assert "validate changes no weights, and saves none" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_where_the_model_is_when_it_cannot_be_saved(config, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CausalLM, "save_pretrained", full)
    assert main(["fit", "--config", str(config), "--save_pretrained", str(tmp_path / "model")]) == 2
    (kept,) = (tmp_path / "run").rglob("*.ckpt")
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in line
    assert str(kept) in line


@pytest.mark.slow
def test_the_model_that_training_begins_with_is_not_written_over(config, tmp_path, capsys):
    content = yaml.safe_load(config.read_text())
    folder = tmp_path / "models" / "dense"
    CausalLM(config={**TINY, "vocab_size": 320}).model.save_pretrained(folder)
    content["model"]["init_args"] = {"model": str(folder)}
    config.write_text(yaml.safe_dump(content))
    before = (folder / "model.safetensors").read_bytes()
    for target in (folder, folder.parent):
        assert main(["fit", "--config", str(config), "--save_pretrained", str(target)]) == 2
        assert "would be lost" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def interruptible(*args):
    """The command line in a process whose parent may have been told to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(list(args)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_exits_130(config, tmp_path):
    content = yaml.safe_load(config.read_text())
    content["trainer"] |= {"max_steps": 1_000_000, "limit_val_batches": 0}
    content["model"]["init_args"]["lr_schedule"] = "constant"
    config.write_text(yaml.safe_dump(content))
    process = start(interruptible, "fit", "--config", str(config), environment=ENVIRONMENT, log=tmp_path / "log")
    saved = Path(tmp_path / "run" / "config.yaml")
    deadline = time.monotonic() + 240
    while not saved.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    error = (tmp_path / "log").read_text()
    assert process.exitcode == 130, error
    assert "Traceback" not in error
