"""What `PERPRetraining` does when training starts: reconstruct block by block, on data and dense weights it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor, nn

from lightning_prune.callbacks.calibration_data import CalibrationData
from lightning_prune.callbacks.weight_pruning import WeightPruning, ranks_of
from lightning_prune.perp.dense import DenseSource
from lightning_prune.perp.options import check_adapter
from lightning_prune.perp.reconstruction import Reconstruction, check_settings, reconstruct

OPTIONS = ("dense", "adapter", "steps", "learning_rate", "num_samples", "targets", "offload", "calibration")
_DEFAULTS: dict[str, Any] = {"steps": 100, "learning_rate": 1e-3, "num_samples": 128, "targets": "dense"}


def reconstruct_options(
    given: bool | Mapping[str, Any], adapter: str | None, train: Sequence[str], lora_options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The options of a reconstruction before training, complete and checked; None for no reconstruction.

    Raises:
        TypeError, ValueError: an unknown option, or a value that no model could take.
    """
    if given is False:
        return None
    if given is not True and not isinstance(given, Mapping):
        raise TypeError(f"reconstruct={given!r} must be True, False, or a mapping of {', '.join(OPTIONS)}")
    options = {**_DEFAULTS, "adapter": adapter, **({} if given is True else given)}
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise ValueError(f"reconstruct has the unknown option {unknown[0]!r}; it takes any of {', '.join(OPTIONS)}")
    check_adapter(options["adapter"])
    parts = tuple(part for part in train if part in ("bias", "norm"))
    passed = {k: v for k, v in lora_options.items() if k != "target_modules"} if options["adapter"] == adapter else {}
    check_settings(options["adapter"], parts, options["steps"], options["learning_rate"], options["targets"], passed)
    if not isinstance(options["num_samples"], int) or not 1 <= options["num_samples"] < 2**31:
        raise ValueError(f"num_samples={options['num_samples']!r} of reconstruct must be an integer >= 1, below 2**31")
    return {**options, "train": parts, "lora_options": passed}


def check_dense_is_known(options: Mapping[str, Any], pruner: WeightPruning | None) -> None:
    """Dense weights come from the user, or from a pruner that has them when it prunes.

    Raises:
        ValueError: neither will have them.
    """
    if options.get("dense") is not None:
        return
    if pruner is None:
        raise ValueError(
            "reconstruct needs the weights from before pruning: pass reconstruct={'dense': FOLDER} (or a model, or "
            "weights by name), or prune in the same Trainer with WeightPruning(...)"
        )
    if pruner.settings["score"].name == "keep":
        raise ValueError(
            "WeightPruning(score='keep') prunes nothing, so it never has the dense weights that reconstruct needs: "
            "pass reconstruct={'dense': FOLDER}"
        )


def reconstruct_before_training(
    trainer: L.Trainer,
    model: nn.Module,
    options: Mapping[str, Any],
    masks: Mapping[str, Tensor] | None,
    pruner: WeightPruning | None,
    rename: Callable[[str], str],
    seed: int,
) -> Reconstruction:
    """Reconstruct the plain transformers model of a module that is about to train.

    Args:
        trainer: The Trainer.
        model: The transformers model, without adapters.
        options: Of `reconstruct_options`.
        masks: By parameter name; None for the weights' zeros.
        pruner: The `WeightPruning` beside, which may have the dense weights.
        rename: From its names of parameters to those of the model.
        seed: See `reconstruct`; also of the draw of calibration samples.

    Raises:
        ValueError: see `reconstruct`; or the pruner has not pruned in this fit.
    """
    dense: DenseSource | None = options.get("dense")
    taken = {} if pruner is None else {rename(n): weight for n, weight in pruner.take_dense_weights().items()}
    if dense is None and not taken:
        raise ValueError(
            "the module was pruned before this fit, so the weights from before are not known to reconstruct: pass "
            "reconstruct={'dense': FOLDER}, or reconstruct=False for another fit"
        )
    data = CalibrationData(trainer, options.get("calibration"), options["num_samples"], seed)
    with data.untouched():
        return reconstruct(
            model,
            data,
            taken if dense is None else dense,
            masks,
            adapter=options["adapter"],
            train=options["train"],
            steps=options["steps"],
            learning_rate=options["learning_rate"],
            num_samples=data.local_samples,
            targets=options["targets"],
            offload=options.get("offload"),
            seed=seed,
            forward_context=trainer.precision_plugin.train_step_context,
            ranks=ranks_of(trainer),
            **options["lora_options"],
        )
