"""The settings of a pruning, as a user gives them, and every check of them that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import check_bool
from lightning_prune.history import described
from lightning_prune.pruning.allocation import Allocation, make_allocation
from lightning_prune.pruning.patterns import NM, parse_pattern
from lightning_prune.pruning.scores import (
    GBLM,
    GROUPS,
    KFAC,
    Criterion,
    Gradient,
    Keep,
    Magnitude,
    Random,
    Wanda,
    missing_members,
)
from lightning_prune.pruning.targets import DEFAULT_IGNORE, reject_bare_string
from lightning_prune.pruning.updates import ALPS, UPDATES, SparseGPT, Update
from lightning_prune.schedules import is_share

GRADIENT_DTYPES: dict[str | torch.dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
}
_BUILT_IN: dict[str, type[Any]] = {
    str(kind.name): kind for kind in (Magnitude, Random, Wanda, Gradient, GBLM, SparseGPT, KFAC, Keep)
}
SCORES = tuple(_BUILT_IN)


def make_score(
    score: str | Criterion, *, alpha: float = 100.0, gamma: float = 0.7, grad_norm: str = "l2", seed: int = 0
) -> Criterion:
    """A built-in score by name, with the options that it takes, or the user's own object as it is.

    Raises:
        ValueError: an unknown name, `grad_norm` not l1 or l2, a negative or non-finite `alpha` or `gamma`.
        TypeError: an object without the attributes of `lightning_prune.Score`.
    """
    if grad_norm not in ("l1", "l2"):
        raise ValueError(f"grad_norm={grad_norm!r} must be 'l1' or 'l2'")
    for argument, value in (("alpha", alpha), ("gamma", gamma)):
        if not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
            raise ValueError(f"{argument}={value!r} must be a finite number >= 0")
    if isinstance(score, str):
        if score not in _BUILT_IN:
            raise ValueError(f"score={score!r} is unknown; choose from {SCORES}, or give an object (see Score)")
        options = {"alpha": alpha, "gamma": gamma, "grad_norm": grad_norm, "seed": seed}
        made: Criterion = _BUILT_IN[score](**{name: options[name] for name in _BUILT_IN[score].__dataclass_fields__})
        return made
    lacks = [] if isinstance(score, (SparseGPT, Keep)) else missing_members(score)
    if isinstance(score, type) or lacks:
        raise TypeError(
            f"score={score!r} must be one of {SCORES} or an object with name, statistics, group, allocation, "
            "elementwise and __call__(weight, statistics, name); a class that inherits from lightning_prune.Score has "
            "defaults for all but name and __call__"
        )
    return score


@dataclass(frozen=True)
class PruningSettings:
    """What a pruning is asked to do; `lightning_prune.prune` says what each means.

    Raises:
        ValueError, TypeError: what no model could take; see `lightning_prune.prune`.
    """

    score: Criterion
    sparsity: float | None = None
    pattern: str = "unstructured"
    group: str | None = None
    allocation: Allocation | None = None
    update: str | ALPS | None = None
    num_samples: int = 128
    sequential: bool = False
    targets: Sequence[str | type[nn.Module]] | None = None
    ignore: Sequence[str | type[nn.Module]] = DEFAULT_IGNORE
    gradient_dtype: str | torch.dtype = "float32"
    gradient_device: torch.device | str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        reject_bare_string("targets", self.targets)
        reject_bare_string("ignore", self.ignore)
        check_bool("sequential", self.sequential)
        score, nm, group, allocation = self.score, self.nm, self.group, self.allocation
        if self.sparsity is not None and not is_share(self.sparsity):
            raise ValueError(
                f"sparsity={self.sparsity!r} must be a number in [0, 1]: the share of weights to prune, such as 0.5"
            )
        samples = self.num_samples
        if not isinstance(samples, int) or isinstance(samples, bool) or not 1 <= samples < 2**31:
            raise ValueError(f"num_samples={samples!r} must be an integer >= 1, below 2**31")
        if not isinstance(self.update, ALPS) and self.update not in (None, *UPDATES):
            choices = ", ".join(map(repr, (None, *UPDATES)))
            raise ValueError(f"update={self.update!r} must be one of {choices}, or an ALPS(...)")
        if isinstance(self.solver, ALPS) and not getattr(score, "proportional", False):
            raise ValueError(
                f"update='alps' needs a score that is abs(W) times a factor, such as 'wanda' or 'kfac', which score="
                f"{score.name!r} is not (it has no proportional = True); use update='exact'"
            )
        if group is not None and group not in GROUPS:
            raise ValueError(f"group={group!r} must be one of {GROUPS}, or None for the score's own")
        if score.group not in GROUPS:
            raise ValueError(f"score {score.name!r} has group={score.group!r}; it must be one of {GROUPS}")
        if self.gradient_dtype not in GRADIENT_DTYPES:
            raise ValueError(f"gradient_dtype={self.gradient_dtype!r} must be 'float32' or 'bfloat16'")
        if self.gradient_device is not None:
            torch.device(self.gradient_device)
        if nm is not None:
            if self.sparsity is not None and abs(self.sparsity - nm.sparsity) > 1e-6:
                raise ValueError(
                    f"pattern={self.pattern!r} prunes {nm.sparsity:.4f} of the weights, but sparsity={self.sparsity}: "
                    "leave sparsity out, or take pattern='unstructured'"
                )
            if allocation not in (None, "uniform"):
                raise ValueError(
                    f"pattern={self.pattern!r} fixes the sparsity of every layer: leave allocation={allocation!r} out"
                )
            if group not in (None, "row"):
                raise ValueError(f"pattern={self.pattern!r} compares within groups of a row: leave group={group!r} out")
        chosen = make_allocation("uniform" if allocation is None else allocation)
        if self.compared_within == "global" and chosen != "uniform":
            raise ValueError(
                f"group='global' decides the layers' sparsities itself: leave allocation={allocation!r} out, or take "
                "group='row' or 'layer'"
            )
        if isinstance(score, SparseGPT) and (group not in (None, "layer") or self.update):
            raise ValueError(
                "score='sparsegpt' selects within 128 columns and updates by itself: no group, no update, here "
                f"group={group!r} and update={self.update!r}. Leave them out, or take a score such as 'wanda'"
            )
        asked = {
            "sparsity": self.sparsity,
            "pattern": nm and self.pattern,
            "group": group,
            "allocation": allocation,
            "update": self.update,
            "sequential": self.sequential or None,
        }
        given = [f"{name}={value!r}" for name, value in asked.items() if value is not None]
        if self.keeps_zeros and given:
            raise ValueError(f"score='keep' takes the zeros as they are: leave {', '.join(given)} out")

    @property
    def nm(self) -> NM | None:
        """The N:M pattern, or None for unstructured."""
        return parse_pattern(self.pattern)

    @property
    def scored_by(self) -> Criterion:
        """The score that is computed: the factor of a row cancels in N:M groups, so kfac needs no gradients there."""
        return Wanda() if isinstance(self.score, KFAC) and self.nm is not None else self.score

    @property
    def keeps_zeros(self) -> bool:
        """Whether the mask is that of the weights which are not zero already."""
        return isinstance(self.score, Keep)

    @property
    def selects_itself(self) -> bool:
        """Whether the solver chooses which weights go, so that there are no scores."""
        return self.solver is not None and self.solver.chooses

    @property
    def compared_within(self) -> str:
        """The group of weights that are compared: what the user says, or else the update and the score."""
        own = self.score.group
        return self.group or ("layer" if own == "row" and isinstance(self.solver, ALPS) else own)

    @property
    def solver(self) -> Update | None:
        """What changes the weights that stay, or None if nothing does."""
        if isinstance(self.score, SparseGPT):
            return self.score
        return UPDATES[self.update] if isinstance(self.update, str) else self.update

    def describe(self) -> dict[str, Any]:
        """What says how masks came about, options of the score included, in plain values."""
        options = {name: getattr(self.score, name) for name in getattr(self.score, "__dataclass_fields__", {})}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _UNTOLD}
        return {name: described(value) for name, value in {**options, **own}.items()}


# What a description has by name already, and what changes no mask but by rounding.
_UNTOLD = ("score", "gradient_dtype", "gradient_device", "progress")
