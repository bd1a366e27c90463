"""A network: head(stages(stem(images))), where a stage is a flow or a transition between two of them."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeAlias

import torch
from torch import Tensor, nn

from continuum.bases import named_basis
from continuum.fields.base import in_mode_of
from continuum.flow import Flow
from continuum.integral import Integrand
from continuum.models.parts import NoisyTransition
from continuum.noise.base import has_noise, noise_only
from continuum.solvers import SolveError, Solver
from continuum.solvers.base import evaluating, restored_on_error
from continuum.solvers.compiled import compile_whole
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
        return list(self.named_flows.values())

    @property
    def named_flows(self) -> dict[str, Flow]:
        """The flows by their names in the network."""
        return {f"stages.{index}": stage for index, stage in enumerate(self.stages) if isinstance(stage, Flow)}

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
        """The network with the same modules, hence the same weights, and all its flows under `solver`.

        Raises:
            TypeError: there is no flow, or the solver cannot solve one.
        """
        if not self.flows:
            raise TypeError("this network has no flow, so there is nothing to choose a solver for")
        return self._with_flows(lambda flow: flow.with_solver(solver))

    def _with_flows(self, other: Callable[[Flow], Flow]) -> "Network":
        """The network with the same modules, but another flow in the place of each."""
        return self._with_stages([other(stage) if isinstance(stage, Flow) else stage for stage in self.stages])

    def _with_stages(self, stages: Sequence[nn.Module]) -> "Network":
        network = in_mode_of(self, Network(self.stem, stages, self.head))
        network.blueprint = self.blueprint
        return network

    def refine(self, k: int) -> "Network":
        """A deeper copy for multi-level training (arXiv 1710.10348): each flow with k steps in the place of one.

        See `Flow.refine`. To the order of its scheme the refined network computes the same, and goes on learning with more
        layers, or smaller steps. Nothing is shared: training one leaves the other alone.

        Raises:
            ValueError: k is no integer of at least 2, or a flow's steps cannot be refined.
            TypeError: there is no flow.
        """
        return self._changed(lambda flow: flow.refine(k), ("refine", k))

    def project(self, name: str, size: int) -> "Network":
        """A copy whose weights are expanded on the basis `name` with `size` functions over the depth of each flow.

        The nearest such weights, without data; see `PiecewiseConstant.project` and `Expansion.project`. Nothing is shared.

        Raises:
            TypeError: a field that is neither, or BatchNorm on a basis other than "hat".
            ValueError: no such basis, or layers that one field cannot replace.
        """
        return self._changed(lambda flow: _projected(flow, name, size), ("project", name, size))

    def _changed(self, other: Callable[[Flow], Flow], change: tuple[object, ...]) -> "Network":
        """A deep copy with another flow in the place of each, whose blueprint records the change."""
        if not self.flows:
            raise TypeError(f"this network has no flow to {change[0]}")
        network = copy.deepcopy(self)
        for name, flow in network.named_flows.items():
            try:
                network.set_submodule(name, other(flow))
            except (TypeError, ValueError) as error:
                raise type(error)(f"flow {name}: {error}") from None
        if self.blueprint is not None:
            network.blueprint = replace(self.blueprint, changes=(*self.blueprint.changes, change))
        return network

    def drift(self) -> "Network":
        """The deterministic network with the same weights: every flow and transition without its noise, as in evaluation mode.

        Its flows are open to every solver. In training mode too it draws nothing. The modules are shared: eval() and train()
        of one are those of the other.

        Raises:
            TypeError: this network has no noise, or has some outside flows and `NoisyTransition`s.
        """
        self._check_noise()
        network = self._with_stages([_without_noise(stage) for stage in self.stages])
        if self.blueprint is not None:
            network.blueprint = replace(self.blueprint, changes=(*self.blueprint.changes, ("drift",)))
        if network.stochastic:
            raise TypeError("a part of this network has noise of its own: only flows and NoisyTransitions lose theirs")
        return network

    @torch.no_grad()
    def sample(self, x: Images, n: int) -> Tensor:
        """n sampled predictions, logits of shape (n, batch, classes): the noise acts, everything else is as in evaluation mode.

        The spread of their probabilities over n says how sure the network is. Drawn from torch's global generator.

        Raises:
            TypeError: this network has no noise.
            ValueError: n is not positive.
        """
        self._check_noise()
        if n < 1:
            raise ValueError(f"n is the number of samples, at least 1, not {n}")
        with evaluating(self), noise_only(self):
            return torch.stack([self(x) for _ in range(n)])

    @property
    def stochastic(self) -> bool:
        """Whether a field of this network has noise."""
        return has_noise(self)

    def _check_noise(self) -> None:
        if not self.stochastic:
            raise TypeError("this network has no noise: no field in it is a StochasticField")

    @torch.no_grad()
    def frozen(self, images: Images) -> "Network":
        """The network with the same weights, whose flows repeat the steps that their adaptive solvers accept on `images`.

        See `Flow.frozen`. Flows with fixed steps stay as they are.

        Raises:
            TypeError: no flow has an adaptive solver, or one goes through SciPy.
        """
        if not any(flow.solver.adaptive for flow in self.flows):
            raise TypeError("no flow of this network has an adaptive solver whose steps could be frozen")
        states = self.entering(images)
        return self._with_flows(lambda flow: flow.frozen(states[flow][0]) if flow.solver.adaptive else flow)

    @torch.no_grad()
    def entering(self, images: Images) -> dict[Flow, tuple[State, State | None]]:
        """The state that reaches each flow when `images` pass in evaluation mode, and the one before it where it is known."""
        states: dict[Flow, tuple[State, State | None]] = {}

        def end(flow: Flow, x: State, previous: State | None) -> State:
            states[flow] = x, previous
            return flow(x, previous)

        with evaluating(self):
            self._through(images, end)
        return states

    def compile(self) -> None:
        """Compile this network in place: its class, state dict and results (to rounding) stay.

        One graph if all flows have fixed steps that can be traced, otherwise part by part; see `Flow.compile`. Networks made
        from this one, by `with_solver` or `refine`, are compiled anew.
        """
        if all(flow.solver.one_graph for flow in self.flows):
            compile_whole(self)
        else:
            for part in (self.stem, *self.stages, self.head):
                part.compile() if isinstance(part, Flow) else compile_whole(part)

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
                after = stage(x)
                x, previous = after if isinstance(after, tuple) else (after, None)
            else:
                try:
                    x, previous = end(stage, x, previous), None
                except SolveError as error:
                    error.flow = name
                    raise
            yield name, stage, x
        yield "head", self.head, self.head(x)


def _end(flow: Flow, x: State, previous: State | None) -> State:
    return flow(x, previous)


def _without_noise(stage: nn.Module) -> nn.Module:
    return stage.drift() if isinstance(stage, Flow | NoisyTransition) else stage


def _projected(flow: Flow, name: str, size: int) -> Flow:
    if has_noise(flow):
        raise TypeError("layers with noise have a law each, which no basis can hold: put the noise around an Expansion instead")
    return in_mode_of(flow, Flow(flow.field.project(named_basis(name, size, flow.depth)), flow.solver, flow.depth))


def builder(build: Callable[P, Network]) -> Callable[P, Network]:
    """Decorate a function that builds a `Network`, so that the network knows its name and arguments and can be saved.

    Arguments are plain data (numbers, text, booleans, None) or solvers.
    """
    signature = inspect.signature(build)
    in_zoo = build.__module__.startswith("continuum.zoo.")
    name = build.__name__ if in_zoo else f"{build.__module__}.{build.__qualname__}"

    @functools.wraps(build)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> Network:
        network = build(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        network.blueprint = Blueprint(name, dict(bound.arguments))
        return network

    setattr(recorded, NAME, name)
    return recorded


NAME = "__builder__"
"""Where a decorated function has its name."""


def name_of(build: object) -> str | None:
    """The name of a function decorated with `builder`, as in its networks' blueprints; None of anything else."""
    return getattr(build, NAME, None)
