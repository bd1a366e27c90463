"""Small networks of every kind: arguments of the builder, which is the first word of the name, and the size of the images."""

import torch

from continuum.zoo import BUILDERS

THREE = {"widths": (4, 8, 12)}
SMALL = {
    "resnet": ({"depth": 14, "width": 4}, 16),
    "resnet B": ({"depth": 14, "width": 4, "shortcut": "B"}, 16),
    "imagenet_resnet": ({"blocks": (2, 1, 1, 2), "block": "basic", "num_classes": 10, "stem": "cifar"}, 16),
    "se_resnet": ({"depth": 14, "width": 4, "reduction": 2}, 16),
    "resnext": ({"depth": 20, "cardinality": 2, "group_width": 16, "width": 4}, 16),
    "polynet": ({"blocks": (2, 3, 2), "width": 4}, 16),
    "preresnet": ({"depth": 14, "width": 4}, 16),
    "preresnet bottleneck": ({"depth": 20, "width": 4, "block": "bottleneck"}, 16),
    "preresnet scaled": ({"depth": 14, "width": 4, "scale": 0.2}, 16),
    "wide_resnet": ({"depth": 16, "widen": 1}, 16),
    "lm_resnet": ({"depth": 14, "width": 4}, 16),
    "lm_resnet bottleneck": ({"depth": 20, "width": 4, "block": "bottleneck"}, 16),
    "lm_resnext": ({"depth": 20, "cardinality": 2, "group_width": 16, "width": 4}, 16),
    "momentum_resnet": ({"depth": 14, "width": 4}, 16),
    "fractal_resnet": ({"depth": 14, "width": 4}, 16),
    "fractalnet": ({"widths": (4, 6), "dropout": (0.0, 0.2)}, 16),
    "revnet": ({"depth": 26, **THREE}, 16),
    "hamiltonian": ({"depth": 26, **THREE}, 16),
    "midpoint": ({"depth": 14, **THREE}, 16),
    "midpoint from zero": ({"depth": 14, "start": "zero", **THREE}, 16),
    "leapfrog": ({"depth": 14, **THREE}, 16),
    "leapfrog from rest": ({"depth": 14, "start": "rest", **THREE}, 16),
    "antisymmetric": ({"depth": 14, **THREE}, 16),
    "continuous_resnet": ({"size": 3, "width": 4}, 16),
    "continuous_resnet legendre": ({"size": 3, "width": 4, "basis": "legendre"}, 16),
    "continuous_resnet constant": ({"size": 2, "width": 4, "basis": "constant"}, 16),
    "odenet": ({"width": 4, "in_channels": 3}, 28),
    "odenet small": ({"width": 4, "in_channels": 3, "downsample": False}, 10),
    "odenet three stages": ({"stages": 3, "width": 4, "in_channels": 3}, 16),
    "mlp": ({"hidden": 8}, None),
    "mlp augmented": ({"hidden": 8, "augment": 3}, None),
    "stochastic_depth_resnet": ({"depth": 14, "width": 4}, 16),
    "shake_shake": ({"depth": 14, "width": 4}, 16),
    "shake_shake keep": ({"depth": 14, "width": 4, "backward_mode": "keep", "per": "batch"}, 16),
    "stochastic_lm_resnet": ({"depth": 14, "width": 4, "per": "image"}, 16),
    "dropout_resnet": ({"depth": 14, "width": 4}, 16),
    "neural_sde": ({"width": 4}, 28),
    "neural_sde multiplicative": ({"width": 4, "kind": "multiplicative", "downsample": False}, 16),
}
WITH_FLOWS = [name for name in SMALL if name != "fractalnet"]


def build(name, **options):
    """The network of this name with random weights, and images for it; `options` are further arguments."""
    arguments, size = SMALL[name]
    torch.manual_seed(0)
    network = BUILDERS[name.split()[0]](**arguments, **options)
    shape = (4, 2) if size is None else (4, 3, size, size)
    return network, torch.randn(shape, generator=torch.Generator().manual_seed(1))
