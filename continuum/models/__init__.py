"""Networks made of flows: their parts, the zoo, and the files they live in."""

from continuum.models.network import Augment, Network, builder
from continuum.models.zoo import lm_resnet, mlp, odenet, preresnet

__all__ = ["Augment", "Network", "builder", "lm_resnet", "mlp", "odenet", "preresnet"]
