"""Post-activation networks, relu(x + F(x)), as plain loops."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from continuum.verify.plain.parts import (
    Arguments,
    Block,
    Change,
    Kind,
    Layer,
    Step,
    Weights,
    added_channels,
    conv,
    conv_stem,
    linear,
    loop,
    norm,
    plain_head,
)

Branch: TypeAlias = Callable[[Block, Tensor, int], Tensor]
"""F of a block, at a state, with a stride."""


def basic(block: Block, x: Tensor, stride: int) -> Tensor:
    """conv-BN-ReLU-conv-BN."""
    w = block.weights
    x = F.relu(norm(w.at("norm1"), conv(w.at("conv1"), x, stride)))
    return norm(w.at("norm2"), conv(w.at("conv2"), x))


def bottleneck(w: Weights, x: Tensor, stride: int, groups: int, dilation: int = 1) -> Tensor:
    """conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1-BN."""
    x = F.relu(norm(w.at("norm1"), conv(w.at("conv1"), x)))
    x = F.relu(norm(w.at("norm2"), conv(w.at("conv2"), x, stride, groups, dilation)))
    return norm(w.at("norm3"), conv(w.at("conv3"), x))


def resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """relu(x + F(x)) with two convolutions in F."""
    return _cifar(w, images, (arguments["depth"] - 2) // 6, basic, arguments["shortcut"])


def se_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """relu(x + s(F(x)) F(x)) with s(u) = sigmoid(W2 relu(W1 mean(u)))."""

    def branch(block: Block, x: Tensor, stride: int) -> Tensor:
        y = basic(block, x, stride)
        inner = F.relu(linear(block.weights.at("squeeze"), y.mean(dim=(2, 3))))
        return torch.sigmoid(linear(block.weights.at("excite"), inner))[:, :, None, None] * y

    return _cifar(w, images, (arguments["depth"] - 2) // 6, branch, arguments["shortcut"])


def resnext(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """relu(x + F(x)) with a bottleneck in groups."""

    def branch(block: Block, x: Tensor, stride: int) -> Tensor:
        return bottleneck(block.weights, x, stride, arguments["cardinality"])

    return _cifar(w, images, (arguments["depth"] - 2) // 9, branch, "B", wider=True)


def _cifar(w: Weights, x: Tensor, count: int, branch: Branch, shortcut: str, wider: bool = False) -> Iterator[Layer]:
    """Three stages of `count` blocks; a `wider` stage has more channels than its stem."""

    def transition(block: Block, x: Tensor) -> tuple[Tensor, None]:
        return _resized(block, x, branch, 2 if block.stage else 1, shortcut), None

    return loop(w, x, [count] * 3, _activated(branch), {"transition": transition}, wider, conv_stem, plain_head)


def _activated(branch: Branch) -> Step:
    """relu(x + F(x)); refined, its part of the way there."""

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        after = F.relu(x + branch(block, x, 1))
        return after if block.weights.refined == 1 else x + block.weights.share * (after - x)

    return layer


def _resized(block: Block, x: Tensor, branch: Branch, stride: int, shortcut: str = "B") -> Tensor:
    """relu(P(x) + F(x)) with a stride and a shortcut P."""
    w = block.weights
    if shortcut == "A":
        y = added_channels(x[:, :, ::2, ::2], 2 * x.shape[1])
    else:
        y = norm(w.at("shortcut.norm"), conv(w.at("shortcut.conv"), x, stride))
    return F.relu(y + branch(block, x, stride))


IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def imagenet_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """relu(x + F(x)) in four stages, with two convolutions or a bottleneck in F."""
    counts = arguments["blocks"] or IMAGENET[arguments["depth"]]
    wide = arguments["block"] == "bottleneck" if arguments["block"] else arguments["depth"] >= 50
    dilated = (False, *arguments["dilated"])
    # Each dilated stage doubles the dilation; its transition still has that of the stage before.
    dilations = [2 ** sum(dilated[: stage + 1]) for stage in range(4)]

    def branch(block: Block, x: Tensor, stride: int) -> Tensor:
        if not wide:
            return basic(block, x, stride)
        dilation = dilations[block.stage if block.kind == "layer" else max(block.stage - 1, 0)]
        return bottleneck(block.weights, x, stride, arguments["groups"], dilation)

    def transition(block: Block, x: Tensor) -> tuple[Tensor, None]:
        return _resized(block, x, branch, 2 if block.stage and not dilated[block.stage] else 1), None

    def stem(w: Weights, x: Tensor) -> Tensor:
        if arguments["stem"] == "cifar":
            return conv_stem(w, x)
        return F.max_pool2d(F.relu(norm(w.at("norm"), conv(w.at("conv"), x, 2))), 3, stride=2, padding=1)

    def head(w: Weights, x: Tensor) -> Tensor:
        return linear(w.at("linear"), F.adaptive_avg_pool2d(x, 1).flatten(1))

    return loop(w, images, counts, _activated(branch), {"transition": transition}, wide, stem, head)


def polynet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """relu(x + F x + G x), relu(x + F x + F F x) (+ F F F x), relu(x + F x + G F x)."""

    def branch(block: Block, x: Tensor, stride: int) -> Tensor:
        if block.kind == "transition":
            return basic(block, x, stride)
        names, shift = arguments["modules"][block.stage], min(block.stage, 1)
        name = names[(block.index - shift) % len(names)]
        if name == "2-way":
            return term(block.weights.at("branches.0"), x, 0, 0) + term(block.weights.at("branches.1"), x, 0, 0)
        total = x = term(block.weights, x, 0, 0)
        for order in range(1, int(name[-1])):
            x = term(block.weights, F.relu(x), order, order if name == "mpoly-2" else 0)
            total = total + x
        return total

    def term(w: Weights, x: Tensor, order: int, own: int) -> Tensor:
        """conv3x3-BN-ReLU-conv1x1-BN; the orders of F F share the 3x3 convolution."""
        y = F.relu(norm(w.at(f"norms.{order}"), conv(w.at(f"convs.{own}"), x)))
        return norm(w.at(f"last_norms.{order}"), conv(w.at(f"last_convs.{order}"), y))

    def transition(block: Block, x: Tensor) -> tuple[Tensor, None]:
        return _resized(block, x, branch, 2), None

    counts = [number + min(stage, 1) for stage, number in enumerate(arguments["blocks"])]
    changes: dict[Kind, Change] = {"transition": transition}
    return loop(w, images, counts, _activated(branch), changes, stem=conv_stem, head=plain_head)
