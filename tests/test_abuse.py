"""What a careless or hostile user may do: a clear error, a status, and nothing lost.

Cases that belong to one module are with its tests; here are those that cross several, and whole processes.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import forking
import lightning as L
import pytest
import torch
import yaml
from measured_models import make_models
from tiny import TINY, make_llama, make_tokens, snapshot
from versions import WEIGHTS_ONLY

import lightning_prune.checkpoints.export
import lightning_prune.evaluation.evaluate
from lightning_prune import (
    CausalLM,
    OneShot,
    PERPRetraining,
    PruningAwarePretraining,
    TextDataModule,
    WeightPruning,
    compress,
    prune,
    prune_structured,
)
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.checkpoints.mask_files import export_masks, load_masks
from lightning_prune.checkpoints.sources import existing_path
from lightning_prune.cli import main
from lightning_prune.errors import CalibrationError
from lightning_prune.evaluation.tasks import read_tasks
from lightning_prune.quickstart import quickstart
from lightning_prune.ranks import ShortOfMemoryError
from lightning_prune.results import KIND, write_results
from lightning_prune.structure.folders import check_replaceable

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.skipif(sys.platform == "win32", reason="processes and signals of POSIX"),
    pytest.mark.xdist_group("abuse"),  # one process imports everything for all
]


def configuration(folder: Path, **pruning: Any) -> dict[str, Any]:
    """What ``lightning-prune fit`` reads: two steps on a little text."""
    data = {"source": str(folder / "text.txt"), "vocab_size": 320, "block_size": 32, "batch_size": 2}
    init = {"score": "magnitude", "progress": False, **pruning}
    return {
        "seed_everything": 1,
        "model": {"init_args": {"config": TINY, "lr_schedule": "constant"}},
        "data": {"init_args": data | {"cache_dir": str(folder / "cache")}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "limit_val_batches": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder / "run"),
            "callbacks": [{"class_path": "WeightPruning", "init_args": init}],
        },
    }


def write_config(folder: Path, content: dict[str, Any]) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / "config.yaml")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Lightning checkpoint of a pruned model."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, WeightPruning(score="magnitude", progress=False))
    trainer.fit(CausalLM(config=TINY), loader())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def loader():
    rows = [{"input_ids": row} for row in make_tokens(4, 8)]
    return torch.utils.data.DataLoader(rows, batch_size=2)


def make_trainer(folder: Path, *callbacks: L.Callback, steps: int = 1) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip


def one_error(capsys, args, message):
    """The command fails with status 2 and one line that says `message`."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1, lines
    assert message in lines[0]


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["half", "-0.1", "true"])
def test_sparsity_in_a_file(value, tmp_path, capsys):
    """As YAML reads it: a text, a number out of range, a truth value."""
    content = configuration(tmp_path, sparsity=yaml.safe_load(value))
    (tmp_path / "text.txt").write_text("x " * 2000)
    one_error(capsys, ["fit", "--config", write_config(tmp_path, content)], "sparsity")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "sparsity=nan"), (-0.1, "sparsity=-0.1"), (True, "sparsity=True"), (math.inf, "sparsity=inf")],
)
def test_sparsity_of_the_callback(value, message):
    with pytest.raises(ValueError, match=message):
        WeightPruning(sparsity=value)


BOOLS = {
    "sequential": lambda no, files: WeightPruning(sequential=no),
    "merge": lambda no, files: PERPRetraining(merge=no),
    "adapt_head": lambda no, files: PERPRetraining(adapt_head=no),
    "second_order": lambda no, files: PruningAwarePretraining(0.5, second_order=no),
    "compensate": lambda no, files: prune_structured(make_llama(), [], target=0.5, compensate=no),
    "overwrite": lambda no, files: export_masks(files / "model", files / "old", overwrite=no),
    "overwrite ": lambda no, files: check_replaceable(files / "old", overwrite=no),
    "fit": lambda no, files: compress(str(files / "model"), str(files / "old"), "austen", fit=no),
    "permute": lambda no, files: compress(str(files / "model"), str(files / "old"), "austen", permute=no),
}


