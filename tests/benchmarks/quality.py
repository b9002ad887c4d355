"""Perplexity of lightning_prune against the reference algorithms, in one run on the same texts.

For every row the dense weights are restored, the reference prunes and is evaluated, the weights are
restored again, and `lightning_prune.prune` does the same. Reported: both perplexities on each text, their
relative difference (ours / reference - 1, negative is better), and the share of weights on which the two
masks agree.

The references of wanda, gblm and sparsegpt go block by block. Ours run in their default, one sweep of the
dense model, and with "-sequential" block by block. kfac and its weight update have no published reference:
the formula written out plainly (`reference.kfac`) stands in for `kfac-*` with `--kfac-reference`.

    python tests/benchmarks/quality.py --model FOLDER --calibration TEXT --evaluation TEXT TEXT2 \\
        --only wanda-50 wanda-2:4 --json FILE

`--only` takes names or wildcards, and `--json` merges, so the table can be made in pieces. A reference that
the file already has under the same settings is not run again; `reference.py` writes the same rows.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Any

import common
import reference
import torch
from ours import ours_prune


@dataclass(frozen=True)
class Row:
    """One line of the table; `options` are those of `prune`."""

    method: str
    sparsity: float
    pattern: str = "unstructured"
    options: dict[str, Any] = field(default_factory=dict)


BLOCKS = {"sequential": True}
GBLM = {"alpha": 100.0, "grad_norm": "l2"}

ROWS: dict[str, Row] = {}
for _label, _sparsity, _pattern in (("50", 0.5, "unstructured"), ("2:4", 0.5, "2:4")):
    ROWS |= {
        f"magnitude-{_label}": Row("magnitude", _sparsity, _pattern),
        f"wanda-{_label}": Row("wanda", _sparsity, _pattern),
        f"wanda-{_label}-sequential": Row("wanda", _sparsity, _pattern, BLOCKS),
        f"gblm-{_label}": Row("gblm", _sparsity, _pattern, GBLM),
        f"gblm-{_label}-sequential": Row("gblm", _sparsity, _pattern, GBLM | BLOCKS),
        f"sparsegpt-{_label}-sequential": Row("sparsegpt", _sparsity, _pattern, BLOCKS),
        f"sparsegpt-{_label}": Row("sparsegpt", _sparsity, _pattern),
    }
for _percent in (60, 70):
    ROWS |= {f"{_score}-{_percent}": Row(_score, _percent / 100) for _score in ("magnitude", "wanda")}
    ROWS[f"gblm-{_percent}"] = Row("gblm", _percent / 100, options=GBLM)
    ROWS[f"sparsegpt-{_percent}-sequential"] = Row("sparsegpt", _percent / 100, options=BLOCKS)
for _percent in (50, 60, 70):
    ROWS[f"kfac-{_percent}"] = Row("kfac", _percent / 100)
    ROWS[f"kfac-obs-{_percent}-sequential"] = Row("kfac", _percent / 100, options={"update": "obs"} | BLOCKS)

KEY = reference.KEY


def reference_options(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.options.items() if k in ("alpha", "grad_norm")}


def agreement(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Share of weights that both keep or both prune."""
    if a.keys() != b.keys():
        raise ValueError(f"masks of different layers: {sorted(a.keys() ^ b.keys())[:4]}")
    return sum(int((a[n] == b[n]).sum()) for n in a) / sum(m.numel() for m in a.values())


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--only", nargs="+", default=["*"], help="rows to run: names or wildcards; see --list")
    p.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    p.add_argument("--batch-size", type=int, default=4, help="sequences in one calibration batch of ours")
    p.add_argument("--kfac-reference", action="store_true", help="compare kfac-* with the plain formula too")
    p.add_argument("--skip-reference", action="store_true", help="run no reference; use those in the file")
    p.add_argument("--rerun-reference", action="store_true", help="run references even if the file has them")
    args = p.parse_args()
    chosen = [name for name in ROWS if any(fnmatch.fnmatchcase(name, wanted) for wanted in args.only)]
    if args.list or not chosen:
        print("\n".join(ROWS))
        raise SystemExit(0 if args.list else f"--only {' '.join(args.only)} matches none of these")

    model, tokenizer = common.load(args)
    sequences = common.calibration_of(args, tokenizer)
    evaluations = common.evaluations_of(args, tokenizer)
    snapshot, rows, settings = common.Snapshot(model), common.Rows(args.json, KEY), common.settings_of(args)
    table: list[dict[str, Any]] = []

    def identity(implementation: str, method: str, row: Row, options: dict[str, Any]) -> dict[str, Any]:
        shape = {"method": method, "sparsity": row.sparsity, "pattern": row.pattern, "options": options}
        return {"implementation": implementation} | shape | settings

    def known(wanted: dict[str, Any]) -> dict[str, Any] | None:
        found = rows.find(**wanted)
        return found if found and found["perplexity"].keys() >= evaluations.keys() else None

    dense = identity("reference", "dense", Row("dense", 0.0), {})
    if (found := known(dense)) is None:
        found = dense | {"perplexity": common.perplexities(model, evaluations)}
        rows.add(found)
    for text in evaluations:
        table.append({"row": "dense", "text": text, "reference": found["perplexity"][text]})

    for name in chosen:
        row, masks = ROWS[name], None
        theirs_id = identity("reference", row.method, row, reference_options(row))
        theirs = None if args.rerun_reference else known(theirs_id)
        has_reference = row.method != "kfac" or (args.kfac_reference and "update" not in row.options)
        if theirs is None and has_reference and not args.skip_reference:
            snapshot.restore()
            masks, seconds = reference.prune(
                model, sequences, row.method, row.sparsity, row.pattern, **reference_options(row)
            )
            theirs = theirs_id | {"perplexity": common.perplexities(model, evaluations)}
            theirs |= {"achieved": common.sparsity_of(masks), "seconds": seconds}
            rows.add(theirs)

        snapshot.restore()
        watch = common.Stopwatch()
        with watch("total"):
            our_masks = ours_prune(
                model, sequences, row.method, row.sparsity, row.pattern, args.batch_size, **row.options
            )
        if not common.same_zeros(model, our_masks):
            raise RuntimeError(f"{name}: a pruned weight is not zero")
        mine = identity("ours", row.method, row, row.options)
        mine |= {"name": name, "perplexity": common.perplexities(model, evaluations)}
        mine |= {"achieved": common.sparsity_of(our_masks), "seconds": watch.seconds}
        if masks is not None:
            mine["agreement"] = agreement(masks, our_masks)
        rows.add(mine)
        for text in evaluations:
            line = {"row": name, "text": text, "reference": None, "ours": mine["perplexity"][text]}
            line["difference"] = None
            if theirs is not None and "update" not in row.options:
                line["reference"] = theirs["perplexity"][text]
                line["difference"] = f"{100 * (line['ours'] / line['reference'] - 1):+.3f} %"
            line |= {"agreement": mine.get("agreement"), "sparsity": mine["achieved"]}
            line["reference s"] = (theirs or {}).get("seconds", {}).get("total")
            line["ours s"] = watch.seconds["total"]
            table.append(line)
        print(common.markdown(table[-len(evaluations) :]), flush=True)
    print("\n" + common.markdown(table, list(table[-1])))


if __name__ == "__main__":
    main()
