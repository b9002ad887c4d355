"""Draw figures: curves, histograms, heat maps, sparsity of layers, a shrinking model."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.checkpoints.inspection import Inspection
from lightning_prune.naming import block_order, order_kinds, place
from lightning_prune.pruning.score_histograms import BINS, LOWEST, ScoreSummary
from lightning_prune.results import short
from lightning_prune.safety import expanded
from lightning_prune.structure.shrinking import ShrinkRecord, pruned_ratios

WIDTH, HEIGHT = 600, 160
_MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: What it shows.
        path: The ``d`` of an SVG path.
        first: First and last step.
        low: Smallest and largest value, the bottom and the top of the picture.
        last: Last value.
    """

    name: str
    path: str
    first: int
    end: int
    low: float
    high: float
    last: float


def line(name: str, points: Sequence[tuple[int, float]], low: float | None = None) -> Line | None:
    """A curve through points of step and value; None without two of different steps.

    Args:
        name: What it shows.
        points: Step and value.
        low: Value at the bottom; default the smallest.
    """
    found = dict(points)
    steps = sorted(found)
    if len(steps) < 2:
        return None
    thin = steps[:: math.ceil(len(steps) / _MOST_POINTS)]
    steps = thin if thin[-1] == steps[-1] else [*thin, steps[-1]]
    bottom = min(found[s] for s in steps) if low is None else low
    top = max(found[s] for s in steps)
    height = top - bottom or 1.0
    places = [
        f"{WIDTH * (s - steps[0]) / (steps[-1] - steps[0]):.1f} {HEIGHT * (1 - (found[s] - bottom) / height):.1f}"
        for s in steps
    ]
    return Line(name, "M" + "L".join(places), steps[0], steps[-1], bottom, top, found[steps[-1]])


@dataclass(frozen=True)
class Histogram:
    """Kept and pruned by size, one upon the other.

    Attributes:
        name: Whose numbers.
        kept: ``d`` of the SVG path of the bars of what was kept.
        pruned: Of what was pruned, standing on the kept ones.
        labels: Numbers under the left end, the middle and the right end.
        kept_share: Share of what was kept.
        overlap: Share of the pruned that are larger than the smallest tenth of the kept.
    """

    name: str
    kept: str
    pruned: str
    labels: tuple[str, str, str]
    kept_share: float
    overlap: float | None


def histograms(summary: ScoreSummary, kind_of: dict[str, str]) -> list[Histogram]:
    """One histogram a type of layer, all over the same range.

    Args:
        summary: Histograms by parameter name.
        kind_of: Type of each parameter, in the order to draw them; those without one are left out.
    """
    kinds: dict[str, tuple[Tensor, Tensor]] = {}
    for name, kind in kind_of.items():
        if name in summary.layers:
            layer = summary.layers[name]
            kept, pruned = kinds.get(kind, (torch.zeros_like(layer.kept), torch.zeros_like(layer.pruned)))
            kinds[kind] = (layer.kept + kept, layer.pruned + pruned)
    everything = torch.zeros(BINS, dtype=torch.int64, device="cpu")
    for kept, pruned in kinds.values():
        everything += kept + pruned
    if not int(everything.sum()):
        return []
    first, last = _range(everything)
    return [_histogram(kind, kept, pruned, first, last) for kind, (kept, pruned) in kinds.items()]


def _range(counts: Tensor) -> tuple[int, int]:
    """First and last bin that matter: all but a thousandth at each end."""
    share = counts.double().cumsum(0) / counts.sum()
    first, last = int((share > 0.001).nonzero()[0]), int((share < 0.999).sum())
    return first, min(BINS - 1, max(last, first + 1))


def _histogram(name: str, kept: Tensor, pruned: Tensor, first: int, last: int) -> Histogram:
    below, above = kept[first : last + 1].tolist(), pruned[first : last + 1].tolist()
    top = max(1, *(b + a for b, a in zip(below, above, strict=True)))
    each = WIDTH / len(below)
    bars: list[list[str]] = [[], []]
    for i, (b, a) in enumerate(zip(below, above, strict=True)):
        middle = HEIGHT * (1 - b / top)
        for part, start, end in ((0, HEIGHT, middle), (1, middle, HEIGHT * (1 - (b + a) / top))):
            if start - end > 0.05:
                bars[part].append(f"M{i * each + 0.5:.1f} {start:.1f}h{each - 1:.1f}V{end:.1f}h{1 - each:.1f}z")
    total = int(kept.sum() + pruned.sum())
    edges = (first, (first + last + 1) / 2, last + 1)
    left, middle_label, right = (_power(LOWEST + edge / 2) for edge in edges)
    return Histogram(
        name,
        "".join(bars[0]),
        "".join(bars[1]),
        (left, middle_label, right),
        int(kept.sum()) / total if total else 0.0,
        _overlap(kept, pruned),
    )


