"""What every benchmark script shares: model, text, perplexity, timing, memory and output.

Nothing here imports lightning_prune, so that the figures of the reference algorithms cannot depend on it.
A perplexity is `exp` of the mean next-token cross-entropy, computed by the plainest loop possible.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

# --------------------------------------------------------------------------------------- arguments


def parser(description: str | None, *, evaluation: bool = True) -> argparse.ArgumentParser:
    """Arguments that all scripts have; each script adds its own."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="model folder or name")
    p.add_argument("--gguf-file", help="file name inside the model folder, for GGUF weights")
    p.add_argument("--calibration", required=True, help="text file")
    p.add_argument("--evaluation", nargs="+", required=evaluation, default=[], help="text files")
    p.add_argument("--samples", type=int, default=32, help="calibration sequences (default 32)")
    p.add_argument("--length", type=int, default=512, help="tokens of a calibration sequence (default 512)")
    p.add_argument("--windows", type=int, default=40, help="evaluation windows of each text (default 40)")
    p.add_argument("--window-length", type=int, default=512, help="tokens of a window (default 512)")
    p.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    p.add_argument("--json", type=Path, help="write the rows here; an existing file is added to")
    return p


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a figure, as recorded beside it: names only, no folders."""
    return {
        "model": args.gguf_file or Path(args.model).name,
        "calibration": f"{Path(args.calibration).stem} {args.samples}x{args.length}",
        "windows": f"{args.windows}x{args.window_length}",
    }


# --------------------------------------------------------------------------------------- model and text


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Model in float32 and evaluation mode, and its tokenizer."""
    if args.threads:
        torch.set_num_threads(args.threads)
    options = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **options)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **options)
    return model.eval(), tokenizer


def tokenize(path: str | Path, tokenizer: Any) -> Tensor:
    """All tokens of a text file, shape (tokens,), without special tokens; `<unk>` is read as `unk`."""
    text = Path(path).read_text(encoding="utf-8").replace("<unk>", "unk")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def begin_of(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts before every text, if it does (Gemma, Llama)."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return list(whole[:1]) if plain and whole[1 : 1 + len(plain)] == plain else []


def blocks(tokens: Tensor, count: int, length: int, begin: Sequence[int] = ()) -> Tensor:
    """`count` non-overlapping blocks of `length` tokens, spread evenly over the text: (count, length).

    Each begins with `begin`, and holds so many tokens less of the text.
    """
    own = length - len(begin)
    available = tokens.numel() // own
    if available < count:
        raise SystemExit(f"the text has {available} blocks of {own} tokens, not {count}: ask for fewer")
    chosen = torch.arange(count) * available // count
    found = tokens[: available * own].view(available, own)[chosen]
    return torch.cat([found.new_tensor(list(begin)).expand(count, -1), found], 1)


def calibration_of(args: argparse.Namespace, tokenizer: Any) -> Tensor:
    return blocks(tokenize(args.calibration, tokenizer), args.samples, args.length, begin_of(tokenizer))


def evaluations_of(args: argparse.Namespace, tokenizer: Any) -> dict[str, Tensor]:
    """Evaluation windows by the stem of their file."""
    begin = begin_of(tokenizer)
    return {
        Path(path).stem: blocks(tokenize(path, tokenizer), args.windows, args.window_length, begin)
        for path in args.evaluation
    }


def batched(sequences: Tensor, batch_size: int = 1) -> list[dict[str, Tensor]]:
    """Batches as a causal language model takes them."""
    return [{"input_ids": part, "labels": part} for part in sequences.split(batch_size)]


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, at_once: int = 1) -> float:
    """`exp` of the mean negative log-likelihood of all predicted tokens; so many windows at a time."""
    model.eval()
    total, count = 0.0, 0
    for part in windows.split(at_once):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        total += nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
        count += len(logits)
    return math.exp(total / count)


def perplexities(model: nn.Module, evaluations: dict[str, Tensor], at_once: int = 1) -> dict[str, float]:
    return {name: perplexity(model, windows, at_once) for name, windows in evaluations.items()}


