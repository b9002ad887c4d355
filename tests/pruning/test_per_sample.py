"""Gradients of one sample each, of losses and layers that do not make it easy: right by plain autograd, or refused."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from per_sample_losses import autograd, data, in_batch_negatives, noise, penalty, squares, two_layers
from tiny import make_llama, make_tokens, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_prune import prune
from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import FORWARD_STATISTICS, GRADIENTS
from lightning_prune.pruning.targets import find_targets

ALL = {"input_norm", "output_grad_norm", "gradient_l1", "gradient_l2"}


def gather(model, batches, loss, statistics=GRADIENTS, num_samples=None):
    size = sum(len(batch) for batch in batches)
    return collect(
        model, batches, find_targets(model), statistics, num_samples=num_samples or size, loss_fn=loss, progress=False
    )


def assert_right(model, batches, loss, samples=None, statistics=GRADIENTS):
    found = gather(model, batches, loss, statistics)
    samples = [row[None] for batch in batches for row in batch] if samples is None else samples
    for name, value in autograd(model, samples, loss).items():
        assert value.max() > 0, name
        torch.testing.assert_close(found[name].gradient_l2.double(), value, rtol=1e-3, atol=1e-5 * float(value.max()))


def assert_refused(model, batches, loss, message, statistics=GRADIENTS):
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=message):
        gather(model, batches, loss, statistics)
    assert snapshot(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Linear))


# -- losses that need their batch ------------------------------------------------------------------------------------


def in_batch_negatives_one_by_one(model, batch):
    a, b = F.normalize(model(batch), dim=-1), F.normalize(model(noise(batch)), dim=-1)
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(batch)), reduction="none")


def halves(model, batch):
    chosen, rejected = model(batch).sum(-1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def neighbors(model, batch):
    scores = model(batch).sum(-1)
    return -F.logsigmoid(scores[::2] - scores[1::2]).mean()


def decorrelated(model, batch):
    a, b = model(batch), model(noise(batch))
    a, b = (a - a.mean(0)) / a.std(0), (b - b.mean(0)) / b.std(0)
    return (a.T @ b / len(batch) - torch.eye(a.shape[1], dtype=a.dtype)).square().sum()


def hardest_triplet(model, batch):
    x = model(batch)
    distance = (x[:, None] - x[None]).square().sum(-1).add(1e-6).sqrt()
    same = torch.arange(len(x))[:, None] % 2 == torch.arange(len(x)) % 2
    positive = distance.masked_fill(~same, -1).max(1).values
    negative = distance.masked_fill(same, 1e4).min(1).values
    return (positive - negative + 0.3).relu().mean()


def centered(model, batch):
    y = model(batch)
    return (y - y.mean(0)).square().mean()


def beside_a_larger_loss(model, batch):
    """Where a term is nothing of a sample alone, and too small to lift the loss over the largest of theirs."""
    y = model(batch)
    y = y - y.mean(0)
    covariance = y.T @ y / len(batch)
    return squares(model, batch).mean() + 4 * (covariance - covariance.diag().diag()).square().sum()


WHOLE = [
    in_batch_negatives,
    halves,
    neighbors,
    decorrelated,
    hardest_triplet,
    centered,
    in_batch_negatives_one_by_one,
    beside_a_larger_loss,
]


@pytest.mark.parametrize("loss", WHOLE, ids=lambda f: f.__name__)
def test_a_loss_that_needs_its_batch_gives_one_gradient_a_batch(loss):
    model, batches = two_layers(), data(6, 6)
    mean = (lambda m, b: loss(m, b).mean()) if loss is in_batch_negatives_one_by_one else loss
    with pytest.warns(UserWarning, match="each batch is one sample with one gradient.*calibration_loss"):
        found = gather(model, batches, loss, ALL)
    for name, value in autograd(model, batches, mean).items():
        torch.testing.assert_close(found[name].gradient_l2.double(), value, rtol=1e-3, atol=1e-5 * float(value.max()))
    # Norms of inputs are of all samples, as ever; SimCLR's two views are two uses.
    assert all(entry.samples == 12 for entry in found.values())


def test_batches_that_stay_whole_are_not_cut():
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch))
        return halves(model, batch)

    with pytest.warns(UserWarning, match="ValueError"):
        gather(two_layers(), data(6, 6, count=3), loss, num_samples=8)
    assert sizes[-2:] == [6, 6]


@pytest.mark.parametrize("loss", [in_batch_negatives, decorrelated], ids=lambda f: f.__name__)
def test_kfac_prunes_no_rows_by_position(loss):
    model = two_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = prune(model, data(6, 6), score="kfac", sparsity=0.5, loss_fn=loss, num_samples=12, progress=False)
    assert all(mask.any(1).all() for mask in masks.values())


def weighted_tokens(model, batch):
    weights = (batch[..., 0] > 0).to(batch.dtype)
    return (model(batch).square().mean(-1) * weights).sum() / weights.sum()


@pytest.mark.parametrize(
    "loss",
    [lambda m, b: squares(m, b).mean(), lambda m, b: squares(m, b).sum(), lambda m, b: squares(m, b).max()],
    ids=["mean", "sum", "largest"],
)
@pytest.mark.parametrize("size", [2, 5, 12])
def test_a_loss_made_of_its_samples_is_taken_apart(loss, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(two_layers(), data(size, 3, 6), loss)


def test_a_mean_over_tokens_of_the_batch_is_taken_apart():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(two_layers(), data(4, 5, 6), weighted_tokens)


# -- zero gradients --------------------------------------------------------------------------------------------------


def two_means(model, batch):
    """One mean over tokens, of which samples have more or fewer, and one over samples."""
    return weighted_tokens(model, batch) + 0.5 * model(batch).mean(1).square().mean()


def noisy(model, batch):
    return squares(model, batch + torch.randn_like(batch)).mean()


@pytest.mark.parametrize("loss", [two_means, noisy])
def test_losses_whose_samples_weigh_differently_or_are_noisy_are_taken_apart(loss):
    torch.manual_seed(0)
    sizes = []

    def noted(model, batch):
        sizes.append(len(batch))
        return loss(model, batch)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gather(two_layers(), data(8, 5, 6), noted)
    assert sizes[-8:] == [1] * 8


def test_gradients_that_overflow_are_refused():
    model, batches = two_layers().half(), [batch.half() for batch in data(8, 6)]
    assert_refused(model, batches, lambda m, b: squares(m, b).mean() * 3e3, "NaN or infinity", {"output_grad_norm"})


def test_gradients_that_are_all_zero_are_refused():
    assert_refused(two_layers(), data(4, 6), lambda m, b: squares(m, b) * 0, "zero in 2 of 2 layers")


class Gated(nn.Module):
    """A branch behind a gate that is still zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch, self.gate = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return x + self.gate * self.branch(x)


