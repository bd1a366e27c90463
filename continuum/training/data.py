"""Images for classification under Lightning: parts that the seed chooses, held as uint8 where the network trains.

Random numbers are keyed, not consumed: order and augmentation of an epoch derive from (seed, epoch). So a resumed run repeats
the uninterrupted one, and no generator state is kept.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor

from continuum.training.batches import BatchLoader, InOrder, Plan, Shuffled, at_start
from continuum.training.images import IMAGENET_MEAN, IMAGENET_STD, DataError, LabelledImages, keyed_generator

Normalisation = Literal["training", "imagenet"]


class ImageData(pl.LightningDataModule, ABC):
    """A labelled set of images with a seeded validation split of its training part.

    Batches arrive as images, (batch, channels, height, width), normalised per channel, and labels in int64. The images are in
    float32, or in the type of the weights that Lightning trains, as under precision="64-true".
    After `setup`: `classes`, `num_classes`, `shape` of an image, and the `mean` and `std` of the normalisation.

    Args:
        batch_size: images a batch and rank.
        validation: the share of the training images that is held out; never the test images.
        crop: pad by so many black pixels and crop at random; None takes what is usual for the set.
        flip: mirror half of the training images; None takes what is usual for the set.
        train_size: train on so many images only, chosen by the seed.
        seed: of the split, the order of the batches and the augmentation.
        normalisation: by the statistics of the "training" images, or of "imagenet", which networks from elsewhere expect.
        device_share: a set in memory is copied to the training GPU if it takes at most this share of what is free there; 0
            leaves it on the CPU, from where it goes batch by batch.
    """

    usual_crop: ClassVar[int] = 0
    usual_flip: ClassVar[bool] = False

    def __init__(
        self,
        batch_size: int = 128,
        validation: float = 0.1,
        crop: int | None = None,
        flip: bool | None = None,
        train_size: int | None = None,
        seed: int = 0,
        normalisation: Normalisation = "training",
        device_share: float = 0.5,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, not {batch_size}")
        if not 0 <= validation < 1:
            raise ValueError(f"validation is a share of the training images in [0, 1), not {validation}")
        if crop is not None and crop < 0:
            raise ValueError(f"crop is a number of pixels, not {crop}")
        if seed < 0:
            raise ValueError(f"seed is not negative; got {seed}")
        if train_size is not None and train_size < 1:
            raise ValueError(f"train_size is a positive number of images, not {train_size}")
        if normalisation not in get_args(Normalisation):
            raise ValueError(f"normalisation is one of {', '.join(get_args(Normalisation))}, not {normalisation!r}")
        if not 0 <= device_share <= 1:
            raise ValueError(f"device_share is a share of the memory that is free on a GPU, in [0, 1], not {device_share}")
        self.batch_size = batch_size
        self.validation = validation
        self.crop = self.usual_crop if crop is None else crop
        self.flip = self.usual_flip if flip is None else flip
        self.train_size = train_size
        self.seed = seed
        self.normalisation: Normalisation = normalisation
        self.device_share = device_share
        self.classes: list[str] = []
        self.train_images: LabelledImages | None = None

    @abstractmethod
    def load(self, train: bool) -> LabelledImages:
        """The training or the test images; sets `classes`."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What was given to the constructor, as plain data."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def setup(self, stage: str | None = None) -> None:
        if self.train_images is not None:
            return
        found: list[LabelledImages] = []
        faults: list[str] = []
        for part in (False, True):
            try:
                found.append(self.load(train=part))
            except DataError as error:  # so that the faults of both parts are known at once
                faults.append(str(error))
        if faults:
            raise DataError("; ".join(dict.fromkeys(faults)))
        self.test_images, train = found
        for part in found:
            self._check_labels(part.labels)
        imagenet = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self.mean, self.std = train.statistics() if self.normalisation == "training" else imagenet
        self.shape = train.shape
        if len(self.mean) != self.shape[0]:
            raise DataError(f"imagenet's statistics are of three channels, these images have {self.shape[0]}: use 'training'")
        if (shape := self.test_images.shape) != self.shape:
            raise DataError(f"training images are {self.shape}, test images {shape} (channels, height, width): give size")
        order = torch.randperm(len(train), generator=keyed_generator(self.seed, "split"))
        held_out = round(self.validation * len(train))
        if held_out == len(train):
            raise ValueError(f"validation={self.validation} leaves none of {len(train)} images to train on: make it smaller")
        self.val_indices, self.train_indices = order[:held_out], order[held_out:][: self.train_size]
        self.train_images = train

    def _check_labels(self, labels: Tensor) -> None:
        """Raise DataError for labels that are no numbers of classes."""
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise DataError(f"labels are the numbers of classes, integers from 0 on; these are {labels.dtype}")
        if labels.numel() and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise DataError(
                f"labels are the numbers of classes, from 0 to {self.num_classes - 1}; these go from {int(labels.min())} to "
                f"{int(labels.max())}"
            )

    def train_dataloader(self) -> BatchLoader:
        rank, ranks = self._rank()
        plan = Shuffled(self.train_indices, self.batch_size, rank, ranks, self.seed, self.crop, self.flip)
        return self._loader(self.train_images, plan, self._position)

    def val_dataloader(self) -> BatchLoader:
        return self._loader(self.train_images, InOrder(self.val_indices, self.batch_size, *self._rank()))

    def test_dataloader(self) -> BatchLoader:
        return self._loader(self.test_images, InOrder(torch.arange(len(self.test_images)), self.batch_size, *self._rank()))

    def predict_dataloader(self) -> BatchLoader:
        return self.test_dataloader()

    def test_batches(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images without a trainer: normalised batches on the CPU; at most `limit` images, chosen by the seed."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit is a positive number of images, not {limit}")
        count = len(self.test_images)
        indices = torch.arange(count)
        if limit is not None and limit < count:
            indices = torch.randperm(count, generator=keyed_generator(self.seed, "subset"))[:limit].sort().values
        return iter(self.plain_batches(self.test_images, indices))

    def plain_batches(self, images: LabelledImages, indices: Tensor) -> BatchLoader:
        """The `images` at `indices` without a trainer, in their order and as they are: normalised batches on the CPU."""
        return BatchLoader(images, InOrder(indices, self.batch_size), self.mean, self.std, self._dtype(), torch.device("cpu"))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave a batch where it is: the loaders serve it where it is needed."""
        return batch

    def _loader(
        self, images: LabelledImages | None, plan: Plan, position: Callable[[], tuple[int, int]] = at_start
    ) -> BatchLoader:
        assert images is not None, "setup comes first"
        if getattr(self.trainer, "overfit_batches", 0):
            raise DataError("overfit_batches would replace the order of the batches: overfit with a small train_size instead")
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        placed = images.on(device, self.device_share)
        return BatchLoader(placed, plan, self.mean, self.std, self._dtype(), device, position)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _position(self) -> tuple[int, int]:
        """The epoch of the trainer, and how many of its batches have been trained on."""
        if self.trainer is None:
            return at_start()
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return self.trainer.current_epoch, progress.processed

    def _dtype(self) -> torch.dtype:
        """The floating-point type of the weights that a trainer trains, as of precision="64-true"; float32 without one."""
        module = getattr(self.trainer, "lightning_module", None)
        types = (parameter.dtype for parameter in module.parameters()) if module is not None else ()
        return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)
