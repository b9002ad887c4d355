"""ELSA in a Trainer: what `WeightPruning(schedule=ELSA(...))` does until it prunes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer

from lightning_prune.naming import to_ignore
from lightning_prune.pruning.elsa import ADMM, ELSA, SparseCopyScore
from lightning_prune.pruning.masks import PackedMasks, current_weight
from lightning_prune.pruning.pipeline import run_plan
from lightning_prune.pruning.plan import PruningPlan
from lightning_prune.pruning.scores import Magnitude
from lightning_prune.pruning.settings import PruningSettings
from lightning_prune.pruning.targets import parameters_of
from lightning_prune.ranks import Ranks
from lightning_prune.sharding import reshard

_ADAM = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


def check_elsa_settings(settings: PruningSettings, schedule: ELSA) -> None:
    """Refuse settings of a pruning that ELSA would not follow.

    Raises:
        ValueError: naming the setting.
    """
    if not isinstance(settings.score, Magnitude):
        raise ValueError(
            f"score={settings.score.name!r} with {schedule!r}, which chooses by magnitude and Adam's second moments: "
            "pass score='magnitude'"
        )
    if settings.update is not None or settings.sequential:
        raise ValueError(
            f"update={settings.update!r} and sequential={settings.sequential} have no effect with {schedule!r}, which "
            "trains the weights into their sparsity: remove them"
        )


def check_elsa_fit(trainer: L.Trainer, plan: PruningPlan, schedule: ELSA) -> None:
    """Refuse a fit in which ELSA could not choose, before training.

    Raises:
        ValueError: an optimizer without Adam's second moments, weights that none trains, scaled gradients, or an
            allocation that needs calibration.
    """
    if plan.needs_data:
        raise ValueError(
            f"allocation={plan.settings.allocation!r} needs calibration samples at every choice of {schedule!r}: use "
            "'uniform', a mapping of sparsities, or group='global'"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"precision={trainer.precision!r} scales gradients, so that ELSA's penalty would have another weight at "
            "every step: use precision='bf16-mixed'"
        )
    stepped = {}
    for optimizer in trainer.optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        stepped.update({id(p): inner for group in inner.param_groups for p in group["params"]})
    for target in plan.targets:
        found = stepped.get(id(target.weight))
        if not isinstance(found, _ADAM):
            what = "no optimizer" if found is None else type(found).__name__
            raise ValueError(
                f"{target.name!r} is trained by {what}, but ELSA chooses by Adam's second moments: train it with Adam "
                f"or AdamW, or add {to_ignore(target.parameter)}"
            )


class ELSATraining:
    """Sparse copies of a module's weights, and when they are chosen and pull.

    Args:
        trainer: The Trainer.
        module: Its module.
        plan: What is to be pruned.
        schedule: When, and how strongly weights are pulled.
        ranks: The processes that prune together.
        state: Of a checkpoint, or None.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        plan: PruningPlan,
        schedule: ELSA,
        ranks: Ranks | None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._trainer, self._module, self._plan, self._schedule, self._ranks = trainer, module, plan, schedule, ranks
        reshard(module)
        self._admm = ADMM(parameters_of(plan.targets), schedule.penalty)
        if state:
            self._admm.load_state_dict(state)

    def pull(self, optimizer: Optimizer) -> None:
        """Add the pull to the gradients that an optimizer is about to step on."""
        self._admm.pull(p for group in optimizer.param_groups for p in group["params"])

    def choose(self, seen: int, step: int) -> None:
        """Choose what is kept, if the schedule says so for a step after `seen` up to `step`."""
        if any(self._schedule.chooses_at(done) for done in range(seen + 1, step + 1)):
            self._admm.choose(self._masks())

    def settle(self) -> PackedMasks:
        """Make the weights their sparse copies, and return the masks."""
        masks = self._masks()
        self._admm.settle(masks)
        return masks

    def _masks(self) -> PackedMasks:
        reshard(self._module)
        for name, parameter in self._admm.weights.items():
            if current_weight(self._module, name) is not parameter:
                raise RuntimeError(
                    f"the parameter {name!r} was replaced while ELSA trained it, and its sparse copy cannot follow: "
                    f"replace layers between two fits, or add {to_ignore(name)}"
                )
        targets = {target.name: target for target in self._plan.targets}
        # Of experts, each is asked for in turn, and all have one parameter.
        whole = lru_cache(maxsize=1)(partial(self._admm.values, optimizers=self._trainer.optimizers))

        def values(name: str) -> torch.Tensor:
            return targets[name].part(whole(targets[name].parameter))

        # Copies of the settings, with the score in the place of the magnitudes' that the user gave.
        settings = replace(self._plan.settings, score=SparseCopyScore(values), progress=False)
        plan = replace(self._plan, settings=settings)
        return run_plan(plan, self._module, None, ranks=self._ranks, apply=False)

    def state_dict(self) -> dict[str, Any]:
        """See `ADMM.state_dict`."""
        reshard(self._module)
        return self._admm.state_dict()
