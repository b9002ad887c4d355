"""Grouped convolutions, up to depthwise ones: the rows of a group meet inputs of their own; and those of volumes."""

import math

import naive
import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import Score, prune
from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import GRADIENTS, INPUT_NORM, OUTPUT_GRAD_NORM
from lightning_prune.pruning.targets import find_targets, select_layers

WITHOUT_HESSIAN = GRADIENTS | {INPUT_NORM, OUTPUT_GRAD_NORM}
MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}  # numpy's words
# Channels in and out, size of the kernel, and the rest.
LAYERS = {
    "2d in two groups": (4, 6, 3, {"groups": 2}),
    "2d, strided, dilated": (6, 3, (3, 2), {"groups": 3, "stride": (1, 2), "dilation": (2, 1), "padding": 1}),
    "2d, same": (4, 4, (2, 3), {"groups": 2, "padding": "same", "dilation": 2}),
    "2d, circular": (4, 8, 3, {"groups": 4, "padding": 2, "padding_mode": "circular"}),
    "2d, reflect": (4, 4, 3, {"groups": 2, "padding": (1, 2), "padding_mode": "reflect"}),
    "2d, depthwise": (4, 4, 3, {"groups": 4, "padding": 1}),
    "2d, two rows a channel": (3, 6, 2, {"groups": 3, "padding": 1, "padding_mode": "replicate"}),
    "2d, points": (8, 4, 1, {"groups": 4, "bias": False}),
    "3d in one group": (3, 4, (2, 3, 1), {"stride": (1, 2, 1), "padding": (1, 0, 2), "dilation": (2, 1, 1)}),
    "3d, same": (4, 6, (2, 1, 3), {"groups": 2, "padding": "same", "padding_mode": "replicate"}),
    "3d, depthwise": (4, 4, 3, {"groups": 4, "padding": 1}),
    "1d in two groups": (6, 4, 3, {"groups": 2, "stride": 2, "padding": 1}),
    "1d, even and same": (4, 8, 4, {"groups": 4, "padding": "same", "padding_mode": "circular"}),
    "1d, depthwise": (4, 4, 3, {"groups": 4, "dilation": 2, "padding": 2, "padding_mode": "reflect"}),
}


def make(name):
    """A model with a grouped convolution in the middle, and samples for it."""
    torch.manual_seed(0)
    channels, outputs, kernel, how = LAYERS[name]
    kind = {"1d": nn.Conv1d, "2d": nn.Conv2d, "3d": nn.Conv3d}[name[:2]]
    layer = kind(channels, outputs, kernel, **how)
    model = nn.Sequential(kind(3, channels, 1), nn.Tanh(), layer, nn.Tanh())
    return model, torch.randn(3, 3, *(7, 6, 5)[: len(layer.kernel_size)])


def squares(model, batch):
    return (model(batch) - 1).square().flatten(1).mean(1)


def patches(layer, x):
    """What each group of rows is multiplied with, ``(groups, positions, in)``, for one sample, by explicit loops."""
    x, kernel = x.detach().double().numpy()[0], layer.kernel_size
    spans = [step * (size - 1) for step, size in zip(layer.dilation, kernel, strict=True)]
    if layer.padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(size, size) for size in layer.padding]
    x = np.pad(x, [(0, 0), *sides], mode=MODES[layer.padding_mode])
    starts = [range(0, size - span, step) for size, span, step in zip(x.shape[1:], spans, layer.stride, strict=True)]
    inside = len(x) // layer.groups
    out = []
    for group in range(layer.groups):
        rows = []
        for start in np.ndindex(*map(len, starts)):
            at = [places[i] for places, i in zip(starts, start, strict=True)]
            rows.append([
                x[(group * inside + c, *(a + o * step for a, o, step in zip(at, offset, layer.dilation, strict=True)))]
                for offset in np.ndindex(*kernel) for c in range(inside)
            ])  # fmt: skip
        out.append(rows)
    return np.array(out)


def as_matrix(tensor):
    """``(out, in)``, channels last."""
    return tensor.detach().double().movedim(1, -1).flatten(1).numpy()


