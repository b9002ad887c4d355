"""What holding a mask costs in a training step: full fine-tuning with AdamW in float32.

Each variant runs in a real `lightning.Trainer`, the same LightningModule, batches and optimizer:

- dense: no masks;
- ours: `WeightPruning(score="magnitude", sparsity=0.5)`: masks weights after a step, gradients before it;
- torch prune: `torch.nn.utils.prune.custom_from_mask` on every decoder linear before the fit;
- ModelPruning: Lightning's callback (`l1_unstructured`, 0.5, every decoder linear), applied once.

ModelPruning prunes at the end of an epoch, so every variant runs two epochs: one step to prune and warm up
in, then the measured steps (start of a batch to start of the next, so that every hook is inside). Rounds
are interleaved; medians over all steps of a variant are shown, and the median over rounds of its ratio to
dense.

`--paired` measures ours alone, with less noise: one fit in which enforcement is on, off, off, on and so forth (so that
a machine that slows down steadily favors neither), and the steps of each pair are compared.

`--memory` measures instead the peak resident memory of the second epoch, each variant in a fresh process.

`--passes` measures the two passes of a step by themselves (gradients, then weights), in milliseconds of processor time
on one thread, which other processes disturb little: as they are, at other sizes of the pieces in which masks are
widened, with masks stored at the weights' own width (4 bytes a weight instead of 1), and their floor, reading and
writing both tensors. What else was tried, for 106 M float32 weights, where the floor is 29 ms and the passes take 49
(halved in bfloat16; layers of 4096 x 4096 the same):

- pieces of 2^18: 57; of 2^16: 70 (calls).
- masks at full width: 39 to 45, for four times their memory; float masks with `mul_`: 46, and not exact.
- no buffer, `bitwise_and_` with the int8 mask: 48 to 72, since it widens the mask into a new tensor each time.
- `torch.where` with a bool mask: 750. Bits instead of bytes, unpacked by shifts: 62 at best.
- gradients masked right after a layer's backward, while they are in the cache: at most 8 less, for hooks on every
  parameter that DDP, FSDP2 and accumulation would have to agree with.
- no weight pass after an optimizer that leaves a zero with zero gradient and states alone: a clip coefficient of NaN,
  learning rate times decay above 1, or a hook in between break that. To find those the mask must be read again: a
  check made of torch's operations takes 280, where the pass takes 25.

    python tests/benchmarks/enforcement.py --model FOLDER --calibration TEXT --rounds 3 --steps 4
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import lightning
import reference
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader

VARIANTS = ("dense", "ours", "torch prune", "ModelPruning")
SPARSITY = 0.5


class FineTuning(lightning.LightningModule):
    def __init__(self, model: nn.Module, learning_rate: float = 1e-5) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def masked_at(index: int) -> bool:
    """Whether masks are held in a step, where they are on and off in turns: on, off, off, on, and again."""
    return index % 4 in (0, 3)


def pairs_of(values: Sequence[float]) -> list[tuple[float, float]]:
    """Neighboring steps with and without masks, from a figure of each step."""
    pairs = zip(values[::2], values[1::2], strict=False)
    return [(a, b) if masked_at(2 * index) else (b, a) for index, (a, b) in enumerate(pairs)]


class InTurns(Callback):
    """Switches enforcement off in the steps where `masked_at` says so."""

    def __init__(self, pruning: Any) -> None:
        self.pruning = pruning

    def switch(self, on: bool) -> None:
        own = vars(self.pruning._hold._enforcer)
        for name in ("mask_weights", "mask_gradients"):
            own.pop(name, None)
            if not on:
                own[name] = lambda *_: None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, index: int
    ) -> None:
        self.switch(masked_at(index))

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.switch(on=True)


class StepTimer(Callback):
    """Seconds from one batch's start to the next's, and the peak memory, in the second epoch."""

    def __init__(self, steps: int, memory: bool = False) -> None:
        self.steps, self.memory = steps, memory
        self.stamps: list[float] = []
        self.peak = 0

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch == 1 and self.memory:
            self._watch = common.PeakMemory().__enter__()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, index: int
    ) -> int | None:
        if trainer.current_epoch == 0:
            return -1 if index == 1 else None  # the first epoch ends after one step
        self.stamps.append(time.perf_counter())
        return -1 if index == self.steps else None

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self.memory:
            self._watch.__exit__()
            self.peak = self._watch.peak

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]


def ours_callbacks() -> list[Callback]:
    """The one place to adapt when the callback changes."""
    from lightning_prune import WeightPruning

    return [WeightPruning(score="magnitude", sparsity=SPARSITY, progress=False)]


def prepare(variant: str, module: FineTuning) -> list[Callback]:
    """Callbacks of a variant, and its changes to the model."""
    layers = reference.all_linears(module.model).values()
    if variant == "ours":
        return ours_callbacks()
    if variant == "torch prune":
        for layer in layers:
            mask = reference.select(layer.weight.detach().abs(), SPARSITY, "unstructured", "layer")
            torch_prune.custom_from_mask(layer, "weight", mask)
    if variant == "ModelPruning":
        return [
            ModelPruning(
                "l1_unstructured",
                parameters_to_prune=[(layer, "weight") for layer in layers],
                amount=SPARSITY,
                apply_pruning=lambda epoch: epoch == 0,  # its amount compounds if applied again
                use_global_unstructured=False,
                use_lottery_ticket_hypothesis=False,
                make_pruning_permanent=False,
            )
        ]
    return []


def pruned_share(model: nn.Module) -> float:
    """Share of zeros in the effective weights of the decoder linears: is the variant in force?"""
    weights = []
    for layer in reference.all_linears(model).values():
        parametrized = hasattr(layer, "weight_mask")
        weights.append(layer.weight_orig * layer.weight_mask if parametrized else layer.weight)
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def fit(variant: str, model: nn.Module, batches: Tensor, args: argparse.Namespace) -> tuple[StepTimer, float]:
    """One fit; the timer, and the share of zeros at its end."""
    module, timer = FineTuning(model.train()), StepTimer(args.steps, args.memory)
    callbacks = prepare(variant, module)
    if args.paired:
        callbacks.append(InTurns(callbacks[0]))
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[timer, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=args.batch_size))
    return timer, pruned_share(module.model)


def measure_time(args: argparse.Namespace, model: nn.Module, batches: Tensor) -> list[dict[str, Any]]:
    seconds: dict[str, list[list[float]]] = {v: [] for v in args.only}
    zeros: dict[str, float] = {}
    for turn in range(args.rounds):
        for variant in args.only if turn % 2 == 0 else reversed(args.only):
            timer, zeros[variant] = fit(variant, copy.deepcopy(model), batches, args)
            seconds[variant].append(timer.seconds)
            print(f"round {turn} {variant}: " + " ".join(f"{s:.3f}" for s in timer.seconds), file=sys.stderr)
    rows = []
    for variant in args.only:
        row = {"variant": variant, "step_s": statistics.median(s for r in seconds[variant] for s in r)}
        if "dense" in seconds:
            pairs = zip(seconds[variant], seconds["dense"], strict=True)
            ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
            row["overhead_percent"] = 100 * (statistics.median(ratios) - 1)
            row["range"] = f"{100 * (min(ratios) - 1):+.1f} to {100 * (max(ratios) - 1):+.1f}"
        rows.append(row | {"zeros": zeros[variant], "rounds": args.rounds, "steps": args.steps})
    return rows


def measure_pairs(args: argparse.Namespace, model: nn.Module, batches: Tensor) -> list[dict[str, Any]]:
    timer, zeros = fit("ours", model, batches, args)
    pairs = pairs_of(timer.seconds)
    print(" ".join(f"{a:.3f}/{b:.3f}" for a, b in pairs), file=sys.stderr)
    row: dict[str, Any] = {"variant": "ours, on and off in turns"}
    row["step_s"], row["without_s"] = (statistics.median(side) for side in zip(*pairs, strict=True))
    return [row | common.paired_overhead(pairs) | {"zeros": zeros, "pairs": len(pairs)}]


def measure_passes(model: nn.Module, rounds: int) -> list[dict[str, Any]]:
    """Medians of the two passes of a step, over all decoder linears, in turns."""
    from lightning_prune.pruning import clearing, enforcement

    torch.set_num_threads(1)
    weights = {name: layer.weight for name, layer in reference.all_linears(model).items()}
    masks = {name: torch.rand_like(weight) >= SPARSITY for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    enforcer = enforcement.Enforcer(weights, masks)
    tensors = [tensor.view(torch.int32) for w in weights.values() for tensor in (w.grad, w.detach())]

    def ours(piece: int) -> None:
        default, clearing._CPU_PIECE = clearing._CPU_PIECE, piece
        enforcer._masked.clear()  # as after a backward pass
        enforcer.mask_gradients()
        enforcer.mask_weights()
        clearing._CPU_PIECE = default

    def floor() -> None:
        for tensor in tensors:
            tensor.bitwise_and_(-1)

    def full_width() -> None:
        for tensor, mask in zip(tensors, (m for m in wide for _ in range(2)), strict=True):
            tensor.bitwise_and_(mask)

    wide = [-mask.int() for mask in masks.values()]
    functions = {"ours": lambda: ours(clearing._CPU_PIECE)}
    functions |= {f"pieces of 2^{power}": lambda power=power: ours(1 << power) for power in (16, 18, 19, 20, 22)}
    functions |= {"masks at full width": full_width, "floor: read and write": floor}
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in functions if turn % 2 == 0 else reversed(functions):
            start = time.thread_time()
            functions[name]()
            seconds[name].append(time.thread_time() - start)
    numel = sum(w.numel() for w in weights.values())
    return [
        {"variant": n, "ms": 1000 * statistics.median(s), "weights": numel, "rounds": rounds}
        for n, s in seconds.items()
    ]


def measure_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One process for each variant: memory that an earlier one freed must not hide in the next one's."""
    rows: list[dict[str, Any]] = []
    for variant in args.only:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", variant]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peak = json.loads(result.stdout.splitlines()[-1])
        rows.append({"variant": variant, "peak_MiB": peak / 2**20})
        if args.only[0] == "dense":
            rows[-1]["extra_MiB"] = rows[-1]["peak_MiB"] - rows[0]["peak_MiB"]
    return rows


