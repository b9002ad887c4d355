"""Layer sparsities against naive formulas; totals exact to the weight."""

import copy
import math
import re
from types import SimpleNamespace

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LAYERS
from torch import nn

from lightning_prune import KFACAllocation, OWLAllocation, prune
from lightning_prune.pruning.allocation import (
    allocation_statistics,
    exact_counts,
    global_counts,
    global_shares,
    kfac_sparsities,
    make_allocation,
    mapping_counts,
    owl_sparsities,
    uniform_counts,
)
from lightning_prune.pruning.statistics import LayerStatistics
from lightning_prune.pruning.targets import find_targets


def layers(*shapes):
    torch.manual_seed(0)
    return find_targets(nn.ModuleDict({f"l{i}": nn.Linear(b, a) for i, (a, b) in enumerate(shapes)}))


def to_tensors(statistics):
    return {
        name: LayerStatistics(samples=5, **{k: torch.from_numpy(v).float() for k, v in values.items()})
        for name, values in statistics.items()
    }


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0])
def test_uniform_counts(sparsity):
    targets = layers((3, 7), (5, 11), (1, 1))
    assert uniform_counts(targets, sparsity, "row") == {
        f"l{i}.weight": a * math.floor(sparsity * b) for i, (a, b) in enumerate([(3, 7), (5, 11), (1, 1)])
    }
    assert uniform_counts(targets, sparsity, "layer") == {
        f"l{i}.weight": math.floor(sparsity * a * b) for i, (a, b) in enumerate([(3, 7), (5, 11), (1, 1)])
    }


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(-0.5, 1.5), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0, 1),
    st.booleans(),
)
def test_exact_counts_add_up_and_stay_in_bounds(entries, where, with_lower):
    targets = [SimpleNamespace(name=f"l{i}", numel=size) for i, (size, _, _) in enumerate(entries)]
    wanted = {f"l{i}": sparsity for i, (_, sparsity, _) in enumerate(entries)}
    lower = {f"l{i}": int(low * size) for i, (size, _, low) in enumerate(entries)} if with_lower else {}
    least, most = sum(lower.values()), sum(t.numel for t in targets)
    total = least + round(where * (most - least))
    counts = exact_counts(targets, wanted, total, lower)
    assert sum(counts.values()) == total
    assert all(lower.get(t.name, 0) <= counts[t.name] <= t.numel for t in targets)
    # One shift for all: a layer that is not at a bound is not overtaken by one that wanted less.
    free = [t for t in targets if lower.get(t.name, 0) < counts[t.name] < t.numel]
    for a in free:
        for b in free:
            gap = counts[a.name] / a.numel - counts[b.name] / b.numel
            assert abs(gap - (wanted[a.name] - wanted[b.name])) <= 1 / a.numel + 1 / b.numel + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(50, 500), st.floats(0.3, 0.7)), min_size=1, max_size=6), st.floats(0.35, 0.65))
def test_exact_counts_are_the_shifted_sparsities_to_one_weight(entries, sparsity):
    targets = [SimpleNamespace(name=f"l{i}", numel=size) for i, (size, _) in enumerate(entries)]
    wanted = {f"l{i}": value for i, (_, value) in enumerate(entries)}
    sizes = {t.name: t.numel for t in targets}
    total = math.floor(sparsity * sum(sizes.values()))
    counts, exact = exact_counts(targets, wanted, total, {}), naive.shifted(wanted, sizes, total)
    assert all(abs(counts[name] - exact[name]) < 1 + 1e-6 for name in sizes)


def test_exact_counts_are_deterministic_and_give_remainders_to_the_first_layers():
    targets = layers((1, 5), (1, 5), (1, 5))
    assert list(exact_counts(targets, {t.name: 0.5 for t in targets}, 7, {}).values()) == [3, 2, 2]


@pytest.mark.parametrize(("total", "lower"), [(16, {}), (-1, {}), (3, {"l0.weight": 4})])
def test_exact_counts_refuse_impossible_totals(total, lower):
    with pytest.raises(ValueError, match=f"cannot prune {total} weights of 15"):
        exact_counts(layers((3, 5)), {"l0.weight": 0.5}, total, lower)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 17, 30, 31])
