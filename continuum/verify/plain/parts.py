"""What the plain loops are made of: weights by name, the parts around the stages, and the blocks of a stage in order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

Layer: TypeAlias = tuple[str, Tensor]
Arguments: TypeAlias = Mapping[str, Any]
"""The arguments of a network's builder."""

WRAPPERS = {"field", "module", "branch"}
"""Parts of names that say how a weight is used, not which one it is."""


@dataclass(frozen=True)
class Weights:
    """Parameters and buffers by name, seen from one `place` of the network; names are given with or without `WRAPPERS`.

    In training BatchNorm uses the statistics of the batch and moves the buffers. `refined` is how many layers, each divided
    by their number, stand in the place of one.
    """

    tensors: Mapping[str, Tensor]
    training: bool
    refined: int = 1
    place: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.place + name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(self.place + name)

    def inside(self) -> dict[str, Tensor]:
        """The tensors at this place, by their names from here on."""
        start = len(self.place)
        return {name[start:]: tensor for name, tensor in self.tensors.items() if name.startswith(self.place)}

    def at(self, name: str) -> "Weights":
        return replace(self, place=f"{self.place}{bare(name)}.")

    @property
    def share(self) -> float:
        return 1 / self.refined


def bare(name: str) -> str:
    """The name without `WRAPPERS`: stages.0.field.layers.2.module.conv1.weight is stages.0.layers.2.conv1.weight."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


# Parts


def conv(w: Weights, x: Tensor, stride: int = 1, groups: int = 1, dilation: int = 1) -> Tensor:
    """A convolution padded to keep the size, but for the stride."""
    padding = dilation * (w["weight"].shape[-1] // 2)
    return F.conv2d(x, w["weight"], w.get("bias"), stride, padding, dilation, groups)


def norm(w: Weights, x: Tensor) -> Tensor:
    """BatchNorm."""
    if w.training:
        w["num_batches_tracked"].add_(1)
    return F.batch_norm(x, w["running_mean"], w["running_var"], w["weight"], w["bias"], w.training, 0.1, 1e-5)


def conv_stem(w: Weights, images: Tensor) -> Tensor:
    return F.relu(norm(w.at("norm"), conv(w.at("conv"), images)))


def projection(w: Weights, x: Tensor, stride: int) -> Tensor:
    """BN-ReLU-conv1x1."""
    return conv(w.at("shortcut.conv"), F.relu(norm(w.at("shortcut.norm"), x)), stride)


def added_channels(x: Tensor, channels: int) -> Tensor:
    """x with zero channels on both sides, to `channels` in all."""
    added = channels - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, added // 2, added - added // 2))


def linear(w: Weights, x: Tensor) -> Tensor:
    return F.linear(x, w["weight"], w["bias"])


def pooled_head(w: Weights, x: Tensor) -> Tensor:
    """BN-ReLU, average, linear."""
    return linear(w.at("linear"), F.relu(norm(w.at("norm"), x)).mean(dim=(2, 3)))


Kind: TypeAlias = Literal["transition", "start", "layer", "end"]


@dataclass(frozen=True)
class Block:
    """A part of a stage: the transition to it, a layer of its flow, or a module at the start or end of the flow.

    `index` counts the transition and the layers of the stage.
    """

    name: str
    weights: Weights
    stage: int
    index: int
    kind: Kind


def blocks(
    w: Weights, counts: Sequence[int], changes: Sequence[bool], start: bool = False, end: bool = False
) -> Iterator[Block]:
    """The parts of stages of so many blocks in order; a stage that changes the size begins with a transition."""
    number = count()
    for stage, (total, change) in enumerate(zip(counts, changes, strict=True)):
        layers = total - change
        flow = layers > 0
        kinds: dict[Kind, bool] = {"transition": change, "start": start and flow, "layer": flow, "end": end and flow}
        for kind, here in kinds.items():
            if not here:
                continue
            place = f"stages.{next(number)}"
            if kind != "layer":
                yield Block(place, w.at(place), stage, 0, kind)
                continue
            for layer in range(layers * w.refined):
                name = f"{place}.field.layers.{layer}"
                yield Block(name, w.at(name), stage, change + layer // w.refined, kind)
