"""Images for classification, in memory as uint8 and augmented in whole batches on the training device.

Random numbers are keyed, not consumed: an epoch's order derives from (seed, epoch), a batch's augmentation from (seed, epoch,
batch, rank). So a resumed run repeats the uninterrupted one, and no generator state is kept.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from continuum.training.batches import BatchLoader, KeyedBatches, Loader
from continuum.training.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    InMemory,
    LabelledImages,
    OnDisk,
    RawBatch,
    augmented,
    is_image,
    keyed_generator,
)

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
        self.batch_size = batch_size
        self.validation = validation
        self.crop = self.usual_crop if crop is None else crop
        self.flip = self.usual_flip if flip is None else flip
        self.train_size = train_size
        self.seed = seed
        self.normalisation: Normalisation = normalisation
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
        if isinstance(train, InMemory) and self.normalisation == "training":
            self.mean, self.std = train.statistics()
        else:
            self.mean, self.std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        first = torch.tensor([0])
        self.shape = tuple(train.images(first).shape[1:])
        if len(self.mean) != self.shape[0]:
            raise DataError(f"imagenet's statistics are of three channels, these images have {self.shape[0]}: use 'training'")
        if (shape := tuple(self.test_images.images(first).shape[1:])) != self.shape:
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

    def _loader(self, images: LabelledImages | None, indices: Tensor, shuffle: bool) -> Loader:
        assert images is not None, "setup comes first"
        if getattr(self.trainer, "overfit_batches", 0):
            raise DataError("overfit_batches would replace the order of the batches: overfit with a small train_size instead")
        sampler = KeyedBatches(indices, self.batch_size, self.seed, shuffle, self.trainer)
        workers = self.workers if isinstance(images, OnDisk) and isinstance(self, ImageFolder) else 0
        unused = torch.Generator()  # without one, every iterator draws a seed for its workers from the global generator
        return BatchLoader(images, batch_size=None, sampler=sampler, num_workers=workers, generator=unused)

    def train_dataloader(self) -> Loader:
        return self._loader(self.train_images, self.train_indices, shuffle=True)

    def val_dataloader(self) -> Loader:
        return self._loader(self.train_images, self.val_indices, shuffle=False)

    def test_dataloader(self) -> Loader:
        return self._loader(self.test_images, torch.arange(len(self.test_images)), shuffle=False)

    def predict_dataloader(self) -> Loader:
        return self.test_dataloader()

    def test_batches(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images without a trainer: normalised batches on the CPU; at most `limit` images, chosen by the seed."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit is a positive number of images, not {limit}")
        count = len(self.test_images)
        indices = torch.arange(count)
        if limit is not None and limit < count:
            indices = torch.randperm(count, generator=keyed_generator(self.seed, "subset"))[:limit].sort().values
        for batch in indices.split(self.batch_size):
            yield self.on_after_batch_transfer(self.test_images[batch, -1], 0)

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels, key = batch
        if key >= 0:
            images = augmented(images, self.crop, self.flip, keyed_generator(key))
        weights = self._dtype()
        dtype = torch.promote_types(weights, torch.float32)
        mean, std = (255 * s.to(images.device, dtype).view(1, -1, 1, 1) for s in (self.mean, self.std))
        return ((images.to(dtype) - mean) / std).to(weights), labels

    def _dtype(self) -> torch.dtype:
        """The floating-point type of the weights that a trainer trains, as of precision="64-true"; float32 without one."""
        module = getattr(self.trainer, "lightning_module", None)
        types = (parameter.dtype for parameter in module.parameters()) if module is not None else ()
        return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)


class Digits(ImageData):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels and one channel; every fifth is a test image."""

    def load(self, train: bool) -> LabelledImages:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        pixels = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target).long()
        self.classes = [str(name) for name in digits.target_names]
        test = torch.arange(len(labels)) % 5 == 4
        chosen = ~test if train else test
        return InMemory(pixels[chosen], labels[chosen])


