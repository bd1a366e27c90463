"""The measurements of `continuum bench`, their report, and its summary: measure | torchdiffeq | torchode | here | target."""

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch

from continuum.bench.counts import graphs, memory, synchronisations
from continuum.bench.fit import fit_step
from continuum.bench.rivals import optional
from continuum.bench.timing import (
    LOSSES,
    SEED,
    SMALL,
    Case,
    Plan,
    Problem,
    Row,
    adjoint,
    compiled,
    euler_step,
    forward,
    libraries,
    training,
)

Report: TypeAlias = dict[str, Any]
"""Facts of the run, and under each of `SECTIONS` the rows of its parts."""

SECTIONS = ("synchronisations", "graphs", "euler_step", "fit_step", "memory", "overhead", "adjoint", "compiled")

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "268435456"}
"""What keeps glibc from handing large freed blocks back to the system, whose page faults would be measured with the solves."""


def plan(quick: bool = False, rounds: int | None = None) -> Plan:
    """What is measured: all, in a quarter of an hour on two cores; or `quick`, which shows that it runs, not how fast."""
    vectors = Problem((2,), 128, depth=12.0, repeats=20)
    if quick:
        tiny = Problem((8, 8, 8), 2)
        few = (Problem((2,), 4, vectors.depth), tiny)
        return Plan(
            few,
            adjoint=(tiny,),
            compiled=(),
            memory=tiny,
            steps=(replace(SMALL, windows=2),),
            rounds=rounds or 2,
            warm_up=0,
            seconds=5.0,
            images=2,
        )
    small, large = ([Problem(shape, batch) for shape in ((16, 32, 32), (32, 16, 16), (64, 8, 8))] for batch in (32, 128))
    return Plan(
        (vectors, *small, *large),
        adjoint=tuple(small),
        compiled=(vectors, small[-1]),
        memory=large[-1],
        steps=(SMALL, Case(20, 16, 32, batch=32, windows=12), Case(20, 16, 32, batch=128, windows=5)),
        rounds=rounds or 15,
    )


@dataclass(frozen=True)
class Part:
    """One measurement: the section of the report that its row belongs to, what it is, and how it is done."""

    section: str
    title: str
    measure: Callable[[], Row]

    def add_to(self, report: Report) -> None:
        start = time.perf_counter()
        report[self.section].append(self.measure())
        report["seconds"] += round(time.perf_counter() - start, 1)


def parts(plan: Plan, device: torch.device) -> Iterator[Part]:
    """All measurements of a plan, the short ones first."""
    for library in (*libraries(), "continuum, euler"):
        yield Part("synchronisations", f"synchronisations, {library}", partial(synchronisations, library, device))
    for library in ("continuum", "torchdiffeq"):
        yield Part("graphs", f"graphs, {library}", partial(graphs, library, device))
    yield Part("euler_step", "Euler against the plain loop", partial(euler_step, plan, device))
    yield from fit_parts(plan.steps, device)
    for solver in ("dopri5", "euler"):
        for deep in (False, True):
            title = f"memory, {solver}, {'100 evaluations and more' if deep else '26 evaluations'}"
            yield Part("memory", title, partial(memory, plan.memory, solver, deep, device))
    for problem in plan.problems:
        yield Part("overhead", f"{problem.label}, forward", partial(forward, problem, plan, device))
        yield Part("overhead", f"{problem.label}, training", partial(training, problem, plan, device))
    for problem in plan.adjoint:
        for loss in LOSSES:
            yield Part("adjoint", f"{problem.label}, adjoint, {loss} loss", partial(adjoint, problem, loss, plan, device))
    for problem in plan.compiled:
        for direction in ("forward", "training"):
            measure = partial(compiled, problem, direction, plan, device)
            yield Part("compiled", f"{problem.label}, compiled, {direction}", measure)


def fit_parts(cases: Sequence[Case], device: torch.device) -> Iterator[Part]:
    """A training step of `fit` against the plain loop: eager and, where there is something to compile, compiled."""
    for case in cases:
        for way in ("eager",) if case.width == SMALL.width else ("eager", "compiled"):
            for bar in (False, True):
                title = f"fit, {case.name}, {case.batch} images, {way}{', bar' if bar else ''}"
                yield Part("fit_step", title, partial(fit_step, case, way == "compiled", bar, device))


def new_report(plan: Plan, device: torch.device) -> Report:
    """A report without rows: the machine, the seed, the rounds at most, and what is missing here."""
    facts = {"machine": machine(device), "seed": SEED, "rounds": plan.rounds, "seconds": 0.0, "missing": missing()}
    return {**facts, **{section: [] for section in SECTIONS}}


