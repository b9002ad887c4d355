"""The sections of a report as the template takes them: numbers become text, colors become percentages."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_prune.checkpoints.inspection import Inspection, format_bytes
from lightning_prune.checkpoints.states import shrunk_sizes, states_of
from lightning_prune.history import SparsityHistory
from lightning_prune.naming import block_order, name_matches, order_kinds, place
from lightning_prune.pruning.score_histograms import ScoreSummary
from lightning_prune.report.figures import Line, cells_of, line, picture, strip
from lightning_prune.report.measure import Measured, Results, Source, Structure, before_and_after, nested
from lightning_prune.results import short

_MOST_PICTURES = 12
_MOST_CURVES = 12
_CURVES = ("train_loss", "val_loss", "val_perplexity", "loss")

Cells = Mapping[tuple[str, str], float]


# -- text ------------------------------------------------------------------------------------------------------------


def share(value: float) -> str:
    """A share as percent.

    >>> share(0.5), share(0.12345), share(0.99999), share(1.0)
    ('50.0 %', '12.3 %', '99.99 %', '100.0 %')
    """
    written = f"{100 * value:.1f}"
    # Almost all is not all.
    if (written == "100.0" and value < 1) or (written == "0.0" and value > 0):
        written = f"{math.floor(1e4 * value) / 100:.2f}" if value > 0.5 else f"{max(100 * value, 0.01):.2f}"
    return f"{written} %"


def number(value: float) -> str:
    """A measurement, in a few digits.

    >>> number(24.0312), number(0.00123), number(1234567.0), number(5.0)
    ('24.03', '0.00123', '1,234,567', '5')
    """
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:,.0f}" if 1e5 <= abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4g}"


def title(path: Path) -> str:
    """What a path is called: a run's ``version_3`` says nothing without the folder it is in."""
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name.startswith("version_") else path.name or str(path)


# -- key figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A key figure with what it is and a note."""

    label: str
    value: str
    hint: str


def tiles(source: Source, measured: Measured, results: Sequence[Results]) -> list[Tile]:
    """The figures at the top."""
    inspection = measured.inspection
    prunable = inspection.totals()
    found = [
        Tile("Sparsity", share(prunable.sparsity), f"of {short(prunable.numel)} prunable weights are zero"),
        Tile("Weights left", short(prunable.numel - prunable.zeros), f"in {prunable.tensors} matrices"),
        Tile("Pattern", inspection.pattern or "", "followed by every pruned matrix"),
        Tile("On disk", format_bytes(inspection.bytes_on_disk), inspection.format),
    ]
    lost = shrunk(source)
    if "parameters" in lost:
        dense, left = lost["parameters"]
        found.insert(0, Tile("Parameters", short(left), f"{share(left / dense)} of the {short(dense)} before"))
    if not prunable.zeros:
        found[-2] = Tile("Pattern", "none", "no weights are zero" if lost else "nothing is pruned")
    elif inspection.pattern is None:
        found[-2] = Tile("Pattern", "none", "unstructured: not N:M throughout")
    measurement = before_and_after(results, source.path)
    if measurement is not None:
        column, before, after = measurement
        ratio = f"{after / before:.2f} times dense; " if before > 0 else ""
        found.append(Tile("Perplexity", f"{number(before)} → {number(after)}", f"{ratio}{column}"))
    else:
        curve = source.metrics.get("val_perplexity")
        if curve:
            found.append(Tile("Validation perplexity", number(curve[-1][1]), f"at step {curve[-1][0]}"))
    return found


def warning(inspection: Inspection) -> str:
    """What is wrong with the masks, or nothing."""
    if not inspection.resurrected:
        return ""
    wrong = [t.name for t in inspection.tensors if t.mask and t.mask.resurrected]
    return f"{inspection.resurrected:,} masked weights are not zero, in {len(wrong)} tensors such as {wrong[0]}."


# -- heat maps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Text, and how strong its color is, 0 to 100."""

    text: str
    tone: int


@dataclass(frozen=True)
class HeatRow:
    """A block."""

    name: str
    cells: list[Cell | None]
    total: str


@dataclass(frozen=True)
class Heat:
    """A table of blocks by types; `totals` and `total` are empty where sums mean nothing."""

    kinds: list[str]
    rows: list[HeatRow]
    low: str
    high: str
    totals: list[str]
    total: str


def sparsity_heat(inspection: Inspection) -> Heat | None:
    """Sparsity in percent; None without a layer that is pruned."""
    counts = cells_of(inspection)
    if not counts:
        return None

    def percent(keys: Iterable[tuple[str, str]]) -> str:
        chosen = [counts[key] for key in keys]
        return f"{100 * sum(z for z, _ in chosen) / sum(n for _, n in chosen):.1f}" if chosen else ""

    values = {key: zeros / numel for key, (zeros, numel) in counts.items() if numel}
    heat = _heat(values, lambda v: f"{100 * v:.1f}", share, lambda b: percent(k for k in values if k[0] == b))
    totals = [percent(k for k in values if k[1] == kind) for kind in heat.kinds]
    return Heat(heat.kinds, heat.rows, heat.low, heat.high, totals, percent(values))


