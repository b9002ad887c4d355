"""Take calibration batches and their loss from a Trainer, and leave no trace of it."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_prune.callbacks.kinds import has_own, is_kind
from lightning_prune.callbacks.traces import WatchedParameters, attributes_of, unchanged
from lightning_prune.errors import CalibrationError
from lightning_prune.naming import to_ignore
from lightning_prune.pruning.batches import tensors_of

# Samplers that come by all of a dataset: any sample may be drawn from it.
_OF_ALL = (SequentialSampler, RandomSampler, DistributedSampler)
_ADVICE = "pass calibration= (a DataLoader or a list of batches) to the callback"


class CalibrationData:
    """Calibration batches of this rank, on its device; can be iterated any number of times.

    Samples are split over the ranks so that all ranks together see what a single process would.

    Args:
        trainer: The Trainer.
        source: The user's DataLoader or iterable, taken in its own order; None draws from the training data.
        num_samples: Samples over all ranks.
        seed: Of the draw.

    Attributes:
        kept: Whether this must be made when the fit starts and kept for later updates: it reads copies of a stream,
            which may not be copied any more once training reads it.
        once: Whether it may be used when the fit starts alone: it reads the stream itself, and sets it back.

    Raises:
        ValueError: no training data to draw from, or none that could be read twice; or fewer samples than ranks.
    """

    def __init__(self, trainer: L.Trainer, source: Iterable[Any] | None, num_samples: int, seed: int) -> None:
        self.trainer = trainer
        # Ranks of one tensor-parallel group see the same samples.
        split = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        self.rank, self.world = split["rank"], split["num_replicas"]
        if num_samples < self.world:
            raise ValueError(f"num_samples={num_samples} must be at least one for each of the {self.world} ranks")
        self.local_samples = len(range(self.rank, num_samples, self.world))
        self.presplit = self.kept = self.once = False
        self._touched: dict[str, Any] = {}
        self._given: list[tuple[list[weakref.ref[Tensor]], int]] = []  # tensors of batches that somebody still has
        self._index = 0
        training = _training_source(trainer).instance
        if _several(source):
            raise ValueError(
                f"calibration={type(source).__name__} holds several loaders, not batches: pass batches as "
                "training_step takes them, such as [{'a': a, 'b': b} for a, b in zip(loader_a, loader_b)], or one "
                "DataLoader"
            )
        if source is None:
            with _random_states():
                source = self._of_training(_train_dataloader(trainer), num_samples, seed)
        elif isinstance(source, DataLoader) and _same_data(source, training):
            if isinstance(source.dataset, IterableDataset):
                source = self._of_stream(source, seed)
            else:
                self._touched = {"the training data": [source.generator, vars(source.sampler), source.dataset]}
                source = _with_own_workers(source)
        elif isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
            self._touched = {"the calibration data": source.dataset}  # training may read it by a loader of its own
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        trainer, data = self.trainer, self.trainer.datamodule  # type: ignore[attr-defined]
        own = data is not None and has_own(data, "on_before_batch_transfer")
        hooks: Any = data if own else trainer.lightning_module
        self._index = -1
        for index, batch in enumerate(self.source):
            # Lightning looks for SIGTERM between training batches only, and calibration may take long. Several
            # processes get it at different samples, and would wait for each other: there it waits for the first batch.
            if trainer.received_sigterm and trainer.world_size == 1:
                raise SIGTERMException
            if self.presplit or index % self.world == self.rank:
                # As the training loop does.
                batch = trainer.precision_plugin.convert_input(batch)
                batch = hooks.on_before_batch_transfer(batch, 0)  # by position, as there
                batch = trainer.strategy.batch_to_device(batch)
                self._index += 1
                self._given = [(given, i) for given, i in self._given if given and all(r() is not None for r in given)]
                self._given.append(([weakref.ref(tensor) for tensor in tensors_of(batch)], self._index))
                yield batch

    def index_of(self, batch: Any) -> int:
        """Return the number of a batch of this rank, as training would give it; of a part that of what came last."""
        tensors = list(tensors_of(batch))  # all of them, since batches may share some

        def is_of(given: list[weakref.ref[Tensor]]) -> bool:
            return len(given) == len(tensors) and all(ref() is t for ref, t in zip(given, tensors, strict=True))

        return next((i for given, i in reversed(self._given) if is_of(given)), max(self._index, 0))

    @classmethod
    @contextmanager
    def of(
        cls,
        trainer: L.Trainer,
        source: Iterable[Any] | None,
        num_samples: int,
        seed: int,
        kept: CalibrationData | None = None,
    ) -> Iterator[CalibrationData]:
        """Make calibration batches to read, and put back at the end what making and reading them has changed.

        Args:
            trainer: See the class, as `source`, `num_samples` and `seed`.
            source: See there.
            num_samples: See there.
            seed: See there.
            kept: What was made when the fit started, if it was to be kept.
        """
        with nullcontext() if kept is not None or source is not None else _loader_hook_undone(trainer):
            data = cls(trainer, source, num_samples, seed) if kept is None else kept
            with data.untouched():
                yield data

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Put back all random states, and the counters and random generators of the training data, at the end.

        So with what a data module's or a module's own hooks on batches write to; of a data module no tensors and
        arrays, which are data.
        """
        data, module = self.trainer.datamodule, self.trainer.lightning_module  # type: ignore[attr-defined]
        touched = {**self._touched, **_if_it_changes_batches("the data module", data)}
        own = _if_it_changes_batches(type(module).__name__, module)
        with _random_states(), unchanged(touched, tensors=False), unchanged(own):
            yield

    def _of_training(self, loader: Any, num_samples: int, seed: int) -> Iterable[Any]:
        if _is_plain(loader) and not isinstance(loader.dataset, IterableDataset):
            self.presplit, self._touched = True, {"the training data": loader.dataset}
            return self._drawn(loader, num_samples, seed)
        return self._of_stream(loader, seed)

    def _of_stream(self, loader: Any, seed: int) -> Iterable[Any]:
        try:
            stream = _Copied(loader, seed)
        except Exception as error:
            dataset = getattr(loader, "dataset", None)
            if _is_plain(loader) and hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict"):
                self.once = True
                return _SetBack(loader, seed)
            raise ValueError(
                f"the training data ({type(loader if dataset is None else dataset).__name__}) can be read once only, "
                f"and not copied ({error}), so training would miss what calibration reads: {_ADVICE}"
            ) from error
        self.kept = True
        return stream

    def _drawn(self, loader: DataLoader[Any], num_samples: int, seed: int) -> DataLoader[Any]:
        """A loader of its own over a random draw of the same dataset: the training sampler is not run."""
        dataset: Any = loader.dataset
        batches: Any = loader.batch_sampler
        # `batch_size=None`: what the sampler gives is a batch, or stands for one.
        sampler: Any = loader.sampler if batches is None else getattr(batches, "sampler", None)
        default = batches is None or type(batches) is BatchSampler
        if default and type(sampler) in _OF_ALL and len(_data_of(sampler)) == len(dataset):
            pool: Any = range(len(dataset))
        else:
            # Samples that the sampler leaves out may be those of validation, and batches may be composed with care.
            pool = _listed(sampler if batches is None else batches, dataset, num_samples, seed)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed), device="cpu")
        mine = [pool[i] for i in order[:num_samples][self.rank :: self.world].tolist()]
        if batches is None:
            return _loader(loader, dataset, seed, batch_size=None, sampler=mine)
        if isinstance(pool, range):
            return _loader(loader, dataset, seed, batch_size=batches.batch_size, sampler=mine)
        return _loader(loader, dataset, seed, batch_sampler=mine)


