"""What `benchmark` measured: plain values for JSON, a table, and sentences that say what the figures mean."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_prune.inspection import Inspection
from lightning_prune.tables import Table

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

        Example:
            >>> Timing.of([3.0, 1.0, 2.0, 9.0, 2.0])
            Timing(median=2.0, low=2.0, high=3.0, repeats=5)
        """
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True)
class SpeedResult:
    """What was measured of one model.

    Attributes:
        name: ``"dense"``, ``"pruned"`` or ``"pruned, 2:4 sparse"``.
        source: Where it was loaded from.
        sparsity: Share of zeros among the weights that can be pruned.
        prefill: Time of one forward pass over a prompt of B x T tokens.
        decode: Time of one new token for each sequence, with the cache of keys and values of that prompt.
        prefill_tokens_per_second: B x T over the median.
        decode_tokens_per_second: B over the median.
        weight_bytes: Memory of the weights as they lie on the device, tied ones once.
        peak_bytes: Most memory that the allocator of the device gave out during one prefill and decode, beyond what
            was in use before: activations and the cache of keys and values.
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
    peak_bytes: int
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
        rows = [(label, *map(cell, self.models)) for label, cell in _ROWS]
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


def remarks_on(found: Inspection, reason: str | None) -> list[str]:
    """What the figures mean.

    Args:
        found: What is in the weights of the pruned model.
        reason: Why sparse products were not measured, or None if they were.
    """
    if found.sparsity == 0:
        return ["The model has no zeros in layers that can be pruned."]
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
