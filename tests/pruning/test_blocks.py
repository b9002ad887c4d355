"""Block by block, against a naive loop that runs the whole, partly pruned model for every block."""

import copy
import math
import random

import naive
import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from tiny import BLOCKS, LAYERS, make_llama, make_tokens, snapshot
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from lightning_prune import CalibrationError, prune
from lightning_prune.perp import reconstruct
from lightning_prune.pruning.blocks import BlockWalk, Samples
from lightning_prune.ranks import Ranks
from lightning_prune.safety import Originals


def select(score, group, sparsity, nm):
    if nm is not None:
        return naive.nm_mask(score, *nm)
    return next(iter(naive.masks({"w": score}, sparsity, group).values()))


def close_masks(found, expected):
    total = sum(m.size for m in expected.values())
    differ = sum(int((found[n].numpy() != expected[n]).sum()) for n in expected)
    assert all(int(found[n].sum()) == expected[n].sum() for n in expected)
    assert differ <= 2e-4 * total, differ


@pytest.mark.parametrize("name", ["wanda", "gblm", "kfac"])
@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_scores_see_the_outputs_of_pruned_blocks(reference, name, nm):
    group = "row" if name != "kfac" else "layer"

    def prune_layer(layer, weight, statistics):
        dense = reference.statistics[layer + ".weight"]
        both = {**dense, **statistics}  # gradients from the dense model, activations from the pruned one
        mask = select(naive.score(name, weight, both), group, 0.6, nm)
        return weight * mask, mask

    samples = [{"input_ids": row[None]} for row in reference.ids]
    _, expected = naive.sequential(reference.model, samples, BLOCKS, prune_layer)
    model = copy.deepcopy(reference.model)
    how = {"pattern": "2:4"} if nm else {"sparsity": 0.6, "allocation": "uniform"}
    batches = [{"input_ids": reference.ids[:2]}, {"input_ids": reference.ids[2:]}]
    found = prune(model, batches, name, sequential=True, num_samples=5, **how)
    close_masks(found, expected)
    assert list(found) == list(LAYERS)
    for layer in LAYERS:
        mask = found[layer]
        assert torch.equal(model.get_parameter(layer), torch.from_numpy(reference.weights[layer]) * mask)
    # The second block must have seen the first one pruned.
    if name == "wanda":
        single = prune(copy.deepcopy(reference.model), batches, name, num_samples=5, **how)
        assert all(torch.equal(single[n], found[n]) for n in list(LAYERS)[:3])
        assert not all(torch.equal(single[n], found[n]) for n in list(LAYERS)[7:])


@pytest.mark.parametrize("nm", [None, (2, 4), (1, 4)])
def test_sparsegpt(reference, nm):
    def prune_layer(layer, weight, statistics):
        return naive.sparsegpt(weight, statistics["hessian"], sparsity=0.5, nm=nm)

    samples = [{"input_ids": row[None]} for row in reference.ids]
    expected_model, expected = naive.sequential(reference.model, samples, BLOCKS, prune_layer)
    model = copy.deepcopy(reference.model)
    how = {"pattern": "{}:{}".format(*nm)} if nm else {"sparsity": 0.5}
    found = prune(model, [reference.ids], "sparsegpt", sequential=True, num_samples=5, **how)
    close_masks(found, expected)
    for layer in LAYERS:
        weight, wanted = model.get_parameter(layer), expected_model.get_parameter(layer)
        same = torch.from_numpy(expected[layer]) == found[layer]
        difference = (weight - wanted)[same].abs().max() / wanted.abs().max()
        assert difference < 2e-2, (layer, float(difference))  # float32 Hessians of few tokens
        assert (weight[~found[layer]].view(torch.int64) == 0).all()
    assert error_of(reference, model) < 1.001 * error_of(reference, expected_model)


def error_of(reference, model):
    with torch.no_grad():
        return float((model(reference.ids).logits - reference.model(reference.ids).logits).square().mean())


