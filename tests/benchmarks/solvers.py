"""Masks and updates side by side: perplexity, seconds, and memory of one-shot pruning with and without a solver.

For every draw of the calibration text, every pattern and every method the dense weights are restored, pruned and
evaluated. Methods with an update go block by block, on the outputs of the pruned blocks before; the others take one
sweep. The seconds are those of the whole; of products ``X^T X``; of the solver with its selection; and of what is
left, the forward and backward passes.

With ``-fit`` behind a method's name the weights that are kept are fitted to the dense model after it, half a block at a
time (`reconstruct`); the row without the fit is made on the way. With ``permuted-`` before it the channels are put in
another order first (`permute_channels`, N:M only). With ``reference-`` before it the published algorithm runs as
`reference.py` writes it out, one sequence at a time. ``--tasks`` adds the accuracy on minimal pairs.

    python tests/benchmarks/solvers.py --model FOLDER --calibration TEXT --evaluation TEXT TEXT2 \\
        --samples 16 --length 512 --windows 20 --patterns 50 2:4 --methods wanda kfac-alps --draws 3 --json FILE

Rows that the JSON file has under the same settings are not run again, so that a study can be interrupted.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import common
import reference
import torch
from ours import ours_permute, ours_prune, ours_reconstruct, ours_stages, ours_tasks

FIT = {"train": "all", "batch_size": 2}  # the weights that are kept, half a block at a time, one pass over the samples
WALK = {"sequential": True}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", WALK),
    "wanda-exact": ("wanda", {"update": "exact"} | WALK),
    "alps": ("wanda", {"update": "alps"} | WALK),
    "alps-kfac-layers": ("wanda", {"update": "alps", "allocation": "kfac"} | WALK),
    "kfac": ("kfac", {}),
    "kfac-obs": ("kfac", {"update": "obs"} | WALK),
    "kfac-exact": ("kfac", {"update": "exact"} | WALK),
    "kfac-alps": ("kfac", {"update": "alps"} | WALK),
}
FIT_AFTER, PERMUTED, PUBLISHED = "-fit", "permuted-", "reference-"
NAMES = [start + method + end for start in ("", PERMUTED) for method in METHODS for end in ("", FIT_AFTER)]
NAMES += [PUBLISHED + "wanda", PUBLISHED + "sparsegpt"]
PATTERNS = ("50", "60", "70", "80", "2:4", "4:8")
KEY = ("method", "pattern", "draw", "model", "calibration", "windows")


def draw_of(
    tokens: torch.Tensor, count: int, length: int, draw: int, draws: int, begin: Sequence[int] = ()
) -> torch.Tensor:
    """`count` blocks of the text, none of which another draw has: (count, length)."""
    return common.blocks(tokens, count * draws, length, begin)[draw::draws]


@contextlib.contextmanager
def timed(stages: dict[str, list[tuple[Any, str]]], synchronize: Callable[[], None]) -> Iterator[dict[str, float]]:
    """Seconds spent in the functions of each stage, given as the objects that hold them and their names."""
    seconds = dict.fromkeys(stages, 0.0)
    before = [(holder, name, getattr(holder, name)) for places in stages.values() for holder, name in places]

    def watched(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = common.clock()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                seconds[stage] += common.clock() - start

        return run

    for stage, places in stages.items():
        for holder, name in places:
            setattr(holder, name, watched(stage, getattr(holder, name)))
    try:
        yield seconds
    finally:
        for holder, name, function in before:
            setattr(holder, name, function)


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--methods", nargs="+", choices=NAMES, metavar="METHOD", default=list(METHODS))
    p.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS), help="percent, or N:M")
    p.add_argument("--draws", type=int, default=3, help="draws that the calibration text is divided into (default 3)")
    p.add_argument("--only-draws", nargs="+", type=int, help="which of them to run (default: all)")
    p.add_argument("--batch-size", type=int, default=4, help="sequences in one calibration batch")
    p.add_argument("--tasks", help="folder of .jsonl files of minimal pairs")
    p.add_argument("--pairs", type=int, default=100, help="pairs of each task (default 100)")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    cuda = args.device.startswith("cuda")
    synchronize = torch.cuda.synchronize if cuda else lambda: None

    model, tokenizer = common.load(args)
    model = model.to(args.device)
    tokens = common.tokenize(args.calibration, tokenizer)
    evaluations = {name: w.to(args.device) for name, w in common.evaluations_of(args, tokenizer).items()}
    snapshot, rows, settings = common.Snapshot(model), common.Rows(args.json, KEY), common.settings_of(args)

    def known(method: str, pattern: str, draw: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What tells a row from others, and the row if the file has it."""
        identity = {"method": method, "pattern": pattern, "draw": f"{draw + 1}/{args.draws}"} | settings
        found = rows.find(**identity)
        whole = found is not None and found["perplexity"].keys() >= evaluations.keys()
        if whole and args.tasks and found.get("pairs", {}).get("of each") != args.pairs:
            whole = False
        return identity, found if whole else None

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        row["perplexity"] = common.perplexities(model, evaluations)
        if args.tasks:
            row["pairs"] = {"of each": args.pairs, **ours_tasks(model, tokenizer, args.tasks, args.pairs)}
        rows.add(row)
        return row

    def run(method: str, pattern: str, draw: int) -> dict[str, Any]:
        row, found = known(method, pattern, draw)
        if found is not None:
            return found
        snapshot.restore()
        if method == "dense":
            return measure(row)
        plain = method.removesuffix(FIT_AFTER)
        published = method.startswith(PUBLISHED)
        score, options = METHODS[plain.removeprefix(PERMUTED).removeprefix(PUBLISHED)]
        nm = ":" in pattern
        how = (score, 0.5 if nm else int(pattern) / 100, pattern if nm else "unstructured")
        sequences = draw_of(tokens, args.samples, args.length, draw, args.draws, common.begin_of(tokenizer))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        with common.PeakMemory() as memory, timed(ours_stages(), synchronize) as seconds:
            start = common.clock()
            if method.startswith(PERMUTED):
                row["kept by the score"] = ours_permute(model, sequences, pattern, args.batch_size)
            dense = {name: p.detach().clone() for name, p in model.named_parameters()} if plain != method else {}
            if published:
                masks, _ = reference.prune(model, sequences, *how)
            else:
                masks = ours_prune(model, sequences, *how, args.batch_size, **options)
            synchronize()
            whole = common.clock() - start
        row["sparsity"] = common.sparsity_of(masks)
        row["seconds"] = {"whole": whole, **seconds, "passes": whole - sum(seconds.values())}
        peak = torch.cuda.max_memory_allocated() - held if cuda else memory.peak - memory.start
        row["MiB above"] = peak / 2**20
        before, measured = known(plain, pattern, draw)
        if measured is None:
            measure(row | before)
        if plain != method:
            start = common.clock()
            ours_reconstruct(model, sequences, dense, masks, **FIT)
            synchronize()
            fit = common.clock() - start
            passes = row["seconds"]["passes"] + fit
            row["seconds"] = row["seconds"] | {"whole": whole + fit, "passes": passes}
            measure(row)
        if not common.same_zeros(model, masks):
            raise RuntimeError(f"{method}: a pruned weight is not zero")
        return known(method, pattern, draw)[1] or row

    def line(method: str, pattern: str, found: list[dict[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {"pattern": pattern, "method": method, "draws": len(found)}
        for text in evaluations:
            values = [row["perplexity"][text] for row in found]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            result[text] = f"{statistics.mean(values):.2f}{spread}"
        if args.tasks:
            result["pairs"] = statistics.mean(row["pairs"]["mean"] for row in found)
        if method != "dense":
            for stage in found[0]["seconds"]:
                result[f"{stage} s"] = statistics.mean(row["seconds"][stage] for row in found)
            result["MiB above"] = statistics.mean(row["MiB above"] for row in found)
        return result

    draws = range(args.draws) if args.only_draws is None else [d - 1 for d in args.only_draws]
    table = [line("dense", "", [run("dense", "", 0)])]
    for pattern in args.patterns:
        for method in args.methods:
            table.append(line(method, pattern, [run(method, pattern, draw) for draw in draws]))
            print(common.markdown(table[-1:]), flush=True)
    print("\n" + common.markdown(table, list(table[-1])))


if __name__ == "__main__":
    main()
