"""What LM-ResNet learnt: the k of every layer of x_{n+1} = (1 - k_n) x_n + k_n x_{n-1} + f_n(x_n).

With the velocity v_n = x_n - x_{n-1} a step is v_{n+1} = -k_n v_n + f_n(x_n), and the equation behind it is

    (1 + k) x' + (1 - k) (h / 2) x'' = f(x) + O(h^2)

so -k is a momentum, 1 + k the friction that resists motion, and (1 - k) / 2 the inertia (arXiv 1710.10121).
"""

from dataclasses import dataclass

from torch import nn

from continuum.models.flows import named_flows


@dataclass(frozen=True)
class Friction:
    """The k of one layer: `flow` is the flow's name in the network, `layer` its place there, from 0."""

    flow: str
    layer: int
    k: float

    @property
    def momentum(self) -> float:
        return -self.k

    @property
    def friction(self) -> float:
        return 1 + self.k

    @property
    def inertia(self) -> float:
        return (1 - self.k) / 2

    @property
    def zero_stable(self) -> bool:
        """Whether the roots 1 and -k of r^2 = (1 - k) r + k keep a state without forces where it is: -1 < k <= 1."""
        return -1 < self.k <= 1


def frictions(network: nn.Module) -> list[Friction]:
    """The k of every layer that has one, in the order in which images pass them; empty for a network without memory.

    >>> import torch, continuum
    >>> found = frictions(continuum.zoo.lm_resnet(20))
    >>> len(found), found[0].flow, found[0].layer, all(-0.1 < friction.k <= 0 for friction in found)
    (6, 'stages.0', 1, True)
    """
    found: list[Friction] = []
    for name, flow in named_flows(network).items():
        for place, layer in enumerate(flow.field.pieces()):
            _, k = layer.friction()
            if k is not None:
                found.append(Friction(name, place, float(k)))
    return found
