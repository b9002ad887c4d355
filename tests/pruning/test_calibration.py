"""Statistics against a naive float64 loop over samples, and a model that calibration leaves as it found it."""

import copy
import gc
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import LAYERS, make_llama, make_tokens, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMultipleChoice, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging
from waiting import Waits

from lightning_prune import prune
from lightning_prune.checkpoints.model import quiet_transformers
from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.calibration import collect, collect_forward
from lightning_prune.pruning.padding import Padding
from lightning_prune.pruning.precision import full_precision
from lightning_prune.pruning.projections import without_fast_path
from lightning_prune.pruning.running import causal_lm_loss, quiet_model
from lightning_prune.pruning.statistics import (
    ALL_STATISTICS,
    FORWARD_STATISTICS,
    GRADIENTS,
    LayerStatistics,
    check_finite,
)
from lightning_prune.pruning.targets import find_targets


def gather(model, batches, statistics=ALL_STATISTICS, num_samples=None, **arguments):
    """`collect` over every layer and every sample."""
    with warnings.catch_warnings():
        if num_samples is None:
            warnings.filterwarnings("ignore", "calibration data ended")
        return collect(model, batches, find_targets(model), statistics, num_samples=num_samples or 999, **arguments)


def check(found, expected, statistics=ALL_STATISTICS, rtol=2e-4, atol=2e-6):
    assert set(found) == set(expected)
    for name, values in expected.items():
        for statistic in ALL_STATISTICS:
            value = getattr(found[name], statistic)
            if statistic not in statistics:
                assert value is None, (name, statistic)
                continue
            top = np.abs(values[statistic]).max()
            assert top > 0, (name, statistic)
            np.testing.assert_allclose(
                value.double().numpy(), values[statistic], rtol=rtol, atol=atol * top, err_msg=f"{name} {statistic}"
            )


@pytest.fixture(scope="module")
def shared():
    """A Llama, four sequences of 12 tokens, and their naive statistics (not to be changed by a test)."""
    model, ids = make_llama(), make_tokens(4, 12)
    return model, ids, naive.statistics(model, [{"input_ids": row[None]} for row in ids], LAYERS)


@pytest.mark.parametrize("split", [[4], [1, 1, 1, 1], [3, 1]])
@pytest.mark.parametrize("kind", ["dict", "tensor", "tuple"])
def test_a_batch_of_four_equals_four_batches_of_one_and_the_naive_loop(shared, split, kind):
    model, ids, expected = shared
    if kind == "tuple" and split != [4]:
        pytest.skip("one split is enough")
    parts = ids.split(split)
    batches = {"dict": [{"input_ids": p} for p in parts], "tensor": list(parts), "tuple": [(p,) for p in parts]}[kind]
    loss_fn = None if kind != "tuple" else lambda m, batch: causal_lm_loss(m, {"input_ids": batch[0]})
    found = gather(model, batches, loss_fn=loss_fn)
    check(found, expected)
    assert all(entry.samples == 4 for entry in found.values())


def test_the_aggregate_is_not_the_gradient_of_the_mean(shared):
    """Guards the comparison itself: with signs cancelling, the two must differ a lot."""
    model, ids, expected = shared
    model = copy.deepcopy(model)
    torch.stack([naive.next_token_loss(model, {"input_ids": row[None]}) for row in ids]).sum().backward()
    for name, values in expected.items():
        cancelled = model.get_parameter(name).grad.abs().double().numpy()
        assert np.abs(cancelled - values["gradient_l1"]).max() > 0.1 * values["gradient_l1"].max()


@pytest.mark.parametrize(
    "statistics", [{s} for s in sorted(ALL_STATISTICS)] + [set(GRADIENTS), {"input_norm", "gradient_l1"}]
)
def test_only_what_is_asked_for_is_collected(shared, statistics):
    model, ids, expected = shared
    check(gather(model, [{"input_ids": ids}], statistics), expected, statistics)


def test_nothing_asked_for_runs_nothing(shared):
    assert collect(shared[0], None, find_targets(shared[0]), []) == {}


@pytest.mark.slow
def test_sums_are_let_go_with_the_statistics(shared):
    """They may take as much memory as the model: not when Python next looks for circles."""
    model, ids, _ = shared

    def tensors():
        return sum(isinstance(thing, torch.Tensor) and thing.numel() > 99 for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = tensors()
        gather(model, [{"input_ids": ids}])
        assert tensors() == before
    finally:
        gc.enable()


def test_unknown_statistics_are_refused(shared):
    with pytest.raises(ValueError, match=r"statistics \['input_nrm'\] are unknown; choose from"):
        collect(shared[0], [shared[1]], find_targets(shared[0]), ["input_nrm", "hessian"])


@pytest.mark.few_fast(8)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labels", ["given", "from padding"])
@pytest.mark.parametrize("statistics", [ALL_STATISTICS, FORWARD_STATISTICS])
def test_padded_samples_count_as_samples_without_padding(llama, side, labels, statistics):
    lengths = [12, 5, 9, 2]
    ids, mask = torch.full((4, 12), 7), torch.zeros(4, 12, dtype=torch.long)
    samples = []
    for i, length in enumerate(lengths):
        row = make_tokens(1, length, seed=i)
        where = slice(0, length) if side == "right" else slice(12 - length, 12)
        ids[i, where], mask[i, where] = row[0], 1
        samples.append({"input_ids": row})
    batch = {"input_ids": ids, "attention_mask": mask}
    if labels == "given":
        batch["labels"] = ids.masked_fill(mask == 0, -100)
        if side == "left":  # the token before the first one is padding, which predicts nothing
            batch["labels"][torch.arange(4), 12 - torch.tensor(lengths)] = -100
    expected = naive.statistics(llama, samples, LAYERS)
    check(gather(llama, [batch], statistics), expected, statistics, rtol=1e-3, atol=1e-5)
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    check(gather(llama, parts, statistics), expected, statistics, rtol=1e-3, atol=1e-5)


def test_labels_choose_the_tokens_that_are_predicted(llama):
    ids = make_tokens(3, 10)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[2, 4:] = -100
    rows = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(3)]
    check(gather(llama, [{"input_ids": ids, "labels": labels}]), naive.statistics(llama, rows, LAYERS))


