"""Networks made of flows: their parts, and the files they live in."""

from continuum.models.network import Network, builder, whole
from continuum.models.parts import Augment

__all__ = ["Augment", "Network", "builder", "whole"]
