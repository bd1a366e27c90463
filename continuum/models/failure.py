"""Where a network's state stops being finite: fixed steps do not look while they run, so this runs them again and does."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.flow import Flow
from continuum.models.network import Network
from continuum.noise.base import noise_of, terms
from continuum.schemes import StochasticScheme
from continuum.schemes.base import inside, scheme_of
from continuum.solvers import SolveError
from continuum.solvers.base import rows_not_finite, statistics_untouched
from continuum.types import Images, State

ADVICE = "Check these inputs and the weights; a lower learning rate, smaller steps or normalised inputs may help"


def cause_of(network: Network, images: Images, loss: Callable[[], Tensor]) -> SolveError | None:
    """Why a training step is not finite, by doing it again: a state, a statistic or a gradient; None if it is finite.

    BatchNorm's buffers move as they do in training.
    """
    try:
        total = loss()
    except SolveError as error:
        return error
    if not torch.isfinite(total):
        return find_failure(network, images)
    if name := _broken(network.named_buffers()):
        return not_finite(f"the statistics {name} are")
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    name = _broken(zip(weights, gradients, strict=True))
    return not_finite(f"the gradient of {name} is") if name else None


def _broken(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The name of the first tensor that is not finite."""
    return next((name for name, tensor in tensors if tensor is not None and not torch.isfinite(tensor).all()), None)


@torch.no_grad()
def find_failure(network: Network, images: Images) -> SolveError:
    """The error that says where, on these images, the state of `network` first is not finite.

    Returned, not raised; BatchNorm's buffers stay as they are.
    """
    with statistics_untouched(network):
        try:
            for name, stage, x in network.walk(images, _end_looking):
                if not isinstance(stage, Flow) and (rows := rows_not_finite(x)):
                    output = f"output of the transition {name}" if name.startswith("stages.") else f"{name}'s output"
                    return _error(f"the {output} is not finite", rows=rows)
        except SolveError as error:
            return error
        return _error("all logits are finite, but the loss is not")


def not_finite(what: str) -> SolveError:
    """The error of a network whose `what` came out as no numbers."""
    return _error(f"{what} not finite")


def _end_looking(flow: Flow, x: State, previous: State | None) -> State:
    """The end state of a flow, looking at the state after each of its fixed steps."""
    scheme, steps = scheme_of(flow.solver), flow.solver.steps(0.0, flow.depth)
    if scheme is None or steps is None:  # these look for themselves; other ranks do not look now, so they would not answer
        return flow.with_solver(flow.solver.alone())(x)
    states = flow.states(x, previous)
    for count, state in enumerate(states[1:], 1):
        if rows := rows_not_finite(state):
            t, h = steps[count - 1]
            reason = "the state is not finite after the step"
            if isinstance(scheme, StochasticScheme):
                reason = _term_at_fault(flow.field, t, states[count - 1], h) or reason
            error = _error(reason, t, h, rows)
            error.evaluations = scheme.evaluations(flow.field, steps[:count])
            raise error
    return states[-1]


def _term_at_fault(field: Field, t: float, x: State, h: float) -> str | None:
    """Whether it is the drift at the start of a step that is not finite, or the diffusion."""
    t = inside(field.knots, t, h, 0, x.dtype)
    layer = field.at(t)
    noisy = noise_of(layer)
    drift, diffusion = terms(layer, t, x) if noisy is not None and noisy.training else (layer(t, x), None)
    if rows_not_finite(drift):
        return "the drift is not finite"
    return "the diffusion is not finite" if diffusion is not None and rows_not_finite(diffusion) else None


def _error(reason: str, depth: float = 0.0, step: float = 0.0, rows: list[int] | None = None) -> SolveError:
    return SolveError(reason, depth=depth, step=step, evaluations=0, rows=rows or (), advice=ADVICE)
