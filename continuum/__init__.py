"""Continuous-depth networks: layers are vector fields, and a solver takes the steps.

A deep residual network is a *field* stepped by a *scheme*. The field says where a state moves at each depth, with
*weights* that are functions of depth; the scheme says how one step is taken; a *solver* repeats the steps and decides how
gradients come back; a *flow* is the resulting layer.
"""

from continuum.fields import MLP, Autonomous, Field, Momentum, ODENetBranch, PreActivation, Scaled, SecondOrder
from continuum.flow import Flow
from continuum.models import Augment, Network, lm_resnet, mlp, odenet, preresnet
from continuum.models.checkpoint import CheckpointError, load, save
from continuum.schemes import RK4, AdamsBashforth, Euler, Heun, Kutta3, LinearTwoStep, Midpoint
from continuum.solvers import Adaptive, FixedStep, SolveError
from continuum.weights import PiecewiseConstant

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "RK4",
    "AdamsBashforth",
    "Adaptive",
    "Augment",
    "Autonomous",
    "CheckpointError",
    "Euler",
    "Field",
    "FixedStep",
    "Flow",
    "Heun",
    "Kutta3",
    "LinearTwoStep",
    "Midpoint",
    "Momentum",
    "Network",
    "ODENetBranch",
    "PiecewiseConstant",
    "PreActivation",
    "Scaled",
    "SecondOrder",
    "SolveError",
    "lm_resnet",
    "load",
    "mlp",
    "odenet",
    "preresnet",
    "save",
]
