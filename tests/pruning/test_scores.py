"""Every built-in score against the formula element by element, and the masks that follow from it."""

import copy
import math
import re

import naive
import numpy as np
import pytest
import torch
from tiny import LAYERS

from lightning_prune import prune
from lightning_prune.pruning.scores import (
    GBLM,
    GROUPS,
    KFAC,
    Gradient,
    Magnitude,
    Random,
    Score,
    Wanda,
)
from lightning_prune.pruning.settings import SCORES, make_score
from lightning_prune.pruning.statistics import ALL_STATISTICS, LayerStatistics

CASES = {
    "magnitude": (Magnitude(), {}),
    "wanda": (Wanda(), {}),
    "gradient": (Gradient(), {"norm": "l2"}),
    "gradient l1": (Gradient("l1"), {"norm": "l1"}),
    "gblm": (GBLM(), {}),
    "gblm l1": (GBLM(3.0, "l1"), {"alpha": 3.0, "norm": "l1"}),
    "gblm without gradient": (GBLM(0.0), {"alpha": 0.0}),
    "kfac": (KFAC(), {}),
    "kfac 1": (KFAC(1.0), {"gamma": 1.0}),
    "kfac 0": (KFAC(0.0), {"gamma": 0.0}),
}


def random_statistics(outputs=5, inputs=7):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    values = {
        "input_norm": draw(inputs),
        "output_grad_norm": draw(outputs),
        "gradient_l1": draw(outputs, inputs),
        "gradient_l2": draw(outputs, inputs),
    }
    values["input_norm"][2] = 0.0
    values["output_grad_norm"][1] = 0.0
    return torch.randn(outputs, inputs, generator=generator), values


@pytest.mark.parametrize("case", CASES)
def test_scores_follow_their_formula_and_read_only_what_they_name(case):
    score, settings = CASES[case]
    weight, values = random_statistics()
    needed = {name: value for name, value in values.items() if name in score.statistics}
    assert set(needed) == score.statistics
    before = {name: value.clone() for name, value in needed.items()}
    unchanged = weight.clone()
    found = score(weight, LayerStatistics(samples=4, **needed), "w")
    expected = naive.score(
        case.split()[0], weight.double().numpy(), {k: v.double().numpy() for k, v in values.items()}, **settings
    )
    # Rows without any gradient are told apart by their inputs, far below all others.
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-6, atol=1e-20)
    assert found.dtype == torch.float32
    assert torch.equal(weight, unchanged)
    assert all(torch.equal(value, before[name]) for name, value in needed.items())


@pytest.mark.parametrize("name", SCORES)
def test_built_in_scores_have_what_the_protocol_asks_for(name):
    score = make_score(name)
    assert score.name == name
    assert score.statistics <= ALL_STATISTICS
    assert score.group in GROUPS
    assert score.allocation in ("uniform", "owl", "kfac")


def test_arguments_reach_the_scores():
    assert make_score("gblm", alpha=7.0, grad_norm="l1") == GBLM(7.0, "l1")
    assert make_score("gradient", grad_norm="l1") == Gradient("l1")
    assert make_score("kfac", gamma=0.3) == KFAC(0.3)
    assert make_score("random", seed=5) == Random(5)
    assert make_score("kfac").gamma == 0.7
    assert make_score("gblm").alpha == 100.0
    own = KFAC(0.1)
    assert make_score(own) is own


def test_an_object_without_the_members_is_told_which_class_has_them():
    class Bare:
        name, statistics, group, allocation = "bare", frozenset(), "row", "uniform"

        def __call__(self, weight, statistics, name):
            return weight

    class Inherits(Score):
        name = "inherits"

        def __call__(self, weight, statistics, name):
            return weight

    with pytest.raises(TypeError, match=r"elementwise and __call__.*inherits from lightning_prune\.Score"):
        make_score(Bare())
    own = make_score(Inherits())
    assert (own.statistics, own.group, own.allocation, own.elementwise) == (frozenset(), "row", "uniform", False)


def test_properties_of_a_score_do_not_run_to_see_whether_it_is_one():
    class Costly(Score):
        name = "costly"

        @property
        def statistics(self):
            raise RuntimeError("ran")

        def __call__(self, weight, statistics, name):
            return weight

    own = Costly()
    assert make_score(own) is own


