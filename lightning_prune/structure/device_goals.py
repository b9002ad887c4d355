"""Targets that a device sets: bytes of memory, and seconds that a token may take by a small measured table."""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import check_whole
from lightning_prune.naming import DTYPES
from lightning_prune.pruning.running import model_device, quiet_model
from lightning_prune.sharding import refuse_shards
from lightning_prune.structure.sizes import SIZE_NAMES, Sizes
from lightning_prune.structure.units import Structure

_REPEATS = 15


def names_sizes(goal: Any) -> bool:
    """Return whether a goal names the final sizes of a model."""
    return isinstance(goal, Mapping) and not _is_bytes(goal) and not is_latency(goal)


def _is_bytes(goal: Any) -> bool:
    return isinstance(goal, Mapping) and "bytes" in goal


def is_latency(goal: Any) -> bool:
    """Return whether a goal is a time."""
    return isinstance(goal, Mapping) and ("seconds_per_token" in goal or "batch" in goal)


def check_device_goal(goal: Any) -> None:
    """Refuse a mapping that names nothing known, and a goal of bytes or seconds that no model could have.

    Raises:
        ValueError: a field that is not known or missing, or a value out of range.
    """
    if _is_bytes(goal):
        if unknown := set(goal) - {"bytes", "dtype"}:
            raise ValueError(f"target has {sorted(map(str, unknown))} beside 'bytes'; only 'dtype' can be there")
        check_whole("target['bytes']", goal["bytes"])
        if goal.get("dtype", "float32") not in DTYPES:
            raise ValueError(f"target['dtype']={goal['dtype']!r} must be one of {', '.join(DTYPES)}")
    elif is_latency(goal):
        if set(goal) - {"batch"} != {"seconds_per_token"}:
            raise ValueError(
                f"target has {sorted(map(str, goal))}; a time is {{'seconds_per_token': 0.01, 'batch': 1}}"
            )
        seconds, batch = goal["seconds_per_token"], goal.get("batch", 1)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise ValueError(f"target['seconds_per_token']={seconds!r} must be a number above 0")
        check_whole("target['batch']", batch)
    elif isinstance(goal, Mapping):
        strange = sorted(str(name) for name in goal if name not in SIZE_NAMES)
        if strange or not goal:
            raise ValueError(
                f"target={dict(goal)!r} {f'has {strange}' if strange else 'names nothing'}; it takes final sizes "
                f"({', '.join(SIZE_NAMES)}), or {{'bytes': 100_000_000}}, or {{'seconds_per_token': 0.01, 'batch': 1}}"
            )