def _if_it_changes_batches(name: str, hooks: Any) -> dict[str, Any]:
    """A module or data module by its name, if it has hooks of its own that calibration batches go through."""
    names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return {name: hooks} if hooks is not None and any(has_own(hooks, n) for n in names) else {}


class _Copied:
    """A stream of training batches, of which every pass reads a copy."""

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader, self.seed = loader, seed
        self.kept = self._copy(loader.dataset if _is_plain(loader) else loader)

    def __iter__(self) -> Iterator[Any]:
        new = self._copy(self.kept)
        yield from _loader(self.loader, new, self.seed, **_streaming(self.loader)) if _is_plain(self.loader) else new

    def _copy(self, source: Any) -> Any:
        if isinstance(source, Iterator) and not hasattr(source, "__dict__"):
            # Some can be copied in some versions of Python, with what they read from left where it is.
            raise TypeError(f"cannot copy {type(source).__name__!r} object")
        # Of a loader of its own kind its samples and functions are not copied, which may hold a model.
        held = getattr(source, "__dict__", {}) if isinstance(source, DataLoader) else {}
        shared = [v for k, v in held.items() if k in ("dataset", "collate_fn", "worker_init_fn")]
        return copy.deepcopy(source, {id(value): value for value in shared if not isinstance(value, IterableDataset)})


