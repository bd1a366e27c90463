"""The networks whose steps can be undone, and their stable relatives, as plain loops."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from continuum.verify.plain.parts import Arguments, Block, Layer, Weights, added_channels, blocks, conv, pooled_head
from continuum.verify.plain.pre_activation import one_layer_before, preactivation


def revnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """y1 = x1 + F(x2), y2 = x2 + G(y1) on the halves of the channels."""
    x = conv(w.at("stem"), images)
    yield "stem", x
    widths, scale = arguments["widths"], arguments["scale"] * w.share
    for block in blocks(w, [(arguments["depth"] - 2) // 12] * 3, [False, True, True]):
        first, second = block.weights.at("first"), block.weights.at("second")
        x1, x2 = x.chunk(2, dim=1)
        if block.kind == "transition":
            half = widths[block.stage] // 2
            y1 = pool_pad(x1, half) + preactivation(first, x2, stride=2)
            y2 = pool_pad(x2, half) + preactivation(second, y1)
        else:
            y1 = x1 + scale * preactivation(first, x2)
            y2 = x2 + scale * preactivation(second, y1)
        x = torch.cat([y1, y2], dim=1)
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)


def pool_pad(x: Tensor, channels: int) -> Tensor:
    return added_channels(F.avg_pool2d(x, 2), channels)


def double_layer(w: Weights, x: Tensor) -> Tensor:
    """K^T relu(K x + b) + c."""
    y = F.relu(F.conv2d(x, w["weight"], w["inner_bias"], padding=1))
    return F.conv_transpose2d(y, w["weight"], w["outer_bias"], padding=1)


def antisymmetric_layer(w: Weights, x: Tensor, gamma: float) -> Tensor:
    """relu((K - K^T - gamma I) x + b); K^T has the channels of K swapped and its kernel mirrored."""
    weight = w["weight"] - w["weight"].transpose(0, 1).flip(2, 3)
    return F.relu(F.conv2d(x, weight, w["bias"], padding=1) - gamma * x)


def pooled_blocks(w: Weights, arguments: Arguments, layers: int, start: bool = False, end: bool = False) -> Iterator[Block]:
    """The blocks of three stages; the first block of the second and third still has the channels of the stage before."""
    number = (arguments["depth"] - 2) // layers
    return blocks(w, [number + 1, number + 1, number], [False, True, True], start, end)


def hamiltonian(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """Y+ = Y + h K1^T relu(K1 Z + b1), Z+ = Z - h K2^T relu(K2 Y+ + b2)."""
    x = conv(w.at("stem"), images)
    yield "stem", x
    h = arguments["h"] * w.share
    for block in pooled_blocks(w, arguments, 12):
        if block.kind == "transition":
            x = pool_pad(x, arguments["widths"][block.stage])
        else:
            y, z = x.chunk(2, dim=1)
            y = y + h * double_layer(block.weights.at("first"), z)
            z = z - h * double_layer(block.weights.at("second"), y)
            x = torch.cat([y, z], dim=1)
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)


def midpoint(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """Y_{j+1} = Y_{j-1} + 2 h F(Y_j) with Y_1 = Y_0 + h F(Y_0), or with Y_{-1} = 0."""
    y = conv(w.at("stem"), images)
    yield "stem", y
    before, from_zero = None, arguments["start"] == "zero"
    h = arguments["h"] * w.share
    for block in pooled_blocks(w, arguments, 6, start=from_zero):
        if block.kind == "transition":
            y, before = pool_pad(y, arguments["widths"][block.stage]), None
        elif block.kind == "start":
            before = one_layer_before(w, y, torch.zeros_like(y))
        else:
            slope = antisymmetric_layer(block.weights, y, arguments["gamma"])
            y, before = (y + h * slope if before is None else before + 2 * h * slope), y
        yield block.name, y
    yield "head", pooled_head(w.at("head"), y)


def leapfrog(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """V+ = V - h^2 K^T relu(K Y + b), Y+ = Y + V+ with V = Y, as from Y_{-1} = 0, or V = 0 where a stage starts."""
    x = conv(w.at("stem"), images)
    yield "stem", x
    for block in pooled_blocks(w, arguments, 6, start=True, end=True):
        if block.kind == "transition":
            x = pool_pad(x, arguments["widths"][block.stage])
        elif block.kind == "start":
            x = torch.cat([x, x if arguments["start"] == "zero" else torch.zeros_like(x)], dim=1)
        elif block.kind == "end":
            x, _ = x.chunk(2, dim=1)
        else:
            y, v = x.chunk(2, dim=1)
            v = v - arguments["h"] ** 2 * w.share * double_layer(block.weights.at("second"), y)
            y = y + w.share * v
            x = torch.cat([y, v], dim=1)
        yield block.name, x
    yield "head", pooled_head(w.at("head"), x)


def antisymmetric(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """Y+ = Y + h relu((K - K^T - gamma I) Y + b)."""
    y = conv(w.at("stem"), images)
    yield "stem", y
    h = arguments["h"] * w.share
    for block in pooled_blocks(w, arguments, 6):
        if block.kind == "transition":
            y = pool_pad(y, arguments["widths"][block.stage])
        else:
            y = y + h * antisymmetric_layer(block.weights, y, arguments["gamma"])
        yield block.name, y
    yield "head", pooled_head(w.at("head"), y)