def test_global_counts_give_ties_to_the_first_layers(count):
    targets = layers((2, 5), (3, 7))
    scores = {"l0.weight": torch.tensor([[1.0, 2, 2, 3, 2], [0, 2, 9, 9, 1]]), "l1.weight": torch.full((3, 7), 2.0)}
    found = global_counts(targets, lambda t: scores[t.name], count)
    expected = naive.masks({n: s.double().numpy() for n, s in scores.items()}, count / 31 + 1e-9, "global")
    assert found == {n: int((~m).sum()) for n, m in expected.items()}
    assert sum(found.values()) == count
    shares = global_shares(targets, lambda t: scores[t.name], count / 31 + 1e-9)
    assert shares == {n: found[n] / scores[n].numel() for n in found}


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("settings_", [{}, {"mix": 1.0}, {"mix": 0.25, "low": 0.45, "high": 0.55}, {"mix": 0.0}])
def test_kfac_sparsities(reference, sparsity, settings_):
    targets = find_targets(reference.model)
    found = kfac_sparsities(targets, to_tensors(reference.statistics), sparsity, KFACAllocation(**settings_))
    scores = {n: naive.score("kfac", reference.weights[n], reference.statistics[n], gamma=1.0) for n in LAYERS}
    expected = naive.kfac_sparsities(scores, sparsity, **settings_)
    assert found == {name: pytest.approx(value, abs=1e-3) for name, value in expected.items()}
    if settings_.get("mix") != 0.0:
        assert len({round(v, 4) for v in found.values()}) > 1


@pytest.mark.parametrize("sparsity", [0.4, 0.7])
@pytest.mark.parametrize(("multiple", "spread"), [(5.0, 0.08), (3.0, 0.2)])
def test_owl_sparsities(reference, sparsity, multiple, spread):
    """Relative to each other: the common shift to the exact total comes later."""
    targets = find_targets(reference.model)
    blocks = {name: name.split(".self_attn")[0].split(".mlp")[0] for name in LAYERS}
    found = owl_sparsities(targets, to_tensors(reference.statistics), sparsity, OWLAllocation(multiple, spread), blocks)
    wanda = {n: naive.score("wanda", reference.weights[n], reference.statistics[n]) for n in LAYERS}
    expected = naive.owl_sparsities(wanda, blocks, sparsity, multiple, spread)
    shift = found[targets[0].name] - expected[targets[0].name]
    assert found == {name: pytest.approx(value + shift, abs=1e-6) for name, value in expected.items()}
    assert max(found.values()) - min(found.values()) == pytest.approx(2 * spread)
    assert all(sparsity - spread - 1e-9 <= value <= sparsity + spread + 1e-9 for value in found.values())


@pytest.mark.few_fast(24)
@pytest.mark.parametrize("allocation", ["kfac", "owl", KFACAllocation(1.0, 0.3, 0.7), OWLAllocation(2.0, 0.3)])
@pytest.mark.parametrize("score", ["wanda", "kfac", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.777, 0.97, 1.0])
def test_totals_are_exact(reference, allocation, score, sparsity):
    model = copy.deepcopy(reference.model)
    masks = prune(model, [reference.ids], score, sparsity, allocation=allocation, num_samples=5)
    total = sum(m.numel() for m in masks.values())
    assert sum(int((~m).sum()) for m in masks.values()) == math.floor(sparsity * total)


