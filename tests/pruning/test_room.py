"""Where a batch does not fit it is run in pieces, or with blocks that are recomputed, and nothing is counted twice."""

from __future__ import annotations

import copy

import naive
import pytest
import torch
from batch_models import build
from experts_models import make_moe
from tiny import BLOCKS, LAYERS, make_llama, make_tokens, snapshot
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import ALL_STATISTICS, HESSIAN, INPUT_NORM, OUTPUT_GRAD_NORM
from lightning_prune.pruning.targets import find_targets

IDS = make_tokens(8, 6)
LAST = "model.layers.1.mlp.down_proj"


def refuse() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


class Short:
    """A device on which a layer does not take more than so many tokens at once, and what was tried there."""

    def __init__(self, layer: nn.Module, tokens: int, where: str) -> None:
        self.tokens, self.where, self.tried = tokens, where, []
        layer.register_forward_pre_hook(self.before)
        layer.register_forward_hook(self.after)

    def before(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.tried.append(args[0].shape[:-1].numel())
        if self.where == "forward" and self.tried[-1] > self.tokens:
            refuse()

    def after(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self.where == "backward" and output.requires_grad and self.tried[-1] > self.tokens:
            output.register_hook(lambda _: refuse())


@pytest.fixture(scope="module")
def expected():
    model = make_llama().double()
    return model, naive.statistics(model, [{"input_ids": row[None]} for row in IDS], LAYERS)


def check(found, expected, statistics):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].samples == len(IDS)
        for statistic in statistics:
            value = torch.from_numpy(values[statistic])
            torch.testing.assert_close(getattr(found[name], statistic), value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [12, 6])
@pytest.mark.parametrize(
    ("statistics", "where"),
    [
        ({INPUT_NORM}, "forward"),
        ({HESSIAN}, "forward"),
        ({INPUT_NORM, OUTPUT_GRAD_NORM}, "forward"),
        ({INPUT_NORM, OUTPUT_GRAD_NORM}, "backward"),
        (ALL_STATISTICS, "backward"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value)),
)
def test_pieces_give_the_statistics_of_the_naive_loop(expected, statistics, where, tokens):
    model, values = make_llama().double(), expected[1]
    # Others have been seen by then: those before it in the forward pass, those behind it in the backward pass.
    short = Short(model.get_submodule(LAST if where == "forward" else "model.layers.0.mlp.up_proj"), tokens, where)
    with pytest.warns(UserWarning, match=rf"batches of \d samples ran in pieces of {tokens // 6}.*are the same"):
        found = collect(model, [{"input_ids": IDS}], find_targets(model), statistics, num_samples=8)
    check(found, values, statistics)
    assert short.tried[-8 // (tokens // 6) :] == [tokens] * (8 // (tokens // 6))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_longer_batches_that_come_later(expected, where):
    model = make_llama().double()
    short = Short(model.get_submodule(LAST), 12, where)
    batches = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:5]}, {"input_ids": IDS[5:]}]
    statistics = {INPUT_NORM, OUTPUT_GRAD_NORM}
    with pytest.warns(UserWarning, match="pieces of 2"):
        found = collect(model, batches, find_targets(model), statistics, num_samples=8)
    check(found, expected[1], statistics)
    assert short.tried.count(24) == 1  # the third batch is divided before it is tried
    assert 18 not in short.tried


def test_what_has_been_added_to_sums_of_other_batches_is_not_counted_twice():
    model = make_llama()
    Short(model.get_submodule(LAST), 12, "forward")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(torch.OutOfMemoryError, match=r"while pruning.*sequential=True"):
        prune(model, [IDS[:1], IDS[1:]], "sparsegpt", num_samples=8)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def contrastive(model, batch):
    """One loss a sample, of which each needs the others."""
    hidden = nn.functional.normalize(model.model(input_ids=batch["input_ids"]).last_hidden_state.mean(1), dim=1)
    return -torch.log_softmax(hidden @ hidden.t(), 1).diagonal()


def whole(model, batch):
    return contrastive(model, batch).mean()


def alone(model, batch):
    return model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))


@pytest.mark.filterwarnings("ignore:the loss of a calibration batch cannot be taken apart")
@pytest.mark.parametrize("score", ["kfac", "gblm"])
@pytest.mark.parametrize("loss", [contrastive, whole])
def test_a_loss_of_the_whole_batch_is_not_divided(loss, score):
    model = make_llama()
    Short(model.get_submodule(LAST), 24, "backward")
    with pytest.raises(torch.OutOfMemoryError, match="smaller calibration batches"):
        prune(model, [{"input_ids": IDS}], score, num_samples=8, loss_fn=loss)


def test_a_loss_of_ones_own_is_divided_if_each_sample_has_its_own():
    model = make_llama().double()
    targets, statistics = find_targets(model), {INPUT_NORM, OUTPUT_GRAD_NORM}
    wanted = collect(model, [{"input_ids": IDS}], targets, statistics, num_samples=8, loss_fn=alone)
    Short(model.get_submodule(LAST), 24, "backward")
    with pytest.warns(UserWarning, match="pieces of 4"):
        found = collect(model, [{"input_ids": IDS}], targets, statistics, num_samples=8, loss_fn=alone)
    for name in wanted:
        for statistic in statistics:
            torch.testing.assert_close(found[name].get(statistic), wanted[name].get(statistic), rtol=1e-10, atol=0)


