"""Counts are those of the number that was written: against decimals and fractions, everywhere a share becomes one."""

from __future__ import annotations

import math
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import CubicSchedule, LinearSchedule, WeightPruning, prune
from lightning_prune.pruning.settings import SCORES
from lightning_prune.schedules import count_of, exact_share, fraction_at

decimals = st.integers(0, 4).flatmap(lambda places: st.integers(0, 10**places).map(lambda n: Decimal(n) / 10**places))


@settings(max_examples=300, deadline=None)
@given(decimals, st.integers(0, 10**7))
def test_counts_are_those_of_the_decimal(share: Decimal, size: int) -> None:
    wanted = math.floor(share * size)
    assert count_of(float(share), size) == wanted
    assert count_of(np.float64(share), size) == wanted
    assert count_of(np.float32(share), size) == wanted
    assert count_of(Fraction(share), size) == wanted


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 1000))
@example(173, 301, 1)  # 15 digits only
def test_counts_of_ratios(part: int, whole: int, times: int) -> None:
    part = min(part, whole)
    assert count_of(part / whole, whole * times) == part * times


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_more_is_never_less(one: float, other: float, size: int) -> None:
    low, high = sorted([one, other])
    assert 0 <= count_of(low, size) <= count_of(high, size) <= size
    assert float(exact_share(one)) == one


@settings(max_examples=100, deadline=None)
@given(decimals, st.integers(1, 60), st.integers(0, 20), st.sampled_from([LinearSchedule, CubicSchedule]))
def test_products_with_a_schedule_are_exact_and_grow(share: Decimal, length: int, start: int, kind: Any) -> None:
    schedule, before = kind(start, start + length), 0
    for step in range(start + length + 3):
        t = min(max(Fraction(step - start, length), Fraction(0)), Fraction(1))
        wanted = math.floor(Fraction(share) * (1 - (1 - t) ** schedule.exponent) * 5400)
        count = count_of(exact_share(float(share)) * fraction_at(schedule, step), 5400)
        assert count == wanted >= before
        before = count


WITHOUT_DATA = {
    "layer": {"score": "magnitude"},
    "row": {"score": "magnitude", "group": "row"},
    "global": {"score": "magnitude", "group": "global"},
    "random": {"score": "random"},
    "mapping": {"score": "magnitude", "allocation": {"0": 0.29, "1": 0.29}, "sparsity": None},
    "rest": {"score": "magnitude", "allocation": {"0": 0.29}},
}


def mean_square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean(1)


@pytest.mark.parametrize("sparsity", [0.29, np.float64(0.29), np.float32(0.29), Fraction(29, 100), 0.57, 0.58])
@pytest.mark.parametrize("name", [*WITHOUT_DATA, "wanda", "kfac", "owl", "sparsegpt", "obs"])
def test_the_pipeline_prunes_that_many(name: str, sparsity: Any) -> None:
    """100 weights a row, and ten rows, in two layers."""
    data = {
        "wanda": {"score": "wanda"},
        "kfac": {"score": "kfac"},
        "owl": {"score": "wanda", "allocation": "owl", "group": "layer"},
        "sparsegpt": {"score": "sparsegpt"},
        "obs": {"score": "wanda", "update": "obs"},
    }
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 10, bias=False))
    arguments = {"sparsity": sparsity, **{**WITHOUT_DATA, **data}[name]}
    percent = round(float(sparsity) * 100) if arguments["sparsity"] is not None else 29
    if name == "rest" and percent != 29:
        pytest.skip("the named layer has 29 %")
    masks = prune(model, [torch.randn(16, 100)], loss_fn=mean_square, num_samples=16, progress=False, **arguments)
    assert sum(int((~m).sum()) for m in masks.values()) == percent * 110
    if name in ("row", "wanda", "obs"):
        assert all(bool(((~m).sum(1) == percent).all()) for m in masks.values())


def test_numpy_numbers_leave_a_checkpoint_that_loads_safely(tmp_path: Any) -> None:
    for value in (np.float64(0.29), np.float32(0.29)):
        torch.save(WeightPruning(sparsity=value, alpha=np.float64(10.0)).state_dict(), tmp_path / "state")
        assert torch.load(tmp_path / "state", weights_only=True)["settings"]["sparsity"] == 0.29


# -- layers without weights, and float64 -----------------------------------------------------------------------------


class WithEmpty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.none = nn.Linear(16, 8), nn.Linear(16, 0)
        self.nothing, self.b = nn.Linear(0, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x) + self.nothing(self.none(x))))


@pytest.mark.parametrize("score", [s for s in SCORES if s != "keep"])
@pytest.mark.parametrize("group", [None, "global"])
def test_layers_without_weights_are_passed_over(score: str, group: str | None) -> None:
    torch.manual_seed(0)
    model = WithEmpty()
    settings = {"group": group, "allocation": "uniform" if group else None} if score != "sparsegpt" else {}
    masks = prune(
        model, [torch.randn(8, 16)], score, 0.5, loss_fn=mean_square, num_samples=8, progress=False, **settings
    )
    assert set(masks) == {"a.weight", "b.weight"}
    assert sum(int((~m).sum()) for m in masks.values()) == (128 + 32) // 2


def test_a_model_of_nothing_but_empty_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to prune"):
        prune(nn.Sequential(nn.Linear(16, 0)), score="magnitude")


@pytest.mark.parametrize("score", ["magnitude", "wanda", "gradient", "gblm", "kfac"])
def test_float64_weights_are_scored_in_float64(score: str) -> None:
    """Scores that differ by less than float32 can tell: the reference is numpy's, from the formulas."""
    torch.manual_seed(0)
    model = nn.Linear(32, 16, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(1 + 1e-12 * torch.randn(16, 32, dtype=torch.float64))
    x = torch.ones(4, 32, dtype=torch.float64) + 1e-12 * torch.randn(4, 32, dtype=torch.float64)
    w, inputs = model.weight.detach().numpy().copy(), x.numpy()
    delta = 2 * (inputs @ w.T) / 16  # of the mean square of the outputs
    norm, gradient = np.sqrt((inputs**2).mean(0)), np.sqrt(((delta[:, :, None] * inputs[:, None]) ** 2).sum(0))
    scores = {
        "magnitude": np.abs(w),
        "wanda": np.abs(w) * norm,
        "gradient": np.abs(w) * gradient,
        "gblm": np.abs(w) * (norm + 100 * gradient),
        "kfac": np.abs(w) * norm * (np.sqrt((delta**2).mean(0)) ** 0.7)[:, None],
    }[score]
    mask = prune(model, [x], score, 0.5, group="layer", allocation="uniform", num_samples=4, progress=False,
                 loss_fn=mean_square)["weight"]  # fmt: skip
    assert int((~mask).sum()) == 256
    pruned, kept = scores[~mask.numpy()], scores[mask.numpy()]
    assert pruned.max() <= kept.min() * (1 + 1e-14)  # a few units in the last place, of sums in another order
    assert len(np.unique(scores.astype(np.float32))) < 64


@pytest.mark.parametrize("group", ["row", "layer", "global"])
def test_layers_that_keep_everything_are_named(group: str) -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 8), nn.Linear(8, 6))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        masks = prune(model, score="magnitude", group=group, sparsity=0.5, ignore=[], progress=False)
    said = [str(w.message) for w in told if "nothing is pruned in" in str(w.message)]
    if group == "row":
        assert bool(masks["1.weight"].all())
        assert "nothing is pruned in 1 of 3 layers (1.weight): sparsity=0.5 of a group of 1 weights" in said[0]
    else:
        assert not said
