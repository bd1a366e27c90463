"""The networks with noise as plain loops; in evaluation mode they draw nothing, and the mean counts.

Draws come from torch's global generator: those of all layers of a flow before its first layer, a transition's when it runs.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from continuum.verify.plain.continuous import group_norm, odenet_branch, odenet_stem
from continuum.verify.plain.parts import (
    Arguments,
    Block,
    Change,
    Kind,
    Layer,
    Weights,
    added_channels,
    conv,
    conv_stem,
    linear,
    loop,
    norm,
    plain_head,
    projection,
)
from continuum.verify.plain.post_activation import basic
from continuum.verify.plain.pre_activation import one_layer_before, preactivation


def coins(arguments: Arguments, x: Tensor, p: float) -> Tensor:
    """1 with probability p, otherwise 0, for the mini-batch or for each image."""
    return torch.empty(1 if arguments["per"] == "batch" else len(x), 1, 1, 1).bernoulli_(p)


def part(published: Tensor, mean: float, h: float) -> Tensor:
    """h m + sqrt(h) (c - m): the coefficient of a layer that is the part h of one with coefficient c."""
    return published if h == 1 else math.sqrt(h) * published + (h - math.sqrt(h)) * mean


def stochastic_depth_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """relu(x + b F(x)) with b from Bernoulli(p), p falling from layer to layer; relu(x + p F(x)) in evaluation."""
    number = (arguments["depth"] - 2) // 6

    def survival(block: Block) -> float:
        return 1 - (number * block.stage + block.index + 1) / (3 * number) * (1 - arguments["last"])

    def step(block: Block, x: Tensor, kept: Tensor, stride: int, h: float) -> Tensor:
        b = block.drawn
        if b is None:
            after = F.relu(kept + survival(block) * basic(block, x, stride))
            return after if h == 1 else kept + h * (after - kept)
        if h != 1:
            return kept + part(b, survival(block), h) * (F.relu(kept + basic(block, x, stride)) - kept)
        return F.relu(kept + b * basic(block, x, stride)) if b.any() else F.relu(kept)

    def transition(block: Block, x: Tensor) -> tuple[Tensor, None]:
        return step(block, x, added_channels(F.avg_pool2d(x, 2), 2 * x.shape[1]), 2, 1.0), None

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        return step(block, x, x, 1, w.share)

    def draw(block: Block, x: Tensor) -> Tensor:
        return coins(arguments, x, survival(block))

    changes: dict[Kind, Change] = {"transition": transition}
    return loop(w, images, [number] * 3, layer, changes, stem=conv_stem, head=plain_head, draw=draw)


def stochastic_lm_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """(1 - k_n) x_n + k_n x_{n-1} + b / p f(x_n) with b from Bernoulli(p); x_0 + f(x_0) in the very first block."""
    number = (arguments["depth"] - 2) // 6

    def survival(block: Block) -> float:
        return 1 - (number * block.stage + block.index) / (3 * number - 1) * (1 - arguments["last"])

    def step(block: Block, x: Tensor, kept: Tensor, stride: int, h: float) -> Tensor:
        b = block.drawn
        if b is None:
            return kept + h * preactivation(block.weights, x, stride)
        if h == 1 and not b.any():
            return kept
        return kept + part(b / survival(block), 1.0, h) * preactivation(block.weights, x, stride)

    def transition(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = projection(block.weights, x, 2)
        after = step(block, x, kept, 2, 1.0)
        return after, one_layer_before(w, after, kept)

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        if not block.stage and not block.index:
            return step(block, x, x, 1, w.share)
        k = block.weights["k"]
        return step(block, x, (1 - k) * x + k * before, 1, w.share)

    def draw(block: Block, x: Tensor) -> Tensor:
        return coins(arguments, x, survival(block))

    return loop(w, images, [number] * 3, layer, {"transition": transition}, draw=draw)


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
    forward, backward = arguments["forward_mode"], arguments["backward_mode"]

    def pair(mode: str, x: Tensor, h: float) -> list[Tensor]:
        """The coefficients of F and G."""
        size = (1 if arguments["per"] == "batch" else len(x), 1, 1, 1)
        if mode == "even":
            return [torch.full(size, 0.5 * h)] * 2
        a = torch.rand(size)
        return [part(a, 0.5, h), part(1 - a, 0.5, h)]

    def draw(block: Block, x: Tensor) -> Tensor:
        """Two coefficients of the values, and two of the gradients."""
        h = 1.0 if block.kind == "transition" else w.share
        there = pair(forward, x, h)
        return torch.stack([*there, *(there if backward == "keep" else pair(backward, x, h))])

    def step(block: Block, x: Tensor, kept: Tensor, stride: int, h: float) -> Tensor:
        f, g = (_shake_branch(block.weights.at(name), x, stride) for name in ("first", "second"))
        if block.drawn is None:
            return kept + (0.5 * h * f + 0.5 * h * g)
        a, b, c, d = block.drawn
        return kept + Replaced.apply(a * f + b * g, c * f + d * g)

    def transition(block: Block, x: Tensor) -> tuple[Tensor, None]:
        stride = 2 if block.stage else 1
        return step(block, x, _paths(block.weights.at("shortcut"), x, stride), stride, 1.0), None

    def stem(w: Weights, x: Tensor) -> Tensor:
        return norm(w.at("1"), conv(w.at("0"), x))

    def head(w: Weights, x: Tensor) -> Tensor:
        return linear(w.at("linear"), F.relu(x).mean(dim=(2, 3)))

    counts, first = [(arguments["depth"] - 2) // 6] * 3, arguments["width"] != 16
    changes: dict[Kind, Change] = {"transition": transition}
    return loop(w, images, counts, lambda block, x, before: step(block, x, x, 1, w.share), changes, first, stem, head, draw)


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


def dropout_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + m f(x), with entries of m either 0 or 1 / (1 - rate)."""
    stays = 1 - arguments["rate"]

    def draw(block: Block, x: Tensor) -> Tensor | None:
        return torch.empty_like(x).bernoulli_(stays) / stays if block.kind == "layer" else None

    def transition(block: Block, x: Tensor) -> tuple[Tensor, None]:
        return projection(block.weights, x, 2) + preactivation(block.weights, x, 2), None

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        share = w.share if block.drawn is None else part(block.drawn, 1.0, w.share)
        return x + share * preactivation(block.weights, x)

    return loop(w, images, [(arguments["depth"] - 2) // 6] * 3, layer, {"transition": transition}, draw=draw)


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
