"""`SparsityMonitor`: log how sparse a model is while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.callbacks.copies import copied_state
from lightning_prune.callbacks.kinds import callbacks_of, is_kind
from lightning_prune.callbacks.weight_pruning import pruners_of, required_grad, trained_now
from lightning_prune.checkpoints.reading import check_checkpoint_of
from lightning_prune.errors import check_whole
from lightning_prune.history import HISTORY_FILE, append_step, begin_history, run_facts
from lightning_prune.naming import place, plain_name
from lightning_prune.pruning.coverage import countable_weights
from lightning_prune.pruning.targets import DEFAULT_IGNORE, find_targets, parameters_of
from lightning_prune.sharding import counts_over_ranks, joins


class SparsityMonitor(L.Callback):
    """Log sparsity, density by layer and layer type, and saliency to every logger of the Trainer.

    Exact zeros of the weights are counted, not masks: what is logged is what a checkpoint would hold. The names, the
    same for every logger:

    - ``sparsity/total``: share of zeros over all layers that are pruned (`targets`);
    - ``sparsity/countable``: share of zeros over all matrices outside embeddings and heads, pruned or not, the figure
      of ``lightning-prune inspect``;
    - ``density/type/TYPE``: share of weights that are not zero over all layers of a type, such as ``q_proj``;
    - ``density/layer/LAYER``: the same of one layer, by the name of its module;
    - ``saliency/NAME``: of every callback with an attribute ``saliency``, a mapping from names to numbers
      (`WeightPruning`: the mean score of each layer when it was last pruned). Reading it must not need other ranks.

    Values belong to the step they are logged at: the state after that many optimizer steps, 0 before the first. They
    are read before the next batch, so the order of callbacks does not matter, and once more at the end of training.
    Names of layers inside PEFT's are those they have without it.

    Beside the logs, in the run's own folder, rank 0 writes zeros and size of every layer that is pruned, saliencies,
    and what is known of the run (versions, seed, settings) to ``sparsity_history.jsonl``, for
    ``lightning-prune report``. Without a logger it goes to ``default_root_dir``.

    Counting reads every matrix once. Where weights are sharded (FSDP2, tensor parallelism) each rank counts its
    part, and one small all-reduce adds them up; otherwise rank 0 alone counts. Only rank 0 logs and writes.

    Args:
        every_n_steps: Optimizer steps between two entries.
        per_layer: Log ``density/layer/...`` too; without it the history still has every layer.
        targets: Layers to count, as in `WeightPruning`; default those of the Trainer's `WeightPruning`, else all
            that `prune` would find.
        ignore: Layers to leave, likewise; default output layers.
        history: Write the history file.

    Raises:
        ValueError: `every_n_steps` is below 1, or the strategy flattens weights (FSDP1, DeepSpeed).

    Example::

        trainer = L.Trainer(callbacks=[WeightPruning(sparsity=0.5), SparsityMonitor(every_n_steps=50)])
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        per_layer: bool = True,
        targets: list[str | type[nn.Module]] | None = None,
        ignore: Iterable[str | type[nn.Module]] | None = None,
        history: bool = True,
    ) -> None:
        super().__init__()
        check_whole("every_n_steps", every_n_steps, hint=", such as 100")
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.targets = targets
        self.ignore = ignore if ignore is None or isinstance(ignore, str) else tuple(ignore)
        self.history = history
        self._folder: Path | None = None
        self._file: Path | None = None
        self._last: int | None = None
        self._trained: dict[str, bool] = {}  # by parameter: whether it required a gradient when the fit started
        self._told = False  # that there is nothing left to log

    def __getstate__(self) -> dict[str, Any]:
        """What a copy keeps: everything but its Trainer's."""
        return copied_state(self)

    # -- life of a fit -----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse unsafe checkpoints and strategies that hide the weights, and agree on the folder."""
        check_checkpoint_of(trainer)
        if stage != "fit":
            return
        if is_kind(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"SparsityMonitor does not support {type(trainer.strategy).__name__}, whose flat shards hide the "
                "weights; use strategy=ModelParallelStrategy(), or 'ddp'"
            )
        self._folder, self._file, self._last, self._told = _folder_of(trainer), None, None, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fail on targets that match nothing before training starts."""
        self._trained = trained_now(pl_module)
        self._targets_of(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log what the steps so far have left."""
        step = _logged_step(trainer)
        if step % self.every_n_steps == 0:
            self._log(trainer, pl_module, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what training has ended with."""
        self._log(trainer, pl_module, _logged_step(trainer))

    # -- counting ----------------------------------------------------------------------------------------------------

    def _targets_of(self, trainer: L.Trainer, module: L.LightningModule) -> list[tuple[str, Tensor]]:
        """Names of layers, and their weights as they are now."""
        pruners = [pruner.settings for pruner in pruners_of(trainer)]
        chosen = [
            (how.targets if self.targets is None else self.targets, how.ignore if self.ignore is None else self.ignore)
            for how in pruners
        ] or [(self.targets, DEFAULT_IGNORE if self.ignore is None else self.ignore)]
        found: dict[str, Tensor] = {}
        with required_grad(module, self._trained):  # layers that are frozen along the way go on being counted
            for targets, ignore in chosen:
                found |= parameters_of(find_targets(module, targets, ignore))
        return [(layer_name(name), weight.detach()) for name, weight in found.items()]

    def _log(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        if step == self._last:  # several batches make one step under accumulation
            return
        self._last = step
        if not joins(module, trainer.is_global_zero):
            return
        try:
            weights = dict(self._targets_of(trainer, module))
        except ValueError as error:  # layers that were there at the start: a model may have shrunk
            if not self._told:
                self._told = True
                rank_zero_warn(f"SparsityMonitor logs nothing from step {step} on: {error}")
            return
        countable = {key if (key := layer_name(n)) in weights else n: w for n, w in countable_weights(module).items()}
        nonzeros = counts_over_ranks(countable | weights, lambda weight: int(weight.count_nonzero()))
        if not trainer.is_global_zero:
            return
        layers = {n: (w.numel() - nonzeros[n], w.numel(), place(n)[1]) for n, w in weights.items()}
        saliency = _saliency_of(trainer)
        values = metrics(layers, saliency, self.per_layer)
        size = sum(weight.numel() for weight in countable.values())
        values["sparsity/countable"] = 1.0 - sum(nonzeros[name] for name in countable) / size if size else 0.0
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if self.history and self._folder is not None:
            if self._file is None:
                self._file = self._folder / HISTORY_FILE
                begin_history(self._file, run_facts(trainer, module), step)
            append_step(self._file, step, layers, saliency)


def metrics(
    layers: Mapping[str, tuple[int, int, str]], saliency: Mapping[str, float], per_layer: bool
) -> dict[str, float]:
    """What is logged of counted layers (zeros, number of weights, type), by its stable name.

    >>> metrics({"layers.0.q_proj": (3, 4, "q_proj"), "layers.1.q_proj": (1, 4, "q_proj")}, {}, per_layer=False)
    {'sparsity/total': 0.5, 'density/type/q_proj': 0.5}
    """
    types: dict[str, tuple[int, int]] = {}
    for zeros, numel, kind in layers.values():
        before = types.get(kind, (0, 0))
        types[kind] = (before[0] + zeros, before[1] + numel)
    zeros, total = (sum(counts[i] for counts in types.values()) for i in range(2))
    values = {"sparsity/total": zeros / total if total else 0.0}
    values |= {f"density/type/{kind}": 1.0 - z / n for kind, (z, n) in types.items() if n}
    if per_layer:
        values |= {f"density/layer/{name}": 1.0 - z / n for name, (z, n, _) in layers.items() if n}
    return values | {f"saliency/{name}": value for name, value in saliency.items()}


def layer_name(parameter: str) -> str:
    """The name of a weight's module, without what PEFT puts in between.

    >>> layer_name("model.base_model.model.model.layers.0.q_proj.base_layer.weight")
    'model.model.layers.0.q_proj'
    """
    return plain_name(parameter.replace("base_model.model.", "")).removesuffix(".weight")


def _folder_of(trainer: L.Trainer) -> Path:
    """The run's own folder, where `ModelCheckpoint` puts its checkpoints too. Every rank must call."""
    folder: str | None = None
    if trainer.is_global_zero and trainer.loggers:
        logger = trainer.loggers[0]
        if logger.log_dir is not None:
            folder = logger.log_dir
        elif logger.name is not None and logger.version is not None:  # W&B, MLflow: runs share a folder
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            folder = str(Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version))
    return Path(trainer.strategy.broadcast(folder) or trainer.log_dir or trainer.default_root_dir)


def _saliency_of(trainer: L.Trainer) -> dict[str, float]:
    found: dict[str, float] = {}
    for callback in callbacks_of(trainer):
        values = getattr(callback, "saliency", None)
        if isinstance(values, Mapping):
            found |= {layer_name(str(name)): float(value) for name, value in values.items() if value is not None}
    return found


def _logged_step(trainer: L.Trainer) -> int:
    """The step as Lightning hands it to loggers: not `global_step`, which counts each of several optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
