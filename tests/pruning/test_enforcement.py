"""Zeros that hold, to the bit: weights, gradients and optimizer states in every dtype and layout."""

import math

import pytest
import torch
from torch import nn

import lightning_prune.pruning.clearing as clearing
from lightning_prune.pruning.clearing import to_bytes
from lightning_prune.pruning.enforcement import Enforcer

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BAD = [math.inf, -math.inf, math.nan, -math.nan, -1.5, -0.0, 3.0]


def bits(tensor):
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(torch.uint8).view(tensor.numel(), -1)


def bad_values(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(BAD, dtype=dtype)[torch.randint(len(BAD), shape, generator=generator)]


def check(tensor, before, mask):
    """+0.0 where pruned, the very same bits elsewhere (NaN included)."""
    flat = mask.reshape(-1)
    assert (bits(tensor)[~flat] == 0).all()
    assert torch.equal(bits(tensor)[flat], bits(before)[flat])


def layouts(shape, dtype):
    plain = bad_values(shape, dtype)
    yield plain.clone()
    yield bad_values(shape[::-1], dtype).permute(*reversed(range(len(shape))))
    wide = bad_values((*shape[:-1], shape[-1] * 2), dtype)
    yield wide[..., ::2]
    if len(shape) == 4:
        yield plain.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (4, 3, 2, 5), (64, 33)])
def test_every_dtype_and_layout(dtype, shape):
    for weight in layouts(shape, dtype):
        for mask in (
            torch.rand(shape) < 0.5,
            (torch.rand(shape[::-1]) < 0.5).permute(*reversed(range(len(shape)))),
            torch.ones(shape, dtype=torch.bool),
            torch.zeros(shape, dtype=torch.bool),
        ):
            parameter = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
            parameter.data = weight.clone() if weight.is_contiguous() else weight
            before = parameter.detach().clone()
            enforcer = Enforcer({"w": parameter}, {"w": mask})
            enforcer.mask_weights()
            check(parameter, before, mask)
            assert torch.equal(enforcer.masks()["w"], mask)
            weight.copy_(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_cover_the_whole_tensor(dtype, monkeypatch):
    monkeypatch.setattr(clearing, "_CPU_PIECE", 10)
    small, large = (nn.Parameter(bad_values((n,), dtype, n)) for n in (7, 43))
    masks = {"small": torch.rand(7) < 0.5, "large": torch.rand(43) < 0.5}
    before = {"small": small.detach().clone(), "large": large.detach().clone()}
    Enforcer({"small": small, "large": large}, masks).mask_weights()
    check(small, before["small"], masks["small"])
    check(large, before["large"], masks["large"])


def test_a_tensor_of_more_than_one_real_piece():
    weight = nn.Parameter(torch.randn(3, 350_003))
    assert weight.numel() > clearing._CPU_PIECE
    mask = torch.rand(weight.shape) < 0.3
    before = weight.detach().clone()
    Enforcer({"w": weight}, {"w": mask}).mask_weights()
    check(weight, before, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype):
    weight = nn.Parameter(torch.randn(6, 8).to(dtype))
    other = nn.Parameter(torch.randn(3).to(dtype))
    mask, other_mask = torch.rand(6, 8) < 0.5, torch.rand(3) < 0.5
    enforcer = Enforcer({"w": weight, "other": other}, {"w": mask, "other": other_mask})
    enforcer.mask_gradients()  # none yet
    weight.grad = bad_values((8, 6), dtype).t()  # not contiguous
    before, values = weight.grad.clone(), weight.detach().clone()
    enforcer.mask_gradients()
    check(weight.grad, before, mask)
    assert torch.equal(weight, values)
    assert other.grad is None
    weight.grad, other.grad = before.clone(), torch.ones(3, dtype=dtype)
    enforcer.mask_gradients([weight])
    check(weight.grad, before, mask)
    assert (other.grad == 1).all()


CHANGES = {
    "in place": lambda p: p.grad.add_(1),
    "through a view": lambda p: p.grad.view(-1)[:3].fill_(2),
    "detached": lambda p: p.grad.detach().mul_(math.nan),
    "clipped": lambda p: nn.utils.clip_grad_norm_([p], 1e-3),
    "another": lambda p: setattr(p, "grad", torch.ones_like(p)),
    "other memory": lambda p: setattr(p.grad, "data", torch.ones_like(p)),
}


@pytest.mark.parametrize("change", [*CHANGES, None])
def test_a_gradient_is_masked_again_only_if_it_has_changed(change, monkeypatch):
    weight = nn.Parameter(torch.randn(5, 7))
    mask = torch.rand(5, 7) < 0.5
    enforcer = Enforcer({"w": weight}, {"w": mask})
    weight.grad = torch.randn(5, 7)
    enforcer.mask_gradients()
    with torch.no_grad():
        CHANGES.get(change, lambda p: None)(weight)
    before, cleared = weight.grad.clone(), []
    monkeypatch.setattr(clearing.ByteMask, "clear", lambda self, tensor, own=clearing.ByteMask.clear: (
        cleared.append(tensor), own(self, tensor)))  # fmt: skip
    enforcer.mask_gradients()
    assert len(cleared) == (change is not None)
    check(weight.grad, before, mask)


def test_sparse_gradients_are_refused():
    weight = nn.Parameter(torch.randn(4, 3))
    weight.grad = torch.eye(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match=r"cannot mask a torch\.sparse_coo tensor"):
        Enforcer({"w": weight}, {"w": torch.rand(4, 3) < 0.5}).mask_gradients()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, weight_decay=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_masked_and_counters_left_alone(name):
    masked, free = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 5))
    optimizer = OPTIMIZERS[name]([masked, free])
    mask = torch.rand(5, 5) < 0.5
    enforcer = Enforcer({"w": masked}, {"w": mask})
    enforcer.mask_states(optimizer)  # no state yet
    for _ in range(2):
        masked.grad, free.grad = torch.randn(5, 5), torch.randn(5, 5)
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[masked].items() if isinstance(v, torch.Tensor)}
    other = {k: v.clone() for k, v in optimizer.state[free].items() if isinstance(v, torch.Tensor)}
    enforcer.mask_states(optimizer)
    shaped = 0
    for key, value in optimizer.state[masked].items():
        if value.shape == masked.shape:
            check(value, before[key], mask)
            shaped += 1
        else:
            assert torch.equal(value, before[key])
    assert shaped >= 1
    assert all(torch.equal(optimizer.state[free][key], value) for key, value in other.items())


