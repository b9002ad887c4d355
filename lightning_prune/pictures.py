"""Pictures of where a model is sparse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_prune.inspection import Inspection
from lightning_prune.tensor_names import block_order, order_kinds, place

# Okabe and Ito's colours, told apart by colour-blind readers, then shades for an eighth kind and more.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#8FBC6B", "#E69F00", "#D55E00", "#CC79A7", "#7A6FAC", "#8C8C8C")
# Up to this many bars stand side by side and can still be told apart; more become lines.
_MOST_BARS = 72


def sparsity_per_layer(source: Inspection | Mapping[str, Tensor], path: str | Path, title: str = "") -> Path:
    """Draw the sparsity of every pruned layer: blocks from left to right, one colour for each kind of layer.

    Args:
        source: What `lightning_prune.inspection.inspect` found, or masks by parameter name (bool, True = kept).
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
    zeros = sum(z for z, _ in cells.values())
    total = zeros / sum(n for _, n in cells.values())

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axes = figure.subplots()
    as_bars = len(blocks) * len(kinds) <= _MOST_BARS
    for i, kind in enumerate(kinds):
        here = [b for b in range(len(blocks)) if (blocks[b], kind) in shares]
        heights = [shares[blocks[b], kind] for b in here]
        colour = _COLOURS[i % len(_COLOURS)]
        if as_bars:
            width = 0.84 / len(kinds)
            places = [b + (i - (len(kinds) - 1) / 2) * width for b in here]
            axes.bar(places, heights, width * 0.92, color=colour, label=kind, zorder=2)
        else:
            axes.plot(here, heights, "o-", color=colour, label=kind, linewidth=1.6, markersize=3.5, zorder=2)
    axes.axhline(total, color="#333333", linestyle="--", linewidth=1.0, zorder=3, label=f"all, {total:.1%}")

    axes.set_title(f"{title + ': ' if title else ''}{total:.2%} of {_short(cells)} weights are zero", loc="left")
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

    path = Path(path)
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


def _short(cells: Mapping[tuple[str, str], tuple[int, int]]) -> str:
    numel = sum(n for _, n in cells.values())
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if numel >= size:
            return f"{numel / size:.1f} {unit}"
    return str(numel)
