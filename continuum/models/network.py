"""A network: head(stages(stem(images))), where a stage is a flow or a transition between two of them."""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeAlias

import torch
from torch import Tensor, nn

from continuum.fields.base import in_mode_of
from continuum.flow import Flow
from continuum.integral import Integrand
from continuum.models.flows import (
    compile_parts,
    drift,
    flows,
    frozen,
    named_flows,
    project,
    refine,
    sample,
    solver_of,
    with_solver,
)
from continuum.noise.base import has_noise
from continuum.solvers import SolveError, Solver
from continuum.solvers.base import restored_on_error
from continuum.types import Images, Logits, State

P = ParamSpec("P")

End: TypeAlias = Callable[[Flow, State, State | None], State]
"""How a network takes a flow: (flow, x, the state one layer before) -> x(depth)."""


@dataclass(frozen=True)
class Blueprint:
    """What built a network: the builder's name and its arguments, enough to build it again.

    The name is bare in the zoo, and elsewhere an import path. `changes` are the refinements and projections since then, in
    order: ("refine", 2), ("project", "hat", 4).
    """

    builder: str
    arguments: dict[str, object]
    changes: tuple[tuple[object, ...], ...] = ()


class Network(nn.Module):
    """head(stages(stem(images))).

    A stage is a `Flow`, or a transition between sizes: a module that returns the state after it, or a pair of that and the
    state which the next flow takes as "one layer before". `flows` lists the flows; `with_solver` gives the network with the
    same weights under another solver.

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
        return flows(self)

    @property
    def named_flows(self) -> dict[str, Flow]:
        """The flows by their names in the network."""
        return named_flows(self)

    @property
    def solver(self) -> Solver:
        """The solver of the flows.

        Raises:
            ValueError: the flows differ in theirs, or there is none.
        """
        return solver_of(self)

    def with_solver(self, solver: Solver | str) -> "Network":
        """The network with the same modules, hence the same weights, and all its flows under `solver`; see `flows`."""
        return with_solver(self, solver)

    def refine(self, k: int) -> "Network":
        """A deeper copy for multi-level training (arXiv 1710.10348), with k steps in the place of one; see `flows.refine`."""
        return refine(self, k)._after("refine", k)

    def project(self, name: str, size: int) -> "Network":
        """A copy whose weights are expanded on the basis `name` with `size` functions; see `flows.project`."""
        return project(self, name, size)._after("project", name, size)

    def drift(self) -> "Network":
        """The deterministic network with the same weights; see `flows.drift`."""
        return drift(self)._after("drift")

    def _after(self, *change: object) -> "Network":
        """This network, whose blueprint records the change."""
        if self.blueprint is not None:
            self.blueprint = replace(self.blueprint, changes=(*self.blueprint.changes, change))
        return self

    def sample(self, x: Images, n: int) -> Tensor:
        """n sampled predictions, logits of shape (n, batch, classes); see `flows.sample`."""
        return sample(self, x, n)

    @property
    def stochastic(self) -> bool:
        """Whether a field of this network has noise."""
        return has_noise(self)

    def frozen(self, images: Images) -> "Network":
        """The network whose flows repeat the steps that adaptive solvers accept on `images`; see `flows.frozen`."""
        return frozen(self, images)

    def compile(self) -> None:
        """Compile this network in place: its class, state dict and results (to rounding) stay.

        One graph if all flows have fixed steps that can be traced, otherwise part by part; see `Flow.compile`. Networks made
        from this one, by `with_solver` or `refine`, are compiled anew.
        """
        compile_parts(self)

    def forward(self, images: Images) -> Logits:
        return self._through(images, _end)

    def integral(self, images: Images, integrand: Integrand) -> tuple[Logits, Tensor]:
        """The logits, and the sum over all flows of the integral of integrand(t, x, dx/dt), one number an image.

        See `Flow.integral`. What `compile` has compiled is evaluated as it was written.

        Raises:
            TypeError: there is no flow, or one whose scheme cannot carry an integral.
            ValueError: an integrand that does not return one number an image.
        """
        if not self.flows:
            raise TypeError("this network has no flow to integrate over")
        if inside := [name for name in self.named_flows if not re.fullmatch(r"stages\.\d+", name)]:
            raise TypeError(f"flow {inside[0]} lies inside a stage, which carries no integral: make it a stage of its own")
        integrals: list[Tensor] = []

        def end(flow: Flow, x: State, previous: State | None) -> State:
            state, integral = flow.integral(x, integrand, previous)
            integrals.append(integral)
            return state

        return self._through(images, end), torch.stack(integrals).sum(0)

    def _through(self, images: Images, end: End) -> Logits:
        """The logits, with `end` in the place of every flow; buffers are as before if a solve fails."""
        fallible = self.training and not all(flow.solver.one_graph for flow in self.flows)
        with restored_on_error(self) if fallible else nullcontext():
            x = images
            for _, _, x in self.walk(images, end):  # noqa: B007
                pass
            return x

    def walk(self, images: Images, end: End | None = None) -> Iterator[tuple[str, nn.Module, State]]:
        """Yield (name, part, state after it) for the stem, every stage and the head, whose state is the logits.

        Args:
            images: a batch, (batch, channels, height, width).
            end: what takes a flow, (flow, x, the state one layer before) -> x(depth); the flow itself if left out.

        Raises:
            SolveError: a solve failed; it carries the name of its flow.
        """
        end = end or _end
        x, previous = self.stem(images), None
        yield "stem", self.stem, x
        for index, stage in enumerate(self.stages):
            name = f"stages.{index}"
            if not isinstance(stage, Flow):
                with _naming(name):
                    after = stage(x)
                x, previous = after if isinstance(after, tuple) else (after, None)
            else:
                with _naming(name):
                    x, previous = end(stage, x, previous), None
            yield name, stage, x
        yield "head", self.head, self.head(x)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say of a solve that fails in which stage it was."""
    try:
        yield
    except SolveError as error:
        error.flow = error.flow or name
        raise


def _end(flow: Flow, x: State, previous: State | None) -> State:
    return flow(x, previous)


def whole(model: nn.Module) -> Network:
    """A model as a network: itself, or a network whose one stage it is, with the flows that it has inside.

    >>> whole(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))(torch.zeros(2, 1, 2, 2)).shape
    torch.Size([2, 3])
    """
    if isinstance(model, Network):
        return model
    return in_mode_of(model, Network(nn.Identity(), [model], nn.Identity()))


def builder(build: Callable[P, nn.Module]) -> Callable[P, Network]:
    """Decorate a function that builds a `Network`, so that the network knows its name and arguments and can be saved.

    Arguments are plain data (numbers, text, booleans, None) or solvers. A function that builds another module, such as one made
    by `continuum.convert.continuous`, gives a network whose one stage it is.
    """
    signature = inspect.signature(build)
    in_zoo = build.__module__.startswith("continuum.zoo.")
    name = build.__name__ if in_zoo else f"{build.__module__}.{build.__qualname__}"

    @functools.wraps(build)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> Network:
        network = whole(build(*args, **kwargs))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        network.blueprint = Blueprint(name, dict(bound.arguments))
        return network

    setattr(recorded, NAME, name)
    recorded.__signature__ = signature.replace(return_annotation=Network)  # pyright: ignore[reportAttributeAccessIssue]
    return recorded


NAME = "__builder__"
"""Where a decorated function has its name."""


def name_of(build: object) -> str | None:
    """The name of a function decorated with `builder`, as in its networks' blueprints; None of anything else."""
    return getattr(build, NAME, None)
