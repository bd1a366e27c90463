"""The bench: it says what it promises, its ways solve the same problem, and what is missing is no failure. Nothing is timed."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from continuum.bench import report as bench
from continuum.bench import timing
from continuum.bench.counts import Synchronisations
from continuum.bench.fit import WARM_UP, WINDOW, Clock, RandomImages, fit, network_of, plain_steps
from continuum.bench.report import ALLOCATOR, SECTIONS, missing, new_report, plan, summary
from continuum.bench.timing import SMALL, Plan, Problem, Way, compared, counted, forward, libraries, ours, textbook
from continuum.cli import main
from continuum.zoo import preresnet

CPU = torch.device("cpu")
TINY = Problem((8, 8, 8), 2)
TARGETS = ("1.15", "1.10", "1.40", "at least 8", "0.40", "0.15", "1.02", "0.3", "30")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("command_line")
def test_the_quick_bench_writes_all_it_promises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "execve", None)  # which would replace the tests
    main(["bench", "--quick", "--threads", "1", "--device", "cpu", "--out", "bench.json", "--picture", "bench.png"])
    report = json.loads(Path("bench.json").read_text())
    assert {"machine", "seed", "rounds", "seconds", "missing", *SECTIONS} == report.keys()
    assert {"device", "processor", "cores", "threads", "torch", "allocator"} <= report["machine"].keys()
    assert report["machine"]["threads"] == 1

    passes = set(product(("MLP", "8x8x8"), ("forward", "training")))
    assert {(row["field"], row["pass"]) for row in report["overhead"]} == passes
    for row in report["overhead"]:
        assert {"f", "continuum", "torchdiffeq", "plain loop"} <= row["ways"].keys()
        for way in row["ways"].values():
            low, high = way["quartiles"]
            assert 0 < low <= way["ratio"] <= high
            assert way["evaluations"] > 0
        if row["pass"] == "training":
            assert "continuum, checkpoint" in row["ways"]
            assert row["checkpoint / direct"]["ratio"] > 0
    assert [row["loss"] for row in report["adjoint"]] == ["sum", "mean"]
    assert all({"adjoint / checkpoint", "tolerance"} <= row.keys() for row in report["adjoint"])
    few, many, *euler = (row["evaluations"] for row in report["memory"])
    assert (few, *euler) == (26, 26, 104)
    assert many >= 100
    assert all(0 < row["checkpoint_mib"] < row["direct_mib"] for row in report["memory"])
    waits = {row["library"]: row["per_step"] for row in report["synchronisations"]}
    assert (waits["continuum"], waits["continuum, euler"]) == (1, 0)
    assert waits["torchdiffeq"] > 1
    assert {row["library"]: row["graphs"] for row in report["graphs"]}["continuum"] == 1
    assert "continuum" in report["euler_step"][0]["ways"]

    for row in report["fit_step"]:
        assert row["fit_microseconds"] > 0 < row["plain_microseconds"]
        assert row["fit_operators"] > row["plain_operators"] > 100
        assert row["plain_waits"] == 0
    assert [row["bar"] for row in report["fit_step"]] == [False, True]

    assert Path("bench.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert summary(report) in printed
    assert "bench.json" in printed


def test_a_ratio_is_of_the_own_evaluations_and_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 9.0, 2.0, 1.0, 10.0, 2.0, 4.0, 1.5])  # rounds of (f, solve), the first one to warm up
    order: list[str] = []

    def timed(run: object, device: torch.device, repeats: int) -> float:
        assert callable(run)
        run()
        return next(seconds)

    monkeypatch.setattr(timing, "seconds_of", timed)
    ways = {"f": Way(lambda: order.append("f"), 10), "solve": Way(lambda: order.append("solve"), 20)}
    row, _ = compared(ways, replace(plan(quick=True), warm_up=1, rounds=3), CPU)
    assert order == ["solve", "f", "f", "solve", "solve", "f", "f", "solve"]
    # One half, ten to two and three to eight, of twice as many evaluations.
    assert row["ways"]["solve"]["ratio"] == pytest.approx(0.25)
    assert row["ways"]["solve"]["quartiles"] == pytest.approx([(0.25 + 0.1875) / 2, (0.25 + 2.5) / 2])
    assert row["rounds"] == 3


@pytest.mark.parametrize("problem", [TINY, Problem((2,), 4, depth=12.0)], ids=["convolutions", "MLP"])
def test_all_ways_solve_the_same_problem(problem: Problem) -> None:
    field, x = problem.build(CPU)
    tight = ours()(field, problem.depth, 1e-6)(x)
    for name, make in libraries().items():
        solve = make(field, problem.depth, 1e-5)
        assert torch.allclose(solve(x), tight, rtol=0, atol=1e-2), name
        assert counted(field, make(field, problem.depth, 1e-3), x) == pytest.approx(26, abs=6), name


def test_the_textbook_loop_is_the_network() -> None:
    network, images = preresnet(14, width=4), torch.randn(2, 3, 32, 32)
    assert torch.equal(textbook(network)(images), network(images))


def test_fit_and_the_plain_loop_of_its_comparison_train_alike() -> None:
    """The same steps on the same images, so that what differs in time is not the arithmetic."""
    looped, fitted = network_of(SMALL, CPU), network_of(SMALL, CPU)
    data = RandomImages(16, size=8, batch_size=16)  # in one batch, whose order is no matter
    for _ in plain_steps(looped, textbook(looped), data, CPU):
        pass
    fit(fitted, data, [], bar=False, device=CPU)
    for (name, weight), other in zip(fitted.named_parameters(), looped.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-6), name


def test_a_clock_leaves_the_warm_up_out_and_times_whole_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 1000, 6))
    monkeypatch.setattr("continuum.bench.fit.time.perf_counter", lambda: next(ticks))
    clock = Clock(CPU)
    for _ in range(WARM_UP + 2 * WINDOW + 1):
        clock.step()
    assert clock.seconds() == [6 / WINDOW] * 2


def test_synchronisations_are_counted() -> None:
    x = torch.ones(3)
    with Synchronisations(CPU) as mode:
        y = 2 * x + 1
        assert mode.count == 0
        y[0].item()
        float(y[0])
        assert mode.count == 2
        if y.sum() > 0:
            torch.equal(x, y)
        assert mode.count == 4
    y[0].item()
    assert mode.count == 4


def test_libraries_that_are_not_installed_are_missing_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchode", "diffrax"):
        monkeypatch.setitem(sys.modules, name, None)
    assert missing().keys() == {"torchode", "diffrax"}
    assert "pip install jax diffrax" in missing()["diffrax"]
    few = Plan((TINY,), (), (), TINY, rounds=1, warm_up=0)
    report = new_report(few, CPU)
    assert "torchode" in report["missing"]
    report["overhead"].append(forward(TINY, few, CPU))
    assert "torchode" not in report["overhead"][0]["ways"]
    assert "| - |" in summary(report).splitlines()[2]


def test_the_summary_names_the_targets() -> None:
    """Also of a report in which nothing is measured yet."""
    report = new_report(plan(), CPU)
    lines = summary(report).splitlines()
    assert lines[0] == "| measure | torchdiffeq | torchode | here | target |"
    assert all(line.count("|") == 6 for line in lines)
    assert all(any(target in line for line in lines) for target in TARGETS)
    for shape, value in (("16x32x32", 1.02), ("64x8x8", 1.0825)):
        ways = {"continuum": {"ratio": value}, "torchdiffeq": {"ratio": 2.0}}
        report["overhead"].append({"field": shape, "pass": "forward", "ways": ways})
    assert "| 2 | - | 1.02 to 1.08 | at most 1.15 |" in summary(report)


def test_the_command_starts_again_with_an_allocator_that_keeps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class StartedError(Exception):
        pass

    started: list[dict[str, str]] = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert path == arguments[0] == sys.executable
        started.append(environment)
        raise StartedError

    def refuse(*_: object) -> None:
        raise RuntimeError("measured")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr("continuum.cli.bench.parts", refuse)
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "1")  # one's own choice remains
    with pytest.raises(StartedError):
        main(["bench", "--device", "cpu"])
    assert started[0].items() >= {**ALLOCATOR, "MALLOC_MMAP_MAX_": "1"}.items()
    assert "not set" in bench.machine(CPU)["allocator"]
    for name, value in started[0].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="measured"):
        main(["bench", "--device", "cpu"])
    assert "not set" not in bench.machine(CPU)["allocator"]
