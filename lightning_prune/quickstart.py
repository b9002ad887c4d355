"""Train a small language model, prune it in several ways, retrain it sparse, and measure all of it.

Everything comes with the package: the text is *Pride and Prejudice*, the tokenizer is trained on it, the model starts
from random weights. A few minutes on two cores; no downloads.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import platform
import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_prune.callbacks.weight_pruning import WeightPruning
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.errors import check_whole
from lightning_prune.evaluation.perplexity import perplexity
from lightning_prune.pruning.masks import Masks
from lightning_prune.pruning.pipeline import prune
from lightning_prune.report.figures import perplexity_over_sparsity, sparsity_per_layer
from lightning_prune.safety import check_writable, expanded, replace_text
from lightning_prune.text.data import TextDataModule
from lightning_prune.text.documents import quiet_datasets
from lightning_prune.text.module import CausalLM

VOCABULARY = 2048
BLOCK = 128
BATCH = 8
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": BLOCK,
    "tie_word_embeddings": True,
}
SCORES = ("magnitude", "wanda", "gblm", "kfac")
BEST = "kfac"  # what is retrained
SETTINGS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "75 %": {"sparsity": 0.75}, "2:4": {"pattern": "2:4"}}
LEARNING_RATE = 4e-3
RETRAINING_RATE = 1e-3
_WRITTEN = ("dense", "results.json", "perplexity.png", "sparsity.png")


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        model: What it is.
        zeros: What was asked for: ``"50 %"``, ``"75 %"``, ``"2:4"``, or ``""`` for dense models.
        perplexity: On held-out text.
        sparsity: Share of zeros among the weights of the linear layers, counted in the saved file.
        seconds: Time to make it from the model before it.
        folder: Where it was saved, inside the output folder.
    """

    model: str
    zeros: str
    perplexity: float
    sparsity: float
    seconds: float
    folder: str