@pytest.mark.parametrize(("score", "other", "group"), [("kfac", "wanda", "layer"), ("gradient", "magnitude", "row")])
def test_a_layer_without_gradient_is_named_and_not_pruned_by_position(score, other, group):
    def masks(name):
        return prune(
            Gated(), data(4, 6), score=name, group=group, allocation="uniform", sparsity=0.5, loss_fn=squares,
            num_samples=8, progress=False,
        )  # fmt: skip

    with pytest.warns(UserWarning, match=r"zero in 1 of 2 layers \(branch\.weight\)"):
        found = masks(score)
    assert torch.equal(found["branch.weight"], masks(other)["branch.weight"])


class BehindZero(nn.Module):
    """A branch whose first layer is still zero, as those of ControlNet: its second sees nothing else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.zero, self.branch = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return x + self.branch(self.zero(x))


@pytest.mark.parametrize("pattern", ["unstructured", "1:2"])
@pytest.mark.parametrize(
    ("group", "how"),
    [
        ("row", {"score": "wanda"}),
        ("row", {"score": "kfac"}),
        ("row", {"score": "gblm"}),
        ("row", {"score": "wanda", "update": "exact"}),
        ("layer", {"score": "sparsegpt"}),
    ],
    ids=str,
)
def test_a_layer_without_inputs_is_named_and_not_pruned_by_position(group, how, pattern):
    settings = {"pattern": pattern, "ignore": ["zero"], "progress": False}
    compared = {"group": group, "allocation": "uniform"} if pattern == "unstructured" else {}
    own = {} if how["score"] == "sparsegpt" else compared
    with pytest.warns(UserWarning, match=r"inputs are zero in 1 of 2 layers \(branch\.weight\)"):
        found = prune(BehindZero(), data(4, 6), loss_fn=squares, num_samples=8, **settings, **own, **how)
    by_size = prune(BehindZero(), score="magnitude", **settings, **compared)
    assert torch.equal(found["branch.weight"], by_size["branch.weight"])


# -- samples without a label -----------------------------------------------------------------------------------------


def labeled_loss(model, batch, reduction):
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].transpose(1, 2)
    labels = batch["labels"][:, 1:]
    if reduction == "mean":
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="none").sum(1) / (labels != -100).sum(1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("empty", [[3], [0], [0, 1]])
def test_samples_without_labels_are_passed_over(reduction, empty):
    model, ids = make_llama(), make_tokens(6, 8)
    labels = ids.clone()
    labels[empty] = -100
    labels[empty[0], 0] = 5  # predicts nothing: a causal model has no logits for the first token
    full = [i for i in range(6) if i not in empty]
    targets = find_targets(model)

    def run(rows, size):
        batches = [{"input_ids": ids[r], "labels": labels[r]} for r in torch.tensor(rows).split(size)]
        loss = lambda m, b: labeled_loss(m, b, reduction)  # noqa: E731
        return collect(model, batches, targets, ALL, num_samples=len(rows), loss_fn=loss, progress=False)

    expected = run(full, 1)
    with pytest.warns(UserWarning, match=f"{len(empty)} of 6 calibration samples have no label"):
        found = run(list(range(6)), 4)
    for name, entry in expected.items():
        assert found[name].samples == len(full)
        for statistic in ALL:
            one, other = getattr(found[name], statistic), getattr(entry, statistic)
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.max()))


def test_no_label_at_all_is_refused():
    model, ids = make_llama(), make_tokens(4, 8)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    for reduction in ("mean", "none"):
        with pytest.raises(CalibrationError, match="none of the 4 calibration samples has a label"):
            collect(
                model, [batch], find_targets(model), ALL, num_samples=4,
                loss_fn=lambda m, b, reduction=reduction: labeled_loss(m, b, reduction), progress=False,
            )  # fmt: skip


# -- layouts ---------------------------------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))).transpose(0, 1)


@pytest.mark.parametrize("shape", [(5, 5), (2, 2), (3, 2), (2, 3), (4, 1)])
def test_time_first_layers(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(TimeFirst(), data(*shape, 6), squares)


def ragged(layout):
    """A loss of samples of one to six tokens, each made of its own."""

    def loss(model, batch):
        lengths = [1 + int(10 * row.abs().sum()) % 6 for row in batch]
        texts = [row * torch.arange(1, n + 1)[:, None] for row, n in zip(batch, lengths, strict=True)]
        out = model(torch.nested.as_nested_tensor(texts, layout=layout))
        return sum(y.square().mean() for y in out.unbind()) / len(batch)

    return loss


def test_samples_of_several_lengths_in_one_tensor():
    model, batches, loss = two_layers(), data(4, 6), ragged(torch.jagged)
    assert_right(model, batches, loss)
    found = gather(model, batches, loss, {"input_norm"})  # forward passes of whole batches
    alone = gather(model, [row[None] for batch in batches for row in batch], loss, {"input_norm", "output_grad_norm"})
    for name, statistics in found.items():
        torch.testing.assert_close(statistics.input_norm, alone[name].input_norm)
        assert bool(alone[name].output_grad_norm.all())
    assert_refused(model, batches, ragged(torch.strided), r"layout=torch\.jagged, or choose a score without gradients")


def test_a_first_batch_of_one_sample_does_not_tell_the_layout():
    one, four = torch.randn(1, 4, 6), torch.randn(4, 4, 6)  # as many samples as tokens
    assert_right(TimeFirst(), [one, four], squares)


# -- hooks of others -------------------------------------------------------------------------------------------------


def doubles_output(model):
    model[0].register_forward_hook(lambda module, args, output: output * 2)


def doubles_output_first(model):
    model[0].register_forward_hook(lambda module, args, output: output * 2, prepend=True)


def shifts_input(model):
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * 3 - 1,))


def shifts_input_late(model):
    model[2].register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 3 - 1,), kwargs), with_kwargs=True)
    model[2].register_forward_pre_hook(lambda module, args: (args[0].clone().mul_(2),))


def in_place(model):
    model[0].register_forward_hook(lambda module, args, output: output.mul_(2))


def backward_hooks(model):
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    model[2].register_full_backward_pre_hook(lambda module, grad_out: (grad_out[0] * 2,))


@pytest.mark.parametrize(
    "add", [doubles_output, doubles_output_first, shifts_input, shifts_input_late, in_place, backward_hooks]
)
@pytest.mark.parametrize("size", [1, 3])
def test_hooks_of_users_do_not_change_what_a_layer_is_taken_to_see(add, size):
    model, seen = two_layers(), []
    add(model)
    linear, batches = nn.functional.linear, data(size, 4, 6)
    assert_right(model, batches, squares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", lambda x, *rest: (seen.append(x.detach()), linear(x, *rest))[1])
        for batch in batches:
            model(batch)
    for statistics in (FORWARD_STATISTICS, ALL):
        found = gather(model, batches, squares, statistics)
        for i, name in enumerate(["0.weight", "2.weight"]):
            rows = torch.cat([x.flatten(0, 1) for x in seen[i::2]]).double()
            expected = (rows.square().sum(0) / (2 * size)).sqrt()
            torch.testing.assert_close(found[name].input_norm.double(), expected, rtol=1e-4, atol=1e-5)


# -- gradients of gradients ------------------------------------------------------------------------------------------


def adversarial(model, batch):
    x = batch.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(squares(model, x).sum(), x)
    return squares(model, batch + 0.1 * gradient.sign())


def kept_graph(model, batch):
    x = batch.clone().requires_grad_()
    y = squares(model, x)
    (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    return y * gradient.square().flatten(1).sum(1)


def test_gradient_penalties_are_refused():
    assert_refused(two_layers(), data(3, 4, 6), penalty, "create_graph=True")


@pytest.mark.parametrize("loss", [adversarial, kept_graph], ids=lambda f: f.__name__)
def test_gradients_inside_a_loss_that_it_does_not_depend_on(loss):
    assert_right(two_layers(), data(3, 4, 6), loss)


def backward_inside(model, batch):
    x = batch.clone().requires_grad_()
    squares(model, x).sum().backward()
    return squares(model, batch + 0.1 * x.grad.sign())


@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("loss", [adversarial, penalty, backward_inside], ids=lambda f: f.__name__)
def test_norms_of_a_loss_that_takes_gradients_by_its_inputs(loss, outside):
    """A loss of forces, or of physics; the inputs of all its passes count, and no parameter gets a gradient."""
    model, batches, rows = two_layers(), data(3, 4, 6), []
    reference = copy.deepcopy(model).double()
    reference[2].register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, 1)))
    for batch in batches:
        loss(reference, batch.double())
    model[0].bias.requires_grad_(False)
    with outside():
        found = gather(model, batches, loss, FORWARD_STATISTICS, num_samples=6)
        assert torch.is_grad_enabled() == (outside is torch.enable_grad)
    seen = torch.cat(rows)
    torch.testing.assert_close(
        found["2.weight"].input_norm.double(), (seen.square().sum(0) / 6).sqrt(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(found["2.weight"].hessian.double(), seen.T @ seen / 6, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    elsewhere = lambda m, x: functional(m, x) + loss(m, x)  # noqa: E731
    assert_refused(two_layers(), batches, elsewhere, "also used outside its layer's forward pass", FORWARD_STATISTICS)


# -- weights used elsewhere ------------------------------------------------------------------------------------------


def decay(model, batch):
    return squares(model, batch) + 0.1 * model[0].weight.square().sum()


def all_decay(model, batch):
    return squares(model, batch) + 0.1 * torch.cat([p.flatten() for p in model.parameters()]).norm()


def functional(model, batch):
    return squares(model, batch) + F.linear(batch.tanh(), model[0].weight).square().flatten(1).mean(1)


def transposed(model, batch):
    back = torch.tanh(model[0](batch)) @ model[0].weight
    return squares(model, batch) + (back - batch).square().flatten(1).mean(1)


def direct(model, batch):
    return squares(model, batch) + model[2].forward(torch.tanh(model[0](batch))).flatten(1).mean(1)


@pytest.mark.parametrize("loss", [decay, all_decay, functional, transposed, direct], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scalar", [False, True])
def test_weights_that_a_loss_uses_elsewhere_are_refused(loss, scalar):
    name = "'2'" if loss is direct else "'0'"
    function = (lambda m, b: loss(m, b).mean()) if scalar else loss
    assert_refused(two_layers(), data(3, 4, 6), function, f"add {name} to `ignore`")


def rows(model, batch):
    return squares(model, batch) + F.linear(batch, model[0].weight[:2]).square().flatten(1).mean(1)


def columns(model, batch):
    first, _ = model[0].weight.t().chunk(2)
    return squares(model, batch) + (batch[..., : len(first)] @ first).square().flatten(1).mean(1)


def by_vectors(model, batch):
    return squares(model, batch) + torch.stack([torch.mv(model[0].weight, x.mean(0)).square().mean() for x in batch])


def contracted(model, batch):
    return squares(model, batch) + torch.tensordot(batch, model[0].weight, ([-1], [1])).square().flatten(1).mean(1)


def in_steps(model, batch):
    return squares(model, batch) + (batch[..., None, :] * model[0].weight).sum(-1).square().flatten(1).mean(1)


def scaled(model, batch):
    return squares(model, batch) + F.linear(batch, -(model[0].weight * 0.5) / 3).square().flatten(1).mean(1)


ELSEWHERE = [functional, transposed, direct, rows, columns, by_vectors, contracted, in_steps, scaled]


@pytest.mark.parametrize("loss", ELSEWHERE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("statistics", [FORWARD_STATISTICS, {"input_norm", "output_grad_norm"}])
def test_products_elsewhere_are_refused_for_norms_too(loss, statistics):
    assert_refused(two_layers(), data(3, 4, 6), loss, "is also used outside its layer's forward pass", statistics)


def importance(model, batch):
    """A penalty with a coefficient for each weight, each row and all."""
    weight = model[0].weight
    return squares(model, batch) + 0.1 * (torch.ones(8, 6) * weight * weight + torch.ones(8, 1) * weight).sum() / 2


def logged(model, batch):
    seen = [p.norm() for p in model.parameters()] + [model[0].weight @ model[0].weight.T, model[0].weight.data.sum()]
    with torch.no_grad():
        seen.append(model[0].weight.square().mean())
    return squares(model, batch) + 0 * seen[0].detach() + F.linear(batch, model[0].weight.detach()).mean().detach()


def test_weights_that_are_only_looked_at_do_no_harm():
    assert_right(two_layers(), data(3, 4, 6), logged)
    for penalty_of in (decay, importance):
        plain, watched = (gather(two_layers(), data(3, 4, 6), f, {"output_grad_norm"}) for f in (squares, penalty_of))
        for name, entry in plain.items():
            torch.testing.assert_close(entry.output_grad_norm, watched[name].output_grad_norm)
    gather(two_layers(), data(3, 4, 6), importance, FORWARD_STATISTICS)


# -- layers of their own kind ----------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


class ScaledInPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x).mul_(3)


class ScaledInput(nn.Linear):
    def forward(self, x):
        return super().forward(x * 3)


class ScaledWeight(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(x) + super().forward(x * 2)


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.sigmoid(), y


class Cast(nn.Linear):
    def forward(self, x):
        return F.linear(x.double(), self.weight.double(), None).to(x.dtype) + self.bias


class Product(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Adapted(nn.Linear):
    """A low-rank adapter in the layer itself."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x):
        result = F.linear(x, self.weight, self.bias)
        result += x @ self.down.T @ self.up.T
        return result