# -- losses --------------------


@pytest.mark.parametrize("shape", ["scalar", "one", "per sample"])
def test_scalar_losses_are_split_into_samples(shared, shape):
    model, ids, expected = shared
    sizes = []

    def loss_fn(module, batch):
        sizes.append(len(batch["input_ids"]))
        losses = causal_lm_loss(module, batch)
        return {"scalar": losses.mean(), "one": losses.mean()[None], "per sample": losses}[shape]

    check(gather(model, [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}], loss_fn=loss_fn), expected)
    # First the looks at the first batch: two samples, and where they have one loss, all of them and each alone.
    assert sizes == ([2, 3, 1] if shape == "per sample" else [2, 3, 1, 1, 1] + [1] * 4)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: causal_lm_loss(m, b)[:2], "returned 2 losses for 4 samples"),
        (
            lambda m, b: m(**b).logits,
            r"must return a scalar or one loss a sample, got a tensor of shape \(4, 12, 128\)",
        ),
        (lambda m, b: 3.0, r"must return a scalar or one loss a sample, got 3\.0"),
        (lambda m, b: None, "the loss of a calibration batch is None"),
        (lambda m, b: causal_lm_loss(m, b).detach(), "does not depend on any layer to prune"),
    ],
)
def test_bad_losses_are_refused(shared, loss_fn, message):
    model, ids, _ = shared
    with pytest.raises(CalibrationError, match=message):
        gather(model, [{"input_ids": ids}], loss_fn=loss_fn)


def test_a_batch_that_cannot_be_taken_apart_is_one_sample(llama):
    """Its loss is a mean of two sequences, which nothing in the batch tells."""
    text = make_tokens(2, 8)
    expected = naive.statistics(
        llama,
        [{"input_ids": text}],
        LAYERS,
        lambda m, _: sum(naive.next_token_loss(m, {"input_ids": row[None]}) for row in text) / 2,
    )
    with pytest.warns(UserWarning, match="each batch is one sample with one gradient"):
        found = gather(llama, [["a", "b", "c"]], GRADIENTS, loss_fn=lambda m, b: causal_lm_loss(m, text).mean())
    for name, values in expected.items():
        top = values["gradient_l1"].max()
        np.testing.assert_allclose(found[name].gradient_l1.numpy(), values["gradient_l1"], rtol=2e-4, atol=2e-6 * top)


def test_a_missing_loss_is_explained():
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="this score needs a loss"):
        gather(model, [torch.randn(2, 4)])


# -- layers used more than once, and in unusual ways --------------------


class Reused(nn.Module):
    """`a` runs twice, `c` shares its weight with `a`."""

    def __init__(self, tied=True):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 6)
        if tied:
            self.c.weight = self.a.weight

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = x + torch.tanh(self.a(x))
        x = x + torch.tanh(self.b(self.a(x)))
        return self.c(x)


def squares(model, batch):
    """One loss per sample ``(B, T, C)``."""
    return model(batch).square().flatten(1).mean(1)


def one_square(model, sample):
    return model(sample.double()).square().mean()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("statistics", [ALL_STATISTICS, FORWARD_STATISTICS])
def test_a_layer_used_twice_and_tied_layers(tied, size, statistics):
    torch.manual_seed(0)
    model, data = Reused(tied), torch.randn(4, 5, 6)
    layers = {"first.weight": "first", "a.weight": ["a", "c"] if tied else "a", "b.weight": "b"}
    if not tied:
        layers["c.weight"] = "c"
    expected = naive.statistics(model, list(data.split(1)), layers, one_square)
    check(gather(model, data.split(size), statistics, loss_fn=squares), expected, statistics)


class SharedInput(nn.Module):
    """`a` and `b` follow each other on one tensor; then one of them runs again on another."""

    def __init__(self, again):
        super().__init__()
        self.a, self.b, self.again = nn.Linear(6, 6), nn.Linear(6, 6), again

    def forward(self, x):
        y = torch.tanh(self.a(x)) * 3 + self.b(x)
        return getattr(self, self.again)(y) if self.again in ("a", "b") else y


@pytest.mark.parametrize("again", ["a", "b"])
@pytest.mark.parametrize("statistics", [FORWARD_STATISTICS, {"input_norm", "gradient_l2"}])
def test_layers_that_share_an_input_once_do_not_share_what_follows(again, statistics):
    torch.manual_seed(0)
    model, data = SharedInput(again), torch.randn(3, 5, 6)
    expected = naive.statistics(model, list(data.split(1)), {"a.weight": "a", "b.weight": "b"}, one_square)
    check(gather(model, data.split(1), statistics, loss_fn=squares), expected, statistics)