def quickstart(
    output: str | Path = "quickstart",
    seed: int = 0,
    steps: int = 600,
    retrain_steps: int = 120,
    num_samples: int = 128,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a small language model, prune it in several ways, retrain it, and compare all of them.

    Writes into `output`: one transformers folder a model, ``results.json``, ``perplexity.png`` and
    ``sparsity.png``.

    Args:
        output: Folder; made if it does not exist, and files of an earlier run are replaced.
        seed: Of weights and the order of the data. The same seed, versions and number of threads give the same result.
        steps: Training steps of the dense model, 8 blocks of 128 tokens each.
        retrain_steps: Further training steps of the pruned models, and of the dense model they are compared with.
        num_samples: Calibration sequences of 128 tokens.
        console: Where to report; default standard output.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: if a number is out of range, `output` cannot be written or holds other things by the names of what
            is written, or a saved model does not have the zeros of its masks.
    """
    for name, value in (("steps", steps), ("retrain_steps", retrain_steps), ("num_samples", num_samples)):
        check_whole(name, value)
    check_whole("seed", seed, least=0)
    if seed >= 2**32:
        raise ValueError(f"seed={seed} must be below 2**32, as numpy's are")
    folder = expanded(output, "output")
    check_writable(folder, "dense")
    strange = [] if (folder / "cache").exists() else [name for name in _WRITTEN if (folder / name).exists()]
    if strange:
        kind = "folder" if (folder / strange[0]).is_dir() else "file"
        raise ValueError(
            f"output={str(output)!r} holds a {kind} {strange[0]!r} that no earlier quickstart has left, and that would "
            "be written over; choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        return _Quickstart(folder, seed, steps, retrain_steps, num_samples, console or Console()).run()


class _Quickstart:
    def __init__(
        self, folder: Path, seed: int, steps: int, retrain_steps: int, num_samples: int, console: Console
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.steps = steps
        self.retrain_steps = retrain_steps
        self.num_samples = num_samples
        self.console = console
        self.rows: list[Row] = []
        self.data = TextDataModule(
            "austen",
            vocab_size=VOCABULARY,
            block_size=BLOCK,
            batch_size=BATCH,
            validation_share=0.1,
            seed=seed,
            cache_dir=str(folder / "cache"),
        )

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        self.say("[bold]1. Text.[/bold] Training a tokenizer on Pride and Prejudice")
        self.data.prepare_data()
        self.data.setup("fit")
        train, held_out = len(self.data.train_dataset), len(self.data.val_dataset)
        unigram = unigram_perplexity(self.data.train_dataset, self.data.val_dataset, VOCABULARY)
        self.say(f"   {train} blocks of {BLOCK} tokens to train on, {held_out} held out for the perplexities below")

        L.seed_everything(self.seed, verbose=False)
        dense = CausalLM(config=dict(MODEL), **self.optimizer(LEARNING_RATE))
        numbers = sum(p.numel() for p in dense.parameters())
        self.say(f"[bold]2. Training[/bold] a Llama of {numbers / 1e6:.2f} M parameters for {self.steps} steps")
        seconds = self.fit(dense, self.steps)
        self.save("dense", "", dense, "dense", seconds, None)

        calibration = self.calibration()
        samples = sum(len(batch["input_ids"]) for batch in calibration)
        copies = len(SETTINGS) * len(SCORES)
        self.say(f"[bold]3. Pruning[/bold] {copies} copies of it, calibrated on {samples} training blocks")
        for zeros, setting in SETTINGS.items():
            for score in SCORES:
                module = copy.deepcopy(dense)
                begin = time.monotonic()
                masks = prune(module.model, calibration, score=score, num_samples=self.num_samples, **setting)
                self.save(score, zeros, module, f"{score}-{_slug(zeros)}", time.monotonic() - begin, masks)

        self.say(f"[bold]4. Retraining[/bold] for {self.retrain_steps} steps with masks enforced by WeightPruning")
        longer = self.copy_of(dense)
        self.save("dense, trained on", "", longer, "dense-longer", self.fit(longer, self.retrain_steps), None)
        for zeros, setting in SETTINGS.items():
            module = self.copy_of(dense)
            callback = WeightPruning(
                score=BEST, num_samples=self.num_samples, calibration=calibration, progress=False, **setting
            )
            seconds = self.fit(module, self.retrain_steps, callback)
            masks = callback.masks.renamed(lambda name: name.removeprefix("model."))
            self.save(f"{BEST}, retrained", zeros, module, f"{BEST}-{_slug(zeros)}-retrained", seconds, masks)

        kfac = inspect(self.folder / "kfac-50", progress=False)
        sparsity_per_layer(kfac, self.folder / "sparsity.png", "kfac")
        picture = perplexity_over_sparsity(
            self.curves(),
            self.rows[0].perplexity,
            self.folder / "perplexity.png",
            f"Llama of {numbers / 1e6:.2f} M parameters on Pride and Prejudice",
        )
        results = self.results(unigram, time.monotonic() - started)
        replace_text(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
        self.console.print(self.table(unigram))
        self.say(
            f"Every saved model was loaded again: its zeros are exactly those of its masks. {results['seconds']:.0f} s "
            f"in all.\nSee {picture} (perplexity over sparsity), {self.folder / 'sparsity.png'} and "
            f"{self.folder / 'results.json'}. All about one of them, as one page:\n"
            f"lightning-prune report {self._quoted('kfac-50')} --dense {self._quoted('dense')} "
            f"--results {self._quoted('results.json')} --output {self._quoted('report.html')}"
        )
        return results

    def _quoted(self, name: str) -> str:
        """A path of the folder, as a shell takes it."""
        return shlex.quote(str(self.folder / name))

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def optimizer(self, learning_rate: float) -> dict[str, Any]:
        return {"learning_rate": learning_rate, "weight_decay": 0.1, "betas": (0.9, 0.95), "warmup_ratio": 0.05}

    def copy_of(self, dense: CausalLM) -> CausalLM:
        """The dense weights in a module with the settings of retraining."""
        module = CausalLM(config=dict(MODEL), **self.optimizer(RETRAINING_RATE))
        module.model.load_state_dict(dense.model.state_dict())
        return module

    def fit(self, module: CausalLM, steps: int, *callbacks: L.Callback) -> float:
        """Train for a number of steps; returns seconds."""
        L.seed_everything(self.seed, verbose=False)
        started = time.monotonic()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            callbacks=[*callbacks, _Losses(self, steps)],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=self.folder,
        )
        trainer.fit(module, datamodule=self.data)
        module.eval()
        return time.monotonic() - started

    def calibration(self) -> list[dict[str, Tensor]]:
        """The first training batches in the order of the seed."""
        batches: list[dict[str, Tensor]] = []
        for batch in self.data.train_dataloader():
            batches.append(batch)
            if sum(len(b["input_ids"]) for b in batches) >= self.num_samples:
                break
        return batches

    def save(self, model: str, zeros: str, module: CausalLM, name: str, seconds: float, masks: Masks | None) -> None:
        """Save, load again, check the zeros, measure: what the table says is true of the files."""
        module.save_pretrained(self.folder / name)
        loaded = AutoModelForCausalLM.from_pretrained(self.folder / name, dtype="auto")
        check_zeros(dict(loaded.named_parameters()), masks or {}, name)
        measured = perplexity(loaded, self.data.val_dataset, batch_size=16).perplexity
        sparsity = inspect(self.folder / name, progress=False).sparsity
        self.rows.append(Row(model, zeros, measured, sparsity, seconds, name))
        self.say(f"   {name}: held-out perplexity {measured:.2f}, {sparsity:.2%} zeros, {seconds:.1f} s")

    def curves(self) -> dict[str, dict[float, float]]:
        """Perplexity by sparsity of the models whose zeros follow no pattern, by how they were made."""
        found: dict[str, dict[float, float]] = {}
        for row in self.rows:
            if "sparsity" in SETTINGS.get(row.zeros, {}):
                found.setdefault(row.model, {})[row.sparsity] = row.perplexity
        return found

    def results(self, unigram: float, seconds: float) -> dict[str, Any]:
        return {
            "unigram_perplexity": unigram,
            "models": [asdict(row) for row in self.rows],
            "seconds": seconds,
            "settings": {
                "seed": self.seed,
                "steps": self.steps,
                "retrain_steps": self.retrain_steps,
                "num_samples": self.num_samples,
                "batch_size": BATCH,
                "block_size": BLOCK,
                "learning_rate": LEARNING_RATE,
                "retraining_rate": RETRAINING_RATE,
                "model": MODEL,
                "text": "Pride and Prejudice; last tenth of the blocks held out",
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": L.__version__,
                "transformers": transformers.__version__,
                "threads": torch.get_num_threads(),
            },
        }

    def table(self, unigram: float) -> Table:
        table = Table(title="Perplexity on held-out text (lower is better)")
        table.add_column("zeros asked for")
        table.add_column("model")
        for column in ("perplexity", "zeros counted", "seconds"):
            table.add_column(column, justify="right")
        table.add_row("", "word frequencies alone", f"{unigram:.1f}", "", "")
        for zeros in ("", *SETTINGS):
            table.add_section()
            for row in (row for row in self.rows if row.zeros == zeros):
                measured = f"{row.perplexity:.2f}", f"{row.sparsity:.2%}", f"{row.seconds:.1f}"
                table.add_row(row.zeros, row.model, *measured)
        return table


class _Losses(L.Callback):
    """Says how training goes, five times."""

    def __init__(self, owner: _Quickstart, steps: int) -> None:
        self.owner = owner
        self.steps = steps

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % max(1, math.ceil(self.steps / 5)) == 0 and step < self.steps:
            self.owner.say(f"   step {step} of {self.steps}, training loss {float(outputs['loss']):.3f}")


def unigram_perplexity(train: Sequence[Any], held_out: Sequence[Any], vocabulary: int) -> float:
    """Perplexity of predicting each token by how often it occurs in the training text (one added to each count).

    Over the tokens that `perplexity` counts: all but the first of every block.
    """
    counts = torch.ones(vocabulary, dtype=torch.float64)
    for block in train:
        counts += torch.bincount(torch.as_tensor(block["input_ids"]), minlength=vocabulary)
    nll = -(counts / counts.sum()).log()
    predicted = torch.cat([torch.as_tensor(block["input_ids"])[1:] for block in held_out])
    return math.exp(float(nll[predicted].mean()))


def check_zeros(weights: dict[str, Tensor], masks: Masks, name: str) -> None:
    """Every masked weight is exactly zero.

    Raises:
        ValueError: naming the first weight that is not.
    """
    for parameter, mask in masks.items():
        wrong = int(weights[parameter].detach()[~mask].count_nonzero())
        if wrong:
            raise ValueError(f"{name}: {wrong} masked weights of {parameter!r} are not zero after saving and loading")


def _slug(zeros: str) -> str:
    return zeros.removesuffix(" %").replace(":", "-")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hints of the libraries, which would bury the report."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), quiet_datasets():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers.utils.logging.enable_progress_bar()