@pytest.mark.parametrize("group", ["row", "layer"])
def test_allocated_layers_have_the_naive_sparsities(reference, group):
    model = copy.deepcopy(reference.model)
    masks = prune(model, [reference.ids], "wanda", 0.5, allocation="kfac", group=group, num_samples=5)
    scores = {n: naive.score("kfac", reference.weights[n], reference.statistics[n], gamma=1.0) for n in LAYERS}
    sizes = {n: m.numel() for n, m in masks.items()}
    expected = naive.shifted(naive.kfac_sparsities(scores, 0.5), sizes, sum(sizes.values()) // 2)
    for name, mask in masks.items():
        assert abs(int((~mask).sum()) - expected[name]) <= 3, name  # a tie at the threshold moves two layers
        rows = (~mask).sum(1)
        if group == "row":
            assert int(rows.max() - rows.min()) <= 1
            assert (rows[:-1] >= rows[1:]).all()
        else:
            assert int(rows.max() - rows.min()) >= 0


# -- mappings --------------------


def test_mapping_counts_fill_up_the_layers_that_no_pattern_names():
    targets = layers((4, 10), (4, 10), (5, 4))
    counts = mapping_counts(targets, {"l0": 0.25}, 0.5, {})
    assert counts["l0.weight"] == 10
    assert sum(counts.values()) == 50
    assert counts["l1.weight"] / 40 == pytest.approx(counts["l2.weight"] / 20, abs=0.05)


def test_a_complete_mapping_needs_no_sparsity():
    targets = layers((4, 10), (4, 10))
    mapping = {"l0": 0.33, "l1*": 0.7}
    assert mapping_counts(targets, mapping, None, {}) == {"l0.weight": 13, "l1.weight": 28}
    assert mapping_counts(targets, {"l?": 0.5}, 0.5, {}) == {"l0.weight": 20, "l1.weight": 20}


@pytest.mark.parametrize(
    ("mapping", "sparsity", "message"),
    [
        ({"l9": 0.5}, 0.5, "pattern 'l9' matches no target, such as 'l0.weight'"),
        ({"l0": 0.5, "l*": 0.6}, 0.5, "gives 'l0.weight' both 0.5 and 0.6 (by 'l*')"),
        ({"l*": 0.6}, 0.5, "covers every layer and gives 0.6000 in all, but sparsity=0.5"),
        ({"l0": 1.0}, 0.2, "allocation leaves -24 of 40 weights"),
        ({"l0": 0.0}, 0.9, "allocation leaves 72 of 40 weights"),
    ],
)
def test_mappings_that_cannot_be_met(mapping, sparsity, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mapping_counts(layers((4, 10), (4, 10)), mapping, sparsity, {})


def test_a_mapping_in_prune(llama):
    masks = prune(llama, None, "magnitude", 0.5, allocation={"mlp": 0.75, "layers.0.self_attn": 0.1})
    for name, mask in masks.items():
        pruned = int((~mask).sum())
        if "mlp" in name:
            assert pruned == math.floor(0.75 * mask.numel())
        elif "layers.0" in name:
            assert pruned == math.floor(0.1 * mask.numel())
    assert sum(int((~m).sum()) for m in masks.values()) == sum(m.numel() for m in masks.values()) // 2


# -- arguments --------------------


def test_names_become_objects():
    assert make_allocation("kfac") == KFACAllocation(0.7, 0.1, 0.9)
    assert make_allocation("owl") == OWLAllocation(5.0, 0.08)
    assert make_allocation("uniform") == "uniform"
    own = {"a": 0.5}
    assert make_allocation(own) is own
    assert allocation_statistics(KFACAllocation()) == {"input_norm", "output_grad_norm"}
    assert allocation_statistics(OWLAllocation()) == {"input_norm"}
    assert allocation_statistics("uniform") == allocation_statistics(own) == frozenset()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("kfca", ValueError, "allocation='kfca' is unknown; choose from"),
        ({"a": 1.5}, ValueError, "allocation['a']=1.5 must be a sparsity in [0, 1]"),
        ({"a": "half"}, ValueError, "allocation['a']='half' must be a sparsity in [0, 1]"),
        ({"a": math.nan}, ValueError, "allocation['a']=nan must be a sparsity in [0, 1]"),
        (0.5, TypeError, "allocation=0.5 must be one of"),
        (KFACAllocation, TypeError, "must be one of"),
    ],
)
def test_bad_allocations(bad, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_allocation(bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KFACAllocation(mix=1.1),
        lambda: KFACAllocation(low=0.9, high=0.9),
        lambda: KFACAllocation(low=-0.1),
        lambda: KFACAllocation(high=1.1),
        lambda: OWLAllocation(multiple=0),
        lambda: OWLAllocation(spread=1.0),
    ],
)
def test_bad_settings_of_allocations(make):
    with pytest.raises(ValueError, match="must be"):
        make()