def test_an_input_changed_in_place_between_two_layers():
    class InPlace(SharedInput):
        def forward(self, x):
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.mul_(5))

    data = torch.randn(3, 5, 6)
    found = gather(InPlace("a"), data.split(1), FORWARD_STATISTICS, loss_fn=squares)
    rows = data.reshape(-1, 6).double()
    for name, factor in (("a.weight", 1), ("b.weight", 5)):
        torch.testing.assert_close(
            found[name].hessian.double(), factor**2 * (rows.t() @ rows) / 3, rtol=1e-5, atol=1e-5
        )
        norm = factor * (rows.square().sum(0) / 3).sqrt()
        torch.testing.assert_close(found[name].input_norm.double(), norm, rtol=1e-5, atol=1e-6)


class SometimesSkipped(nn.Module):
    """`b` is left out on some batches, as an expert or a dropped layer is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.a(x)
        return y + self.b(x) if float(x.flatten()[0]) > 0 else y.tanh()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("statistics", [FORWARD_STATISTICS, {"input_norm", "gradient_l2"}])
def test_a_layer_that_some_batches_skip(order, statistics):
    torch.manual_seed(0)
    model, data = SometimesSkipped(), torch.randn(4, 5, 6)
    data[:, 0, 0] = order * torch.tensor([1.0, -1.0, 2.0, -2.0])
    rows = list(data.split(1))
    used = {"a.weight": rows, "b.weight": [r for r in rows if float(r.flatten()[0]) > 0]}
    found = gather(model, rows, statistics, loss_fn=squares)
    for name, module in (("a.weight", "a"), ("b.weight", "b")):
        expected = naive.statistics(model, used[name], {name: module}, one_square)
        share = len(used[name]) / len(rows)  # norms and Hessians are means over all samples
        expected[name]["input_norm"] *= math.sqrt(share)
        expected[name]["hessian"] *= share
        check({name: found[name]}, expected, statistics)


class Flattened(nn.Module):
    """Tokens of all samples in one list, as in a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        flat = torch.tanh(self.first(x)).flatten(0, 1)
        return self.expert(flat).view_as(x)


@pytest.mark.parametrize("length", [5, 4, 1])
def test_layers_that_see_tokens_of_all_samples_in_one_list(length):
    torch.manual_seed(0)
    model, data = Flattened(), torch.randn(4, length, 6)
    layers = {"first.weight": "first", "expert.weight": "expert"}
    expected = naive.statistics(model, list(data.split(1)), layers, one_square)
    for statistics in (ALL_STATISTICS, {"output_grad_norm", "input_norm"}):
        check(gather(model, [data], statistics, loss_fn=squares), expected, statistics)


