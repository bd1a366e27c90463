"""`continuum bench` on a card, beside the other libraries: a job a section, so that what compiles does not hold up the rest."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from continuum.bench.report import SECTIONS, Report, new_report, parts, plan, summary
from continuum.bench.report import Part as Measurement
from continuum.bench.timing import Plan
from experiments.common import Row
from experiments.gpu.jobs import Job, Part, Rows, Settings

ESTIMATES = {"graphs": 20.0, "memory": 20.0, "fit_step": 60.0, "overhead": 60.0, "adjoint": 40.0, "compiled": 60.0}
"""Seconds of the longer sections on an H100."""


def solves(settings: Settings) -> Part:
    device = settings.chosen_device()
    chosen = replace(plan(settings.quick, rounds=7), seconds=2.0)
    measurements = list(parts(chosen, device))
    if settings.quick:  # whose graphs and compiled steps take minutes on a CPU
        measurements = [each for each in measurements if each.section in ("synchronisations", "memory", "fit_step")]
    sections = [name for name in SECTIONS if any(each.section == name for each in measurements)]
    jobs = [
        Job(name, ESTIMATES.get(name, 15.0), partial(section, name, measurements, chosen, device), f"bench {name}")
        for name in sections
    ]
    return Part("solves", jobs, show)


def section(name: str, measurements: Sequence[Measurement], chosen: Plan, device: torch.device, seconds: float) -> Row:
    """A report of one section; what fails in it is recorded, and the others go on."""
    report = new_report(chosen, device) | {"errors": []}
    for measurement in measurements:
        if measurement.section == name:
            try:
                measurement.add_to(report)
            except Exception as error:  # whatever it is, the others can still be measured
                report["errors"].append({"part": measurement.title, "error": f"{type(error).__name__}: {error}"})
    return report


def show(rows: Rows) -> str:
    """The summary of the bench, of the sections that are there."""
    report: Report = {name: [] for name in SECTIONS}
    for row in rows.values():
        for name in SECTIONS:
            report[name] += row[name]
    errors = [f"{error['part']}: {error['error']}" for row in rows.values() for error in row["errors"]]
    return summary(report) + "".join(f"\n\nNot measured: {error}" for error in errors)