@pytest.mark.parametrize("name", ["wanda", "magnitude", "kfac"])
def test_update_on_the_mask_of_any_score(reference, name):
    masks = {}

    def prune_layer(layer, weight, statistics):
        both = {**reference.statistics[layer + ".weight"], **statistics}
        group = "row" if name == "wanda" else "layer"
        masks[layer] = select(naive.score(name, weight, both), group, 0.5, None)
        return naive.sparsegpt(weight, statistics["hessian"], mask=masks[layer])

    samples = [{"input_ids": row[None]} for row in reference.ids]
    expected_model, expected = naive.sequential(reference.model, samples, BLOCKS, prune_layer)
    model, masked = copy.deepcopy(reference.model), copy.deepcopy(reference.model)
    how = {"score": name, "sparsity": 0.5, "allocation": "uniform", "sequential": True, "num_samples": 5}
    found = prune(model, [reference.ids], update="obs", **how)
    close_masks(found, expected)
    assert error_of(reference, model) == pytest.approx(error_of(reference, expected_model), rel=0.05)
    with torch.no_grad():
        for layer, mask in found.items():
            masked.get_parameter(layer).mul_(mask)
    assert error_of(reference, model) < error_of(reference, masked)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(side):
    model = make_llama().double()
    lengths = [10, 4, 7]
    ids, mask, samples = torch.full((3, 10), 5), torch.zeros(3, 10, dtype=torch.long), []
    for i, length in enumerate(lengths):
        row = make_tokens(1, length, seed=i)
        where = slice(0, length) if side == "right" else slice(10 - length, 10)
        ids[i, where], mask[i, where] = row[0], 1
        samples.append({"input_ids": row})

    def prune_layer(layer, weight, statistics):
        kept = naive.row_mask(naive.score("wanda", weight, statistics), weight.shape[0] * (weight.shape[1] // 2))
        return weight * kept, kept

    _, expected = naive.sequential(model, samples, BLOCKS, prune_layer)
    found = prune(model, [{"input_ids": ids, "attention_mask": mask}], "wanda", sequential=True, num_samples=3)
    close_masks(found, expected)


@pytest.mark.parametrize("update", [None, "obs"])
@pytest.mark.parametrize("split", [[5], [1, 1, 1, 1, 1], [2, 3]])
def test_batch_sizes_do_not_matter(reference, split, update):
    whole, parts = copy.deepcopy(reference.model), copy.deepcopy(reference.model)
    how = {"score": "wanda", "sequential": True, "num_samples": 5, "update": update}
    first = prune(whole, [reference.ids], **how)
    second = prune(parts, list(reference.ids.split(split)), **how)
    close_masks(first, {n: m.numpy() for n, m in second.items()})


def test_generators_serve_scores_that_need_one_walk(reference):
    found = prune(
        copy.deepcopy(reference.model), (b for b in reference.ids.split(1)), "wanda", sequential=True, num_samples=5
    )
    again = prune(copy.deepcopy(reference.model), reference.ids.split(1), "wanda", sequential=True, num_samples=5)
    assert all(torch.equal(found[n], again[n]) for n in found)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "qwen3", "pythia"])