def main() -> None:
    p = common.parser(__doc__, evaluation=False)
    p.set_defaults(length=256)
    p.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--rounds", type=int, default=3, help="fits of each variant (default 3)")
    p.add_argument("--steps", type=int, default=4, help="measured steps of a fit (default 4)")
    p.add_argument("--paired", action="store_true", help="ours alone, on and off in turns")
    p.add_argument("--passes", action="store_true", help="the two passes of a step alone, --rounds times")
    p.add_argument("--memory", action="store_true", help="peak memory instead of time")
    p.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = p.parse_args()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    if args.passes:
        table = measure_passes(common.load(args)[0], args.rounds)
    elif args.memory and not args.memory_of:
        table = measure_memory(args)
    else:
        args.samples = args.batch_size * (args.steps + 1)  # one more batch, whose start ends the last step
        model, tokenizer = common.load(args)
        batches = common.calibration_of(args, tokenizer)
        if args.memory_of:
            print(json.dumps(fit(args.memory_of, model, batches, args)[0].peak))
            return
        table = (measure_pairs if args.paired else measure_time)(args, model, batches)

    measure = "passes" if args.passes else "memory" if args.memory else "time"
    settings = {"measure": measure} | ({} if args.passes else {"batch": f"{args.batch_size}x{args.length}"})
    settings["model"] = args.gguf_file or Path(args.model).name
    rows = common.Rows(args.json, ("variant", "measure", "batch", "model"))
    for row in table:
        rows.add(row | settings)
    print(common.markdown(table))


if __name__ == "__main__":
    main()