def ways_of(rows: Iterable[Row]) -> list[str]:
    """What is compared in these rows, in the order in which it first appears, without what it is compared with."""
    return list(dict.fromkeys(name for row in rows for name, way in row["ways"].items() if way["against"] != name))


def missing() -> dict[str, str]:
    """The libraries that are not compared because they are not installed, and what to do."""
    wanted = {"torchode": ("torchode",), "diffrax": ("jax", "diffrax")}
    return {
        name: f"not installed, so not compared: pip install {' '.join(modules)}"
        for name, modules in wanted.items()
        if not all(map(optional, modules))
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: processor, cores, threads, versions, and the allocator's settings."""
    unset = [name for name in ALLOCATOR if name not in os.environ]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchdiffeq", "torchode", "jax", "diffrax")},
        "allocator": f"{', '.join(unset)} not set: page faults may distort the times" if unset else "keeps freed memory",
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


Values: TypeAlias = Mapping[str, Sequence[float]]
"""A measure by each library, on each of the fields."""

COLUMNS = ("torchdiffeq", "torchode", "continuum")


def summary(report: Report) -> str:
    """The report in ten lines of Markdown; where there are several fields, the range over those with convolutions."""
    lines = ["| measure | torchdiffeq | torchode | here | target |", "| --- | ---: | ---: | ---: | ---: |"]
    for measure, values, target in summary_rows(report):
        lines.append(f"| {measure} | {' | '.join(_range(values.get(name, ())) for name in COLUMNS)} | {target} |")
    return "\n".join(lines)


def summary_rows(report: Report) -> list[tuple[str, Values, str]]:
    """The measures with their targets."""
    memory = report["memory"]
    where = f", {memory[0]['field']}, batch {memory[0]['batch']}" if memory else ""
    slower = {loss: [r["adjoint / checkpoint"]["ratio"] for r in report["adjoint"] if r["loss"] == loss] for loss in LOSSES}
    few, many = (
        [r["ratio"] for r in memory if r["solver"] == "dopri5" and (r["evaluations"] >= 100) == deep] for deep in (0, 1)
    )
    least = [r for r in report.get("fit_step", []) if not r["bar"] and not r["compiled"]]
    beyond = [(r["fit_microseconds"] - r["plain_microseconds"]) / 1000 for r in least[:1]]
    steps = [r["ways"]["continuum"]["ratio"] for r in report["euler_step"]]
    trained = [r for r in report["overhead"] if r["pass"] == "training" and r["field"] != "MLP"]
    return [
        ("dopri5 forward / its evaluations", _overheads(report, "forward"), "at most 1.15"),
        ("forward and backward / its evaluations, direct", _overheads(report, "training"), "at most 1.10"),
        ("checkpoint / direct, time", _here(r["checkpoint / direct"]["ratio"] for r in trained), "at most 1.40"),
        ("torchdiffeq's adjoint / checkpoint, time at 1e-4, loss a sum of squares", _here(slower["sum"]), "at least 8"),
        ("the same, loss a mean of squares", _here(slower["mean"]), "-"),
        (f"checkpoint / direct, peak memory at 26 evaluations{where}", _here(few), "at most 0.40"),
        (f"checkpoint / direct, peak memory at 100 or more{where}", _here(many), "at most 0.15"),
        ("host synchronisations per attempted dopri5 step", _by_library(report, "synchronisations", "per_step"), "1"),
        ("training step of FixedStep(Euler()) / plain loop", _here(steps), "at most 1.02"),
        ("training step of fit - plain loop, small network, ms", _here(beyond), "at most 0.3"),
        ("the same, operators", _here(r["fit_operators"] - r["plain_operators"] for r in least), "at most 30"),
        ("waits in a training step of fit", _here(r["fit_waits"] for r in least), "0"),
        ("graphs of four Euler steps", _by_library(report, "graphs", "graphs"), "1"),
    ]


def _here(values: Iterable[float]) -> Values:
    return {"continuum": list(values)}


def _overheads(report: Report, direction: str) -> Values:
    chosen = [row["ways"] for row in report["overhead"] if row["pass"] == direction and row["field"] != "MLP"]
    return {name: [ways[name]["ratio"] for ways in chosen if name in ways] for name in COLUMNS}


def _by_library(report: Report, section: str, key: str) -> Values:
    return {name: [row[key] for row in report[section] if row["library"] == name] for name in COLUMNS}


def _range(values: Sequence[float]) -> str:
    """The value, or the smallest and the largest."""
    ends = [f"{end:.3g}" for end in (min(values), max(values))] if values else ["-"]
    return ends[0] if len(set(ends)) == 1 else f"{ends[0]} to {ends[1]}"