def test_other_families(family):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    name, settings = {
        "gpt2": ("gpt2", {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        "opt": ("opt", {**small, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}),
        "gemma2": ("gemma2", {**small, "num_key_value_heads": 2, "head_dim": 8}),
        "qwen3": ("qwen3", {**small, "num_key_value_heads": 2, "head_dim": 8}),
        "pythia": ("gpt_neox", small),
    }[family]
    settings = {**settings, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.2}
    torch.manual_seed(1)  # no near tie whose side rounding decides
    config = CONFIG_MAPPING[name](**{k: v for k, v in settings.items() if k != "initializer_range" or family != "opt"})
    model, ids = AutoModelForCausalLM.from_config(config).double(), make_tokens(3, 9, 60) + 2
    layers = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    layers = [n for n in layers if model.get_submodule(n) is not model.get_output_embeddings()]
    blocks = [[n for n in layers if f".{i}." in n] for i in range(2)]
    assert sum(map(len, blocks)) == len(layers)

    def prune_layer(layer, weight, statistics):
        module = model.get_submodule(layer)
        values = naive.matrix(module, torch.from_numpy(weight))
        kept = naive.row_mask(naive.score("wanda", values, statistics), values.shape[0] * (values.shape[1] // 2))
        kept = kept.T if type(module).__name__ == "Conv1D" else kept
        return weight * kept, kept

    before = copy.deepcopy(model)
    _, expected = naive.sequential(before, [{"input_ids": row[None]} for row in ids], blocks, prune_layer)
    found = prune(model, [ids], "wanda", sequential=True, num_samples=3)
    close_masks(found, expected)


# -- what stays as it was --------------------


def test_a_forward_that_was_set_on_a_block_stays():
    """accelerate's hooks (device_map) replace the forward of module instances."""
    model, calls = make_llama(), []
    for i, block in enumerate(model.model.layers):

        def wrapped(*args, original=block.forward, index=i, **kwargs):
            calls.append(index)
            return original(*args, **kwargs)

        block.forward = wrapped
    own = [block.forward for block in model.model.layers]
    prune(model, [make_tokens(2, 8)], "wanda", sequential=True, num_samples=2)
    assert [block.forward for block in model.model.layers] == own
    assert set(calls) == {0, 1}
    calls.clear()
    model(make_tokens(1, 4))
    assert calls == [0, 1]


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_blocks_that_add_to_a_prefix_of_keys_and_values(score):
    """Each run of a block has the prefix alone before it, and not what the runs before have added."""
    model = get_peft_model(make_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    samples = [{"input_ids": make_tokens(1, 8, seed=seed)} for seed in range(3)]

    def prune_layer(layer, weight, statistics):
        if score == "sparsegpt":
            return naive.sparsegpt(weight, statistics["hessian"], sparsity=0.5)
        mask = select(naive.score(score, weight, statistics), "row", 0.5, None)
        return weight * mask, mask

    layers = [[f"base_model.{name}" for name in block] for block in BLOCKS]
    _, expected = naive.sequential(model, samples, layers, prune_layer)
    found = prune(model, samples, score, sequential=True, num_samples=3, progress=False)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].numpy(), mask) for name, mask in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(whole):
    model, ids = make_llama(), make_tokens(2, 8)
    expected = prune(copy.deepcopy(model), [ids], "wanda", sequential=True, num_samples=2)
    if whole:
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        for i in range(2):
            model.model.layers[i] = torch.compile(model.model.layers[i], backend="eager")
    found = prune(compiled, [ids], "wanda", sequential=True, num_samples=2)
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert torch.isfinite(compiled(ids).logits).all()


# Of two batches, block 0 runs once to be recorded, twice to be compared, twice to be seen, twice when it is pruned;
# block 1 four times.
@pytest.mark.parametrize(
    "where",
    [(0, 1, False), (0, 2, False), (0, 4, False), (0, 7, True), (1, 2, False), (1, 3, True), (1, 4, True), "loader"],
    ids=str,
)
@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_an_interrupt_during_the_walk_restores_everything(where, score):
    model, ids = make_llama().train(), make_tokens(4, 8)
    before, state = snapshot(model), torch.get_rng_state()
    calls, pruned = [], []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == where[1]:
            pruned.append(bool((model.model.layers[0].mlp.up_proj.weight == 0).any()))
            raise KeyboardInterrupt

    def batches():
        yield ids[:2]
        if where == "loader":
            raise KeyboardInterrupt
        yield ids[2:]

    handle = None if where == "loader" else model.model.layers[where[0]].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(model, batches(), score, sequential=True, num_samples=4)
    if handle is not None:
        handle.remove()
        # A score that only masks puts the weights of a block back behind the walk.
        assert pruned == [where[2] and (where[0] == 0 or score == "sparsegpt")]
    assert snapshot(model) == before
    assert model.training
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in model.model.layers[0].__dict__
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# -- what is refused --------------------


class Blocks(nn.Module):
    """A model of blocks that run in a given order."""

    _no_split_modules = ("Block",)

    def __init__(self, order):
        super().__init__()

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(6, 6)

            def forward(self, hidden_states):
                return torch.tanh(self.linear(hidden_states))

        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.order = order

    def forward(self, x):
        for i in self.order:
            x = self.blocks[i](hidden_states=x) if i else self.blocks[i](x)
        return x


def test_blocks_called_by_keyword():
    torch.manual_seed(0)
    model, data = Blocks([0, 1, 2]), torch.randn(4, 3, 6)
    weights = [b.linear.weight.detach().clone() for b in model.blocks]
    found = prune(model, [data[:1], data[1:]], "wanda", sequential=True, num_samples=4)
    x = data.double()
    for i, weight in enumerate(weights):
        norm = (x.flatten(0, 1).square().sum(0) / 4).sqrt().numpy()
        expected = naive.row_mask(naive.score("wanda", weight.double().numpy(), {"input_norm": norm}), 18)
        np.testing.assert_array_equal(found[f"blocks.{i}.linear.weight"].numpy(), expected)
        linear = model.blocks[i].linear
        assert torch.equal(linear.weight, weight * found[f"blocks.{i}.linear.weight"])
        x = torch.tanh(x @ linear.weight.detach().double().t() + linear.bias.detach().double())


class Other(nn.Module):
    """A block with another name for its hidden states, as PatchTST's, and something beside them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, hidden_state, scale):
        return (scale * torch.tanh(self.linear(hidden_state)),)


class Stack(nn.Module):
    def __init__(self, run, block=Other):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.run = nn.ModuleList(block() for _ in range(3)), run

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x


@pytest.mark.parametrize("how", [{}, {"train": "all", "window": "half"}], ids=["adapters", "all"])
def test_blocks_with_another_keyword_for_their_input(how):
    model, data = Stack(lambda block, x: block(hidden_state=x, scale=1.5)[0]), torch.randn(4, 3, 6)
    expected = by_hand(model, data)
    dense = copy.deepcopy(model)
    found = prune(model, [data], "wanda", sequential=True, num_samples=4, progress=False)
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
    before = (model(data) - dense(data)).norm()
    reconstruct(model, [data], dense=dense, num_samples=4, steps=40, seed=0, progress=False, **how)
    assert (model(data) - dense(data)).norm() < before


DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),
    "python": random.random,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("times", [1, 2])
def test_a_loss_that_draws_at_random_is_compared_with_the_same_numbers(times, draw):
    """It masks tokens, or adds noise: two passes on a batch give the blocks other inputs."""
    model, scales = Stack(lambda block, x: block(hidden_state=x, scale=1.5)[0]), []

    def loss(model, batch):
        for _ in range(times):
            scales.append(1 + draw())
            model(scales[-1] * batch)

    prune(model, [torch.randn(4, 3, 6)], "wanda", sequential=True, num_samples=4, loss_fn=loss, progress=False)
    assert len(set(scales)) == times
    assert len(scales) > times


class Pair(nn.Module):
    """Two streams, as Reformer's, or a bias that all blocks share, as T5's."""

    def __init__(self):
        super().__init__()
        self.linear, self.back = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, other):
        if other is None:
            other = torch.ones(3, 1)
        if other.shape == x.shape:
            other = other + torch.tanh(self.linear(x))
            return x + torch.tanh(self.back(other)), other
        return self.back(torch.tanh(self.linear(x) + other)), other


def test_blocks_with_a_second_stream_are_refused():
    def streams(shared):
        def forward(self, x):
            other = None if shared else x
            for block in self.blocks:
                x, other = block(x, other)
            return x

        return type("Streams", (Stack,), {"forward": forward})(None, Pair)

    data = torch.randn(4, 3, 6)
    model = streams(True)
    expected = by_hand(model, data)
    found = prune(model, [data], "wanda", sequential=True, num_samples=4, progress=False)
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
    with pytest.raises(CalibrationError, match=r"the 3 Pair modules .* computes something between them"):
        prune(streams(False), [data], "wanda", sequential=True, num_samples=4, progress=False)


def test_blocks_that_return_something_else_are_refused():
    class Named(Other):  # as SqueezeBERT's
        def forward(self, x):
            return {"map": torch.tanh(self.linear(x))}

    model = Stack(lambda block, x: block(x)["map"], Named)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"block 0 returns a dict, no tensor.*sequential=False"):
        prune(model, [torch.randn(4, 3, 6)], "wanda", sequential=True, num_samples=4, progress=False)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    dense = copy.deepcopy(model)
    prune(model, score="magnitude", progress=False)
    with pytest.raises(CalibrationError, match=r"block 0 returns a dict, .*; leave reconstruct out, and train"):
        reconstruct(model, [torch.randn(4, 3, 6)], dense=dense, num_samples=4, steps=1, progress=False)


def by_hand(model, data, stack="blocks", **how):
    """Masks of wanda, each block's with statistics of a sweep of its own through the whole, partly pruned model."""
    model, found = copy.deepcopy(model), {}
    for i in range(len(model.get_submodule(stack))):
        found |= prune(model, [data], "wanda", targets=[f"{stack}.{i}"], num_samples=len(data), progress=False, **how)
    return found


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates")
@pytest.mark.parametrize("returns", [lambda x: x, lambda x: [x, None]], ids=["tensor", "list"])
def test_a_block_may_change_its_input_in_place(returns):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, hidden_states):
            hidden_states += torch.tanh(self.linear(hidden_states))
            return returns(hidden_states)

    class Model(nn.Module):
        _no_split_modules = ("Block",)

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            x = x.clone()
            for block in self.blocks:
                output = block(x)
                x = output[0] if isinstance(output, list) else output
            return x

    torch.manual_seed(0)
    model, data = Model(), torch.randn(4, 3, 6)
    expected = by_hand(model, data)
    found = prune(model, [data], "wanda", sequential=True, num_samples=4, progress=False)
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())


# -- models that do not name their blocks --------------------


class Unnamed(nn.Module):
    """Blocks that no `_no_split_modules` names, and what is done between them."""

    def __init__(self, between, kind=nn.ModuleList):
        super().__init__()
        self.between = between
        parts = (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(3))
        self.blocks = kind(*parts) if kind is nn.Sequential else kind(parts)

    def forward(self, x):
        if isinstance(self.blocks, nn.Sequential):
            return self.blocks(x)
        for block in self.blocks:
            x = self.between(x, block)
        return x


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates")
@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_modules_of_one_class_that_feed_each_other_are_blocks(kind):
    torch.manual_seed(0)
    model, data = Unnamed(lambda x, block: block(x), kind), torch.randn(4, 3, 6)
    expected = by_hand(model, data)
    found = prune(copy.deepcopy(model), [data[:1], data[1:]], "wanda", sequential=True, num_samples=4, progress=False)
    dense = prune(copy.deepcopy(model), [data], "wanda", num_samples=4, progress=False)
    assert list(found) == list(expected)
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
    assert any(not torch.equal(mask, dense[name]) for name, mask in found.items())
    updated = prune(model, [data], "wanda", sequential=True, update="exact", num_samples=4, progress=False)
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in updated.items())


