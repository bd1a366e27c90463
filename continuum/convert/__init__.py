"""Networks that exist already, made continuous, and back."""

from continuum.convert.continuous import Difference, Run, Survey, continuous, discrete, survey, with_noise
from continuum.convert.published import from_checkpoint, from_torchvision, to_checkpoint, to_torchvision

__all__ = [
    "Difference",
    "Run",
    "Survey",
    "continuous",
    "discrete",
    "from_checkpoint",
    "from_torchvision",
    "survey",
    "to_checkpoint",
    "to_torchvision",
    "with_noise",
]
