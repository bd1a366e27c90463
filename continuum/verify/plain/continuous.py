"""The networks continuous in depth as plain loops, under Euler's method and RK4 with steps of one layer or a part of it."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from continuum.verify.plain.parts import Arguments, Layer, Weights, conv, conv_stem, linear, norm, pooled_head, projection
from continuum.verify.plain.pre_activation import preactivation

Slope: TypeAlias = Callable[[float, Tensor], Tensor]


def euler(f: Slope, t: float, x: Tensor, h: float) -> Tensor:
    return torch.add(x, f(t, x), alpha=h)


def rk4(f: Slope, t: float, x: Tensor, h: float) -> Tensor:
    k1 = f(t, x)
    k2 = f(t + h / 2, torch.add(x, k1, alpha=h / 2))
    k3 = f(t + h / 2, torch.add(x, k2, alpha=h / 2))
    k4 = f(t + h, torch.add(x, k3, alpha=h))
    for k, weight in ((k1, 1 / 6), (k2, 1 / 3), (k3, 1 / 3), (k4, 1 / 6)):
        x = torch.add(x, k, alpha=h * weight)
    return x


STEPS = {"euler": euler, "rk4": rk4}


def flow(place: str, solver: str, slope: Callable[[int], Slope], x: Tensor, depth: int) -> Generator[Layer, None, Tensor]:
    """The steps to `depth` under a solver such as "euler:h=0.5"; `slope(k)` is the slope in the layer [k, k + 1)."""
    name, _, h = solver.partition(":h=")
    parts = round(1 / float(h))
    for n in range(depth * parts):
        x = STEPS[name](slope(n // parts), n / parts, x, 1 / parts)
        yield f"{place} at depth {(n + 1) / parts:g}", x
    return x


# continuous_resnet


def continuous_resnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """Transitions x = P(x) + F(x), and flows of pre-activation branches whose weights vary with depth."""
    basis, size = arguments["basis"], arguments["size"]
    x = conv_stem(w.at("stem"), images)
    yield "stem", x
    for stage in range(3):
        place, stride = f"stages.{2 * stage}", 2 if stage else 1
        x = projection(w.at(place), x, stride) + preactivation(w.at(place), x, stride)
        yield place, x
        place = f"stages.{2 * stage + 1}"
        if basis == "constant":
            depth, slope = size * w.refined, _constant(w.at(f"{place}.layers"))
        else:
            depth, slope = size - 1 if basis == "hat" else size, _expanded(w.at(place), basis, size)
        x = yield from flow(place, arguments["solver"], slope, x, depth)
    yield "head", pooled_head(w.at("head"), x)


def _constant(w: Weights) -> Callable[[int], Slope]:
    """The branch of layer k."""
    return lambda k: lambda t, x: w.share * preactivation(w.at(str(k)), x)


def _expanded(w: Weights, basis: str, size: int) -> Callable[[int], Slope]:
    """The branch with theta(t) = sum_k phi_k(t) theta_k; on hats, with BatchNorm that has running statistics at the nodes."""
    nodes = w.inside()
    statistics = [name for name in nodes if name.endswith(("running_mean", "running_var"))]
    counts = [name for name in nodes if name.endswith("num_batches_tracked")]

    def slope(t: float, x: Tensor) -> Tensor:
        shares = phi(basis, size, t)
        here = {name: _between(tensor, shares) for name, tensor in nodes.items() if name not in counts}
        if w.training:
            here |= {name: torch.zeros_like(nodes[name][0]) for name in (*statistics, *counts)}
        y = preactivation(Weights(here, w.training), x, norm=norm if basis == "hat" else group_norm)
        if w.training:
            for name in (*statistics, *counts):
                _move(nodes[name], here[name], shares)
        return y

    return lambda k: slope


def phi(basis: str, size: int, t: float) -> dict[int, float]:
    """The functions of a basis that are not zero at depth t: hats at the integers, polynomials and waves on [0, size]."""
    if basis == "hat":
        left = math.floor(t + 1e-9)  # what rounding leaves just below a node is the node
        share = t - left
        return {left: 1.0} if share < 1e-9 else {left: 1 - share, left + 1: share}
    s, angle, values = 2 * t / size - 1, 2 * math.pi * t / size, [1.0]
    for k in range(1, size):
        if basis == "chebyshev":
            values.append(2 * s * values[-1] - values[-2] if k > 1 else s)
        elif basis == "legendre":
            values.append(((2 * k - 1) * s * values[-1] - (k - 1) * values[-2]) / k if k > 1 else s)
        else:
            values.append((math.cos if k % 2 else math.sin)((k + 1) // 2 * angle))
    return {k: value for k, value in enumerate(values) if value}


def _between(stacked: Tensor, shares: Mapping[int, float]) -> Tensor:
    """sum_k share_k theta_k."""
    (first, share), *rest = shares.items()
    total = stacked[first] if share == 1 else share * stacked[first]
    for k, share in rest:
        total = torch.add(total, stacked[k], alpha=share)
    return total


@torch.no_grad()
def _move(nodes: Tensor, seen: Tensor, shares: Mapping[int, float]) -> None:
    """Node k goes with momentum 0.1 share_k to what the batch has; `seen` is 0.1 times that, or the number of batches."""
    for k, share in shares.items():
        if seen.is_floating_point():
            momentum = 1 - torch.tensor(0.9, dtype=seen.dtype)  # rounded as the statistics are
            nodes[k].mul_(1 - share * momentum).add_(seen, alpha=share)
        else:
            nodes[k].add_(seen)


# odenet and mlp


def odenet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x' = GN conv(t, relu GN conv(t, relu GN x)), from depth 0 to 1 in each of one or three flows."""
    outer = group_norm if arguments["stages"] == 1 else norm
    x = odenet_stem(w.at("stem"), images, arguments["stages"] == 1 and arguments["downsample"])
    yield "stem", x
    for stage in range(arguments["stages"]):
        if stage:
            v = w.at(f"stages.{2 * stage - 1}")
            x = F.conv2d(F.relu(outer(v.at("norm"), x)), v["conv.weight"], v["conv.bias"], stride=2, padding=1)
            yield f"stages.{2 * stage - 1}", x
        place = f"stages.{2 * stage}"
        branch = partial(odenet_branch, w.at(place))
        x = yield from flow(place, arguments["solver"], lambda k, f=branch: f, x, 1)
    x = F.relu(outer(w.at("head.norm"), x)).mean(dim=(2, 3))
    yield "head", linear(w.at("head.linear"), x)


