"""Memory of every rank while it prunes, and what the callback costs a training step, under DDP and FSDP2.

For each number of processes a real fit of `CausalLM` with `WeightPruning(score="gblm")` over gloo on this machine's
processors. Measured on each rank, in MiB:

- weights, aggregates, masks: what the rank holds of each (bytes of its tensors);
- pruning: highest resident memory while pruning, above what was resident before it (activations, the gathered
  weights of one block and of the embeddings, one layer's gradient, the aggregates);
- step: highest resident memory of the first training step, above the same (activations, the same gathered weights,
  gradients, optimizer states).

With `--pairs`, what the callback costs a training step: one fit in which masks are held in step 1, not in 2 and 3, held
in 4, and so on, so that neighbors make pairs and a machine that slows down steadily favors neither side:

- tokens_per_s, without: over all ranks, medians of the steps with and without masks held;
- overhead: how much longer the masked step of a pair takes, median over pairs with its 95 % interval (bootstrap);
- cpu: the same in processor time of the ranks, which other processes of the machine disturb less;
- hooks: processor time inside the callback's hooks in a masked step, and as a share of the step's, on the rank where
  it is most. This is the steadiest figure, but blind to what masks do to the rest of the step.

    python tests/benchmarks/sharded.py --model FOLDER --calibration TEXT --strategies fsdp2 ddp --devices 1 2 4
    python tests/benchmarks/sharded.py --model FOLDER --calibration TEXT --devices 2 --batch-size 4 --length 256 \\
        --pairs 40
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import lightning
import torch
from enforcement import InTurns, pairs_of
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, WeightPruning
from lightning_prune.pruning import calibration
from lightning_prune.sharding import local

MIB = 2**20
WARM_UP = 4  # steps before the pairs: a whole turn of masks on and off


class Measured(WeightPruning):
    """The callback, with a watch on memory while it prunes, and on processor time inside its hooks while it trains."""

    hooks_s = 0.0

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        started = time.thread_time()
        super().on_before_optimizer_step(*arguments)
        self.hooks_s += time.thread_time() - started

    def _after_step(self, *arguments: Any) -> None:
        started = time.thread_time()
        super()._after_step(*arguments)
        self.hooks_s += time.thread_time() - started

    def _prune(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        finish, held = calibration._finish, {}

        def counting(taps: Any, *rest: Any) -> Any:
            sums = [tensor for tap in taps.all for tensor in tap.accumulator.sums.values()]
            held["aggregates"] = sum(t.numel() * t.element_size() for t in sums)
            return finish(taps, *rest)

        calibration._finish = counting
        gc.collect()
        started = time.perf_counter()
        try:
            with common.PeakMemory() as watch:
                super()._prune(trainer, module)
        finally:
            calibration._finish = finish
        self.start = watch.start
        weights = [local(p.detach()) for p in module.model.parameters()]
        self.figures = {
            "weights_MiB": sum(w.numel() * w.element_size() for w in weights) / MIB,
            "aggregates_MiB": held["aggregates"] / MIB,
            "masks_MiB": sum(local(m).numel() for m in self.masks.values()) / MIB,
            "pruning_MiB": (watch.peak - watch.start) / MIB,
            "pruning_s": time.perf_counter() - started,
        }


class Stamps(Callback):
    """Wall, processor and hooks' seconds at the start of each step, and the peak memory of the first step."""

    def __init__(self, pruning: Measured) -> None:
        self.pruning = pruning
        self.stamps: list[tuple[float, float, float]] = []
        self.watch: common.PeakMemory | None = None
        self.peak = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.stamps:
            self.watch = common.PeakMemory().__enter__()
        self.stamps.append((time.perf_counter(), time.process_time(), self.pruning.hooks_s))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.watch is not None:
            self.watch.__exit__()
            self.peak, self.watch = self.watch.peak, None

    def seconds(self) -> dict[str, list[float]]:
        """Of each step after the warm-up, by clock."""
        steps = [[b - a for a, b in zip(*ends, strict=True)] for ends in itertools.pairwise(self.stamps)][WARM_UP:]
        return dict(zip(("wall", "cpu", "hooks"), map(list, zip(*steps, strict=True)), strict=False))