def score_heat(source: Source, scores: ScoreSummary) -> Heat | None:
    """Mean scores of layers, on a logarithmic scale; None where no layer has one."""
    means: dict[str, float] = {name: layer.mean for name, layer in scores.layers.items()}
    if not means and source.history.steps:
        layers = source.history.layers
        saliency = source.history.steps[-1]["saliency"]
        means = {n: v for n, v in saliency.items() if n in layers and isinstance(v, (int, float))}
    values = {place(f"{name.removesuffix('.weight')}.weight"): math.log10(v) for name, v in means.items() if v > 0}
    return _heat(values, lambda v: f"{10**v:.2g}", lambda v: f"{10**v:.2g}") if values else None


def _heat(
    values: Cells,
    write: Callable[[float], str],
    write_end: Callable[[float], str],
    total: Callable[[str], str] = lambda block: "",
) -> Heat:
    blocks = sorted(dict.fromkeys(block for block, _ in values), key=block_order)
    kinds = order_kinds(kind for _, kind in values)
    low, high = min(values.values()), max(values.values())
    width = max(high - low, 0.02)  # of equal layers not one is to stand out for its rounding
    middle = (low + high) / 2

    def cell(key: tuple[str, str]) -> Cell | None:
        if key not in values:
            return None
        return Cell(write(values[key]), round(100 * min(1.0, max(0.0, (values[key] - middle) / width + 0.5))))

    # Of several stacks of blocks numbers alone would not tell them apart.
    whole = len({block.rpartition(".")[0] for block in blocks if block}) > 1
    names = [(block if whole else block.rsplit(".", 1)[-1]) or "other" for block in blocks]
    rows = [
        HeatRow(name, [cell((block, kind)) for kind in kinds], total(block))
        for name, block in zip(names, blocks, strict=True)
    ]
    return Heat(kinds, rows, write_end(low), write_end(high), [], "")


# -- curves ----------------------------------------------------------------------------------------------------------


def curves(source: Source) -> list[tuple[Line, Callable[[float], str]]]:
    """Sparsity over the steps, losses and perplexities, and saliencies that are not those of layers."""
    drawn: list[tuple[Line | None, Callable[[float], str]]] = []
    drawn.append((line("sparsity", _sparsity_over_steps(source.history), low=0.0), share))
    drawn += [(line(name, source.metrics[name]), number) for name in _CURVES if name in source.metrics]
    layers = source.history.layers
    others: dict[str, list[tuple[int, float]]] = {}
    for entry in source.history.steps:
        for name, value in entry["saliency"].items():
            if name not in layers and isinstance(value, (int, float)):
                others.setdefault(name, []).append((entry["step"], float(value)))
    drawn += [(line(f"saliency of {name}", points), number) for name, points in others.items()]
    return [(found, write) for found, write in drawn if found is not None][:_MOST_CURVES]


def _sparsity_over_steps(history: SparsityHistory) -> list[tuple[int, float]]:
    points = []
    for entry in history.steps:
        layers = entry["layers"].values()
        numel = sum(layer["numel"] for layer in layers)
        if numel > 0:
            points.append((entry["step"], sum(layer["zeros"] for layer in layers) / numel))
    return points


# -- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskPicture:
    """One matrix: the picture's data URI, profiles as SVG paths, and figures as text."""

    name: str
    uri: str
    width: int
    height: int
    rows: str
    columns: str
    density: float
    row_spread: str
    column_spread: str
    shape: str


def mask_pictures(measured: Measured, layers: Sequence[str]) -> tuple[list[MaskPicture], tuple[float, float]]:
    """Pictures of chosen matrices, all on one scale of colors, and the ends of that scale.

    Raises:
        ValueError: a pattern matches no pruned matrix.
    """
    chosen = _chosen(measured, layers)
    if not chosen:
        return [], (0.0, 1.0)
    everything = torch.cat([s.density.reshape(-1) for s in chosen.values()])
    # A few empty rows must not wash out the rest.
    low, high = (float(everything.quantile(q)) for q in (0.01, 0.99))
    if high - low < 0.02:
        low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)
    shapes = {t.name: " x ".join(map(str, t.shape)) for t in measured.inspection.tensors}
    pictures = [
        MaskPicture(
            name=name.removesuffix(".weight"),
            uri=picture(s.density, low, high),
            width=s.density.shape[1],
            height=s.density.shape[0],
            rows=strip(s.rows),
            columns=strip(s.columns),
            density=float(s.density.mean()),
            row_spread=_spread(s.row_spread),
            column_spread=_spread(s.column_spread),
            shape=shapes[name],
        )
        for name, s in chosen.items()
    ]
    return pictures, (low, high)