class Routed(nn.Module):
    """An expert that sees one token of every sample but the first, and two of the first but one."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = nn.Linear(6, 6), nn.Linear(6, 6)
        self.level = None

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if self.level is None:
            self.level = float(x[..., 0].detach().flatten().sort().values[-len(x) - 1])
        chosen = x[..., 0] > self.level
        out = x.clone()
        out[chosen] = self.expert(x[chosen])  # as many rows as samples, by chance
        return out


def test_an_expert_that_receives_as_many_tokens_as_there_are_samples():
    torch.manual_seed(1)
    model, data = Routed(), torch.randn(4, 5, 6)
    with torch.no_grad():
        model(data)  # sets the level, so that single samples are routed alike
    chosen = (torch.tanh(model.first(data))[..., 0] > model.level).sum(1).tolist()
    assert sum(chosen) == 4
    assert chosen != [1, 1, 1, 1]
    one_by_one = gather(model, data.split(1), GRADIENTS, loss_fn=squares)
    together = gather(model, [data], GRADIENTS, loss_fn=squares)
    for name in ("gradient_l1", "gradient_l2"):
        torch.testing.assert_close(
            getattr(together["expert.weight"], name), getattr(one_by_one["expert.weight"], name), rtol=1e-4, atol=1e-7
        )


class Checkpointed(nn.Module):
    """A block that is always recomputed in backward; its layer runs twice, or sees flattened tokens."""

    def __init__(self, inside, reentrant):
        super().__init__()
        self.first, self.inside, self.reentrant = nn.Linear(6, 6), inside, reentrant

    def forward(self, x):
        return checkpoint(self.inside, torch.tanh(self.first(x)), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["once", "reused", "flattened"])
@pytest.mark.parametrize("size", [4, 1])
def test_checkpointed_blocks_give_the_same_statistics(reentrant, inside, size):
    torch.manual_seed(0)
    made = {
        "once": nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)),
        "reused": Reused(),
        "flattened": Flattened(),
    }
    plain, data = made[inside], torch.randn(4, 5, 6)
    model = Checkpointed(plain, reentrant)
    layers = {
        "once": {"inside.0.weight": "inside.0", "inside.2.weight": "inside.2"},
        "reused": {
            "inside.first.weight": "inside.first",
            "inside.a.weight": ["inside.a", "inside.c"],
            "inside.b.weight": "inside.b",
        },
        "flattened": {"inside.first.weight": "inside.first", "inside.expert.weight": "inside.expert"},
    }[inside]
    layers = {"first.weight": "first", **layers}

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inside = model.first, plain

        def forward(self, x):
            return self.inside(torch.tanh(self.first(x)))

    expected = naive.statistics(Plain(), list(data.split(1)), layers, one_square)
    check(gather(model, data.split(size), loss_fn=squares), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("grads", [False, True])
def test_transformers_gradient_checkpointing(shared, reentrant, grads):
    model, ids, expected = shared
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if grads:
        model.enable_input_require_grads()
    check(gather(model, [{"input_ids": ids}]), expected)
    assert model.is_gradient_checkpointing
    assert model.training


@pytest.mark.parametrize("how", [{"every_n_layers": 2}, {"every_n_layers": 2, "offload": True}])
def test_transformers_checkpointing_of_some_layers_and_offloaded(shared, how, monkeypatch):
    model, ids, expected = shared
    model = copy.deepcopy(model).train()
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("transformers before 5.24 has none of it")

    def on_cpu(pin_memory, device_type):  # only an accelerator has pinned memory
        return torch.autograd.graph.save_on_cpu(pin_memory=False)

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", on_cpu)
    model.activation_checkpointing_enable(**how)
    check(gather(model, [{"input_ids": ids}]), expected)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]


# -- other layers --------------------


def test_conv1d_of_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
    model, ids = GPT2LMHeadModel(config), make_tokens(3, 9, 32)
    parts = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    layers = {f"transformer.h.{i}.{p}.weight": f"transformer.h.{i}.{p}" for i in range(2) for p in parts}
    expected = naive.statistics(model, [{"input_ids": row[None]} for row in ids], layers)
    check(gather(model, [{"input_ids": ids}]), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
        {"kernel_size": 1, "bias": False},
    ],
)
def test_conv2d(settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, **settings), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2))
    data = torch.randn(3, 3, 8, 7)
    layers = {"0.weight": "0", "2.weight": "2"}
    expected = naive.statistics(model, list(data.split(1)), layers, one_square)
    for size in (3, 1):
        check(gather(model, data.split(size), loss_fn=squares), expected)
    check(gather(model, [data], FORWARD_STATISTICS), expected, FORWARD_STATISTICS)


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "ViT", "Dinov2"])
def test_patches_of_image_encoders(family, size):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    inner = {"mlp_ratio": 2} if family == "Dinov2" else {"intermediate_size": 12}
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes, **inner)).eval()
    name = next(n for n, module in model.named_modules() if isinstance(module, nn.Conv2d))
    data, targets = torch.randn(3, 3, 8, 8), find_targets(model, targets=[nn.Conv2d])

    def loss(model, batch):
        return model(pixel_values=batch).last_hidden_state.pow(3).flatten(1).mean(1)  # squares of a norm are constant

    expected = naive.statistics(model, [x.double() for x in data.split(1)], {f"{name}.weight": name},
                                lambda m, x: loss(m, x).sum())  # fmt: skip
    found = collect(model, data.split(size), targets, ALL_STATISTICS, loss_fn=loss, num_samples=3, progress=False)
    check(found, expected)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate", "same"])
def test_conv2d_padding_modes_multiply_to_the_output(mode):
    """Patches times the weight's matrix are the convolution: Hessians are those of what the layer sees."""
    torch.manual_seed(0)
    padding = {"padding": "same"} if mode == "same" else {"padding": 2, "padding_mode": mode}
    layer = nn.Conv2d(3, 4, (2, 3), bias=False, **padding)
    (target,) = find_targets(nn.Sequential(layer))
    x = torch.randn(2, 3, 6, 5)
    y = target.kind.input_rows(layer, x) @ target.matrix().t()
    torch.testing.assert_close(y, target.kind.output_rows(layer(x)))


def test_linear_inputs_of_two_and_four_dimensions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    for shape in [(4, 5), (4, 2, 3, 5)]:
        data = torch.randn(shape)
        expected = naive.statistics(model, list(data.split(1)), {"0.weight": "0", "2.weight": "2"}, one_square)
        check(gather(model, [data], loss_fn=squares), expected)


def test_layers_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return self.a(input=x)

    torch.manual_seed(0)
    model, data = Keyword(), torch.randn(3, 4, 6)

    class Positional(Keyword):
        def forward(self, x):
            return self.a(x)

    plain = Positional()
    plain.load_state_dict(model.state_dict())
    expected = naive.statistics(plain, list(data.split(1)), {"a.weight": "a"}, one_square)
    for statistics in (ALL_STATISTICS, FORWARD_STATISTICS):
        check(gather(model, [data], statistics, loss_fn=squares), expected, statistics)


def test_in_place_activations_after_a_layer_do_not_change_its_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.SiLU(inplace=True))
    data = torch.randn(4, 3, 6)
    expected = naive.statistics(model, list(data.split(1)), {"0.weight": "0", "2.weight": "2"}, one_square)
    check(gather(model, [data], loss_fn=squares), expected)


# -- precision and compilation --------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.15), (torch.float16, 0.03), (torch.float64, 2e-4)])
@pytest.mark.parametrize("size", [1, 4])
def test_other_precisions(dtype, rtol, size):
    model, ids = make_llama().to(dtype), make_tokens(4, 12)
    expected = naive.statistics(model, [{"input_ids": row[None]} for row in ids], LAYERS)
    found = gather(model, [{"input_ids": p} for p in ids.split(size)])
    check(found, expected, rtol=rtol, atol=rtol / 3)
    for name, entry in found.items():
        for statistic in ALL_STATISTICS:
            wide = torch.promote_types(dtype, torch.float32)
            assert getattr(entry, statistic).dtype == wide, (name, statistic)


