"""What training adds to the loss beside the error: depth-smooth weights, short and even paths, ends that vary."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.flow import Flow
from continuum.integral import Integrand
from continuum.models import Network
from continuum.types import State, Time
from continuum.weights import depth_smoothness


class DepthSmoothness:
    """weight times the sum of `depth_smoothness` over the flows whose weights are functions of depth (arXiv 1810.11741).

    With it, and not without, the best weights of ever more layers converge to those of an ODE. It takes the place of weight
    decay in those flows.

    Args:
        weight: factor in the loss, at least 0.
        tau: factor of the size of the first weights, |theta(0)|^2, at least 0.

    Raises:
        ValueError: a negative weight or tau; when called, layers of several kinds.
        TypeError: when called, a network without such flows.
    """

    def __init__(self, weight: float = 1e-4, tau: float = 1.0) -> None:
        if not (weight >= 0 and tau >= 0):
            raise ValueError(f"weight and tau are not negative; got {weight} and {tau}")
        self.weight = weight
        self.tau = tau

    def __call__(self, network: Network) -> Tensor:
        flows = flows_in_depth(network)
        return self.weight * torch.stack([depth_smoothness(field, self.tau) for field in flows.values()]).sum()


def flows_in_depth(network: Network) -> dict[int, Field]:
    """The fields whose weights are functions of depth, by the place of their flow among the flows; TypeError without any."""
    fields = {i: flow.field for i, flow in enumerate(network.flows) if flow.field.expanded() is not None}
    if not fields:
        raise TypeError(
            "smoothness in depth needs weights that vary with depth, and no flow of this network has PiecewiseConstant layers "
            "or an Expansion: leave it out"
        )
    return fields


class Transport:
    """RNODE's energies of the paths, int (kinetic |f|^2 + jacobian |e^T df/dx|^2) / size dt (arXiv 2002.02798).

    `size` is the number of entries of a state, and e a vector of signs for each image, drawn anew for every pass, so that
    |e^T df/dx|^2 is the squared Frobenius norm of the Jacobian in the mean. Paths of little energy are nearly straight, with
    nearly constant speed, and take an adaptive solver few steps. The Jacobian costs a backward pass an evaluation, and
    derivatives that torch.compile does not trace; 0 leaves it out.

    Args:
        kinetic: factor of |f|^2, at least 0.
        jacobian: factor of |e^T df/dx|^2, at least 0.

    Raises:
        ValueError: a negative weight, or two zeros.
    """

    def __init__(self, kinetic: float = 0.01, jacobian: float = 0.01) -> None:
        if not (kinetic >= 0 and jacobian >= 0 and kinetic + jacobian > 0):
            raise ValueError(f"kinetic and jacobian are not negative and not both zero; got {kinetic} and {jacobian}")
        self.kinetic = kinetic
        self.jacobian = jacobian

    def check(self, network: Network) -> None:
        """Raise TypeError if a flow of `network` cannot carry the energies along, or if there is no flow."""
        if not network.flows:
            raise TypeError("transport is an energy of flows, and this network has none: leave it out")
        for flow in network.flows:
            flow.with_integral(self.integrand())

    def integrand(self) -> Integrand:
        """The energy at (t, x, dx/dt), one number an image; e is drawn from torch's generator when it is first needed."""
        signs: dict[torch.Size, Tensor] = {}  # a solve that goes back over its steps meets the same e

        def energy(t: Time, x: State, slope: State) -> Tensor:
            total = self.kinetic * _mean_square(slope)
            if not self.jacobian:
                return total
            if x.shape not in signs:
                signs[x.shape] = torch.empty_like(x).bernoulli_(0.5).mul_(2).sub_(1)
            if not slope.requires_grad:  # a field that is constant in x and has no parameters
                return total
            e = signs[x.shape].to(slope.dtype)
            (pulled,) = torch.autograd.grad(slope, x, e, create_graph=True, allow_unused=True, materialize_grads=True)
            return total + self.jacobian * _mean_square(pulled)

        return energy


def _mean_square(x: Tensor) -> Tensor:
    """|x|^2 / size of every image."""
    return x.flatten(1).square().mean(1)


def check_random_ends(network: Network, width: float) -> None:
    """Raise TypeError or ValueError if the flows of `network` cannot end up to `width` from their depth."""
    for flow in network.flows:
        if not flow.solver.adaptive:
            raise TypeError(
                f"end_time={width:g} moves the ends of flows, and the steps of {flow.solver} end on their grid: take an "
                "adaptive solver such as dopri5, or leave end_time at 0"
            )
        if isinstance(flow.end, Tensor):
            raise TypeError(f"end_time={width:g} draws the depth of a flow, and here it is learnt: leave end_time at 0")
        if not 0 <= width < flow.depth:
            raise ValueError(
                f"end_time moves the end of a flow by up to that many layers and is less than its depth, {flow.depth:g}; got "
                f"{width:g}"
            )


@contextmanager
def random_ends(flows: list[Flow], width: float, generator: torch.Generator) -> Iterator[None]:
    """Inside the block each flow ends at a depth of its own, uniform in [depth - width, depth + width] (arXiv 2006.10711)."""
    ends = [(flow, flow.depth) for flow in flows]
    shifts = (2 * torch.rand(len(ends), generator=generator, dtype=torch.float64) - 1).tolist()
    try:
        for (flow, end), shift in zip(ends, shifts, strict=True):
            flow.end = end + width * shift
        yield
    finally:
        for flow, end in ends:
            flow.end = end
