"""Shrinking while training against shrinking first and training afterwards: the same tokens and learning rates.

Every method starts from the same model, ends at the same number of parameters or just below, and trains on the same
blocks of the training text (`--calibration`) in the same order, with AdamW, warm-up and a cosine:

- dense: no pruning, the same training: what is there to lose;
- ours-A, ours-B: `PruningAwarePretraining`, without and with second-order updates; the target is reached after
  `--shrink-share` of the steps;
- oneshot-kfac: `prune_structured` with kfac unit saliency and Hessian compensation, then the training;
- oneshot-magnitude: unit magnitudes and no compensation, then the training.

A target is the share of the decoder's parameters (all in its layers) to keep; all methods get the number of parameters
that follows, of which embeddings are a part, so that a method that drops hidden channels may spend it elsewhere.

    python tests/benchmarks/pretraining.py --model FOLDER --calibration TEXT --evaluation TEXT2 --steps 400 \\
        --batch-size 4 --length 256 --targets 0.75 0.5 --json FILE

`--measure speed` measures instead, on the model and on what is left of it after shrinking to the last target: seconds
of a step before, after, and of a freshly built model of the same configuration (interleaved); the overhead of saliency
and of observing moments (every other step of one fit); and the bytes that parameters, gradients and optimizer hold,
against a fresh model's. Rows that the file has are not run again.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import common
import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

METHODS = ("dense", "ours-A", "ours-B", "oneshot-kfac", "oneshot-magnitude")
NEVER = 10**9


class Pretraining(lightning.LightningModule):
    """The language model, AdamW, warm-up and cosine; nothing of the package."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, steps: int | None = None) -> None:
        super().__init__()
        self.model, self.args, self.steps = model, args, steps or args.steps

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.args.learning_rate, weight_decay=0.0)
        warmup = max(1, round(self.args.warmup * self.steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, self.steps - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepTimer(Callback):
    """Seconds of every optimizer step, from the start of its first batch to that of the next step's."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self._step = -1

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, index: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.stamps.append(common.clock())

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.stamps.append(common.clock())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]


class Held(Callback):
    """Bytes of parameters, gradients and optimizer states at the last step, before gradients go."""

    bytes = 0

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any) -> None:
        tensors = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
        for optimizer in trainer.optimizers:
            tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.bytes = sum(storages.values())


def fit(module: Pretraining, batches: Tensor, args: argparse.Namespace, *callbacks: Callback) -> StepTimer:
    timer = StepTimer()
    trainer = lightning.Trainer(
        max_steps=len(batches) // (args.batch_size * args.accumulate),
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        callbacks=[timer, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=args.progress,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=args.batch_size))
    module.model.cpu()
    return timer


def training_blocks(args: argparse.Namespace, tokenizer: Any, steps: int) -> Tensor:
    """The blocks of `steps` steps, in an order of the seed; a text that is too short is repeated."""
    tokens = common.tokenize(args.calibration, tokenizer)
    available = tokens.numel() // args.length
    every = tokens[: available * args.length].view(available, args.length)
    generator, wanted = torch.Generator().manual_seed(args.seed), steps * args.batch_size * args.accumulate
    order = torch.cat(
        [torch.randperm(available, generator=generator) for _ in range(math.ceil(wanted / max(1, available)))]
    )
    return every[order[:wanted]]


def target_parameters(model: nn.Module, share: float) -> int:
    """Parameters of the whole model when `share` of those in the decoder's layers are left."""
    from lightning_prune.structure.units import read_structure

    structure = read_structure(model)
    inside = tuple(f"{name}." for name in structure.layer_names())
    parameters = structure.parameters()
    decoder = sum(p.numel() for name, p in parameters.items() if name.startswith(inside))
    return sum(p.numel() for p in parameters.values()) - round((1 - share) * decoder)


def callback_of(args: argparse.Namespace, target: int, **settings: Any) -> Any:
    from lightning_prune import PruningAwarePretraining

    defaults = {"types": args.types, "every_n_steps": args.every, "compact_every": args.compact_every}
    defaults |= {"saliency": args.saliency, "saliency_decay": args.saliency_decay, "start": args.start}
    defaults |= {"second_order_every": args.moments_every, "second_order_decay": args.moments_decay}
    return PruningAwarePretraining(target, **{**defaults, **settings})


def sizes_of(model: nn.Module) -> dict[str, int]:
    from lightning_prune.structure.units import read_structure

    return read_structure(model).sizes.as_dict()


def run(method: str, target: int, model: nn.Module, data: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Prune and train a copy of the model."""
    from lightning_prune import prune_structured

    module, callbacks, found = Pretraining(model.train(), args), [], dict[str, Any]()
    if method.startswith("ours"):
        end = round(args.shrink_share * args.steps)
        callbacks = [callback_of(args, target, end=end, second_order=method == "ours-B")]
    elif method.startswith("oneshot"):
        kfac = method == "oneshot-kfac"
        started = common.clock()
        prune_structured(
            model,
            common.batched(data["calibration"]),
            target=target,
            types=args.oneshot_types,
            saliency="kfac" if kfac else "magnitude",
            compensate=kfac,
            num_samples=len(data["calibration"]),
        )
        found["pruning_s"] = common.clock() - started
        found["untrained"] = common.perplexities(model, data["evaluations"])
        model.train()
    timer = fit(module, data["training"], args, *callbacks)
    tokens, edge = args.batch_size * args.accumulate * args.length, max(1, args.steps // 20)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["sizes"] = sizes_of(model)
    found["perplexity"] = common.perplexities(model, data["evaluations"])
    found["seconds"] = sum(timer.seconds)
    # Medians over a twentieth of the steps at either end; the first step warms up.
    found["tokens_per_s_start"] = tokens / statistics.median(timer.seconds[1 : edge + 1] or timer.seconds)
    found["tokens_per_s_end"] = tokens / statistics.median(timer.seconds[-edge:])
    for callback in callbacks:
        records = callback.history
        kept = records[:: max(1, len(records) // 40)]
        found["trajectory"] = [r.to_dict() for r in kept] + ([records[-1].to_dict()] if kept[-1] != records[-1] else [])
    return found


def quality(args: argparse.Namespace, model: nn.Module, data: dict[str, Any], rows: common.Rows) -> None:
    training = f"{args.steps}x{args.batch_size * args.accumulate}x{args.length}, lr {args.learning_rate}"
    settings = common.settings_of(args) | {"training": f"{training}, {args.precision}"}
    settings_of = {  # what decides the rows of one method and not those of the others
        "ours": f"{','.join(args.types)} by {args.saliency} (decay {args.saliency_decay}), from step {args.start} "
        f"every {args.every} until {args.shrink_share} of the steps; moments every {args.moments_every}, decay "
        f"{args.moments_decay}",
        "oneshot": ",".join(args.oneshot_types),
        "dense": "",
    }
    table: list[dict[str, Any]] = []
    for share in args.targets:
        target = target_parameters(model, share)
        for method in args.only:
            identity = {"method": method, "decoder_share": None if method == "dense" else share, **settings}
            identity["pruning"] = settings_of[method.partition("-")[0]]
            row = None if args.rerun else rows.find(**identity)
            if row is None:
                row = identity | {"target": target} | run(method, target, copy.deepcopy(model), data, args)
                rows.add(row)
            for text, value in row["perplexity"].items():
                line = {"method": method, "decoder share": row["decoder_share"], "text": text, "perplexity": value}
                line |= {"before training": (row.get("untrained") or {}).get(text)}
                line |= {k: row[k] for k in ("parameters", "tokens_per_s_start", "tokens_per_s_end", "seconds")}
                line |= {k: row["sizes"][k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
                if line not in table:
                    table.append(line)
            print(common.markdown(table), flush=True)


class EveryOtherStep(Callback):
    """Switches a hook of the callback off at odd steps."""

    def __init__(self, callback: Any, hook: str) -> None:
        self.callback, self.hook, self.original = callback, hook, getattr(callback, hook)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, index: int
    ) -> None:
        on = trainer.global_step % 2 == 0
        setattr(self.callback, self.hook, self.original if on else lambda *args, **kwargs: None)


def overhead(args: argparse.Namespace, model: nn.Module, batches: Tensor, second_order: bool) -> dict[str, Any]:
    """What saliency, or observing moments, adds to a step: pairs of neighboring steps."""
    target = target_parameters(model, args.targets[-1])
    if second_order:
        callback = callback_of(args, target, every_n_steps=NEVER, second_order=True, second_order_every=2)
        others: list[Callback] = []
    else:
        callback = callback_of(args, target, every_n_steps=NEVER)
        others = [EveryOtherStep(callback, "on_before_optimizer_step")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the target is not reached
        seconds = fit(Pretraining(model.train(), args), batches, args, *others, callback).seconds
    seconds = seconds[2 : len(seconds) // 2 * 2]
    extra = [a - b for a, b in zip(seconds[::2], seconds[1::2], strict=True)]
    without = statistics.median(seconds[1::2])
    what = "an observed step (moments)" if second_order else "saliency"
    return {"measure": what, "step_s": without, "overhead_percent": 100 * statistics.median(extra) / without}


def speed(args: argparse.Namespace, model: nn.Module, tokenizer: Any, rows: common.Rows) -> None:
    settings = {"model": args.gguf_file or Path(args.model).name, "batch": f"{args.batch_size}x{args.length}"}
    steps = max(4, args.speed_steps)
    batches = training_blocks(args, tokenizer, steps)
    table = [overhead(args, copy.deepcopy(model), batches, second_order) for second_order in (False, True)]

    small, held = copy.deepcopy(model).train(), {name: Held() for name in ("dense", "shrunk", "fresh")}
    shrunk = Pretraining(small, args, steps)
    callback = callback_of(args, target_parameters(model, args.targets[-1]), every_n_steps=1, end=2)
    fit(shrunk, batches, args, callback)
    plain: Any = small
    fresh = type(plain)(copy.deepcopy(plain.config)).to(next(plain.parameters()).dtype)
    modules = {"dense": Pretraining(copy.deepcopy(model).train(), args, steps), "shrunk": shrunk}
    modules["fresh"] = Pretraining(fresh.train(), args, steps)

    def timed(name: str) -> float:
        callbacks = [held[name], callback] if name == "shrunk" else [held[name]]
        return statistics.median(fit(modules[name], batches, args, *callbacks).seconds[1:])

    seconds = common.interleaved({name: (lambda name=name: timed(name)) for name in modules}, args.repetitions)
    tokens = args.batch_size * args.accumulate * args.length
    for name, values in seconds.items():
        row = {"measure": name, "step_s": statistics.median(values), "tokens_per_s": tokens / statistics.median(values)}
        row |= {"parameters": sum(p.numel() for p in modules[name].model.parameters())}
        table.append(row | {"held_MiB": held[name].bytes / 2**20})
    table.append({"measure": "speed of shrunk / fresh", "ratio": common.compare(seconds, "shrunk", "fresh")["ratio"]})
    for row in table:
        rows.add(row | settings | {"decoder_share": args.targets[-1]})
    print(common.markdown(table))


def main() -> None:
    p = common.parser(__doc__, evaluation=False)
    p.set_defaults(length=256)
    p.add_argument("--measure", choices=("quality", "speed"), default="quality")
    p.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    p.add_argument("--targets", nargs="+", type=float, default=[0.75, 0.5], help="shares of the decoder's parameters")
    p.add_argument("--steps", type=int, default=400, help="training steps of every method (default 400)")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--accumulate", type=int, default=1, help="batches in a step (default 1)")
    p.add_argument("--learning-rate", type=float, default=3e-4)
    p.add_argument("--warmup", type=float, default=0.05, help="share of the steps (default 0.05)")
    p.add_argument("--types", nargs="+", default=["attention", "ffn", "hidden"], help="units that ours may remove")
    p.add_argument("--oneshot-types", nargs="+", default=["ffn"], help="units that one-shot pruning may remove")
    p.add_argument("--saliency", default="taylor2", choices=("taylor2", "taylor1", "magnitude", "kfac"), help="of ours")
    p.add_argument("--saliency-decay", type=float, default=0.9, help="of ours (default 0.9)")
    p.add_argument("--moments-every", type=int, default=4, help="steps between observations for variant B (default 4)")
    p.add_argument("--moments-decay", type=float, default=0.9, help="of variant B's moments (default 0.9)")
    p.add_argument("--start", type=int, default=0, help="steps before ours begins to watch (default 0)")
    p.add_argument("--every", type=int, default=1, help="steps between prunings (default 1)")
    p.add_argument("--compact-every", type=int, default=16, help="prunings between compactions (default 16)")
    p.add_argument("--shrink-share", type=float, default=0.5, help="share of the steps in which ours shrinks")
    p.add_argument("--speed-steps", type=int, default=12, help="steps of a timed fit (default 12)")
    p.add_argument("--repetitions", type=int, default=3, help="timed fits of each model (default 3)")
    p.add_argument("--accelerator", default="cpu")
    p.add_argument("--precision", default="32-true")
    p.add_argument("--seed", type=int, default=0, help="of the order of the training blocks")
    p.add_argument("--progress", action="store_true", help="show Lightning's progress bar")
    p.add_argument("--rerun", action="store_true", help="run rows again that the file has")
    args = p.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if args.measure == "quality" and not args.evaluation:
        raise SystemExit("--measure quality needs --evaluation")

    torch.manual_seed(args.seed)
    model, tokenizer = common.load(args)
    if args.measure == "speed":
        speed(args, model, tokenizer, common.Rows(args.json, ("measure", "model", "batch", "decoder_share")))
        return
    data = {
        "calibration": common.calibration_of(args, tokenizer),
        "evaluations": common.evaluations_of(args, tokenizer),
        "training": training_blocks(args, tokenizer, args.steps),
    }
    print(f"{data['training'].numel():,} training tokens", file=sys.stderr)
    key = ("method", "decoder_share", "training", "pruning", "model")
    quality(args, model, data, common.Rows(args.json, key))


if __name__ == "__main__":
    main()
