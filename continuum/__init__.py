"""Continuous-depth networks: layers are vector fields, and a solver takes the steps.

A deep residual network is a *field* stepped by a *scheme*. The field says where a state moves at each depth, with
*weights* that are functions of depth; the scheme says how one step is taken; a *solver* repeats the steps and decides how
gradients come back; a *flow* is the resulting layer.

Here is what one composes with. `continuum.zoo` builds published networks, and `fields`, `bases`, `schemes`, `noise`,
`analysis` and `training` hold the rest of their kind.
"""

from continuum import zoo
from continuum.fields import MLP, Autonomous, Coupled, Field, Momentum, PostActivation, SecondOrder
from continuum.flow import Flow
from continuum.models import Network
from continuum.models.checkpoint import CheckpointError, load, save
from continuum.noise import Dropout, Gaussian, ShakeShake, StochasticDepth, StochasticField
from continuum.schemes import RK4, Euler, EulerMaruyama, Midpoint
from continuum.solvers import Adaptive, Brownian, FixedStep, SolveError
from continuum.weights import Expansion, PiecewiseConstant

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "RK4",
    "Adaptive",
    "Autonomous",
    "Brownian",
    "CheckpointError",
    "Coupled",
    "Dropout",
    "Euler",
    "EulerMaruyama",
    "Expansion",
    "Field",
    "FixedStep",
    "Flow",
    "Gaussian",
    "Midpoint",
    "Momentum",
    "Network",
    "PiecewiseConstant",
    "PostActivation",
    "SecondOrder",
    "ShakeShake",
    "SolveError",
    "StochasticDepth",
    "StochasticField",
    "load",
    "save",
    "zoo",
]
