"""What moves: fields f of dx/dt = f(t, x), and the branches of residual blocks."""

from continuum.fields.base import Autonomous, Field, Momentum, Scaled, SecondOrder
from continuum.fields.branches import MLP, ODENetBranch, PreActivation

__all__ = ["MLP", "Autonomous", "Field", "Momentum", "ODENetBranch", "PreActivation", "Scaled", "SecondOrder"]