def preference(model, pair):
    """Two runs of the model on each sample, ``[B, 2, T, D]``."""
    return -torch.nn.functional.logsigmoid((model(pair[:, 0]) - model(pair[:, 1])).flatten(1).sum(1))


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates")
@pytest.mark.parametrize("named", [True, False])
def test_a_loss_that_runs_the_blocks_on_two_texts_counts_both(named):
    torch.manual_seed(0)
    model = (Named if named else Unnamed)(lambda x, block: block(x))
    data = torch.randn(6, 2, 3, 6)
    data[:, 1] *= torch.tensor([3.0, 1, 0.2, 1, 2, 0.5])  # of which the first text knows nothing
    how = {"loss_fn": preference, "progress": False, "num_samples": 6}
    expected = by_hand(model, data, loss_fn=preference)
    found = prune(copy.deepcopy(model), [data[:2], data[2:]], "wanda", sequential=True, **how)
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
    chosen = by_hand(model, data, loss_fn=lambda model, pair: preference(model, pair[:, [0, 0]]))
    assert any(not torch.equal(mask, chosen[name]) for name, mask in found.items())
    # A sample counts once: norms beside gradients are as large as in one sweep.
    walked, swept = (
        prune(copy.deepcopy(model), [data], "gblm", sequential=sequential, alpha=3.0, **how)
        for sequential in (True, False)
    )
    assert all(torch.equal(walked[name], swept[name]) for name in list(found)[:2])
    updated = prune(model, [data], "kfac", sequential=True, update="exact", **how)
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in updated.items())


