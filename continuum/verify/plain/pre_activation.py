"""Pre-activation networks, x + f(x), and their two-step relatives, as plain loops."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from continuum.verify.plain.parts import Arguments, Block, Layer, Weights, blocks, conv, norm, pooled_head, projection

Branch: TypeAlias = Callable[[Block, Tensor, int], Tensor]
"""f of a block, at a state, with a stride."""


def preactivation(
    w: Weights, x: Tensor, stride: int = 1, dropout: float = 0.0, norm: Callable[[Weights, Tensor], Tensor] = norm
) -> Tensor:
    """norm-ReLU-conv-norm-ReLU-dropout-conv."""
    return behind_activation(w, F.relu(norm(w.at("norm1"), x)), stride, dropout, norm)


def behind_activation(
    w: Weights, x: Tensor, stride: int, dropout: float, norm: Callable[[Weights, Tensor], Tensor] = norm
) -> Tensor:
    """The branch behind its first norm and ReLU."""
    x = F.relu(norm(w.at("norm2"), conv(w.at("conv1"), x, stride)))
    return conv(w.at("conv2"), F.dropout(x, dropout, w.training))


def prebottleneck(w: Weights, x: Tensor, stride: int, groups: int) -> Tensor:
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1."""
    x = conv(w.at("conv1"), F.relu(norm(w.at("norm1"), x)))
    x = conv(w.at("conv2"), F.relu(norm(w.at("norm2"), x)), stride, groups)
    return conv(w.at("conv3"), F.relu(norm(w.at("norm3"), x)))


def _pre_blocks(w: Weights, arguments: Arguments, start: bool = False) -> tuple[Iterator[Block], Branch]:
    """The blocks of a pre-activation network and their branch, from its arguments."""
    groups = arguments.get("cardinality", 1)
    wide = "cardinality" in arguments or arguments.get("block") == "bottleneck"
    number = (arguments["depth"] - 2) // (9 if wide else 6)

    def branch(block: Block, x: Tensor, stride: int) -> Tensor:
        return prebottleneck(block.weights, x, stride, groups) if wide else preactivation(block.weights, x, stride)

    return blocks(w, [number] * 3, [wide, True, True], start), branch


def _projected(block: Block, x: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """P(x) + F(x), and P(x)."""
    stride = 2 if block.stage else 1
    before = projection(block.weights, x, stride)
    return before + branch(block, x, stride), before


def preresnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + f(x), or x + scale f(x) where the size stays."""
    x = conv(w.at("stem"), images)
    yield "stem", x
    parts, branch = _pre_blocks(w, arguments)
    for block in parts:
        if block.kind == "transition":
            x, _ = _projected(block, x, branch)
        else:
            x = x + arguments["scale"] * w.share * branch(block, x, 1)
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)


def wide_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + f(x) with dropout in f; where the size changes the shortcut starts behind the first BN-ReLU of f."""
    x = conv(w.at("stem"), images)
    yield "stem", x
    number, rate = (arguments["depth"] - 4) // 6, arguments["dropout"]
    for block in blocks(w, [number] * 3, [arguments["widen"] > 1, True, True]):
        if block.kind == "transition":
            stride = 2 if block.stage else 1
            x = F.relu(norm(block.weights.at("norm1"), x))
            x = conv(block.weights.at("shortcut"), x, stride) + behind_activation(block.weights, x, stride, rate)
        else:
            x = x + w.share * preactivation(block.weights, x, 1, rate)
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)


def lm_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """(1 - k_n) x_n + k_n x_{n-1} + f(x_n); x_0 + f(x_0) in the very first block, and P(x) for x_{n-1} behind a transition."""
    x = before = conv(w.at("stem"), images)
    yield "stem", x
    parts, branch = _pre_blocks(w, arguments)
    for block in parts:
        if block.kind == "transition":
            x, before = _projected(block, x, branch)
            before = one_layer_before(w, x, before)
        elif not block.stage and not block.index:
            x, before = x + w.share * branch(block, x, 1), x
        else:
            k = block.weights["k"]
            x, before = (1 - k) * x + k * before + w.share * branch(block, x, 1), x
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)


def one_layer_before(w: Weights, x: Tensor, before: Tensor) -> Tensor:
    """The state one refined layer before x, on the straight line to the one an original layer before."""
    return torch.lerp(x, before, w.share) if w.refined > 1 else before


def momentum_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """v+ = gamma v + (1 - gamma) f(x), x+ = x + v+ in its two-step form, from rest: x_{-1} = x_0 in every stage."""
    x = before = conv(w.at("stem"), images)
    yield "stem", x
    parts, branch = _pre_blocks(w, arguments, start=True)
    for block in parts:
        if block.kind == "transition":
            x, _ = _projected(block, x, branch)
        elif block.kind == "start":
            before = one_layer_before(w, x, x)
        else:
            gamma = arguments["gamma"]
            scale = (1 - arguments["gamma"]) * w.share
            x, before = (1 + gamma) * x - gamma * before + scale * branch(block, x, 1), x
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)


def fractal_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + f1(x) / 2 + f2(x + f1(x))."""
    x = conv(w.at("stem"), images)
    yield "stem", x
    parts, branch = _pre_blocks(w, arguments)
    for block in parts:
        if block.kind == "transition":
            x, _ = _projected(block, x, branch)
        else:
            first = w.share * preactivation(block.weights.at("first"), x)
            x = x + first / 2 + w.share * preactivation(block.weights.at("second"), x + first)
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)