def strategy_of(name: str, devices: int) -> Strategy:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1, process_group_backend="gloo")


def rank_main(args: argparse.Namespace, name: str, devices: int, out: Path) -> None:
    """One rank: fit, and write its figures."""
    torch.set_num_threads(args.threads or 1)
    module = CausalLM(model=args.model, gguf_file=args.gguf_file, learning_rate=1e-5, lr_schedule="constant")
    sequences = common.calibration_of(args, module.tokenizer)
    pruning = Measured(score="gblm", num_samples=args.samples, progress=False)
    stamps = Stamps(pruning)
    steps = WARM_UP + 2 * args.pairs + 1 if args.pairs else 1  # the start of one more ends the last
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy_of(name, devices),
        precision=args.precision,
        max_steps=steps,
        callbacks=[pruning, stamps, InTurns(pruning)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    needed = steps * args.batch_size * devices  # of one epoch; what the sequences say does not matter
    batches = [{"input_ids": row} for row in itertools.islice(itertools.cycle(sequences), max(needed, len(sequences)))]
    trainer.fit(module, DataLoader(batches, batch_size=args.batch_size))  # type: ignore[arg-type]
    figures = pruning.figures | {"step_MiB": (stamps.peak - pruning.start) / MIB} | stamps.seconds()
    (out / f"{trainer.global_rank}.json").write_text(json.dumps(figures))


def measure(args: argparse.Namespace, name: str, devices: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--rank-of", name, str(devices), folder]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads or 1)})
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    row: dict[str, Any] = {"strategy": name, "ranks": devices}
    for figure in ("weights_MiB", "aggregates_MiB", "masks_MiB", "pruning_MiB", "step_MiB", "pruning_s"):
        row[figure] = max(rank[figure] for rank in ranks)  # the rank that needs most
    if args.pairs:
        row |= compare_steps(ranks, tokens=args.batch_size * args.length * devices)
    return row


def compare_steps(ranks: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Figures of the steps with masks and without, from the seconds of each step on each rank."""
    mean = {
        clock: [statistics.mean(s) for s in zip(*(r[clock] for r in ranks), strict=True)] for clock in ("wall", "cpu")
    }
    wall, cpu = pairs_of(mean["wall"]), pairs_of(mean["cpu"])
    with_masks, without = (statistics.median(side) for side in zip(*wall, strict=True))
    hooks = [[inside for inside, _ in pairs_of(rank["hooks"])] for rank in ranks]
    steps = [[step for step, _ in pairs_of(rank["cpu"])] for rank in ranks]
    shares = [[i / s for i, s in zip(*of_rank, strict=True)] for of_rank in zip(hooks, steps, strict=True)]
    return {
        "tokens_per_s": tokens / with_masks,
        "without": tokens / without,
        **common.paired_overhead(wall),
        **common.paired_overhead(cpu, "cpu"),
        "hooks_ms": 1000 * max(statistics.median(of_rank) for of_rank in hooks),
        "hooks_percent": 100 * max(statistics.median(of_rank) for of_rank in shares),
        "pairs": len(wall),
    }


def main() -> None:
    p = common.parser(__doc__, evaluation=False)
    p.set_defaults(samples=8, length=128)
    p.add_argument("--strategies", nargs="+", default=["fsdp2", "ddp"], choices=["fsdp2", "ddp"])
    p.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4])
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--pairs", type=int, default=0, help="pairs of training steps to time (default: memory alone)")
    p.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    p.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.rank_of:
        name, devices, folder = args.rank_of
        rank_main(args, name, int(devices), Path(folder))
        return
    settings = {"pairs": args.pairs, "batch": f"{args.batch_size}x{args.length}", "precision": args.precision}
    settings["model"] = args.gguf_file or Path(args.model).name
    rows = common.Rows(args.json, ("strategy", "ranks", *settings))
    table = []
    for name in args.strategies:
        for devices in args.devices:
            table.append(measure(args, name, devices))
            rows.add(table[-1] | settings)
    print(common.markdown(table))


if __name__ == "__main__":
    main()