class _SetBack:
    """A stream of training batches, whose dataset says where it is and is set back there after every pass."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self.loader, self.seed = loader, seed

    def __iter__(self) -> Iterator[Any]:
        dataset: Any = self.loader.dataset
        state = copy.deepcopy(dataset.state_dict())
        try:
            yield from _loader(self.loader, dataset, self.seed, **_streaming(self.loader))
        finally:
            dataset.load_state_dict(state)


def _loader(like: DataLoader[Any], dataset: Any, seed: int, **how: Any) -> DataLoader[Any]:
    """A loader of the same samples in another order."""
    if like.worker_init_fn is not None and like.num_workers:  # the dataset may not work without
        how = {**_workers(like), **how}
    # Its generator is its own too: a DataLoader draws from the global one when iterated.
    # It draws on the default device, whatever that is.
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return DataLoader(dataset, collate_fn=like.collate_fn, generator=generator, **how)


def _with_own_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same batches in the same order. Workers that persist serve one iterator, which training reads."""
    if not (loader.persistent_workers and _is_plain(loader)):
        return loader
    order: dict[str, Any] = {"batch_size": None, "sampler": loader.sampler}
    if loader.batch_sampler is not None:
        order = {"batch_sampler": loader.batch_sampler}
    return DataLoader(
        loader.dataset, collate_fn=loader.collate_fn, generator=loader.generator, **order, **_workers(loader)
    )


def _streaming(loader: DataLoader[Any]) -> dict[str, Any]:
    return {"batch_size": loader.batch_size, "drop_last": loader.drop_last, **_workers(loader)}


def _workers(loader: DataLoader[Any]) -> dict[str, Any]:
    names = ("num_workers", "worker_init_fn", "multiprocessing_context", "prefetch_factor", "timeout")
    return {name: getattr(loader, name) for name in names}


def _is_plain(loader: Any) -> bool:
    """Whether a loader makes batches as torch's does, so that another of the same settings makes the same."""
    if not isinstance(loader, DataLoader):
        return False
    own = any(getattr(type(loader), n) is not getattr(DataLoader, n) for n in ("__iter__", "_get_iterator"))
    return not own or hasattr(loader, "state_dict")  # torchdata's adds but its state


def _same_data(loader: DataLoader[Any], training: Any) -> bool:
    """Whether a loader is the one that training was given, or reads the same dataset."""
    return loader is training or loader.dataset is getattr(training, "dataset", None)


def _data_of(sampler: Any) -> Any:
    return sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source


def _listed(sampler: Any, dataset: Any, most: int, seed: int) -> list[Any]:
    """What a copy of a sampler yields in an epoch; up to `most` of one that knows no end."""
    shared, layer = [dataset], sampler
    while hasattr(layer, "__dict__"):
        shared += [v for v in vars(layer).values() if isinstance(v, (Dataset, Tensor, np.ndarray))]
        layer = getattr(layer, "sampler", None)
    try:
        copied = copy.deepcopy(sampler, {id(value): value for value in shared})
    except Exception as error:
        raise ValueError(
            f"the training sampler ({type(sampler).__name__}) cannot be copied ({error}), so training would miss what "
            f"calibration draws: {_ADVICE}"
        ) from error
    try:
        length = len(copied)
    except (TypeError, NotImplementedError):
        length = most
    torch.manual_seed(seed)
    found = list(islice(copied, length))
    if not found:
        raise ValueError(f"the training sampler ({type(sampler).__name__}) yields nothing to calibrate on: {_ADVICE}")
    return found


def _training_source(trainer: L.Trainer) -> Any:
    """Where a fit gets its training data from; what was given to ``fit`` stands nowhere else before training."""
    return trainer.fit_loop._data_source


