"""A network: head(stages(stem(images))), where a stage is a flow or a transition between two of them."""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ParamSpec

import torch
from torch import Tensor, nn

from continuum.fields import PreActivation
from continuum.flow import Flow
from continuum.solvers import Adaptive, SolveError, Solver
from continuum.solvers.base import restored_on_error
from continuum.types import Images, Logits

P = ParamSpec("P")


@dataclass(frozen=True)
class Blueprint:
    """What built a network: the builder's name and its arguments, enough to build it again."""

    builder: str
    arguments: dict[str, object]


class Network(nn.Module):
    """head(stages(stem(images))).

    A stage is a `Flow`, or a transition: a module that returns (x, previous) with the state after it and the one that the
    next flow takes as "one layer before" (see `Transition`). `flows` lists the flows; `with_solver` gives the network with
    the same weights under another solver.

    Raises:
        SolveError: a flow cannot be solved; it carries the flow's name, and buffers are those from before the call.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.blueprint: Blueprint | None = None

    @property
    def flows(self) -> list[Flow]:
        return [stage for stage in self.stages if isinstance(stage, Flow)]

    @property
    def solver(self) -> Solver:
        """The solver of the flows.

        Raises:
            ValueError: the flows differ in theirs, or there is none.
        """
        solvers = {flow.solver for flow in self.flows}
        if len(solvers) != 1:
            raise ValueError(f"the flows of this network have {len(solvers)} different solvers")
        return solvers.pop()

    def with_solver(self, solver: Solver | str) -> "Network":
        """The network with the same modules, hence the same weights, and all its flows under `solver`."""
        stages = [stage.with_solver(solver) if isinstance(stage, Flow) else stage for stage in self.stages]
        network = Network(self.stem, stages, self.head)
        network.blueprint = self.blueprint
        network.training = network.stages.training = self.training
        return network

    def forward(self, images: Images) -> Logits:
        fallible = self.training and any(isinstance(flow.solver, Adaptive) for flow in self.flows)
        with restored_on_error(self) if fallible else nullcontext():
            x, previous = self.stem(images), None
            for index, stage in enumerate(self.stages):
                if not isinstance(stage, Flow):
                    x, previous = stage(x)
                elif isinstance(stage.solver, Adaptive):
                    x, previous = solve_named(stage, x, index), None
                else:
                    x, previous = stage(x, previous), None
            return self.head(x)


def solve_named(flow: Flow, x: Tensor, index: int) -> Tensor:
    """flow(x), with the flow's name in the error if it fails."""
    try:
        return flow(x)
    except SolveError as error:
        error.flow = f"stages.{index}"
        raise


class Augment(nn.Module):
    """A stem that appends `channels` zeros to axis 1: a flow can go around in dimensions the data does not have
    (arXiv 1904.01681), and a second-order field finds its velocities there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 0:
            raise ValueError(f"channels is the number of zeros to append, not {channels}")
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], self.channels, *x.shape[2:])], dim=1)


class Transition(nn.Module):
    """A plain residual step that changes size, P(x) + f(x) with P = BN-ReLU-conv1x1 of stride `stride`.

    Returns (P(x) + f(x), P(x)): the projected old state is the "previous state" of the layer after it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        self.branch = PreActivation(in_channels, out_channels, stride)
        self.norm = nn.BatchNorm2d(in_channels)
        self.project = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        nn.init.kaiming_normal_(self.project.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = self.project(torch.relu(self.norm(x)))
        return shortcut + self.branch(x), shortcut


class Downsample(nn.Module):
    """A transition without a residual: a convolution that halves height and width between two flows."""

    def __init__(self, in_channels: int, out_channels: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.conv(torch.relu(self.norm(x))), None


class PooledHead(nn.Module):
    """norm-ReLU, average over height and width, linear: (batch, channels, height, width) to (batch, classes)."""

    def __init__(self, norm: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.norm(x)).mean(dim=(2, 3)))


def builder(build: Callable[P, Network]) -> Callable[P, Network]:
    """Decorate a function that builds a `Network`, so that the network knows its name and arguments and can be saved.

    Arguments are plain data (numbers, text, booleans, None) or solvers.
    """
    signature = inspect.signature(build)

    @functools.wraps(build)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> Network:
        network = build(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        network.blueprint = Blueprint(build.__name__, dict(bound.arguments))
        return network

    return recorded
