"""Models and losses whose gradients per sample are known, and plain autograd in float64 to compare with."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.pruning.targets import find_targets


def autograd(model, samples, loss):
    """Sum of squares of the gradients of `samples`, each one loss, in float64."""
    model, sums = copy.deepcopy(model).double().eval(), {}
    for sample in samples:
        model.zero_grad()
        loss(model, sample.double()).sum().backward()
        for target in find_targets(model):
            gradient = target.weight.grad
            gradient = torch.zeros_like(target.weight) if gradient is None else gradient
            sums[target.name] = sums.get(target.name, 0) + target.kind.to_matrix(gradient).square()
    return {name: value.sqrt() for name, value in sums.items()}


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def data(*shape, count=2):
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def squares(model, batch):
    return model(batch).square().flatten(1).mean(1)


def noise(x):
    """Another view of a batch, the same each time."""
    return x.roll(1, -1) * 0.5


def in_batch_negatives(model, batch):
    a, b = F.normalize(model(batch), dim=-1), F.normalize(model(noise(batch)), dim=-1)
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(batch)))


def penalty(model, batch):
    x = batch.clone().requires_grad_()
    y = model(x).square().flatten(1).mean(1)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y + gradient.square().flatten(1).sum(1)