def test_parameters_of_an_optimizer():
    first, second, third = (nn.Parameter(torch.randn(2, 2)) for _ in range(3))
    enforcer = Enforcer({"a": first, "b": second}, {"a": torch.ones(2, 2).bool(), "b": torch.ones(2, 2).bool()})
    optimizer = torch.optim.SGD([{"params": [third]}, {"params": [second]}], lr=0.1)
    found = enforcer.parameters_of(optimizer)
    assert len(found) == 1
    assert found[0] is second


def test_only_the_parameters_asked_for_are_masked():
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    none = torch.zeros(4, dtype=torch.bool)
    enforcer = Enforcer({"a": first, "b": second}, {"a": none, "b": none})
    enforcer.mask_weights([second])
    assert first.sum() == 4
    assert second.sum() == 0


def test_resurrected_weights_are_counted():
    weight = nn.Parameter(torch.ones(3, 4))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0] = True
    enforcer = Enforcer({"w": weight}, {"w": mask})
    assert enforcer.resurrected() == {"w": 8}
    enforcer.mask_weights()
    assert enforcer.resurrected() == {}
    with torch.no_grad():
        weight[1, 2] = math.nan
    assert enforcer.resurrected() == {"w": 1}


def test_the_given_mask_is_neither_changed_nor_kept():
    mask = torch.rand(4, 4) < 0.5
    before = mask.clone()
    weight = nn.Parameter(torch.ones(4, 4))
    enforcer = Enforcer({"w": weight}, {"w": mask})
    enforcer.mask_weights()
    assert torch.equal(mask, before)
    mask.fill_(False)
    assert torch.equal(enforcer.masks()["w"], before)
    assert to_bytes(before, torch.device("cpu")).unique().tolist() in ([-1, 0], [0], [-1])


def test_training_with_masks_equals_training_the_masked_function():
    """A masked layer under Adam with weight decay: survivors move as if the others did not exist."""
    torch.manual_seed(0)
    mask = torch.rand(3, 6) < 0.5
    weight = nn.Parameter(torch.randn(3, 6) * mask)
    reference = weight.detach().double().numpy().copy()
    optimizer = torch.optim.AdamW([weight], lr=0.05, weight_decay=0.1)
    enforcer = Enforcer({"w": weight}, {"w": mask})
    m, v = 0 * reference, 0 * reference
    data = torch.randn(5, 8, 6)
    for step, x in enumerate(data, 1):
        optimizer.zero_grad()
        (x @ weight.t()).square().mean().backward()
        enforcer.mask_gradients()
        optimizer.step()
        enforcer.mask_weights()
        enforcer.mask_states(optimizer)
        xn = x.double().numpy()
        g = (2 / (8 * 3) * (reference @ xn.T) @ xn) * mask.numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        reference = reference * (1 - 0.05 * 0.1)
        reference -= 0.05 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)) ** 0.5 + 1e-8)
    assert torch.allclose(weight.detach().double(), torch.from_numpy(reference), atol=1e-5)
    assert (weight[~mask] == 0).all()