def test_small_float16_gradients_do_not_vanish():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).half()
    data = torch.randn(3, 4, 8).half()

    def tiny(m, batch):
        return m(batch).float().square().flatten(1).mean(1) * 1e-6

    expected = naive.statistics(
        model, list(data.split(1)), {"0.weight": "0", "2.weight": "2"}, lambda m, s: one_square(m, s) * 1e-6
    )
    check(gather(model, [data], loss_fn=tiny), expected, rtol=0.05, atol=0.02)


def test_autocast(shared):
    model, ids, expected = shared
    found = gather(model, [{"input_ids": ids}], forward_context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    check(found, expected, rtol=0.15, atol=0.05)


def test_bfloat16_aggregates(shared):
    model, ids, expected = shared
    found = gather(model, [{"input_ids": ids}], gradient_dtype=torch.bfloat16, gradient_device="cpu")
    assert found["model.layers.0.mlp.up_proj.weight"].gradient_l2.dtype == torch.bfloat16
    check(found, expected, rtol=0.03, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("statistics", [ALL_STATISTICS, FORWARD_STATISTICS])
@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_model(shared, statistics, warm):
    model, ids, expected = shared
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    if warm:
        compiled(input_ids=ids)
    check(gather(compiled, [{"input_ids": ids}], statistics), expected, statistics)


def test_an_outer_no_grad_does_not_matter(shared):
    model, ids, expected = shared
    with torch.no_grad():
        check(gather(model, [{"input_ids": ids}], GRADIENTS), expected, GRADIENTS)
        assert not torch.is_grad_enabled()


# -- the model afterwards --------------------


def fingerprint(model):
    return {
        "bits": snapshot(model),
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone().tolist()) for p in model.parameters()],
        "use_cache": model.config.use_cache,
        "forward hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


def prepared_model():
    """Part in training mode, part frozen, some gradients there, dropout on."""
    model = make_llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
        if i % 3 == 1:
            parameter.grad = torch.full_like(parameter, i)
    model.config.use_cache = True
    return model


@pytest.mark.parametrize(
    "change", [full_precision, without_fast_path, quiet_transformers, lambda: quiet_model(nn.Linear(2, 2), False)]
)
def test_the_process_is_as_it_was_after_two_threads(change):
    def settings():
        return (
            torch.compile(lambda x: (x + 1, torch.compiler.is_compiling()), backend="eager")(torch.ones(1))[1],
            torch.backends.mha.get_fastpath_enabled(),
            torch.get_float32_matmul_precision(),
            transformers_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
        )

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = settings()
        one, other = change(), change()
        one.__enter__()
        changed = settings()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(other.__enter__).result()
            one.__exit__(None, None, None)
            assert settings() == changed != found  # for the other one
            thread.submit(other.__exit__, None, None, None).result()
        assert settings() == found
    finally:
        torch.set_float32_matmul_precision(before)


class Fails:
    """Batches that end in an exception."""

    def __init__(self, ids, error):
        self.ids, self.error = ids, error

    def __iter__(self):
        yield {"input_ids": self.ids}
        raise self.error


@pytest.mark.parametrize("statistics", [ALL_STATISTICS, FORWARD_STATISTICS])
@pytest.mark.parametrize("error", [None, RuntimeError("broken loader"), KeyboardInterrupt()])
def test_the_model_is_as_it_was(statistics, error):
    model, ids = prepared_model(), make_tokens(2, 8)
    before = fingerprint(model)

    def loss_fn(module, batch):
        assert not any(m.training for m in module.modules())
        assert module.config.use_cache is False
        torch.rand(3)
        return causal_lm_loss(module, batch)

    if error is None:
        gather(model, [{"input_ids": ids}], statistics, loss_fn=loss_fn)
    else:
        with pytest.raises(type(error)):
            gather(model, Fails(ids, error), statistics, loss_fn=loss_fn)
    assert fingerprint(model) == before


def test_no_gradient_is_made_for_parameters():
    """Neither while calibration runs nor after it."""
    model, ids = make_llama(), make_tokens(2, 8)
    seen = []

    def loss_fn(module, batch):
        seen.append([p.grad is None and not p.requires_grad for p in module.parameters()])
        return causal_lm_loss(module, batch)

    gather(model, list(ids.split(1)), loss_fn=loss_fn)
    assert len(seen) == 2
    assert all(all(flags) for flags in seen)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_training_goes_on_as_if_nothing_had_happened():
    def train(model, calibrate):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(2):
            if calibrate:
                gather(model, [make_tokens(2, 8, seed=9)])
            optimizer.zero_grad()
            causal_lm_loss(model, make_tokens(2, 8, seed=step)).mean().backward()
            optimizer.step()
        return snapshot(model)

    assert train(prepared_model(), True) == train(prepared_model(), False)


# -- what is refused --------------------


@pytest.mark.parametrize("batches", [[], iter(()), [torch.zeros(0, 8, dtype=torch.long)]])
@pytest.mark.parametrize("statistics", [ALL_STATISTICS, FORWARD_STATISTICS])
def test_no_sample_is_an_error(shared, batches, statistics):
    with pytest.raises(CalibrationError, match="calibration saw no sample"):
        gather(shared[0], batches, statistics)


@pytest.mark.parametrize("statistics", [ALL_STATISTICS, FORWARD_STATISTICS])
def test_a_layer_that_is_not_used_is_named(statistics):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare, self.other = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            return self.used(x)

    named = r"no calibration sample reached 'spare\.weight' and 1 more .*add 'spare', 'other' to `ignore`"
    with pytest.raises(CalibrationError, match=named):  # all of them, by what `ignore` takes
        gather(Unused(), [torch.randn(2, 3, 6)], statistics, loss_fn=squares)


def test_a_layer_under_no_grad_is_named():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            with torch.no_grad():
                x = self.a(x)
            return self.b(x)

    with pytest.raises(CalibrationError, match=r"no calibration sample reached 'a\.weight'.*runs under no_grad"):
        gather(Cut(), [torch.randn(2, 3, 6)], loss_fn=squares)


@pytest.mark.parametrize("statistics", [{"output_grad_norm"}, {"gradient_l1"}], ids=str)
def test_a_layer_that_runs_itself_under_no_grad_is_named(statistics):
    class Fixed(nn.Linear):
        def forward(self, input):
            with torch.no_grad():
                return super().forward(input)

    model = nn.Sequential(nn.Linear(6, 6), Fixed(6, 6), nn.Linear(6, 6))
    with pytest.raises(CalibrationError, match=r"no calibration sample reached '0\.weight' and 1 more"):
        gather(model, [torch.randn(2, 6)], statistics, loss_fn=squares)
    assert len(gather(model, [torch.randn(2, 6)], {"hessian"})) == 3


def test_a_reentrant_checkpoint_that_relies_on_trained_parameters_before_it_is_told_of():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.a, self.b = nn.Parameter(torch.zeros(6)), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(checkpoint(self.a, x + self.start, use_reentrant=True))

    with pytest.raises(CalibrationError, match=r"'a\.weight'.*use_reentrant=False"):
        gather(Late(), [torch.randn(2, 3, 6)], loss_fn=squares)


def under_vmap(model, x):
    return torch.func.vmap(model)(x)


def under_jacobian(model, x):
    return torch.func.vmap(torch.func.jacrev(model))(x).flatten(2).sum(-1)


def after_an_inner_step(model, x):
    """As model-agnostic meta-learning has it."""
    weights = dict(model.named_parameters())
    inner = torch.autograd.grad(model(x).square().mean(), list(weights.values()), create_graph=True)
    return torch.func.functional_call(model, {n: w - g for (n, w), g in zip(weights.items(), inner, strict=True)}, (x,))


@pytest.mark.parametrize("statistics", [{"input_norm"}, {"hessian"}, {"output_grad_norm"}, {"gradient_l2"}], ids=str)
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (under_vmap, "transform of torch.func"),
        (under_jacobian, "transform of torch.func"),
        (after_an_inner_step, "gradients by parameters"),
    ],
)
def test_losses_that_torch_cannot_follow_here_are_explained(run, message, statistics):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(CalibrationError, match=rf"{message}.*pass a loss_fn"):
        gather(model, [torch.randn(2, 6)], statistics, loss_fn=lambda m, x: run(m, x).square().mean(1))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(shared, value):
    model, ids, _ = shared
    calls = []

    def loss_fn(module, batch):
        calls.append(1)
        losses = causal_lm_loss(module, batch)
        return losses * value if len(calls) == 3 else losses

    with pytest.raises(CalibrationError, match="loss of a calibration sample is not finite"):
        gather(model, list(ids.split(1)), loss_fn=loss_fn)


