"""The pictures of EfficientLLM (arXiv 2502.06663): saliency and pruned ratio of each type, and size, over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_prune.structure.history import ShrinkRecord, pruned_ratios

# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = {"attention": "#0072B2", "ffn": "#E69F00", "stem": "#009E73", "layer": "#CC79A7"}
_NAMES = {"attention": "attention (heads)", "ffn": "FFN (channels)", "stem": "stem (hidden)", "layer": "layers"}
_SIZE = "#444444"


def shrinking_picture(history: Sequence[ShrinkRecord], path: str | Path, title: str = "") -> Path:
    """Draw both pictures side by side.

    Left, the saliency of each type's cheapest unit at every pruning (logarithmic); the lowest goes. Right, the share of
    each type's units that have gone, and the parameters left (dashed, right axis).

    Args:
        history: Records of a training, the model before the first pruning first.
        path: Picture to write; the ending chooses the format (``.png``, ``.svg``, ``.pdf``).
        title: Put above.

    Returns:
        The path.

    Raises:
        ValueError: if nothing was pruned.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    if len(history) < 2:
        raise ValueError(f"history has {len(history)} record(s): nothing was pruned, so there is nothing to draw")
    figure = Figure(figsize=(12.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [record.tokens for record in history]
    divisor, unit = _scale(max(tokens))
    x = [t / divisor for t in tokens]
    _draw_saliency(left, history[1:], x[1:])
    lines = _draw_sizes(right, history, x)
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=5, frameon=False)
    for axes in (left, right):
        axes.set_xlabel(f"training tokens{f' ({unit})' if unit else ''}")
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8, zorder=0)
        axes.spines["top"].set_visible(False)
    left.spines["right"].set_visible(False)
    first, last = history[0], history[-1]
    change = f"{_count(first.parameters)} to {_count(last.parameters)} parameters"
    figure.suptitle(f"{title + ': ' if title else ''}{change}", x=0.01, ha="left")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _draw_saliency(axes: Any, history: Sequence[ShrinkRecord], x: Sequence[float]) -> None:
    positive = False
    for kind in _kinds(history):
        points = [(t, r.saliency[kind]) for t, r in zip(x, history, strict=True) if kind in r.saliency]
        positive = positive or any(value > 0 for _, value in points)
        if points:
            style = {"linewidth": 1.4, "marker": "o" if len(points) < 40 else None, "markersize": 3}
            axes.plot(*zip(*points, strict=True), color=_COLOURS[kind], zorder=2, **style)
    if positive:  # zeros have no logarithm, and leave gaps
        axes.set_yscale("log")
    axes.set_title("mean saliency of the cheapest unit", loc="left", fontsize="medium")


def _draw_sizes(axes: Any, history: Sequence[ShrinkRecord], x: Sequence[float]) -> list[Any]:
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    ratios = [pruned_ratios(record, history[0]) for record in history]
    for kind in history[0].units:
        heights = [ratio[kind] for ratio in ratios]
        axes.plot(x, heights, color=_COLOURS[kind], label=_NAMES[kind], linewidth=1.6, drawstyle="steps-post", zorder=2)
    axes.set_ylim(0.0, min(1.0, max(0.05, *(v for ratio in ratios for v in ratio.values())) * 1.12))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_title("share of units pruned, and parameters left", loc="left", fontsize="medium")
    size = axes.twinx()
    parameters = [record.parameters for record in history]
    size.plot(
        x, parameters, color=_SIZE, linestyle="--", label="parameters", linewidth=1.4, drawstyle="steps-post", zorder=2
    )
    size.set_ylim(0.0, max(parameters) * 1.05)
    size.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    size.spines["top"].set_visible(False)
    return [*axes.get_lines(), *size.get_lines()]


def _kinds(history: Sequence[ShrinkRecord]) -> list[str]:
    found = {kind for record in history for kind in record.saliency}
    return [kind for kind in _COLOURS if kind in found]


def _scale(largest: float) -> tuple[float, str]:
    for size, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= size:
            return size, unit
    return 1.0, ""


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