def _chosen(measured: Measured, layers: Sequence[str]) -> dict[str, Structure]:
    structures = measured.structures
    for pattern in layers:
        if not any(name_matches(name.removesuffix(".weight"), pattern) for name in structures):
            some = ", ".join(repr(n.removesuffix(".weight")) for n in list(structures)[:3])
            raise ValueError(f"layers={pattern!r} matches no pruned matrix; there are {some or 'none'}")
    if layers:
        found = [n for n in structures if any(name_matches(n.removesuffix(".weight"), p) for p in layers)]
        return {n: structures[n] for n in found[:_MOST_PICTURES]}
    best: dict[str, str] = {}
    for name, structure in structures.items():
        kind = place(name)[1]
        if kind not in best or structure.spread > structures[best[kind]].spread:
            best[kind] = name
    return {best[kind]: structures[best[kind]] for kind in order_kinds(best)[:_MOST_PICTURES]}


def _spread(value: float) -> str:
    return "0" if value < 0.005 else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


# -- measurements ----------------------------------------------------------------------------------------------------


def results_table(results: Results, path: Path) -> dict[str, Any]:
    """A file of measurements, with bars for perplexities."""
    largest = {
        column: max(row.values.get(column, 0.0) for row in results.rows)
        for column in results.columns
        if column.startswith("perplexity")
    }

    def cell(column: str, values: Mapping[str, float]) -> dict[str, Any] | None:
        if column not in values:
            return None
        value = values[column]
        written = share(value) if column in ("sparsity", "achieved") and 0 <= value <= 1 else number(value)
        top = largest.get(column, 0.0)
        return {"text": written, "bar": round(100 * max(0.0, value) / top, 1) if top > 0 else None}

    rows = [
        {
            "label": row.label,
            "here": bool(row.folder) and Path(row.folder).name == path.name,
            "cells": [cell(column, row.values) for column in results.columns],
        }
        for row in results.rows
    ]
    facts = {key: text(value) for key, value in results.facts.items()}
    return {
        "name": results.name,
        "columns": results.columns,
        "rows": rows,
        "left_out": results.left_out,
        "facts": facts,
    }


def sizes(measured: Measured) -> list[tuple[str, str]]:
    """Sizes on disk, and what the zeros are worth where they are stored as such."""
    inspection = measured.inspection
    everything, prunable = inspection.totals(True), inspection.totals()
    beside = ", with optimizer states and masks" if inspection.format == "Lightning checkpoint" else ""
    found = [(f"this {inspection.format}{beside}", format_bytes(inspection.bytes_on_disk))]
    if measured.dense_bytes is not None:
        found.append(("the dense model", format_bytes(measured.dense_bytes)))
    found.append(("parameters", f"{everything.numel:,}"))
    found.append(("of them not zero", f"{everything.numel - everything.zeros:,}"))
    if prunable.zeros:
        found.append(("masks, packed to bits", format_bytes(prunable.numel / 8)))
    return found


def shrunk(source: Source) -> dict[str, tuple[int, int]]:
    """Sizes of a model that has lost units, before and now, as its files say; empty for any other."""
    told = source.sparsity.get("sizes")
    found = {str(n): (nested(v, "before"), nested(v, "now")) for n, v in told.items()} if isinstance(told, dict) else {}
    found |= shrunk_sizes(source.checkpoint.callbacks)
    whole = {n: pair for n, pair in found.items() if all(isinstance(v, int) and v > 0 for v in pair)}
    return {name: (before, now) for name, (before, now) in whole.items() if before != now}


def speed(inspection: Inspection, smaller: bool = False) -> str:
    """What the zeros are good for, or the units that a smaller model has lost."""
    if not inspection.totals().zeros:
        return (
            "Whole units were removed: what is left is dense, smaller and faster wherever it runs."
            if smaller
            else "Nothing is pruned."
        )
    if inspection.pattern == "2:4":
        return (
            "Stored densely, zeros make no file smaller. 2:4 is what the sparse tensor cores of NVIDIA GPUs take "
            "(torch.sparse.to_sparse_semi_structured); elsewhere it runs at the speed of the dense model."
        )
    return (
        "Stored densely, zeros make no file smaller, and unstructured zeros make no dense kernel faster: what is "
        "gained needs a sparse format and kernels made for it. Compressed with a general tool the files do shrink."
    )


Facts = dict[str, dict[str, str]]

