"""Zero-shot accuracy on minimal pairs (BLiMP): the dense model, pruned ones, and pruned ones retrained by PERP.

For every row the dense weights are restored and pruned; rows that end in "+perp" are then retrained with MaskLoRA and
norms, as in `perp.py`, and merged. Reported: the accuracy on each task through lm-eval, their mean, and the perplexity
on the evaluation texts.

    python tests/benchmarks/tasks.py --model FOLDER --calibration TEXT --evaluation TEXT2 --retraining TEXT3 \\
        --tasks FOLDER2 --only dense wanda-50 'kfac-50*' --json FILE

`--only` takes names or wildcards, and `--json` merges: rows that the file has under the same settings are not made
again, so the table can be made in pieces. `--autocast` retrains with products in bfloat16, where the processor is
faster at it; all else is in float32.
"""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path
from typing import Any

import common
import torch
from ours import ours_prune, ours_tasks
from perp import VARIANTS, Retraining, training_blocks
from torch import Tensor, nn

PRUNED = ("magnitude-50", "wanda-50", "gblm-50", "kfac-50")
RETRAINED = {"wanda-50": "wanda-50+perp", "kfac-50": "kfac-50+perp"}
ROWS = ("dense", *(row for start in PRUNED for row in (start, *([RETRAINED[start]] if start in RETRAINED else []))))
# As in quality.py.
OPTIONS: dict[str, dict[str, Any]] = {"gblm": {"alpha": 100.0, "grad_norm": "l2"}}


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--tasks", required=True, help="folder of .jsonl files of minimal pairs")
    p.add_argument("--retraining", required=True, help="text file to train on")
    p.add_argument("--only", nargs="+", default=["*"], help=f"rows to make, names or wildcards, of {', '.join(ROWS)}")
    p.add_argument("--limit", type=int, help="pairs of each task (default all)")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--block-length", type=int, default=128)
    p.add_argument("--rate", type=float, default=1e-3)
    p.add_argument("--autocast", action="store_true", help="retrain under bfloat16 autocast")
    args = p.parse_args()
    args.tuning_windows = 8  # blocks that perp.py holds out, so that both train on the same ones
    chosen = [name for name in ROWS if any(fnmatch.fnmatchcase(name, wanted) for wanted in args.only)]
    if not chosen:
        raise SystemExit(f"--only {' '.join(args.only)} matches none of {', '.join(ROWS)}")

    model, tokenizer = common.load(args)
    sequences = common.calibration_of(args, tokenizer)
    evaluations = common.evaluations_of(args, tokenizer)
    batches, _ = training_blocks(args, tokenizer)
    settings = common.settings_of(args) | {
        "tasks": Path(args.tasks).name,
        "pairs": args.limit,
        "training": f"{args.steps} x {args.batch_size} x {args.block_length}, {args.rate:g}",
        "text": Path(args.retraining).stem,
        "autocast": args.autocast,
    }
    rows = common.Rows(args.json, ("row", *settings))
    snapshot = common.Snapshot(model)

    def measure(name: str) -> None:
        found = ours_tasks(model, tokenizer, args.tasks, args.limit)
        rows.add({"row": name, **settings, **found, "perplexity": common.perplexities(model, evaluations)})
        print(common.markdown(table(rows, chosen, settings)), flush=True)

    def missing(name: str | None) -> bool:
        return name in chosen and rows.find(row=name, **settings) is None

    if missing("dense"):
        measure("dense")
    for start in PRUNED:
        retrained = RETRAINED.get(start)
        if not (missing(start) or missing(retrained)):
            continue
        snapshot.restore()
        score = start.removesuffix("-50")
        masks = ours_prune(model, sequences, score, 0.5, "unstructured", **OPTIONS.get(score, {}))
        if missing(start):
            measure(start)
        if retrained is not None and missing(retrained):
            retrain(model, masks, batches, args)
            if not common.same_zeros(model, masks):
                raise RuntimeError(f"{retrained}: a pruned weight is not zero after retraining")
            measure(retrained)
    print("\n" + common.markdown(table(rows, chosen, settings)))


def retrain(model: nn.Module, masks: dict[str, Tensor], batches: list[Tensor], args: argparse.Namespace) -> None:
    retraining = Retraining(model, masks, VARIANTS["mask_lora"], args.rate, len(batches))
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            retraining.step(batch)
    retraining.finish()
    model.eval()


def table(rows: common.Rows, chosen: list[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each task, their mean and each text; a column for each row that is known."""
    known = {name: found for name in chosen if (found := rows.find(row=name, **settings)) is not None}
    lines: dict[str, dict[str, Any]] = {}
    for name, found in known.items():
        values = {task: f"{100 * value:.1f}" for task, value in found["accuracy"].items()}
        values["mean"] = f"{100 * found['mean']:.1f} ± {100 * found['stderr']:.1f}"
        values |= {f"perplexity, {text}": f"{value:.1f}" for text, value in found["perplexity"].items()}
        for line, value in values.items():
            lines.setdefault(line, {"accuracy in %": line})[name] = value
    return list(lines.values())


if __name__ == "__main__":
    main()