class Tasks(nn.Module):
    """Some batches have a second text, which runs through the same blocks."""

    def __init__(self):
        super().__init__()
        self.inner = Unnamed(lambda x, block: block(x))

    def forward(self, text, other=None):
        return self.inner(text) if other is None else self.inner(text) + self.inner(other)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates")
def test_batches_of_another_form_run_the_blocks_more_often(listed):
    torch.manual_seed(0)
    model, one, two = Tasks(), torch.randn(1, 3, 6), torch.randn(1, 2, 3, 6) * torch.tensor([3.0, 1, 1, 0.2, 1, 1])
    batches = [{"text": one}, {"text": two[:, 0], "other": two[:, 1]}, {"text": two[:, 1], "other": None}]
    loss_fn = None
    if listed:
        batches = [[text for text in batch.values() if text is not None] for batch in batches]
        loss_fn = lambda model, batch: model(*batch).sum()  # noqa: E731
    expected = by_hand(model.inner, torch.cat([one, two[:, 0], two[:, 1], two[:, 1]]))
    found = prune(model, batches, "wanda", sequential=True, num_samples=3, progress=False, loss_fn=loss_fn)
    assert all(torch.equal(mask, expected[name.removeprefix("inner.")]) for name, mask in found.items())


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates")
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, x: model(model(x)).sum((1, 2)), "runs them again on what they gave"),
        (
            lambda model, x: sum(model(x * i).sum((1, 2)) for i in range(1, 2 + len(x))),
            "decoder block 0 ran out of order",
        ),
    ],
    ids=["on their own output", "more often for another batch"],
)
def test_blocks_that_run_again_in_a_way_that_is_not_known(loss, message):
    torch.manual_seed(0)
    model, data = Unnamed(lambda x, block: block(x)), torch.randn(3, 3, 6)
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, [data[:1], data[1:]], "wanda", sequential=True, num_samples=3, loss_fn=loss, progress=False)
    assert snapshot(model) == before


