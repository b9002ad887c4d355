"""Combine a pruned weight and its adapter into the one matrix that the layer multiplies with.

PERP (Zimmer et al. 2023, arXiv 2312.15230, section 3.2) trains, beside a frozen pruned weight W with mask M, a
product of two thin matrices:

- MaskLoRA ``W + M * (L R)``, and at its merge LoRA-Prune too: `masked_sum`;
- ScaleLoRA ``W * (L R)``: `masked_product`;
- HiRA ``W + W * (L R)`` (Huang et al. 2025, ICLR): `masked_growth`;
- any other function of W and L R, element by element: `Elementwise`.

All are zero where M is, at every step, so what was trained is what is merged. The layer multiplies its inputs with
that one matrix: passing them through W and through the masked product one after the other would cost a second dense
product forward and two backward.

Letters: T rows (tokens), I inputs, O outputs, r rank. A parameter is stored ``[O, I]`` (nn.Linear) with
``L = s B [O, r]`` and ``R = A [r, I]``, or transposed (transformers' Conv1D, ``[I, O]``) with ``L = s A^T [I, r]`` and
``R = B^T [r, O]``. Everything but the final product is the same for both, so it is written once, for ``[P, Q]``.
Of experts that are one parameter ``[E, P, Q]`` each slice has an L and an R, ``[E, P, r]`` and ``[E, r, Q]``. A
convolution's kernel ``[O, I / groups, ...]`` counts as the matrix of its rows ``[O, Q]``, and L R takes its shape. All
but `effective_linear` takes these too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.pruning.clearing import bits_of, zero_pruned_

# (weight [P, Q], mask [P, Q] int8, left [P, r], right [r, Q], memory to work in) -> [P, Q] in the weight's dtype
Combine = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def kept_by_sign(weight: Tensor) -> Tensor:
    """The mask that a weight carries in its zeros: -0.0 is kept, +0.0 is pruned.

    A gathered weight brings its mask along so, where no rank holds the whole mask.

    Args:
        weight: Of any shape, floating point.

    Returns:
        int8 of the same shape, see `zero_pruned_`.
    """
    return (weight.view(bits_of(weight)) != 0).to(torch.int8).neg_()


def combined_dtype(weight: Tensor, left: Tensor) -> torch.dtype:
    """What weight and adapter are combined in: float32 at least.

    In bfloat16 the low bits of W + L R would be those of the rounded product.
    """
    return torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)


def thin_product(weight: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``L R``, of the weight's shape, in `combined_dtype`."""
    dtype = combined_dtype(weight, left)
    return torch.matmul(left.to(dtype), right.to(dtype), out=out).view(weight.shape)


