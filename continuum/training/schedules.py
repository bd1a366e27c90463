"""How the learning rate changes during training, as a formula of the count of steps or epochs."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Schedule(ABC):
    """How the learning rate changes during training: factor(done) times the learning rate, closed in the count `done`."""

    interval: Literal["step", "epoch"]
    """What is counted."""

    @abstractmethod
    def factor(self, done: int, steps: float) -> float:
        """Return the share of the learning rate after so many steps or epochs, in a run of so many optimiser `steps`.

        Raises:
            ValueError: the run has no end (`steps` is infinite), and the schedule needs one.
        """

    def build(self, optimizer: Optimizer, steps: float) -> LambdaLR:
        """Return the torch scheduler of `optimizer` for a run of so many optimiser `steps`, infinite if it has no end."""
        return Planned(optimizer, partial(self.factor, steps=steps))


class OneCycle(Schedule):
    """One cycle (arXiv 1708.07120): up from 1/25 of the learning rate, then down to 1/250,000, along half waves of cosine.

    Args:
        warmup: the share of all steps on the way up, in [0, 1).

    Raises:
        ValueError: a `warmup` outside [0, 1); in training, a run without an end.
    """

    interval = "step"

    def __init__(self, warmup: float = 0.3) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the training in [0, 1), not {warmup}")
        self.warmup = warmup

    def factor(self, done: int, steps: float) -> float:
        if not 0 < steps < math.inf:
            raise ValueError(
                "OneCycle spreads its cycle over all steps, and this run has no end: give max_epochs or max_steps, or take "
                "the schedule Steps, or none"
            )
        peak, last = self.warmup * steps - 1, steps - 1
        if done < peak:
            return _between(1 / 25, 1.0, done / peak)
        return _between(1.0, 1 / 25e4, min((done - peak) / (last - peak), 1.0))


class Steps(Schedule):
    """The learning rate multiplied by a factor at given epochs, as He et al. and Lu et al. train.

    Args:
        milestones: the epochs, increasing, counted from 0.
        factor: what the learning rate is multiplied with at each of them, above 0.

    Raises:
        ValueError: `milestones` that are not increasing, or a `factor` that is not positive.
    """

    interval = "epoch"

    def __init__(self, milestones: Sequence[int] = (80, 120), factor: float = 0.1) -> None:
        if list(milestones) != sorted(set(milestones)) or not factor > 0:
            raise ValueError(f"milestones are increasing epochs and factor is positive; got {milestones} and {factor}")
        self.milestones = list(milestones)
        self.decay = factor

    def factor(self, done: int, steps: float) -> float:
        return self.decay ** bisect_right(self.milestones, done)


class Planned(LambdaLR):
    """A closed formula of the count. A resumed run goes on with its own plan, which may be longer, at the count it was at."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        self._last_lr = [base * factor(self.last_epoch) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def _between(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a wave of cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