def test_likely_blocks_are_not_tried_on_shards():
    model = Unnamed(lambda x, block: block(x))
    with pytest.raises(ValueError, match=r"sequential=True, but Unnamed names no decoder blocks.*are sharded"):
        prune(model, [torch.randn(4, 3, 6)], "wanda", sequential=True, ranks=Ranks(lockstep=True), progress=False)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda x, block: x + block(x), "the 3 Sequential modules of Unnamed, .* do not give what they give in the"),
        (lambda x, block: torch.relu(block(x)), "do not give what they give in the model"),
        (lambda x, block: block(x).mul_(2), "do not give what they give in the model"),
        (lambda x, block: block(block(x)), "ran out of order"),
        (lambda x, block: x, "only 0 of 3 decoder blocks ran"),
    ],
    ids=["residual", "activation", "in place", "twice", "unused"],
)
def test_modules_of_one_class_that_do_not_are_refused(between, message):
    torch.manual_seed(0)
    model, data = Unnamed(between), torch.rand(4, 3, 6)  # what relu leaves as it is
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, [data], "wanda", sequential=True, num_samples=4, progress=False)
    assert snapshot(model) == before
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


class Named(Unnamed):
    _no_split_modules = ("Sequential",)


@pytest.mark.parametrize(
    "between",
    [
        lambda x, block: torch.relu(block(x)),
        lambda x, block: block(x) + 1 if x.amax() > 5 else block(x),  # as Qwen3-VL does for samples with images
        lambda x, block: block(x.mul_(2) if x.amax() > 5 else x),
    ],
    ids=["activation", "of one sample", "in place, of one sample"],
)
def test_blocks_that_a_model_names_are_compared_too(between):
    torch.manual_seed(0)
    model, data = Named(between), torch.rand(4, 3, 6)
    data[2] += 6
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"the 3 Sequential modules of Named, .* between them; use sequential="):
        prune(model, list(data.split(1)), "wanda", sequential=True, num_samples=4, progress=False)
    assert snapshot(model) == before
    plain = Named(lambda x, block: block(x))
    assert prune(plain, list(data.split(1)), "wanda", sequential=True, num_samples=4, progress=False)


