"""How kfac's gamma, mix and clamp act: tuned on the first evaluation text, reported on the others.

One sweep over the dense model collects the statistics; every setting is then a selection and an evaluation.
For each sparsity three searches follow one another, each from the best of the one before, on the first
text:

1. gamma x mix at the clamp [0.1, 0.9];
2. clamps at the best gamma and mix;
3. the winner, the default (gamma 0.7, mix 0.7, [0.1, 0.9]) and Wanda-like rows (gamma 0, mix 0) on every
   text.

`--tuning-windows` evaluates the search on fewer windows than the report.

    python tests/benchmarks/study.py --model FOLDER --calibration TEXT --evaluation A B C \\
        --sparsity 0.5 0.6 0.7 --json FILE

The rows of the search are merged into the JSON file and not evaluated again, so a study can be interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import torch
from ours import OursKfac
from torch import Tensor

GAMMAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MIXES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
CLAMPS = ((0.0, 1.0), (0.05, 0.95), (0.1, 0.9), (0.2, 0.8), (0.3, 0.8))
DEFAULT = {"gamma": 0.7, "mix": 0.7, "low": 0.1, "high": 0.9}
WITHOUT = {"gamma": 0.0, "mix": 0.0, "low": 0.1, "high": 0.9}

Setting = dict[str, float]


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    p.add_argument("--gamma", nargs="+", type=float, default=list(GAMMAS))
    p.add_argument("--mix", nargs="+", type=float, default=list(MIXES))
    p.add_argument("--clamp", nargs="+", default=[f"{low}-{high}" for low, high in CLAMPS], help="LOW-HIGH")
    p.add_argument("--tuning-windows", type=int, help="windows in the search (default: --windows)")
    p.add_argument("--batch-size", type=int, default=4, help="sequences in one calibration batch")
    args = p.parse_args()
    clamps = [tuple(float(x) for x in clamp.split("-")) for clamp in args.clamp]

    model, tokenizer = common.load(args)
    snapshot = common.Snapshot(model)
    kfac = OursKfac(model, common.calibration_of(args, tokenizer), args.batch_size)
    evaluations = common.evaluations_of(args, tokenizer)
    tuned_on = next(iter(evaluations))
    tuning_windows = args.tuning_windows or args.windows
    tuning = common.blocks(common.tokenize(args.evaluation[0], tokenizer), tuning_windows, args.window_length)
    settings = common.settings_of(args)
    rows = common.Rows(args.json, ("stage", "sparsity", "gamma", "mix", "low", "high", "text", *settings))

    @torch.no_grad()
    def evaluate(stage: str, sparsity: float, setting: Setting, text: str, windows: Tensor) -> float:
        count = {"windows": f"{len(windows)}x{args.window_length}"}
        row: dict[str, Any] = {"stage": stage, "sparsity": sparsity, **setting, "text": text}
        row |= settings | count
        if (found := rows.find(**row)) is not None:
            return float(found["perplexity"])
        snapshot.restore()
        for name, mask in kfac.masks(sparsity, **setting).items():
            model.get_parameter(name).mul_(mask)
        value = common.perplexity(model, windows)
        snapshot.restore()
        rows.add(row | {"perplexity": value})
        return value

    def search(sparsity: float, candidates: list[Setting]) -> tuple[Setting, list[dict[str, Any]]]:
        found = [s | {"perplexity": evaluate("search", sparsity, s, tuned_on, tuning)} for s in candidates]
        best = min(found, key=lambda s: s["perplexity"])
        return {k: best[k] for k in DEFAULT}, found

    report: list[dict[str, Any]] = []
    for sparsity in args.sparsity:
        clamp = {"low": DEFAULT["low"], "high": DEFAULT["high"]}
        grid = [{"gamma": g, "mix": m} | clamp for g in args.gamma for m in args.mix]
        best, found = search(sparsity, grid)
        print(f"\nSparsity {sparsity}, {tuned_on}, {tuning_windows} windows, clamp {clamp}\n")
        print(common.markdown(grid_table(found)))
        best, found = search(sparsity, [best | {"low": low, "high": high} for low, high in clamps])
        print("\n" + common.markdown(found), flush=True)
        for name, setting in (("tuned", best), ("default", DEFAULT), ("without gradients", WITHOUT)):
            line = {"sparsity": sparsity, "setting": name, **setting}
            line |= {text: evaluate("report", sparsity, setting, text, w) for text, w in evaluations.items()}
            report.append(line)
    print(f"\nTuned on {Path(args.evaluation[0]).stem}:\n\n" + common.markdown(report))


def grid_table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of gamma, columns of mix."""
    table: dict[float, dict[str, Any]] = {}
    for entry in found:
        line = table.setdefault(entry["gamma"], {"gamma": str(entry["gamma"])})
        line[f"mix {entry['mix']}"] = entry["perplexity"]
    return list(table.values())


if __name__ == "__main__":
    main()
