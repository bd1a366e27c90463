"""The networks with noise as plain loops; in evaluation mode they draw nothing, and the mean counts.

Draws come from torch's global generator: those of all layers of a flow before its first layer, a transition's when it runs.
"""

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from continuum.verify.plain.continuous import group_norm, odenet_branch, odenet_stem
from continuum.verify.plain.parts import (
    Arguments,
    Block,
    Layer,
    Weights,
    added_channels,
    blocks,
    conv,
    conv_stem,
    linear,
    norm,
    pooled_head,
    projection,
)
from continuum.verify.plain.post_activation import basic
from continuum.verify.plain.pre_activation import one_layer_before, preactivation

Draw: TypeAlias = Callable[[Block], Tensor | None]
"""What a block draws, if anything, where the state is the one at the start of the flow or transition it belongs to."""


def drawn(w: Weights, parts: Iterator[Block], draw: Draw) -> Iterator[tuple[Block, Tensor | None]]:
    """The blocks with what they draw in training."""
    for _, run in groupby(parts, key=lambda block: block.name.split(".")[1]):
        layers = list(run)
        draws = [draw(block) if w.training else None for block in layers]
        yield from zip(layers, draws, strict=True)


def coins(arguments: Arguments, x: Tensor, p: float) -> Tensor:
    """1 with probability p, otherwise 0, for the mini-batch or for each image."""
    return torch.empty(1 if arguments["per"] == "batch" else len(x), 1, 1, 1).bernoulli_(p)


def part(published: Tensor, mean: float, h: float) -> Tensor:
    """h m + sqrt(h) (c - m): the coefficient of a layer that is the part h of one with coefficient c."""
    return published if h == 1 else math.sqrt(h) * published + (h - math.sqrt(h)) * mean


# Stochastic depth


def stochastic_depth_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """relu(x + b F(x)) with b from Bernoulli(p), p falling from layer to layer; relu(x + p F(x)) in evaluation."""
    x = conv_stem(w.at("stem"), images)
    yield "stem", x
    number = (arguments["depth"] - 2) // 6

    def survival(block: Block) -> float:
        return 1 - (number * block.stage + block.index + 1) / (3 * number) * (1 - arguments["last"])

    def draw(block: Block) -> Tensor:
        return coins(arguments, x, survival(block))

    for block, b in drawn(w, blocks(w, [number] * 3, [False, True, True]), draw):
        if block.kind == "transition":
            kept, stride, h = added_channels(F.avg_pool2d(x, 2), 2 * x.shape[1]), 2, 1.0
        else:
            kept, stride, h = x, 1, w.share
        if b is None:
            after = F.relu(kept + survival(block) * basic(block, x, stride))
            x = after if h == 1 else kept + h * (after - kept)
        elif h != 1:
            x = kept + part(b, survival(block), h) * (F.relu(kept + basic(block, x, stride)) - kept)
        elif b.any():
            x = F.relu(kept + b * basic(block, x, stride))
        else:
            x = F.relu(kept)
        yield block.name, x
    yield "head", linear(w.at("head.linear"), F.avg_pool2d(x, x.shape[2:]).flatten(1))


def stochastic_lm_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """(1 - k_n) x_n + k_n x_{n-1} + b / p f(x_n) with b from Bernoulli(p); x_0 + f(x_0) in the very first block."""
    x = before = conv(w.at("stem"), images)
    yield "stem", x
    number = (arguments["depth"] - 2) // 6

    def survival(block: Block) -> float:
        return 1 - (number * block.stage + block.index) / (3 * number - 1) * (1 - arguments["last"])

    def draw(block: Block) -> Tensor:
        return coins(arguments, x, survival(block))

    for block, b in drawn(w, blocks(w, [number] * 3, [False, True, True]), draw):
        if block.kind == "transition":
            kept, stride, h = projection(block.weights, x, 2), 2, 1.0
        elif not block.stage and not block.index:
            kept, stride, h = x, 1, w.share
        else:
            k = block.weights["k"]
            kept, stride, h = (1 - k) * x + k * before, 1, w.share
        before = kept if block.kind == "transition" else x
        if b is None:
            x = kept + h * preactivation(block.weights, x, stride)
        elif h != 1 or b.any():
            x = kept + part(b / survival(block), 1.0, h) * preactivation(block.weights, x, stride)
        else:
            x = kept
        if block.kind == "transition":
            before = one_layer_before(w, x, before)
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)