@contextmanager
def _loader_hook_undone(trainer: L.Trainer) -> Iterator[None]:
    """Put back what ``train_dataloader`` changes in the module or data module, which training calls once more.

    It may count its calls to choose a part of the data, or draw from a random generator.
    """
    owner = _training_source(trainer).instance
    if not is_kind(owner, "LightningModule", "LightningDataModule"):
        yield
        return
    name = type(owner).__name__
    with unchanged({name: owner}, tensors=False) as state:
        if state.unknown and owner is not trainer.lightning_module:  # of which it is said elsewhere
            named = ", ".join(f"{path} ({kind})" for path, kind in state.unknown.items())
            rank_zero_warn(f"what train_dataloader of {name} draws from {named} for calibration cannot be undone")
        yield


def _train_dataloader(trainer: L.Trainer) -> Any:
    # `trainer.train_dataloader` is None until training starts; its source knows the loader, module or datamodule.
    loader = _training_source(trainer).dataloader()
    if isinstance(loader, (list, tuple)) or _several(loader) or not isinstance(loader, Iterable):
        raise ValueError(f"the training data is a {type(loader).__name__}, not one DataLoader: {_ADVICE}")
    return loader


def _several(data: Any) -> bool:
    """Whether what should yield batches holds loaders, by name or in a list."""
    listed = isinstance(data, (list, tuple)) and any(isinstance(item, DataLoader) for item in data)
    return listed or isinstance(data, Mapping) or is_kind(data, "CombinedLoader")


_WHEN = (
    "The training step ran to calibrate a pruning when the fit starts, which is before the module's and other "
    "callbacks' on_fit_start, on_train_start, on_train_epoch_start and on_train_batch_start, and before "
    "trainer.train_dataloader and trainer.num_training_batches are known. If it needs what they make: make it in "
    "__init__ or setup, give the module calibration_loss(batch), pass loss_fn=f(module, batch) to the callback, or "
    "prune after the first step (schedule=OneShot(1))."
)
_EVALUATED = (
    "It ran in evaluation mode, in which some models return no loss, or another number of things: pass "
    "loss_fn=f(module, batch), which may call train() on such a part of the module."
)


def calibration_loss(
    module: L.LightningModule, data: CalibrationData | None = None
) -> Callable[[nn.Module, Any], Tensor]:
    """The loss a LightningModule trains with, as ``loss_fn(module, batch)``.

    A module's own ``calibration_loss(batch)``, one loss a sample ``[B]``, is preferred where it has one; else
    ``training_step``.

    Args:
        module: The module.
        data: Whose batches it is given, to number them for ``training_step``; without it each is the first.

    Raises:
        ValueError: the training step optimizes by itself (manual optimization) or takes the data iterator.
    """
    own = getattr(module, "calibration_loss", None)
    if callable(own):
        return lambda _, batch: own(batch)
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} uses manual optimization, so its training_step would step the optimizers; pass "
            "loss_fn=f(module, batch) to the callback, or give the module a method calibration_loss(batch)"
        )
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError(
            "a training_step that takes dataloader_iter cannot be calibrated; pass loss_fn to the callback"
        )
    # As Lightning gives it: to a step that takes anything (wrapped by a decorator, say) too.
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    numbered = len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())

    def loss(_: nn.Module, batch: Any) -> Any:
        index = (0 if data is None else data.index_of(batch),) if numbered else ()
        output = module.training_step(batch, *index)
        found: Any = output["loss"] if isinstance(output, dict) and "loss" in output else output
        # None passes over a batch in training: its layers' inputs are seen all the same, and only gradients need more.
        if not isinstance(found, Tensor) and found is not None:
            raise ValueError(
                f"training_step returned {type(output).__name__}, not a loss; pass loss_fn to the callback"
            )
        return found

    return loss


@contextmanager
def _random_states() -> Iterator[None]:
    """Put the random states of torch, CUDA, numpy and Python back at the end."""
    isolated = isolate_rng()
    isolated.__enter__()
    try:
        yield
    finally:
        isolated.__exit__(None, None, None)  # by hand, since after an error it restores nothing


