"""The size of an error, as one number on its device: |e| = sqrt(mean e^2), over a batch, by image, or over all ranks.

The components of a state that is a tuple are measured one by one, and the largest number counts.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Norm = Literal["batch", "sample", "global"]


def over_batch(components: Sequence[Tensor]) -> Tensor:
    """The root mean square over all entries: torchdiffeq's."""
    return _largest([torch.linalg.vector_norm(e) / max(e.numel(), 1) ** 0.5 for e in components])


def over_samples(components: Sequence[Tensor]) -> Tensor:
    """The largest of the root mean squares of the images, so that each of them meets the tolerance."""
    rows = [e.reshape(e.shape[0], -1) for e in components]
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


def any_rank(here: bool, norm: Norm, device: torch.device) -> bool:
    """Whether it is so on this rank or, for the norm over all ranks, on any of them."""
    if norm != "global" or not (dist.is_available() and dist.is_initialized()):
        return here
    told = torch.tensor(float(here), device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)
