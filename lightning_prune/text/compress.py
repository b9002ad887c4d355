"""Prune or shrink a language model from a file, a folder or the hub into a folder, and measure what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lightning_prune.checkpoints.cards import Making, besides_line, pruned_besides
from lightning_prune.checkpoints.export import check_apart, write_model
from lightning_prune.checkpoints.inspection import Inspection, report_tensor
from lightning_prune.checkpoints.model import context_of, device_of, load_model, quiet_transformers
from lightning_prune.checkpoints.sources import first_token
from lightning_prune.errors import check_bool, check_whole
from lightning_prune.evaluation.perplexity import evaluating, perplexity
from lightning_prune.perp.reconstruction import reconstruct
from lightning_prune.pruning.masks import Masks
from lightning_prune.pruning.patterns import parse_pattern
from lightning_prune.pruning.pipeline import prune
from lightning_prune.pruning.plan import make_plan
from lightning_prune.pruning.settings import PruningSettings, make_score
from lightning_prune.pruning.targets import DEFAULT_IGNORE
from lightning_prune.results import Table
from lightning_prune.safety import expanded
from lightning_prune.structure.folders import check_replaceable
from lightning_prune.structure.oneshot import check_structured, shrink_by_plan
from lightning_prune.structure.permutation import check_permutable, permute_channels
from lightning_prune.text.documents import check_local, check_parts, quiet_datasets, texts_of

_WINDOW = 512  # tokens, where the model takes as many
_PLENTY = 16  # times the text that is needed is read, to take samples from different parts of it
_HELD_OUT = 10  # one part in so many is kept for the perplexities
_WRITTEN = 24  # tokens that the models write
_FITTED = 2  # samples in one step of a fit


@dataclass(frozen=True)
class Recipe:
    """How `compress` prunes.

    Attributes:
        score: Of `lightning_prune.prune`, as `num_samples`, `update` and `sequential`.
        permute: Whether channels are put in another order before (`lightning_prune.structure.permute_channels`).
        fit: Whether the weights that stay are fitted then, half a block at a time (`lightning_prune.perp.reconstruct`).
    """

    score: str
    num_samples: int
    update: str | None = None
    sequential: bool = False
    permute: bool = False
    fit: bool = False

    def __str__(self) -> str:
        steps = ["channels in another order"] if self.permute else []
        steps.append(self.score if self.update is None else f"{self.score} with update {self.update}")
        steps += ["block by block"] if self.sequential else []
        steps += ["half-block fit"] if self.fit else []
        return f"{', '.join(steps)}, {self.num_samples} samples"

    def pruning(self) -> dict[str, Any]:
        """Arguments of `lightning_prune.prune`."""
        return {name: value for name, value in asdict(self).items() if name not in ("permute", "fit")}


# Best first, by the perplexities on the page of figures. What each costs on SmolLM2-135M (hidden size 576, CPU), in
# forward passes of one window of text, measured: for each sample, and once for the whole model.
_RECIPES: tuple[tuple[Recipe, float, float], ...] = (
    (Recipe("kfac", 32, "alps", True, permute=True, fit=True), 12.8, 305.0),
    (Recipe("kfac", 32, "alps", True, fit=True), 12.8, 140.0),
    (Recipe("kfac", 32, "alps", True), 3.2, 140.0),
    (Recipe("kfac", 32, "exact", True), 3.2, 15.0),
    (Recipe("kfac", 8, "exact", True), 3.2, 15.0),
    (Recipe("kfac", 32), 2.7, 3.5),
    (Recipe("kfac", 4), 2.7, 3.5),
    (Recipe("wanda", 32), 0.7, 1.0),
    (Recipe("wanda", 4), 0.7, 1.0),
)
_SWEEP = 2.7  # more for each sample where a walk needs kfac's gradients, which N:M does not
_WIDTH = 576


@dataclass(frozen=True)
class Compressed:
    """What `compress` and `shrink` did.

    Attributes:
        output: The folder that was written.
        perplexity_before: Of the dense model on held-out text.
        perplexity: Of the model that was written, on the same text.
        prompt: What both models went on from.
        written_before: What the dense model wrote.
        written: What the other one wrote.
        found: What is in the weights of the folder.
        settings: How it was made, in plain values.
        table: The figures, as they stand in the model card.
    """

    output: Path
    perplexity_before: float
    perplexity: float
    prompt: str
    written_before: str
    written: str
    found: Inspection
    settings: dict[str, Any]
    table: Table


@torch.inference_mode(False)  # a model loaded in that mode could not be changed
def compress(
    model: str | Path,
    output: str | Path,
    text: str | Sequence[str] = "austen",
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    score: str = "kfac",
    update: str | None = None,
    sequential: bool = False,
    permute: bool = False,
    fit: bool = False,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    num_samples: int = 16,
    minutes: float | None = None,
    text_name: str | None = None,
    text_split: str = "train",
    text_field: str = "text",
    seq_len: int | None = None,
    windows: int = 16,
    batch_size: int = 4,
    prompt: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    console: Console | None = None,
) -> Compressed:
    """Prune a language model into a transformers folder with exact zeros, a model card and `sparsity.json`.

    Perplexity before and after is that of text which calibration has not seen: one tenth of what is read. The folder
    is replaced only when all has succeeded; the model itself stays as it is. `lightning_prune.prune` does it to a model
    in memory.

    Args:
        model: Transformers folder, Lightning .ckpt, distributed checkpoint, .gguf file, or hub id.
        output: Folder to write.
        text: Text to calibrate on: "austen" (*Pride and Prejudice*, which comes with the package), local .txt, .jsonl,
            .json or .parquet files, a folder of them, or the name of a dataset on the hub.
        sparsity: Share of the weights to prune, default 0.5 or what an N:M pattern says.
        pattern: "unstructured", or "N:M" such as 2:4: N kept of every M consecutive inputs.
        score: "magnitude", "wanda", "gblm", "sparsegpt" or "kfac"; see `lightning_prune.prune`.
        update: "exact", "alps" or "obs": the remaining weights make up for the others, with each layer's Hessian.
        sequential: Block by block, each on the outputs of the pruned blocks before it.
        permute: Put channels in an order first in which N:M loses less; see
            `lightning_prune.structure.permute_channels`, which knows the families that it can do this to.
        fit: Fit the weights that stay to the dense model's outputs afterwards, half a block at a time; see
            `lightning_prune.perp.reconstruct`.
        targets: Names, name patterns or type names of the layers to prune, see `lightning_prune.prune`; default all.
        ignore: Of those to leave out, besides output layers; default these alone.
        num_samples: Calibration samples of `seq_len` tokens, spread over the text.
        minutes: In place of `score`, `update`, `sequential`, `permute`, `fit` and `num_samples`: take the best of a
            measured table that the command can do in about so many minutes on this device.
        text_name: Configuration of a hub dataset, such as wikitext-2-raw-v1.
        text_split: Split of a hub dataset.
        text_field: Field that holds the text.
        seq_len: Tokens of a sample and of a window. Default 512, or as many as the model takes.
        windows: Windows of held-out text for the perplexities, at most.
        batch_size: Samples in one pass.
        prompt: What both models go on from. Default the beginning of the held-out text.
        tokenizer: Hub id, folder, .gguf file or tokenizer.json; default the model's own.
        dtype: "float32", "bfloat16" or "float16"; default as stored.
        device: Such as "cuda"; default CUDA where there is one.
        overwrite: Replace `output` if it holds a model.
        progress: Show bars where stderr is a terminal.
        console: Where to report; default standard output.

    Raises:
        FileNotFoundError: a local path does not exist.
        ValueError: an argument or a combination that is not supported, a damaged file, too little text, or an `output`
            that is not to be replaced. An old `output` is as it was then, as after Ctrl-C.
        CalibrationError: calibration could not give finite statistics of every layer.

    Example::

        compress("HuggingFaceTB/SmolLM2-135M", "pruned", "train.txt", sparsity=0.5)
    """
    check_bool("permute", permute)
    check_bool("fit", fit)
    recipe = Recipe(score, num_samples, update, sequential, permute, fit)
    number = isinstance(minutes, (int, float)) and not isinstance(minutes, bool)
    replaced = "stands in place of score, update, sequential, permute, fit and num_samples"
    if minutes is not None and not (number and minutes > 0):
        raise ValueError(f"minutes={minutes!r}, which {replaced}, must be a number above 0")
    if minutes is not None and recipe != Recipe("kfac", 16):
        raise ValueError(f"minutes={minutes!r} {replaced}, which are given too ({recipe}); leave out minutes, or these")
    if permute and parse_pattern(pattern) is None:
        raise ValueError(
            f"permute=True: the order of channels matters for N:M only, not for pattern={pattern!r}; use one such as "
            "'2:4', or leave permute out"
        )
    # For its checks, before anything long begins.
    chosen: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern, "targets": targets, "ignore": ignore}
    asked = PruningSettings(make_score(score), **chosen, update=update, num_samples=num_samples, sequential=sequential)
    if (fit or minutes is not None) and (sparsity == 0 or score == "keep"):
        raise ValueError(
            f"fit={fit} and minutes={minutes} with sparsity={sparsity} and score={score!r}: nothing goes that what "
            "stays could make up for; use a sparsity above 0 and another score, or leave fit and minutes out"
        )
    job = _Job(model, output, text, console, overwrite, progress)
    check_parts(job.text, "text", text_name=text_name, text_split=text_split)
    job.open(
        tokenizer, dtype, device, seq_len, {"num_samples": num_samples, "windows": windows, "batch_size": batch_size}
    )
    if permute:
        check_permutable(job.model, pattern, targets=targets, ignore=ignore)
    make_plan(job.model, asked)  # for its checks too
    most = num_samples if minutes is None else max(known.num_samples for known, *_ in _RECIPES)
    job.read(text_name, text_split, text_field, most, windows, prompt)
    job.measure("dense")
    if minutes is not None:
        recipe = job.recipe_for(60 * minutes, pattern, targets, ignore)
        job.samples = _spread(job.samples, recipe.num_samples)
    recipe = replace(recipe, num_samples=len(job.samples))  # a short text has fewer
    job.say(f"Pruning by {recipe} of {job.seq_len} tokens")
    how = {**chosen, **recipe.pruning()}
    if recipe.permute:
        layers: dict[str, Any] = {"targets": targets, "ignore": ignore}
        count = len(job.samples)
        permute_channels(job.model, job.batches(batch_size), pattern, num_samples=count, progress=progress, **layers)
    dense = {name: p.detach().clone() for name, p in job.model.named_parameters()} if recipe.fit else {}
    masks = prune(job.model, job.batches(batch_size), **how, progress=progress)
    if recipe.fit:
        samples, count = job.batches(_FITTED), len(job.samples)
        reconstruct(job.model, samples, dense, masks, train="all", num_samples=count, progress=progress)
        del dense
    job.measure("pruned")
    settings = {**how, "permute": recipe.permute, "fit": recipe.fit}
    for name in ("targets", "ignore"):  # which may hold classes
        settings[name] = None if how[name] is None else [getattr(s, "__name__", s) for s in how[name]]
    if tuple(ignore) == DEFAULT_IGNORE:
        del settings["ignore"]
    return job.write(job.model, Making(recipe.score, [settings], len(masks)), settings, masks)


@torch.inference_mode(False)
def shrink(
    model: str | Path,
    output: str | Path,
    target: float | int | dict[str, Any] = 0.75,
    text: str | Sequence[str] = "austen",
    *,
    types: Sequence[str] = ("ffn",),
    saliency: str = "kfac",
    compensate: bool = True,
    round_to: int | None = None,
    rounds: int = 1,
    num_samples: int = 16,
    text_name: str | None = None,
    text_split: str = "train",
    text_field: str = "text",
    seq_len: int | None = None,
    windows: int = 16,
    batch_size: int = 4,
    prompt: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    console: Console | None = None,
) -> Compressed:
    """Shrink a language model in one shot into an ordinary, smaller transformers folder with a model card.

    Like `compress`, but whole heads, channels or layers go (see `lightning_prune.prune_structured`).

    Args:
        model: See `compress`.
        output: Folder to write.
        target: Share of the parameters to keep, embeddings included, or their number, or {"bytes": B} of them, or
            {"seconds_per_token": S, "batch": N} on the device.
        text: Text to calibrate on: "austen", local files or a folder of them, or the name of a dataset on the hub.
        types: Units that may go: attention, ffn, hidden (hidden channels), layer, expert.
        saliency: "kfac", "obs", "taylor1", "taylor2" or "magnitude", see `prune_structured`.
        compensate: Re-fit the layers that lose inputs.
        round_to: Multiple that hidden_size and intermediate_size are to end at if they shrink; see
            `lightning_prune.prune_structured` for the default.
        rounds: How often units are judged and removed, each time on the smaller model.
        num_samples: See `compress`.
        text_name: See `compress`.
        text_split: See `compress`.
        text_field: See `compress`.
        seq_len: See `compress`.
        windows: See `compress`.
        batch_size: See `compress`.
        prompt: See `compress`.
        tokenizer: See `compress`.
        dtype: See `compress`.
        device: See `compress`.
        overwrite: See `compress`.
        progress: See `compress`.
        console: See `compress`.

    Raises:
        FileNotFoundError: see `compress`.
        ValueError: see there; or an unknown architecture, or a target that cannot be reached.
        CalibrationError: see there.

    Example::

        shrink("HuggingFaceTB/SmolLM2-135M", "smaller", target=0.8)
    """
    job = _Job(model, output, text, console, overwrite, progress)
    check_parts(job.text, "text", text_name=text_name, text_split=text_split)
    job.open(
        tokenizer, dtype, device, seq_len, {"num_samples": num_samples, "windows": windows, "batch_size": batch_size}
    )
    settings: dict[str, Any] = {"saliency": saliency, "compensate": compensate, "round_to": round_to, "rounds": rounds}
    structure, planner = check_structured(job.model, target, types, **settings)
    job.read(text_name, text_split, text_field, num_samples, windows, prompt)
    job.measure("dense")
    wanted = f"{target:.0%}" if isinstance(target, float) else str(target)
    job.say(f"Shrinking to {wanted} on {len(job.samples)} samples of {job.seq_len} tokens")
    how = {name: settings[name] for name in ("saliency", "compensate", "rounds")}
    report = shrink_by_plan(
        structure, planner, job.batches(batch_size), **how, num_samples=len(job.samples), progress=progress
    )
    job.say(f"   {report}")
    job.measure("shrunk")
    before, now = report.sizes_before.as_dict(), report.sizes.as_dict()
    sizes = {"parameters": (report.parameters_before, report.parameters), **{n: (before[n], now[n]) for n in now}}
    described = {"target": target, "types": ", ".join(types), **settings, "num_samples": len(job.samples)}
    return job.write(job.model, Making(settings=[described], sizes=sizes), described)


class _Job:
    """One model on its way into a folder."""

    def __init__(
        self,
        model: str | Path,
        output: str | Path,
        text: str | Path | Sequence[str | Path],
        console: Console | None,
        overwrite: bool,
        progress: bool,
    ) -> None:
        self.source, self.output, self.overwrite, self.progress = str(model), str(output), overwrite, progress
        self.target = expanded(output, "output").resolve()
        check_apart(expanded(model, "model"), self.target)
        check_replaceable(self.target, overwrite)
        named = [str(text)] if isinstance(text, (str, Path)) else [str(entry) for entry in text]
        self.text = named[0] if len(named) == 1 else named
        check_local(self.text, "text")
        self.console = console or Console()
        self.measured: list[tuple[str, float, str]] = []
        self.started, self.loading, self.measuring = time.monotonic(), 0.0, 0.0

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def open(
        self, tokenizer: str | None, dtype: str | None, device: str | None, seq_len: int | None, counts: dict[str, int]
    ) -> None:
        """Load the model, and put it on the device."""
        for name, value in counts.items():
            check_whole(name, value)
        if seq_len is not None:
            check_whole("seq_len", seq_len, 2)
        place = device_of(device)
        self.say(f"Loading {self.source}")
        self.loaded = load_model(self.source, tokenizer, dtype, "model", self.progress)
        self.loading = time.monotonic() - self.started
        if self.loaded.tokenizer is None:
            raise ValueError(f"{self.source} has no tokenizer; give one (--tokenizer)")
        context = context_of(self.loaded)
        self.seq_len = min(_WINDOW, context or _WINDOW) if seq_len is None else seq_len
        if self.seq_len < 2 or (context is not None and self.seq_len > context):
            raise ValueError(f"seq_len={seq_len} must lie between 2 and the {context} tokens that the model takes")
        self.model: Any = self.loaded.model.to(place)
        self.tokenizer: Any = self.loaded.tokenizer
        begin = first_token(self.tokenizer)
        self.begin = [] if begin is None else [begin]

    def read(
        self,
        name: str | None,
        split: str,
        field: str,
        num_samples: int,
        windows: int,
        prompt: str | None,
    ) -> None:
        """Take samples to calibrate on, and windows that are held out, each spread over its part of the text."""
        enough = _PLENTY * (num_samples + windows) * self.seq_len
        ids: list[int] = []
        with quiet_datasets():
            for document in texts_of(self.text, name, split, field):
                # verbose=False: the stream is cut into windows, so it is not too long
                ids += self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
                ids.append(self.tokenizer.eos_token_id)
                if len(ids) >= enough:
                    break
        own = self.seq_len - len(self.begin)
        rows = torch.tensor(ids[: len(ids) // own * own]).view(-1, own)
        rows = torch.cat([torch.tensor(self.begin, dtype=rows.dtype).expand(len(rows), -1), rows], 1)  # [N, T]
        if len(rows) < 2:
            raise ValueError(
                f"text={self.text!r} has {len(ids)} tokens, fewer than two windows of seq_len={self.seq_len}: one to "
                "calibrate on, one for the perplexities. Give more text, or a smaller seq_len (--seq_len)"
            )
        held_out = max(1, len(rows) // _HELD_OUT)
        self.samples, self.windows = _spread(rows[:-held_out], num_samples), _spread(rows[-held_out:], windows)
        starts = self.windows[:, : min(16, self.seq_len // 2)]
        words = (self.tokenizer.decode(start, skip_special_tokens=True).split(maxsplit=1) for start in starts)
        # The first may begin inside a word.
        self.prompt = prompt or next((found[-1] for found in words if found), "")
        if not self.prompt:
            raise ValueError(f"no window of held-out text={self.text!r} begins with a word: give a prompt (--prompt)")

    def recipe_for(self, seconds: float, pattern: str, targets: Sequence[str] | None, ignore: Sequence[str]) -> Recipe:
        """The best recipe that fits into what is left of so many seconds since the job began.

        Raises:
            ValueError: none does.
        """
        window = self.measuring / len(self.windows)
        # The pruned model is measured too, and writing takes about as long as loading.
        left = seconds - (time.monotonic() - self.started) - self.measuring - self.loading
        width = getattr(self.model.config, "hidden_size", _WIDTH) / _WIDTH
        costs, nm = {}, pattern != "unstructured"
        for recipe, sample, once in _RECIPES:
            solves = recipe.update is not None  # in time that grows with the width
            if recipe.score == "kfac" and not solves and nm:
                continue  # its masks under N:M are Wanda's
            if recipe.permute and not (nm and self._permutable(pattern, targets, ignore)):
                continue
            sample += _SWEEP if solves and not nm else 0
            costs[recipe] = window * (recipe.num_samples * sample + once * (width if solves else 1))
        fitting = next((recipe for recipe, cost in costs.items() if cost <= left), None)
        if fitting is None:
            needed = (seconds - left + min(costs.values())) / 60
            raise ValueError(
                f"minutes={seconds / 60:g} are too few on this device; the quickest takes {needed:.2g}. Give as many, "
                "or leave minutes out and choose score='magnitude'"
            )
        self.say(f"Within {seconds / 60:g} minutes: {fitting} (about {costs[fitting] / 60:.1f} of them)")
        return fitting

    def _permutable(self, pattern: str, targets: Sequence[str] | None, ignore: Sequence[str]) -> bool:
        try:
            check_permutable(self.model, pattern, targets=targets, ignore=ignore)
        except ValueError:
            return False
        return True

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """The samples as batches of whole sequences, [B, T] each."""
        return [{"input_ids": rows} for rows in torch.split(self.samples, size)]

    def measure(self, name: str) -> None:
        """Measure perplexity, have the model write, and say both."""
        with quiet_transformers():
            begin = time.monotonic()
            found = perplexity(self.model, list(self.windows), batch_size=4, progress=self.progress).perplexity
            self.measuring = time.monotonic() - begin
            written = self._written()
        self.measured.append((name, found, written))
        self.say(f"{name}: perplexity {found:,.2f} on held-out text\n   {self.prompt!r} ...\n   {written!r}")

    def _written(self) -> str:
        ids = self.tokenizer(self.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = torch.cat([ids.new_tensor([self.begin]), ids[:, -max(1, self.seq_len - _WRITTEN - len(self.begin)) :]], 1)
        ids = ids.to(next(self.model.parameters()).device)  # [1, T]
        options = {"do_sample": False, "max_new_tokens": _WRITTEN, "pad_token_id": self.tokenizer.eos_token_id}
        with evaluating(self.model), torch.no_grad():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def write(self, model: Any, making: Making, settings: dict[str, Any], masks: Masks | None = None) -> Compressed:
        """Write the folder, and say how to go on."""
        (_, before, first), (_, after, second) = self.measured
        rows = [(n, f"{p:,.2f}") for n, p, _ in self.measured]
        note = (
            f"On {len(self.windows)} windows of {self.seq_len} tokens of held-out text, weighted by tokens; lower is "
            "better."
        )
        table = Table("Perplexity", ("", "perplexity"), rows, [note])
        model = model.cpu()
        masks = {} if masks is None else {n: mask.cpu() for n, mask in masks.items()}
        family = model.config.model_type
        reports = [report_tensor(n, p.detach(), masks.get(n), family) for n, p in model.named_parameters()]
        found = Inspection(str(self.target), "safetensors", 0, reports, len(masks) or None)
        if found.resurrected:
            raise RuntimeError(f"{found.resurrected} pruned weights are not zero")
        making = Making(making.score, making.settings, making.masks, making.sizes, self.source, [table])
        write_model(
            self.target,
            model,
            self.tokenizer,
            found,
            making,
            expanded(self.source, "model"),
            self.overwrite,
            self.progress,
        )
        total, besides = found.totals(), besides_line(pruned_besides(found, making))
        besides = f", besides {besides}" if besides else ""
        self.say(
            f"{total.zeros:,} of {total.numel:,} weights in {total.tensors} layers are exact zeros "
            f"({total.sparsity:.2%}){besides}; {found.totals(True).numel:,} parameters. Written: {self.output}"
        )
        return Compressed(self.target, before, after, self.prompt, first, second, found, settings, table)


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most so many rows, evenly spread."""
    count = min(count, len(rows))
    return rows[[math.floor(i * len(rows) / count) for i in range(count)]]