@pytest.mark.parametrize("name", BOOLS)
def test_a_word_in_the_place_of_true_or_false(name, tmp_path):
    """Which would count as true."""
    with pytest.raises(ValueError, match=f"^{name.strip()}='no' must be True or False"):
        BOOLS[name]("no", tmp_path)


@pytest.mark.parametrize("sparsity", [0, 1])
def test_the_ends_of_the_range_train(sparsity, tmp_path):
    """Nothing pruned, and everything: both are what was asked for."""
    module, pruning = CausalLM(config=TINY), WeightPruning(score="wanda", sparsity=sparsity, num_samples=2)
    make_trainer(tmp_path, pruning).fit(module, loader())
    assert pruning.sparsity == sparsity
    zeros = [float((p == 0).float().mean()) for n, p in module.named_parameters() if "_proj" in n]
    assert zeros == [sparsity] * 14
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_layer_named_twice_is_pruned_once():
    """By the same pattern, by two patterns, and by its name and its type."""
    expected = prune(make_llama(), score="magnitude", targets=["q_proj"], progress=False)
    for targets in (["q_proj", "q_proj"], ["q_proj", "layers.*.q_proj"], ["layers.0.self_attn.q_proj", "q_proj"]):
        found = prune(make_llama(), score="magnitude", targets=targets, progress=False)
        assert found.keys() == expected.keys()
        assert all(torch.equal(mask, expected[name]) for name, mask in found.items())


def test_a_layer_with_two_sparsities_is_refused_or_decided():
    """Two entries of an allocation that match the same layers, and differ."""
    model = make_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="q_proj"):
        prune(model, score="magnitude", allocation={"q_proj": 0.5, "self_attn.q_proj": 0.25}, progress=False)
    assert snapshot(model) == before


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "word"])
def test_texts_of_nothing_and_of_one_token(content, files, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(content)
    content = configuration(tmp_path)
    content["data"]["init_args"]["tokenizer"] = str(files.dense)
    del content["data"]["init_args"]["vocab_size"]
    capsys.readouterr()
    assert main(["fit", "--config", write_config(tmp_path, content)]) == 2
    error = capsys.readouterr().err
    assert str(text) in error or "fewer than one block" in error
    assert "Traceback" not in error
    one_error(capsys, ["evaluate", files.dense, "--text", text, "--seq_len", 8], "text=")
    with pytest.raises(ValueError, match=r"empty|holds no text|fewer than one block"):
        TextDataModule(str(text), tokenizer=str(files.dense), block_size=8, cache_dir=str(tmp_path)).setup("fit")


def test_calibration_on_one_token_is_refused(files):
    """A sample of one token predicts nothing, so there is no gradient."""
    model = make_llama()
    before = snapshot(model)
    with pytest.raises(CalibrationError, match="predict"):
        prune(model, [{"input_ids": torch.tensor([[3]])}], score="gblm", num_samples=1, progress=False)
    assert snapshot(model) == before


def test_calibration_batches_of_the_wrong_kind(tmp_path):
    """Bare tensors, where CausalLM takes dicts."""
    module = CausalLM(config=TINY)
    before = snapshot(module)
    pruning = WeightPruning(score="gblm", calibration=[make_tokens(2, 8)], num_samples=2, progress=False)
    with pytest.raises(ValueError, match="input_ids"):
        make_trainer(tmp_path, pruning).fit(module, loader())
    assert snapshot(module) == before


def test_folders_and_files_that_are_not_there():
    with pytest.raises(FileNotFoundError, match="tasks="):
        read_tasks(["./none.jsonl"])
    with pytest.raises(FileNotFoundError, match="model="):
        existing_path("./none", "model")
    with pytest.raises(ValueError, match="steps=0"):
        quickstart(steps=0)


# -- damaged and hostile files ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_truncated_model_is_refused_by_every_command(files, tmp_path, capsys):
    folder = tmp_path / "model"
    files.model.save_pretrained(folder)
    files.tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "text.txt").write_text("x " * 2000)
    content = configuration(tmp_path)
    content["model"]["init_args"] = {"model": str(folder)}
    one_error(capsys, ["inspect", folder], "model.safetensors")
    one_error(capsys, ["export", folder, tmp_path / "out"], "model.safetensors")
    one_error(capsys, ["evaluate", folder, "--text", files.text], "model.safetensors")
    one_error(capsys, ["benchmark", files.pruned, "--dense", folder], "model.safetensors")
    one_error(capsys, ["fit", "--config", write_config(tmp_path, content)], str(folder))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("cache",)) == [
        "config.yaml",
        "model",
        "text.txt",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 0.5])
