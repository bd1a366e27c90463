"""What moves: fields f of dx/dt = f(t, x), and the branches of residual blocks."""

from continuum.fields.base import Autonomous, Field, Function, PostActivation, Scaled
from continuum.fields.branches import (
    MLP,
    BasicBranch,
    Bottleneck,
    ODENetBranch,
    PolyBranch,
    PreActivation,
    PreBottleneck,
    ShakeBranch,
    SqueezeExcite,
    Sum,
)
from continuum.fields.coupled import Antisymmetric, Coupled, DoubleLayer, Hamiltonian, SecondOrder
from continuum.fields.fractal import TwoColumns
from continuum.fields.momentum import Momentum
from continuum.fields.split import Split

__all__ = [
    "MLP",
    "Antisymmetric",
    "Autonomous",
    "BasicBranch",
    "Bottleneck",
    "Coupled",
    "DoubleLayer",
    "Field",
    "Function",
    "Hamiltonian",
    "Momentum",
    "ODENetBranch",
    "PolyBranch",
    "PostActivation",
    "PreActivation",
    "PreBottleneck",
    "Scaled",
    "SecondOrder",
    "ShakeBranch",
    "Split",
    "SqueezeExcite",
    "Sum",
    "TwoColumns",
]
