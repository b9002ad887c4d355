"""Between a Trainer's strategy and its checkpoint files: what `PERPRetraining` writes is merged, what it reads fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L

from lightning_prune.callbacks.kinds import is_kind
from lightning_prune.checkpoints.reading import open_checkpoint
from lightning_prune.checkpoints.states import add_states, check_adapters, has_adapters, load_into, save_merged
from lightning_prune.errors import CheckpointError
from lightning_prune.perp.layers import SparseLayer

_WRAPPED = ("save_checkpoint", "load_model_state_dict", "load_checkpoint")


def follow_checkpoints(trainer: L.Trainer, perp: Any, states: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
    """Wrap how a strategy writes and loads checkpoints, for as long as the Trainer lives.

    Hooks of callbacks are not asked about checkpoints of weights alone, and come after weights are loaded. What is
    wrapped does nothing where no adapters are concerned, so it also serves those left on by an exception or by
    ``merge=False``, and ``test(ckpt_path=...)`` after the merge.

    Args:
        trainer: Whose strategy is wrapped; what an earlier fit wrapped is replaced.
        perp: Whose adapters they are.
        states: Of the callbacks that say how sharded adapters are merged. Every rank calls it.
    """
    strategy = trainer.strategy
    for name in _WRAPPED:
        original = getattr(strategy.__dict__.get(name), "of_perp", None)
        if original is not None:
            strategy.__dict__[name] = original
    if is_kind(strategy, "ModelParallelStrategy"):
        _follow_sharded(trainer, states)
        return
    save, load = strategy.save_checkpoint, strategy.load_model_state_dict

    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if strategy.is_global_zero:  # the others write nothing
            save_merged(checkpoint, trainer.lightning_module, perp.attribute, perp.state_key)
        save(checkpoint, *args, **kwargs)

    def load_model_state_dict(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        load_into(checkpoint, trainer.lightning_module, perp.attribute, perp.state_key)
        load(checkpoint, *args, **kwargs)

    _wrap(strategy, save_checkpoint, save)
    _wrap(strategy, load_model_state_dict, load)


def _follow_sharded(trainer: L.Trainer, states: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
    """Shards are written unmerged, and loaded before anything can look at them: say what could not be right."""
    strategy: Any = trainer.strategy
    save, load = strategy.save_checkpoint, strategy.load_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "callbacks" not in checkpoint and _has_adapters(trainer):
            add_states(checkpoint, states())
        save(checkpoint, *args, **kwargs)

    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        names: Iterable[str] = ()
        try:
            stored = has_adapters(names := open_checkpoint(checkpoint_path), trainer.lightning_module)
        except CheckpointError:  # Lightning's to say, which may have been told to trust it
            stored = _has_adapters(trainer)
        if stored and not _has_adapters(trainer):
            raise ValueError(
                f"{str(checkpoint_path)!r} was written while PERPRetraining trained adapters on shards, which this "
                "module has no more: build the module anew, load it on every rank with module.load_state_dict("
                "lightning_prune.load_merged_state(path)), and leave ckpt_path out"
            )
        if not stored and _has_adapters(trainer):
            raise ValueError(
                f"{str(checkpoint_path)!r} holds a plain model, and no shards of the adapters that PERPRetraining "
                "has put on this module: it was written without PERPRetraining, after the merge, on one device, or "
                "under DDP. Resume it there, or load its weights first, and start a new fit without ckpt_path"
            )
        if stored and names:
            check_adapters(list(names), trainer.lightning_module)
        return load(checkpoint_path, *args, **kwargs)

    _wrap(strategy, save_checkpoint, save)
    _wrap(strategy, load_checkpoint, load)


def _wrap(strategy: Any, function: Any, original: Any) -> None:
    function.of_perp = original
    strategy.__dict__[function.__name__] = function


def _has_adapters(trainer: L.Trainer) -> bool:
    return any(isinstance(layer, SparseLayer) for layer in trainer.lightning_module.modules())
