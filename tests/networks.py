"""Small networks of every kind, those that `continuum.verify` certifies, and images for them."""

import torch

from continuum.verify.certificate import SMALL as CERTIFIED
from continuum.verify.certificate import some_images
from continuum.zoo import BUILDERS

SKIPPED = ("even", "without", "Euler", "chebyshev", "fourier", "all paths", "in one step")
SMALL = [name for name in CERTIFIED if not any(part in name.partition(" ")[2] for part in SKIPPED)]
WITH_FLOWS = [name for name in SMALL if not name.startswith("fractalnet")]


def build(name, **options):
    """The network of this name with random weights, and images for it; `options` are further arguments."""
    torch.manual_seed(4)
    network = BUILDERS[name.split()[0]](**{**CERTIFIED[name], **options})
    return network, some_images(network)
