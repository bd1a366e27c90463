"""The results of a part on a card, in a file that is whole at any moment: rows, errors, and how long each kind of job takes."""

import json
import shutil
from pathlib import Path
from typing import Any

from continuum.files import write_json
from experiments.common import Row
from experiments.gpu.jobs import Job, Settings

START = 15.0
"""Seconds in which a process starts and has its images."""

TRIES = 2
"""A job that was begun so often, and of which nothing came back, has failed."""


class Results:
    """What is known of the jobs of a part. A file that is damaged is kept beside, under another name, and said."""

    def __init__(self, part: str, settings: Settings) -> None:
        self.settings = settings
        self.path = settings.folder / f"{part}.json"
        self.content: dict[str, Any] = {"part": part, "machine": settings.machine, **{name: {} for name in KEPT}}
        if self.path.exists():
            try:
                self.content = read(self.path)
            except ValueError as error:
                aside = _free(self.path)
                self.path.rename(aside)
                print(f"{self.path} is damaged ({error}): kept as {aside.name}, and measured anew", flush=True)

    @property
    def rows(self) -> dict[str, Row]:
        return self.content["rows"]

    @property
    def errors(self) -> dict[str, str]:
        return self.content["errors"]

    def state(self, job: Job) -> str:
        """done, failed, or how much is done."""
        if job.name in self.errors:
            return "failed"
        share = self.share(job)
        return "done" if share == 1 else f"{100 * share:.0f} %" if share else "open"

    def share(self, job: Job) -> float:
        return self.rows[job.name].get("share", 1) if job.name in self.rows else 0

    def left(self, job: Job) -> float:
        """The seconds until it is done, by those of its kind where one has been measured."""
        return (1 - self.share(job)) * self.content["seconds"].get(job.kind, job.seconds)

    def least(self, job: Job) -> float:
        """The seconds without which it need not begin."""
        whole = self.content["seconds"].get(job.kind, job.seconds)
        return whole if job.pieces == 1 else START + whole / job.pieces

    def begin(self, job: Job) -> None:
        """Note that it is begun, in case this process does not live to see its end."""
        self.errors.pop(job.name, None)
        begun = self.content["begun"]
        begun[job.name] = begun.get(job.name, 0) + 1
        self.write()

    def lost(self, job: Job) -> bool:
        """Whether it was begun often enough, without an end."""
        return self.content["begun"].get(job.name, 0) >= TRIES

    def end(self, job: Job, found: Row | str, elapsed: float) -> None:
        """Keep its row, or its error."""
        self.content["begun"].pop(job.name, None)
        if isinstance(found, str):
            self.errors[job.name] = found
        else:
            before = self.share(job)
            self.rows[job.name] = found
            if gained := self.share(job) - before:
                self.content["seconds"][job.kind] = round(elapsed / gained, 1)
        self.write()
        if self.state(job) == "done":
            shutil.rmtree(self.settings.checkpoints(job.name), ignore_errors=True)

    def write(self) -> None:
        write_json(self.content, self.path)


KEPT = ("rows", "errors", "seconds", "begun")


def read(path: Path) -> dict[str, Any]:
    """What `Results` has written.

    Raises:
        ValueError: it is something else.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in (*KEPT, "machine")):
        raise ValueError(f"it has not {', '.join(KEPT)} and machine")
    return content


def _free(path: Path) -> Path:
    """A name beside `path` that is not taken."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged{number}{path.suffix}")).exists():
        number += 1
    return aside