def reference(model, samples):
    """Statistics of the middle layer, from patches and autograd's own gradients, in float64."""
    model = model.double()
    layer, seen = model[2], []
    handle = layer.register_forward_hook(lambda _, args, y: (y.retain_grad(), seen.append((args[0], y)))[0])
    sums = {}
    for sample in samples.double().split(1):
        seen.clear()
        model.zero_grad()
        squares(model, sample).sum().backward()
        ((x, y),) = seen
        found, gradient = patches(layer, x), as_matrix(layer.weight.grad)
        # The patches are those of the layer: their products with the weight are what it gives.
        rows = as_matrix(layer.weight).reshape(layer.groups, -1, found.shape[2])
        made = np.concatenate([part @ weight.T for part, weight in zip(found, rows, strict=True)], axis=1)
        bias = 0 if layer.bias is None else layer.bias.detach().numpy()
        np.testing.assert_allclose(made + bias, y.detach()[0].flatten(1).t().numpy(), atol=1e-12)
        norms = np.repeat((found**2).sum(1), layer.out_channels // layer.groups, axis=0)
        step = {"x": norms, "d": (y.grad[0].flatten(1).numpy() ** 2).sum(1), "l1": abs(gradient), "l2": gradient**2}
        sums = {key: sums.get(key, 0) + value for key, value in step.items()}
    handle.remove()
    n = len(samples)
    return {
        "input_norm": np.sqrt(sums["x"] / n),
        "output_grad_norm": np.sqrt(sums["d"] / n),
        "gradient_l1": sums["l1"],
        "gradient_l2": np.sqrt(sums["l2"]),
    }


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_those_of_a_loop_over_groups(name, size):
    model, data = make(name)
    targets = find_targets(model, targets=["2"])
    found = collect(model, data.split(size), targets, WITHOUT_HESSIAN, loss_fn=squares, num_samples=3, progress=False)
    forward = collect(model, [data], targets, {INPUT_NORM}, num_samples=3, progress=False)["2.weight"]
    for statistic, expected in reference(model, data).items():
        assert expected.max() > 0
        value = found["2.weight"].get(statistic).double().numpy()
        if model[2].groups == 1 and statistic == "input_norm":  # all rows meet the same inputs
            value = np.broadcast_to(value, expected.shape)
        np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-6 * expected.max(), err_msg=statistic)
    torch.testing.assert_close(forward.input_norm, found["2.weight"].input_norm)


@pytest.mark.parametrize("name", LAYERS)
def test_a_scalar_loss_is_taken_apart(name):
    """Whether that may be is told from gradients of a batch, by patches of the first channels alone."""
    model, data = make(name)
    targets = find_targets(model, targets=["2"])

    def scalar(model, batch):
        return squares(model, batch).mean()

    def pairs(model, batch):  # no batch of one has any; a term whose value is too small to tell
        apart = torch.pdist(model(batch).flatten(1)).square().sum()
        return scalar(model, batch) + 20 * (apart - apart.detach())

    def statistics_of(loss_fn):
        return collect(model, [data], targets, WITHOUT_HESSIAN, loss_fn=loss_fn, num_samples=3, progress=False)

    expected, found = statistics_of(squares)["2.weight"], statistics_of(scalar)["2.weight"]
    for statistic in WITHOUT_HESSIAN:
        torch.testing.assert_close(found.get(statistic), expected.get(statistic))
    with pytest.warns(UserWarning, match=r"gradient of 3 samples in '2\.weight' is not made of"):
        statistics_of(pairs)


def test_a_rank_gets_the_norms_of_its_part():
    model, data = make("2d in two groups")
    whole = collect(model, [data], find_targets(model), {INPUT_NORM}, num_samples=3, progress=False)
    part = whole["2.weight"].part(((1, 4), (3, 8))).input_norm
    assert torch.equal(part, whole["2.weight"].input_norm[1:4, 3:8])
    assert torch.equal(whole["0.weight"].part(((1, 4), (1, 3))).input_norm, whole["0.weight"].input_norm[1:3])


