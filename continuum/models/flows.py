"""What can be done with the flows of a model, any `nn.Module` that has some: another solver, more layers, no noise.

Modules that hold what changes are copied; all others, and with them the weights, are shared unless a function says otherwise.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from continuum.bases import named_basis
from continuum.fields.base import shallow
from continuum.flow import Flow
from continuum.models.parts import NoisyTransition
from continuum.noise.base import has_noise, noise_only
from continuum.solvers import Solver
from continuum.solvers.base import evaluating
from continuum.solvers.compiled import compile_whole
from continuum.types import State

M = TypeVar("M", bound=nn.Module)


def named_flows(model: nn.Module) -> dict[str, Flow]:
    """The flows of a model by their names in it, in its order."""
    found: dict[str, Flow] = {}
    _find(model, "", set(), found)
    return found


def _find(module: nn.Module, name: str, seen: set[nn.Module], found: dict[str, Flow]) -> None:
    """Note the flows in a module; what is inside them is most of a network, and a training step asks for its flows."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, Flow):
        found[name] = module
        return
    for place, child in module.named_children():
        _find(child, f"{name}.{place}" if name else place, seen, found)


def flows(model: nn.Module) -> list[Flow]:
    """The flows of a model, in its order."""
    return list(named_flows(model).values())


def replaced(model: M, change: Callable[[nn.Module], nn.Module | None]) -> M:
    """The model with change(part) in the place of each part, the outermost first, for which that is not None."""
    made: dict[nn.Module, nn.Module] = {}

    def walk(module: nn.Module) -> nn.Module:
        if module not in made:
            new = change(module)
            children = {name: child and walk(child) for name, child in module._modules.items()} if new is None else {}
            if new is None and all(child is module._modules[name] for name, child in children.items()):
                new = module
            elif new is None:
                new = shallow(module)
                new._modules = children
            made[module] = new
        return made[module]

    return walk(model)  # pyright: ignore[reportReturnType]


def with_flows(model: M, other: Callable[[Flow], Flow]) -> M:
    """The model with another flow in the place of each."""
    return replaced(model, lambda module: other(module) if isinstance(module, Flow) else None)


def solvers_of(model: nn.Module) -> str:
    """The solvers of the flows as text, each once."""
    return " and ".join(dict.fromkeys(str(flow.solver) for flow in flows(model))) or "no solver"


def solver_of(model: nn.Module) -> Solver:
    """The solver of all flows of a model.

    Raises:
        ValueError: the flows differ in theirs, or there is none.
    """
    solvers = {flow.solver for flow in flows(model)}
    if len(solvers) != 1:
        raise ValueError(f"the flows of this network have {len(solvers)} different solvers")
    return solvers.pop()


def with_solver(model: M, solver: Solver | str) -> M:
    """The model with the same weights, and all its flows under `solver`.

    Raises:
        TypeError: there is no flow, or the solver cannot solve one.
    """
    if not flows(model):
        raise TypeError("this network has no flow, so there is nothing to choose a solver for")
    return with_flows(model, lambda flow: flow.with_solver(solver))


def changed(model: M, other: Callable[[Flow], Flow], what: str) -> M:
    """A deep copy of the model with another flow in the place of each; `what` is done to them."""
    model = copy.deepcopy(model)
    if not flows(model):
        raise TypeError(f"this network has no flow to {what}")
    for name, flow in named_flows(model).items():
        try:
            model.set_submodule(name, other(flow))
        except (TypeError, ValueError) as error:
            raise type(error)(f"flow {name}: {error}") from None
    return model


def refine(model: M, k: int) -> M:
    """A deeper copy for multi-level training (arXiv 1710.10348): each flow with k steps in the place of one.

    See `Flow.refine`. To the order of its scheme the refined model computes the same, and goes on learning with more layers,
    or smaller steps. Nothing is shared: training one leaves the other alone.

    Raises:
        ValueError: k is no integer of at least 2, or a flow's steps cannot be refined.
        TypeError: there is no flow.
    """
    return changed(model, lambda flow: flow.refine(k), "refine")


