"""The combined weight and its gradients, against float64 sums written without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.perp.effective import (
    Combine,
    Elementwise,
    effective_linear,
    effective_weight,
    kept_by_sign,
    masked_growth,
    masked_product,
    masked_sum,
)
from lightning_prune.pruning import clearing
from lightning_prune.pruning.clearing import to_bytes, zero_pruned_

COMBINATIONS = [masked_sum, masked_product, masked_growth]


def reference(combine: Combine, weight: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> Tensor:
    product = left @ right
    return {
        masked_sum: weight + mask * product,
        masked_product: weight * product,
        masked_growth: weight * (1 + product),
    }[combine]


def make(shape: tuple[int, int], transposed: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    inputs, outputs = shape if transposed else shape[::-1]
    mask = torch.rand(shape) > 0.5
    return {
        "x": torch.randn(3, 5, inputs).to(dtype),
        "weight": (torch.randn(shape) * mask).to(dtype),
        "mask": mask,
        "left": torch.randn(shape[0], 4),
        "right": torch.randn(4, shape[1]),
        "bias": torch.randn(outputs).to(dtype),
    }


# The last is larger than the piece in which masks are widened.
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (300, 701)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_outputs_and_gradients_are_those_of_float64(
    combine: Combine, transposed: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clearing, "_CPU_PIECE", 1 << 17)
    made = make(shape, transposed)
    names = ("x", "weight", "left", "right", "bias")
    ours = {n: made[n].clone().requires_grad_() for n in names}
    exact = {n: made[n].double().requires_grad_() for n in names}
    kept = to_bytes(made["mask"], torch.device("cpu"))
    y = effective_linear(
        ours["x"], ours["weight"], kept, ours["left"], ours["right"], ours["bias"], combine, transposed
    )
    w = reference(combine, exact["weight"], made["mask"], exact["left"], exact["right"])
    z = F.linear(exact["x"], w.t() if transposed else w, exact["bias"])
    torch.testing.assert_close(y.double(), z, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(y.shape, dtype=torch.float64)
    y.backward(upstream.float())
    z.backward(upstream)
    # W * (L R) with W = 0 still has a gradient for W; the mask keeps pruned weights from it.
    expected = {n: exact[n].grad for n in names}
    if combine is not masked_sum:
        expected["weight"] = expected["weight"] * made["mask"]
    for name in names:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(ours[name].grad.double(), expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


# With a derivative of NaN where a weight is zero.
ROOTS = Elementwise(lambda weight, product: weight * (1.0 + weight.abs().sqrt() * product))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("combine", [*COMBINATIONS, ROOTS], ids=["sum", "product", "growth", "function"])
def test_gradients_can_be_differentiated(combine: Combine, transposed: bool) -> None:
    made = {n: t.double() if t.is_floating_point() else t for n, t in make((6, 9), transposed).items()}
    kept = to_bytes(made["mask"], torch.device("cpu"))
    x, left, right, bias = (made[n].requires_grad_() for n in ("x", "left", "right", "bias"))
    linear = lambda x, left, right, bias: effective_linear(  # noqa: E731
        x, made["weight"], kept, left, right, bias, combine, transposed
    )
    assert torch.autograd.gradgradcheck(linear, (x[0, :2].detach().requires_grad_(), left, right, bias))
    weight = lambda left, right: effective_weight(made["weight"], kept, left, right, combine)  # noqa: E731
    assert torch.autograd.gradgradcheck(weight, (left, right))

    # And they are those that nobody differentiates.
    y = linear(x, left, right, bias)
    upstream = torch.randn_like(y)
    inputs = (x, left, right, bias)
    plain = torch.autograd.grad(y, inputs, upstream, retain_graph=True)
    followed = torch.autograd.grad(y, inputs, upstream, create_graph=True)
    for found, expected in zip(followed, plain, strict=True):
        torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "change", [lambda y: y.div_(2), lambda y: y.permute(2, 0, 1)[1].mul_(3), F.relu_], ids=range(3)
)
def test_what_follows_may_change_the_output_in_place(change: Any, transposed: bool, biased: bool) -> None:
    made = make((6, 9), transposed)
    kept = to_bytes(made["mask"], torch.device("cpu"))
    found = []
    for in_place in (True, False):
        x, left = made["x"].clone().requires_grad_(), made["left"].clone().requires_grad_()
        bias = made["bias"] if biased else None
        y = effective_linear(x, made["weight"], kept, left, made["right"], bias, masked_sum, transposed)
        y = y if in_place else y.clone()
        change(y)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, left.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_weight_may_carry_its_mask_in_its_zeros(combine: Combine, transposed: bool, dtype: torch.dtype) -> None:
    made = make((30, 70), transposed, dtype)
    kept = to_bytes(made["mask"], torch.device("cpu"))
    weight = made["weight"].masked_fill(made["weight"] == 0, 0.0)  # a product with a mask leaves some as -0.0
    weight[:, ::3] = 0.0  # kept ones among them
    signed = torch.where(made["mask"] & (weight == 0), -0.0, weight)
    assert torch.equal(kept_by_sign(signed), kept)
    results = []
    for w, mask in ((weight, kept), (signed, None)):
        leaves = {n: made[n].clone().requires_grad_() for n in ("x", "left", "right")}
        y = effective_linear(leaves["x"], w, mask, leaves["left"], leaves["right"], None, combine, transposed)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves.values())])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_gradients_are_the_numeric_ones(combine: Combine, transposed: bool) -> None:
    made = make((4, 6), transposed, torch.float64)
    kept = to_bytes(made["mask"], torch.device("cpu"))
    inputs = [made[n].double().requires_grad_() for n in ("x", "left", "right", "bias")]

    def function(x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        return effective_linear(x, made["weight"], kept, left, right, bias, combine, transposed)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_layer_is_the_merged_one_to_the_bit(combine: Combine, dtype: torch.dtype) -> None:
    made = make((300, 701), False, dtype)
    kept = to_bytes(made["mask"], torch.device("cpu"))
    merged = combine(made["weight"], kept, made["left"], made["right"], None)
    assert merged.dtype == dtype
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert not merged.view(bits)[~made["mask"]].any()
    y = effective_linear(made["x"], made["weight"], kept, made["left"], made["right"], made["bias"], combine)
    assert torch.equal(y, F.linear(made["x"], merged, made["bias"]))
    exact = reference(combine, *(made[n].double() for n in ("weight", "mask", "left", "right")))
    torch.testing.assert_close(merged.double(), exact.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_autocast_is_that_of_the_merged_layer(combine: Combine) -> None:
    made = make((48, 32), False)
    kept = to_bytes(made["mask"], torch.device("cpu"))
    left, right = made["left"].requires_grad_(), made["right"].requires_grad_()
    x = made["x"].requires_grad_()
    merged = combine(made["weight"], kept, left.detach(), right.detach(), None)
    with torch.autocast("cpu", torch.bfloat16):
        y = effective_linear(x, made["weight"], kept, left, right, made["bias"], combine)
        expected = F.linear(x, merged, made["bias"])
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)
        y.sum().backward()  # under autocast too: nothing may be cast twice
    w = reference(combine, made["weight"].double(), made["mask"], left.double(), right.double())
    da, db = torch.autograd.grad(F.linear(x.double(), w, None).sum(), (left, right))
    for got, exact in ((left.grad, da), (right.grad, db)):
        assert got is not None
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact.float(), rtol=0.05, atol=0.05 * float(exact.abs().max()))


def test_nothing_of_the_weights_size_is_made_to_be_kept() -> None:
    made = make((40, 30), False)
    kept = to_bytes(made["mask"], torch.device("cpu"))
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        effective_linear(
            made["x"], made["weight"], kept, made["left"].requires_grad_(), made["right"], None, masked_sum
        )
    own = {t.data_ptr() for t in (*made.values(), kept)}
    assert saved
    assert all(t.data_ptr() in own for t in saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zeroing_gives_positive_zero_whatever_was_there(dtype: torch.dtype) -> None:
    tensor = torch.tensor([-1.0, float("inf"), float("nan"), -0.0, 2.0], dtype=dtype)
    mask = torch.tensor([0, 0, 0, 0, -1], dtype=torch.int8)
    assert zero_pruned_(tensor, mask).tolist() == [0, 0, 0, 0, 2]
    assert not torch.signbit(tensor).any()