def test_infinite_inputs_are_refused_naming_layer_and_statistic():
    model = nn.Sequential(nn.Linear(3, 3))
    data = torch.ones(2, 4, 3)
    data[1, 2, 0] = math.inf
    with pytest.raises(CalibrationError, match=r"NaN or infinity in 'hessian' of '0\.weight'"):
        gather(model, [data], FORWARD_STATISTICS)


def test_check_finite_is_not_fooled_by_a_sum_that_overflows():
    check_finite({"a": LayerStatistics(samples=1, gradient_l1=torch.full((4, 4), 3e38))})
    check_finite({"a": LayerStatistics(samples=1, gradient_l1=torch.tensor([[3e38, 3e38, -3e38, -3e38]]))})
    with pytest.raises(CalibrationError):
        check_finite({"a": LayerStatistics(samples=1, gradient_l1=torch.tensor([math.inf, -math.inf]))})


@pytest.mark.parametrize(
    ("statistics", "batch"), [({"input_norm"}, 0), ({"input_norm", "output_grad_norm"}, 1), ({"gradient_l2"}, 1)]
)
def test_the_host_waits_for_no_layer_and_once_a_batch(statistics, batch):
    """Once for the losses of a batch, whatever the number of layers; with what a model itself asks left out."""

    def waits(layers, batches):
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))
        data = [torch.randn(2, 6) for _ in range(batches)]
        with Waits() as found:
            collect(
                model, data, find_targets(model), statistics, num_samples=2 * batches, progress=False,
                loss_fn=lambda m, x: m(x).square().mean(1),
            )  # fmt: skip
        return len(found.operations)

    assert waits(9, 3) == waits(2, 3)
    assert waits(2, 7) - waits(2, 3) == 4 * batch


def test_a_statistic_that_was_not_collected_is_named():
    with pytest.raises(KeyError, match="'hessian' was not collected"):
        LayerStatistics(samples=1).get("hessian")