class _Nothing:
    """Take every call and item in the place of what a logger writes to, and do nothing."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self

    def __getitem__(self, key: Any) -> _Nothing:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *problem: Any) -> None:
        pass


class _Unannounced:
    """Keep classes that are made on the side from what a class does with its subclasses (a list of all by name)."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _silent(logger: Any) -> Any:
    """Make a logger of the same class, folders and names, for which a step may look, that logs nothing."""
    kind: Any = type(logger)
    if hasattr(kind, "__getattr__"):  # it makes up what it has, as mocks do
        return DummyLogger()
    methods = [n for n in dir(kind) if n.startswith("log_") and callable(getattr(kind, n))] + ["log", "save", "watch"]
    quiet: dict[str, Any] = {name: lambda *args, **kwargs: None for name in methods if hasattr(kind, name)}
    quiet["experiment"] = _Nothing()
    try:
        # The class's own `__new__` may give the one logger that there is.
        silent: Any = object.__new__(type(kind.__name__, (_Unannounced, kind), quiet))
        for name, value in attributes_of(logger).items():
            if name not in quiet:
                object.__setattr__(silent, name, value)
    except (TypeError, AttributeError):  # a class that is not made so
        return DummyLogger()
    return silent


@contextmanager
def no_trace(trainer: L.Trainer, module: L.LightningModule) -> Iterator[WatchedParameters]:
    """Undo what a training step does beside its loss.

    Logging goes nowhere; attributes (counters, containers however nested, tensors, arrays, random generators, objects
    of the user's classes), torchmetrics states, buffers, parameters and whether they require a gradient, learning rates
    and their schedulers, whether training is to stop, and all random states (torch, CUDA, numpy, Python) are afterwards
    what they were. What cannot be put back (iterators, files, what threads share) is named in a warning.

    Yields what to run the loss in, so that parameters that it writes to are copied first.
    """
    loggers, stopping = trainer.loggers, trainer.should_stop
    silenced = {name: lambda *args, **kwargs: None for name in ("log", "log_dict")}
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    # The last is looked at first, and names what others hold too.
    roots = {
        "learning-rate schedulers": [config.scheduler for config in trainer.lr_scheduler_configs],
        "optimizers": list(trainer.optimizers),
        type(module).__name__: module,
    }
    with _random_states(), unchanged(roots) as state:
        if state.unknown:
            named = ", ".join(f"{name} ({kind})" for name, kind in state.unknown.items())
            rank_zero_warn(f"what a training step draws from or writes to {named} in calibration cannot be undone")
        parameters = WatchedParameters(state.parameters)
        trainer.loggers = [_silent(logger) for logger in loggers]
        module.__dict__.update(silenced)
        try:
            yield parameters
        finally:
            for name in silenced:
                module.__dict__.pop(name, None)
            trainer.loggers, trainer.should_stop = loggers, stopping
            parameters.put_back()
            for parameter, flag in trained:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)


def watched_loss(
    loss_fn: Callable[[nn.Module, Any], Tensor],
    parameters: WatchedParameters,
    pruned: Iterable[Tensor],
    before_hooks: bool,
) -> Callable[[nn.Module, Any], Tensor]:
    """A loss that may write to parameters, though not to those that are pruned.

    Args:
        loss_fn: The loss.
        parameters: From `no_trace`.
        pruned: The parameters that are being pruned.
        before_hooks: Whether the hooks of training have not run yet, to say so too where the loss fails.

    Raises:
        CalibrationError: the loss fails as code does that misses something which hooks, or training mode, make.
        ValueError: it writes to a pruned parameter.
    """
    ours = {id(parameter) for parameter in pruned}

    def loss(module: nn.Module, batch: Any) -> Tensor:
        try:
            with parameters:
                value = loss_fn(module, batch)
        except (AttributeError, TypeError, LookupError, ArithmeticError, NameError) as error:
            why = f"{_EVALUATED} {_WHEN}" if before_hooks else _EVALUATED
            raise CalibrationError(f"the calibration loss failed: {type(error).__name__}: {error}. {why}") from error
        changed = [name for key, (name, *_) in parameters.changed.items() if key in ours]
        if changed:
            raise ValueError(
                f"the loss writes to {', '.join(changed[:4])}, which is being pruned; the weights are unchanged. Do "
                "that in a hook (on_train_batch_start, on_train_batch_end), pass loss_fn to the callback, or add "
                f"{to_ignore(*changed)}"
            )
        return value

    return loss