def expected_score(name, weight, stats):
    """By element; here each row has norms of its own."""
    factor = {
        "wanda": lambda: stats["input_norm"],
        "gradient": lambda: stats["gradient_l2"],
        "gblm": lambda: stats["input_norm"] + 100 * stats["gradient_l2"],
        "kfac": lambda: stats["input_norm"] * stats["output_grad_norm"][:, None] ** 0.7,
    }[name]
    return abs(weight) * factor()


@pytest.mark.filterwarnings("ignore:prune")  # of what is left out
@pytest.mark.parametrize(
    "how",
    [{"group": "row"}, {"group": "layer"}, {"group": "global"}, {"pattern": "2:4"}],
    ids=lambda how: next(iter(how.values())),
)
@pytest.mark.parametrize("score", ["wanda", "gradient", "gblm", "kfac"])
@pytest.mark.parametrize("name", ["2d, same", "2d, points", "1d, even and same"])
def test_masks_are_those_of_the_formula(name, score, how):
    if "pattern" in how and name == "2d, points":
        pytest.skip("two inputs a row")
    model, data = make(name)
    how = {"allocation": "uniform", **how}
    weight = as_matrix(model[2].weight)
    masks = prune(model, [data], score, targets=["2"], loss_fn=squares, num_samples=3, progress=False, **how)
    mask = as_matrix(masks["2.weight"]).astype(bool)
    assert torch.equal(model[2].weight != 0, masks["2.weight"])
    with torch.no_grad():
        flat = torch.from_numpy(weight).view(*model[2].weight.movedim(1, -1).shape).movedim(-1, 1)
        model.double()[2].weight.copy_(flat)
    scores = expected_score(score, weight, reference(model, data))
    if "pattern" in how:
        assert (mask == naive.nm_mask(scores, 2, 4)).all()
        return
    share = math.floor(scores.shape[1] / 2) * len(scores) if how["group"] == "row" else scores.size // 2
    expected = naive.row_mask(scores, share) if how["group"] == "row" else naive.layer_mask(scores, share)
    assert naive.near_ties(scores, mask, expected, "row" if how["group"] == "row" else "layer", 1e-4)


@pytest.mark.parametrize("allocation", ["kfac", "owl"])
def test_allocations_read_the_norms_of_each_row(allocation):
    model, data = make("2d, depthwise")
    how = {"num_samples": 3, "loss_fn": squares, "progress": False}
    masks = prune(model, [data], "kfac", allocation=allocation, sparsity=0.4, **how)
    assert sum(int((~m).sum()) for m in masks.values()) == math.floor(0.4 * (4 * 9 + 3 * 4))


class ByNorm(Score):
    """Compared by what it meets alone; not element by element."""

    name = "norm"
    statistics = frozenset({INPUT_NORM})

    def __call__(self, weight, statistics, name):
        return statistics.input_norm.expand_as(weight)


