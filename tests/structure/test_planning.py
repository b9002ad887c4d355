"""Choosing units: what goes first, ties, limits, multiples; and what cannot be reached."""

import pytest
import structure_models as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.structure.planning import check_reachable, choose, plan_removal
from lightning_prune.structure.sizes import Sizes
from lightning_prune.structure.units import read_structure, sizes_after

STRUCTURE = read_structure(zoo.make("llama"))
SHAPES = STRUCTURE.shapes()
TOTAL = SHAPES.count(STRUCTURE.sizes)


def random(*types, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {t: torch.rand(STRUCTURE.places(t), STRUCTURE.units(t), generator=generator) for t in types}


def test_the_cheapest_unit_of_the_cheapest_type_goes():
    saliencies = {
        "attention": torch.tensor([[3.0, 1.0, 2.0], [2.0, 3.0, 1.0], [1.0, 1.0, 9.0]]),  # mean of the cheapest 1.0
        "ffn": torch.full((3, 28), 2.0),
        "stem": torch.full((1, 48), 1.5),
    }
    picked = choose(saliencies, STRUCTURE)
    assert picked.unit_type == "attention"
    assert [u.tolist() for u in picked.units] == [[1], [2], [0]]  # ties to the lower index
    assert picked.saliency == {"attention": 1.0, "ffn": 2.0, "stem": 1.5}
    saliencies["stem"][0, 7] = 0.99
    picked = choose(saliencies, STRUCTURE, count=2)
    assert picked.removal()["stem"][0].tolist() == [0, 7]
    picked = choose(saliencies, STRUCTURE, removed={"stem": [7]})
    assert picked.unit_type == "attention"
    # Equal saliencies: the first type.
    assert choose({"stem": torch.ones(1, 48), "ffn": torch.ones(3, 28)}, STRUCTURE).unit_type == "ffn"


def test_masked_units_are_not_chosen_again():
    saliencies = {"ffn": torch.arange(28.0).repeat(3, 1)}
    picked = choose(saliencies, STRUCTURE, removed={"ffn": [[0, 1], [0, 2], [1, 2]]}, count=2)
    assert [u.tolist() for u in picked.units] == [[2, 3], [1, 3], [0, 3]]


def test_the_last_unit_of_a_type_stays():
    saliencies = {"attention": torch.zeros(3, 3), "ffn": torch.ones(3, 28)}
    assert choose(saliencies, STRUCTURE, removed={"attention": [[0, 1]] * 3}).unit_type == "ffn"
    assert choose({"layer": torch.zeros(1, 3)}, STRUCTURE, removed={"layer": [0, 1]}) is None
    assert choose({"attention": torch.zeros(3, 3)}, STRUCTURE, count=9).units[0].tolist() == [0, 1]


def test_a_type_too_large_for_the_rest_of_the_way_is_passed_over():
    head, channel = (TOTAL - SHAPES.count(STRUCTURE.sizes.without(t, 1)) for t in ("attention", "ffn"))
    assert head > channel
    saliencies = {"attention": torch.zeros(3, 3), "ffn": torch.ones(3, 28)}
    assert choose(saliencies, STRUCTURE, limit=TOTAL - head).unit_type == "attention"
    assert choose(saliencies, STRUCTURE, limit=TOTAL - head + 1).unit_type == "ffn"
    # None fits: the one that ends nearest.
    assert choose(saliencies, STRUCTURE, limit=TOTAL - 1).unit_type == "ffn"
    assert choose(saliencies, STRUCTURE, limit=TOTAL) is None
    # Several at a time, but no more than fit.
    assert len(choose({"ffn": torch.ones(3, 28)}, STRUCTURE, count=9, limit=TOTAL - 4 * channel).units[0]) == 4


def test_multiples():
    saliencies = {"ffn": torch.arange(28.0).repeat(3, 1)}
    assert len(choose(saliencies, STRUCTURE, round_to=8).units[0]) == 4  # 28 to 24
    masked = {"ffn": [[0, 1, 2, 3]] * 3}
    assert len(choose(saliencies, STRUCTURE, removed=masked, round_to=8).units[0]) == 8  # 24 to 16
    assert len(choose(saliencies, STRUCTURE, round_to={"hidden_size": 8}).units[0]) == 1
    assert len(choose(saliencies, STRUCTURE, round_to=8, count=13).units[0]) == 12  # 28 to 16
    heads = {"attention": torch.rand(3, 3)}
    assert len(choose(heads, STRUCTURE, round_to={"num_attention_heads": 4}).units[0]) == 1
    assert choose(heads, STRUCTURE, round_to={"num_attention_heads": 5}) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"round_to": 0}, "round_to=0"),
        ({"round_to": {"width": 2}}, "round_to="),
        ({"round_to": "8"}, "round_to="),
        ({"removed": {"ffn": [[99]] * 3}}, "0 to 27"),
    ],
)
def test_bad_arguments_of_choose(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose(random("ffn"), STRUCTURE, **arguments)


def test_bad_saliencies():
    with pytest.raises(ValueError, match=r"shape \(3, 27\)"):
        choose({"ffn": torch.ones(3, 27)}, STRUCTURE)
    with pytest.raises(ValueError, match="NaN"):
        choose({"ffn": torch.full((3, 28), torch.nan)}, STRUCTURE)


# -- whole plans -------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.45, 1.0), seed=st.integers(0, 5), multiple=st.sampled_from([1, 4]))
def test_a_share_is_met_or_missed_by_the_least_that_a_last_unit_allows(share, seed, multiple):
    removal = plan_removal(random("attention", "ffn", "stem", seed=seed), STRUCTURE, share, multiple)
    sizes = sizes_after(STRUCTURE, removal)
    count, limit = SHAPES.count(sizes), int(share * TOTAL)
    assert count <= limit
    steps = {"attention": 1, "ffn": multiple, "stem": multiple}

    def could_be_last(t):
        """Before the last step no type could go without passing the limit, and this one passed it by the least."""
        back = sizes.without(t, -steps[t])
        nexts = [SHAPES.count(back.without(u, n)) for u, n in steps.items() if back.units(u) > n]
        return SHAPES.count(back) > limit and all(n <= count for n in nexts)

    assert count == limit or any(could_be_last(t) for t in removal)
    for t, name in (("ffn", "intermediate_size"), ("stem", "hidden_size")):
        assert t not in removal or getattr(sizes, name) % multiple == 0


def test_a_plan_is_choosing_step_by_step():
    saliencies = random("attention", "ffn", "stem", "layer", seed=3)
    removed = {}
    limit = int(0.6 * TOTAL)
    while (picked := choose(saliencies, STRUCTURE, removed, limit=limit)) is not None:
        before = removed.get(picked.unit_type, [torch.empty(0, dtype=torch.int64)] * len(picked.units))
        removed[picked.unit_type] = [torch.cat(both) for both in zip(before, picked.units, strict=True)]
    planned = plan_removal(saliencies, STRUCTURE, 0.6)
    assert set(planned) == set(removed)
    for t, places in planned.items():
        assert [p.tolist() for p in places] == [sorted(r.tolist()) for r in removed[t]]


def test_sizes_are_reached_exactly_by_the_cheapest_units():
    saliencies = random("attention", "ffn", "stem", "layer")
    target = {"hidden_size": 40, "intermediate_size": 20, "num_key_value_heads": 2, "num_hidden_layers": 2}
    removal = plan_removal(saliencies, STRUCTURE, target)
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
        ("llama", {"hidden_size": 40}, ("ffn",), "needs units of type 'stem'"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3}, ("attention",), "attention_unit"),
        ("gpt2", 0.9, ("attention", "ffn"), "ties its heads to its hidden size"),
        ("gpt2", {"hidden_size": 40}, ("stem",), "remove 8 hidden channels"),
        ("llama-biases", 0.9, ("stem",), "heads divide, and it has biases"),
        ("llama-biases", {"hidden_size": 47}, ("stem",), "do not divide"),
    ],
)
def test_what_cannot_be_reached_is_refused(name, target, types, message):
    with pytest.raises(ValueError, match=message):
        check_reachable(read_structure(zoo.make(name)), target, types)
