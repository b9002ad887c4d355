"""Honest speed: a pruned model and the dense one on this device, in turns, with medians and their spread.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_prune.evaluate import versions
from lightning_prune.evaluation import evaluating
from lightning_prune.inspection import Inspection
from lightning_prune.latency_results import Benchmark, SpeedResult, Timing, remarks_on
from lightning_prune.loading import context_of, device_of, load_model
from lightning_prune.progress import progress_bar
from lightning_prune.semi_structured import sparse_copy, why_not_sparse

_PROMPT = 128  # tokens, where the models take as many


def benchmark(
    model: str | Path | PreTrainedModel,
    dense: str | Path | PreTrainedModel | None = None,
    *,
    batch_size: int = 1,
    prompt_tokens: int | None = None,
    new_tokens: int = 16,
    repeats: int = 10,
    warmup: int = 3,
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Benchmark:
    """Measure latency, throughput, memory and size of a pruned model beside the dense one.

    In every round each model runs once, so that what else the machine does meets all of them. On CUDA, weights that
    are all 2:4 are also measured as torch's semi-structured tensors.

    Args:
        model: The pruned model: a transformers folder, a Lightning ``.ckpt`` or distributed checkpoint of `CausalLM`, a
            ``.gguf`` file, a hub id, or a transformers model.
        dense: The dense model. Without it the pruned model is measured alone.
        batch_size: Sequences B.
        prompt_tokens: Tokens T of each prompt; random ones, as speed does not depend on which. Default 128, or what
            `new_tokens` leave of the models' context.
        new_tokens: Tokens to decode after it; their mean time is one measurement.
        repeats: Rounds that count, at least 2.
        warmup: Rounds before them that do not.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; default as stored.
        device: Such as ``"cuda"``; default CUDA where there is one.
        progress: Show bars where stderr is a terminal.

    Raises:
        FileNotFoundError: a local path does not exist.
        ValueError: an argument is out of range, the model cannot be loaded, or its context is too short.
    """
    settings: dict[str, Any]
    settings = {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    for name, value in settings.items():
        least = 2 if name == "repeats" else 1
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if warmup < 0:
        raise ValueError(f"warmup={warmup} must be 0 or above")
    place = device_of(device)
    sources = [("dense", dense), ("pruned", model)] if dense is not None else [("pruned", model)]
    loaded = [load_model(source, None, dtype, role, progress) for role, source in sources if source is not None]
    found = [one.inspection() for one in loaded]
    if prompt_tokens is None:
        room = [context - new_tokens for one in loaded if (context := context_of(one)) is not None]
        prompt_tokens = settings["prompt_tokens"] = max(1, min(_PROMPT, *room)) if room else _PROMPT
    for one in loaded:
        context = context_of(one)
        if context is not None and prompt_tokens + new_tokens > context:
            raise ValueError(
                f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} are more than the {context} tokens that "
                f"{one.source} takes"
            )
    entries = [
        _Entry(role, one.source, inspection, one.model.to(place), _file_bytes(source))
        for (role, source), one, inspection in zip(sources, loaded, found, strict=True)
    ]
    pruned = entries[-1]
    reason = why_not_sparse(found[-1], pruned.model, place)
    if reason is None:
        sparse = sparse_copy(copy.deepcopy(pruned.model), found[-1])
        entries.append(_Entry("pruned, 2:4 sparse", pruned.source, found[-1], sparse, None))
    vocabulary = min(entry.model.get_input_embeddings().weight.shape[0] for entry in entries)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator).to(place)  # [B, T]
    _measure(entries, prompt, new_tokens, repeats, warmup, progress)
    results = [entry.result(batch_size, prompt_tokens) for entry in entries]
    first = next(pruned.model.parameters())
    settings |= {"warmup": warmup, "dtype": str(first.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    remarks = remarks_on(found[-1], reason)
    return Benchmark(
        results, remarks, settings, _device_name(place), versions(("lightning-prune", "torch", "transformers"))
    )


class _Entry:
    """A model and its measurements."""

    def __init__(self, name: str, source: str, found: Inspection, model: Any, file_bytes: int | None) -> None:
        self.name, self.source, self.found, self.model, self.file_bytes = name, source, found, model, file_bytes
        # Logits of the last token alone, where the family knows how to: a prompt needs no others.
        takes = inspect.signature(model.forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.peak = 0

    def run(self, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
        """Seconds of the prefill, and of one decoded token."""
        with torch.no_grad():
            _synchronize(prompt.device)
            start = time.perf_counter()
            out = self.model(input_ids=prompt, use_cache=True, **self.options)
            _synchronize(prompt.device)
            middle = time.perf_counter()
            for _ in range(new_tokens):
                token = out.logits[:, -1:].argmax(-1)  # [B, 1]
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            _synchronize(prompt.device)
            return middle - start, (time.perf_counter() - middle) / new_tokens

    def result(self, batch: int, tokens: int) -> SpeedResult:
        prefill, decode = Timing.of(self.prefill), Timing.of(self.decode)
        return SpeedResult(
            name=self.name,
            source=self.source,
            sparsity=self.found.sparsity,
            prefill=prefill,
            decode=decode,
            prefill_tokens_per_second=batch * tokens / prefill.median,
            decode_tokens_per_second=batch / decode.median,
            weight_bytes=_weight_bytes(self.model),
            peak_bytes=self.peak,
            file_bytes=self.file_bytes,
        )


def _measure(
    entries: Sequence[_Entry], prompt: Tensor, new_tokens: int, repeats: int, warmup: int, progress: bool
) -> None:
    rounds = warmup + repeats + 1
    with progress_bar("Measuring", rounds * len(entries), enabled=progress) as advance:
        for round_ in range(rounds):
            # The other way round every second time: who comes second finds other caches and clocks.
            for entry in entries if round_ % 2 == 0 else reversed(entries):
                with evaluating(entry.model):
                    if round_ == rounds - 1:  # apart from the timed rounds, which sampling would disturb
                        with _peak_memory(prompt.device) as peak:
                            entry.run(prompt, new_tokens)
                        entry.peak = peak[0]
                    else:
                        prefill, decode = entry.run(prompt, new_tokens)
                        if round_ >= warmup:
                            entry.prefill.append(prefill)
                            entry.decode.append(decode)
                advance()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """One number, known after the block: bytes given out by the device's allocator at the most, beyond those before."""
    peak = [0]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    # The CPU's allocator keeps no maximum, but torch's profiler records what it gives out and takes back.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    peak[0] = max(accumulate(change for _, change in changes), default=0)


def _weight_bytes(model: nn.Module) -> int:
    total = 0
    for parameter in model.parameters():
        parts = [parameter]
        if hasattr(parameter, "__tensor_flatten__"):  # a sparse tensor: its values and where they belong
            parts = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def _file_bytes(source: Any) -> int | None:
    if isinstance(source, nn.Module) or not Path(str(source)).exists():
        return None
    path = Path(str(source))
    files = (
        [path] if path.is_file() else [f for kind in ("*.safetensors", "*.bin", "*.distcp") for f in path.glob(kind)]
    )
    return sum(file.stat().st_size for file in files)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"
