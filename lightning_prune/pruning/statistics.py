"""Sum up statistics of layers over calibration samples.

Dimensions: B samples, T rows (tokens or positions) of a sample, I inputs, O outputs of a layer. X is an input
``[B, T, I]``, delta the gradient of a sample's loss with respect to the output, ``[B, T, O]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.precision import full_precision

INPUT_NORM = "input_norm"
OUTPUT_GRAD_NORM = "output_grad_norm"
GRADIENT_L1 = "gradient_l1"
GRADIENT_L2 = "gradient_l2"
HESSIAN = "hessian"

FORWARD_STATISTICS = frozenset({INPUT_NORM, HESSIAN})
GRADIENTS = frozenset({GRADIENT_L1, GRADIENT_L2})
BACKWARD_STATISTICS = GRADIENTS | {OUTPUT_GRAD_NORM}
ALL_STATISTICS = FORWARD_STATISTICS | BACKWARD_STATISTICS


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer over all calibration samples; those not asked for are None.

    Of batches whose loss cannot be taken apart, each counts as its B samples in n, and gives one G and one delta: that
    of the batch's loss.

    Attributes:
        samples: Number of samples n.
        input_norm: ``[I]``, ``sqrt(1/n * sum over samples and tokens of x^2)`` (Wanda, arXiv 2306.11695, sec. 3).
            Of a grouped convolution ``[O, I]``: in each row those of the inputs that the row meets.
        output_grad_norm: ``[O]``, the same of delta.
        gradient_l1: ``[O, I]``, ``sum over samples of abs(G)`` (GBLM, arXiv 2311.04902, sec. 3). Of a sharded
            weight, this rank's part of the matrix.
        gradient_l2: ``[O, I]``, ``sqrt(sum over samples of G^2)``; the same.
        hessian: ``[I, I]``, ``X^T X`` over all tokens, divided by n. Where `Ranks.spreads` it, some rows of it,
            until a layer is scored and solved.
        whole: Whether that has been gathered.
    """

    samples: int
    input_norm: Tensor | None = None
    output_grad_norm: Tensor | None = None
    gradient_l1: Tensor | None = None
    gradient_l2: Tensor | None = None
    hessian: Tensor | None = None
    whole: bool = False

    def part(self, bounds: tuple[tuple[int, int], tuple[int, int]]) -> LayerStatistics:
        """Those of some rows and columns: norms are cut; gradients are taken to be of that part already."""
        (row, row_end), (column, column_end) = bounds
        norms = self.input_norm
        if norms is not None:
            norms = norms[row:row_end, column:column_end] if norms.dim() > 1 else norms[column:column_end]
        return replace(
            self,
            input_norm=norms,
            output_grad_norm=None if self.output_grad_norm is None else self.output_grad_norm[row:row_end],
        )

    def with_gradients(self, change: Callable[[Tensor], Tensor]) -> LayerStatistics:
        """Those with their gradient aggregates changed."""
        l1, l2 = self.gradient_l1, self.gradient_l2
        return replace(
            self,
            gradient_l1=None if l1 is None else change(l1),
            gradient_l2=None if l2 is None else change(l2),
        )

    def get(self, name: str) -> Tensor:
        """A statistic that was collected; KeyError with its name if it was not."""
        value = getattr(self, name)
        if value is None:
            raise KeyError(f"statistic {name!r} was not collected")
        assert isinstance(value, Tensor)
        return value


def _vector_dtype(device: torch.device) -> torch.dtype:
    # Sums over millions of tokens: float64 where the device has it. The vectors are small.
    return torch.float32 if device.type == "mps" else torch.float64


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed in: float64 stays, all others become float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _squares(rows: Tensor, keep: Tensor | None) -> Tensor:
    """Sum of squares over samples and tokens, ``[B, T, C]`` to ``[C]``; `keep` is ``[B, T]`` or None."""
    flat = rows.reshape(-1, rows.shape[-1])
    flat = flat.to(wide_dtype(flat.dtype))
    if keep is not None:
        flat = flat[keep.reshape(-1)]
    return flat.square().sum(0).to(_vector_dtype(rows.device))


