"""The networks whose steps can be undone, and their stable relatives, as plain loops."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from continuum.verify.plain.parts import Arguments, Block, Change, Kind, Layer, Step, Weights, added_channels, loop
from continuum.verify.plain.pre_activation import one_layer_before, preactivation


def revnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """y1 = x1 + F(x2), y2 = x2 + G(y1) on the halves of the channels."""
    scale = arguments["scale"] * w.share

    def transition(block: Block, x: Tensor) -> tuple[Tensor, None]:
        (x1, x2), half = x.chunk(2, dim=1), arguments["widths"][block.stage] // 2
        y1 = pool_pad(x1, half) + preactivation(block.weights.at("first"), x2, stride=2)
        y2 = pool_pad(x2, half) + preactivation(block.weights.at("second"), y1)
        return torch.cat([y1, y2], dim=1), None

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        y1 = x1 + scale * preactivation(block.weights.at("first"), x2)
        y2 = x2 + scale * preactivation(block.weights.at("second"), y1)
        return torch.cat([y1, y2], dim=1)

    return loop(w, images, [(arguments["depth"] - 2) // 12] * 3, layer, {"transition": transition})


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


def _pooled(
    w: Weights, arguments: Arguments, images: Tensor, layers: int, layer: Step, changes: Mapping[Kind, Change] = {}
) -> Iterator[Layer]:
    """Three stages; the first block of the second and third still has the channels of the stage before."""
    number, widths = (arguments["depth"] - 2) // layers, arguments["widths"]

    def transition(block: Block, x: Tensor) -> tuple[Tensor, None]:
        return pool_pad(x, widths[block.stage]), None

    return loop(w, images, [number + 1, number + 1, number], layer, {"transition": transition, **changes})


def hamiltonian(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """Y+ = Y + h K1^T relu(K1 Z + b1), Z+ = Z - h K2^T relu(K2 Y+ + b2)."""
    h = arguments["h"] * w.share

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        y, z = x.chunk(2, dim=1)
        y = y + h * double_layer(block.weights.at("first"), z)
        z = z - h * double_layer(block.weights.at("second"), y)
        return torch.cat([y, z], dim=1)

    return _pooled(w, arguments, images, 12, layer)


def midpoint(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """Y_{j+1} = Y_{j-1} + 2 h F(Y_j) with Y_1 = Y_0 + h F(Y_0), or with Y_{-1} = 0."""
    h = arguments["h"] * w.share

    def start(block: Block, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, one_layer_before(w, y, torch.zeros_like(y))

    def layer(block: Block, y: Tensor, before: Any) -> Tensor:
        slope = antisymmetric_layer(block.weights, y, arguments["gamma"])
        return y + h * slope if before is None else before + 2 * h * slope

    return _pooled(w, arguments, images, 6, layer, {"start": start} if arguments["start"] == "zero" else {})


def leapfrog(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """V+ = V - h^2 K^T relu(K Y + b), Y+ = Y + V+ with V = Y, as from Y_{-1} = 0, or V = 0 where a stage starts."""

    def start(block: Block, y: Tensor) -> tuple[Tensor, None]:
        return torch.cat([y, y if arguments["start"] == "zero" else torch.zeros_like(y)], dim=1), None

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        y, v = x.chunk(2, dim=1)
        v = v - arguments["h"] ** 2 * w.share * double_layer(block.weights.at("second"), y)
        return torch.cat([y + w.share * v, v], dim=1)

    return _pooled(w, arguments, images, 6, layer, {"start": start, "end": lambda block, x: (x.chunk(2, dim=1)[0], None)})


def antisymmetric(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """Y+ = Y + h relu((K - K^T - gamma I) Y + b)."""
    h, gamma = arguments["h"] * w.share, arguments["gamma"]
    return _pooled(w, arguments, images, 6, lambda block, y, before: y + h * antisymmetric_layer(block.weights, y, gamma))
