"""Draw perplexity over sparsity, ours and the peers', from the table "Other sparsities" of the page of figures.

python tests/benchmarks/picture.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "notebooks" / "docs" / "pages" / "figures.md"
PICTURE = PAGE.parent / "images" / "perplexity.svg"
# Our own methods are drawn in strong lines, the published ones thin.
OURS = {"kfac", 'kfac, update="obs"', 'kfac, update="alps"'}


def first_number(cell: str) -> float | None:
    """The WikiText-2 figure of a cell, which comes first."""
    found = re.search(r"\d+(\.\d+)?", cell)
    return float(found.group()) if found else None


def read_table() -> tuple[float, dict[str, dict[int, float]]]:
    """The dense perplexity, and those of each method by percent of zeros."""
    text = PAGE.read_text(encoding="utf-8").split("### Other sparsities")[1].split("###")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.split("\n") if line.startswith("|")]
    percents = [int(found.group(1)) for cell in rows[0] if (found := re.match(r"(\d+) %", cell))]  # not 2:4
    curves = {}
    for row in rows[2:]:
        name = re.sub(r"[*`]", "", row[0]).removesuffix(", block by block")
        values = zip(percents, map(first_number, row[1:]), strict=False)
        curves[name] = {percent: value for percent, value in values if value is not None}
    dense = curves.pop("dense")[percents[0]]
    return dense, curves


def main() -> None:
    dense, curves = read_table()
    plt.rcParams["svg.hashsalt"] = "perplexity"  # the same file from the same figures
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    colors = iter(("#9a9a9a", "#c26a2d", "#8a5fb0", "#4d8b57", "#b03a5b", "#63a4d8", "#1f77b4", "#0b3d91"))
    for name, points in curves.items():
        strong = name in OURS
        axes.plot(
            list(points), list(points.values()), marker="o", label=name, color=next(colors),
            linewidth=2.4 if strong else 1.2, linestyle="-" if strong else "--",
        )  # fmt: skip
    axes.axhline(dense, color="black", linewidth=0.8)
    axes.text(70, dense * 1.05, f"dense {dense:g}", ha="right", va="bottom", fontsize=9)
    axes.set(yscale="log", xlabel="zeros, % of the decoder's weights", ylabel="perplexity, WikiText-2")
    axes.set_xticks(sorted({percent for points in curves.values() for percent in points}))
    axes.set_ylim(top=600)  # magnitude leaves the picture
    axes.set_yticks([25, 50, 100, 200, 400], ["25", "50", "100", "200", "400"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="major", alpha=0.3)
    axes.set_title("SmolLM2-135M, nothing retrained: lower is better", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