class First(nn.Module):
    def forward(self, x):
        return x[0] if isinstance(x, tuple) else x


def of_kind(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), kind(6, 5), First())


@pytest.mark.parametrize("kind", [Scaled, ScaledInPlace, ScaledInput, ScaledWeight, Twice])
@pytest.mark.parametrize("size", [1, 3])
def test_layers_whose_forward_is_another_are_refused_by_name(kind, size):
    assert_refused(of_kind(kind), data(size, 4, 6), squares, r"'2'.*`ignore`")


class Masked(nn.Linear):
    """As the layers of autoregressive flows are."""

    def forward(self, x):
        return F.linear(x, self.weight * (torch.arange(6) < 3), self.bias)


def test_a_layer_that_masks_its_weight_is_said_to_change_it():
    message = r"'2' changes its weight \('(__)?mul(__)?': a mask.*add '2' to `ignore`, or choose.*\(kfac,"
    assert_refused(of_kind(Masked), data(3, 4, 6), squares, message)
    with pytest.warns(UserWarning, match=r"'2' \(Masked\) does not multiply with its weight as it is stored"):
        gather(of_kind(Masked), data(3, 4, 6), squares, {"input_norm", "output_grad_norm"})


def test_a_refusal_says_what_to_ignore_in_all_blocks():
    """As of Mamba's dt_proj, whose module multiplies with its weight by itself in every block."""
    model = nn.Sequential(*(nn.ModuleDict({"up": nn.Linear(6, 6), "skip": nn.Linear(6, 6)}) for _ in range(3)))
    model.forward = lambda x: [x := (block["skip"].weight @ block["up"](x).mT).mT for block in model][-1]
    by_name = r"add '0\.skip' to `ignore` \('\*\.skip' for all blocks\)"
    assert_refused(model, data(3, 6), squares, by_name, FORWARD_STATISTICS)
    targets = find_targets(model, ignore=["*.skip"])
    assert [t.name for t in targets] == ["0.up.weight", "1.up.weight", "2.up.weight"]
    collect(model, data(3, 6), targets, FORWARD_STATISTICS, num_samples=6, loss_fn=squares, progress=False)


