"""What a model must not be, and what must not stand beside it, for it to shrink while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch._dynamo import OptimizedModule
from torch.optim import Optimizer

from lightning_prune.callbacks.weight_pruning import WeightPruning
from lightning_prune.sharding import has_sharded_parameters
from lightning_prune.structure.saliency import check_saliency
from lightning_prune.structure.sizes import ATTENTION_UNITS
from lightning_prune.structure.units import Structure


def check_settings(callback: Any) -> None:
    """Values that are wrong for any model.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_saliency(callback.saliency)
    if callback.attention_unit not in ATTENTION_UNITS:
        raise ValueError(f"attention_unit={callback.attention_unit!r} must be one of {ATTENTION_UNITS}")
    for name in ("second_order_every", "compact_every", "round_to"):
        value = getattr(callback, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    for name in ("saliency_decay", "second_order_decay"):
        if not 0 <= getattr(callback, name) < 1:
            raise ValueError(f"{name}={getattr(callback, name)!r} must be in [0, 1)")
    if callback.schedule.end is not None and callback.schedule.units != 1:
        raise ValueError(
            f"units_per_pruning={callback.schedule.units} and end={callback.schedule.end} exclude each other: with end "
            "each pruning takes as many units as it needs to arrive there. Leave one out"
        )
    if callback.distill_from is not None and not 0 < callback.distill_weight <= 1:
        raise ValueError(f"distill_weight={callback.distill_weight!r} must be above 0 and at most 1")
    if not callback.temperature > 0:
        raise ValueError(f"temperature={callback.temperature!r} must be above 0")
    target = callback.target
    if isinstance(target, bool) or not isinstance(target, (int, float, dict)):
        raise TypeError(f"target={target!r} must be a float (share), an int (parameters) or a dict of final sizes")


def check_trainer(trainer: L.Trainer, callback: Any) -> None:
    """Strategies and callbacks that hold shapes of their own, and a precision that scales gradients under kfac.

    Raises:
        ValueError: naming it, and what to use.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"PruningAwarePretraining does not support {type(strategy).__name__}: parameters in shards cannot be "
            "sliced while they train; use one device or strategy='ddp', or shrink before with prune_structured"
        )
    if isinstance(strategy, DDPStrategy):
        if strategy._start_method != "popen":
            raise ValueError(
                f"PruningAwarePretraining does not support DDP with start_method={strategy._start_method!r}, which "
                "returns the weights to a module of the old sizes; use strategy='ddp'"
            )
        if strategy._ddp_comm_state is not None:
            raise ValueError(
                "PruningAwarePretraining does not support DDP with ddp_comm_state, whose buffers keep the old shapes; "
                "leave it out"
            )
    if callback.saliency == "kfac" and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"saliency='kfac' squares output gradients, which precision={trainer.precision!r} scales from step to "
            "step; use precision='bf16-mixed', or another saliency"
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks:
        if other is callback:
            continue
        # By name too: importing the adapters' callback would load PEFT.
        if isinstance(other, (WeightPruning, StochasticWeightAveraging, ModelPruning)) or (
            type(other).__name__ == "PERPRetraining"
        ):
            raise ValueError(
                f"{type(other).__name__} keeps tensors of the weights' shapes, which change here: run it in a fit of "
                "its own, after the model has shrunk"
            )


def check_module(module: L.LightningModule) -> None:
    """Modules that cannot change their shapes.

    Raises:
        ValueError: manual optimization, a compiled or sharded module.
    """
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} uses manual optimization, where nobody says which gradients a step is made of; "
            "PruningAwarePretraining needs automatic optimization"
        )
    compiled = getattr(module, "_compiler_ctx", None) is not None or any(
        isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in module.modules()
    )
    if compiled:
        raise ValueError(
            "the model is compiled (torch.compile), and every compaction would compile it anew; train without, and "
            "compile the model once it is small"
        )
    if has_sharded_parameters(module):
        raise ValueError("parameters are sharded (DTensor) and cannot be sliced; use one device or strategy='ddp'")


def check_optimizers(structure: Structure, optimizers: Sequence[Optimizer], saliency: str) -> None:
    """Optimizers and gradients that the saliency cannot be read from.

    Raises:
        ValueError: several optimizers, or parameters without gradients.
    """
    if len(optimizers) != 1:
        raise ValueError(
            f"PruningAwarePretraining needs one optimizer, found {len(optimizers)}: with several, a step is no longer "
            "one set of gradients"
        )
    frozen = [name for name, p in structure.parameters().items() if not p.requires_grad]
    if frozen and saliency != "magnitude":
        raise ValueError(
            f"saliency={saliency!r} needs gradients, but {len(frozen)} parameters are frozen ({frozen[0]}, ...); "
            "train them, or use saliency='magnitude'"
        )
    check_states(structure, optimizers)


def check_states(structure: Structure, optimizers: Sequence[Optimizer]) -> None:
    """Optimizer states that cannot be sliced with their weight; those that exist by now.

    Raises:
        ValueError: naming the optimizer and the state.
    """
    for optimizer in optimizers:
        for name, p in structure.parameters().items():
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps the state {key!r} of {name!r} with shape "
                        f"{tuple(value.shape)}, which cannot be sliced with the weight's {tuple(p.shape)}; use one "
                        "whose states have the weight's shape (Adam, AdamW, SGD, RMSprop, Adagrad)"
                    )