def odenet_stem(w: Weights, images: Tensor, downsample: bool) -> Tensor:
    """Three convolutions to a quarter of the size, or a single one."""
    if not downsample:
        return conv(w, images)
    x = F.relu(group_norm(w.at("1"), F.conv2d(images, w["0.weight"], w["0.bias"])))
    x = F.relu(group_norm(w.at("4"), F.conv2d(x, w["3.weight"], w["3.bias"], stride=2, padding=1)))
    return F.conv2d(x, w["6.weight"], w["6.bias"], stride=2, padding=1)


def odenet_branch(w: Weights, t: float, x: Tensor) -> Tensor:
    depth = torch.full_like(x[:, :1], t)
    y = conv(w.at("conv1"), torch.cat([depth, F.relu(group_norm(w.at("norm1"), x))], dim=1))
    y = conv(w.at("conv2"), torch.cat([depth, F.relu(group_norm(w.at("norm2"), y))], dim=1))
    return group_norm(w.at("norm3"), y)


def group_norm(w: Weights, x: Tensor) -> Tensor:
    """In groups of two channels or more, as many as divide them, at most 32."""
    channels = x.shape[1]
    groups = next(groups for groups in (32, 16, 8, 4, 2, 1) if groups == 1 or channels % (2 * groups) == 0)
    return F.group_norm(x, groups, w["weight"], w["bias"])


def mlp(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """x' = W2 tanh(W1 (t, x) + b1) + b2 on vectors with zeros appended."""
    x = F.pad(images, (0, arguments["augment"]))
    yield "stem", x

    def slope(t: float, x: Tensor) -> Tensor:
        inner = torch.cat([torch.full_like(x[:, :1], t), x], dim=1)
        return linear(w.at("stages.0.outer"), torch.tanh(linear(w.at("stages.0.inner"), inner)))

    x = yield from flow("stages.0", arguments["solver"], lambda k: slope, x, 1)
    yield "head", linear(w.at("head"), x)
