"""What `PERPRetraining` refuses of a Trainer, before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_prune.callbacks.weight_pruning import WeightPruning
from lightning_prune.schedules import OneShot
from lightning_prune.sharding import has_sharded_parameters

if TYPE_CHECKING:
    from lightning_prune.perp.callback import PERPRetraining


def check_strategy(strategy: Strategy, module: L.LightningModule, has_adapters: bool, reconstruct: bool) -> None:
    """Whether adapters can be trained, and merged, under a strategy.

    Args:
        strategy: Of the Trainer.
        module: As it is before adapters are put on.
        has_adapters: Whether an earlier fit left them on.
        reconstruct: Whether blocks are to be fitted before training.

    Raises:
        ValueError: naming what to use instead.
    """
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"PERPRetraining does not support {type(strategy).__name__}, whose flat shards hide the weights; use "
            "strategy=ModelParallelStrategy(tensor_parallel_size=1), which shards with FSDP2 (fully_shard in "
            "configure_model), or 'ddp'"
        )
    if isinstance(strategy, ModelParallelStrategy):
        tensor = strategy.device_mesh["tensor_parallel"].size()
        if tensor > 1:
            raise ValueError(
                f"PERPRetraining does not support ModelParallelStrategy(tensor_parallel_size={tensor}): adapters "
                "are not split within layers; use tensor_parallel_size=1 and data_parallel_size for all processes"
            )
        if reconstruct:
            raise ValueError(
                "reconstruct fits blocks one by one on whole weights, which ModelParallelStrategy shards: pass "
                "reconstruct=False, or use strategy='ddp'"
            )
    elif has_sharded_parameters(module):
        raise ValueError(
            f"parameters are sharded (DTensor) under {type(strategy).__name__}; use the "
            "ModelParallelStrategy(tensor_parallel_size=1) that sharded them"
        )
    if has_sharded_parameters(module) and not has_adapters:
        raise ValueError(
            f"the parameters of {type(module).__name__} are sharded (DTensor) already, and adapters have to be "
            "there before: build the module anew, from the saved weights, and call fully_shard in configure_model "
            "alone"
        )


def check_order(callbacks: Sequence[L.Callback], retraining: PERPRetraining) -> None:
    """Whether callbacks that copy the module in ``setup`` come after the adapters, which their copy needs.

    Raises:
        ValueError: naming the one to put later.
    """
    for callback in callbacks[: callbacks.index(retraining)]:
        if retraining.adapter is not None and isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise ValueError(
                f"{type(callback).__name__} copies the module before PERPRetraining has put adapters on it: put "
                "PERPRetraining before it in Trainer(callbacks=[...])"
            )


def check_pruner(pruner: WeightPruning, retraining: PERPRetraining) -> None:
    """Whether the `WeightPruning` of the same Trainer can prune what is retrained.

    Raises:
        ValueError: naming the settings that exclude each other.
    """
    if retraining.masks is not None:
        raise ValueError("masks are those of the WeightPruning callback in the same Trainer; leave masks out")
    if isinstance(pruner.schedule, OneShot) and not pruner.schedule.start:
        return
    if retraining.reconstruct is not None:
        raise ValueError(
            f"reconstruct comes before training, but WeightPruning(schedule={pruner.schedule!r}) prunes during it; "
            "use schedule=None, or reconstruct=False"
        )
    initial = retraining.options.get("init_lora_weights", True)
    if retraining.adapter == "lora" or initial is False:
        raise ValueError(
            f"WeightPruning(schedule={pruner.schedule!r}) prunes while the adapters train, and merges them first, "
            f"which adapter={retraining.adapter!r} with init_lora_weights={initial} cannot: use "
            "adapter='mask_lora', or schedule=None"
        )
