"""Two ranks with half of a batch each have the gradients of one process that has it all, and fail together."""

from pathlib import Path

import pytest
import torch
from distributed_worker import ADJOINT_CASES, ELSEWHERE, FIXED_CASES, GLOBAL_CASES, MIXED_CASES, TOGETHER
from runs import in_two_processes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of what both ranks have seen, and their exit codes."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, in_two_processes(Path(__file__).parent / "distributed_worker.py", folder)


@pytest.fixture
def seen(run):
    """What the ranks have seen in a part, one after the other."""
    folder, _ = run
    return lambda part, name: [torch.load(folder / f"{part}{rank}.pt", weights_only=True)[name] for rank in range(2)]


def assert_gradients(ranks, tolerance):
    """Equal on both ranks, and within `tolerance` of those of one process, relative to the size of them all."""
    first, second = ranks
    alone = first["alone"]["gradients"]
    size = torch.cat([gradient.flatten() for gradient in alone.values()]).norm()
    for name, gradient in first["gradients"].items():
        assert torch.equal(gradient, second["gradients"][name]), name
        assert alone[name].norm() > 1e-3 * size, f"{name}: too small to tell anything"
        assert (gradient - alone[name]).norm() <= tolerance * size, name


def test_both_ranks_come_to_the_end(run):
    assert run[1] == [0, 0]


# Gradients
@pytest.mark.parametrize("name", FIXED_CASES)
def test_fixed_steps_have_the_gradient_of_the_whole_batch(seen, name):
    assert_gradients(seen("fixed", name), 1e-12 if FIXED_CASES[name].dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", GLOBAL_CASES)
def test_the_global_norm_takes_the_steps_of_the_whole_batch(seen, name):
    first, second = seen("global", name)
    assert first["grid"] == second["grid"]
    assert first["grid"] == pytest.approx(first["alone"]["grid"], rel=1e-9)
    assert_gradients((first, second), 1e-10)


@pytest.mark.parametrize("name", ADJOINT_CASES)
def test_the_adjoint_agrees_to_its_tolerance(seen, name):
    """rtol = atol = 1e-6, with the steps of each rank's own batch."""
    assert_gradients(seen("adjoint", name), 1e-4)


@pytest.mark.parametrize("name", MIXED_CASES)
def test_mixed_precision(seen, name):
    """One process computes in bfloat16 too, with the same steps or, for the adjoint, with its own."""
    ranks = seen("mixed", name)
    assert_gradients(ranks, 0.1)
    assert all(gradient.isfinite().all() for gradient in ranks[0]["gradients"].values())


def test_the_norm_of_each_batch_takes_other_steps_and_still_trains(seen):
    """The images of the first rank are the harder ones."""
    for first, second in zip(*seen("trained", "grids"), strict=True):
        assert len(first) > len(second)
    first, second = seen("trained", "weights")
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    for losses in seen("trained", "losses"):
        assert losses[-1] < 0.2 * losses[0]


# Failures
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_state_that_is_not_finite_ends_the_solve_on_both_ranks(seen, name):
    first, second = seen("failed", name)
    assert "not finite on another rank" in first["message"]
    assert first["rows"] == ()
    assert "not finite (dopri5" in second["message"]
    assert second["rows"] == (2,)
    assert first["evaluations"] == second["evaluations"]
    assert first["depth"] == second["depth"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_both_ranks_go_on_after_a_failure(seen, name):
    first, second = (rank["gradients"] for rank in seen("failed", name))
    for part, gradient in first.items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, second[part])


@pytest.mark.parametrize("name", TOGETHER)
def test_both_ranks_give_up_at_the_same_step(seen, name):
    first, second = seen("failed", name)
    assert first["message"].startswith(name.partition(",")[0])
    assert first == second


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("nan, batch", "a solve failed on another rank", "not finite (dopri5"),
        ("nan, global", "not finite on another rank (dopri5", "not finite (dopri5"),
        ("nan, fixed steps", "a solve failed on another rank", "the stem's output is not finite"),
        ("loss, batch", "a solve failed on another rank", "all logits are finite, but the loss is not"),
        ("loss, global", "a solve failed on another rank", "all logits are finite, but the loss is not"),
    ],
)
def test_a_classifier_fails_on_all_ranks_and_changes_nothing(seen, name, here, there):
    """Where one rank has a NaN among its images, or a loss that is none."""
    first, second = seen("classified", name)
    assert here in first["message"]
    assert there in second["message"]
    assert first["moved"] == second["moved"] == []


def test_a_classifier_trains_on_two_ranks(seen):
    for rank in seen("classified", "good"):
        assert rank["message"] is None
        assert len(rank["moved"]) > 20