def test_resuming_from_a_damaged_checkpoint(keep, checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("x " * 2000)
    data = checkpoint.read_bytes()
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(data[: int(len(data) * keep)])
    config = write_config(tmp_path, configuration(tmp_path))
    one_error(capsys, ["fit", "--config", config, "--ckpt_path", damaged], "damaged.ckpt")
    one_error(capsys, ["evaluate", damaged, "--text", tmp_path / "text.txt"], "damaged.ckpt")
    one_error(capsys, ["export", damaged, tmp_path / "m.safetensors", "--masks_only"], "damaged.ckpt")


def test_masks_of_another_model_stop_a_resume_before_training(checkpoint, tmp_path):
    stored = torch.load(checkpoint, weights_only=True)
    (key,) = [key for key in stored["callbacks"] if key.startswith("WeightPruning")]
    other = make_trainer(tmp_path, WeightPruning(score="magnitude", progress=False))
    other.fit(CausalLM(config=TINY | {"intermediate_size": 64}), loader())
    other.save_checkpoint(tmp_path / "other.ckpt")
    stored["callbacks"][key] = torch.load(tmp_path / "other.ckpt", weights_only=True)["callbacks"][key]
    torch.save(stored, tmp_path / "mixed.ckpt")
    trainer = make_trainer(tmp_path, WeightPruning(score="magnitude", progress=False), steps=3)
    with pytest.raises(ValueError, match=r"the mask of .*mlp.* has shape \(64, 32\), the parameter \(48, 32\)"):
        trainer.fit(CausalLM(config=TINY), loader(), ckpt_path=tmp_path / "mixed.ckpt", **WEIGHTS_ONLY)
    assert trainer.global_step <= 1  # that of the checkpoint


class Bomb:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["state", "masks", "hyper_parameters", "bin", "metadata", "masks file"])
def test_no_command_runs_what_is_in_a_file(place, checkpoint, files, tmp_path, capsys):
    bomb = Bomb(f"touch {tmp_path}/exploded")
    (tmp_path / "text.txt").write_text("x " * 2000)
    stored = torch.load(checkpoint, weights_only=True)
    path = tmp_path / "bomb.ckpt"
    if place == "state":
        torch.save({"state_dict": bomb, "pytorch-lightning_version": "2.6"}, path)
    elif place == "masks":
        stored["callbacks"]["WeightPruning"] = {"masks": bomb}
        torch.save(stored, path)
    elif place == "hyper_parameters":
        stored["hyper_parameters"]["x"] = bomb
        torch.save(stored, path)
    elif place == "metadata":
        path.mkdir()
        (path / ".metadata").write_bytes(pickle.dumps(bomb))
    elif place == "masks file":
        path.write_bytes(pickle.dumps(bomb))
        with pytest.raises(ValueError, match=r"bomb\.ckpt"):
            load_masks(path)
    else:
        path = tmp_path / "folder"
        files.model.config.save_pretrained(path)
        files.tokenizer.save_pretrained(path)
        torch.save({"model.norm.weight": bomb}, path / "pytorch_model.bin")
    config = write_config(tmp_path, configuration(tmp_path))
    commands = [
        ["inspect", path],
        ["export", path, tmp_path / "out"],
        ["evaluate", path, "--text", tmp_path / "text.txt"],  # loads as benchmark does
    ]
    if path.is_file():
        commands.append(["export", path, tmp_path / "out", "--masks_only"])
    if place in ("state", "hyper_parameters"):
        commands.append(["fit", "--config", config, "--ckpt_path", path])
    elif place == "bin":
        commands.append(["fit", "--config", config, "--model.config", "null", "--model.model", path])
    for command in commands:
        capsys.readouterr()
        assert main([str(part) for part in command]) == 2, command
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out").exists()
    if place != "metadata":  # the bomb is one: it goes off where somebody does load it
        _explode(path if path.is_file() else path / "pytorch_model.bin")
        assert (tmp_path / "exploded").exists()


