"""How the flows of a network move states apart, by the singular values of the Jacobian J of x(0) -> x(T) at given images.

    lipschitz = max over images of sigma_max(J),    lyapunov = mean over images of log(sigma_max(J)) / T

and in what steps they go: |h f(x_i)| / |x_i| for the states, |theta_{i+1} - theta_i| / |theta_i| for the weights.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from continuum.fields import Field
from continuum.flow import Flow
from continuum.models.flows import entering, named_flows, without_noise
from continuum.schemes.base import inside
from continuum.types import Images, State
from continuum.weights import combined

ITERATIONS = 100
"""The most steps of the power iteration, three solves each."""

SETTLED = 1e-5
"""The iteration ends when no image's singular value has grown by more than this part of it."""


@dataclass(frozen=True)
class Dynamics:
    """One flow, by its name in the network, at the states that some images pass through.

    `lipschitz` is the largest factor by which a small difference in x(0) grows until x(depth). `lyapunov` is the finite-time
    exponent, the mean over the images of log(sigma_max) / depth, in 1/layer. For one image lipschitz is exp(depth lyapunov);
    for several it is at least that. Both are lower bounds, as everything that a power iteration finds.

    `steps` are |h f(x_i)| / |x_i| of every step, the mean over the images; for an adaptive solver, of every accepted one.
    `smoothness` is |theta_{i+1} - theta_i| / |theta_i| from each layer to the next; for an `Expansion`, from each of
    `basis.size` evenly spaced depths to the next, which are the nodes of `Hat`. It is empty where the weights do not vary with
    depth, or the layers are not of one kind.
    """

    flow: str
    lipschitz: float
    lyapunov: float
    steps: list[float]
    smoothness: list[float]


@torch.no_grad()
def flow_dynamics(network: nn.Module, images: Images) -> list[Dynamics]:
    """The dynamics of every flow of `network`, in the order in which images pass them.

    Computed in float64 on a copy in evaluation mode, without noise; adaptive flows repeat the steps they accept on these
    images. Where the network hands a flow the state one layer before, that state is held: J is the derivative with respect to
    the state that enters.

    >>> import continuum
    >>> (found, *_) = flow_dynamics(continuum.zoo.resnet(14, width=4), torch.randn(2, 3, 8, 8))
    >>> found.flow, len(found.steps), len(found.smoothness)
    ('stages.0', 2, 1)

    Raises:
        TypeError: an adaptive solver goes through SciPy.
        SolveError: a flow cannot be solved.
    """
    network = copy.deepcopy(network).double().eval().requires_grad_(False)
    network = without_noise(network)
    states = entering(network, images.double())
    return [_dynamics(name, flow, states[flow].x, states[flow].memory) for name, flow in named_flows(network).items()]


def _dynamics(name: str, flow: Flow, x: State, memory: State | None) -> Dynamics:
    # Whatever is stored for a gradient, the steps are these.
    flow = flow.frozen(x) if flow.solver.adaptive else flow.with_solver(flow.solver.direct())
    with _derivable_attention():
        sigma = largest_singular_values(flow, x, memory)
    exponent = float(sigma.log().mean()) / flow.depth
    return Dynamics(name, float(sigma.max()), exponent, _steps(flow, x, memory), _smoothness(flow.field))


@contextmanager
def _derivable_attention() -> Iterator[None]:
    """Inside the block attention is computed by operators that torch derives forwards too, which its fused ones are not."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def largest_singular_values(flow: Flow, x: State, memory: State | None = None) -> Tensor:
    """sigma_max of the Jacobian of `flow` at each image of x, (batch,), by power iteration on J^T J without a matrix.

    The flow is in evaluation mode, so that images do not see each other: one vector an image makes one iteration for all.
    """
    generator = torch.Generator().manual_seed(0)
    v = _unit(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x))
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        end = flow(start, memory)
    sigma = x.new_zeros(len(x))
    for _ in range(ITERATIONS):
        stretched = _stretched(flow, x, v, memory)
        before, sigma = sigma, _norms(stretched)
        if bool(((sigma - before).abs() <= SETTLED * sigma).all()):
            break
        v = _unit(torch.autograd.grad(end, start, stretched, retain_graph=True)[0])
    return sigma


@torch.no_grad()
def _stretched(flow: Flow, x: State, v: State, memory: State | None) -> State:
    """J v, carried along with the solve. torch.func.jvp is the same, but loads the compiler first, which takes seconds."""
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(flow(forward_ad.make_dual(x, v), memory)).tangent
        return torch.zeros_like(x) if tangent is None else tangent


def _norms(x: State) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _unit(x: State) -> State:
    """x with norm one in each image; where it is zero, it stays so."""
    norms = _norms(x).clamp_min(torch.finfo(x.dtype).tiny)
    return x / norms.reshape(-1, *[1] * (x.dim() - 1))


def _steps(flow: Flow, x: State, memory: State | None) -> list[float]:
    """|h f| / |x| of each step: of those known beforehand, or else of those that the flow has just taken."""
    steps = flow.solver.steps(0.0, flow.depth)
    if steps is not None:
        states = flow.states(x, memory)
    else:
        assert flow.cost is not None
        grid = flow.cost.grid
        steps, states = [(a, b - a) for a, b in pairwise(grid)], flow.trajectory(x, grid)
    sizes: list[float] = []
    for (t, h), state in zip(steps, states, strict=False):
        slope = flow.field(inside(flow.field.knots, t, h, 0, state.dtype), state)
        sizes.append(float((abs(h) * _norms(slope) / _norms(state)).mean()))
    return sizes


def _smoothness(field: Field) -> list[float]:
    """|theta_{i+1} - theta_i| / |theta_i| from layer to layer or between evenly spaced depths; none without such depths."""
    try:
        found = field.expanded()
    except ValueError:  # layers of several kinds
        return []
    if found is None or not found[1] or found[0].size < 2:
        return []
    basis, weights = found
    depths = [i * basis.depth / (basis.size - 1) for i in range(basis.size)]  # one in each part of a Box, too
    thetas = [torch.cat([combined(weight, basis(t)).flatten() for weight in weights]) for t in depths]
    return [float((after - before).norm() / before.norm()) for before, after in pairwise(thetas)]
