"""Numbers to what a page draws: paths of inline SVG and small PNG pictures. Text and colours are the template's.

SVG coordinates run from 0 to `WIDTH` and `HEIGHT`; they are stretched to the width of the page, so they hold no text.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.score_summary import BINS, LOWEST, ScoreSummary

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
    everything = torch.zeros(BINS, dtype=torch.int64)
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
