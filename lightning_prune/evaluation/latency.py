"""Measure speed, memory and size of a dense and a pruned model in turns."""

from __future__ import annotations

import copy
import inspect
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_prune.checkpoints.inspection import Inspection
from lightning_prune.checkpoints.model import context_of, device_of, load_model
from lightning_prune.errors import check_whole
from lightning_prune.evaluation.perplexity import evaluating
from lightning_prune.history import versions
from lightning_prune.progress import progress_bar
from lightning_prune.results import Table
from lightning_prune.safety import expanded

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
    csr: bool = False,
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
        csr: Measure the pruned model also with products that leave zeros out, at any places: torch's compressed sparse
            rows. They need a CPU with MKL and float32, and are faster where few weights are left (10 % and less).
        progress: Show bars where stderr is a terminal.

    Raises:
        FileNotFoundError: a local path does not exist.
        ValueError: an argument is out of range, the model cannot be loaded, its context is too short, or it has no
            cache of keys and values.
    """
    settings: dict[str, Any]
    settings = {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    for name, value in settings.items():
        if name != "prompt_tokens" or value is not None:
            check_whole(name, value, least=2 if name == "repeats" else 1)
    check_whole("warmup", warmup, least=0)
    place = device_of(device)
    sources = [("dense", dense), ("pruned", model)] if dense is not None else [("pruned", model)]
    arguments = {"dense": "dense", "pruned": "model"}
    loaded = [load_model(s, None, dtype, arguments[role], progress) for role, s in sources if s is not None]
    found = [one.inspection() for one in loaded]
    if csr:
        _check_csr(loaded[-1].model, place)
    if prompt_tokens is None:
        room = [context - new_tokens for one in loaded if (context := context_of(one)) is not None]
        prompt_tokens = settings["prompt_tokens"] = max(1, min(_PROMPT, *room)) if room else _PROMPT
    for one in loaded:
        context = context_of(one)
        if context is not None and prompt_tokens + new_tokens > context:
            raise ValueError(
                f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} are more than the {context} tokens that "
                f"{one.source} takes; give fewer (--prompt_tokens, --new_tokens)"
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
    if csr:
        rows = csr_copy(copy.deepcopy(pruned.model), found[-1])
        entries.append(_Entry("pruned, CSR", pruned.source, found[-1], rows, None))
    vocabulary = min(entry.model.get_input_embeddings().weight.shape[0] for entry in entries)
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, prompt_tokens)
    prompt = torch.randint(vocabulary, size, generator=generator, device="cpu").to(place)  # [B, T]
    _measure(entries, prompt, new_tokens, repeats, warmup, progress)
    results = [entry.result(batch_size, prompt_tokens) for entry in entries]
    first = next(pruned.model.parameters())
    settings |= {"warmup": warmup, "dtype": str(first.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    remarks = remarks_on(found[-1], reason, csr)
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
        # Before transformers 5.24 it is named past_key_values; to ask for a name that is not there is deprecated.
        self.cache = "past_key_values" if "past_key_values" in takes else "cache"
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.peak: int | None = None

    def run(self, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
        """Seconds of the prefill, and of one decoded token; on CUDA notes the peak of memory beside them."""
        with torch.no_grad(), self._peak(prompt.device):
            _synchronize(prompt.device)
            start = time.perf_counter()
            out = self.model(input_ids=prompt, use_cache=True, **self.options)
            _synchronize(prompt.device)
            middle = time.perf_counter()
            for _ in range(new_tokens):
                if (past := getattr(out, self.cache, None)) is None:
                    raise ValueError(
                        f"{self.source} ({type(self.model).__name__}) returns no past_key_values (cache), with which "
                        "tokens could be decoded one by one: the speed of such models is not measured"
                    )
                token = out.logits[:, -1:].argmax(-1)  # [B, 1]
                out = self.model(input_ids=token, use_cache=True, **{self.cache: past})
            _synchronize(prompt.device)
            return middle - start, (time.perf_counter() - middle) / new_tokens

    @contextmanager
    def _peak(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":  # the CPU's allocator keeps no maximum
            yield
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        self.peak = torch.cuda.max_memory_allocated(device) - before

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
    rounds = warmup + repeats
    with progress_bar("Measuring", rounds * len(entries), enabled=progress) as advance:
        for round_ in range(rounds):
            # The other way round every second time: who comes second finds other caches and clocks.
            for entry in entries if round_ % 2 == 0 else reversed(entries):
                with evaluating(entry.model):
                    prefill, decode = entry.run(prompt, new_tokens)
                    if round_ >= warmup:
                        entry.prefill.append(prefill)
                        entry.decode.append(decode)
                advance()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _weight_bytes(model: nn.Module) -> int:
    total = 0
    for parameter in model.parameters():
        parts: list[Tensor] = [parameter]
        if hasattr(parameter, "__tensor_flatten__"):  # a sparse tensor: its values and where they belong
            parts = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
        elif parameter.layout == torch.sparse_csr:
            parts = [parameter.values(), parameter.col_indices(), parameter.crow_indices()]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def _file_bytes(source: Any) -> int | None:
    if isinstance(source, nn.Module) or not (path := expanded(source, "model")).exists():
        return None
    files = (
        [path] if path.is_file() else [f for kind in ("*.safetensors", "*.bin", "*.distcp") for f in path.glob(kind)]
    )
    return sum(file.stat().st_size for file in files)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


KIND = "lightning-prune benchmark"
"""Says in a JSON file what it is."""


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing, in seconds.

    Attributes:
        median: Of all repeats.
        low: First quartile.
        high: Third quartile.
        repeats: Number of them.
    """

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Median and quartiles of at least two measurements.

        Examples:
            >>> Timing.of([3.0, 1.0, 2.0, 9.0, 2.0])
            Timing(median=2.0, low=2.0, high=3.0, repeats=5)
        """
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True)
class SpeedResult:
    """What was measured of one model.

    Attributes:
        name: ``"dense"``, ``"pruned"``, ``"pruned, 2:4 sparse"`` or ``"pruned, CSR"``.
        source: Where it was loaded from.
        sparsity: Share of zeros among the weights that can be pruned.
        prefill: Time of one forward pass over a prompt of B x T tokens.
        decode: Time of one new token for each sequence, with the cache of keys and values of that prompt.
        prefill_tokens_per_second: B x T over the median.
        decode_tokens_per_second: B over the median.
        weight_bytes: Memory of the weights as they lie on the device, tied ones once.
        peak_bytes: On CUDA, most memory that the allocator gave out during the last prefill and decode, beyond what was
            in use before: activations and the cache of keys and values. None elsewhere.
        file_bytes: Size of the weight files, or None where there are none.
    """

    name: str
    source: str
    sparsity: float
    prefill: Timing
    decode: Timing
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    peak_bytes: int | None
    file_bytes: int | None


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` returns.

    Attributes:
        models: The dense one first, if there is one.
        remarks: Sentences on what the figures mean, and why sparse products were not measured if they were not.
        settings: Batch size, tokens and repeats.
        device: Name of the device.
        versions: Of Python and packages.
    """

    models: list[SpeedResult]
    remarks: list[str]
    settings: dict[str, Any]
    device: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": KIND, **asdict(self)}

    def tables(self) -> list[Table]:
        """The figures for people."""
        rows = [(label, *cells) for label, cell in _ROWS if any(cells := [cell(m) for m in self.models])]
        if len(self.models) > 1:
            for label, part in (("prefill", "prefill"), ("decode", "decode")):
                base = getattr(self.models[0], part).median
                ratios = (f"{getattr(m, part).median / base:.2f}" for m in self.models)
                rows.append((f"{label} time / {self.models[0].name}", *ratios))
        names = (f"{m.name}, {m.sparsity:.1%} zeros" for m in self.models)
        s = self.settings
        note = (
            f"{self.device}, {s['threads']} threads; {s['dtype']}; batch {s['batch_size']} x {s['prompt_tokens']} "
            f"tokens, {s['new_tokens']} new tokens; medians of {s['repeats']} rounds that measure the models in turns, "
            "with quartiles in brackets."
        )
        return [Table("Speed", ("", *names), rows, [note, *self.remarks])]