class Snapshot:
    """A copy of all parameters, to return to between two methods."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(self.values[name])
            p.grad = None


def sparsity_of(masks: dict[str, Tensor]) -> float:
    """Share of pruned weights over all masks (True = kept)."""
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def same_zeros(model: nn.Module, masks: dict[str, Tensor]) -> bool:
    """Whether every masked weight is exactly zero."""
    return not any(bool((model.get_parameter(name)[~mask] != 0).any()) for name, mask in masks.items())


# --------------------------------------------------------------------------------------- time and memory


def clock() -> float:
    """Seconds: of this process where it computes in one thread, since others may share the core; else of the wall."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


class Stopwatch:
    """Seconds by stage: `with watch("norms"): ...` adds to `watch.seconds["norms"]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = clock()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + clock() - start


def interleaved(
    functions: dict[str, Callable[[], Any]],
    repetitions: int,
    before: Callable[[], Any] | None = None,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every function, run in turns so that a drifting machine slows all alike.

    The order alternates from round to round. `before` runs untimed ahead of each call. A function that
    returns a float has measured itself: that number is taken instead of the `clock`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repetitions):
        order = list(functions) if turn % 2 == 0 else list(reversed(functions))
        for name in order:
            if before is not None:
                before()
            start = clock()
            own = functions[name]()
            elapsed = own if isinstance(own, float) else clock() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def compare(seconds: dict[str, list[float]], ours: str, other: str) -> dict[str, Any]:
    """Medians, and the median and range of the ratios `other / ours` taken within each round."""
    ratios = [b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]
    return {
        "ours_s": statistics.median(seconds[ours]),
        "other_s": statistics.median(seconds[other]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": len(ratios),
    }


def median_interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """95 % confidence interval of a median by the bootstrap; the same for the same values."""
    data = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(data), (resamples, len(data)), generator=torch.Generator().manual_seed(0))
    medians = data[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_overhead(pairs: Sequence[tuple[float, float]], name: str = "overhead") -> dict[str, Any]:
    """By how many percent the first of each pair exceeds the second: median over pairs, and its 95 % interval."""
    percents = [100 * (a - b) / b for a, b in pairs]
    low, high = median_interval(percents)
    return {f"{name}_percent": statistics.median(percents), f"{name}_95%": f"{low:+.2f} to {high:+.2f}"}


def rss() -> int:
    """Resident memory of this process now, in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: psutil knows the others, and the high-water mark is the last resort
        try:
            import psutil

            return int(psutil.Process().memory_info().rss)
        except ImportError:
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def settled() -> int:
    """Resident memory once what is free has gone back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return rss()


class PeakMemory:
    """Highest resident memory between entry and exit, sampled by a thread (`ru_maxrss` can't be reset)."""

    def __init__(self, interval: float = 0.01) -> None:
        self.interval = interval
        self.start = self.peak = 0

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = settled()  # else what was let go before is taken again, and counts as nothing
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, rss())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, rss())


# --------------------------------------------------------------------------------------- output


def environment() -> dict[str, Any]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


class Rows:
    """The rows of one run, merged into a JSON file as soon as each is known.

    Two rows are the same when all of `key` agree; the newer one replaces the older, so that a long benchmark
    can be run in pieces and a piece can be repeated.
    """

    def __init__(self, path: Path | None, key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text())["rows"]

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        return next((r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        identity = [row.get(k) for k in self.key]
        self.rows = [r for r in self.rows if [r.get(k) for k in self.key] != identity] + [row]
        print("done:", ", ".join(f"{k} {row[k]}" for k in self.key if k in row), file=sys.stderr, flush=True)
        if self.path is not None:
            text = json.dumps({"environment": environment(), "rows": self.rows}, indent=1)
            temporary = self.path.with_suffix(self.path.suffix + ".part")
            temporary.write_text(text + "\n")
            temporary.replace(self.path)


def number(value: Any) -> str:
    if isinstance(value, float):
        if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
            return f"{value:.3g}"
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return "" if value is None else str(value)


def markdown(rows: Iterable[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A Markdown table; the columns default to the keys of all rows in their order of appearance."""
    rows = list(rows)
    columns = list(columns or dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(number(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)