def masked_sum(weight: Tensor, mask: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``W + M * (L R)``: MaskLoRA, and LoRA-Prune once merged.

    Args:
        weight: ``[P, Q]``, zero where pruned.
        mask: ``[P, Q]`` int8, see `zero_pruned_`.
        left: ``[P, r]``.
        right: ``[r, Q]``.
        out: ``[P, Q]`` of `combined_dtype` to work in; what is returned may be this.

    Returns:
        ``[P, Q]`` in the weight's dtype, summed in `combined_dtype`; +0.0 where pruned.
    """
    return zero_pruned_(thin_product(weight, left, right, out), mask).add_(weight).to(weight.dtype)


def masked_product(weight: Tensor, mask: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``W * (L R)``: ScaleLoRA. Arguments and result as `masked_sum`."""
    # 0 * -1 is -0.0, so zeros are not left to the product alone.
    return zero_pruned_(thin_product(weight, left, right, out).mul_(weight), mask).to(weight.dtype)


def masked_growth(weight: Tensor, mask: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``W + W * (L R)``: HiRA. Arguments and result as `masked_sum`."""
    return zero_pruned_(thin_product(weight, left, right, out).mul_(weight).add_(weight), mask).to(weight.dtype)


@dataclass(frozen=True)
class Elementwise:
    """A combination given as a function of each weight and its number in the product alone; zero where pruned.

    Slower than those above, which work in place and have their gradients written out.

    Attributes:
        function: (W ``[P, Q]``, L R ``[P, Q]``) to ``[P, Q]``, of `combined_dtype` all three; differentiable by both.
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, weight: Tensor, mask: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """Arguments and result as `masked_sum`."""
        product = thin_product(weight, left, right, out)
        combined = self.function(weight.to(product.dtype), product)
        # Whatever the function makes of a pruned weight, even NaN, goes.
        return zero_pruned_(combined.contiguous(), mask).to(weight.dtype)

    def gradients(self, gradient: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of L R and of W from that of the combined weight, all ``[P, Q]``, in `combined_dtype`."""
        with torch.enable_grad():
            product = thin_product(weight, left, right).detach().requires_grad_()
            wide = weight.detach().to(product.dtype).requires_grad_()
            combined = self.function(wide, product)
        d_product, d_weight = torch.autograd.grad(
            combined, (product, wide), gradient.to(combined.dtype), materialize_grads=True
        )
        return d_product, d_weight


def effective_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    combine: Combine,
    transposed: bool = False,
) -> Tensor:
    """A linear layer on the combined weight, with gradients of all tensors but the mask.

    Nothing of the weight's size is kept for the backward pass: it is combined again there, at about r / T of the
    layer's cost. What remains above plain LoRA is one dense product, the gradient of the combined weight
    ``dY^T X [O, I]``, which the mask has to meet before it shrinks to r: masked entries cannot be left out of it
    without a sampled product, which at these sparsities is slower than the dense one.

    Under autocast the weight is combined in its own precision and rounded once, as a merged weight would be.

    Args:
        x: ``[..., I]``.
        weight: ``[O, I]``, or ``[I, O]`` if `transposed`.
        mask: Of the weight's shape, int8; see `zero_pruned_`. None: that of `kept_by_sign`, made anew whenever it is
            needed, so that it is not held from the forward to the backward pass.
        left: ``[P, r]``, scaling included.
        right: ``[r, Q]``.
        bias: ``[O]`` or None.
        combine: `masked_sum`, `masked_product`, `masked_growth` or an `Elementwise`.
        transposed: The weight is that of a Conv1D.

    Returns:
        ``[..., O]``, bit-identical to the layer with the combined weight in the place of its own.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
        bias = None if bias is None else bias.to(x.dtype)
        with torch.autocast(device, enabled=False):
            return _apply(x, weight, mask, left, right, bias, combine, transposed, x.dtype)
    return _apply(x, weight, mask, left, right, bias, combine, transposed, weight.dtype)


def effective_weight(weight: Tensor, mask: Tensor | None, left: Tensor, right: Tensor, combine: Combine) -> Tensor:
    """The combined weight itself, with gradients of weight, left and right; arguments as of `effective_linear`."""
    y: Tensor = _EffectiveWeight.apply(weight, mask, left, right, combine)  # type: ignore[no-untyped-call]
    return y


class _EffectiveWeight(torch.autograd.Function):
    """See `effective_weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor | None, left: Tensor, right: Tensor, combine: Combine) -> Tensor:
        ctx.save_for_backward(weight, mask, left, right)
        ctx.combine = combine
        with torch.autocast(weight.device.type, enabled=False):
            return combine(weight, kept_by_sign(weight) if mask is None else mask, left, right, None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask, left, right = ctx.saved_tensors
        mask = kept_by_sign(weight) if mask is None else mask
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        with torch.autocast(weight.device.type, enabled=False):
            if torch.is_grad_enabled():
                combined, needs = followed(ctx.combine, weight, mask, left, right), ctx.needs_input_grad
                d_weight, d_left, d_right = _followed_gradients(
                    combined, gradient, (weight, left, right), (needs[0], needs[2], needs[3])
                )
                return d_weight, None, d_left, d_right, None
            found = _thin_gradients(ctx.combine, gradient, weight, mask, left, right, ctx.needs_input_grad[0])
        return found[0], None, found[1], found[2], None


def _apply(*arguments: Any) -> Tensor:
    y: Tensor = _EffectiveLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


class _EffectiveLinear(torch.autograd.Function):
    """See `effective_linear`; `dtype` is what the combined weight is rounded to for the product with the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        combine: Combine,
        transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask, left, right)
        ctx.combine, ctx.transposed, ctx.dtype = combine, transposed, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        mask = kept_by_sign(weight) if mask is None else mask
        effective = _combined(combine, weight, mask, left, right).to(dtype)
        if transposed:
            flat = x.reshape(-1, x.shape[-1])
            y = flat @ effective if bias is None else torch.addmm(bias, flat, effective)
            y = y.view(*x.shape[:-1], effective.shape[1])
        else:
            y = F.linear(x, effective, bias)
        return y.unsafe_chunk(1)[0]  # the same memory, but no view: autograd lets nobody change such in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, left, right = ctx.saved_tensors
        needs_x, needs_weight, _, needs_left, needs_right, needs_bias, *_ = ctx.needs_input_grad
        d_x = d_weight = d_left = d_right = d_bias = None
        mask = kept_by_sign(weight) if mask is None else mask
        # The caller may run the backward under autocast; the dtypes here are decided already.
        with torch.autocast(x.device.type, enabled=False):
            (d_y,) = gradients
            if torch.is_grad_enabled():
                effective = followed(ctx.combine, weight, mask, left, right).to(ctx.dtype)
                y = F.linear(x, effective.t() if ctx.transposed else effective)
                d_x, d_weight, d_left, d_right = _followed_gradients(
                    y, d_y, (x, weight, left, right), (needs_x, needs_weight, needs_left, needs_right)
                )
                d_bias = d_y.reshape(-1, d_y.shape[-1]).sum(0).to(ctx.bias_dtype) if needs_bias else None
                return d_x, d_weight, None, d_left, d_right, d_bias, None, None, None
            flat_x, flat_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])  # [T, I], [T, O]
            if needs_x:
                effective = _combined(ctx.combine, weight, mask, left, right).to(ctx.dtype)
                d_x = (flat_y @ (effective.t() if ctx.transposed else effective)).view(x.shape)
                del effective  # as large as the gradient that comes next, and in the same memory
            if needs_left or needs_right or needs_weight:
                rows, columns = (flat_x, flat_y) if ctx.transposed else (flat_y, flat_x)
                out = scratch(weight.shape, rows.dtype, rows.device)
                gradient = torch.mm(rows.t(), columns, out=out)  # [P, Q]
                d_weight, d_left, d_right = _thin_gradients(
                    ctx.combine, gradient, weight, mask, left, right, needs_weight
                )
            if needs_bias:
                d_bias = flat_y.sum(0, dtype=torch.promote_types(flat_y.dtype, torch.float32)).to(ctx.bias_dtype)
        return d_x, d_weight, None, d_left, d_right, d_bias, None, None, None