def _overlap(kept: Tensor, pruned: Tensor) -> float | None:
    if not int(pruned.sum()) or not int(kept.sum()):
        return None
    tenth = int(((kept.double().cumsum(0) / kept.sum()) < 0.1).sum())
    return float(pruned[tenth:].sum() / pruned.sum())


def _power(log2: float) -> str:
    return f"{2.0**log2:.1e}".replace("e-0", "e-").replace("e+0", "e+") if abs(log2) > 9 else f"{2.0**log2:.3g}"


def picture(values: Tensor, low: float, high: float) -> str:
    """A matrix ``[R, C]`` as the data URI of a PNG of as many pixels; cividis, dark = low, bright = high."""
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, values.numpy(), vmin=low, vmax=high, cmap="cividis", format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def strip(values: Tensor) -> str:
    """A profile ``[N]`` of shares as the ``d`` of an SVG path, from 0 at the bottom to 1 at the top."""
    each = WIDTH / len(values)
    steps = [f"V{HEIGHT * (1 - value):.1f}h{each:.2f}" for value in values.tolist()]
    return f"M0 {HEIGHT}" + "".join(steps) + f"V{HEIGHT}z"


# Okabe and Ito's colors, told apart by color-blind readers, then shades for an eighth kind and more.
_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#8FBC6B", "#E69F00", "#D55E00", "#CC79A7", "#7A6FAC", "#8C8C8C")
# Up to this many bars stand side by side and can still be told apart; more become lines.
_MOST_BARS = 72


def sparsity_per_layer(source: Inspection | Mapping[str, Tensor], path: str | Path, title: str = "") -> Path:
    """Draw the sparsity of every pruned layer: blocks from left to right, one color for each kind of layer.

    Args:
        source: What `lightning_prune.inspect` found, or masks by parameter name (bool, True = kept).
        path: Picture to write; the ending chooses the format (``.png``, ``.svg``, ``.pdf``).
        title: Put before the total.

    Returns:
        The path.

    Raises:
        ValueError: if there is no layer to draw.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    cells = cells_of(source)
    if not cells:
        raise ValueError(f"source={type(source).__name__} holds no prunable weights to draw")
    blocks = list(dict.fromkeys(block for block, _ in cells))
    kinds = order_kinds(kind for _, kind in cells)
    shares = {key: zeros / numel for key, (zeros, numel) in cells.items()}
    numel = sum(n for _, n in cells.values())
    total = sum(z for z, _ in cells.values()) / numel

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axes = figure.subplots()
    as_bars = len(blocks) * len(kinds) <= _MOST_BARS
    for i, kind in enumerate(kinds):
        here = [b for b in range(len(blocks)) if (blocks[b], kind) in shares]
        heights = [shares[blocks[b], kind] for b in here]
        color = _COLORS[i % len(_COLORS)]
        if as_bars:
            width = 0.84 / len(kinds)
            places = [b + (i - (len(kinds) - 1) / 2) * width for b in here]
            axes.bar(places, heights, width * 0.92, color=color, label=kind, zorder=2)
        else:
            axes.plot(here, heights, "o-", color=color, label=kind, linewidth=1.6, markersize=3.5, zorder=2)
    axes.axhline(total, color="#333333", linestyle="--", linewidth=1.0, zorder=3, label=f"all, {total:.1%}")

    axes.set_title(
        f"{title + ': ' if title else ''}{total:.2%} of {short(numel)} weights are zero",
        loc="left",
    )
    axes.set_xlabel("block")
    axes.set_ylabel("sparsity")
    axes.set_ylim(0.0, min(1.0, max(0.05, *shares.values(), total) * 1.12))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    names = [block.rsplit(".", 1)[-1] or "other" for block in blocks]
    if len(blocks) <= 12:
        axes.set_xticks(range(len(blocks)), names)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)

    return _saved(figure, path)


def perplexity_over_sparsity(
    curves: Mapping[str, Mapping[float, float]], dense: float, path: str | Path, title: str = ""
) -> Path:
    """Draw perplexities over the share of zeros, a line for each method; all begin at the dense model.

    Args:
        curves: By method: sparsity, above 0.0 and up to 1.0, to perplexity.
        dense: Perplexity of the dense model.
        path: Picture to write; the ending chooses the format.
        title: Above it.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        known = {0.0: dense, **dict(sorted(points.items()))}
        color = _COLORS[i % len(_COLORS)]
        axes.plot(list(known), list(known.values()), "o-", color=color, label=name, linewidth=1.6, markersize=4)
    axes.axhline(dense, color="#333333", linestyle="--", linewidth=1.0, label=f"dense, {dense:.1f}")
    axes.set(xlabel="zeros", ylabel="perplexity, lower is better")
    axes.set_title(title, loc="left")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.legend(frameon=False)
    return _saved(figure, path)


