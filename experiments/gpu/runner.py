"""Takes the jobs of all parts in order: none that is done, none that cannot end in the time, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from experiments.common import Row
from experiments.gpu.jobs import Job, Part, Settings
from experiments.gpu.results import Results

CLOSING = 20.0
"""Seconds in which a training that has been told to end is evaluated and written."""

Perform = Callable[[Sequence[Job], float], Sequence[Row | str]]
"""Does these jobs at once within so many seconds: the row of each, or what went wrong."""


def run(parts: Sequence[Part], settings: Settings, seconds: float, perform: Perform, only: str | None = None) -> None:
    """Do what can be done in so many seconds. A job that has failed is left alone, unless it is the one that is asked for."""
    end = time.perf_counter() + seconds
    for part in parts:
        results = Results(part.name, settings)
        chosen = [job for job in part.jobs if only in (None, part.name, job.name)]
        waiting = [job for job in chosen if results.state(job) not in ("done", *([] if only else ["failed"]))]
        while waiting:
            jobs = together(waiting, at_once(settings))
            waiting = waiting[len(jobs) :]
            left, least = end - time.perf_counter(), max(map(results.least, jobs))
            if any(map(results.lost, jobs)) and not only:
                for job in jobs:
                    results.end(job, "it was begun twice, and did not come to an end", 0.0)
                continue
            if least > left:
                print(f"{title(part, jobs)}: left out, {left:.0f} s remain and it takes {least:.0f}", flush=True)
                continue
            print(f"{title(part, jobs)}: begun, {left:.0f} s remain", flush=True)
            for job in jobs:
                results.begin(job)
            start = time.perf_counter()
            found = perform(jobs, left)
            for job, row in zip(jobs, found, strict=True):
                results.end(job, row, time.perf_counter() - start)
                print(f"{part.name}, {job.name}: {results.errors.get(job.name, results.state(job))}", flush=True)


def title(part: Part, jobs: Sequence[Job]) -> str:
    return f"{part.name}, {' and '.join(job.name for job in jobs)}"


def together(waiting: Sequence[Job], at_once: int) -> list[Job]:
    """The next job, and if it is a training, those behind it that are of its kind."""
    first = waiting[0]
    alike = list(takewhile(lambda job: job.kind == first.kind, waiting))
    return alike[: at_once if first.pieces > 1 else 1]


def at_once(settings: Settings) -> int:
    """How many trainings share the card: three, if it was measured that three at once see more images a second than one."""
    row = Results("epochs", settings).rows.get("three seeds")
    return 3 if row and row["three_at_once"] > 1.1 * row["one_alone"] else 1


def in_processes(settings: Settings) -> Perform:
    """Each job in a process of its own: what it compiles, corrupts or forgets to free ends with it, and it can be stopped."""

    def perform(jobs: Sequence[Job], seconds: float) -> list[Row | str]:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            files = [Path(folder) / f"{number}.json" for number in range(len(jobs))]
            started = [_started(settings, job, seconds - CLOSING, file) for job, file in zip(jobs, files, strict=True)]
            try:
                return [
                    _found(process, file, seconds - (time.perf_counter() - start))
                    for process, file in zip(started, files, strict=True)
                ]
            finally:
                for process in started:
                    _kill(process)

    return perform


def _started(settings: Settings, job: Job, seconds: float, file: Path) -> subprocess.Popen[bytes]:
    end = time.time() + seconds  # by the clock that both read: the process has yet to start
    command = [sys.executable, "-m", "experiments.gpu.worker", settings.text(), job.name, str(end), str(file)]
    with open(file.with_suffix(".errors"), "wb") as errors:
        return subprocess.Popen(command, stdout=errors, stderr=errors, start_new_session=True)


def _found(process: subprocess.Popen[bytes], file: Path, seconds: float) -> Row | str:
    try:
        status = process.wait(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        return f"stopped: it was not done after the time that remained, {seconds:.0f} s"
    if file.exists():
        return json.loads(file.read_text())
    lines = file.with_suffix(".errors").read_text(errors="replace").strip().splitlines()
    return f"exit status {status}: {' '.join(lines[-1:])}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