def _combined(combine: Combine, weight: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The combined weight for use at once: its memory is used again."""
    return combine(weight, mask, left, right, scratch(weight.shape, combined_dtype(weight, left), weight.device))


def followed(combine: Combine, weight: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """What `combine` gives, in steps that autograd follows: for gradients that are differentiated in turn.

    Losses of forces, of gradient penalties and of learning to learn do so. Arguments as of `masked_sum`.
    """
    kept, product = mask != 0, thin_product(weight, left, right)
    wide, zero = weight.to(product.dtype), product.new_zeros(())
    if combine is masked_sum:
        return (wide + torch.where(kept, product, zero)).to(weight.dtype)
    # Twice, before and after: what a function makes of a pruned weight may be NaN, and so may its derivative.
    wide, product = torch.where(kept, wide, zero), torch.where(kept, product, zero)
    if isinstance(combine, Elementwise):
        combined = combine.function(wide, product)
    else:
        combined = wide * (product if combine is masked_product else 1.0 + product)
    return torch.where(kept, combined, zero).to(weight.dtype)


def _followed_gradients(
    y: Tensor, gradient: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]
) -> Iterator[Tensor | None]:
    """Gradients of inputs that can be differentiated; None of those that are not needed."""
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True, materialize_grads=True))
    return iter([next(found) if needs else None for needs in needed])


def _thin_gradients(
    combine: Combine, gradient: Tensor, weight: Tensor, mask: Tensor, left: Tensor, right: Tensor, needs_weight: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of W, L and R from that of the combined weight, ``[P, Q]``, which is overwritten."""
    d_weight = None
    if isinstance(combine, Elementwise):
        gradient, wide = combine.gradients(zero_pruned_(gradient, mask), weight, left, right)
        gradient = gradient.contiguous()
        d_weight = zero_pruned_(wide.contiguous(), mask).to(weight.dtype) if needs_weight else None
    elif needs_weight:
        d_weight = gradient.to(weight.dtype, copy=True)
        if combine in (masked_product, masked_growth):
            factor = thin_product(weight, left, right)
            d_weight = zero_pruned_(d_weight.mul_(factor.add_(1.0) if combine is masked_growth else factor), mask)
    if combine in (masked_product, masked_growth):
        gradient = gradient.mul_(weight.to(gradient.dtype))
    gradient = zero_pruned_(gradient, mask).view(*left.shape[:-1], right.shape[-1])
    # Thin products with the large matrix in its own dtype: widening it would cost more than they do.
    d_left = gradient @ right.mT.to(gradient.dtype)
    d_right = left.mT.to(gradient.dtype) @ gradient
    return d_weight, d_left.to(left.dtype), d_right.to(right.dtype)


_of_thread = threading.local()


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """An uninitialized tensor, valid until the next call from this thread with this dtype; None: use a new one.

    As much memory is held per dtype as the largest request needed.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return None
    held: dict[torch.dtype, Tensor] = _of_thread.__dict__.setdefault("held", {})
    size = shape.numel()
    if dtype not in held or held[dtype].numel() < size:
        held.pop(dtype, None)
        held[dtype] = torch.empty(size, dtype=dtype, device=device)
    return held[dtype][:size].view(shape)
