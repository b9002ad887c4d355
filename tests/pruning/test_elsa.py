"""ELSA's sparse copies and dual variables against the formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.pruning.elsa import ADMM, ELSA

STEPS, EVERY, PENALTY, KEPT = 20, 4, 0.3, 12


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, x, y = (torch.randn(shape, generator=generator).double() for shape in ((5, 6), (40, 6), (40, 5)))
    return nn.Parameter(weight.to(dtype)), x.to(dtype), y.to(dtype)


def loss_of(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x @ weight.t() - y).square().mean()


def largest(scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True)[:KEPT]] = True
    return mask.view(scores.shape)


def naive() -> tuple[Tensor, Tensor]:
    """z, u and x as three tensors of float64, and Adam's moments written out."""
    weight, x, y = problem()
    w = weight.detach().clone()
    m, v, z, u = torch.zeros_like(w), torch.zeros_like(w), None, torch.zeros_like(w)
    for step in range(1, STEPS + 1):
        leaf = w.clone().requires_grad_()
        loss_of(leaf, x, y).backward()
        g = leaf.grad if z is None else leaf.grad + PENALTY * (w - z + u)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.02 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        if step % EVERY == 0 and step < STEPS:
            kept = largest(v * (w + u) ** 2)
            z = (w + u) * kept
            u = u + w - z
    kept = largest(v * (w + u) ** 2)
    return (w + u) * kept, kept


def run(dtype: torch.dtype, interrupted: int | None = None) -> tuple[nn.Parameter, Tensor, ADMM]:
    weight, x, y = problem(dtype)
    optimizer = torch.optim.Adam([weight], lr=0.02)
    admm, schedule = ADMM({"w": weight}, PENALTY), ELSA(STEPS, EVERY, PENALTY)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss_of(weight, x, y).backward()
        admm.pull([weight])
        optimizer.step()
        if schedule.chooses_at(step):
            admm.choose({"w": largest(admm.values("w", [optimizer]))})
        if step == interrupted:
            state = admm.state_dict()
            admm = ADMM({"w": weight}, PENALTY)
            admm.load_state_dict(state)
    mask = largest(admm.values("w", [optimizer]))
    admm.settle({"w": mask})
    return weight, mask, admm


def test_weights_are_those_of_the_formulas() -> None:
    expected, kept = naive()
    weight, mask, _ = run(torch.float64)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)
    assert not weight.detach()[~mask].view(torch.int64).any()


@pytest.mark.parametrize("step", [2, 9])
def test_a_loaded_state_goes_on_to_the_bit(step: int) -> None:
    assert torch.equal(run(torch.float32, step)[0], run(torch.float32)[0])


def test_narrow_weights_have_wide_anchors() -> None:
    weight, mask, admm = run(torch.bfloat16)
    assert admm.sums("w").dtype == torch.float32
    assert admm.state_dict()["anchors"]["w"].dtype == torch.float32
    assert torch.equal(weight != 0, mask)
    _, kept = naive()
    assert float((mask == kept).float().mean()) > 0.8  # and the rest is near the threshold


def test_a_weight_without_second_moments_is_named() -> None:
    weight, *_ = problem()
    with pytest.raises(ValueError, match="no optimizer has Adam's second moments of 'w'"):
        ADMM({"w": weight}, 0.1).values("w", [torch.optim.SGD([weight], lr=0.1)])


@pytest.mark.parametrize("strange", ["name", "shape"])
def test_a_state_of_other_weights_is_refused(strange: str) -> None:
    state: dict[str, Any] = run(torch.float32)[2].state_dict()
    other = {"v" if strange == "name" else "w": nn.Parameter(torch.zeros(5, 7 if strange == "shape" else 6))}
    with pytest.raises(ValueError, match="of other weights" if strange == "name" else "has shape"):
        ADMM(other, 0.1).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0}, "step=0 must be a whole number"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"step": 8, "every_n_steps": 9}, "nothing would be chosen"),
        ({"penalty": 0.0}, r"penalty=0\.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ELSA(**arguments)


def test_as_a_schedule_it_prunes_once() -> None:
    schedule = ELSA(step=8, every_n_steps=3)
    assert (schedule.start, schedule.end) == (8, 8)
    assert [schedule.fraction(step) for step in (7, 8, 9)] == [0.0, 1.0, 1.0]
    assert [step for step in range(12) if schedule.updates_at(step)] == [8]
    assert [step for step in range(12) if schedule.chooses_at(step)] == [3, 6]
