"""What to follow and to adapt in depth while Lightning runs: smoothness, frictions, and the step of the solver."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from continuum.analysis.momentum import frictions
from continuum.models import Network
from continuum.schemes import RK4, Midpoint, Scheme
from continuum.schemes.base import scheme_of
from continuum.solvers import Adaptive, FixedStep, Solver, parse
from continuum.solvers.base import Step, evaluating
from continuum.solvers.text import describe
from continuum.training.callbacks import network_of
from continuum.training.regularisers import flows_in_depth
from continuum.weights import depth_smoothness

ROUNDING = 1e-6
"""Tolerances below this are those of float32's rounding."""


class LogSmoothness(Callback):
    """Logs `depth_smoothness` of every flow whose weights vary with depth: at the end of each epoch, or every so many steps.

    For modules that have a `network`, such as `Classifier`. The names are flow0/smoothness, flow1/smoothness, ...

    Args:
        every: steps between two values; None for once an epoch.
        tau: factor of the size of the first weights, |theta(0)|^2, at least 0.

    Raises:
        ValueError: a number of steps that is not positive; on setup, layers of several kinds.
        TypeError: on setup, a network without such flows.
    """

    def __init__(self, every: int | None = None, tau: float = 1.0) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every is a number of steps from 1 on, or None for once an epoch; got {every}")
        self.every = every
        self.tau = tau

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._measured(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self.every is not None and trainer.global_step % self.every == 0:
            pl_module.log_dict(self._measured(pl_module), on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every is None:
            pl_module.log_dict(self._measured(pl_module))

    @torch.no_grad()
    def _measured(self, module: pl.LightningModule) -> dict[str, Tensor]:
        fields = flows_in_depth(network_of(module, self))
        return {f"flow{index}/smoothness": depth_smoothness(field, self.tau) for index, field in fields.items()}


class KeepFriction(Callback):
    """Keeps the k of every layer of x_{n+1} = (1 - k_n) x_n + k_n x_{n-1} + f_n(x_n) at the start and after each epoch.

    A checkpoint carries the history as plain lists: k[i][j] is that of layer layers[j] of flow flows[j] after epochs[i]
    epochs (arXiv 1710.10121). Where the layers themselves change, as by `Refine`, the history starts anew.

    For modules that have a `network`, such as `Classifier`.

    Raises:
        TypeError: on setup, a network without k.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.flows: list[str] = []
        self.layers: list[int] = []
        self.epochs: list[int] = []
        self.k: list[list[float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not frictions(network_of(pl_module, self)):
            raise TypeError("KeepFriction follows the k of Momentum layers, and this network has none: lm_resnet has them")
        if trainer.global_step == 0:  # a new training; if it resumes, it is told next what was kept
            self._forget()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.epochs:
            self._keep(network_of(pl_module, self), trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:  # before validation, which may write a checkpoint
            self._keep(network_of(pl_module, self), trainer.current_epoch + 1)

    def _keep(self, network: Network, epoch: int) -> None:
        found = frictions(network)
        flows, layers = [friction.flow for friction in found], [friction.layer for friction in found]
        if (flows, layers) != (self.flows, self.layers):
            self._forget()
            self.flows, self.layers = flows, layers
        self.epochs.append(epoch)
        self.k.append([friction.k for friction in found])

    def state_dict(self) -> dict[str, Any]:
        rows = [list(row) for row in self.k]
        return {"flows": list(self.flows), "layers": list(self.layers), "epochs": list(self.epochs), "k": rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.flows, self.layers = list(state_dict["flows"]), list(state_dict["layers"])
        self.epochs, self.k = list(state_dict["epochs"]), [list(row) for row in state_dict["k"]]


class AdaptStep(Callback):
    """Finds the largest step at which the network is still the same function under a finer solver (arXiv 2007.15386).

    Every so many steps it compares the accuracy on the current batch, in evaluation mode, with that of a more precise solver.
    Where they differ by more than `tolerance`, the solver is part of the model, and its step is halved: h/2, or half the
    tolerances of an adaptive solver. Otherwise 1.1 h is tried, and kept if they still agree. h stays on the grid 1/m: h/2
    doubles m, and 1.1 h is the first m at or above m / 1.1, at least one smaller. h is 1 at most, and 1/`finest` at least;
    tolerances stay between 1e-6 and 1.

    The more precise solver is the midpoint rule for Euler's method and RK4 for those of order 2, with an error about 50 times
    smaller; for adaptive solvers dopri5 or the pair itself, with tolerances so small that it takes more evaluations.

    Checkpoints say which solver it is now, and resuming from one goes on with it. Several processes decide together, by their
    mean accuracies. A network that was compiled goes on uncompiled after a change.

    For modules that have a `network`, such as `Classifier`, on batches of images and labels.

    Args:
        every: steps between two comparisons.
        tolerance: difference of accuracies up to which the functions are the same, in (0, 1).
        finest: m of the smallest step h = 1/m.

    >>> AdaptStep(every=100).tolerance
    0.1

    Raises:
        ValueError: `every` or `finest` below 1, a tolerance outside (0, 1); on setup, flows with different solvers, or steps
            that are larger than 1 or not even, or under them a depth that is no integer.
        TypeError: on setup, a solver that it cannot adapt.
    """

    def __init__(self, every: int = 50, tolerance: float = 0.1, finest: int = 500) -> None:
        if every < 1 or finest < 1 or not 0 < tolerance < 1:
            raise ValueError(
                f"every and finest are at least 1, and tolerance is a difference of accuracies in (0, 1); got {every}, "
                f"{finest} and {tolerance}"
            )
        self.every = every
        self.tolerance = tolerance
        self.finest = finest
        self.solver: str | None = None
        self.checked = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        network = network_of(pl_module, self)
        check_adaptable(network.solver, [flow.depth for flow in network.flows])
        if trainer.global_step == 0:  # a new training; if it resumes, it is told next what it was
            self.solver, self.checked = None, 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = network_of(pl_module, self)
        if self.solver is not None and parse(self.solver) != network.solver:
            pl_module.network = network.with_solver(self.solver)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every or step == self.checked:  # several batches are one step where gradients are accumulated
            return
        self.checked = step
        network = network_of(pl_module, self)
        solver = self._next(network, trainer, *batch)
        if solver != network.solver:
            pl_module.network = network.with_solver(solver)
        self.solver = describe(solver)

    @torch.no_grad()
    def _next(self, network: Network, trainer: pl.Trainer, images: Tensor, labels: Tensor) -> Solver:
        """The solver to go on with."""

        def agrees(solver: Solver) -> bool:
            coarse = network.with_solver(solver)
            rough, true = accuracy(coarse, images, labels), precise_accuracy(coarse, images, labels)
            means = trainer.strategy.reduce(torch.tensor([rough, true], device=images.device), reduce_op="mean")
            assert isinstance(means, Tensor)
            return float((means[0] - means[1]).abs()) <= self.tolerance

        solver = network.solver
        with evaluating(network):
            if not agrees(solver):
                return finer(solver, self.finest)
            larger = coarser(solver)
            return larger if larger != solver and agrees(larger) else solver

    def state_dict(self) -> dict[str, Any]:
        return {"solver": self.solver, "checked": self.checked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.solver, self.checked = state_dict["solver"], state_dict["checked"]


def check_adaptable(solver: Solver, depths: Sequence[float]) -> None:
    """Raise TypeError or ValueError unless `AdaptStep` knows a more precise solver, and every 1/m divides the depths."""
    if solver.adaptive and solver.without_noise() == solver:
        return
    scheme = scheme_of(solver)
    if scheme is None or scheme.tableau is None or scheme.order > 2:
        raise TypeError(
            f"AdaptStep adapts the steps of euler, midpoint and heun, and the tolerances of adaptive solvers, not {solver}"
        )
    try:
        even = solver.direct() == FixedStep(scheme, 1 / _per_layer(solver))
    except ValueError:
        even = False
    if not even:
        raise ValueError(f"AdaptStep needs m even steps a layer, h = 1/m; got {solver}")
    if any(depth != round(depth) for depth in depths):
        raise ValueError(f"AdaptStep tries all h = 1/m, which divide whole depths only; the flows have {list(depths)}")


def _per_layer(solver: Solver) -> int:
    """The number of steps in the first layer; ValueError if none ends at depth 1."""
    return len(cast(Sequence[Step], solver.steps(0.0, 1.0)))


def finer(solver: Solver, finest: int) -> Solver:
    """The solver with half the step, if that is not below 1/finest; with half the tolerances, if they are above rounding."""
    if solver.adaptive:
        tight = cast(Adaptive, solver)
        smallest = max(tight.rtol, tight.atol) / 2 < ROUNDING
        return tight if smallest else replace(tight, rtol=tight.rtol / 2, atol=tight.atol / 2)
    return solver.refined(2) if 2 * _per_layer(solver) <= finest else solver


def coarser(solver: Solver) -> Solver:
    """The solver with about 1.1 times the step or the tolerances, where they are not above 1 by that."""
    if solver.adaptive:
        loose = cast(Adaptive, solver)
        larger = replace(loose, rtol=1.1 * loose.rtol, atol=1.1 * loose.atol)
        return larger if max(larger.rtol, larger.atol) <= 1 else solver
    m = _per_layer(solver)
    return replace(cast(FixedStep, solver), h=1 / max(1, min(m - 1, math.ceil(m / 1.1))))


def accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    """The share of the images that `network` classifies as they are labelled."""
    return float((network(images).argmax(1) == labels).float().mean())


def precise_accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    """The accuracy under the more precise solver, which evaluates more often than the solve that `network` just did."""
    solver = network.solver
    if not solver.adaptive:
        return accuracy(network.with_solver(more_precise(solver)), images, labels)
    spent, precise = evaluations(network), cast(Adaptive, solver)
    while True:
        precise = tighter(precise)
        judge = network.with_solver(precise)
        found = accuracy(judge, images, labels)
        if evaluations(judge) > spent or max(precise.rtol, precise.atol) < ROUNDING:
            return found


def evaluations(network: Network) -> int:
    """Those of the last solves of all flows."""
    return sum(flow.cost.evaluations for flow in network.flows if flow.cost is not None)


def more_precise(solver: Solver) -> FixedStep:
    """The solver of the next even order with an error about 50 times smaller: h^p / 50, on the grid 1/m."""
    scheme, order = (Midpoint(), 2) if cast(Scheme, scheme_of(solver)).order == 1 else (RK4(), 4)
    size = 1 / _per_layer(solver)
    h = min(size, (size ** (order / 2) / 50) ** (1 / order))
    return FixedStep(scheme, 1 / math.ceil(1 / h - 1e-9))


def tighter(solver: Adaptive) -> Adaptive:
    """dopri5 with a fifth of the tolerances for a pair of lower order, the pair itself with a tenth otherwise."""
    low = solver.method in ("fehlberg2", "adaptive_heun", "bosh3")
    method, share = ("dopri5", 5) if low else (solver.method, 10)
    budget = 10 * solver.max_evaluations
    return replace(solver, method=method, rtol=solver.rtol / share, atol=solver.atol / share, max_evaluations=budget)