class Deep(Unnamed):
    """Images, made of the inputs, are added again to the hidden states behind the first blocks."""

    _no_split_modules = ("Sequential",)

    def forward(self, x):
        image, x = torch.sin(x[:, :2] * 3), x.clone()
        for block in self.blocks[:2]:
            x = block(x).clone()
            x[:, :2] += image
        return self.blocks[2](x)


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates")
@pytest.mark.parametrize("update", [None, "exact"])
def test_what_is_added_between_blocks_is_added_to_the_outputs_of_pruned_ones(update):
    torch.manual_seed(0)
    model, data = Deep(None), torch.randn(4, 3, 6)
    expected = by_hand(model, data)
    dense = copy.deepcopy(model)
    found = prune(model, list(data.split([1, 3])), "wanda", sequential=True, num_samples=4, progress=False,
                  update=update)  # fmt: skip
    if update is None:
        assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
        swept = prune(dense, [data], "wanda", num_samples=4, progress=False)
        assert any(not torch.equal(mask, swept[name]) for name, mask in found.items())
    offloaded = Samples(model, [data], 4, lambda model, x: model(x), compared=False)
    with pytest.raises(CalibrationError, match="or computes something between them"):
        BlockWalk(offloaded, list(model.blocks))


class Residual(nn.Linear):
    """A block that changes what it is given by much."""

    def forward(self, x):
        return x + 2 * super().forward(x)


class InTuple(Residual):
    def forward(self, x):
        return super().forward(x), x.mean(-1)


class Between(nn.Module):
    """Between two blocks is what is asked for."""

    def __init__(self, block, between):
        super().__init__()
        self.blocks, self.between = nn.ModuleList(block(16, 16) for _ in range(3)), between
        self._no_split_modules = [block.__name__]

    def forward(self, x):
        first = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
            x = x if index == 2 else self.between(x, first)
        return x