@pytest.mark.parametrize("size", [1, 3])
def test_a_named_router_that_returns_a_tuple_is_refused(size):
    model, batches = of_kind(Router), data(size, 4, 6)
    assert [t.name for t in find_targets(model)] == ["0.weight"]
    with pytest.raises(CalibrationError, match=r"'2' returns tuple, not a tensor.*`ignore`"):
        collect(model, batches, find_targets(model, ["0", "2"]), GRADIENTS, loss_fn=squares, progress=False)


@pytest.mark.parametrize("kind", [ScaledInput, Twice])
def test_inputs_that_a_layer_changes_are_refused_for_norms_too(kind):
    assert_refused(of_kind(kind), data(3, 4, 6), squares, r"'2'.*`ignore`", FORWARD_STATISTICS)


@pytest.mark.parametrize("kind", [Cast, Product, Adapted])
@pytest.mark.parametrize("size", [1, 3])
def test_layers_that_multiply_in_another_way_are_right(kind, size):
    assert_right(of_kind(kind), data(size, 4, 6), squares)


class Geometries(nn.Module):
    """One weight, two geometries."""

    def __init__(self, **second):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.b = nn.Conv2d(4, 4, 3, bias=False, **second)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize(
    "second", [{"padding": 2, "dilation": 2}, {"stride": 2}, {"padding": 1, "padding_mode": "circular"}], ids=str
)
@pytest.mark.parametrize("size", [1, 3])
def test_tied_convolutions_with_geometries_of_their_own(second, size):
    assert_right(Geometries(**second), data(size, 4, 8, 8), squares, statistics=ALL)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("loss", [squares, in_batch_negatives], ids=lambda f: f.__name__)
def test_checkpoints_with_hooks_and_whole_batches(reentrant, loss):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inside = nn.Linear(6, 6), two_layers()

        def forward(self, x):
            return checkpoint(self.inside, torch.tanh(self.stem(x)), use_reentrant=reentrant)

    model = Block()
    doubles_output(model.inside)
    batches = data(4, 6)
    whole = loss is in_batch_negatives
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loss of a calibration batch")
        assert_right(model, batches, loss, batches if whole else None)


def test_checkpoints_do_not_hide_a_scaled_layer():
    class Block(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.stem, self.inside, self.reentrant = nn.Linear(6, 6), of_kind(Scaled), reentrant

        def forward(self, x):
            return checkpoint(self.inside, torch.tanh(self.stem(x)), use_reentrant=self.reentrant)

    for reentrant in (False, True):
        assert_refused(Block(reentrant), data(3, 6), squares, r"'inside\.2'.*`ignore`")
