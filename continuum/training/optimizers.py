"""What makes the optimiser of a training: any class of torch.optim, by default SGD with Nesterov's momentum."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from continuum.fields import Field

OptimizerCallable: TypeAlias = Callable[[Iterable[Any]], Optimizer]
"""Makes an optimiser of groups of weights: a class of torch.optim, or a partial of one with other arguments."""


class Nesterov(SGD):
    """SGD with Nesterov's momentum, as He et al. and Lu et al. train.

    Args:
        params: weights, or groups of them.
        lr: the largest learning rate.
        momentum: the share of the last update in the next; 0 for plain SGD.
        weight_decay: the share of a weight in its gradient.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-4) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)


def optimizer_of(network: nn.Module, make: OptimizerCallable | None) -> Optimizer:
    """The optimiser that `make`, or `Nesterov`, gives the weights of `network`; weight decay spares the k of LM-ResNet.

    Raises:
        TypeError: `make` makes none, or one whose steps evaluate the loss several times.
        ValueError: a learning rate that is not positive and finite, or what the class refuses.
    """
    friction = {id(module.friction()[1]) for module in network.modules() if isinstance(module, Field)}
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) not in friction]},
        {"params": [p for p in parameters if id(p) in friction], "weight_decay": 0.0},
    ]
    make = Nesterov if make is None else make
    optimizer = make([group for group in groups if group["params"]]) if callable(make) else None
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer makes an optimiser of groups of weights, as torch.optim.AdamW or functools.partial(AdamW, lr=1e-3) "
            f"does; {make!r} does not"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"a step of {type(optimizer).__name__} evaluates the loss several times: take one that does it once")
    for group in optimizer.param_groups:
        if not 0 < group["lr"] < math.inf:
            raise ValueError(f"the learning rate lr of {type(optimizer).__name__} is positive and finite, not {group['lr']}")
    return optimizer


def leaves_out(optimizer: Optimizer) -> bool:
    """Whether a step looks at `found_inf` on the device, and leaves weights and state as they are where it is 1."""
    return _can_leave_out(optimizer) and all(group["fused"] for group in optimizer.param_groups)


def fuse(optimizer: Optimizer) -> None:
    """Have one kernel update all weights where the class has one that looks at `found_inf`, and nothing forbids it."""
    if not _can_leave_out(optimizer):
        return
    for group in optimizer.param_groups:
        # A first step without dampening is the only one that momenta of zero do not change.
        others = (group.get(name) for name in ("foreach", "differentiable", "dampening"))
        if group["fused"] is None and not any(others):
            group["fused"] = True
        for parameter in group["params"] if group["fused"] and group.get("momentum") else ():
            # As torch's first step would make them; its fused update takes all momenta or none, and branches may be dropped.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _can_leave_out(optimizer: Optimizer) -> bool:
    """Whether the step is that of SGD, Adam or AdamW, and not one that a class of its own has put in its place."""
    return inspect.unwrap(type(optimizer).step) in {inspect.unwrap(SGD.step), inspect.unwrap(Adam.step)}
