"""What a tolerance costs, and what it buys: |logits - exact| / |exact| beside the evaluations that it took."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from continuum.models.flows import flows, with_solver, without_noise
from continuum.solvers import Adaptive, SolveError
from continuum.solvers.base import evaluating
from continuum.types import Images, Logits

REFERENCE = "dopri5"
TIGHTER = 100.0
"""How many times tighter the reference is than the tightest tolerance asked for, as far as the precision allows."""


@dataclass(frozen=True)
class ToleranceRow:
    """The network under one adaptive method with rtol = atol = `tolerance`.

    Evaluations and steps are sums over the flows, for the images as one batch. `error` is the largest relative distance of an
    image's logits from those at a much tighter tolerance, NaN where those cannot be had; `accuracy` is a share in [0, 1]. A
    method that failed has its `failure` and no numbers (NaN).
    """

    method: str
    tolerance: float
    evaluations: float
    accepted: float
    rejected: float
    error: float
    accuracy: float
    failure: str | None = None


@torch.no_grad()
def tolerance_sweep(
    network: nn.Module,
    images: Images,
    labels: Tensor,
    methods: Sequence[str] = ("dopri5", "bosh3"),
    tolerances: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
) -> list[ToleranceRow]:
    """The same weights under each of `methods` at each of `tolerances`, in evaluation mode and in the network's precision.

    A network with noise is that of its drift. The reference is dopri5 at a hundredth of the tightest tolerance, but at no
    less than ten roundings of the images' type.

    >>> import continuum
    >>> network, images = continuum.zoo.odenet(width=4), torch.randn(2, 1, 28, 28)
    >>> loose, tight = tolerance_sweep(network, images, torch.tensor([3, 7]), ["dopri5"], [1e-1, 1e-3])
    >>> loose.evaluations < tight.evaluations and loose.error > tight.error
    True

    Raises:
        ValueError: not one label an image, or no images; a method or a tolerance that `Adaptive` refuses.
        TypeError: the network has no flow, or one that no adaptive solver can solve.
    """
    if not len(images) or labels.shape != (len(images),):
        raise ValueError(f"each image needs one label; got {len(images)} images and labels of shape {tuple(labels.shape)}")
    network = without_noise(network)
    solvers = [Adaptive(method, tolerance, tolerance) for method in methods for tolerance in tolerances]
    if not solvers:
        return []
    tightest = max(min(tolerances) / TIGHTER, 10 * torch.finfo(images.dtype).eps)
    with evaluating(network):
        exact = _reference(network, images, tightest)
        return [_row(with_solver(network, solver), solver, images, labels, exact) for solver in solvers]


def _reference(network: nn.Module, images: Images, tolerance: float) -> Logits | None:
    try:
        return with_solver(network, Adaptive(REFERENCE, tolerance, tolerance))(images)
    except SolveError:
        return None


def _row(network: nn.Module, solver: Adaptive, images: Images, labels: Tensor, exact: Logits | None) -> ToleranceRow:
    try:
        logits = network(images)
    except SolveError as error:
        return ToleranceRow(solver.method, solver.rtol, *[math.nan] * 5, failure=str(error))
    costs = [flow.cost for flow in flows(network) if flow.cost is not None]
    return ToleranceRow(
        solver.method,
        solver.rtol,
        evaluations=float(sum(cost.evaluations for cost in costs)),
        accepted=float(sum(cost.accepted for cost in costs)),
        rejected=float(sum(cost.rejected for cost in costs)),
        error=math.nan if exact is None else float(((logits - exact).norm(dim=1) / exact.norm(dim=1)).max()),
        accuracy=float((logits.argmax(1) == labels).double().mean()),
    )