def check_picture(path: str | Path, argument: str) -> None:
    """Refuse a picture of a format that cannot be written, before anything long begins.

    Raises:
        ValueError: naming the argument, and the formats there are.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if (ending := Path(path).suffix.lstrip(".").lower()) and ending not in known:
        raise ValueError(f"{argument}={str(path)!r} ends in {ending!r}; pictures are written as {', '.join(known)}")


def _saved(figure: Any, path: str | Path) -> Path:
    path = expanded(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def cells_of(source: Inspection | Mapping[str, Tensor]) -> dict[tuple[str, str], tuple[int, int]]:
    """Zeros and number of weights by block and kind of layer, in the order of the model."""
    cells: dict[tuple[str, str], tuple[int, int]] = {}
    if isinstance(source, Inspection):
        found = [(t.name, t.zeros, t.numel) for t in source.selected()]
    else:
        found = [(name, int((~mask).sum()), mask.numel()) for name, mask in source.items()]
    for name, zeros, numel in sorted(found, key=lambda entry: block_order(place(entry[0])[0])):
        before = cells.get(place(name), (0, 0))
        cells[place(name)] = (before[0] + zeros, before[1] + numel)
    return cells


# Okabe and Ito's colors, told apart by color-blind readers.
_UNIT_COLORS = {"attention": "#0072B2", "ffn": "#E69F00", "hidden": "#009E73", "layer": "#CC79A7", "expert": "#D55E00"}
_NAMES = {
    "attention": "attention (heads)",
    "ffn": "FFN (channels)",
    "hidden": "hidden (channels)",
    "layer": "layers",
    "expert": "experts",
}
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
    change = f"{short(first.parameters)} to {short(last.parameters)} parameters"
    figure.suptitle(f"{title + ': ' if title else ''}{change}", x=0.01, ha="left")
    return _saved(figure, path)


def _draw_saliency(axes: Any, history: Sequence[ShrinkRecord], x: Sequence[float]) -> None:
    positive = False
    for kind in _kinds(history):
        points = [(t, r.saliency[kind]) for t, r in zip(x, history, strict=True) if kind in r.saliency]
        positive = positive or any(value > 0 for _, value in points)
        if points:
            style = {"linewidth": 1.4, "marker": "o" if len(points) < 40 else None, "markersize": 3}
            axes.plot(*zip(*points, strict=True), color=_UNIT_COLORS[kind], zorder=2, **style)
    if positive:  # zeros have no logarithm, and leave gaps
        axes.set_yscale("log")
    axes.set_title("mean saliency of the cheapest unit", loc="left", fontsize="medium")


def _draw_sizes(axes: Any, history: Sequence[ShrinkRecord], x: Sequence[float]) -> list[Any]:
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    ratios = [pruned_ratios(record, history[0]) for record in history]
    for kind in history[0].units:
        heights = [ratio[kind] for ratio in ratios]
        axes.plot(
            x, heights, color=_UNIT_COLORS[kind], label=_NAMES[kind], linewidth=1.6, drawstyle="steps-post", zorder=2
        )
    axes.set_ylim(0.0, min(1.0, max(0.05, *(v for ratio in ratios for v in ratio.values())) * 1.12))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_title("share of units pruned, and parameters left", loc="left", fontsize="medium")
    size = axes.twinx()
    parameters = [record.parameters for record in history]
    size.plot(
        x, parameters, color=_SIZE, linestyle="--", label="parameters", linewidth=1.4, drawstyle="steps-post", zorder=2
    )
    size.set_ylim(0.0, max(parameters) * 1.05)
    size.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    size.spines["top"].set_visible(False)
    return [*axes.get_lines(), *size.get_lines()]


def _kinds(history: Sequence[ShrinkRecord]) -> list[str]:
    found = {kind for record in history for kind in record.saliency}
    return [kind for kind in _UNIT_COLORS if kind in found]


def _scale(largest: float) -> tuple[float, str]:
    for size, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= size:
            return size, unit
    return 1.0, ""
