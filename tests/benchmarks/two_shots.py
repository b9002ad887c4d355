"""A second shot: do gradients of the pruned model choose better than those of the dense one?

kfac weights rows and layers by the output gradients of the dense model, which a model of which much is gone no longer
has. So the dense weights are pruned a second time, with the gradients of the model that the first time made; inputs
and Hessians are taken in the walk both times, as ever. Prints perplexities.

    python tests/benchmarks/two_shots.py --model FOLDER --calibration TEXT --evaluation TEXT TEXT2 \\
        --patterns 50 70 --threads 1
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import common
from ours import ours_prune
from torch import nn

from lightning_prune.pruning import pipeline
from lightning_prune.pruning.calibration import collect


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--patterns", nargs="+", default=["50", "70"], help="shares in percent")
    p.add_argument("--shots", type=int, default=3)
    args = p.parse_args()
    model, tokenizer = common.load(args)
    sequences, evaluations = common.calibration_of(args, tokenizer), common.evaluations_of(args, tokenizer)
    rows, snapshot = common.Rows(args.json, ("pattern", "shots")), common.Snapshot(model)
    for pattern in args.patterns:
        snapshot.restore()
        measured = model

        def see(dense: nn.Module, batches: Any, targets: Any, *others: Any, **options: Any) -> Any:
            """The statistics of the model that the shot before made, under the names of the dense one's layers."""
            known = dict(measured.named_modules())  # noqa: B023
            names = {module: name for name, module in dense.named_modules()}
            there = [known[names[target.module]] for target in targets]
            moved = [replace(t, module=module, modules=(module,)) for t, module in zip(targets, there, strict=True)]
            return collect(measured, batches, moved, *others, **options)  # noqa: B023

        for shot in range(1, args.shots + 1):
            snapshot.restore()
            with patch.object(pipeline, "collect", see):
                masks = ours_prune(
                    model, sequences, "kfac", float(pattern) / 100, "unstructured", 4, update="exact", sequential=True
                )
            if not common.same_zeros(model, masks):
                raise RuntimeError("a pruned weight is not zero")
            rows.add({"pattern": pattern, "shots": str(shot), **common.perplexities(model, evaluations)})
            measured = copy.deepcopy(model)
    print(common.markdown(rows.rows))


if __name__ == "__main__":
    main()