def _milliseconds(timing: Timing) -> str:
    return f"{1e3 * timing.median:.2f} ms ({1e3 * timing.low:.2f} to {1e3 * timing.high:.2f})"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"


_ROWS: tuple[tuple[str, Callable[[SpeedResult], str]], ...] = (
    ("prefill", lambda m: _milliseconds(m.prefill)),
    ("prefill, tokens/s", lambda m: f"{m.prefill_tokens_per_second:,.1f}"),
    ("decode, one token", lambda m: _milliseconds(m.decode)),
    ("decode, tokens/s", lambda m: f"{m.decode_tokens_per_second:,.1f}"),
    ("weights in memory", lambda m: _mebibytes(m.weight_bytes)),
    ("peak memory above the start", lambda m: _mebibytes(m.peak_bytes)),
    ("files", lambda m: _mebibytes(m.file_bytes)),
)


def remarks_on(found: Inspection, reason: str | None, csr: bool = False) -> list[str]:
    """What the figures mean.

    Args:
        found: What is in the weights of the pruned model.
        reason: Why sparse products were not measured, or None if they were.
        csr: Whether compressed sparse rows were measured.
    """
    if found.sparsity == 0:
        return ["The model has no zeros in layers that can be pruned."]
    if csr:
        return [
            "Dense products multiply zeros like other numbers. CSR leaves them out, and reads an index of 4 bytes with "
            "every weight that is left: a difference between dense and pruned is noise, one to CSR is none."
        ]
    if found.pattern not in ("2:4", "1:4"):
        return [
            "Its zeros follow no pattern that hardware knows: matrix products multiply them like other numbers, and "
            "files store them. Unstructured sparsity gains nothing in speed, memory or size here; differences between "
            "the columns are noise."
        ]
    if reason is not None:
        return [
            reason,
            "Dense products multiply zeros like other numbers: without sparse products 2:4 gains nothing in speed, "
            "memory or size, and differences between the columns are noise.",
        ]
    return []


_MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}
"""The (outputs, inputs) of a weight must be multiples of these, by dtype: the rules of torch's kernels."""


def why_not_sparse(found: Inspection, model: nn.Module, device: torch.device) -> str | None:
    """Why 2:4 products cannot be used here; None if they can."""
    if found.pattern not in ("2:4", "1:4"):
        return "Sparse products need 2:4 in every layer that can be pruned."
    if device.type != "cuda":
        return f"Sparse 2:4 products need CUDA, and were not measured on {device.type}."
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "Sparse 2:4 products need compute capability 8.0 (Ampere) or above, and were not measured."
    dtypes = {module.weight.dtype for module in _layers(model, found).values()}
    if not dtypes <= _MULTIPLES.keys():
        return (
            f"Sparse 2:4 products need float16 or bfloat16; the weights are {sorted(map(str, dtypes))}: give a dtype."
        )
    unfit = [
        name
        for name, module in _layers(model, found).items()
        if any(
            size % multiple for size, multiple in zip(module.weight.shape, _MULTIPLES[module.weight.dtype], strict=True)
        )
    ]
    return f"Sparse 2:4 products do not take the shape of {unfit[0]}, and were not measured." if unfit else None


def sparse_copy(model: Any, found: Inspection) -> Any:
    """Replace the 2:4 weights of a model with semi-structured tensors, in place; for inference alone.

    Args:
        model: On a CUDA device, for which `why_not_sparse` found no reason.
        found: What is in its weights.
    """
    for module in _layers(model, found).values():
        sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(sparse, requires_grad=False)
    return model


def _check_csr(model: nn.Module, device: torch.device) -> None:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if device.type != "cpu" or dtypes != {"float32"} or not mkl:
        raise ValueError(
            f"csr=True measures torch's products of MKL, which need a CPU and float32: device={device.type!r}, weights "
            f"in {', '.join(sorted(dtypes))}, MKL {'found' if mkl else 'missing'}; pass "
            "device='cpu' and dtype='float32', or leave csr out"
        )


class CSRLinear(nn.Module):
    """A linear layer that multiplies by the weights alone that are not zero; for inference.

    Args:
        layer: The layer with zeros.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():  # torch calls the format a beta
            warnings.simplefilter("ignore", UserWarning)
            rows = layer.weight.detach().to_sparse_csr()
            # Indices of 4 bytes in place of 8: a third less to read.
            crow, columns = rows.crow_indices().int(), rows.col_indices().int()
            rows = torch.sparse_csr_tensor(crow, columns, rows.values(), rows.shape)
        self.weight = nn.Parameter(rows, requires_grad=False)  # [O, I]
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` of inputs ``[..., I]``."""
        columns = x.reshape(-1, x.shape[-1]).t().contiguous()  # [I, N]
        y = (self.weight @ columns).t().reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def csr_copy(model: Any, found: Inspection) -> Any:
    """Replace the layers of a model that can be pruned with `CSRLinear`, in place."""
    for name, layer in _layers(model, found).items():
        model.set_submodule(name, CSRLinear(layer))
    return model


def _layers(model: nn.Module, found: Inspection) -> dict[str, nn.Linear]:
    """The linear layers that can be pruned, by name."""
    names = {report.name.removesuffix(".weight") for report in found.selected()}
    return {name: m for name, m in model.named_modules() if name in names and isinstance(m, nn.Linear)}
