"""The control of adaptive steps: a step is accepted where the norm of its scaled error is at most one.

    ratio = | error / (atol + rtol max(|x|, |x+|)) |
    h+ = h min(10, max(0.9 ratio^(-1/order), 1 if accepted else 0.2))

These are torchdiffeq's rules and numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from continuum.types import State, Time

Norm = Literal["batch", "sample", "global"]

SAFETY, LARGEST_GROWTH, LARGEST_CUT = 0.9, 10.0, 0.2


@dataclass(frozen=True)
class StepControl:
    """Tolerances, limits and the norm of adaptive steps, checked when they are given.

    Args:
        rtol: the relative tolerance of the error of a step.
        atol: the absolute tolerance, in units of the state.
        norm: the size of an error: the root mean square over the `"batch"`, the largest root mean square of a `"sample"`, or
            that over the batches of all ranks (`"global"`).
        first_step: the first step size in layers; None lets the field decide.
        min_step: a smaller step ends the solve with a `SolveError`, in layers.
        max_step: no step is larger, in layers.
        max_evaluations: the budget of field evaluations of a solve.

    Raises:
        ValueError: a tolerance or limit out of range, or an unknown norm.
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    norm: Norm = "batch"
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = float("inf")
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0 and 0 < self.rtol + self.atol < float("inf")):
            raise ValueError(f"rtol and atol are finite, not negative and not both zero; got {self.rtol} and {self.atol}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm is one of {', '.join(get_args(Norm))}, not {self.norm!r}")
        if not 0 <= self.min_step <= self.max_step or self.max_step == 0:
            raise ValueError(f"0 <= min_step <= max_step is needed; got {self.min_step} and {self.max_step}")
        if self.first_step is not None and not self.first_step > 0:
            raise ValueError(f"first_step is positive, not {self.first_step}")
        if self.max_evaluations < 1:
            raise ValueError(f"max_evaluations is at least 1, not {self.max_evaluations}")

    def size(self, components: Sequence[Tensor]) -> Tensor:
        """The norm of the components of an error as a 0-dim tensor; under torch.func.vmap, one for the whole batch."""
        norm = NORMS[self.norm]
        if torch._C._are_functorch_transforms_active():
            return _Shared.apply(norm, *components)  # pyright: ignore[reportReturnType]
        return norm(components)

    def next(self, h: float, ratio: float, order: int) -> tuple[float, float]:
        """The size of the step after one of size h, and by which factor the tolerance alone would change it."""
        factor = SAFETY * ratio ** (-1 / order) if ratio else float("inf")
        return h * min(LARGEST_GROWTH, max(factor, 1.0 if ratio < 1 else LARGEST_CUT)), factor

    def first(
        self,
        evaluate: Callable[[Time, State], State],
        parts: Callable[[State], Sequence[Tensor]],
        x: State,
        slope: State,
        order: int,
        bounds: tuple[float, float],
    ) -> float:
        """A first step size from the size of the field and of its change (Hairer, Norsett, Wanner I, II.4).

        The solve goes from bounds[0] towards bounds[1], x and `slope` are at its start; `parts` are the components of a state.
        The device is waited for twice. The result may be no number.
        """
        way = 1.0 if bounds[1] > bounds[0] else -1.0
        with torch.no_grad():
            scale = self.atol + self.rtol * x.abs()
            sizes = torch.stack([self.size(parts(x / scale)), self.size(parts(slope / scale))])
            state, speed = sizes.tolist()
            if not math.isfinite(state + speed):
                return math.nan
            h = 1e-6 if state < 1e-5 or speed < 1e-5 else 0.01 * state / speed
            moved = x + way * h * slope
        changed = evaluate(min(max(bounds[0] + way * h, min(bounds)), max(bounds)), moved)
        with torch.no_grad():
            change = self.size(parts((changed - slope) / scale)).item() / h
        fastest = max(change, speed)  # of no number, no number
        chosen = max(1e-6, 1e-3 * h) if fastest <= 1e-15 else (0.01 / fastest) ** (1 / order)
        return min(100 * h, chosen, self.max_step) if chosen == chosen else chosen


def over_batch(components: Sequence[Tensor]) -> Tensor:
    """The root mean square over all entries: torchdiffeq's."""
    return _largest([torch.linalg.vector_norm(e) / max(e.numel(), 1) ** 0.5 for e in components])


def over_samples(components: Sequence[Tensor]) -> Tensor:
    """The largest of the root mean squares of the samples, so that each of them meets the tolerance."""
    rows = [e.reshape(e.shape[0] if e.dim() else 1, -1) for e in components]
    return _largest([torch.linalg.vector_norm(e, dim=1).amax() / max(e.shape[1], 1) ** 0.5 for e in rows])


def over_ranks(components: Sequence[Tensor]) -> Tensor:
    """The root mean square over the batches of all ranks, by one all-reduce; equal on all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return over_batch(components)
    squares = torch.stack([torch.linalg.vector_norm(e).double().square() for e in components])
    counts = torch.tensor([e.numel() for e in components], dtype=torch.float64).to(squares.device, non_blocking=True)
    sums = torch.cat([squares, counts])
    dist.all_reduce(sums)
    squares, counts = sums.chunk(2)
    return (squares / counts.clamp(min=1)).sqrt().amax()


def _largest(norms: Sequence[Tensor]) -> Tensor:
    return norms[0] if len(norms) == 1 else torch.stack(list(norms)).amax()


NORMS: dict[Norm, Callable[[Sequence[Tensor]], Tensor]] = {
    "batch": over_batch,
    "sample": over_samples,
    "global": over_ranks,
}


class _Shared(torch.autograd.Function):
    """A norm of components that is one number for all that torch.func.vmap runs over, so that they share their steps."""

    @staticmethod
    def forward(norm: Callable[[Sequence[Tensor]], Tensor], *components: Tensor) -> Tensor:
        return norm(components)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], norm: Any, *components: Tensor) -> tuple[Tensor, None]:
        merged = [
            e if dim is None else e.movedim(dim, 0).flatten(0, min(1, e.dim() - 1))
            for e, dim in zip(components, in_dims[1:], strict=True)
        ]
        return _Shared.apply(norm, *merged), None  # pyright: ignore[reportReturnType]


def any_rank(here: bool, norm: Norm, device: torch.device) -> bool:
    """Whether it is so on this rank or, for the norm over all ranks, on any of them."""
    if norm != "global" or not (dist.is_available() and dist.is_initialized()):
        return here
    told = torch.tensor(float(here), device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)
