"""The batches of an epoch: x = (shift(mirror(image)) - mean) / std on the training device, all draws made once an epoch.

Order, shifts and mirrors are three small tensors that depend on (seed, epoch) alone. So every device trains on the same pixels,
a resumed epoch goes on at its batch, several ranks see together what one would see, and a step only slices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from continuum.training.images import LabelledImages, keyed_generator, uploaded


class Epoch(NamedTuple):
    """What a rank sees in an epoch, all on the CPU."""

    order: Tensor
    """The number of each image in its set, (images,) in int64."""
    shifts: Tensor
    """Rows and columns from the corner of the padded image to that of the cropped one, (2, images) in int64."""
    mirrors: Tensor
    """Whether an image is mirrored before it is shifted, (images,)."""


@dataclass(frozen=True)
class Plan(ABC):
    """Which of the images at `indices` a rank sees in an epoch, and how many at a time.

    Args:
        indices: the numbers of the images, (images,) in int64.
        batch_size: images a batch and rank.
        rank: which of the ranks this is.
        ranks: how many take part.
    """

    indices: Tensor
    batch_size: int
    rank: int = 0
    ranks: int = 1

    crop = 0
    flip = False

    @abstractmethod
    def epoch(self, number: int) -> Epoch:
        """Return the order, shifts and mirrors of an epoch."""

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """How many images each batch of this rank has."""

    def _split(self, count: int) -> list[int]:
        full, rest = divmod(count, self.batch_size)
        return [self.batch_size] * full + [rest] * (rest > 0)


@dataclass(frozen=True)
class InOrder(Plan):
    """Every image once and as it is: each rank takes every n-th."""

    def epoch(self, number: int) -> Epoch:
        order = self.indices[self.rank :: self.ranks]
        return Epoch(order, torch.zeros(2, len(order), dtype=torch.int64), torch.zeros(len(order), dtype=torch.bool))

    @property
    def sizes(self) -> list[int]:
        return self._split(len(range(self.rank, len(self.indices), self.ranks)))


@dataclass(frozen=True)
class Shuffled(Plan):
    """All images in a random order, shifted and mirrored at random; all ranks have equally many batches.

    No image is dropped: a last batch of a single one, on which BatchNorm cannot train, joins the batch before it. Where the
    ranks do not divide the images, the first few of the order serve twice.

    Args:
        indices: the numbers of the images, (images,) in int64.
        batch_size: images a batch and rank.
        rank: which of the ranks this is.
        ranks: how many take part.
        seed: of order, shifts and mirrors.
        crop: shift by up to so many pixels.
        flip: mirror half of the images.
    """

    seed: int = 0
    crop: int = 0
    flip: bool = False

    def epoch(self, number: int) -> Epoch:
        count, draws = len(self.indices), keyed_generator(self.seed, "epoch", number)
        order = self.indices[torch.randperm(count, generator=draws)]
        shifts = torch.randint(2 * self.crop + 1, (2, count), generator=draws)
        mirrors = torch.rand(count, generator=draws) < 0.5 * self.flip
        places = torch.arange(self.rank, self.ranks * self._share, self.ranks) % count
        return Epoch(order[places], shifts[:, places], mirrors[places])

    @property
    def sizes(self) -> list[int]:
        sizes = self._split(self._share)
        if len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [self.batch_size + 1]
        return sizes

    @property
    def _share(self) -> int:
        return -(-len(self.indices) // self.ranks)


def at_start() -> tuple[int, int]:
    """The first batch of the first epoch."""
    return 0, 0


class BatchLoader:
    """Batches of normalised images, (batch, channels, height, width), and labels, (batch,) in int64, on the training device.

    It has no state: epoch and position are the trainer's, which restores them.

    Args:
        images: where they come from.
        plan: which, and in which order.
        mean: of each channel, of pixels in [0, 1].
        std: the deviation of each channel.
        dtype: the floating-point type of the images.
        device: where the batches are needed.
        position: returns the epoch, and the batch at which it goes on.
    """

    def __init__(
        self,
        images: LabelledImages,
        plan: Plan,
        mean: Tensor,
        std: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        position: Callable[[], tuple[int, int]] = at_start,
    ) -> None:
        self.images, self.plan, self.dtype, self.device, self.position = images, plan, dtype, device, position
        exact = torch.promote_types(dtype, torch.float32)
        self.mean, self.std = (uploaded(255 * value.to(exact).view(-1, 1, 1), device) for value in (mean, std))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator asks for the position at its first batch: when it resumes, Lightning makes its iterator before it restores
        # the epoch.
        epoch, start = self.position()
        yield from self.batches(epoch, start if start < len(self) else 0)

    def __len__(self) -> int:
        return len(self.plan.sizes)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from number `start` on."""
        plan, sizes = self.plan, self.plan.sizes[start:]
        if not sizes:
            return
        order, shifts, mirrors = (part[..., -sum(sizes) :] for part in plan.epoch(epoch))
        served = self.images.serve(order, sizes, self.device)
        if not (plan.crop or plan.flip):
            for images, labels in served:
                yield normalised(images, self.mean, self.std, self.dtype), labels
            return
        places = uploaded(corners(shifts, mirrors, self.images.shape, plan.crop), self.device)
        for (images, labels), corner in zip(served, places.split(sizes), strict=True):
            moved = augmented(images, corner, plan.crop, plan.flip)
            yield normalised(moved, self.mean, self.std, self.dtype), labels

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Tell Lightning that this loader resumes in the middle of an epoch."""


def corners(shifts: Tensor, mirrors: Tensor, shape: tuple[int, int, int], crop: int) -> Tensor:
    """Where the crop of each image begins among the pixels of the padded image and, behind it, its padded mirror image.

    Args:
        shifts: rows and columns, (2, images) in int64.
        mirrors: (images,), bool.
        shape: of an image that is not padded, (channels, height, width).
        crop: pixels by which it is padded on each side.

    Returns:
        (images,) in int64.
    """
    channels, height, width = shape
    return (mirrors * channels * (height + 2 * crop) + shifts[0]) * (width + 2 * crop) + shifts[1]


def augmented(images: Tensor, corner: Tensor, crop: int, flip: bool) -> Tensor:
    """Each image mirrored or not and then shifted, black beyond the edge.

    A row of the result is a row of the padded images from another pixel on, so that whole rows are copied.

    Args:
        images: (batch, channels, height, width) in uint8.
        corner: from `corners`, (batch,), on the device of the images.
        crop: the largest shift.
        flip: whether some are mirrored.
    """
    _, _, height, width = images.shape
    both = torch.stack([images, images.flip(3)], dim=1) if flip else images[:, None]
    padded = pad(both, (crop,) * 4)
    rows = torch.arange(0, padded.numel(), padded.shape[4], device=images.device).view(padded.shape[:4])
    starts = rows[:, 0, :, :height] + corner[:, None, None]
    return padded.flatten().unfold(0, width, 1).index_select(0, starts.flatten()).view(images.shape)


def normalised(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """(image - mean) / std in `dtype`, where mean and std are (channels, 1, 1) and as precise as the result needs.

    In channels_last, in which convolutions are faster; but for one channel, of which torch says the same of two strides: in
    those that are not contiguous, oneDNN's gradient of a 1x1 convolution of stride 2 from fewer than 8 channels writes outside
    its memory on CPUs with AVX2 only (torch 2.14, oneDNN 3.12).
    """
    memory_format = torch.contiguous_format if images.shape[1] == 1 else torch.channels_last
    return torch.sub(images, mean).div_(std).to(dtype, memory_format=memory_format)


def channels_last(module: nn.Module) -> None:
    """Put the weights of convolutions in channels_last, as the images are, so that their gradients come as they are stored.

    Those that are the same in memory either way, of 1x1 convolutions, keep their strides: see `normalised`.
    """
    for weight in module.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
