"""What retraining a sliver gives back: variants of PERP against full fine-tuning with masks.

From each pruned model (`--starts`) every variant is trained for the same steps on the same blocks of the retraining
text, in the same order: AdamW without weight decay, 10 % linear warm-up, then linear to zero. Adapters are merged
before anything is measured. Reported for each:

- perplexity on the evaluation text, and the share of the model's parameters that is trained;
- bytes of gradients and optimizer states, and their ratio to full fine-tuning's;
- seconds of a step (median).

The learning rate is chosen from a grid for each variant on the first start, by the perplexity on blocks of the
retraining text that no variant trains on; the other starts take that rate.

    python tests/benchmarks/perp.py --model FOLDER --calibration TEXT --retraining TEXT2 --evaluation TEXT3 \\
        --starts kfac-50 wanda-50 magnitude-50 gblm-2:4 --json FILE

`--timing ROUNDS` measures steps instead, in turns: plain PEFT LoRA on the same layers and norms, each variant and full
fine-tuning; seconds, and the highest resident memory above that of the pruned model.
Rows are merged into the JSON file and not trained again, so the table can be made in pieces.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import common
import torch
from ours import ours_prune
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_prune.perp import add_adapters, merge, trainable_share
from lightning_prune.pruning.enforcement import Enforcer
from lightning_prune.pruning.masks import named_weights

STARTS: dict[str, dict[str, Any]] = {
    "magnitude-50": {"score": "magnitude", "sparsity": 0.5, "pattern": "unstructured"},
    "wanda-50": {"score": "wanda", "sparsity": 0.5, "pattern": "unstructured"},
    "kfac-50": {"score": "kfac", "sparsity": 0.5, "pattern": "unstructured"},
    "gblm-2:4": {"score": "gblm", "sparsity": 0.5, "pattern": "2:4"},
}


@dataclass(frozen=True)
class Variant:
    """How a pruned model is retrained; `adapter` "full" trains every weight with masks."""

    adapter: str | None
    train: tuple[str, ...]
    rates: tuple[float, ...]


VARIANTS = {
    "norms": Variant(None, ("norm",), (1e-3, 3e-3)),
    "mask_lora": Variant("mask_lora", ("norm",), (5e-4, 1e-3, 2e-3)),
    "scale_lora": Variant("scale_lora", ("norm",), (1e-3, 3e-3)),
    "lora_prune": Variant("lora_prune", ("norm",), (5e-4, 1e-3)),
    "full": Variant("full", (), (1e-4, 3e-4)),
}


class Retraining:
    """A pruned model on its way through one variant's training; `finish` gives the plain model back."""

    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, Tensor],
        variant: Variant,
        rate: float,
        steps: int,
        mixed: bool = False,
    ) -> None:
        self.masks, self.enforcer, self.wrapped, self.mixed = masks, None, model, mixed
        if variant.adapter == "full":
            named = named_weights(model)
            self.enforcer = Enforcer({name: named[name] for name in masks}, masks)
        else:
            torch.manual_seed(0)
            self.wrapped = add_adapters(model, variant.adapter, masks, variant.train)
        self.share = 1.0 if self.enforcer else trainable_share(self.wrapped)
        trained = [p for p in self.wrapped.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmed_up(steps))
        self.wrapped.train()

    def step(self, batch: Tensor) -> float:
        """One optimizer step on blocks `[B, T]`; returns the loss."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.mixed):
            loss = self.wrapped(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        if self.enforcer is not None:
            self.enforcer.mask_gradients()
        self.optimizer.step()
        if self.enforcer is not None:
            self.enforcer.mask_weights()
        self.schedule.step()
        self.held = state_bytes(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def finish(self) -> nn.Module:
        return self.wrapped if self.enforcer is not None else merge(self.wrapped)


def warmed_up(steps: int) -> Callable[[int], float]:
    warmup = max(1, steps // 10)
    return lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of gradients and optimizer states."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = [p.grad for p in parameters if p.grad is not None]
    held += [s for p in parameters for s in optimizer.state[p].values() if isinstance(s, Tensor)]
    return sum(t.numel() * t.element_size() for t in held)


def training_blocks(args: argparse.Namespace, tokenizer: Any) -> tuple[list[Tensor], Tensor]:
    """Batches to train on, in a fixed random order, and blocks held out to choose learning rates by."""
    tokens = common.tokenize(args.retraining, tokenizer)
    held = args.tuning_windows * args.window_length
    if tokens.numel() - held < args.steps * args.batch_size * args.block_length:
        raise SystemExit("the retraining text is too short for these steps: lower --steps or --batch-size")
    available = (tokens.numel() - held) // args.block_length
    blocks = tokens[: available * args.block_length].view(available, args.block_length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(0))[: args.steps * args.batch_size]
    return list(blocks[order].split(args.batch_size)), tokens[-held:].view(args.tuning_windows, args.window_length)


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--retraining", required=True, help="text file to train on")
    p.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--block-length", type=int, default=128)
    p.add_argument("--tuning-windows", type=int, default=8)
    p.add_argument("--rates", nargs="+", type=rate_of, default=[], metavar="VARIANT=RATE", help="no grid for these")
    p.add_argument("--precision", default="32", choices=("32", "bf16-mixed"), help="of training, not of evaluation")
    p.add_argument("--timing", type=int, metavar="ROUNDS", help="time steps in turns instead of training")
    args = p.parse_args()
    model, tokenizer = common.load(args)
    sequences = common.calibration_of(args, tokenizer)
    batches, held_out = training_blocks(args, tokenizer)
    if args.timing:
        print(common.markdown(timing(args, model, sequences, batches)))
        return
    evaluations = common.evaluations_of(args, tokenizer)
    settings = common.settings_of(args) | {
        "training": f"{args.steps} x {args.batch_size} x {args.block_length}, {args.precision}",
        "text": args.retraining.rsplit("/", 1)[-1].rsplit(".", 1)[0],
    }
    rows = common.Rows(args.json, ("start", "variant", "rate", *settings))
    dense = common.Snapshot(model)
    if (found := rows.find(start="dense", **settings)) is None:
        found = {"start": "dense", "variant": "", "rate": None, **settings, **scores(model, evaluations, held_out)}
        rows.add(found)
    table = [found]
    chosen: dict[str, float] = dict(args.rates)
    for start in args.starts:
        dense.restore()
        masks = ours_prune(model, sequences, batch_size=4, **STARTS[start])
        pruned = common.Snapshot(model)
        if (found := rows.find(start=start, variant="pruned", **settings)) is None:
            found = {"start": start, "variant": "pruned", "rate": None, **settings}
            found |= scores(model, evaluations, held_out)
            rows.add(found)
        table.append(found)
        for name in args.variants:
            rates = (chosen[name],) if name in chosen else VARIANTS[name].rates
            runs = []
            for rate in rates:
                row = {"start": start, "variant": name, "rate": rate, **settings}
                if (found := rows.find(**row)) is None:
                    pruned.restore()
                    found = row | train(model, masks, VARIANTS[name], rate, batches, mixed=args.precision != "32")
                    found |= scores(model, evaluations, held_out)
                    if not common.same_zeros(model, masks):
                        raise RuntimeError(f"{start} {name}: a pruned weight is not zero after retraining")
                    rows.add(found)
                runs.append(found)
            best = min(runs, key=lambda run: run["held_out"])
            chosen.setdefault(name, best["rate"])
            table.append(best)
    print(common.markdown([flat(row) for row in table]))


def rate_of(text: str) -> tuple[str, float]:
    """``mask_lora=1e-3`` as a pair."""
    name, equals, rate = text.partition("=")
    if not equals or name not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{text!r} must be VARIANT=RATE, with one of {', '.join(VARIANTS)}")
    return name, float(rate)


def scores(model: nn.Module, evaluations: dict[str, Tensor], held_out: Tensor) -> dict[str, Any]:
    return {"perplexity": common.perplexities(model, evaluations), "held_out": common.perplexity(model, held_out)}


def train(
    model: nn.Module, masks: dict[str, Tensor], variant: Variant, rate: float, batches: list[Tensor], mixed: bool
) -> dict[str, Any]:
    retraining = Retraining(model, masks, variant, rate, len(batches), mixed)
    seconds, losses = [], []
    for batch in batches:
        started = time.perf_counter()
        losses.append(retraining.step(batch))
        seconds.append(time.perf_counter() - started)
    retraining.finish()
    return {
        "trained_percent": 100 * retraining.share,
        "state_MiB": retraining.held / 2**20,
        "step_s": statistics.median(seconds),
        "last_losses": statistics.mean(losses[-5:]),
    }


def flat(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("start", "variant", "rate", "trained_percent", "state_MiB", "step_s", "held_out")
    return {key: row.get(key) for key in keys} | row["perplexity"]


def timing(
    args: argparse.Namespace, model: nn.Module, sequences: Tensor, batches: list[Tensor]
) -> Iterator[dict[str, Any]]:
    """Seconds of a step of plain LoRA, of every variant and of full fine-tuning: one wrapped model at a time."""
    start = args.starts[0]
    masks = ours_prune(model, sequences, batch_size=4, **STARTS[start])
    modules, mixed = [name.removesuffix(".weight") for name in masks], args.precision != "32"
    seconds: dict[str, list[float]] = {"lora": [], **{name: [] for name in args.variants}}
    peaks: dict[str, int] = {}
    resident = common.settled()
    for round_index in range(args.timing):
        names = list(seconds) if round_index % 2 == 0 else list(reversed(seconds))
        for name in names:
            if name == "lora":
                wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=modules))
                for parameter_name, parameter in wrapped.named_parameters():
                    if "norm" in parameter_name:
                        parameter.requires_grad_(True)
                retraining = Plain(wrapped, mixed)
            else:
                retraining = Retraining(model, masks, VARIANTS[name], 1e-5, 100, mixed)
            with common.PeakMemory() as memory:
                retraining.step(batches[0])  # the first makes the optimizer's states
                for batch in batches[1:4]:
                    started = time.perf_counter()
                    retraining.step(batch)
                    seconds[name].append(time.perf_counter() - started)
            peaks[name] = max(peaks.get(name, 0), memory.peak - resident)
            retraining.finish()
            del retraining
            resident = common.settled()
            for parameter in model.parameters():
                parameter.requires_grad_(True)
    for name, values in seconds.items():
        # In turns: the ratio of each round's medians says more than the medians of all.
        ratios = [
            statistics.median(values[i : i + 3]) / statistics.median(seconds["lora"][i : i + 3])
            for i in range(0, len(values), 3)
        ]
        yield {
            "variant": name,
            "step_s": statistics.median(values),
            "to plain LoRA": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "peak_MiB": peaks[name] / 2**20,
        }


class Plain(Retraining):
    """Plain PEFT LoRA, with the same optimizer."""

    def __init__(self, wrapped: nn.Module, mixed: bool) -> None:
        self.wrapped, self.enforcer, self.mixed = wrapped, None, mixed
        self.optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-5)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        wrapped.train()

    def finish(self) -> nn.Module:
        return self.wrapped.unload()


if __name__ == "__main__":
    main()