@pytest.mark.filterwarnings("ignore:prune")
def test_a_score_of_ones_own_gets_the_norms_of_each_row():
    model, data = make("2d in two groups")
    masks = prune(model, [data], ByNorm(), targets=["2"], num_samples=3, progress=False)
    norms = reference(model, data)["input_norm"]
    assert (
        as_matrix(masks["2.weight"]).astype(bool) == naive.row_mask(norms, len(norms) * (norms.shape[1] // 2))
    ).all()


def test_rows_of_nine_lose_four_and_at_a_tenth_are_named():
    model, data = make("2d, depthwise")
    masks = prune(model, [data], "wanda", num_samples=3, progress=False)
    assert ((~masks["2.weight"]).flatten(1).sum(1) == 4).all()
    with pytest.warns(UserWarning, match=r"nothing is pruned in 2 of 2 layers \(0\.weight, 2\.weight\).*group of 3"):
        prune(model, [data], "wanda", sparsity=0.1, num_samples=3, progress=False)


def test_blocks_with_depthwise_convolutions_are_walked():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise, self.point = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return x + self.point(torch.tanh(self.depthwise(x)))

    torch.manual_seed(0)
    model, data = nn.Sequential(Block(), Block(), Block()), 3 * torch.randn(4, 4, 6, 6)
    dense = [as_matrix(block.depthwise.weight) for block in model]
    masks = prune(model, [data], "wanda", sequential=True, num_samples=4, progress=False)
    assert len(masks) == 6
    for i, weight in enumerate(dense):
        seen = model[:i](data).split(1)  # what the pruned blocks before it give
        squared = sum((patches(model[i].depthwise, x) ** 2).sum(1) for x in seen)
        expected = naive.row_mask(abs(weight) * np.sqrt(squared / 4), 4 * 4)
        assert (as_matrix(masks[f"{i}.depthwise.weight"]).astype(bool) == expected).all()


# -- what is left out


def test_hessians_are_refused_or_left_out():
    model, data = make("2d in two groups")
    for how in ({"score": "sparsegpt"}, {"score": "wanda", "update": "exact"}, {"score": "wanda", "update": "alps"}):
        with pytest.raises(ValueError, match=r"'2\.weight' is a grouped convolution, .*no update, or add '2'"):
            prune(model, [data], targets=["2"], num_samples=3, progress=False, **how)
        with pytest.warns(UserWarning, match=r"\*\.weight \(1 tensor, .*\): grouped convolution"):
            masks = prune(model, [data], num_samples=3, progress=False, **how)
        assert list(masks) == ["0.weight"]
    alone = nn.Sequential(model[2])
    with pytest.raises(ValueError, match=r"nothing to prune.*grouped convolution: '0'"):
        prune(alone, [data], "sparsegpt")
    with pytest.raises(ValueError, match=r"'0\.weight' is a grouped convolution"):
        prune(alone, [data], "magnitude", targets=[nn.Conv2d], update="exact")
    assert int((~prune(alone, score="magnitude")["0.weight"]).sum()) == 54


def test_depthwise_conv1d_is_left_out_unless_it_is_named():
    class StateSpace(nn.Module):
        """As Mamba does it: the convolution is a function of the layer's weight."""

        def __init__(self):
            super().__init__()
            self.conv1d, self.proj = nn.Conv1d(4, 4, 3, groups=4), nn.Linear(4, 4)

        def forward(self, x):
            x = nn.functional.conv1d(x, self.conv1d.weight, self.conv1d.bias, groups=4)
            return self.proj(x.mT)

    torch.manual_seed(0)
    model, x = StateSpace(), torch.randn(2, 4, 6)
    assert select_layers(model, called=True).left_out == {"conv1d": "depthwise Conv1d"}
    how = {"num_samples": 2, "loss_fn": squares, "progress": False}
    with pytest.warns(UserWarning, match=r"conv1d\.weight \(1 tensor, 42\.9%\): depthwise Conv1d"):
        assert list(prune(model, [x], **how)) == ["proj.weight"]
    with pytest.raises(CalibrationError, match=r"'conv1d\.weight' is also used outside.*add 'conv1d' to `ignore`"):
        prune(model, [x], targets=["conv1d", "proj"], **how)
    assert list(prune(model, score="magnitude")) == ["conv1d.weight", "proj.weight"]
    called = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4))
    assert list(prune(called, [x], targets=["0"], **how)) == ["0.weight"]


def test_one_weight_in_different_groups_is_refused():
    one, other = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(2, 4, 1)
    other.weight = one.weight
    model, how = nn.ModuleList([one, other]), {"num_samples": 2, "progress": False}
    loss = lambda m, b: m[0](b).square().flatten(1).mean(1) + m[1](b[:, :2]).square().flatten(1).mean(1)  # noqa: E731
    with pytest.raises(ValueError, match=r"'0\.weight' is the weight of convolutions in \[1, 2\] groups.*magnitude"):
        prune(model, [torch.randn(2, 4, 3, 3)], "wanda", loss_fn=loss, **how)
    assert list(prune(model, score="magnitude")) == ["0.weight"]
