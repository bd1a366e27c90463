"""Whether a network is an equation, on networks for which it is known."""

import pytest
import torch
from torch import Tensor, nn

from continuum import Flow
from continuum.analysis.verdict import DIVISORS, verdict
from continuum.fields import Function


def turned(angle: float) -> Flow:
    """The rotation of a plane by an angle, whose half-planes are the classes."""
    turn = angle * torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    return Flow(Function(lambda t, x: x @ turn), "euler", 1)


def sides(angle: float, count: int) -> tuple[Tensor, Tensor]:
    """Points, and the classes that the rotation itself gives them."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    turn = angle * torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    return x, (x @ torch.linalg.matrix_exp(turn)).argmax(1)


def test_small_steps_are_an_equation() -> None:
    found = verdict(turned(0.05), *sides(0.05, 400))
    assert (found.answer, found.enough, found.limit) == ("yes", 1, 1.0)
    assert "Yes: as it was trained" in str(found)


def test_large_steps_are_not() -> None:
    """Euler's step turns by arctan(3), and not by 3; the limit is right for every point."""
    found = verdict(turned(3.0), *sides(3.0, 400))
    assert found.answer == "no"
    assert found.limit == 1.0
    assert found.divisors == DIVISORS
    assert list(found.accuracies) == sorted(found.accuracies), "smaller steps turn better"
    assert found.differences[0][2] < 0
    assert "another network than its equation" in str(found)


def test_few_images_do_not_tell() -> None:
    found = verdict(turned(0.05), *sides(0.05, 8))
    assert found.answer == "not to be told"
    assert "take more of them" in str(found)


@pytest.mark.parametrize("model", [turned(1.0).with_solver("dopri5"), nn.Linear(2, 2)])
def test_adaptive_steps_are_the_equation_already(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="its steps are adaptive, or it has none"):
        verdict(model, *sides(1.0, 4))