def test_random_scores_depend_on_seed_and_name_alone():
    weight, none = torch.zeros(6, 5), LayerStatistics(0)
    first = Random(1)(weight, none, "a")
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, Random(1)(weight + 3, none, "a"))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, Random(2)(weight, none, "a"))
    assert not torch.equal(first, Random(1)(weight, none, "b"))
    torch.set_default_dtype(torch.bfloat16)  # in which a matrix would have some hundred values, and ties in order
    try:
        assert torch.equal(first, Random(1)(weight, none, "a"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(first.min()) >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "gbml"}, "score='gbml' is unknown; choose from"),
        ({"score": "gblm", "grad_norm": "l3"}, "grad_norm='l3' must be 'l1' or 'l2'"),
        ({"score": "gblm", "alpha": -1.0}, "alpha=-1.0 must be a finite number >= 0"),
        ({"score": "gblm", "alpha": math.nan}, "alpha=nan must be a finite number >= 0"),
        ({"score": "kfac", "gamma": math.inf}, "gamma=inf must be a finite number >= 0"),
        ({"score": "kfac", "gamma": "0.5"}, "gamma='0.5' must be a finite number >= 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_score(**arguments)


@pytest.mark.parametrize("bad", [None, 3, Wanda, object(), lambda w, s, n: w])
def test_objects_that_are_no_score(bad):
    with pytest.raises(TypeError, match=r"must be one of .* or an object with name, statistics, group, allocation"):
        make_score(bad)


# -- masks of a whole model --------------------


CACHE = {}


def naive_scores(reference, case):
    if case not in CACHE:
        CACHE[case] = {
            n: naive.score(case.split()[0], reference.weights[n], reference.statistics[n], **CASES[case][1])
            for n in LAYERS
        }
    return CACHE[case]


@pytest.mark.few_fast(9)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("where", ["own", "row", "layer", "global", "2:4"])
def test_masks_are_those_of_the_naive_scores(reference, case, where):
    score, settings = CASES[case]
    name = case.split()[0]
    arguments = {"alpha": 100.0, "gamma": 0.7, **settings}
    arguments["grad_norm"] = arguments.pop("norm", "l2")
    model = copy.deepcopy(reference.model)
    how = {"pattern": where} if ":" in where else {"group": None if where == "own" else where, "allocation": "uniform"}
    if "pattern" not in how:
        how["sparsity"] = 0.6
    found = prune(model, [{"input_ids": reference.ids}], name, num_samples=5, **arguments, **how)
    scores = naive_scores(reference, case)
    group = score.group if where == "own" else where
    if ":" in where:
        expected = naive.masks(scores, 0.5, "row", (2, 4))
        # Each group of four is a comparison group of its own.
        scores, axis = {n: s.reshape(-1, 4) for n, s in scores.items()}, "row"
        found = {n: m.reshape(-1, 4) for n, m in found.items()}
        expected = {n: m.reshape(-1, 4) for n, m in expected.items()}
    else:
        expected, axis = naive.masks(scores, 0.6, group), group
    if axis == "global":
        joined = [np.concatenate([v.reshape(-1) for v in d.values()]) for d in (scores, expected)]
        together = np.concatenate([found[n].numpy().reshape(-1) for n in LAYERS])
        assert naive.near_ties(*joined, together, "layer", 1e-6)
        return
    for n in LAYERS:
        assert naive.near_ties(scores[n], expected[n], found[n].numpy(), axis, 1e-6), n
    same = sum(int((expected[n] == found[n].numpy()).sum()) for n in LAYERS)
    assert same >= 0.9999 * sum(m.size for m in expected.values())


class SquaredNorm:
    """A user's own score, without a base class."""

    elementwise = False

    name = "squared"
    statistics = frozenset({"input_norm", "output_grad_norm"})
    group = "layer"
    allocation = "uniform"

    def __init__(self, dtype=torch.float32):
        self.seen, self.dtype = [], dtype

    def __call__(self, weight, statistics, name):
        self.seen.append(name)
        assert weight.dtype == self.dtype
        assert statistics.gradient_l2 is None
        return (weight * statistics.get("input_norm")).square() + statistics.get("output_grad_norm")[:, None]


def test_a_custom_score(reference):
    score, model = SquaredNorm(torch.float64), copy.deepcopy(reference.model)  # scored as it is stored
    found = prune(model, [reference.ids], score, 0.3, num_samples=5)
    assert set(score.seen) == set(LAYERS)
    for name, values in reference.statistics.items():
        own = (reference.weights[name] * values["input_norm"]) ** 2 + values["output_grad_norm"][:, None]
        expected = naive.layer_mask(own, math.floor(0.3 * own.size))
        assert naive.near_ties(own, expected, found[name].numpy(), "layer", 1e-6)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda w: w[:, :3], r"score 'squared' returned \(64, 3\) for 'model\.layers\.0\.self_attn\.q_proj\.weight'"),
        (lambda w: None, r"score 'squared' returned NoneType for 'model\.layers\.0"),
        (lambda w: w * math.nan, r"scores of 'model\.layers\.0\.self_attn\.q_proj\.weight' hold NaN"),
    ],
)
def test_bad_results_of_a_custom_score_change_nothing(llama, tokens, result, message):
    class Bad(SquaredNorm):
        statistics = frozenset()

        def __call__(self, weight, statistics, name):
            return result(weight)

    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(llama, None, Bad(), 0.5)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
def test_a_custom_score_may_return_integers(llama, dtype):
    """Ranks and counts are natural scores; the layers here are large enough for the radix path."""

    class Integers(SquaredNorm):
        statistics = frozenset()

        def __call__(self, weight, statistics, name):
            return (weight.abs() * 20).to(dtype)

    weights = {n: llama.get_parameter(n).detach().clone() for n in LAYERS}
    found = prune(llama, None, Integers(), 0.5)
    for name, weight in weights.items():
        expected = naive.layer_mask((weight.abs() * 20).to(dtype).double().numpy(), weight.numel() // 2)
        np.testing.assert_array_equal(found[name].numpy(), expected)


def test_a_custom_score_that_works_in_place_does_not_change_the_model(llama):
    class InPlace(SquaredNorm):
        statistics = frozenset()

        def __call__(self, weight, statistics, name):
            return weight.abs_()

    weights = {n: llama.get_parameter(n).detach().clone() for n in LAYERS}
    found = prune(llama, None, InPlace(), 0.5)
    for name, weight in weights.items():
        assert torch.equal(llama.get_parameter(name), weight.masked_fill(~found[name], 0.0))


def test_unknown_statistics_of_a_custom_score_are_refused(llama, tokens):
    class Unknown(SquaredNorm):
        statistics = frozenset({"fisher"})

    with pytest.raises(ValueError, match=r"statistics \['fisher'\] are unknown"):
        prune(llama, [tokens(2, 8)], Unknown(), 0.5)