@pytest.mark.parametrize("size", [1, 8])
def test_blocks_are_recomputed_where_one_sample_does_not_fit(expected, size):
    model = make_llama().double()
    first = model.model.layers[0]

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if "forward" not in vars(first):  # it holds all activations
            refuse()

    model.get_submodule(LAST).register_forward_pre_hook(before)
    batches = [{"input_ids": part} for part in IDS.split(size)]
    with pytest.warns(UserWarning, match="blocks ran again in the backward pass; the statistics are the same"):
        found = collect(model, batches, find_targets(model), ALL_STATISTICS, num_samples=8)
    check(found, expected[1], ALL_STATISTICS)
    assert "forward" not in vars(first)


def test_experts_in_pieces():
    model, ids = make_moe("mixtral"), IDS % 32
    targets, statistics = find_targets(model), {INPUT_NORM, OUTPUT_GRAD_NORM}
    wanted = collect(model, [{"input_ids": ids}], targets, statistics, num_samples=8)
    Short(model.model.layers[1].self_attn.q_proj, 24, "backward")
    with pytest.warns(UserWarning, match="pieces of 4"):
        found = collect(model, [{"input_ids": ids}], targets, statistics, num_samples=8)
    for name in wanted:
        for statistic in statistics:
            torch.testing.assert_close(found[name].get(statistic), wanted[name].get(statistic), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("error:the loss of a calibration batch cannot be taken apart")
@pytest.mark.parametrize("samples", [4, 2])
def test_the_first_look_at_a_scalar_loss_takes_as_many_samples_as_fit(expected, samples):
    model = make_llama().double()
    short = Short(model.get_submodule(LAST), 6 * samples, "forward")
    statistics = {INPUT_NORM, OUTPUT_GRAD_NORM}
    found = collect(model, [{"input_ids": IDS}], find_targets(model), statistics, num_samples=8, loss_fn=mean_loss)
    check(found, expected[1], statistics)
    assert short.tried[0] == 12  # two samples, and then the largest number of them that fits
    assert max(short.tried[short.tried.index(6 * samples, 1) :]) == 6 * samples
    assert short.tried[-8:] == [6] * 8


def mean_loss(model, batch):
    logits = model(**batch).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


# -- block by block ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "most", "pieces"),
    [("model.embed_tokens", 3, 2), ("model.embed_tokens", 1, 1), ("model.layers.0.mlp.down_proj", 12, 2), (LAST, 6, 1)],
)
def test_a_walk_in_pieces_chooses_what_the_naive_loop_does(layer, most, pieces):
    def prune_layer(_, weight, statistics):
        mask = naive.masks({"w": naive.score("wanda", weight, statistics)}, 0.5, "row")["w"]
        return weight * mask, mask

    model = make_llama().double()
    _, masks = naive.sequential(model, [{"input_ids": row[None]} for row in IDS], BLOCKS, prune_layer)
    Short(model.get_submodule(layer), most, "forward")
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = ({"input_ids": part} for part in IDS.split([1, 4, 3]))  # read once
    with pytest.warns(UserWarning, match=f"ran in pieces of {pieces}") as caught:
        found = prune(model, batches, "wanda", sequential=True, num_samples=8)
    assert len([w for w in caught if "memory was short" in str(w.message)]) == 1
    for name, mask in found.items():
        assert torch.equal(mask, torch.from_numpy(masks[name]))
        assert torch.equal(model.get_parameter(name), before[name] * mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("score", "settings"),
    [("sparsegpt", {}), ("wanda", {"update": "exact"}), ("gblm", {}), ("kfac", {"update": "alps"})],
)
def test_a_walk_in_pieces_gives_the_weights_of_a_whole_one(score, settings):
    model = make_llama().double()
    whole = copy.deepcopy(model)
    expected = prune(whole, [IDS], score, sequential=True, num_samples=8, **settings)
    Short(model.get_submodule(LAST), 12, "forward")
    with pytest.warns(UserWarning, match="ran in pieces of 2"):
        found = prune(model, [IDS], score, sequential=True, num_samples=8, **settings)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, whole.get_parameter(name), rtol=1e-6, atol=1e-9)


def test_a_walk_of_two_stacks_in_pieces():
    model = build("t5").double()
    whole, targets = (
        copy.deepcopy(model),
        [name for name, _ in model.named_modules() if name.endswith("SelfAttention.v")],
    )
    batch = {"input_ids": IDS % 32 + 1, "labels": IDS[:, :4] % 32 + 1}
    how = {"sequential": True, "num_samples": 8, "update": "exact"}
    expected = prune(whole, [batch], "wanda", **how)
    Short(model.get_submodule(targets[-1]), 8, "forward")  # of the decoder, when the encoder has been pruned
    with pytest.warns(UserWarning, match="batches of 8 samples ran in pieces of 2"):
        found = prune(model, [batch], "wanda", **how)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("batch", [{"input_ids": IDS}, {"input_ids": IDS, "of_no_sample": torch.zeros(3)}])
def test_a_walk_that_pieces_do_not_help_changes_nothing(batch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.llama = make_llama()
            self._no_split_modules = self.llama._no_split_modules

        def forward(self, input_ids, **_):
            return self.llama(input_ids)

    model = Model()
    Short(model.llama.get_submodule(LAST), 3, "forward")
    before = snapshot(model)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory.*while pruning.*smaller calibration batches"):
        prune(model, [batch], "wanda", update="exact", sequential=True, num_samples=8)
    assert snapshot(model) == before