_LONGEST = 240
_ARCHITECTURE = (
    *("model_type", "hidden_size", "n_embd", "intermediate_size", "num_hidden_layers", "n_layer"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings", "torch_dtype", "dtype"),
)
_TRAINING = (
    *("strategy", "accelerator", "processes", "devices", "precision", "max_steps", "accumulate_grad_batches"),
    "gradient_clip_val",
)
_DATA = (
    *("source", "name", "split", "revision", "validation", "validation_share", "tokenizer", "block_size", "batch_size"),
    "seed",
)
_MODEL = ("model", "gguf_file", "revision", "learning_rate", "weight_decay", "lr_schedule", "warmup_ratio")


def summarize(source: Source) -> Facts:
    """Facts by group: method, model, training, data, versions. Only what is known; the run's own words come first."""
    run, checkpoint = source.history.run, source.checkpoint
    facts = _methods(source)
    facts["Sizes"] = {name: f"{before:,} → {now:,}" for name, (before, now) in shrunk(source).items()}
    hyper = source.hparams or checkpoint.hyper_parameters
    config = checkpoint.config
    facts["Model"] = _lines((k, config.get(k)) for k in _ARCHITECTURE) | _lines((k, hyper.get(k)) for k in _MODEL)
    trainer = nested(source.config, "trainer") or {}
    training = {k: run.get(k, trainer.get(k)) for k in _TRAINING}
    seed = run.get("seed")
    seed = source.config.get("seed_everything") if seed is None else seed
    progress = [(k, checkpoint.progress.get(k)) for k in ("epoch", "global_step")]
    facts["Training"] = _lines([("seed", seed), *progress, *training.items()])
    facts["Data"] = _data(source)
    versions = run.get("versions")
    found = dict(versions) if isinstance(versions, Mapping) else {}
    found.setdefault("lightning", checkpoint.progress.get("lightning"))
    found.setdefault("transformers", config.get("transformers_version"))
    facts["Versions"] = _lines(found.items())
    return {title: lines for title, lines in facts.items() if lines}


def _methods(source: Source) -> Facts:
    """Settings by method, numbered where there are several of one name: of callbacks, masks, or ``sparsity.json``."""
    named = [(f"Method: {name}", settings) for name, settings in _callbacks(source)]
    if not named:
        states = states_of(source.checkpoint.callbacks, "WeightPruning").values()
        named = [("Method", _own(s, s.get("settings"))) for s in states if isinstance(s, Mapping) and s.get("score")]
    if not named:
        told = source.sparsity.get("settings")
        each = told if isinstance(told, list) and told else [None]
        named = [("Method", _own(source.sparsity, settings)) for settings in each]
    of, so_far = Counter(title for title, _ in named), Counter[str]()
    facts: Facts = {}
    for title, settings in named:
        so_far[title] += 1
        facts[title if of[title] == 1 else f"{title} {so_far[title]}"] = _lines(settings.items())
    return facts


def _own(told: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """Score and pattern that stand beside settings, and these, where there are any."""
    return {k: told.get(k) for k in ("score", "pattern")} | (dict(settings) if isinstance(settings, Mapping) else {})


def _callbacks(source: Source) -> list[tuple[str, Mapping[str, Any]]]:
    """Names and settings of the callbacks that pruned or retrained, from the history or the command line's file."""
    told = source.history.run.get("callbacks")
    if isinstance(told, list) and told:
        named = [(c.get("name"), c.get("settings")) for c in told if isinstance(c, Mapping)]
    else:
        listed = nested(source.config, "trainer", "callbacks")
        listed = listed if isinstance(listed, list) else []
        named = [(c.get("class_path"), c.get("init_args")) for c in listed if isinstance(c, Mapping)]
        named = [(n, s) for n, s in named if isinstance(n, str) and n.startswith("lightning_prune")]
    return [
        (str(name).rsplit(".", 1)[-1], settings)
        for name, settings in named
        if isinstance(settings, Mapping) and "SparsityMonitor" not in str(name)
    ]


def _data(source: Source) -> dict[str, str]:
    settings = nested(source.history.run, "data", "settings") or nested(source.config, "data", "init_args")
    settings = settings or source.checkpoint.data_hyper_parameters
    if not isinstance(settings, Mapping):
        return {}
    found = _lines((k, settings.get(k)) for k in _DATA)
    if found and not settings.get("revision"):
        found["revision"] = "not pinned"
    return found


def _lines(pairs: Iterable[tuple[str, Any]]) -> dict[str, str]:
    return {str(key): text(value) for key, value in pairs if value is not None and value != {} and value != []}


def text(value: Any) -> str:
    """A value in a line."""
    if isinstance(value, float):
        written = f"{value:g}"
    elif isinstance(value, (Mapping, list, tuple)):
        written = json.dumps(value, default=str)
    else:
        written = str(value)
    return written if len(written) <= _LONGEST else written[: _LONGEST - 1] + "…"
