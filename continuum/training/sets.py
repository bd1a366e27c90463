"""The data sets by name: scikit-learn's digits, the published ones that torchvision downloads, and a folder of images."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from continuum.training.data import ImageData, Normalisation
from continuum.training.images import DataError, InMemory, LabelledImages, OnDisk, is_image


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


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The content of an idx file: 0, 0, 8, the number of dimensions, big-endian sizes, and as many bytes; plain or gzipped.

    Raises:
        DataError: the file is damaged, cut short, or none of so many dimensions.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            magic, *sizes = struct.unpack(f">{1 + dimensions}I", file.read(4 + 4 * dimensions))
            if magic != 0x800 + dimensions:
                raise ValueError(f"it begins with {magic:#x}, not with {0x800 + dimensions:#x}")
            content = bytearray(file.read())
    except (EOFError, OSError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is not a readable idx file ({error}): replace it") from None
    if len(content) != math.prod(sizes):
        raise DataError(f"{path} should hold {' x '.join(map(str, sizes))} bytes and holds {len(content)}: replace it")
    return torch.frombuffer(content, dtype=torch.uint8).view(sizes)


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
        device_share: a set in memory is copied to the training GPU if it takes at most this share of what is free there; 0
            leaves it on the CPU, from where it goes batch by batch.

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
        device_share: float = 0.5,
    ) -> None:
        super().__init__(batch_size, validation, crop, flip, train_size, seed, normalisation, device_share)
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
            raise self._missing(" ".join(str(error).split())) from None

    def _missing(self, reason: str) -> FileNotFoundError:
        name = type(self).__name__
        return FileNotFoundError(
            f"{name} is not in {Path(self.root).resolve()} and could not be downloaded ({reason}): run once with network "
            f"access, or copy there the folder that torchvision.datasets.{name}(root, download=True) makes elsewhere"
        )

    def load(self, train: bool) -> LabelledImages:
        found = self._open(train)
        self.classes = [str(name) for name in found.classes]
        pixels = torch.as_tensor(found.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return InMemory(pixels, torch.as_tensor(found.targets).long())


class MNIST(TorchvisionData):
    """MNIST: 28 x 28 pixels, one channel, ten digits.

    Its four files, plain or gzipped, are read from <root>/MNIST/raw, where torchvision puts them, or from <root> itself.
    """

    usual_crop = 2

    def prepare_data(self) -> None:
        if not all(self._file(part, kind) for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")):
            self._open(train=True, download=True)

    def load(self, train: bool) -> LabelledImages:
        from torchvision import datasets

        part = "train" if train else "t10k"
        images, labels = self._file(part, "images-idx3"), self._file(part, "labels-idx1")
        if images is None or labels is None:
            raise self._missing("no network is asked once training begins")
        pixels, classes = read_idx(images, 3), read_idx(labels, 1)
        if len(pixels) != len(classes):
            raise DataError(f"{images} holds {len(pixels)} images and {labels} {len(classes)} labels: replace them by one set")
        self.classes = [str(name) for name in getattr(datasets, type(self).__name__).classes]
        return InMemory(pixels[:, None], classes.long())

    def _file(self, part: str, kind: str) -> Path | None:
        folders = Path(self.root) / type(self).__name__ / "raw", Path(self.root)
        names = f"{part}-{kind}-ubyte", f"{part}-{kind}-ubyte.gz"
        return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)


class FashionMNIST(MNIST):
    """Fashion-MNIST: 28 x 28 pixels, one channel, ten kinds of clothing (arXiv 1708.07747).

    Its four files, plain or gzipped, are read from <root>/FashionMNIST/raw, where torchvision puts them, or from <root> itself.
    """

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
        device_share: a set in memory is copied to the training GPU if it takes at most this share of what is free there; 0
            leaves it on the CPU, from where it goes batch by batch.

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
        device_share: float = 0.5,
    ) -> None:
        super().__init__(batch_size, validation, crop, flip, train_size, seed, normalisation, device_share)
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
        images = OnDisk(paths, labels, self.size, [str(path.relative_to(self.root)) for path in paths], self.workers)
        bytes_needed = len(paths) * math.prod(images.shape)
        return images.in_memory() if bytes_needed <= self.memory_limit else images


DATA: dict[str, type[ImageData]] = {
    kind.__name__: kind for kind in (Digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, ImageFolder)
}
"""The data modules by name, in which files look them up."""