# Shake-shake


class Replaced(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, gradient


def shake_shake(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + a F(x) + (1 - a) G(x), with a uniform or 1/2, and other coefficients for the gradients of F and G."""
    x = norm(w.at("stem.1"), conv(w.at("stem.0"), images))
    yield "stem", x
    forward, backward = arguments["forward_mode"], arguments["backward_mode"]

    def pair(mode: str, h: float) -> list[Tensor]:
        """The coefficients of F and G."""
        size = (1 if arguments["per"] == "batch" else len(x), 1, 1, 1)
        if mode == "even":
            return [torch.full(size, 0.5 * h)] * 2
        a = torch.rand(size)
        return [part(a, 0.5, h), part(1 - a, 0.5, h)]

    def draw(block: Block) -> Tensor:
        """Two coefficients of the values, and two of the gradients."""
        h = 1.0 if block.kind == "transition" else w.share
        there = pair(forward, h)
        return torch.stack([*there, *(there if backward == "keep" else pair(backward, h))])

    changes = [arguments["width"] != 16, True, True]
    for block, abcd in drawn(w, blocks(w, [(arguments["depth"] - 2) // 6] * 3, changes), draw):
        stride = 2 if block.kind == "transition" and block.stage else 1
        kept, h = (_paths(block.weights.at("shortcut"), x, stride), 1.0) if block.kind == "transition" else (x, w.share)
        f, g = (_shake_branch(block.weights.at(name), x, stride) for name in ("first", "second"))
        if abcd is None:
            x = kept + (0.5 * h * f + 0.5 * h * g)
        else:
            a, b, c, d = abcd
            x = kept + Replaced.apply(a * f + b * g, c * f + d * g)
        yield block.name, x
    yield "head", linear(w.at("head.linear"), F.relu(x).mean(dim=(2, 3)))


def _shake_branch(w: Weights, x: Tensor, stride: int) -> Tensor:
    """ReLU-conv-BN-ReLU-conv-BN."""
    x = F.relu(norm(w.at("norm1"), conv(w.at("conv1"), F.relu(x), stride)))
    return norm(w.at("norm2"), conv(w.at("conv2"), x))


def _paths(w: Weights, x: Tensor, stride: int) -> Tensor:
    """ReLU, two paths of conv1x1, the second of the image moved right and down by a pixel, BN."""
    x = F.relu(x)
    moved = F.pad(x, (1, 0, 1, 0))[:, :, :-1, :-1]
    paths = [conv(w.at(name), seen, stride) for name, seen in (("conv1", x), ("conv2", moved))]
    return norm(w.at("norm"), torch.cat(paths, dim=1))


# Noise on every entry


def dropout_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + m f(x), with entries of m either 0 or 1 / (1 - rate)."""
    x = conv(w.at("stem"), images)
    yield "stem", x
    stays = 1 - arguments["rate"]

    def draw(block: Block) -> Tensor | None:
        return torch.empty_like(x).bernoulli_(stays) / stays if block.kind == "layer" else None

    for block, mask in drawn(w, blocks(w, [(arguments["depth"] - 2) // 6] * 3, [False, True, True]), draw):
        if block.kind == "transition":
            x = projection(block.weights, x, 2) + preactivation(block.weights, x, 2)
        else:
            f = preactivation(block.weights, x)
            x = x + (w.share if mask is None else part(mask, 1.0, w.share)) * f
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)


def neural_sde(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + h f(t, x) + sqrt(h) sigma z, or sqrt(h) sigma z x, from depth 0 to 1, with z from N(0, 1) for every entry."""
    x = odenet_stem(w.at("stem"), images, arguments["downsample"])
    yield "stem", x
    steps = round(1 / float(arguments["solver"].rpartition("h=")[2]))
    draws = [torch.randn_like(x) if w.training else None for _ in range(steps)]
    for n, z in enumerate(draws):
        f = odenet_branch(w.at("stages.0"), n / steps, x)
        if z is None:
            x = torch.add(x, f, alpha=1 / steps)
        else:
            noise = part(arguments["sigma"] * z, 0.0, 1 / steps)
            x = x + (1 / steps * f + (noise * x if arguments["kind"] == "multiplicative" else noise))
        yield f"stages.0 at depth {(n + 1) / steps:g}", x
    x = F.relu(group_norm(w.at("head.norm"), x)).mean(dim=(2, 3))
    yield "head", linear(w.at("head.linear"), x)
