"""Laws of the number eta behind the noise: its mean, its deviation, and how to draw it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from continuum.bases import gauss, gauss_legendre


class Law(ABC):
    """The distribution of the number eta, with its `mean` and `deviation`.

    `atoms` are the values that eta takes with a probability above zero: none where its law has a density.
    """

    mean: float
    deviation: float
    atoms: tuple[float, ...] = ()

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The value below which eta lies with probability u, for u in (0, 1)."""

    def draw(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Independent numbers from torch's global generator."""
        u = torch.rand(size, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return self.quantile(u.clamp_min(torch.finfo(u.dtype).tiny)).to(dtype)  # u = 0 may come, and has no quantile

    def nodes(self, degree: int) -> list[tuple[float, float]]:
        """Values and their weights, by which the expectation of a polynomial of this degree is a finite sum.

        Raises:
            TypeError: no such sum is known for this law.
        """
        raise TypeError(f"{self} has no closed-form moments: estimate them by sampling")


@dataclass(frozen=True)
class Bernoulli(Law):
    """eta = 1 with probability p, otherwise 0.

    Args:
        p: probability of 1.

    Raises:
        ValueError: p is no probability.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p is a probability, not {self.p}")

    @property
    def mean(self) -> float:
        return self.p

    @property
    def deviation(self) -> float:
        return math.sqrt(self.p * (1 - self.p))

    @property
    def atoms(self) -> tuple[float, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(eta for eta, probability in self.nodes(1) if probability > 0)

    def quantile(self, u: Tensor) -> Tensor:
        return (u > 1 - self.p).to(u.dtype)

    def draw(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).bernoulli_(self.p)

    def nodes(self, degree: int) -> list[tuple[float, float]]:
        return [(1.0, self.p), (0.0, 1 - self.p)]


@dataclass(frozen=True)
class Uniform(Law):
    """eta uniform on (0, 1)."""

    mean = 0.5
    deviation = 1 / math.sqrt(12)

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def nodes(self, degree: int) -> list[tuple[float, float]]:
        return [((node + 1) / 2, weight) for node, weight in gauss_legendre(degree // 2 + 1)]


@dataclass(frozen=True)
class Normal(Law):
    """eta from N(0, 1)."""

    mean = 0.0
    deviation = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        return torch.special.ndtri(u)

    def draw(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    def nodes(self, degree: int) -> list[tuple[float, float]]:
        return gauss(torch.arange(1, degree // 2 + 1, dtype=torch.float64).sqrt())
