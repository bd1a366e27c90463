"""Noise as stochastic dynamics: random coefficients of branches, and the drift and diffusion they amount to."""

from continuum.noise.base import Drift, StochasticField, noise_only
from continuum.noise.laws import Bernoulli, Law, Normal, Uniform
from continuum.noise.regularisers import Dropout, Gaussian, ShakeShake, StochasticDepth, linear_decay

__all__ = [
    "Bernoulli",
    "Drift",
    "Dropout",
    "Gaussian",
    "Law",
    "Normal",
    "ShakeShake",
    "StochasticDepth",
    "StochasticField",
    "Uniform",
    "linear_decay",
    "noise_only",
]
