"""Variant B against least squares in float64 and against the formula with the inverse Hessian."""

import naive
import numpy as np
import pytest
import structure_models as zoo
import torch
from tiny import snapshot

from lightning_prune import CalibrationError
from lightning_prune.pruning.hessian import compensated, removal_costs, unexplained
from lightning_prune.structure import read_structure
from lightning_prune.structure.compensation import compensate, compensation, observed_layers
from lightning_prune.structure.units import check_removal

DAMPING = 0.01


def problem(outputs=5, inputs=9, tokens=40, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((inputs, inputs))
    return rng.standard_normal((tokens, inputs)) @ mixing, rng.standard_normal((outputs, inputs))


def least_squares(x, w, lost):
    """The change of the kept weights that fits what the lost ones gave, with the damping as a ridge."""
    kept = [i for i in range(x.shape[1]) if i not in lost]
    ridge = DAMPING * np.mean(np.diag(x.T @ x))
    design = np.vstack([x[:, kept], np.sqrt(ridge) * np.eye(len(kept))])
    answer = np.vstack([x[:, lost] @ w[:, lost].T, np.zeros((len(kept), len(w)))])
    result = np.zeros_like(w)
    result[:, kept] = w[:, kept] + np.linalg.lstsq(design, answer, rcond=None)[0].T
    return result


@pytest.mark.parametrize("lost", [[3], [0, 4, 8], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_both_forms_of_the_update(lost):
    x, w = problem()
    got = compensated(torch.from_numpy(w), torch.from_numpy(x.T @ x), torch.tensor(lost)).numpy()
    np.testing.assert_allclose(got, least_squares(x, w, lost), atol=1e-9)
    # W[:, q] - W[:, p] inv(Hinv[p, p]) Hinv[p, q]
    h = x.T @ x
    inverse = np.linalg.inv(h + DAMPING * np.mean(np.diag(h)) * np.eye(len(h)))
    kept = [i for i in range(9) if i not in lost]
    expected = np.zeros_like(w)
    expected[:, kept] = (
        w[:, kept] - w[:, lost] @ np.linalg.inv(inverse[np.ix_(lost, lost)]) @ inverse[np.ix_(lost, kept)]
    )
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_inputs_that_were_always_zero_change_nothing():
    x, w = problem()
    h = x.T @ x
    padded, wide = np.zeros((12, 12)), np.concatenate([w, np.ones((5, 3))], axis=1)
    padded[:9, :9] = h
    got = compensated(torch.from_numpy(wide), torch.from_numpy(padded), torch.tensor([2, 5])).numpy()
    np.testing.assert_allclose(got[:, :9], least_squares(x, w, [2, 5]), atol=1e-9)
    assert (got[:, 9:] == 1).all()


def test_matrices_that_cannot_be_solved_are_refused():
    bad = -torch.eye(4)
    with pytest.raises(CalibrationError, match="positive definite"):
        compensated(torch.ones(2, 4), bad, torch.tensor([0]))


@pytest.mark.parametrize("groups", [[[0], [4], [8]], [[0, 1, 2], [3, 8, 4], [5, 6, 7]]])
def test_unexplained_is_what_the_update_leaves_of_the_error(groups):
    """Of the squared change of the outputs, with the ridge that the update has, by least squares for each group."""
    x, w = problem()
    h = x.T @ x
    ridge = DAMPING * np.mean(np.diag(h))
    got = unexplained(torch.from_numpy(h), torch.tensor(groups)).numpy()
    for matrix, lost in zip(got, groups, strict=True):
        new = least_squares(x, w, lost)
        kept = [i for i in range(9) if i not in lost]
        for row, updated in zip(w, new, strict=True):
            left = np.sum((x @ (updated - row)) ** 2) + ridge * np.sum((updated - row)[kept] ** 2)
            assert row[lost] @ matrix @ row[lost] == pytest.approx(left, rel=1e-9)


@pytest.mark.parametrize("groups", [[[i] for i in range(9)], [[0, 1, 2], [3, 8, 4], [5, 6, 7]]])
def test_removal_costs_are_those_of_one_group_after_the_other(groups):
    x, w = problem()
    x[:, 4] = x[:, 7] + 0.01 * x[:, 4]  # can stand in for each other: one is cheap, and the other dear then
    importance = np.random.default_rng(1).uniform(0.1, 2.0, len(w))
    order, costs = naive.surgeon(w, x.T @ x, importance, groups)
    got = removal_costs(*map(torch.from_numpy, (w, x.T @ x)), torch.tensor(groups), torch.from_numpy(importance))
    np.testing.assert_allclose(got.numpy()[order], costs, rtol=1e-9)
    if len(groups) == 9:
        assert (order[0] in (4, 7), *costs[:1]) == (True, pytest.approx(costs.min()))
        assert {4, 7} - set(order[:3].tolist())
    # In parts, which are judged anew each, the cheapest part is the same, and all costs ascend.
    halves = removal_costs(
        *map(torch.from_numpy, (w, x.T @ x)), torch.tensor(groups), torch.from_numpy(importance), steps=2
    ).numpy()
    first = np.argsort(halves)[0]
    assert first == order[0]
    assert halves[first] == pytest.approx(costs[0])


def test_removal_costs_of_inputs_that_were_always_zero_are_zero():
    x, w = problem()
    padded, wide = np.zeros((12, 12)), np.concatenate([w, np.ones((len(w), 3))], 1)
    padded[:9, :9] = x.T @ x
    got = removal_costs(
        torch.from_numpy(wide), torch.from_numpy(padded), torch.arange(12)[:, None], torch.ones(len(w))
    ).numpy()
    np.testing.assert_allclose(got[9:], 0, atol=1e-9)
    order, costs = naive.surgeon(w, x.T @ x, np.ones(len(w)), [[i] for i in range(9)])
    np.testing.assert_allclose(got[order], costs, rtol=1e-9)
    with pytest.raises(CalibrationError, match="positive definite"):
        removal_costs(torch.ones(2, 4), -torch.eye(4), torch.tensor([[0]]), torch.ones(2))


def test_unexplained_leaves_out_what_was_always_zero():
    x, _ = problem()
    padded = np.zeros((12, 12))
    padded[:9, :9] = x.T @ x
    got = unexplained(torch.from_numpy(padded), torch.tensor([[1, 2, 10], [9, 10, 11]])).numpy()
    expected = unexplained(torch.from_numpy(x.T @ x), torch.tensor([[1, 2]])).numpy()
    np.testing.assert_allclose(got[0, :2, :2], expected[0], rtol=1e-9)
    np.testing.assert_allclose(got[0, 2], 0, atol=1e-9)
    np.testing.assert_allclose(got[1], 0, atol=1e-9)
    with pytest.raises(CalibrationError, match="positive definite"):
        unexplained(-torch.eye(4), torch.tensor([[0]]))


REMOVAL = {"attention": [[0], [1], [2]], "ffn": [[1, 5]] * 3, "hidden": [0, 7, 30]}


@pytest.mark.parametrize("name", ["mistral", "gpt2", "llama"])
def test_every_layer_that_loses_inputs_is_fitted(name):
    model = zoo.make(name).double()
    structure = read_structure(model)
    removal = {**REMOVAL, "attention": [[0, 1], [2, 3], [4, 5]]} if name == "gpt2" else REMOVAL
    gone = {"attention": [range(i * 2 * 8, (i + 1) * 2 * 8) for i in range(3)], "ffn": [[1, 5]] * 3}
    if name == "gpt2":
        layers, attention, ffn, hidden = "transformer.h", "attn.c_proj", "mlp.c_proj", ("attn.c_attn", "mlp.c_fc")
    else:
        layers, attention, ffn, hidden = "model.layers", "self_attn.o_proj", "mlp.down_proj", zoo.LLAMA_READERS
    lost = {f"{layers}.{i}.{n}": [0, 7, 30] for i in range(3) for n in hidden}
    lost |= {f"{layers}.{i}.{attention}": list(gone["attention"][i]) for i in range(3)}
    lost |= {f"{layers}.{i}.{ffn}": [1, 5] for i in range(3)}
    if name == "mistral":
        lost["lm_head"] = [0, 7, 30]  # those of the others are tied to the embedding
    inputs = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: inputs.update({n: args[0].flatten(0, 1)}))
        for n in lost
    ]
    ids = torch.randint(61, (9, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    observed = observed_layers(structure, ("attention", "ffn", "hidden"))
    assert set(observed) == set(lost)
    for n, seen in observed.items():  # layers that share a Hessian do see the same inputs
        assert torch.equal(inputs[n], inputs[seen])
    assert len(set(observed.values())) == (3 * 4 + (name == "mistral"))
    moments = {n: inputs[seen].t() @ inputs[seen] for n, seen in observed.items()}
    before = snapshot(model)
    old = {n: naive.matrix(model.get_submodule(n), model.get_submodule(n).weight).copy() for n in lost}
    checked = check_removal(structure, removal)
    weights = compensation(structure, checked, moments)
    assert snapshot(model) == before
    assert set(weights) == {f"{n}.weight" for n in lost}
    compensate(structure, checked, moments)
    for n, columns in lost.items():
        linear = model.get_submodule(n)
        expected = least_squares(inputs[n].numpy(), old[n], columns)
        np.testing.assert_allclose(naive.matrix(linear, linear.weight), expected, atol=1e-8, err_msg=n)
        assert torch.equal(weights[f"{n}.weight"], linear.weight)
