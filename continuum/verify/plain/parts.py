"""What the plain loops are made of: weights by name, the parts around the stages, and the loop over the blocks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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


def plain_head(w: Weights, x: Tensor) -> Tensor:
    """Average, linear."""
    return linear(w.at("linear"), F.avg_pool2d(x, x.shape[2:]).flatten(1))


Kind: TypeAlias = Literal["transition", "start", "layer", "end"]


@dataclass(frozen=True)
class Block:
    """A part of a stage: the transition to it, a layer of its flow, or a module at the start or end of the flow.

    `index` counts the transition and the layers of the stage. `drawn` is what the block draws in training, if anything.
    """

    name: str
    weights: Weights
    stage: int
    index: int
    kind: Kind
    drawn: Tensor | None = None


Step: TypeAlias = Callable[[Block, Tensor, Any], Tensor]
"""A layer: from the state, and the one before it (None where there is none), to the next."""

Change: TypeAlias = Callable[[Block, Tensor], tuple[Tensor, Tensor | None]]
"""Any other part: from the state to the next one, and to what counts as the one before it."""


def loop(
    w: Weights,
    images: Tensor,
    counts: Sequence[int],
    layer: Step,
    changes: Mapping[Kind, Change],
    first: bool = False,
    stem: Callable[[Weights, Tensor], Tensor] = conv,
    head: Callable[[Weights, Tensor], Tensor] = pooled_head,
    draw: Callable[[Block, Tensor], Tensor | None] | None = None,
) -> Iterator[Layer]:
    """Stem, stages of so many blocks, head; every stage, the first one if `first` says so, begins with a transition.

    In training all layers of a flow draw before the first of them runs, from the state that enters the flow.
    """
    x, before = stem(w.at("stem"), images), None
    yield "stem", x
    for part in _parts(w, counts, first, changes):
        if draw is not None and w.training:
            part = [replace(block, drawn=draw(block, x)) for block in part]
        for block in part:
            x, before = (layer(block, x, before), x) if block.kind == "layer" else changes[block.kind](block, x)
            yield block.name, x
    yield "head", head(w.at("head"), x)


def _parts(w: Weights, counts: Sequence[int], first: bool, changes: Mapping[Kind, Change]) -> Iterator[list[Block]]:
    """The parts of all stages in order: the layers of a flow together, everything else alone."""
    number = count()
    for stage, total in enumerate(counts):
        change = first or stage > 0
        layers = (total - change) * w.refined
        asked: dict[Kind, bool] = {"transition": change, "start": "start" in changes, "layer": True, "end": "end" in changes}
        for kind, here in asked.items():
            if not here or not (layers or kind == "transition"):
                continue
            place = f"stages.{next(number)}"
            if kind == "layer":
                names = [f"{place}.field.layers.{k}" for k in range(layers)]
                yield [Block(name, w.at(name), stage, change + k // w.refined, kind) for k, name in enumerate(names)]
            else:
                yield [Block(place, w.at(place), stage, 0, kind)]
