"""A module whose average is looked at, and what must be zero in it."""

from __future__ import annotations

from typing import Any

import torch
from own_modules import Classifier, dataset
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune import WeightPruning


def assert_zero(state: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        assert bool((state[name].detach()[~mask] == 0).all()), name
        assert bool((state[name].detach()[mask] != 0).any()), name


def module(**kwargs: Any) -> Classifier:
    torch.manual_seed(0)
    made = Classifier(dropout=0.0, **kwargs)
    made.train_dataloader = lambda: DataLoader(dataset(), batch_size=8)
    return made


def magnitude(schedule: Any = None) -> WeightPruning:
    return WeightPruning(score="magnitude", schedule=schedule, progress=False)
