"""Pre-activation networks, x + f(x), and their two-step relatives, as plain loops."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from continuum.verify.plain.parts import Arguments, Block, Change, Kind, Layer, Step, Weights, conv, loop, norm, projection

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


def one_layer_before(w: Weights, x: Tensor, before: Tensor) -> Tensor:
    """The state one refined layer before x, on the straight line to the one an original layer before."""
    return torch.lerp(x, before, w.share) if w.refined > 1 else before


def _wide(arguments: Arguments) -> bool:
    """Whether the blocks are bottlenecks."""
    return "cardinality" in arguments or arguments.get("block") == "bottleneck"


def _branch(arguments: Arguments) -> Branch:
    if not _wide(arguments):
        return lambda block, x, stride: preactivation(block.weights, x, stride)
    return lambda block, x, stride: prebottleneck(block.weights, x, stride, arguments.get("cardinality", 1))


def _loop(
    w: Weights, arguments: Arguments, images: Tensor, layer: Step, changes: Mapping[Kind, Change] = {}
) -> Iterator[Layer]:
    """Three stages whose transitions are P(x) + f(x), with P(x) for the state before."""
    f, wide = _branch(arguments), _wide(arguments)

    def transition(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        stride = 2 if block.stage else 1
        kept = projection(block.weights, x, stride)
        after = kept + f(block, x, stride)
        return after, one_layer_before(w, after, kept)

    counts = [(arguments["depth"] - 2) // (9 if wide else 6)] * 3
    return loop(w, images, counts, layer, {"transition": transition, **changes}, first=wide)


def preresnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + f(x), or x + scale f(x) where the size stays."""
    f, scale = _branch(arguments), arguments["scale"] * w.share
    return _loop(w, arguments, images, lambda block, x, before: x + scale * f(block, x, 1))


def wide_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + f(x) with dropout in f; where the size changes the shortcut starts behind the first BN-ReLU of f."""
    rate = arguments["dropout"]

    def transition(block: Block, x: Tensor) -> tuple[Tensor, None]:
        stride = 2 if block.stage else 1
        x = F.relu(norm(block.weights.at("norm1"), x))
        return conv(block.weights.at("shortcut"), x, stride) + behind_activation(block.weights, x, stride, rate), None

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        return x + w.share * preactivation(block.weights, x, 1, rate)

    counts = [(arguments["depth"] - 4) // 6] * 3
    return loop(w, images, counts, layer, {"transition": transition}, first=arguments["widen"] > 1)


def lm_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """(1 - k_n) x_n + k_n x_{n-1} + f(x_n); x_0 + f(x_0) in the very first block, and P(x) for x_{n-1} behind a transition."""

    f = _branch(arguments)

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        if not block.stage and not block.index:
            return x + w.share * f(block, x, 1)
        k = block.weights["k"]
        return (1 - k) * x + k * before + w.share * f(block, x, 1)

    return _loop(w, arguments, images, layer)


def lm_resnext(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """The same with bottlenecks in groups."""
    return lm_resnet(w, arguments, images)


def momentum_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """v+ = gamma v + (1 - gamma) f(x), x+ = x + v+ in its two-step form, from rest: x_{-1} = x_0 in every stage."""
    f, gamma, scale = _branch(arguments), arguments["gamma"], (1 - arguments["gamma"]) * w.share

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        return (1 + gamma) * x - gamma * before + scale * f(block, x, 1)

    return _loop(w, arguments, images, layer, {"start": lambda block, x: (x, one_layer_before(w, x, x))})


def fractal_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x + f1(x) / 2 + f2(x + f1(x))."""

    def layer(block: Block, x: Tensor, before: Any) -> Tensor:
        first = w.share * preactivation(block.weights.at("first"), x)
        return x + first / 2 + w.share * preactivation(block.weights.at("second"), x + first)

    return _loop(w, arguments, images, layer)
