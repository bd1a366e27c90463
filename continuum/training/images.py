"""Images in memory or on disk, served in whole batches as uint8, and their augmentation on the training device."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

Request = tuple[Tensor, int]
"""A whole batch as a data set is asked for it: indices, and the key of its augmentation (-1: none)."""

RawBatch = tuple[Tensor, Tensor, int]
"""Images in uint8, (batch, channels, height, width), labels, and the key."""

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


class LabelledImages(Dataset[Any], ABC):
    """Images with labels, served in whole batches: `dataset[indices, key]` gives (images, labels, key)."""

    labels: Tensor

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """The images at `indices`, (batch, channels, height, width) in uint8."""

    def __getitem__(self, request: Request) -> RawBatch:
        indices, key = request
        return self.images(indices), self.labels[indices], key

    def __len__(self) -> int:
        return len(self.labels)


class InMemory(LabelledImages):
    """All images in one tensor."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def images(self, indices: Tensor) -> Tensor:
        return self.pixels[indices]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, of pixels in [0, 1]; exact, from histograms."""
        values = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([self.pixels[:, c].flatten().bincount(minlength=256) for c in range(self.pixels.shape[1])])
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ values
        return mean.float(), (share @ values**2 - mean**2).clamp(min=1e-12).sqrt().float()


class OnDisk(LabelledImages):
    """Images decoded when they are asked for; with `size`, scaled and cropped at the centre to size x size."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, size: int | None) -> None:
        self.paths, self.labels, self.size = list(paths), labels, size

    def images(self, indices: Tensor) -> Tensor:
        return stacked([(self.paths[i], decoded(self.paths[i], self.size)) for i in indices.tolist()])

    def in_memory(self) -> InMemory:
        with ThreadPoolExecutor(8) as pool:
            images = pool.map(lambda path: (path, decoded(path, self.size)), self.paths)
            return InMemory(stacked(list(images)), self.labels)


def decoded(path: Path, size: int | None) -> Tensor:
    """The image at `path` in RGB, (3, height, width) in uint8.

    Raises:
        DataError: no readable image.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path} is not a readable image ({error}): remove or replace it") from None
    if size is not None:
        scale = size / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def stacked(images: Sequence[tuple[Path, Tensor]]) -> Tensor:
    """One tensor of equally large images.

    Raises:
        DataError: an image of another size, by name.
    """
    shape = images[0][1].shape
    for path, image in images:
        if image.shape != shape:
            raise DataError(
                f"{path} is {image.shape[2]} x {image.shape[1]} pixels, {images[0][0]} {shape[2]} x {shape[1]}: images of "
                "several sizes need the argument size, to which they are scaled and cropped"
            )
    return torch.stack([image for _, image in images])


def augmented(images: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Randomly shifted by up to `crop` pixels, black beyond the edge, and mirrored; the generator is the CPU's anywhere."""
    count, _, height, width = images.shape
    device = images.device
    if crop:
        offsets = torch.randint(2 * crop + 1, (2, count, 1), generator=generator).to(device)
        rows = offsets[0] + torch.arange(height, device=device)
        columns = offsets[1] + torch.arange(width, device=device)
        padded = torch.nn.functional.pad(images, (crop,) * 4)
        batch = torch.arange(count, device=device)[:, None, None]
        images = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if images.shape[1] == 1:
            # With one channel torch takes these strides for channels_last, in which oneDNN's gradient of a 1x1 convolution of
            # stride 2 from fewer than 8 channels writes outside its memory on CPUs with AVX2 only (torch 2.14, oneDNN 3.12).
            images = images.clone(memory_format=torch.contiguous_format)
    if flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images