@dataclass
class Accumulator:
    """Streaming sums of one layer, for the statistics asked for.

    Args:
        statistics: Names out of `ALL_STATISTICS`.
        shape: ``(O, I)``.
        gradient_dtype: dtype of the gradient aggregate. bfloat16 halves its memory but stops growing after some
            256 samples of equal size.
        gradient_device: Where the gradient aggregate lives; default beside the layer.
        dtype: Of products and results: that of `wide_dtype` for the weight.

    Attributes:
        samples: Number of samples.
        sums: What batches have added up to.
        staged: Vectors that the last batch adds, which `settle` does. Matrices are too large to be held twice.
        unsettled: Whether it has added to a matrix already.
    """

    statistics: frozenset[str]
    shape: tuple[int, int]
    gradient_dtype: torch.dtype = torch.float32
    gradient_device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    samples: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    staged: dict[str, Tensor] = field(default_factory=dict)
    unsettled: bool = False

    @full_precision()
    def input_increments(self, x: Tensor, keep: Tensor | None, products: bool = True) -> dict[str, Tensor]:
        """What inputs ``[B, T, I]`` of B samples add to the sums; `keep` ``[B, T]`` marks real tokens.

        Of a grouped convolution x has the inputs of all groups, and what it adds to norms too. Without `products`
        nothing of the Hessian's.
        """
        increments: dict[str, Tensor] = {}
        if INPUT_NORM in self.statistics:
            increments[INPUT_NORM] = _squares(x, keep)
        if products and HESSIAN in self.statistics:
            flat = x.reshape(-1, x.shape[-1])
            flat = flat if keep is None else flat[keep.reshape(-1)]
            increments[HESSIAN] = self.products(flat)
        return increments

    @full_precision()
    def products(self, rows: Tensor) -> Tensor:
        """``X^T X`` of rows ``[n, I]``."""
        rows = rows.to(self.dtype)
        return rows.t() @ rows

    def add(self, increments: Mapping[str, Tensor]) -> None:
        """Add to the sums; the increments stay the caller's."""
        for name, value in increments.items():
            if name != HESSIAN:
                self.staged[name] = self.staged[name] + value if name in self.staged else value
                continue
            self.unsettled = True
            self._add_to_sum(name, value)

    def _add_to_sum(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone()

    def settle(self) -> None:
        """Let what the last batch has added stand."""
        for name, value in self.staged.items():
            self._add_to_sum(name, value)
        self.staged, self.unsettled = {}, False

    def undo(self, only: bool) -> bool:
        """Take back what the last batch has added; `only` says that no other has added anything.

        Returns:
            Whether that can be done.
        """
        if self.unsettled and not only:
            return False
        if self.unsettled:
            for total in self.sums.values():
                total.zero_()
        self.staged, self.unsettled = {}, False
        return True

    def add_output_gradient(self, delta: Tensor, scale: float) -> None:
        """Take in `scale` times the output gradients, ``[B, T, O]``."""
        if OUTPUT_GRAD_NORM in self.statistics:
            self.add({OUTPUT_GRAD_NORM: _squares(delta, None).div_(scale * scale)})

    def add_gradient(self, gradient: Tensor, scale: float) -> None:
        """Take in `scale` times the weight gradient of one sample, ``[O, I]``; it may be overwritten."""
        self.unsettled = True
        for name in self.statistics & GRADIENTS:
            aggregate = self.sums.get(name)
            if aggregate is None:
                device = self.gradient_device or gradient.device
                aggregate = torch.zeros(self.shape, dtype=self.gradient_dtype, device=device)
                self.sums[name] = aggregate
            term = gradient.to(device=aggregate.device)
            if scale != 1.0:
                term = term.float() / scale
            if name == GRADIENT_L2:
                aggregate.addcmul_(term.to(aggregate.dtype), term.to(aggregate.dtype))
            else:
                aggregate.add_(term.abs())

    def add_aggregate(self, name: str, part: Tensor) -> None:
        """Add to a gradient aggregate what several samples sum up to already."""
        aggregate = self.sums.get(name)
        if aggregate is None:
            device = self.gradient_device or part.device
            aggregate = self.sums[name] = torch.zeros(self.shape, dtype=self.gradient_dtype, device=device)
        aggregate.add_(part.to(aggregate.device, aggregate.dtype))

    def fill(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        """A sum to which this rank's samples had nothing to add; `shape` ``(O, I)`` is that of its other sums."""
        sizes = {INPUT_NORM: shape[1:], OUTPUT_GRAD_NORM: shape[:1], HESSIAN: (shape[1], shape[1])}
        if name in GRADIENTS:
            device, dtype = self.gradient_device or device, self.gradient_dtype
        else:
            dtype = self.dtype if name == HESSIAN else _vector_dtype(device)
        self.sums[name] = torch.zeros(sizes.get(name, self.shape), dtype=dtype, device=device)

    def result(self, samples: int) -> LayerStatistics:
        """The statistics over `samples` samples. Consumes the aggregates."""
        values: dict[str, Any] = {}
        for name in self.statistics:
            total = self.sums[name]
            if name in (INPUT_NORM, OUTPUT_GRAD_NORM):
                values[name] = (total / samples).sqrt().to(self.dtype)
            elif name == GRADIENT_L2:
                values[name] = total.sqrt_()
            elif name == HESSIAN:
                values[name] = total / samples
            else:
                values[name] = total
        return LayerStatistics(samples=samples, **values)


def check_finite(results: Mapping[str, LayerStatistics]) -> None:
    """Refuse statistics with NaN or infinity; the host waits once for all of them.

    Args:
        results: By weight.

    Raises:
        CalibrationError: naming the weight and the statistic.
    """
    found = [
        (n, s, value)
        for n, r in results.items()
        for s in sorted(ALL_STATISTICS)
        if (value := getattr(r, s)) is not None
    ]
    # A sum is finite only if every term is; it reads the tensor once and allocates nothing.
    bad_sums = values_of(~torch.isfinite(value.sum(dtype=torch.float32)) for *_, value in found)
    for (name, statistic, value), bad in zip(found, bad_sums, strict=True):
        if bad and not bool(torch.isfinite(value).all()):
            raise CalibrationError(
                f"calibration gave NaN or infinity in {statistic!r} of {name!r}; the weights are unchanged. "
                "Check the data and the model's precision (bfloat16 or float32 instead of float16)"
            )


def values_of(scalars: Iterable[Tensor]) -> list[Any]:
    """The values of scalar tensors, for all of which the host waits once."""
    here = list(scalars)
    return torch.stack([scalar.to(here[0].device) for scalar in here]).tolist() if here else []
