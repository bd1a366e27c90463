"""Comparison of solvers: its numbers are those of plain loops, its memory that of known computations."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import continuum
from continuum import Network
from continuum.analysis.compare import Row, compare_solvers, interval, paired, write_csv, write_json
from continuum.analysis.memory import peak_memory
from continuum.analysis.plots import plot_comparison, plot_steps
from continuum.solvers import parse

CPU = torch.device("cpu")


Batches = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def test_stochastic_solvers_run_over_paths_and_deterministic_ones_on_the_drift(batches: Batches, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = continuum.zoo.stochastic_depth_resnet(14, width=8, in_channels=1)
    texts = ("euler_maruyama", "euler_maruyama:increments=brownian,h=0.5", "brownian:method=euler,h=0.5", "rk4:h=0.5")
    rows = list(compare_solvers(network, batches, [parse(text) for text in texts], CPU, paths=4))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    drift = network.drift().eval()
    assert [row.paths for row in rows] == [1, 4, 4, 4, 1]
    assert rows[0].solver == "euler:h=1"
    assert rows[0].agreement == 1
    for row, solver in ((rows[0], "euler"), (rows[4], "rk4:h=0.5")):
        expected = drift.with_solver(solver)(images)
        assert row.loss == pytest.approx(float(torch.nn.functional.cross_entropy(expected, labels)), rel=1e-5)
        assert math.isnan(row.loss_deviation)
    # By hand: a path is a seed, the batches in order, noise on, BatchNorm as in evaluation.
    losses = []
    network.eval()
    for seed in range(4):
        torch.manual_seed(seed)
        network.sample(batches[0][0], 1)  # to warm up, which is when memory is measured
        logits = torch.cat([network.sample(inputs, 1)[0] for inputs, _ in batches])
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
    sampled = torch.tensor(losses, dtype=torch.float64)
    assert rows[1].loss == pytest.approx(float(sampled.mean()), rel=1e-5)
    assert 0 < rows[1].loss_deviation == pytest.approx(float(sampled.std()), rel=1e-4)
    assert rows[2].evaluations == 2 * rows[1].evaluations == rows[3].evaluations
    assert not network.training
    again = list(compare_solvers(network, batches, [parse(texts[0])], CPU, paths=4))
    assert again[1].loss == rows[1].loss
    write_csv(rows, tmp_path / "rows.csv")
    assert "accuracy_deviation" in (tmp_path / "rows.csv").read_text()
    plot_comparison(rows, tmp_path / "rows.png")


def test_peak_memory_is_what_lives_at_once() -> None:
    x = torch.zeros(1000)

    for compute, states in (
        (lambda: functools.reduce(lambda y, _: y + 1, range(10), x), 2),
        (lambda: [x + i for i in range(10)], 10),
        (lambda: (x + 1).view(10, 100)[2:].t().add_(1), 1),  # views, and in place
        (lambda: x.view(10, 100), 0),
    ):
        assert peak_memory(compute, CPU) == states * 4000


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return continuum.zoo.preresnet(14, width=4, in_channels=1).eval()


@pytest.fixture
def batches() -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(size, 1, 8, 8), torch.randint(10, (size,))) for size in (6, 2)]


@torch.no_grad()
def test_rows_are_what_a_plain_loop_finds(network: Network, batches: Batches) -> None:
    solvers = [parse("rk4:h=0.5"), parse("dopri5:rtol=1e-4,atol=1e-4")]
    rows = list(compare_solvers(network, batches, solvers, CPU))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    reference = network(images)
    assert [row.solver for row in rows] == ["euler:h=1", "rk4:h=0.5", "dopri5:rtol=0.0001,atol=0.0001"]
    assert (rows[0].agreement, rows[0].logit_difference, rows[0].evaluations) == (1.0, 0.0, 4.0)
    assert rows[1].evaluations == 2 * 4 * 4
    for row, solver in zip(rows[1:], solvers, strict=True):
        other = network.with_solver(solver)
        logits = torch.cat([other(x) for x, _ in batches])
        assert row.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        assert row.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
        assert row.agreement == pytest.approx(float((logits.argmax(1) == reference.argmax(1)).double().mean()))
        assert row.logit_difference == pytest.approx(float((logits - reference).abs().max()), rel=1e-4)
        assert row.milliseconds > 0
        assert row.memory > 0
    # Evaluations are weighed by the samples of a batch.
    other, total = network.with_solver(solvers[1]), 0
    for x, _ in batches:
        other(x)
        total += len(x) * sum(flow.cost.evaluations for flow in other.flows if flow.cost)
    assert rows[2].evaluations == pytest.approx(total / len(images))
    assert [grid[-1] for grid in rows[2].grids] == [2.0, 1.0, 1.0]


def test_a_solver_that_fails_has_its_reason_and_the_others_go_on(network: Network, batches: Batches, tmp_path: Path) -> None:
    rows = list(compare_solvers(network, batches, [parse("dopri5:max_evaluations=2"), parse("euler:h=0.5")], CPU))
    assert "budget" in rows[1].error
    assert math.isnan(rows[1].accuracy)
    assert not rows[2].error
    write_csv(rows, tmp_path / "rows.csv")
    write_json(rows, {"seed": 0}, tmp_path / "rows.json")
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 4
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["seed"] == 0
    assert content["rows"][1]["accuracy"] is None
    plot_comparison(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_steps_are_drawn_where_a_solver_chose_them(tmp_path: Path) -> None:
    even = Row("rk4:h=0.5", evaluations=8, grids=[[0.0, 0.5, 1.0]])
    chosen = Row("dopri5", evaluations=20, grids=[[0.0, 0.1, 1.0]])
    for rows, drawn in (([even], False), ([even, chosen], True)):
        assert plot_steps(rows, tmp_path / "steps.png") == (tmp_path / "steps.png").is_file() == drawn


@pytest.mark.parametrize(("share", "count"), [(0.5, 100), (0.9, 60), (0.98, 359)])
def test_the_interval_of_an_accuracy_covers_it(share: float, count: int) -> None:
    """Of all numbers of right answers, weighted by how often they come, 95% have an interval with the true share, or nearly."""
    covered = 0.0
    for right in range(count + 1):
        low, high = interval(right / count, count)
        assert 0 <= low <= right / count + 1e-12
        assert right / count - 1e-12 <= high <= 1
        weight = math.comb(count, right) * share**right * (1 - share) ** (count - right)
        covered += weight * (low <= share <= high)
    assert 0.92 < covered < 0.98


def test_the_interval_of_a_difference_covers_it_and_is_paired() -> None:
    """Two solvers that differ on 9% of the images, three of them to one side for one to the other."""
    generator = torch.Generator().manual_seed(0)
    gain, loss, images, trials = 0.03, 0.06, 200, 2000
    draws = torch.rand(trials, images, generator=generator, dtype=torch.float64)
    differences = (draws < gain).double() - ((draws >= gain) & (draws < gain + loss)).double()
    found = [paired(row) for row in differences]
    assert all(low <= mean <= high for mean, low, high in found)
    covered = sum(low <= gain - loss <= high for _, low, high in found) / trials
    assert 0.93 < covered < 0.985
    # Two accuracies of 90% each have an interval of 8 points; what they do not share is less.
    widths = [high - low for _, low, high in found]
    low, high = interval(0.9, images)
    assert max(widths) < 1.4 * (high - low)
    assert sum(widths) / trials < high - low + 0.005
    mean, low, high = paired(torch.zeros(100))
    assert mean == 0
    assert -0.03 < low < 0 < high < 0.03


@torch.no_grad()
def test_differences_from_the_reference_are_by_image(batches: Batches) -> None:
    torch.manual_seed(0)
    network, images = continuum.zoo.preresnet(14, width=8, in_channels=1).eval(), torch.cat([images for images, _ in batches])
    # As if it were trained: its own answers are right, but for a few.
    labels = network(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 10
    own, same, coarse = compare_solvers(network, [(images, labels)], [parse("euler:h=1"), parse("rk4:h=1")], CPU)
    assert own.difference == same.difference == 0
    right = [network.with_solver(solver)(images).argmax(1) == labels for solver in ("rk4:h=1", "euler:h=1")]
    assert coarse.difference == pytest.approx(float(right[0].double().mean() - right[1].double().mean()))
    assert coarse.difference_low < coarse.difference < coarse.difference_high
    assert coarse.accuracy_low < coarse.accuracy < coarse.accuracy_high
    assert same.difference_low < 0 < same.difference_high