def project(model: M, name: str, size: int) -> M:
    """A copy whose weights are expanded on the basis `name` with `size` functions over the depth of each flow.

    The nearest such weights, without data; see `PiecewiseConstant.project` and `Expansion.project`. Nothing is shared.

    Raises:
        TypeError: a field that is neither, or BatchNorm on a basis other than "hat".
        ValueError: no such basis, or layers that one field cannot replace.
    """

    def projected(flow: Flow) -> Flow:
        if has_noise(flow):
            raise TypeError(
                "layers with noise have a law each, which no basis can hold: put the noise around an Expansion instead"
            )
        return flow.with_field(flow.field.project(named_basis(name, size, flow.depth)))

    return changed(model, projected, "project")


def drift(model: M) -> M:
    """The deterministic model with the same weights: every flow and transition without its noise, as in evaluation mode.

    Its flows are open to every solver. In training mode too it draws nothing. The modules are shared: eval() and train() of
    one are those of the other.

    Raises:
        TypeError: this model has no noise, or has some outside flows and `NoisyTransition`s.
    """
    check_noise(model)
    model = replaced(model, lambda module: module.drift() if isinstance(module, Flow | NoisyTransition) else None)
    if has_noise(model):
        raise TypeError("a part of this network has noise of its own: only flows and NoisyTransitions lose theirs")
    return model


def without_noise(model: M) -> M:
    """The model itself, or its drift where it has noise."""
    return drift(model) if has_noise(model) else model


@torch.no_grad()
def sample(model: nn.Module, x: Any, n: int) -> Tensor:
    """n sampled outputs, of shape (n, ...): the noise acts, everything else is as in evaluation mode.

    The spread of their probabilities over n says how sure a network is. Drawn from torch's global generator.

    Raises:
        TypeError: this model has no noise.
        ValueError: n is not positive.
    """
    check_noise(model)
    if n < 1:
        raise ValueError(f"n is the number of samples, at least 1, not {n}")
    with evaluating(model), noise_only(model):
        return torch.stack([model(x) for _ in range(n)])


def check_noise(model: nn.Module) -> None:
    """Raise TypeError unless some field of the model has noise."""
    if not has_noise(model):
        raise TypeError("this network has no noise: no field in it is a StochasticField")


@torch.no_grad()
def frozen(model: M, *inputs: Any, **named: Any) -> M:
    """The model with the same weights, whose flows repeat the steps that their adaptive solvers accept on `inputs`.

    See `Flow.frozen`. Flows with fixed steps stay as they are.

    Raises:
        TypeError: no flow has an adaptive solver, or one goes through SciPy.
    """
    if not any(flow.solver.adaptive for flow in flows(model)):
        raise TypeError("no flow of this network has an adaptive solver whose steps could be frozen")
    states = entering(model, *inputs, **named)
    return with_flows(model, lambda flow: flow.frozen(states[flow].x, states[flow].context) if flow.solver.adaptive else flow)


class Entering(NamedTuple):
    """The state that reaches a flow, the one before it where it is known, and its further arguments."""

    x: State
    memory: State | None = None
    context: Sequence[Any] = ()


@torch.no_grad()
def entering(model: nn.Module, *inputs: Any, **named: Any) -> dict[Flow, Entering]:
    """What reaches each flow when `inputs` pass in evaluation mode."""
    states: dict[Flow, Entering] = {}

    def look(flow: Flow, given: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        states[flow] = Entering(*given, **by_name)

    hooks = [flow.register_forward_pre_hook(look, with_kwargs=True) for flow in flows(model)]  # pyright: ignore[reportArgumentType]
    try:
        with evaluating(model):
            model(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    return states


def compile_parts(model: nn.Module) -> None:
    """Compile a model in place: its class, state dict and results (to rounding) stay.

    One graph if all flows have fixed steps that can be traced, otherwise part by part; see `Flow.compile`.
    """
    if isinstance(model, Flow):
        model.compile()
    elif all(flow.solver.one_graph for flow in flows(model)):
        compile_whole(model)
    else:
        for part in model.children():
            compile_parts(part)
