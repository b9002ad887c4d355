"""SparsityMonitor: what it logs, when, and what it leaves for the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import FSDPStrategy
from tiny import TINY, make_tokens
from torch.utils.data import DataLoader

from lightning_prune import (
    CausalLM,
    LinearSchedule,
    PERPRetraining,
    PruningAwarePretraining,
    SparsityMonitor,
    WeightPruning,
)
from lightning_prune.callbacks.sparsity_monitor import layer_name
from lightning_prune.cli import main
from lightning_prune.history import HISTORY_FILE, append_step, begin_history, plain, read_history, settings_of
from lightning_prune.pruning.score_histograms import BINS, LOWEST, ScoreSummary


class Recorder(Logger):
    """A logger of someone else's: all there is to it is Lightning's interface."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.entries.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Truth(L.Callback):
    """Density of each layer before each batch, counted plainly."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def take(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seen[trainer.global_step] = {
            name.removesuffix(".weight"): sum(w != 0.0 for row in p.tolist() for w in row) / p.numel()
            for name, p in module.named_parameters()
            if "_proj" in name
        }

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.take(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.take(trainer, pl_module)


def fit(
    folder: Path,
    *callbacks: L.Callback,
    logger: Any = None,
    steps: int = 5,
    module: CausalLM | None = None,
    **kwargs: Any,
) -> CausalLM:
    if module is None:
        L.seed_everything(3, verbose=False)
        module = CausalLM(config=TINY, learning_rate=1e-3)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=logger or False, callbacks=list(callbacks), default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        **{"enable_checkpointing": False, **{k: v for k, v in kwargs.items() if k != "ckpt_path"}},
    )  # fmt: skip
    data = DataLoader([{"input_ids": row} for row in make_tokens(32, 10, 300)], batch_size=4)
    trainer.fit(module, data, ckpt_path=kwargs.get("ckpt_path"))
    return module


def pruning(**settings: Any) -> WeightPruning:
    return WeightPruning(**{"score": "magnitude", "sparsity": 0.5, "progress": False, **settings})


@pytest.mark.parametrize("monitor_first", [True, False])
def test_what_is_logged_is_what_the_weights_hold(tmp_path: Path, monitor_first: bool) -> None:
    recorder, truth, monitor = Recorder(), Truth(), SparsityMonitor(every_n_steps=2)
    pruner = pruning(schedule=LinearSchedule(start=0, end=4, every=1))
    callbacks = [monitor, pruner, truth] if monitor_first else [pruner, monitor, truth]
    fit(tmp_path, *callbacks, logger=[recorder])
    entries = dict(e for e in recorder.entries if "sparsity/total" in e[1])
    assert list(entries) == [0, 2, 4, 5]
    # The lists of callbacks differ in order; the numbers do not.
    for step, values in entries.items():
        layers = {k.removeprefix("density/layer/"): v for k, v in values.items() if k.startswith("density/layer/")}
        assert layers == pytest.approx(truth.seen[step], abs=1e-12)
        q = [truth.seen[step][f"model.model.layers.{i}.self_attn.q_proj"] for i in range(2)]
        assert values["density/type/q_proj"] == pytest.approx(sum(q) / 2, abs=1e-12)
        sizes = {n.removesuffix(".weight"): p.numel() for n, p in CausalLM(config=TINY).named_parameters()}
        dense = sum(truth.seen[step][n] * sizes[n] for n in layers) / sum(sizes[n] for n in layers)
        assert values["sparsity/total"] == pytest.approx(1 - dense, abs=1e-12)
    assert entries[0]["sparsity/total"] == 0.0
    assert entries[5]["sparsity/total"] == pytest.approx(0.5, abs=1e-3)


class Freeze(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.model.model.layers[0].requires_grad_(trainer.global_step < 2)


def test_layers_that_are_frozen_along_the_way_go_on_being_counted(tmp_path: Path) -> None:
    recorder, truth = Recorder(), Truth()
    fit(tmp_path, pruning(), Freeze(), SparsityMonitor(every_n_steps=1), truth, logger=[recorder])
    entries = [entry for entry in recorder.entries if "sparsity/total" in entry[1]]
    assert [step for step, _ in entries] == [0, 1, 2, 3, 4, 5]
    for step, values in entries:
        layers = {k.removeprefix("density/layer/"): v for k, v in values.items() if k.startswith("density/layer/")}
        assert layers == pytest.approx(truth.seen[step], abs=1e-12)


def test_saliency_is_the_mean_score_of_each_layer(tmp_path: Path) -> None:
    L.seed_everything(3, verbose=False)
    dense = {n: p.detach().double().abs().mean().item() for n, p in CausalLM(config=TINY).named_parameters()}
    recorder, pruner = Recorder(), pruning()
    fit(tmp_path, pruner, SparsityMonitor(), logger=[recorder], steps=1)
    values = next(e for s, e in recorder.entries if s == 0 and "sparsity/total" in e)
    found = {k.removeprefix("saliency/"): v for k, v in values.items() if k.startswith("saliency/")}
    assert len(found) == 14
    assert found == pytest.approx({n: dense[f"{n}.weight"] for n in found}, rel=1e-6)
    # A callback of anyone's is read through the same attribute.
    other = L.Callback()
    other.saliency = {"attention": torch.tensor(0.25), "ffn": 2, "none": None}  # type: ignore[attr-defined]
    recorder = Recorder()
    fit(tmp_path, other, SparsityMonitor(per_layer=False), logger=[recorder], steps=1)
    values = recorder.entries[0][1]
    assert (values["saliency/attention"], values["saliency/ffn"], "saliency/none" in values) == (0.25, 2.0, False)
    assert not any(k.startswith("density/layer/") for k in values)


def test_score_histograms_survive_a_checkpoint(tmp_path: Path) -> None:
    L.seed_everything(3, verbose=False)
    dense = dict(CausalLM(config=TINY).named_parameters())
    pruner = pruning()
    fit(tmp_path, pruner, steps=1)
    torch.save(pruner.state_dict(), tmp_path / "state.pt")
    again = pruning()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, layer in again.scores.layers.items():
        scores = dense[name].detach().abs()
        where = ((scores.double().log2() - LOWEST) * 2).floor().long()
        mask = pruner.masks[name]
        for counts, chosen in ((layer.kept, mask), (layer.pruned, ~mask)):
            naive = [int((where[chosen] == b).sum()) for b in range(BINS)]
            assert counts.tolist() == naive
    assert again.saliency == pytest.approx(pruner.saliency)
    assert len(again.scores.layers) == 14
    assert ScoreSummary.from_state({"w": {"kept": 3}, "v": None}).layers == {}
    assert ScoreSummary.from_state("no").layers == {}


def test_every_logger_of_lightning_takes_the_names(tmp_path: Path) -> None:
    csv_logger, board = CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")
    fit(tmp_path, pruning(), SparsityMonitor(every_n_steps=2), logger=[csv_logger, board])
    with (Path(csv_logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["sparsity/total"]]
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 5]
    assert all(float(row["density/layer/model.model.layers.0.mlp.up_proj"]) == pytest.approx(0.5) for row in rows)
    history = read_history(Path(csv_logger.log_dir) / HISTORY_FILE)  # the folder of the first logger
    assert [entry["step"] for entry in history.steps] == [0, 2, 4, 5]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert [e.step for e in events.Scalars("sparsity/total")] == [0, 2, 4, 5]
    assert "density/type/down_proj" in events.Tags()["scalars"]


def test_the_history_says_how_the_run_was_made(tmp_path: Path) -> None:
    fit(tmp_path, pruning(score="gblm", num_samples=4, alpha=7.0), SparsityMonitor(every_n_steps=3))
    text = (tmp_path / HISTORY_FILE).read_text()
    assert all(json.loads(line) for line in text.splitlines())
    history = read_history(tmp_path / HISTORY_FILE)
    assert history.run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert history.run["seed"] == 3
    settings = history.run["callbacks"][0]["settings"]
    assert (settings["sparsity"], settings["num_samples"], settings["pattern"]) == (0.5, 4, "unstructured")
    assert settings["score"] == "GBLM(alpha=7.0, grad_norm='l2')"
    assert [entry["step"] for entry in history.steps] == [0, 3, 5]
    up = history.layers["model.model.layers.0.mlp.up_proj"]
    assert (up["zeros"], up["numel"], up["type"]) == (32 * 48 // 2, 32 * 48, "up_proj")
    # A second run into the same folder begins anew.
    fit(tmp_path, pruning(), SparsityMonitor(every_n_steps=5))
    assert [entry["step"] for entry in read_history(tmp_path / HISTORY_FILE).steps] == [0, 5]


def test_a_resumed_run_goes_on_with_the_history(tmp_path: Path) -> None:
    path = tmp_path / HISTORY_FILE
    begin_history(path, {"seed": 1}, 0)
    for step in (0, 2, 4):
        append_step(path, step, {"a": (step, 8, "a")}, {"a": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 6, "layers": {"a": {"zer')  # cut off by a crash
    assert [entry["step"] for entry in read_history(path).steps] == [0, 2, 4]
    begin_history(path, {"seed": 2}, 4)
    append_step(path, 4, {"a": (7, 8, "a")}, {})
    history = read_history(path)
    assert [entry["step"] for entry in history.steps] == [0, 2, 4]
    assert history.layers["a"]["zeros"] == 7
    assert history.run == {"seed": 2}
    assert history.steps[0]["saliency"] == {"a": None}
    path.write_text('[]\n{"step": 1, "layers": 5}\n{"step": 2, "layers": {"a": 1}}\n\0\n')
    assert read_history(path).steps == []


def test_adapters_leave_the_names_as_they_are(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, pruning(), PERPRetraining(), SparsityMonitor(every_n_steps=2), logger=[recorder])
    entries = [e for _, e in recorder.entries if "sparsity/total" in e]
    names = {k for e in entries for k in e}
    assert "density/layer/model.model.layers.1.mlp.gate_proj" in names
    assert not [n for n in names if "base_" in n or "lora" in n]
    assert all(e["sparsity/total"] == pytest.approx(0.5) for e in entries)
    assert layer_name("a.b.weight") == "a.b"


def test_accumulation_and_a_second_fit(tmp_path: Path) -> None:
    recorder, monitor, pruner = Recorder(), SparsityMonitor(every_n_steps=1), pruning()
    module = fit(tmp_path, pruner, monitor, logger=[recorder], steps=3, accumulate_grad_batches=2)
    assert [s for s, e in recorder.entries if "sparsity/total" in e] == [0, 1, 2, 3]
    fit(tmp_path, pruner, monitor, logger=[recorder], steps=1, module=module)
    assert [s for s, e in recorder.entries if "sparsity/total" in e] == [0, 1, 2, 3, 0, 1]


def test_only_the_layers_that_are_pruned_count(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, pruning(targets=["down_proj"]), SparsityMonitor(), logger=[recorder], steps=1)
    values = recorder.entries[0][1]
    assert values["sparsity/total"] == pytest.approx(0.5)
    assert {k for k in values if k.startswith("density/type/")} == {"density/type/down_proj"}
    recorder = Recorder()
    fit(tmp_path, pruning(), SparsityMonitor(targets=["up_proj"]), logger=[recorder], steps=1)
    assert {k for k in recorder.entries[0][1] if k.startswith("density/type/")} == {"density/type/up_proj"}


def test_a_layer_that_shrinking_removes_ends_the_log_and_not_the_run(tmp_path: Path) -> None:
    module = CausalLM(config={**TINY, "num_hidden_layers": 3}, learning_rate=1e-3, lr_schedule="constant")
    shrink = PruningAwarePretraining({"num_hidden_layers": 1}, types=("layer",), end=3, compact_every=1)
    monitor = SparsityMonitor(every_n_steps=1, targets=["layers.2"])
    data = DataLoader([{"input_ids": row} for row in make_tokens(24, 12)], batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, logger=CSVLogger(tmp_path), default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[monitor, shrink],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="logs nothing from step . on: targets='layers.2' matches no layer") as told:
        trainer.fit(module, data)
    assert trainer.global_step == 6
    assert module.model.config.num_hidden_layers == 1
    assert sum("logs nothing" in str(w.message) for w in told) == 1


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for wrong in (0, -1, 2.5, True, "ten"):
        with pytest.raises(ValueError, match="every_n_steps="):
            SparsityMonitor(every_n_steps=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="targets='nothing' matches no layer"):
        fit(tmp_path, SparsityMonitor(targets=["nothing"]))
    strategy = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="FSDPStrategy"):
        SparsityMonitor().setup(strategy, L.LightningModule(), "fit")  # type: ignore[arg-type]


def test_settings_are_plain_values() -> None:
    settings = settings_of(PERPRetraining(adapter="scale_lora", r=4, masks={"w": torch.ones(2)}))
    assert settings["adapter"] == "scale_lora"
    assert settings["r"] == 4
    assert settings["masks"] == {"w": "Tensor"}
    json.dumps(settings_of(pruning(schedule=LinearSchedule(0, 4), calibration=[1], loss_fn=print)))
    assert plain("x" * 500).endswith("…")
    assert len(plain("x" * 500)) == 200


def test_the_command_line_knows_the_short_name(capsys: pytest.CaptureFixture) -> None:
    arguments = ["--trainer.callbacks=SparsityMonitor", "--trainer.callbacks.every_n_steps=7"]
    assert main(["fit", "--model.config=x", *arguments, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "class_path: lightning_prune.SparsityMonitor" in printed
    assert "every_n_steps: 7" in printed


@pytest.mark.parametrize("kind", ["own", "wandb", "mlflow"])
def test_loggers_of_runs_that_share_a_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: every run has a history of its own, beside its checkpoints."""
    if kind != "own":
        pytest.importorskip(kind)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for run in range(2):
        logger: Any = Recorder()
        if kind == "wandb":
            logger = WandbLogger(project="p", save_dir=tmp_path, offline=True)
        elif kind == "mlflow":
            logger = MLFlowLogger("e", tracking_uri=f"file:{tmp_path / 'mlruns'}")
        elif run:
            logger.version = 1
        keep = ModelCheckpoint()
        fit(tmp_path, pruning(), SparsityMonitor(every_n_steps=2), keep, logger=[logger], enable_checkpointing=True)
        history = read_history(Path(keep.best_model_path).parents[1] / HISTORY_FILE)
        assert [entry["step"] for entry in history.steps] == [0, 2, 4, 5]
        if kind == "mlflow":
            logged = logger.experiment.get_metric_history(logger.run_id, "sparsity/total")
            assert [(m.step, m.value) for m in logged] == [(step, 0.5) for step in (0, 2, 4, 5)]
        elif kind == "wandb":
            assert logger.experiment.summary["sparsity/total"] == 0.5
            logger.experiment.finish()
    assert len(list(tmp_path.rglob(HISTORY_FILE))) == 2