def parameters_in(goal: Any, structure: Structure, first: Sizes) -> Any:
    """Return the number of parameters that fit into the bytes of a goal; any other goal as it is.

    Args:
        goal: ``{"bytes": B}``, of the parameters alone, tied ones once; ``"dtype"`` where they are to be kept in
            another one than the model's.
        structure: Of the model.
        first: Sizes before anything went.

    Raises:
        ValueError: parameters of several dtypes and no ``"dtype"``; more bytes than the model has.
    """
    if not _is_bytes(goal):
        return goal
    dtypes = {p.dtype for p in structure.parameters().values()}
    if "dtype" in goal:
        dtypes = {DTYPES[goal["dtype"]]}
    if len(dtypes) != 1:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise ValueError(
            f"target={goal!r}: the parameters are of {names}; say which with 'dtype', or give their number"
        )
    width = dtypes.pop().itemsize
    now = structure.shapes().count(first)
    if goal["bytes"] > now * width:
        raise ValueError(
            f"target={goal!r}: the {now:,} parameters take {now * width:,} bytes, which is no more; give fewer"
        )
    if goal["bytes"] < 2 * width:
        raise ValueError(
            f"target={goal!r}: each of the {now:,} parameters takes {width} bytes, so no model is left; give more of "
            f"the {now * width:,} bytes that they take"
        )
    return goal["bytes"] // width


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of products of one token of each sequence with matrices of some sizes, as measured on a device.

    Between two sizes seconds are interpolated, above the last they grow in proportion; fewer weights never cost more.

    Attributes:
        weights: Of the matrices, ascending.
        seconds: Of a product with each.
        rest: Seconds of a layer for all that is not such a product.
    """

    weights: tuple[float, ...]
    seconds: tuple[float, ...]
    rest: float = 0.0

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.weights, self.weights[1:], strict=False))
        rising = all(a <= b for a, b in zip(self.seconds, self.seconds[1:], strict=False))
        if not self.weights or len(self.weights) != len(self.seconds) or not ascending or not rising:
            raise ValueError(f"a table of latencies has ascending weights and seconds, not {self}")

    def product(self, weights: float) -> float:
        """Return the seconds of a product with a matrix of so many weights."""
        i = bisect_left(self.weights, weights)
        if i == 0:
            return self.seconds[0]
        if i == len(self.weights):
            return self.seconds[-1] * weights / self.weights[-1]
        share = (weights - self.weights[i - 1]) / (self.weights[i] - self.weights[i - 1])
        return self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """The table of `to_dict`."""
        return cls(tuple(values["weights"]), tuple(values["seconds"]), float(values["rest"]))


@dataclass(frozen=True)
class Latency:
    """Seconds that a model of any sizes takes for the next token of every sequence of a batch.

    Attributes:
        table: As measured.
        inside: Axes of the matrices of a layer.
        head: Axes of the one that makes logits.
    """

    table: LatencyTable
    inside: tuple[tuple[str | int, ...], ...]
    head: tuple[str | int, ...]

    def seconds(self, sizes: Sizes) -> float:
        """Return the seconds of a step."""

        def product(axes: tuple[str | int, ...]) -> float:
            return self.table.product(math.prod(a if isinstance(a, int) else sizes.axis(a) for a in axes))

        return sizes.num_hidden_layers * (self.table.rest + sum(map(product, self.inside))) + product(self.head)


def latency_of(structure: Structure, goal: Mapping[str, Any], table: LatencyTable | None = None) -> Latency:
    """Say what sizes cost on the device of a model.

    Args:
        structure: Of the model, whose weights are on the device to use and in the dtype to use.
        goal: With the batch.
        table: Default: a measured one.

    Raises:
        ValueError: the parameters are shards, or have no data; a mixture of experts.
    """
    parameters = structure.parameters()
    whole = (
        f"target={dict(goal)!r} is measured on whole weights of one device; give bytes, a number of parameters or "
        "sizes where they are sharded"
    )
    refuse_shards(structure.model, whole)
    if any(p.is_meta for p in parameters.values()):
        raise ValueError(whole)
    if structure.sizes.num_experts:
        raise ValueError(
            f"target={dict(goal)!r} is not predicted for a mixture of experts, whose batches go to experts as the text "
            "wants it; give bytes, a number of parameters or sizes"
        )
    head: Any = structure.model.get_output_embeddings()  # type: ignore[operator]
    shape = structure.axes_of(next(n for n, p in parameters.items() if p is head.weight))
    layer = structure.in_layer(0)
    inside = tuple(structure.axes_of(name) for name in layer if parameters[name].dim() == 2)
    without = Latency(LatencyTable((1,), (0.0,)), inside, shape)
    return Latency(table or _measured(structure, goal.get("batch", 1), without), inside, shape)


def _measured(structure: Structure, batch: int, shapes: Latency) -> LatencyTable:
    """Time products with matrices of halving sizes, and a step of the whole model for what they leave."""
    sizes, parameters = structure.sizes, structure.parameters()
    matrices = [p for p in parameters.values() if p.dim() == 2]
    largest, smallest = max(p.numel() for p in matrices), min(p.numel() for p in matrices) / 8
    device, dtype, width = model_device(structure.model), matrices[0].dtype, sizes.hidden_size
    counts = [c for i in range(40) if (c := largest >> i) >= max(smallest, width)]
    pool = torch.ones(largest // width, width, device=device, dtype=dtype)
    tokens = torch.ones(batch, width, device=device, dtype=dtype)
    found: dict[int, float] = {}
    with torch.no_grad(), quiet_model(structure.model, freeze=False):
        for count in sorted({c // width * width for c in counts}):
            rows, turn = count // width, 0

            def product(rows: int = rows) -> Tensor:
                nonlocal turn  # other weights each time, so that none are in a cache that the whole model would not fit
                turn = (turn + rows) % max(1, len(pool) - rows + 1)
                return nn.functional.linear(tokens, pool[turn : turn + rows])

            found[count] = max([_median(product, device), *found.values()])
        ids = torch.ones(batch, 1, dtype=torch.long, device=device)
        model: Any = structure.model
        whole = _median(lambda: model(input_ids=ids, use_cache=False), device)
    products = Latency(LatencyTable(tuple(found), tuple(found.values())), shapes.inside, shapes.head).seconds(sizes)
    scale = min(1.0, whole / products)  # what is timed alone may be slower
    seconds = tuple(scale * s for s in found.values())
    return LatencyTable(tuple(found), seconds, max(0.0, whole - products) / sizes.num_hidden_layers)


def _median(function: Any, device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    function(), function()
    times = []
    for _ in range(_REPEATS):
        start = now()
        function()
        times.append(now() - start)
    return statistics.median(times)


def default_multiples(structure: Structure, goal: Any, device: torch.device) -> dict[str, int]:
    """Return the multiples that sizes are kept at by default: what matrix kernels like on a GPU, 1 elsewhere.

    On a GPU 64, or for small models the power of two nearest below an eighth of the size. A goal that names sizes is
    taken at its word.
    """
    if device.type != "cuda" or names_sizes(goal):
        return {}
    sizes = {"hidden_size": structure.sizes.hidden_size, "intermediate_size": structure.sizes.intermediate_size}
    return {name: min(64, 2 ** max(0, (size // 8).bit_length() - 1)) for name, size in sizes.items()}
