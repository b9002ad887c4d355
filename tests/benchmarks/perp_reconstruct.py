"""Perplexity before and after PERP's block-wise reconstruction, without any end-to-end training.

For every row the dense weights are restored, `lightning_prune.prune` makes the masks, and
`lightning_prune.perp.reconstruct` fits each decoder block, or its halves, to the dense one on the same sequences.
Reported: perplexity of each text when pruned and when reconstructed, the mean error of the blocks before and after
(squared differences over squared dense outputs), seconds of both stages, and the highest memory of the
reconstruction above what was held when it began. The dense weights come from a file, block by block.

    python tests/benchmarks/perp_reconstruct.py --model FOLDER --calibration TEXT --evaluation TEXT TEXT2 \\
        --only wanda-50 wanda-2:4 --steps 100 --learning-rate 3e-4 1e-3 --json FILE

With `--all` it fits all kept weights of half blocks. Every learning rate is a row. `--json` merges, so the table can be
made in pieces.
"""

from __future__ import annotations

import fnmatch
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from ours import ours_prune, ours_reconstruct
from safetensors.torch import save_file

ROWS: dict[str, dict[str, Any]] = {
    "magnitude-50": {"method": "magnitude", "pattern": "unstructured"},
    "wanda-50": {"method": "wanda", "pattern": "unstructured"},
    "wanda-2:4": {"method": "wanda", "pattern": "2:4"},
    "kfac-50": {"method": "kfac", "pattern": "unstructured"},
    "sparsegpt-50": {"method": "sparsegpt", "pattern": "unstructured"},
}
KEY = (
    "name",
    "train",
    "adapter",
    "window",
    "teacher",
    "steps",
    "epochs",
    "learning_rate",
    "batch_size",
    "model",
    "calibration",
    "windows",
)


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--only", nargs="+", default=["wanda-50", "wanda-2:4"], help=f"of {', '.join(ROWS)}, or wildcards")
    p.add_argument("--adapter", default="mask_lora", help="mask_lora, scale_lora, hira, lora_prune, or none")
    p.add_argument("--all", action="store_true", help="train all kept weights, without adapters")
    p.add_argument("--window", help="block or half (default half with --all, else block)")
    p.add_argument("--teacher", default="dense", help="dense or pruned, see reconstruct")
    p.add_argument("--steps", type=int, default=100, help="optimizer steps for each block, without --all (default 100)")
    p.add_argument(
        "--epochs", type=int, default=1, help="passes over the samples for each window, with --all (default 1)"
    )
    p.add_argument("--learning-rate", nargs="+", type=float, default=[1e-3])
    p.add_argument("--batch-size", type=int, default=4, help="sequences in a step (default 4)")
    args = p.parse_args()
    chosen = [name for name in ROWS if any(fnmatch.fnmatchcase(name, wanted) for wanted in args.only)]
    if not chosen:
        raise SystemExit(f"--only {' '.join(args.only)} matches none of {', '.join(ROWS)}")

    model, tokenizer = common.load(args)
    sequences, evaluations = common.calibration_of(args, tokenizer), common.evaluations_of(args, tokenizer)
    settings, rows, table = common.settings_of(args), common.Rows(args.json, KEY), []
    adapter = None if args.all or args.adapter == "none" else args.adapter
    options: dict[str, Any] = {"train": ("bias", "norm"), "adapter": adapter, "steps": args.steps, "epochs": None}
    if args.all:
        options |= {"train": "all", "steps": None, "epochs": args.epochs}
    options |= {"window": args.window or ("half" if args.all else "block"), "teacher": args.teacher}
    options |= {"batch_size": args.batch_size}
    settings |= options
    dense = {"name": "dense", **settings, "learning_rate": None}
    if (found := rows.find(**dense)) is None or not found["pruned"].keys() >= evaluations.keys():
        found = dense | {"pruned": common.perplexities(model, evaluations)}
        rows.add(found)
    table += [{"row": "dense", "text": text, "pruned": found["pruned"][text]} for text in evaluations]

    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "dense.safetensors"
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, original)
        snapshot = common.Snapshot(model)
        for name in chosen:
            for rate in args.learning_rate:
                row = {"name": name, **settings, "learning_rate": rate}
                row |= measured(
                    model, snapshot, sequences, evaluations, ROWS[name], {**options, "learning_rate": rate}, original
                )
                rows.add(row)
                table += [
                    {
                        "row": name, "lr": rate, "text": text, "pruned": row["pruned"][text],
                        "reconstructed": row["reconstructed"][text], "error before": row["error"][0],
                        "error after": row["error"][1], "sparsity": row["achieved"], "prune s": row["seconds"]["prune"],
                        "reconstruct s": row["seconds"]["reconstruct"], "peak MiB": row["peak_mib"],
                    }
                    for text in evaluations
                ]  # fmt: skip
                print(common.markdown(table[-len(evaluations) :]), flush=True)
    print("\n" + common.markdown(table, list(table[-1])))


def measured(
    model: torch.nn.Module,
    snapshot: common.Snapshot,
    sequences: torch.Tensor,
    evaluations: dict[str, torch.Tensor],
    how: dict[str, Any],
    options: dict[str, Any],
    original: Path,
) -> dict[str, Any]:
    """Prune, evaluate, reconstruct, evaluate."""
    watch = common.Stopwatch()
    snapshot.restore()
    with watch("prune"):
        masks = ours_prune(model, sequences, how["method"], 0.5, how["pattern"], options["batch_size"])
    pruned = common.perplexities(model, evaluations)
    with common.PeakMemory() as memory, watch("reconstruct"):
        blocks = ours_reconstruct(model, sequences, original, masks, **options)
    if not common.same_zeros(model, masks):
        raise RuntimeError("a pruned weight is not zero after the reconstruction")
    before, after = zip(*blocks.values(), strict=True)
    return {
        "pruned": pruned,
        "reconstructed": common.perplexities(model, evaluations),
        "blocks": blocks,
        "error": [sum(before) / len(before), sum(after) / len(after)],
        "achieved": common.sparsity_of(masks),
        "seconds": watch.seconds,
        "start_mib": memory.start / 2**20,
        "peak_mib": (memory.peak - memory.start) / 2**20,
    }


if __name__ == "__main__":
    main()