def test_num_samples_cuts_the_last_batch(shared):
    model, ids, _ = shared
    expected = naive.statistics(model, [{"input_ids": row[None]} for row in ids[:3]], LAYERS)
    for statistics in (ALL_STATISTICS, FORWARD_STATISTICS):
        found = gather(model, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}], statistics, num_samples=3)
        check(found, expected, statistics)
        assert all(entry.samples == 3 for entry in found.values())


def test_a_batch_that_cannot_be_cut_is_told_of():
    """A list of observations, whose features look like samples."""
    batch = {"observations": list(torch.randn(3, 4)), "actions": [0, 1, 0]}
    model = nn.Linear(4, 2)

    def loss_fn(model, batch):
        return model(torch.stack(batch["observations"])).sum()

    assert gather(model, [batch], {"input_norm"}, 4, loss_fn=loss_fn)
    with pytest.raises(CalibrationError, match=r"cut to its first 2 samples.*RuntimeError.*a multiple of that"):
        gather(model, [batch], {"input_norm"}, 2, loss_fn=loss_fn)
    with pytest.raises(RuntimeError, match=r"^(addmm: )?mat1"):  # nothing was cut; newer torch names the product
        gather(nn.Linear(5, 2), [batch], {"input_norm"}, 4, loss_fn=loss_fn)


def test_too_few_samples_warn(shared):
    with pytest.warns(UserWarning, match="calibration data ended after 4 of num_samples=9"):
        gather(shared[0], [shared[1]], {"input_norm"}, num_samples=9)


def test_rows_that_fit_no_mask_are_all_counted_and_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, attention_mask):
            return self.b(x[:, 0]) + self.a(x[:, ::2]).sum(1)

    model, x = Half(), torch.randn(2, 4, 6)
    mask = torch.ones(2, 4)
    mask[0, 3] = 0
    batch = {"x": x, "attention_mask": mask}
    with pytest.warns(UserWarning, match=r"padding of the batches cannot be found in the inputs of 'a.weight', whose"):
        found = gather(model, [batch, batch], FORWARD_STATISTICS, num_samples=4)
    seen = {"a.weight": x[:, ::2].double(), "b.weight": x[:, :1].double()}
    for name, rows in seen.items():
        expected = (rows.square().sum((0, 1)) / 2).sqrt()
        torch.testing.assert_close(found[name].input_norm.double(), expected, rtol=1e-5, atol=0)


def test_collect_forward_while_somebody_else_runs_the_layers():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(4, 3, 6)
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep[1, 1:] = False
    samples = [data[0:1], data[1:2, :1], data[2:3], data[3:4]]
    expected = naive.statistics(model, samples, {"0.weight": "0", "2.weight": "2"}, one_square)

    def steps():
        for part, mask in zip(data.split(2), keep.split(2), strict=True):
            yield Padding(mask), 2, True
            with torch.no_grad():
                model(part)

    found = collect_forward(find_targets(model), FORWARD_STATISTICS, steps())
    check(found, expected, FORWARD_STATISTICS)
    assert not model[0]._forward_pre_hooks
    assert collect_forward([], FORWARD_STATISTICS, []) == {}


def test_losses_of_the_default_loss_are_those_of_the_loop(shared):
    model, ids, _ = shared
    found = causal_lm_loss(model, {"input_ids": ids, "labels": ids})
    expected = [naive.next_token_loss(model, {"input_ids": row[None]}) for row in ids]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(F.relu(found), found)


def test_layers_go_on_being_checkpointed_in_calibration():
    """A batch that fits in training only because blocks are recomputed must fit here too."""
    model, ids = make_llama().train(), make_tokens(2, 8)
    model.gradient_checkpointing_enable()
    forwards = []
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: forwards.append(mlp.training))
    gather(model, [{"input_ids": ids}])
    # A look at the first batch and the batch: once forward, once recomputed in backward, always in evaluation mode.
    assert forwards == [False] * 4
    assert all(m.training for m in model.modules())


class Twice(nn.Module):
    """Calls what it names as transformers name a body, with inputs of its own."""

    def __init__(self):
        super().__init__()
        self.base_model = make_llama().model
        self.last = nn.Linear(64, 3)

    def forward(self, input_ids):
        return self.last(self.base_model(input_ids=input_ids.flip(1)).last_hidden_state)


class Shifted(LlamaForCausalLM):
    """Has a body and a head, and changes the inputs first."""

    def forward(self, input_ids, **inputs):
        return super().forward(input_ids=(input_ids + 1) % 128, **inputs)


def choices():
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForMultipleChoice(BertConfig(vocab_size=128, max_position_embeddings=32, **settings))


@pytest.mark.parametrize("make", [Twice, lambda: Shifted(make_llama().config), choices])
def test_layers_see_what_the_whole_model_gives_them(make):
    torch.manual_seed(0)
    model = make().eval()
    ids = make_tokens(4, 12)
    batch = {"input_ids": ids.view(2, 2, 12) if make is choices else ids}
    seen, n = {}, len(batch["input_ids"])
    targets = [t for t in find_targets(model) if ".0." in t.name]
    for target in targets:
        layer = model.get_submodule(target.name.removesuffix(".weight"))
        layer.register_forward_hook(lambda _, args, out, name=target.name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(**batch)
    expected = {
        name: value.detach().double().flatten(0, -2).square().sum(0).div(n).sqrt() for name, value in seen.items()
    }
    found = collect(model, [batch], targets, {"input_norm"}, num_samples=n, progress=False)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].input_norm.double(), value, rtol=1e-5, atol=1e-6)