def one_token(x, _):
    return torch.cat([x[:, :1] * 1.5, x[:, 1:]], 1)


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [Residual, InTuple])
@pytest.mark.parametrize("between", [one_token, lambda x, _: x * 1.02, lambda x, first: x + torch.sin(first * 3)])
def test_what_is_added_to_a_few_tokens_must_not_depend_on_them(between, block, dtype):
    """It gives almost the same in the end, within what bfloat16 rounds; and blocks that return more do run."""
    torch.manual_seed(0)
    model, data = Between(block, between).to(dtype), [torch.randn(2, 400, 16).to(dtype)]

    def walk():
        prune(model, data, "wanda", sequential=True, num_samples=2, progress=False)

    if block is Residual and between(torch.ones(1, 1), torch.zeros(1, 1)) == 1:
        walk()
    else:
        with pytest.raises(CalibrationError, match="or computes something between them"):
            walk()


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates")
def test_qwen3_vl_is_walked():
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "temporal_patch_size": 1, "spatial_merge_size": 2, "out_hidden_size": 32, "num_position_embeddings": 64,
        "initializer_range": 0.3,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=60, vision_start_token_id=62)
    model = Qwen3VLForConditionalGeneration(config).double().eval()
    ids = make_tokens(2, 12, vocab=59) + 1
    ids[:, 1], ids[:, 2:6] = 62, 60
    batch = {
        "input_ids": ids, "pixel_values": torch.randn(32, 48).double(), "attention_mask": torch.ones_like(ids),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (ids == 60).long(),
    }  # fmt: skip
    by_loop, expected = copy.deepcopy(model), {}
    for index, block in enumerate(by_loop.model.language_model.layers):
        norms, linears = {}, {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        handles = [
            m.register_forward_pre_hook(lambda _, args, n=n: norms.update({n: args[0].square().sum((0, 1)).sqrt()}))  # noqa: B023
            for n, m in linears.items()
        ]
        with torch.no_grad():
            by_loop(**batch)
            for name, linear in linears.items():
                order = (linear.weight.abs() * norms[name]).argsort(1).argsort(1)
                mask = order >= linear.in_features // 2
                linear.weight.mul_(mask)
                expected[f"model.language_model.layers.{index}.{name}.weight"] = mask
        for handle in handles:
            handle.remove()
    found = prune(model, [batch], "wanda", sequential=True, num_samples=2, ignore=["*visual*"], progress=False)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_blocks_that_return_tuples_of_tuples_are_refused():
    class Block(nn.Linear):
        def forward(self, x):
            return (super().forward(x), x.shape), None

    class Model(nn.Module):
        _no_split_modules = ("Block",)

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(6, 6) for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                (x, _), _ = block(x)
            return x

    with pytest.raises(CalibrationError, match=r"the 2 Block modules of Model, .* between them; use sequential=False"):
        prune(Model(), [torch.randn(2, 3, 6)], "wanda", sequential=True, num_samples=2, progress=False)


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("how", [{}, {"batch_first": True}, {"batch_first": True, "norm_first": True}], ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_encoders_of_torch_are_walked(how, padded):
    """With a mask of padding that the model makes, of which torch's encoder would make nested tensors."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, **how), 3)

        def forward(self, x):
            mask = torch.zeros(x.shape[:2] if how else x.shape[:2][::-1], dtype=torch.bool)
            mask[1:, 4:] = True
            return self.encoder(x, src_key_padding_mask=mask if padded else None)

    torch.manual_seed(0)
    model, data = Model().eval(), torch.randn(6, 6, 16)
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    expected = by_hand(model, data, "encoder.layers")
    found = prune(model, [data], "wanda", sequential=True, num_samples=6, progress=False)
    assert set(found) == set(expected)
    different = sum(int((mask != expected[name]).sum()) for name, mask in found.items())
    assert different <= 1e-3 * sum(mask.numel() for mask in expected.values())  # ties of rounding


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 2, 1], "decoder block 2 ran out of order"),
        ([0, 0, 1, 2], "decoder block 0 ran out of order"),
        ([0, 1], "only 2 of 3 decoder blocks ran"),
        ([], "only 0 of 3 decoder blocks ran"),
    ],
)
def test_blocks_that_do_not_run_once_each_in_order(order, message):
    model = Blocks(order)
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, [torch.randn(2, 3, 6)], "wanda", sequential=True, num_samples=2)
    assert snapshot(model) == before
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_a_block_that_takes_no_tensor():
    model = Blocks([0, 1, 2])
    with pytest.raises(CalibrationError, match="decoder block 0 takes no tensor of hidden states first"):
        prune(model, [(["a"],)], "wanda", sequential=True, num_samples=1)


@pytest.mark.parametrize("batches", [[], iter(())])
def test_empty_batches(llama, batches):
    before = snapshot(llama)
    with pytest.raises(CalibrationError, match="calibration saw no sample"):
        prune(llama, batches, "wanda", sequential=True)
    assert snapshot(llama) == before


def test_the_walk_yields_before_it_runs_and_passes_outputs_on():
    torch.manual_seed(0)
    model = Blocks([0, 1, 2])
    data = torch.randn(5, 3, 6)
    walk = BlockWalk(Samples(model, data.split(2), 4, lambda m, b: m(b)), list(model.blocks))
    assert [batch.samples for batch in walk.batches] == [2, 2]
    ran = []
    model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    steps = walk.run(0, keep_output=True)
    first = next(steps)
    assert torch.equal(first.hidden, data[:2])
    assert ran == []
    next(steps)
    assert ran == [1]
    list(steps)
    torch.testing.assert_close(walk.batches[1].hidden, model.blocks[0](data[2:4]))
    assert math.isfinite(float(walk.batches[0].hidden.sum()))
    assert not walk.batches[0].hidden.requires_grad


@pytest.mark.parametrize(("update", "most"), [(None, 7), ("obs", 14)])
def test_a_walk_that_only_masks_holds_copies_of_one_block(update, most, llama, tokens, monkeypatch):
    """Weights of later blocks meet the pruned ones all the same: the masks are those of a walk that holds all."""
    held, keep = [], Originals.keep

    def counting(self, parameter):
        keep(self, parameter)
        held.append(len(self._copies))

    expected = prune(copy.deepcopy(llama), [tokens(3, 8)], "wanda", sequential=True, num_samples=3, update=update)
    monkeypatch.setattr(Originals, "keep", counting)
    monkeypatch.setattr(Originals, "put_back", Originals.put_back if update is None else None)
    before = copy.deepcopy(llama)
    masks = prune(llama, [tokens(3, 8)], "wanda", sequential=True, num_samples=3, update=update)
    assert max(held) == most
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name])
        if update is None:
            assert torch.equal(llama.get_parameter(name), before.get_parameter(name) * mask)
