"""Memory of every rank while it prunes, and what the callback costs a training step, under DDP and FSDP2.

For each number of processes a real fit of `CausalLM` with `WeightPruning(score="gblm")` over gloo on this machine's
processors. Measured on each rank, in MiB:

- weights, aggregates, masks: what the rank holds of each (bytes of its tensors);
- pruning: highest resident memory while pruning, above what was resident before it (activations, the gathered
  weights of one block and of the embeddings, one layer's gradient, the aggregates);
- step: highest resident memory of the first training step, above the same (activations, the same gathered weights,
  gradients, optimizer states).

With `--steps`, enforcement is switched off at every other training step and the two kinds of steps are compared:
tokens per second with and without the callback. Whole steps scatter by more than the callback takes, so the seconds
inside its hooks are measured too, as a share of the step.

    python tests/benchmarks/sharded.py --model FOLDER --calibration TEXT --strategies fsdp2 ddp --devices 1 2 4
"""

from __future__ import annotations

import argparse
import gc
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
from enforcement import EveryOtherStep
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, WeightPruning, calibration
from lightning_prune.sharding import local

MIB = 2**20


class Measured(WeightPruning):
    """The callback, with a watch on memory while it prunes, and on the time inside its hooks while it trains."""

    hooks_s = 0.0

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        started = time.perf_counter()
        super().on_before_optimizer_step(*arguments)
        self.hooks_s += time.perf_counter() - started

    def _after_step(self, *arguments: Any) -> None:
        started = time.perf_counter()
        super()._after_step(*arguments)
        self.hooks_s += time.perf_counter() - started

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
    """When each step starts, seconds inside the callback's hooks until then, and the peak memory of the first step."""

    def __init__(self, pruning: Measured) -> None:
        self.pruning = pruning
        self.stamps: list[float] = []
        self.hooks: list[float] = []
        self.watch: common.PeakMemory | None = None
        self.peak = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.stamps:
            self.watch = common.PeakMemory().__enter__()
        self.stamps.append(time.perf_counter())
        self.hooks.append(self.pruning.hooks_s)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.watch is not None:
            self.watch.__exit__()
            self.peak, self.watch = self.watch.peak, None


def strategy_of(name: str, devices: int) -> Strategy:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1, process_group_backend="gloo")


def rank_main(args: argparse.Namespace, name: str, devices: int, out: Path) -> None:
    """One rank: fit, and write its figures."""
    torch.set_num_threads(args.threads or 1)
    module = CausalLM(model=args.model, gguf_file=args.gguf_file, learning_rate=1e-5, lr_schedule="constant")
    count = max(args.samples, (args.steps + 3) * args.batch_size * devices)
    sequences = common.calibration_of(argparse.Namespace(**{**vars(args), "samples": count}), module.tokenizer)
    pruning = Measured(score="gblm", num_samples=args.samples, progress=False)
    stamps = Stamps(pruning)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy_of(name, devices),
        max_steps=args.steps + 2 if args.steps else 1,
        callbacks=[pruning, stamps, EveryOtherStep(pruning)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [{"input_ids": row} for row in sequences]
    trainer.fit(module, DataLoader(batches, batch_size=args.batch_size))  # type: ignore[arg-type]
    seconds = [b - a for a, b in zip(stamps.stamps, stamps.stamps[1:], strict=False)][2:]
    figures = pruning.figures | {"step_MiB": (stamps.peak - pruning.start) / MIB}
    hooks = [b - a for a, b in zip(stamps.hooks, stamps.hooks[1:], strict=False)][2:]
    figures |= {"with": seconds[::2], "without": seconds[1::2], "hooks": hooks[::2]}
    (out / f"{trainer.global_rank}.json").write_text(json.dumps(figures))


def measure(args: argparse.Namespace, name: str, devices: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--rank-of", name, str(devices), folder]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads or 1)})
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    row: dict[str, Any] = {"strategy": name, "ranks": devices}
    for figure in ("weights_MiB", "aggregates_MiB", "masks_MiB", "pruning_MiB", "step_MiB", "pruning_s"):
        row[figure] = max(rank[figure] for rank in ranks)  # the rank that needs most
    if args.steps:
        pairs = list(zip(ranks[0]["with"], ranks[0]["without"], strict=False))
        tokens = args.batch_size * args.length * devices
        row["tokens_per_s"] = tokens / statistics.median(a for a, _ in pairs)
        row["without"] = tokens / statistics.median(b for _, b in pairs)
        row["step_overhead_percent"] = 100 * statistics.median(a - b for a, b in pairs) / (tokens / row["without"])
        row["hooks_ms"] = 1000 * max(statistics.median(rank["hooks"]) for rank in ranks)
        row["hooks_percent"] = 100 * max(
            statistics.median(inside / step for inside, step in zip(rank["hooks"], rank["with"], strict=True))
            for rank in ranks
        )
        row["pairs"] = len(pairs)
    return row


def main() -> None:
    p = common.parser(__doc__, evaluation=False)
    p.set_defaults(samples=8, length=128)
    p.add_argument("--strategies", nargs="+", default=["fsdp2", "ddp"], choices=["fsdp2", "ddp"])
    p.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4])
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--steps", type=int, default=0, help="training steps to time (default: memory alone)")
    p.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.rank_of:
        name, devices, folder = args.rank_of
        rank_main(args, name, int(devices), Path(folder))
        return
    rows = common.Rows(args.json, ("strategy", "ranks", "steps"))
    table = []
    for name in args.strategies:
        for devices in args.devices:
            table.append(measure(args, name, devices))
            rows.add(table[-1] | {"steps": args.steps, "batch": f"{args.batch_size}x{args.length}"})
    print(common.markdown(table))


if __name__ == "__main__":
    main()
