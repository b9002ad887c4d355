"""Choosing units: what goes first, ties, limits, multiples; and what cannot be reached."""

import pytest
import structure_models as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.structure.planning import make_planner, plan_removal
from lightning_prune.structure.sizes import Sizes
from lightning_prune.structure.units import check_removal, read_structure, sizes_after

STRUCTURE = read_structure(zoo.make("llama"))
SHAPES = STRUCTURE.shapes()
TOTAL = SHAPES.count(STRUCTURE.sizes)


def random(*types, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {t: torch.rand(STRUCTURE.places(t), STRUCTURE.units(t), generator=generator) for t in types}


def plan(saliencies, goal, round_to=1):
    planner = make_planner(STRUCTURE, goal, list(saliencies), round_to, one_by_one=not isinstance(goal, dict))
    return plan_removal(saliencies, STRUCTURE, planner)


def choose(saliencies, units=1, gone=None, **settings):
    """Sorted units by type as lists, and the saliencies compared."""
    settings = {"goal": 0.2, "types": list(saliencies), **settings}
    planner = make_planner(STRUCTURE, **settings)
    gone = check_removal(STRUCTURE, gone or {})
    values = {t: saliency.double().clone() for t, saliency in saliencies.items()}
    for t, places in gone.items():
        for row, indices in zip(values[t], places, strict=True):
            row[indices] = torch.inf
    chosen, compared = planner.choose(values, sizes_after(STRUCTURE, gone), units)
    return {t: [place.tolist() for place in places] for t, places in chosen.items()}, compared


def test_the_cheapest_unit_of_the_cheapest_type_goes():
    saliencies = {
        "attention": torch.tensor([[3.0, 1.0, 2.0], [2.0, 3.0, 1.0], [1.0, 1.0, 9.0]]),  # mean of the cheapest 1.0
        "ffn": torch.full((3, 28), 2.0),
        "hidden": torch.full((1, 48), 1.5),
    }
    chosen, compared = choose(saliencies)
    assert chosen == {"attention": [[1], [2], [0]]}  # ties to the lower index
    assert compared == {"attention": 1.0, "ffn": 2.0, "hidden": 1.5}
    saliencies["hidden"][0, 7] = 0.99
    assert choose(saliencies, 2)[0] == {"hidden": [[7]], "attention": [[1], [2], [0]]}
    assert list(choose(saliencies, gone={"hidden": [7]})[0]) == ["attention"]
    # Equal saliencies: the first type.
    assert list(choose({"hidden": torch.ones(1, 48), "ffn": torch.ones(3, 28)})[0]) == ["ffn"]


def test_masked_units_are_not_chosen_again():
    saliencies = {"ffn": torch.arange(28.0).repeat(3, 1)}
    chosen, _ = choose(saliencies, 2, {"ffn": [[0, 1], [0, 2], [1, 2]]}, goal=0.8)
    assert chosen == {"ffn": [[2, 3], [1, 3], [0, 3]]}


def test_the_last_unit_of_a_type_stays():
    saliencies = {"attention": torch.zeros(3, 3), "ffn": torch.ones(3, 28)}
    assert list(choose(saliencies, gone={"attention": [[0, 1]] * 3}, goal=0.5)[0]) == ["ffn"]
    assert choose({"layer": torch.zeros(1, 3)}, gone={"layer": [0, 1]}, goal=0.6)[0] == {}
    assert choose({"attention": torch.zeros(3, 3)}, 9, goal=0.8)[0] == {"attention": [[0, 1]] * 3}


def test_a_type_too_large_for_the_rest_of_the_way_is_passed_over():
    head, channel = (TOTAL - SHAPES.count(STRUCTURE.sizes.without(t, 1)) for t in ("attention", "ffn"))
    assert head > channel
    saliencies = {"attention": torch.zeros(3, 3), "ffn": torch.ones(3, 28)}
    assert list(choose(saliencies, goal=TOTAL - head)[0]) == ["attention"]
    assert list(choose(saliencies, goal=TOTAL - head + 1)[0]) == ["ffn"]
    # None fits: the one that ends nearest.
    assert list(choose(saliencies, goal=TOTAL - 1)[0]) == ["ffn"]
    assert choose(saliencies, goal=TOTAL)[0] == {}
    assert choose({"ffn": torch.ones(3, 28)}, 9, goal=TOTAL - 4 * channel)[0] == {"ffn": [[0, 1, 2, 3]] * 3}


def test_multiples():
    def count(units=1, **settings):
        return len(choose({"ffn": torch.arange(28.0).repeat(3, 1)}, units, goal=0.8, **settings)[0]["ffn"][0])

    assert count(round_to=8) == 4  # 28 to 24
    assert count(gone={"ffn": [[0, 1, 2, 3]] * 3}, round_to=8) == 8  # 24 to 16
    assert count(2, round_to=8) == 12  # 28 to 16
    assert count(round_to={"hidden_size": 8}) == 1
    heads = {"attention": torch.rand(3, 3)}
    assert len(choose(heads, goal=0.9, round_to={"num_attention_heads": 4})[0]["attention"][0]) == 1
    with pytest.raises(ValueError, match="leave at least"):
        choose(heads, goal=0.9, round_to={"num_attention_heads": 5})


@pytest.mark.parametrize("round_to", [0, {"width": 2}, "8"])
def test_bad_multiples(round_to):
    with pytest.raises(ValueError, match="round_to="):
        make_planner(STRUCTURE, 0.8, ("ffn",), round_to)


def test_bad_saliencies():
    with pytest.raises(ValueError, match=r"shape \(3, 27\)"):
        plan({"ffn": torch.ones(3, 27)}, 0.8)
    with pytest.raises(ValueError, match="NaN"):
        plan({"ffn": torch.full((3, 28), torch.nan)}, 0.8)


# -- whole plans -------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.45, 1.0), seed=st.integers(0, 5), multiple=st.sampled_from([1, 4]))
def test_a_share_is_met_or_missed_by_the_least_that_a_last_unit_allows(share, seed, multiple):
    removal = plan(random("attention", "ffn", "hidden", seed=seed), share, multiple)
    sizes = sizes_after(STRUCTURE, removal)
    count, limit = SHAPES.count(sizes), int(share * TOTAL)
    assert count <= limit
    steps = {"attention": 1, "ffn": multiple, "hidden": multiple}

    def could_be_last(t):
        """Before the last step no type could go without passing the limit, and this one passed it by the least."""
        back = sizes.without(t, -steps[t])
        nexts = [SHAPES.count(back.without(u, n)) for u, n in steps.items() if back.units(u) > n]
        return SHAPES.count(back) > limit and all(n <= count for n in nexts)

    assert count == limit or any(could_be_last(t) for t in removal)
    for t, name in (("ffn", "intermediate_size"), ("hidden", "hidden_size")):
        assert t not in removal or getattr(sizes, name) % multiple == 0


def test_a_plan_is_choosing_step_by_step():
    saliencies = random("attention", "ffn", "hidden", "layer", seed=3)
    removed = {}
    while chosen := choose(saliencies, 1, removed, goal=0.6)[0]:
        for t, places in chosen.items():
            before = removed.get(t, [[]] * len(places))
            removed[t] = [sorted(both[0] + both[1]) for both in zip(before, places, strict=True)]
    planned = plan(saliencies, 0.6)
    assert {t: [p.tolist() for p in places] for t, places in planned.items()} == removed


def test_sizes_are_reached_exactly_by_the_cheapest_units():
    saliencies = random("attention", "ffn", "hidden", "layer")
    target = {"hidden_size": 40, "intermediate_size": 20, "num_key_value_heads": 2, "num_hidden_layers": 2}
    removal = plan(saliencies, target)
    assert sizes_after(STRUCTURE, removal) == Sizes(40, 20, 4, 2, 2, 8)
    for t, places in removal.items():
        for saliency, units in zip(saliencies[t], places, strict=True):
            stays = torch.ones(len(saliency), dtype=torch.bool)
            stays[units] = False
            assert float(saliency[units].max()) <= float(saliency[stays].min())


@pytest.mark.parametrize(
    ("name", "target", "types", "message"),
    [
        ("llama", 0.05, ("ffn",), "leave at least"),
        ("llama", {"hidden_size": 40}, ("ffn",), "is not in types"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3}, ("attention",), "attention_unit"),
        ("gpt2", 0.9, ("attention", "ffn"), "ties its heads to its hidden size"),
        ("gpt2", {"hidden_size": 40}, ("hidden",), "remove 8 hidden channels"),
        ("llama-biases", 0.9, ("hidden",), "heads divide, and it has biases"),
        ("llama-biases", {"hidden_size": 47}, ("hidden",), "do not divide"),
    ],
)
def test_what_cannot_be_reached_is_refused(name, target, types, message):
    with pytest.raises(ValueError, match=message):
        make_planner(read_structure(zoo.make(name)), target, types, one_by_one=not isinstance(target, dict))
