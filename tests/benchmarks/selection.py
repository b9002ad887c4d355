"""How long it takes to choose the weights that go: in layers, in rows, N of M, and over all layers.

    python tests/benchmarks/selection.py [--against OLD_TREE] [--device cuda] [--rows 4096 --columns 4096 --layers 4]

Every round runs all ways one after the other; medians of the rounds are printed, in milliseconds a million weights, and
with ``--against`` their ratio to the other tree's. All must give the same masks.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def of_tree(tree: Path) -> ModuleType:
    """Another tree's selection, with what it imports from this one."""
    spec = importlib.util.spec_from_file_location("other_patterns", tree / "lightning_prune/pruning/patterns.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ways(patterns: ModuleType, scores: list[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    count, total = scores[0].numel() // 2, sum(s.numel() for s in scores)

    def over_all() -> list[tuple[int, int]]:
        if hasattr(patterns, "kth_smallest") and not hasattr(patterns, "row_thresholds"):
            value = patterns.kth_smallest(lambda: scores, total // 2)
            return [(int((s < value).sum()), int((s == value).sum())) for s in scores]
        from lightning_prune.pruning.selection import threshold_of

        found = threshold_of(lambda: scores, total // 2, total)
        return list(zip(found.below, found.equal, strict=True))

    return {
        "layer": lambda: [patterns.lowest_in_layer(s, count) for s in scores],
        "rows": lambda: [patterns.lowest_in_rows(s, count) for s in scores],
        "2:4": lambda: [patterns.nm_mask(s, patterns.NM(2, 4)) for s in scores],
        "over all layers": over_all,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--device", default="cpu")
    for name, default in (("rows", 2048), ("columns", 2048), ("layers", 4), ("rounds", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    scores = [
        (torch.randn(args.rows, args.columns).abs() * torch.rand(args.columns)).to(args.device)
        for _ in range(args.layers)
    ]
    import lightning_prune.pruning.patterns as here

    sides = {"here": ways(here, scores)}
    if args.against:
        sides["there"] = ways(of_tree(args.against), scores)
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name in sides["here"]:
            results = []
            for side, functions in sides.items():
                start = time.perf_counter()
                results.append(functions[name]())
                if args.device != "cpu":
                    torch.cuda.synchronize()
                seconds.setdefault((name, side), []).append(time.perf_counter() - start)
            first, *others = results
            for other in others:
                assert all(
                    torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                    for a, b in zip(first, other, strict=True)
                )
    millions = sum(s.numel() for s in scores) / 1e6
    for name in sides["here"]:
        medians = {side: statistics.median(seconds[name, side]) * 1e3 / millions for side in sides}
        ratio = f", {medians['here'] / medians['there']:.2f} of it" if "there" in medians else ""
        print(name, {side: f"{value:.2f} ms" for side, value in medians.items()}, ratio)


if __name__ == "__main__":
    main()
