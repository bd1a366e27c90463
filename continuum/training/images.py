"""Images in memory or on disk, served in whole batches as uint8, and their augmentation on the training device."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
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
    """The class of each image, (images,) in int64."""

    names: Sequence[str] = ()
    """The file of each image, where there are files; otherwise its number is all there is."""

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """Return the images at `indices`, (batch, channels, height, width) in uint8."""

    def __getitem__(self, request: Request) -> RawBatch:
        indices, key = request
        return self.images(indices), self.labels[indices], key

    def __len__(self) -> int:
        return len(self.labels)


class InMemory(LabelledImages):
    """All images in one tensor."""

    def __init__(self, pixels: Tensor, labels: Tensor, names: Sequence[str] = ()) -> None:
        self.pixels, self.labels, self.names = pixels, labels, names

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
    """Images decoded when they are asked for; with `size`, scaled and cropped at the centre to size x size.

    Raises:
        DataError: when they are asked for, files that are damaged: all of the set, so that they can be mended at once.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, size: int | None, names: Sequence[str] = ()) -> None:
        self.paths, self.labels, self.size, self.names = list(paths), labels, size, names

    def images(self, indices: Tensor) -> Tensor:
        return self._stacked([self.paths[i] for i in indices.tolist()], map)

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
