"""Speed of calibration and selection, as ratios of adjacent, interleaved runs (medians).

- wanda: the reference block by block, against one sweep of the dense model; both from dense to pruned.
- gblm: the reference's two stages (gradients of the dense model, then block by block), against one fused
  sweep that collects norms and per-sample gradients together, with the selection included on both sides;
  the gradient and norm stages of the reference alone, against the sweep alone, are reported too.
- sweep: the fused gblm sweep against a bare forward + backward of the same sequences at the same batch
  size, all parameters requiring gradients, gradients set to None in between.
- kfac: the kfac sweep (activation gradients only) against the gblm sweep.
- select: masks of all decoder layers against a full sort (`torch.sort`): by row, by layer, and 2:4.

`other/ours` above 1 means that ours is faster. Ratios are taken within each round and the median is shown.

    python tests/benchmarks/speed.py --model FOLDER --calibration TEXT --only wanda gblm --repetitions 3
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import reference
import torch
from ours import ours_prune, ours_select, ours_sweep
from torch import Tensor, nn


class Bench:
    """The model, its sequences and the settings that every benchmark below shares."""

    def __init__(self, model: nn.Module, sequences: Tensor, batch_size: int, repetitions: int, warmup: int) -> None:
        self.model, self.sequences, self.batch_size = model, sequences, batch_size
        self.repetitions, self.warmup = repetitions, warmup
        self.snapshot = common.Snapshot(model)

    def run(self, functions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        return common.interleaved(functions, self.repetitions, self.snapshot.restore, self.warmup)


def row(name: str, other: str, seconds: dict[str, list[float]], theirs: str = "other") -> dict[str, Any]:
    return {"benchmark": name, "other": other} | common.compare(seconds, "ours", theirs)


def bench_wanda(b: Bench) -> list[dict[str, Any]]:
    seconds = b.run(
        {
            "ours": lambda: ours_prune(b.model, b.sequences, "wanda", 0.5, "unstructured", b.batch_size),
            "other": lambda: reference.prune(b.model, b.sequences, "wanda"),
        }
    )
    return [row("wanda single pass, end to end", "reference, block by block", seconds)]


def bench_gblm(b: Bench) -> list[dict[str, Any]]:
    stages: dict[str, list[float]] = {"stages": []}

    def two_stages() -> None:
        _, watch = reference.prune(b.model, b.sequences, "gblm")
        stages["stages"].append(watch["gradient"] + watch["norms"] + watch["propagate"])

    seconds = b.run(
        {
            "ours": lambda: ours_prune(b.model, b.sequences, "gblm", 0.5, "unstructured", b.batch_size),
            "sweep": lambda: ours_sweep(b.model, b.sequences, "gblm", b.batch_size),
            "other": two_stages,
        }
    )
    statistics = {"ours": seconds["sweep"], "other": stages["stages"][b.warmup :]}
    return [
        row("gblm fused, end to end", "reference, two stages", seconds),
        row("gblm fused sweep alone", "reference's gradient and norm passes alone", statistics),
    ]


def bare_forward_backward(model: nn.Module, sequences: Tensor, batch_size: int) -> None:
    model.requires_grad_(True)
    for batch in common.batched(sequences, batch_size):
        model(**batch, use_cache=False).loss.backward()
        for p in model.parameters():
            p.grad = None


def bench_sweep(b: Bench) -> list[dict[str, Any]]:
    seconds = b.run(
        {
            "ours": lambda: ours_sweep(b.model, b.sequences, "gblm", b.batch_size),
            "other": lambda: bare_forward_backward(b.model, b.sequences, b.batch_size),
        }
    )
    return [row("gblm fused sweep", "bare forward + backward", seconds)]


def bench_kfac(b: Bench) -> list[dict[str, Any]]:
    seconds = b.run(
        {
            "ours": lambda: ours_sweep(b.model, b.sequences, "kfac", b.batch_size),
            "other": lambda: ours_sweep(b.model, b.sequences, "gblm", b.batch_size),
        }
    )
    return [row("kfac sweep", "gblm fused sweep", seconds)]


def bench_select(b: Bench) -> list[dict[str, Any]]:
    """Scores are |W| times a random norm of each input: magnitudes have the ties of the real weights."""
    generator = torch.Generator().manual_seed(0)
    weights = [layer.weight.detach() for layer in reference.all_linears(b.model).values()]
    scores = [w.abs() * torch.rand(w.shape[1], generator=generator) for w in weights]
    rows = []
    for group in ("row", "layer", "2:4"):
        pattern = group if ":" in group else "unstructured"

        def ours(group: str = group) -> list[Tensor]:
            return ours_select(scores, 0.5, group)

        def theirs(group: str = group, pattern: str = pattern) -> list[Tensor]:
            return [reference.select(s, 0.5, pattern, group) for s in scores]

        if not all(torch.equal(x, y) for x, y in zip(ours(), theirs(), strict=True)):
            raise RuntimeError(f"selection by {group}: ours differs from the stable sort")
        seconds = common.interleaved({"ours": ours, "other": theirs}, b.repetitions, warmup=b.warmup)
        rows.append(row(f"selection by {group}, all layers", "full sort", seconds))
    return rows


BENCHMARKS = {
    "wanda": bench_wanda,
    "gblm": bench_gblm,
    "sweep": bench_sweep,
    "kfac": bench_kfac,
    "select": bench_select,
}


def main() -> None:
    p = common.parser(__doc__, evaluation=False)
    p.add_argument("--only", nargs="+", default=list(BENCHMARKS), choices=list(BENCHMARKS))
    p.add_argument("--repetitions", type=int, default=3, help="measured rounds (default 3)")
    p.add_argument("--warmup", type=int, default=1, help="unmeasured rounds before them (default 1)")
    p.add_argument("--batch-size", type=int, default=4, help="sequences in a batch, ours and bare passes")
    args = p.parse_args()

    model, tokenizer = common.load(args)
    sequences = common.calibration_of(args, tokenizer)
    bench = Bench(model, sequences, args.batch_size, args.repetitions, args.warmup)
    settings = common.settings_of(args) | {"batch_size": args.batch_size}
    rows, table = common.Rows(args.json, ("benchmark", "other", *settings)), []
    for name in args.only:
        for line in BENCHMARKS[name](bench):
            rows.add(line | settings)
            table.append(line)
    columns = ["benchmark", "other", "ours_s", "other_s", "ratio", "ratio_min", "ratio_max", "rounds"]
    print(common.markdown(table, columns))


if __name__ == "__main__":
    main()
