"""Record what a run leaves beside its logs: sparsity over steps, versions, seed and settings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

HISTORY_FILE = "sparsity_history.jsonl"
"""Name of the file in the run's folder."""

_VERSION = 1


@dataclass
class SparsityHistory:
    """What a history file holds.

    Attributes:
        run: What is known of the run: versions, seed, strategy, settings of callbacks and data.
        layers: Of each layer its ``numel`` and ``type``, by name.
        steps: Entries of `append_step`, one a step, in order.
    """

    run: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)


def begin_history(path: Path, run: Mapping[str, Any], step: int) -> None:
    """Start a file, or go on with the one of a run that is resumed at `step`: its later steps are dropped."""
    earlier = read_history(path).steps if step > 0 and path.is_file() else []
    lines: list[Mapping[str, Any]] = [{"version": _VERSION, "run": run}]
    lines += [entry for entry in earlier if entry["step"] < step]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(_line(line) for line in lines), encoding="utf-8")
    temporary.replace(path)


def append_step(
    path: Path,
    step: int,
    layers: Mapping[str, tuple[int, int, str]],
    saliency: Mapping[str, float],
) -> None:
    """Add what was counted at one step.

    Args:
        path: The file, of `begin_history`.
        step: As the loggers count them.
        layers: Zeros, number of weights and type of each layer.
        saliency: Numbers of the callbacks that expose some.
    """
    entry = {
        "step": step,
        "layers": {
            name: {"zeros": zeros, "numel": numel, "type": kind} for name, (zeros, numel, kind) in layers.items()
        },
        "saliency": dict(saliency),
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(entry))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_finite(entry), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with None for what JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_history(path: Path) -> SparsityHistory:
    """Read a history; a last line that a crash cut off is left out, and so is what is not of its form.

    Raises:
        OSError: the file cannot be read.
    """
    history = SparsityHistory()
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict):
            continue
        if isinstance(entry.get("run"), dict):
            history.run = entry["run"]
        layers = entry.get("layers")
        if isinstance(entry.get("step"), int) and isinstance(layers, dict) and all(map(_is_layer, layers.values())):
            if not isinstance(entry.get("saliency"), dict):
                entry["saliency"] = {}
            steps[entry["step"]] = entry
    history.steps = [steps[step] for step in sorted(steps)]
    history.layers = history.steps[-1]["layers"] if history.steps else {}
    return history


def _is_layer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("zeros"), int)
        and isinstance(value.get("numel"), int)
        and isinstance(value.get("type"), str)
    )


PACKAGES = ("lightning-prune", "torch", "lightning", "transformers", "peft", "datasets")
"""Packages whose versions decide a result."""

_SEED_VARIABLE = "PL_GLOBAL_SEED"  # where seed_everything leaves the seed
_LONGEST = 200


def run_facts(trainer: Any, module: Any) -> dict[str, Any]:
    """Return what is known of a Trainer's fit and its module, as plain values for JSON."""
    seed = os.environ.get(_SEED_VARIABLE, "")
    data = trainer.datamodule
    saving = [c for c in trainer.checkpoint_callbacks if isinstance(getattr(c, "dirpath", None), (str, Path))]
    return {
        "versions": versions(),
        "seed": int(seed) if seed.isdigit() else None,
        "module": type(module).__name__,
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "max_steps": trainer.max_steps,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": plain(trainer.gradient_clip_val),
        "checkpoints": list(dict.fromkeys(str(Path(c.dirpath).absolute()) for c in saving if c.dirpath)),
        "callbacks": [
            {"name": type(callback).__name__, "settings": settings_of(callback)}
            for callback in trainer.callbacks
            if type(callback).__module__.startswith("lightning_prune.")
        ],
        "data": None if data is None else {"name": type(data).__name__, "settings": plain(dict(data.hparams))},
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def settings_of(callback: Any) -> dict[str, Any]:
    """Arguments of a callback as it keeps them: as attributes, or in its ``settings`` or ``options``."""
    kept: dict[str, Any] = {}
    for name in inspect.signature(type(callback).__init__).parameters:
        for place in (getattr(callback, "settings", None), getattr(callback, "options", None), callback):
            held = place if isinstance(place, Mapping) else getattr(place, "__dict__", {})
            if name in held:
                kept[name] = plain(held[name])
                break
    return kept


def plain(value: Any) -> Any:
    """The value if JSON can hold it; otherwise what it is, in words.

    >>> plain({"sparsity": 0.5, "targets": [int]})
    {'sparsity': 0.5, 'targets': ['int']}
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _LONGEST:
        return [plain(item) for item in value]
    if isinstance(value, type):
        return value.__name__
    # Scores, schedules and allocations print themselves as they are written; other objects as their type alone.
    return plain(repr(value)) if dataclasses.is_dataclass(value) else type(value).__name__


def described(value: Any) -> Any:
    """A setting in plain values: the same for two callbacks that were made alike."""
    if type(value) is not bool and isinstance(value, Real):  # numpy's numbers are no plain values
        return int(value) if isinstance(value, Integral) else float(Fraction(str(value)))
    words = plain(value)
    return words if isinstance(words, (str, int, bool, type(None))) else repr(words)
