"""The networks of the zoo a second time, as plain loops: what fields, schemes, solvers and flows must agree with to the bit.

A function a network, made of its tensors by name and `torch.nn.functional` alone: it yields (name of a layer, state after it)
for the stem, each layer and each transition, and the logits as the state after the head.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import Tensor

from continuum.verify.plain.continuous import continuous_resnet, mlp, odenet
from continuum.verify.plain.fractal import fractalnet
from continuum.verify.plain.parts import Arguments, Layer, Weights, bare
from continuum.verify.plain.post_activation import imagenet_resnet, polynet, resnet, resnext, se_resnet
from continuum.verify.plain.pre_activation import fractal_resnet, lm_resnet, lm_resnext, momentum_resnet, preresnet, wide_resnet
from continuum.verify.plain.reversible import antisymmetric, hamiltonian, leapfrog, midpoint, revnet
from continuum.verify.plain.stochastic import (
    dropout_resnet,
    neural_sde,
    shake_shake,
    stochastic_depth_resnet,
    stochastic_lm_resnet,
)

Plain: TypeAlias = Callable[[Weights, Arguments, Tensor], Iterator[Layer]]

PLAIN: dict[str, Plain] = {
    loop.__name__: loop
    for loop in (
        *(resnet, imagenet_resnet, se_resnet, resnext, polynet),
        *(preresnet, wide_resnet, lm_resnet, lm_resnext, momentum_resnet, fractal_resnet, fractalnet),
        *(revnet, hamiltonian, midpoint, leapfrog, antisymmetric, continuous_resnet, odenet, mlp),
        *(stochastic_depth_resnet, shake_shake, stochastic_lm_resnet, dropout_resnet, neural_sde),
    )
}
"""The plain loop of each builder, by the builder's name."""

__all__ = ["PLAIN", "Layer", "Plain", "Weights", "bare"]
