"""Labelled images in memory, on the training device or on disk, served in whole batches as uint8."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def keyed_seed(*key: object) -> int:
    """A seed that depends on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_generator(*key: object) -> torch.Generator:
    """A generator on the CPU whose numbers depend on `key` alone."""
    return torch.Generator().manual_seed(keyed_seed(*key))


class DataError(ValueError):
    """Images that cannot be used as they are: the message names the file or folder, and what to do."""


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from memory that is pinned, so that nobody waits for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def free_memory(device: torch.device) -> int:
    """The bytes of `device` that no tensor occupies; none where it does not tell."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class LabelledImages(Dataset[Any], ABC):
    """Images with labels, in whole batches: `dataset[indices]` gives (images, labels)."""

    labels: Tensor
    """The class of each image, (images,) in int64."""

    names: Sequence[str] = ()
    """The file of each image, where there are files; otherwise its number is all there is."""

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """Return the images at `indices`, (batch, channels, height, width) in uint8."""

    @abstractmethod
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel, of pixels in [0, 1]."""

    @abstractmethod
    def serve(self, order: Tensor, sizes: Sequence[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels at `order` on `device`, so many a batch."""

    def on(self, device: torch.device, share: float) -> "LabelledImages":
        """The same images, on `device` if they are held in memory and take at most this share of what is free there."""
        return self

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images(torch.tensor([0])).shape
        return channels, height, width

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images(indices), self.labels[indices]

    def __len__(self) -> int:
        return len(self.labels)


class InMemory(LabelledImages):
    """All images in one tensor."""

    def __init__(self, pixels: Tensor, labels: Tensor, names: Sequence[str] = ()) -> None:
        self.pixels, self.labels, self.names = pixels, labels, names
        self.copies: dict[torch.device, InMemory] = {}

    def images(self, indices: Tensor) -> Tensor:
        return self.pixels.index_select(0, indices)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Exact, from histograms."""
        values = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([self.pixels[:, c].flatten().bincount(minlength=256) for c in range(self.pixels.shape[1])])
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ values
        return mean.float(), (share @ values**2 - mean**2).clamp(min=1e-12).sqrt().float()

    def serve(self, order: Tensor, sizes: Sequence[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        order = uploaded(order, self.pixels.device)
        labels = uploaded(self.labels.index_select(0, order), device)
        for chosen, known in zip(order.split(list(sizes)), labels.split(list(sizes)), strict=True):
            yield uploaded(self.images(chosen), device), known

    def on(self, device: torch.device, share: float) -> "InMemory":
        """One copy a device, for all that train on it; where it does not fit, these images, and a line that says so."""
        if device == self.pixels.device or not share:
            return self
        if device not in self.copies:
            needed, free = self.pixels.nbytes + self.labels.nbytes, free_memory(device)
            if needed > share * free:
                rank_zero_warn(
                    f"{len(self)} images of {needed / 2**20:.0f} MiB stay on the CPU and go to {device} batch by batch: they "
                    f"are more than device_share={share:g} of the {free / 2**20:.0f} MiB that are known to be free there"
                )
                return self
            self.copies[device] = InMemory(self.pixels.to(device), self.labels.to(device), self.names)
        return self.copies[device]


class OnDisk(LabelledImages):
    """Images decoded when they are asked for; with `size`, scaled and cropped at the centre to size x size.

    Args:
        paths: of the files.
        labels: the class of each, (images,) in int64.
        size: the side of an image; None where all are equally large.
        names: what to call the files.
        workers: processes that decode ahead of what is asked for.

    Raises:
        DataError: when they are asked for, files that are damaged: all of the set, so that they can be mended at once.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, size: int | None, names: Sequence[str] = (), workers: int = 0
    ) -> None:
        self.paths, self.labels, self.size, self.names, self.workers = list(paths), labels, size, names, workers

    def images(self, indices: Tensor) -> Tensor:
        return self._stacked([self.paths[i] for i in indices.tolist()], map)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """ImageNet's, because these would take an epoch."""
        return torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)

    def serve(self, order: Tensor, sizes: Sequence[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=order.split(list(sizes)),
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # unused; without one, it draws a seed from the global generator
        )
        try:
            for images, labels in loader:
                yield uploaded(images, device), uploaded(labels, device)
        except DataError as error:  # out of a worker process it comes with that one's traceback in front
            raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None

    def in_memory(self) -> InMemory:
        with ThreadPoolExecutor(8) as pool:
            return InMemory(self._stacked(self.paths, pool.map), self.labels, self.names)

    def _stacked(self, paths: Sequence[Path], run: Callable[..., Iterable[Tensor]]) -> Tensor:
        try:
            images = list(run(partial(decoded, size=self.size), paths))
        except DataError:
            raise DataError("; ".join(faults(self.paths))) from None
        return stacked(list(zip(paths, images, strict=True)))


def is_image(path: Path) -> bool:
    """Return whether `path` is a file whose suffix is one of those that Pillow reads."""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN and path.is_file()


def faults(paths: Sequence[Path]) -> list[str]:
    """Return what is wrong with each of the files that cannot be decoded."""

    def fault(path: Path) -> str | None:
        try:
            decoded(path, None)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(8) as pool:
        return [found for found in pool.map(fault, paths) if found]


def decoded(path: Path, size: int | None) -> Tensor:
    """Return the image at `path` in RGB, (3, height, width) in uint8; with `size`, scaled and cropped to size x size.

    16-bit grey is rounded to 8 bits, and transparent pixels show black, as the edge of a shifted image does.

    Raises:
        DataError: no readable image, or one whose numbers have no range from black to white.
    """
    try:
        with Image.open(path) as opened:
            image = in_rgb(opened)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is not a readable image ({error}): remove or replace it") from None
    if size is not None:
        scale = size / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def in_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes in RGB of 8 bits; ValueError for colours that Pillow does not convert, and for
    32-bit numbers and integers of other than 16 bits, whose range is not known."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF's BitsPerSample
    sixteen = (image.mode.startswith("I;16") and bits == 16) or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen:  # Pillow itself would clip at 255
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif image.mode[0] in "IF":
        raise ValueError(f"pixels of mode {image.mode!r}, whose range from black to white is not known: save them in 8 bits")
    elif image.mode[-1] in "aA" or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def stacked(images: Sequence[tuple[Path, Tensor]]) -> Tensor:
    """One tensor of equally large images; DataError names one of another size."""
    shape = images[0][1].shape
    for path, image in images:
        if image.shape != shape:
            raise DataError(
                f"{path} is {image.shape[2]} x {image.shape[1]} pixels, {images[0][0]} {shape[2]} x {shape[1]}: images of "
                "several sizes need the argument size, to which they are scaled and cropped"
            )
    return torch.stack([image for _, image in images])
