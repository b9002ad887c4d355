"""Structural pruning in one shot, without training: saliencies, and units judged once or in rounds.

    python tests/benchmarks/oneshot.py --model FOLDER --calibration TEXT --samples 32 --length 256 \
        --evaluation TEXT2 TEXT3 --windows 20 --window-length 512 --saliencies kfac obs --rounds 1 4 --targets 0.75

A target is the share of the decoder's parameters (all in its layers) to keep. Seconds are those of `common.clock`. Rows
that the file of `--json` has are not made again.
"""

from __future__ import annotations

import common
from ours import ours_structured
from pretraining import target_parameters


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--saliencies", nargs="+", default=["kfac", "obs", "taylor1", "magnitude"])
    p.add_argument("--rounds", nargs="+", type=int, default=[1, 4], help="how often units are judged (default 1 4)")
    p.add_argument("--targets", nargs="+", type=float, default=[0.75, 0.5], help="shares of the decoder's parameters")
    p.add_argument("--types", nargs="+", default=["ffn"], help="units that may go (default ffn)")
    args = p.parse_args()
    settings = common.settings_of(args)
    rows = common.Rows(args.json, ("saliency", "rounds", "target", "types", *settings))
    for target in args.targets:
        for saliency in args.saliencies:
            for rounds in args.rounds:
                row = {"saliency": saliency, "rounds": rounds, "target": target, "types": "+".join(args.types)}
                if rows.find(**row, **settings):
                    continue
                model, tokenizer = common.load(args)
                how = {"target": target_parameters(model, target), "types": args.types, "rounds": rounds}
                calibration = common.calibration_of(args, tokenizer)
                started = common.clock()
                found = ours_structured(model, calibration, saliency=saliency, **how)
                row |= {**settings, "seconds": common.clock() - started, **found}
                rows.add(row | {"perplexity": common.perplexities(model, common.evaluations_of(args, tokenizer))})
    print(common.markdown(rows.rows))


if __name__ == "__main__":
    main()
