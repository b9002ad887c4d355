"""What callbacks that prune tell their user of a training that will not end, or was not resumed, as was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_prune.callbacks.kinds import callbacks_of, is_kind, start_method
from lightning_prune.naming import to_ignore
from lightning_prune.pruning.patterns import parse_pattern
from lightning_prune.pruning.scores import Criterion
from lightning_prune.schedules import Schedule


def warn_of_other_settings(saved: Mapping[str, Any], mine: Mapping[str, Any], score: Criterion) -> None:
    """Warn if a checkpoint's masks were made with other settings than the callback has, naming each.

    Args:
        saved: Settings in plain values; one that an older checkpoint does not hold is passed over.
        mine: The callback's.
        score: The callback's, whose own defaults stand for None.
    """
    theirs, ours = _with_defaults(saved, score), _with_defaults(mine, score)
    changed = [
        f"{name}={saved[name]!r} (here {mine[name]!r})" for name in mine if name in saved and theirs[name] != ours[name]
    ]
    if changed:
        rank_zero_warn(
            f"WeightPruning: the checkpoint's masks are kept as they are. They were made with {', '.join(changed)}. "
            "What this callback has holds only for what its schedule still prunes after the checkpoint's step. To "
            "prune anew or further by it, load the weights alone and call fit without ckpt_path, or give a schedule "
            "that ends later"
        )


def _with_defaults(settings: Mapping[str, Any], score: Criterion) -> dict[str, Any]:
    values = dict(settings)
    for name, default in (("group", score.group), ("allocation", score.allocation)):
        if name in values and values[name] is None:
            values[name] = default
    if "sparsity" in values and values["sparsity"] is None:
        pattern = parse_pattern(values.get("pattern", "unstructured"))
        values["sparsity"] = 0.5 if pattern is None else pattern.sparsity
    return values


def warn_of_untrained(weights: Mapping[str, nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    """Warn of weights that would be pruned and never trained, among others that are: a teacher that is not frozen.

    Args:
        weights: Those to be pruned, by name.
        optimizers: All of the Trainer.
    """
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = {name: id(weight) in stepped for name, weight in weights.items() if weight.requires_grad}
    idle = [name for name, steps in trained.items() if not steps]
    if 0 < len(idle) < len(trained):
        rank_zero_warn(
            f"WeightPruning: {len(idle)} of the {len(weights)} weights to prune require a gradient, but no optimizer "
            f"has them, first {idle[0]!r}: they are pruned and not trained. Give them to an optimizer; or, if they are "
            f"to stay dense as a teacher, freeze them (requires_grad_(False)), or add {to_ignore(*idle[:4])}"
        )


def warn_of_masks_that_stay_behind(strategy: object) -> None:
    """Warn of a strategy whose processes end with the fit, and the callback's masks with them."""
    if (method := start_method(strategy)) is not None:
        rank_zero_warn(
            f"WeightPruning: processes of start_method={method!r} (ddp_spawn, ddp_fork, ddp_notebook) give back the "
            "weights alone, with their zeros: after the fit masks is empty, sparsity 0.0, and trainer.save_checkpoint "
            "saves no masks. Those are in the checkpoints of the fit (ModelCheckpoint); WeightPruning(score='keep') "
            "holds the zeros in another fit. With strategy='ddp' the masks stay"
        )


def last_step(trainer: L.Trainer, module: L.LightningModule) -> float:
    """The optimizer step that training ends at, at the latest, as far as the Trainer knows; else infinity.

    Call it from `on_train_start` on, when the data are loaded.
    """
    known = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    # With manual optimization the module alone knows how many steps a batch makes.
    if not module.automatic_optimization or trainer.max_epochs in (None, -1):
        return known
    try:
        estimated = trainer.estimated_stepping_batches
    except Exception as error:
        if not is_kind(error, "MisconfigurationException"):  # accumulation that changes from epoch to epoch
            raise
        return known
    return known if estimated == -1 else min(known, float(estimated))


def warn_of_a_schedule_that_ends_too_late(schedule: Schedule, last: float) -> None:
    """Warn, before training, if it ends before the schedule does."""
    what = "nothing will be pruned" if schedule.start > last else "the sparsity asked for will not be reached"
    warn_of_an_end_too_late(f"WeightPruning: {schedule!r} ends at step {schedule.end}", schedule.end, last, what)


def warn_of_an_end_too_late(said: str, end: int, last: float, what: str) -> None:
    """Warn, before training, if it ends before a callback does.

    Args:
        said: The callback and its setting.
        end: Its last step.
        last: See `last_step`.
        what: Comes of it.
    """
    if end > last:
        rank_zero_warn(
            f"{said}, but training ends at step {last:.0f} at the latest (max_steps, max_epochs, limit_train_batches, "
            f"accumulate_grad_batches): {what}; let the schedule end earlier, or train longer"
        )


def warn_of_missing_sparsity(schedule: Schedule, step: int, pruned: int, planned: int, total: int) -> None:
    """Warn, after training, that fewer weights are pruned than was asked for."""
    state = f"{pruned / total:.2%} of the weights are pruned" if pruned else "no weight is pruned, the model is dense"
    cause = (
        f"training ended at step {step}, and {schedule!r} ends at step {schedule.end}: let it end earlier, or train "
        "longer"
        if step < schedule.end
        else "the masks are those of a checkpoint or an earlier fit: see the warning about its settings, or prune "
        "again in a fit without them"
    )
    rank_zero_warn(f"WeightPruning: {state}, not the {planned / total:.2%} that were asked for; {cause}")


def warn_of_choice_by_score(trainer: L.Trainer, schedule: Schedule) -> None:
    """Warn of callbacks that compare weights of different sparsities while a schedule prunes."""
    for callback in callbacks_of(trainer):
        choosing = is_kind(callback, "ModelCheckpoint") and callback.save_top_k != 0
        if not (choosing or is_kind(callback, "EarlyStopping")) or callback.monitor is None:
            continue
        does = "takes less sparse weights for better" if choosing else "takes the loss that pruning costs for a decline"
        rank_zero_warn(
            f"WeightPruning: {type(callback).__name__}(monitor={callback.monitor!r}) {does} until {schedule!r} ends: "
            "log infinity (-infinity for mode='max') under that name until WeightPruning.finished, with "
            "check_finite=False in EarlyStopping; 'Choosing the best checkpoint' in the documentation of WeightPruning "
            "has the code"
        )
