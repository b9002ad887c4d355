"""Where a callback takes its calibration batches from, without touching the order of the training data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, IterableDataset, Subset


class CalibrationData:
    """Calibration batches of this rank, on its device; can be iterated any number of times.

    Samples are split over the ranks so that all ranks together see what a single process would.

    Args:
        trainer: The Trainer.
        source: The user's DataLoader or iterable, taken in its own order; None draws from the training data.
        num_samples: Samples over all ranks.
        seed: Of the draw.

    Raises:
        ValueError: no training data to draw from, or fewer samples than ranks.
    """

    def __init__(self, trainer: L.Trainer, source: Iterable[Any] | None, num_samples: int, seed: int) -> None:
        self.trainer = trainer
        # Ranks of one tensor-parallel group see the same samples.
        split = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        self.rank, self.world = split["rank"], split["num_replicas"]
        if num_samples < self.world:
            raise ValueError(f"num_samples={num_samples} must be at least one for each of the {self.world} ranks")
        self.local_samples = len(range(self.rank, num_samples, self.world))
        self.presplit = False
        if source is None:
            loader = _train_dataloader(trainer)
            self.presplit = not isinstance(loader.dataset, IterableDataset)
            source = self._drawn(loader, num_samples, seed) if self.presplit else loader
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.source):
            # Lightning looks for SIGTERM between training batches only, and calibration may take long. Several
            # processes get it at different samples, and would wait for each other: there it waits for the first batch.
            if self.trainer.received_sigterm and self.trainer.world_size == 1:
                raise SIGTERMException
            if self.presplit or index % self.world == self.rank:
                batch = self.trainer.strategy.batch_to_device(batch)
                yield self.trainer.precision_plugin.convert_input(batch)

    def _drawn(self, loader: DataLoader[Any], num_samples: int, seed: int) -> DataLoader[Any]:
        """A loader of its own over a random draw of the same dataset: the training sampler is not run."""
        dataset: Any = loader.dataset
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        mine = order[:num_samples][self.rank :: self.world].tolist()
        # A loader with a batch sampler reports no batch size of its own.
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
        subset: Subset[Any] = Subset(dataset, mine)
        # Its generator is its own too: a DataLoader draws from the global one when iterated.
        return DataLoader(
            subset, batch_size=size, collate_fn=loader.collate_fn, generator=torch.Generator().manual_seed(seed)
        )


def _train_dataloader(trainer: L.Trainer) -> DataLoader[Any]:
    # `trainer.train_dataloader` is None until training starts; its source knows the loader, module or datamodule.
    loader = trainer.fit_loop._data_source.dataloader()
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"the training data is a {type(loader).__name__}, not one DataLoader: pass calibration= (a DataLoader or "
            "any iterable of batches) to the callback"
        )
    return loader