class Changed(nn.Linear):
    """Multiplies with something else than its weight."""

    def __init__(self, change):
        super().__init__(6, 5)
        self.change = change

    def forward(self, x):
        return F.linear(x, self.change(self.weight), self.bias)


def four_bits(weight):
    scale = weight.detach().abs().amax() / 7
    return torch.fake_quantize_per_tensor_affine(weight, float(scale), 0, -8, 7)


class Beside(nn.Linear):
    """Has a second matrix of its weight's shape, which meets the input first."""

    def __init__(self):
        super().__init__(6, 5)
        self.other = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        return F.linear(x, self.other).detach().mean() + F.linear(x, self.weight)


COLUMNS = torch.tensor([1.0, 4, 1, 1, 0.2, 1])


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_columns_of_a_transposed_layer_with_other_numbers_are_named_and_rows_are_not(side):
    model, x = nn.Sequential(Conv1D(5, 6)), torch.randn(4, 3, 6)  # stored (in, out)
    factor = COLUMNS[:, None] if side == "columns" else torch.arange(1.0, 6)

    def loss(model, batch):
        return torch.func.functional_call(model, {"0.weight": model[0].weight * factor}, (batch,)).sum((1, 2))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gather(model, [x], {"input_norm"}, num_samples=4, loss_fn=loss)
    assert ["'0' (Conv1D) does not multiply" in str(w.message) for w in said] == [True] * (side == "columns")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w * 3, {"output_grad_norm"}),  # rows of one layer are scaled alike, layers are not
        (lambda w: w * torch.arange(1.0, 6)[:, None], {"output_grad_norm"}),
        (lambda w: w * COLUMNS, {"output_grad_norm", "input_norm"}),
        (lambda w: torch.tanh(w * 9), {"output_grad_norm", "input_norm"}),
        (lambda w: w * 1.0, set()),
        (four_bits, set()),
        (lambda w: w + w.square().sum() * 0, set()),
        (None, set()),
    ],
    ids=["scaled", "rows", "columns", "bent", "as it is", "quantized", "unchanged", "beside"],
)
@pytest.mark.parametrize("statistic", ["input_norm", "output_grad_norm"])
@pytest.mark.parametrize("where", ["Changed", "Linear"])  # in its forward; by who calls it
def test_a_layer_with_other_numbers_in_its_weights_place_is_named(change, told, statistic, where):
    torch.manual_seed(0)
    first = Beside() if change is None else Changed(change) if where == "Changed" else nn.Linear(6, 5)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(5, 2))
    batch = torch.randn(4, 6)

    def loss(model, batch):
        weights = {} if change is None or where == "Changed" else {"0.weight": change(model[0].weight)}
        return torch.func.functional_call(model, weights, (batch,)).square().sum(1)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gather(model, [batch, batch], {statistic}, num_samples=8, loss_fn=loss)
    text = f"'0' ({where}) does not multiply with its weight as it is stored"
    assert [str(w.message).partition(", and")[0] for w in said] == [text] * (statistic in told)


class Keeping(nn.Module):
    """Keeps in evaluation mode what it computes of its parameters, as LeViT does; `train` lets go of it."""

    def __init__(self):
        super().__init__()
        self.bias, self.linear, self.drop = nn.Parameter(torch.zeros(6)), nn.Linear(6, 6), nn.Dropout(0.5)
        self.kept = None

    def train(self, mode):
        super().train(mode)
        if mode:
            self.kept = None
        return self

    def forward(self, x):
        if not self.training and self.kept is None:
            self.kept = self.bias.detach().clone()
        return self.drop(self.linear(x)) + (self.bias if self.training else self.kept)


@pytest.mark.parametrize("mode", [True, False])
def test_what_a_model_keeps_in_evaluation_mode_does_not_outlast_calibration(mode):
    model = nn.Sequential(Keeping()).train(mode)
    model[0].drop.eval()
    gather(model, [torch.randn(2, 6)], {"input_norm"}, num_samples=2)
    assert [m.training for m in model.modules()] == [mode, mode, mode, False]
    assert (model[0].kept is None) == mode


def test_a_new_output_layer_of_zeros_is_named_as_a_cause():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight)
    loss = lambda m, b: F.cross_entropy(m(b), torch.zeros(len(b), dtype=torch.long))  # noqa: E731
    with pytest.raises(CalibrationError, match=r"zero in 1 of 1 layers.*output layer still zero.*OneShot\(10\)"):
        prune(model, [torch.randn(4, 4)], "kfac", num_samples=4, loss_fn=loss, targets=["0"], progress=False)


def test_batches_that_cannot_be_taken_apart_are_said_to_count_as_one():
    graphs = [(torch.randn(5, 4), torch.randint(0, 5, (2, 9))) for _ in range(3)]
    model, ended = nn.Sequential(nn.Linear(4, 4)), "ended after 3 of num_samples=8"
    for batches, rest in ((graphs, r" \(a batch whose .* counts as one\)$"), ([(torch.randn(3, 4),)], "$")):
        with pytest.warns(UserWarning, match=ended + rest):
            prune(model, batches, "wanda", num_samples=8, loss_fn=lambda m, b: m(*b[:1]), progress=False)