class TorchvisionData(ImageData):
    """A data set of torchvision under `root`, downloaded when it is not there.

    Args:
        root: the folder that holds the data set, or takes the download.
        batch_size: images a batch and rank.
        validation: the share of the training images that is held out; never the test images.
        crop: pad by so many black pixels and crop at random; None takes what is usual for the set.
        flip: mirror half of the training images; None takes what is usual for the set.
        train_size: train on so many images only, chosen by the seed.
        seed: of the split, the order of the batches and the augmentation.
        normalisation: by the statistics of the "training" images, or of "imagenet", which networks from elsewhere expect.

    Raises:
        FileNotFoundError: the data are not there and cannot be downloaded.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        validation: float = 0.1,
        crop: int | None = None,
        flip: bool | None = None,
        train_size: int | None = None,
        seed: int = 0,
        normalisation: Normalisation = "training",
    ) -> None:
        super().__init__(batch_size, validation, crop, flip, train_size, seed, normalisation)
        self.root = root

    def prepare_data(self) -> None:
        self._open(train=True, download=True)
        self._open(train=False, download=True)

    def _open(self, train: bool, download: bool = False) -> Any:
        from torchvision import datasets

        name = type(self).__name__
        try:
            return getattr(datasets, name)(self.root, train=train, download=download)
        except (OSError, RuntimeError) as error:  # a failed download, or files that are missing or damaged
            reason = " ".join(str(error).split())
            raise FileNotFoundError(
                f"{name} is not in {Path(self.root).resolve()} and could not be downloaded ({reason}): run once with network "
                f"access, or copy there the folder that torchvision.datasets.{name}(root, download=True) makes elsewhere"
            ) from None

    def load(self, train: bool) -> LabelledImages:
        found = self._open(train)
        self.classes = [str(name) for name in found.classes]
        pixels = torch.as_tensor(found.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return InMemory(pixels, torch.as_tensor(found.targets).long())


class MNIST(TorchvisionData):
    """MNIST: 28 x 28 pixels, one channel, ten digits."""

    usual_crop = 2


class FashionMNIST(TorchvisionData):
    """Fashion-MNIST: 28 x 28 pixels, one channel, ten kinds of clothing (arXiv 1708.07747)."""

    usual_crop = 2
    usual_flip = True


class CIFAR10(TorchvisionData):
    """CIFAR-10: 32 x 32 pixels, three channels, ten classes."""

    usual_crop = 4
    usual_flip = True


class CIFAR100(TorchvisionData):
    """CIFAR-100: 32 x 32 pixels, three channels, a hundred classes."""

    usual_crop = 4
    usual_flip = True


class ImageFolder(ImageData):
    """A folder with train/<class>/ and test/<class>/ of images (JPEG, PNG and whatever else Pillow reads).

    Images arrive with three channels. 16-bit grey is rounded to 8 bits, and transparent pixels show black. Files that are no
    images by their names (notes.txt, Thumbs.db) are left out and counted in one line.

    Args:
        root: the folder.
        size: scale the shorter side to so many pixels and crop the centre; None for images of one size.
        memory_limit: sets of more decoded bytes are read from disk, batch by batch.
        workers: processes that decode images from disk.
        batch_size: images a batch and rank.
        validation: the share of the training images that is held out; never the test images.
        crop: pad by so many black pixels and crop at random; None takes 4.
        flip: mirror half of the training images; None does.
        train_size: train on so many images only, chosen by the seed.
        seed: of the split, the order of the batches and the augmentation.
        normalisation: by the statistics of the "training" images, or of "imagenet", which networks from elsewhere expect.

    Raises:
        FileNotFoundError: train/ or test/ is missing, or holds no image.
        DataError: their classes differ, sizes differ without `size`, or images cannot be read: all that are met in memory,
            and where images stay on disk, all of the part, as soon as one of them is asked for.
    """

    usual_crop = 4
    usual_flip = True

    def __init__(
        self,
        root: str,
        size: int | None = None,
        memory_limit: int = 2**31,
        workers: int = 2,
        batch_size: int = 128,
        validation: float = 0.1,
        crop: int | None = None,
        flip: bool | None = None,
        train_size: int | None = None,
        seed: int = 0,
        normalisation: Normalisation = "training",
    ) -> None:
        super().__init__(batch_size, validation, crop, flip, train_size, seed, normalisation)
        if size is not None and size < 1:
            raise ValueError(f"size is a positive number of pixels, not {size}")
        if workers < 0:
            raise ValueError(f"workers is a number of processes, not {workers}")
        self.root, self.size, self.memory_limit, self.workers = root, size, memory_limit, workers

    def prepare_data(self) -> None:
        train, test = (set(self._class_folders(part)) for part in ("train", "test"))
        if train != test:
            raise DataError(
                f"the classes in {Path(self.root).resolve()} differ: only in train/: {sorted(train - test)}, only in test/: "
                f"{sorted(test - train)}"
            )

    def _class_folders(self, part: str) -> list[str]:
        folder = Path(self.root) / part
        entries = list(folder.iterdir()) if folder.is_dir() else []
        names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
        if not names:
            raise FileNotFoundError(
                f"no class folders in {folder.resolve()}: ImageFolder reads <root>/train/<class>/ and <root>/test/<class>/; "
                "give the folder above train/ as root, or unpack the images there"
            )
        return names

    def load(self, train: bool) -> LabelledImages:
        self.prepare_data()
        part = "train" if train else "test"
        self.classes = self._class_folders(part)
        folder = Path(self.root) / part
        files = [path for name in self.classes for path in sorted((folder / name).iterdir()) if path.name[0] != "."]
        paths = [path for path in files if is_image(path)]
        if others := [str(path.relative_to(folder)) for path in sorted(set(files).difference(paths))]:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            rank_zero_info(f"{len(others)} left out in {folder}, no images by their names: {', '.join(others[:3])}{more}")
        if not paths:
            raise FileNotFoundError(f"the class folders in {folder.resolve()} hold no file that is an image by its name")
        number = {name: label for label, name in enumerate(self.classes)}
        labels = torch.tensor([number[path.parent.name] for path in paths])
        images = OnDisk(paths, labels, self.size, [str(path.relative_to(self.root)) for path in paths])
        bytes_needed = len(paths) * images.images(torch.tensor([0])).numel()
        return images.in_memory() if bytes_needed <= self.memory_limit else images


DATA: dict[str, type[ImageData]] = {
    kind.__name__: kind for kind in (Digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, ImageFolder)
}
"""The data modules by name, in which files look them up."""
