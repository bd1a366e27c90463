"""Whole batches of indices, keyed by seed, epoch, position and rank, and the loader of what they ask for."""

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from continuum.training.images import DataError, Request, keyed_generator

Loader = DataLoader[Any]


class KeyedBatches(DistributedSampler[Any]):
    """Whole batches of indices with their augmentation keys, for this rank.

    A `DistributedSampler`, so that Lightning leaves it in place. Epoch and position come from the trainer when there is one,
    and an epoch that was cut short goes on at the batch after the last one trained on. Training drops no image: a last batch of
    a single one, on which BatchNorm cannot train, joins the batch before it.
    """

    def __init__(self, indices: Tensor, batch_size: int, seed: int, shuffle: bool, trainer: pl.Trainer | None) -> None:
        self.indices, self.batch_size, self.seed, self.shuffle, self.trainer = indices, batch_size, seed, shuffle, trainer
        self.rank = trainer.global_rank if trainer else 0
        self.num_replicas = trainer.world_size if trainer else 1
        self.epoch = 0

    def batches(self, epoch: int) -> list[Tensor]:
        """The index batches of an epoch; under several ranks, all have equally many."""
        indices = self.indices
        if self.shuffle:
            indices = indices[torch.randperm(len(indices), generator=keyed_generator(self.seed, "order", epoch))]
        if self.num_replicas > 1:
            share = -(-len(indices) // self.num_replicas)
            if self.shuffle:  # every rank trains on equally many images: the first few serve twice
                indices = torch.cat([indices, indices[: share * self.num_replicas - len(indices)]])
            indices = indices[self.rank :: self.num_replicas]
        batches = list(indices.split(self.batch_size)) if len(indices) else []  # split makes one empty batch of nothing
        if self.shuffle and len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def __iter__(self) -> Iterator[Request]:  # pyright: ignore[reportIncompatibleMethodOverride]
        epoch, start = self.epoch, 0
        if self.shuffle and self.trainer is not None:
            epoch = self.trainer.current_epoch
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            start = progress.processed
        batches = self.batches(epoch)
        for number in range(start if start < len(batches) else 0, len(batches)):
            key = keyed_generator(self.seed, "batch", epoch, number, self.rank)
            yield batches[number], int(torch.randint(2**62, (), generator=key)) if self.shuffle else -1

    def __len__(self) -> int:
        return len(self.batches(0))


class BatchLoader(DataLoader[Any]):
    """Loads what `KeyedBatches` asks for. It has no state: position and epoch are the trainer's, which restores them."""

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # A generator, which starts at the first batch: worker processes would ask for batches at once, and when it resumes,
        # Lightning makes its iterator before it restores the epoch.
        try:
            yield from super().__iter__()
        except DataError as error:  # out of a worker process it comes with that one's traceback in front
            raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Tell Lightning that this loader resumes in the middle of an epoch."""