def _explode(path):
    try:
        torch.load(path, weights_only=False)
    except Exception:
        pickle.loads(path.read_bytes())


# -- memory and disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"score": "gblm"}, "gradient_device='cpu'"),
        ({"score": "kfac", "update": "obs"}, "sequential=True"),
        ({"score": "wanda"}, "smaller calibration batches"),
    ],
)
def test_out_of_memory_in_calibration(score, message, tmp_path):
    """As CUDA raises it, after some samples have been taken in."""
    module = CausalLM(config=TINY)
    before, calls = snapshot(module), []
    loss = module.calibration_loss

    def hungry(batch):
        calls.append(1)
        if len(calls) >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        return loss(batch)

    module.calibration_loss = hungry
    batches = [{"input_ids": row[None]} for row in make_tokens(4, 8)]
    pruning = WeightPruning(**score, calibration=batches, num_samples=4, progress=False)
    with pytest.raises(torch.OutOfMemoryError, match=message) as error:
        make_trainer(tmp_path, pruning).fit(module, loader())
    assert "Tried to allocate 2.00 GiB" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(calls) == (3 if score["score"] == "wanda" else 4)  # once more, with blocks that run again in backward
    assert snapshot(module) == before
    assert pruning.masks == {}
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    pruning.calibration = batches[:1] * 4  # the same callback goes on once there is memory
    module.calibration_loss = loss
    make_trainer(tmp_path, pruning).fit(module, loader())
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        ShortOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        MemoryError("no memory"),
    ],
    ids=["gpu", "pass", "cpu", "python"],
)
def test_out_of_memory_on_the_command_line_is_one_line(error, monkeypatch, capsys):
    @functools.wraps(inspect)  # the parser comes from the signature
    def failing(*args, **options):
        raise error

    monkeypatch.setattr("lightning_prune.checkpoints.inspection.inspect", failing)
    one_error(capsys, ["inspect", "x"], "memory")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "masks", "evaluate"])
