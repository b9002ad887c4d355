"""Draw perplexity over training tokens for models that shrink while they train, or before, at equal tokens.

    python tests/benchmarks/token_files.py --texts FOLDER --out TOKENS --tokenizer MODEL --also WIKITEXT
    python tests/benchmarks/curves.py --model MODEL --tokens TOKENS --work FOLDER --json FILE \\
        --points 0 5e6 10e6 25e6 50e6 --targets 0.75 0.5 --minutes 8 --device cuda --precision bf16-mixed

All arms train on the same blocks in the same order with the same rates (AdamW, warm-up, cosine), and end at the same
number of parameters or just below; a target is the share of the parameters in the decoder's layers that is left:

- dense: nothing is removed;
- aware-A-taylor, aware-B-taylor, aware-A-kfac, aware-B-kfac: `PruningAwarePretraining` without and with second-order
  updates, by the paper's Taylor saliency and by kfac's; the target is reached after `--shrink-share` of the tokens;
- oneshot-kfac: `prune_structured` with kfac saliency and compensation first; oneshot-obs: with obs saliency;
- oneshot-taylor: by the Taylor saliency without compensation first, LLM-Pruner's way;
- oneshot-magnitude: by the magnitude of units first;
- fresh: random weights in the shape of oneshot-kfac;
- aware-2:4: shrinks less, to as many bytes (in bfloat16, with 2 bits for each weight kept) as the target has, and is
  pruned to 2:4 when it has its size; aware-2:4-perp: then trains PERP's adapters instead of the weights.

`--set NAME=VALUE` gives the arms aware-* other arguments of the callback, `--oneshot-types` the one-shot arms other
unit types, `--oneshot-sizes` sizes in place of the target's, `--oneshot-rounds` judges units anew between removals,
`--per-product N` compares types of units by saliency a product (multiplication and addition) in texts of N tokens, not
by saliency a weight, and `--rates` gives all arms another course of the learning rate: so that single factors can be
studied.

`--losses distill` adds to the cross-entropy the divergence from the dense model, in equal shares, for every arm.

It runs in pieces: after `--minutes` it stops at the next point or save (every `--save-every` tokens) and says what is
left; the same command goes on from the checkpoints in `--work`. Tokens a second are those of the wall clock on a GPU,
and of `common.clock` on a CPU; memory is what parameters, gradients and optimizer hold, and on a GPU the peak besides.
Rows of `--json` are not made again. `--build` trains the dense model first, from random weights on the same file, where
there is none: `--build hidden_size=128,...`.
`--dry-run` does everything on a tiny model of its own in about a minute. `--picture FILE` draws the rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import lightning
import token_files
import torch
from lightning.pytorch.callbacks import Callback
from pretraining import target_parameters
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_prune.structure import planning

BYTES_OF_2TO4 = (2 * 16 + 2 * 2) / (4 * 16)  # against dense bfloat16: two of four values, and where they are


@dataclass(frozen=True)
class Arm:
    """How a model becomes small.

    Attributes:
        oneshot: Arguments of `prune_structured`, which prunes before the training.
        shrink: Arguments of `PruningAwarePretraining`, which prunes in it.
        fresh: The weights are random ones.
        sparse: 2:4 masks when the model has its size.
        retrain: PERP's adapters from then on.
    """

    oneshot: dict[str, Any] | None = None
    shrink: dict[str, Any] | None = None
    fresh: bool = False
    sparse: bool = False
    retrain: bool = False


SIZES = ("num_hidden_layers", "num_key_value_heads", "num_attention_heads", "intermediate_size", "hidden_size")
KFAC: dict[str, Any] = {"saliency": "kfac", "compensate": True}
SECOND_ORDER: dict[str, Any] = {"second_order": True, "second_order_every": 4, "second_order_decay": 0.98}
ARMS = {
    "dense": Arm(),
    "aware-A-taylor": Arm(shrink={"saliency": "taylor2"}),
    "aware-B-taylor": Arm(shrink={"saliency": "taylor2", **SECOND_ORDER}),
    "aware-A-kfac": Arm(shrink={"saliency": "kfac"}),
    "aware-B-kfac": Arm(shrink={"saliency": "kfac", **SECOND_ORDER}),
    "oneshot-kfac": Arm(oneshot=KFAC),
    "oneshot-obs": Arm(oneshot=KFAC | {"saliency": "obs"}),
    "oneshot-taylor": Arm(oneshot={"saliency": "taylor1", "compensate": False}),
    "oneshot-magnitude": Arm(oneshot={"saliency": "magnitude", "compensate": False}),
    "fresh": Arm(oneshot=KFAC, fresh=True),
    "aware-2:4": Arm(shrink={"saliency": "kfac", "round_to": 4}, sparse=True),
    "aware-2:4-perp": Arm(shrink={"saliency": "kfac", "round_to": 4}, sparse=True, retrain=True),
}


# --------------------------------------------------------------------------------------- training


def share_of_rate(args: argparse.Namespace, steps: int, step: int) -> float:
    """Warm-up and cosine to a tenth; in other courses, the cosine starts, or all begins anew, when shrinking ends."""
    end = round(args.shrink_share * steps) if args.rates != "cosine" else 0
    if args.rates == "rewarm":
        step, steps = (step, end) if step < end else (step - end, steps - end)
        end = 0
    warmup = max(1, round(args.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    first = max(warmup, end)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, max(0, step - first) / max(1, steps - first))))


@dataclass
class Plan:
    """When what happens, in optimizer steps."""

    points: list[int]
    stops: list[int] = field(default_factory=list)  # points and saves

    @property
    def total(self) -> int:
        return self.points[-1]


def plan_of(points: list[float], save_every: float, step_tokens: int) -> Plan:
    steps = sorted({round(p / step_tokens) for p in points})
    every = max(1, round(save_every / step_tokens))
    return Plan(steps, sorted({*steps, *range(every, steps[-1], every)} - {0}))


class Training(lightning.LightningModule):
    """A language model, AdamW, warm-up and cosine; the dense model is no part of it."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, rate: float, steps: int, dense: nn.Module | None):
        super().__init__()
        self.model, self.args, self.rate, self.steps = model, args, rate, steps
        self._dense = (dense,)  # in a tuple, so that it is no submodule

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        logits = self.model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        entropy = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        if self._dense[0] is None:
            return entropy
        with torch.no_grad():
            wanted = self._dense[0](input_ids=batch, use_cache=False).logits[:, :-1].float()
        divergence = nn.functional.kl_div(
            logits.log_softmax(-1).flatten(0, 1),
            wanted.log_softmax(-1).flatten(0, 1),
            reduction="batchmean",
            log_target=True,
        )
        return 0.5 * entropy + 0.5 * divergence

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, self.args, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Blocks(lightning.LightningDataModule):
    """The blocks from one stop to the next: an epoch of the Trainer, so that every checkpoint is at the end of one."""

    def __init__(self, blocks: Tensor, plan: Plan, batch_size: int) -> None:
        super().__init__()
        self.blocks, self.plan, self.batch_size = blocks, plan, batch_size

    def train_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        done = self.trainer.global_step
        stop = next((s for s in self.plan.stops if s > done), self.plan.total)
        return DataLoader(self.blocks[done * self.batch_size : stop * self.batch_size], batch_size=self.batch_size)