def test_a_full_disk_on_the_command_line(command, checkpoint, files, tmp_path, capsys):
    """The system refuses to write on; what was there stays, and nothing is left beside it."""
    resource = pytest.importorskip("resource", reason="limits the size of files")
    args = {
        "export": ["export", checkpoint, tmp_path / "out", "--overwrite"],
        "masks": ["export", checkpoint, tmp_path / "out.safetensors", "--masks_only", "--overwrite"],
        "evaluate": ["evaluate", files.dense, "--text", files.text, "--seq_len", 32, "--output", tmp_path / "out.json"],
    }[command]
    assert main([str(arg) for arg in args]) == 0
    old = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert old
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        one_error(capsys, args, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == old
    assert len(list(tmp_path.iterdir())) == 1


# -- signals ---------------------------------------------------------------------------------------------------------


def test_sigterm_during_calibration_changes_nothing(tmp_path):
    """In the middle of training, where Lightning itself would look for it only after calibration and pruning."""
    module = CausalLM(config=TINY)
    before, calls = {}, []
    loss = module.calibration_loss

    def signalled(batch):
        calls.append(1)
        if len(calls) == 2:
            before.update(snapshot(module))
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(batch)

    module.calibration_loss = signalled
    batches = [{"input_ids": row[None]} for row in make_tokens(8, 8)]
    pruning = WeightPruning(calibration=batches, num_samples=8, schedule=OneShot(1), progress=False)
    trainer = make_trainer(tmp_path, pruning, steps=3)
    with pytest.raises(SystemExit):
        trainer.fit(module, loader())
    assert (len(calls), trainer.global_step) == (2, 1)
    assert snapshot(module) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def child(args: list[str], phase: str, marker: str) -> None:
    """A process that runs the command line, and says by a file when it is in a phase."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)

    def arrived(seconds: float) -> None:
        Path(marker).touch()
        time.sleep(seconds)

    if phase == "calibration":
        loss = CausalLM.calibration_loss
        CausalLM.calibration_loss = lambda self, batch: arrived(0.02) or loss(self, batch)
    elif phase == "training":
        step = CausalLM.training_step

        def training_step(self, batch, index):
            if self.global_step > 0:  # so that a checkpoint has been written
                arrived(0.02)
            return step(self, batch, index)

        CausalLM.training_step = training_step
    elif phase == "export":
        lightning_prune.checkpoints.export.check_written = lambda *args: arrived(60)
    else:
        lightning_prune.evaluation.evaluate.perplexity = lambda *args, **kwargs: arrived(60)
    os._exit(main(args))


@pytest.fixture(scope="module")
def started():
    """Starts `child`."""
    running = []

    def start(args, phase, folder):
        marker, log = folder / "marker", folder / "log"
        arguments = ([str(arg) for arg in args], phase, str(marker))
        process = forking.start(child, *arguments, environment=os.environ | {"HF_HUB_OFFLINE": "1"}, log=log)
        running.append(process)
        deadline = time.monotonic() + 240
        while not marker.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert marker.exists(), log.read_text()
        return process, log

    yield start
    for process in running:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("phase", ["calibration", "training", "export", "evaluate"])
def test_ctrl_c_and_sigterm(phase, number, status, started, checkpoint, files, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    if phase in ("calibration", "training"):
        (work / "text.txt").write_text(files.text.read_text(encoding="utf-8"), encoding="utf-8")
        content = configuration(work, score="gblm", num_samples=200 if phase == "calibration" else 2)
        saving = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_top_k": -1}}
        content["trainer"]["callbacks"].append(saving)
        content["trainer"]["max_steps"] = 10_000
        content["data"]["init_args"] |= {"tokenizer": str(files.dense), "block_size": 16, "validation_share": 0.0}
        args = ["fit", "--config", write_config(work, content)]
    elif phase == "export":
        assert main(["export", str(checkpoint), str(work / "out")]) == 0
        args = ["export", checkpoint, work / "out", "--overwrite", "--dtype", "bfloat16"]
    else:
        write_results([work / "results.json"], {"kind": KIND}, "", [])
        args = ["evaluate", files.dense, "--text", files.text, "--seq_len", 32, "--output", work / "results.json"]
    old = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    process, log = started(args, phase, tmp_path)
    os.kill(process.pid, number)
    process.join(60)
    said = log.read_text()
    assert process.exitcode == status, said
    assert "Traceback" not in said
    assert said.rstrip().endswith({130: "interrupted", 143: "terminated"}[status]) or phase in (
        "calibration",
        "training",
    )
    # What was there is as it was; what came before the signal is whole.
    assert {path: path.read_bytes() for path in old} == old
    new = [path for path in work.rglob("*") if path.is_file() and path not in old and "cache" not in path.parts]
    saved = [path for path in new if path.suffix == ".ckpt"]
    assert [path.name for path in new if path not in saved and path.name != "config.yaml"] == []
    assert bool(saved) == (phase == "training")
    for path in saved:
        found = inspect(path, progress=False)
        assert (found.sparsity, found.resurrected, found.masks) == (pytest.approx(0.5, abs=1e-3), 0, 14)