class Pieces(Callback):
    """At every stop: measure if it is a point, save, and end the fit if the time is up."""

    def __init__(self, plan: Plan, measure: Any, until: float) -> None:
        self.plan, self.measure, self.until = plan, measure, until
        self.seconds = 0.0  # of training since the last point
        self._started = self._since = self._longest = 0.0

    @staticmethod
    def clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return common.clock()

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._started, self._since = self.clock(), time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.seconds += self.clock() - self._started
        self._longest = max(self._longest, time.monotonic() - self._since)
        if trainer.global_step in self.plan.points[:-1]:  # the last one is measured when adapters are merged
            self.measure(module, trainer.global_step, self.seconds)
            self.seconds = 0.0
        trainer.should_stop = time.monotonic() + self._longest > self.until

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]


def fit(module: Training, blocks: Tensor, plan: Plan, folder: Path, args: argparse.Namespace, measure: Any, *more: Any):
    """Train on from the last checkpoint of a folder; returns whether all steps are done."""
    last = folder / "last.ckpt"
    pieces = Pieces(plan, measure, args.until)
    save = lightning.pytorch.callbacks.ModelCheckpoint(
        folder,
        filename="last",
        save_top_k=1,
        every_n_epochs=1,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    trainer = lightning.Trainer(
        max_steps=plan.total,
        accelerator="gpu" if args.device == "cuda" else args.device,
        devices=1,
        precision=args.precision,
        gradient_clip_val=1.0,
        callbacks=[*more, pieces, save],
        logger=False,
        reload_dataloaders_every_n_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    args.trained = True
    trainer.fit(module, Blocks(blocks, plan, args.batch_size), ckpt_path=last if last.exists() else None)
    done = trainer.global_step >= plan.total
    if done:
        measure(module.to(args.device), plan.total, pieces.seconds)
    return done


# --------------------------------------------------------------------------------------- arms


def ordered_blocks(path: Path, count: int, length: int, seed: int) -> Tensor:
    """So many blocks of a token file in an order of the seed, `[count, length]`; a short file is repeated."""
    tokens = token_files.load(path)
    available = tokens.numel() // length
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(available, generator=generator) for _ in range(math.ceil(count / available))]
    return tokens[: available * length].view(available, length)[torch.cat(order)[:count]]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def start_of(
    arm: Arm, dense: Path, folder: Path, share: float, calibration: Tensor, args: argparse.Namespace, seed: int
):
    """The model that an arm's training starts from, made once."""
    from lightning_prune import prune_structured
    from lightning_prune.structure import save_plain

    if arm.oneshot is None:
        return load(dense)
    if not (folder / "start").exists():
        model = load(dense).to(args.device)
        prune_structured(
            model,
            common.batched(calibration),
            target=args.oneshot_sizes or target_parameters(model, share),
            types=types_of(arm, args),
            num_samples=len(calibration),
            rounds=args.oneshot_rounds,
            **arm.oneshot,
        )
        save_plain(model, folder / "start")
        if arm.fresh:
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(load(folder / "start").config).save_pretrained(folder / "start")
    return load(folder / "start")


def callbacks_of(arm: Arm, model: nn.Module, share: float, plan: Plan, args: argparse.Namespace) -> list[Any]:
    from lightning_prune import OneShot, PERPRetraining, PruningAwarePretraining, WeightPruning

    if arm.shrink is None:
        return []
    end = max(2, round(args.shrink_share * plan.total))
    target = target_parameters(model, min(1.0, share / BYTES_OF_2TO4) if arm.sparse else share)
    settings = {"types": args.types, "saliency_decay": args.saliency_decay, "every_n_steps": args.every, "end": end}
    found: list[Any] = [PruningAwarePretraining(target, **(settings | arm.shrink | args.set))]
    if arm.sparse:
        found.append(
            WeightPruning("magnitude", sparsity=None, pattern="2:4", schedule=OneShot(end + 2), progress=False)
        )
    return [*found, PERPRetraining()] if arm.retrain else found


def types_of(arm: Arm, args: argparse.Namespace) -> list[str]:
    return args.oneshot_types if arm.oneshot and arm.oneshot["compensate"] else args.pruner_types


def weights_per_product(length: int, planner: Any, unit_type: str, sizes: Any) -> float:
    """How many weights of a type go for one product of a token; stands in for `Planner.weights_saving`.

    A token takes a product with every weight, and in every head with half of the keys and values of its text.
    """

    def attended(sizes: Any) -> int:
        return sizes.num_hidden_layers * sizes.num_attention_heads * sizes.head_dim * length

    least = planner.least([unit_type], sizes)
    weights = planner.parameters(sizes) - planner.parameters(least)
    return weights / (weights + attended(sizes) - attended(least)) if weights else 1.0


def pruning_of(arm: Arm, args: argparse.Namespace) -> str:
    """What decides the figures of an arm besides the training."""
    if arm.shrink is not None:
        every = f"every {args.every} until {args.shrink_share} of the steps, decay {args.saliency_decay}"
        words, more = ["+".join(args.types), every], args.set
    elif arm.oneshot is not None:
        words, more = ["+".join(types_of(arm, args))], args.oneshot_sizes
        if args.oneshot_rounds > 1:
            words.append(f"in {args.oneshot_rounds} rounds")
    else:
        words, more = [], {}
    if args.per_product and words:
        words.append(f"by products at {args.per_product}")
    return " ".join([*words, *(f"{name}={value}" for name, value in more.items())])


def run(
    name: str, share: float, loss: str, seed: int, dense: Path, rows: common.Rows, args: argparse.Namespace
) -> bool:
    """Run an arm as far as time allows; returns whether it is done."""
    arm, plan = ARMS[name], args.plan
    identity = {
        "arm": name, "target": None if name == "dense" else share, "loss": loss, "seed": seed, "model": args.named,
        "training": f"{args.batch_size}x{args.length}, {plan.total} steps, lr {args.learning_rate} {args.rates}"
        f"{'' if args.rates == 'cosine' else f' until {args.shrink_share}'}, {args.precision}",
        "pruning": pruning_of(arm, args),
    }  # fmt: skip
    step_tokens = args.batch_size * args.length
    if all(rows.find(**identity, tokens=p * step_tokens) for p in plan.points):
        return True
    if args.trained and time.monotonic() > args.until:
        return False
    blocks = ordered_blocks(args.tokens / "train.bin", plan.total * args.batch_size, args.length, seed)
    calibration = blocks[: args.samples]
    # Runs of other settings do not go on from this one's checkpoints.
    own = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = args.work / f"{name.replace(':', '')}_{share if name != 'dense' else 1}_{loss}_{seed}_{own}"
    model = start_of(arm, dense, folder, share, calibration, args, seed)
    teacher = load(dense).eval().requires_grad_(False).to(args.device) if loss == "distill" else None
    rate = args.fresh_learning_rate if arm.fresh else args.learning_rate
    module = Training(model.train(), args, rate, plan.total, teacher)

    def measure(module: Training, step: int, seconds: float) -> None:
        row = identity | {"tokens": step * step_tokens}
        row["parameters"] = sum(p.numel() for p in module.model.parameters())
        row["sizes"] = {name: getattr(module.model.config, name) for name in SIZES}
        row["perplexity"] = common.perplexities(module.model, args.evaluations, args.batch_size)
        if args.tasks and step == plan.total:
            row |= tasks_of(module.model, args)
        before = max((p for p in plan.points if p < step), default=0)
        row["tokens_per_s"] = (step - before) * step_tokens / seconds if seconds else None
        row["held_MiB"] = held(module) / 2**20 if step else None
        if args.device == "cuda":
            row["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
        module.model.train()
        rows.add(row)

    if plan.points[0] == 0 and not (folder / "last.ckpt").exists():
        module.model.to(args.device)
        measure(module, 0, 0.0)
    done = fit(module, blocks, plan, folder, args, measure, *callbacks_of(arm, model, share, plan, args))
    if done and not args.keep:
        shutil.rmtree(folder)
    return done


def held(module: Training) -> int:
    """Bytes of the parameters, a gradient of each, and the optimizer's states."""
    tensors = [*module.parameters(), *(p for p in module.parameters() if p.requires_grad)]
    for optimizer in module.trainer.optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    return sum(t.numel() * t.element_size() for t in tensors)


def tasks_of(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    from lightning_prune.evaluation.tasks import zero_shot

    results = zero_shot(model, AutoTokenizer.from_pretrained(args.tokens), [str(args.tasks)], progress=False)
    return {"accuracy": next(r.value for r in results if r.task == args.tasks.name)}


def build(folder: Path, args: argparse.Namespace) -> bool:
    """Train the dense model from random weights on blocks of its own; returns whether it is done."""
    if (folder / "config.json").exists():
        return True
    plan = plan_of([args.build_tokens], args.save_every, args.batch_size * args.length)
    sizes = {k: int(v) for k, v in (pair.split("=") for pair in args.build.split(","))}
    vocabulary = len(AutoTokenizer.from_pretrained(args.tokens))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes))
    module = Training(model.train(), args, args.fresh_learning_rate, plan.total, None)
    blocks = ordered_blocks(args.tokens / "train.bin", plan.total * args.batch_size, args.length, 10**6)

    def measure(module: Training, step: int, seconds: float) -> None:
        found = common.perplexities(module.model, args.evaluations, args.batch_size)
        print(f"dense model after {step * args.batch_size * args.length:,} tokens: {found}", flush=True)

    done = fit(module, blocks, plan, folder / "training", args, measure)
    if done:
        module.model.cpu().save_pretrained(folder)
    return done


# --------------------------------------------------------------------------------------- output


FIGURES: dict[str, Callable[[dict[str, Any], str], float | None]] = {
    "perplexity": lambda row, text: row["perplexity"][text],
    "tokens a second": lambda row, text: row["tokens_per_s"],
    "MiB held": lambda row, text: row["held_MiB"],
}


def tables(rows: common.Rows, text: str, figure: str = "perplexity") -> str:
    """One table for each target and loss: a figure at every point, means over seeds."""
    parts = []
    for target, loss in dict.fromkeys((r["target"], r["loss"]) for r in rows.rows if r["target"] is not None):
        lines = []
        for (name, pruning, training), mine in ways(rows, target, loss).items():
            line = {"arm": name, "pruning": pruning, "training": training}
            line |= {"seeds": len({r["seed"] for r in mine}), "parameters": mine[-1]["parameters"]}
            for tokens in sorted({r["tokens"] for r in mine}):
                found = [FIGURES[figure](r, text) for r in mine if r["tokens"] == tokens]
                known = [value for value in found if value is not None]
                line[f"{tokens:,}"] = f"{sum(known) / len(known):.2f}" if known else ""
            lines.append(line)
        parts.append(f"{target:.0%} of the decoder, {loss}, {figure}, {text}\n\n{common.markdown(lines)}")
    return "\n\n".join(parts)


def ways(rows: common.Rows, target: float, loss: str) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Rows of a target and loss, those of the dense model among them, by arm, pruning and training."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows.rows, key=lambda row: list(ARMS).index(row["arm"])):
        if row["loss"] == loss and row["target"] in (target, None):
            found.setdefault((row["arm"], row["pruning"], row["training"]), []).append(row)
    return found


def draw(rows: common.Rows, path: Path, text: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    panels = list(dict.fromkeys((r["target"], r["loss"]) for r in rows.rows if r["target"] is not None))
    names = sorted({r["arm"] for r in rows.rows}, key=list(ARMS).index)
    colors = {name: plt.get_cmap("tab20")(2 * place % 20 + place // 10) for place, name in enumerate(names)}
    plt.rcParams["svg.hashsalt"] = "curves"  # the same file from the same figures
    across, down = min(2, len(panels)), math.ceil(len(panels) / 2)
    size = (1 + 5 * across, 3.6 * down)
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (target, loss) in zip(axes.flat, panels, strict=False):
        shown: list[float] = []
        for (name, *_), mine in ways(rows, target, loss).items():
            points: dict[int, list[float]] = {}
            for row in mine:
                points.setdefault(row["tokens"], []).append(row["perplexity"][text])
            xs = sorted(points)
            means = [sum(points[x]) / len(points[x]) for x in xs]
            style = "-" if name.startswith("aware") else ":" if name in ("dense", "fresh") else "--"
            label = f"{name}, {means[-1]:.1f} in the end"
            axis.plot([x / 1e6 for x in xs], means, style, color=colors[name], marker="o", markersize=3, label=label)
            shown += means if name != "fresh" else []  # whose beginning would leave no room for the others
        axis.set(title=f"{target:.0%} of the decoder, {loss}", xlabel="million tokens", yscale="log")
        axis.set(ylabel=f"perplexity, {text}", ylim=(min(shown) * 0.98, max(shown) * 1.02))
        axis.yaxis.set(major_locator=MaxNLocator(7), minor_locator=NullLocator())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


# --------------------------------------------------------------------------------------- command line

DRY = {
    "build": "hidden_size=32,intermediate_size=64,num_attention_heads=4,num_key_value_heads=2,num_hidden_layers=2",
    "build_tokens": 8192, "points": [0, 2048, 4096], "save_every": 1024, "targets": [0.5], "losses": ["ce", "distill"],
    "seeds": [0], "windows": 2, "window_length": 32, "length": 32, "batch_size": 4, "samples": 8,
}  # fmt: skip


def json_or_word(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="folder of the dense model; default: the one that --build makes")
    p.add_argument("--build", help="sizes of a Llama to train as the dense model, name=value,...")
    p.add_argument("--build-tokens", type=float, default=3e6, help="tokens to train it on (default 3e6)")
    p.add_argument("--tokens", type=Path, required=True, help="folder that token_files.py has written")
    p.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    p.add_argument("--json", type=Path, help="write the rows here; an existing file is added to")
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    p.add_argument("--targets", nargs="+", type=float, default=[0.75, 0.5], help="shares of the decoder's parameters")
    p.add_argument("--losses", nargs="+", default=["ce"], choices=("ce", "distill"))
    p.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the order of blocks, and of fresh weights")
    p.add_argument("--points", nargs="+", type=float, default=[0, 5e6, 10e6, 25e6, 50e6], help="tokens to measure at")
    p.add_argument("--save-every", type=float, default=1e6, help="tokens between checkpoints (default 1e6)")
    p.add_argument("--minutes", type=float, default=1e9, help="stop at the first checkpoint after so long")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--length", type=int, default=512, help="tokens of a block (default 512)")
    p.add_argument("--learning-rate", type=float, default=3e-4)
    p.add_argument("--fresh-learning-rate", type=float, default=1e-3, help="of random weights (default 1e-3)")
    p.add_argument("--warmup", type=float, default=0.02, help="share of the steps (default 0.02)")
    p.add_argument("--types", nargs="+", default=["attention", "ffn", "hidden"], help="of the arms aware-*")
    p.add_argument("--oneshot-types", nargs="+", default=["ffn"], help="of oneshot-kfac and oneshot-obs")
    p.add_argument("--oneshot-rounds", type=int, default=1, help="rounds of the one-shot arms (default 1)")
    p.add_argument(
        "--oneshot-sizes", nargs="*", default=[], metavar="NAME=VALUE", help="sizes that the one-shot arms end with"
    )
    p.add_argument("--pruner-types", nargs="+", default=["attention", "ffn"], help="of oneshot-taylor and -magnitude")
    p.add_argument("--per-product", type=int, metavar="N", help="types compare by saliency a product at N tokens")
    p.add_argument("--saliency-decay", type=float, default=0.9)
    p.add_argument("--every", type=int, default=1, help="steps between prunings (default 1)")
    p.add_argument("--shrink-share", type=float, default=0.5, help="share of the steps in which the model shrinks")
    p.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of the arms aware-*, as JSON")
    p.add_argument(
        "--rates",
        default="cosine",
        choices=("cosine", "hold", "rewarm"),
        help="of learning: warm-up and cosine; held while the model shrinks, then cosine; or both once more from there",
    )
    p.add_argument("--samples", type=int, default=64, help="calibration blocks of the one-shot arms (default 64)")
    p.add_argument("--texts", nargs="+", default=["held_out"], help="token files to evaluate on")
    p.add_argument("--windows", type=int, default=40, help="evaluation windows of each text (default 40)")
    p.add_argument("--window-length", type=int, default=512)
    p.add_argument("--tasks", type=Path, help="folder of minimal pairs (BLiMP), measured at the last point")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--precision", default="32-true")
    p.add_argument("--picture", type=Path, help="draw the rows here, over the first text")
    p.add_argument("--keep", action="store_true", help="keep the checkpoints of arms that are done")
    p.add_argument("--dry-run", action="store_true", help="everything once, on a tiny model, in about a minute")
    args = p.parse_args()
    if args.dry_run:
        vars(args).update(DRY, model=None)
    if (args.model is None) == (args.build is None):
        p.error("give --model, or --build, and not both")
    for given in ("set", "oneshot_sizes"):
        pairs = (pair.split("=", 1) for pair in getattr(args, given))
        setattr(args, given, {name: json_or_word(value) for name, value in pairs})
    args.named = args.build or args.model.name
    args.trained = False  # every call goes on to the next point or save at least
    args.until = time.monotonic() + 60 * args.minutes
    args.plan = plan_of(args.points, args.save_every, args.batch_size * args.length)
    args.evaluations = {
        name: common.blocks(token_files.load(args.tokens / f"{name}.bin"), args.windows, args.window_length)
        .to(args.device)
        for name in args.texts
    }  # fmt: skip
    return args


def main() -> None:
    args = arguments()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if args.per_product:
        planning.Planner.weights_saving = lambda planner, *of: weights_per_product(args.per_product, planner, *of)
    rows = common.Rows(args.json, ("arm", "target", "loss", "seed", "tokens", "training", "pruning", "model"))
    left = []
    if args.build and not build(args.work / "dense", args):
        left = ["the dense model, and all arms"]
    else:
        dense = args.model or args.work / "dense"
        for seed in args.seeds:
            for loss in args.losses:
                for share in args.targets:
                    left += [
                        f"{name} {share} {loss} {seed}"
                        for name in args.arms
                        if not run(name, share, loss, seed, dense, rows, args)
                    ]
    for text in args.texts:
        print(tables(rows, text))
    for figure in list(FIGURES)[1:]:
        print(tables(rows, args.texts[0], figure))
    if args.picture:
        draw(rows, args.picture, args.texts[0])
    print(f"left: {', '.join(left)}; the same command goes on" if left else "all done", flush=True)


if __name__ == "__main__":
    main()
