"""What there is to do: a part of the queue is a list of jobs, each of which measures one row, and how its rows are shown."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from continuum.analysis.figures import Panel
from experiments.common import Row, machine

Rows = Mapping[str, Row]
"""The rows of a part by the names of their jobs."""


@dataclass(frozen=True)
class Settings:
    """What a call is told: the folders of the images (none: random ones) and results, the device, and whether all is small."""

    data: str | None
    out: str
    device: str
    quick: bool

    @property
    def folder(self) -> Path:
        """The results of this card; what is small has a folder of its own."""
        name = "".join(c if c.isalnum() else "_" for c in self.machine["device"].lower())
        return Path(self.out) / (f"{name}_quick" if self.quick else name)

    @property
    def machine(self) -> dict[str, Any]:
        facts = machine()
        return facts if self.device == "cuda" else {**facts, "device": "CPU"}

    def checkpoints(self, job: str) -> Path:
        """Where a training that is not over lies; git ignores it."""
        return self.folder / "checkpoints" / "".join(c if c.isalnum() else "_" for c in job)

    def text(self) -> str:
        return json.dumps(asdict(self))

    def chosen_device(self) -> torch.device:
        return torch.device(self.device)


def nothing(rows: Rows) -> Sequence[Panel]:
    """No figure."""
    return ()


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        name: of its row.
        seconds: how long it takes in all, where no job of its kind has been measured on the card.
        measure: makes the row, within so many seconds. A job of several pieces may end sooner: its row says in `share` how
            much of it is done, and it goes on from there when it is called again.
        kind: jobs of one kind take equally long.
        pieces: so many equal ones; it can end after each.
    """

    name: str
    seconds: float
    measure: Callable[[float], Row]
    kind: str
    pieces: int = 1


@dataclass(frozen=True)
class Part:
    """Jobs of one question, their table in Markdown, their figure, and the folder in --data that they read."""

    name: str
    jobs: Sequence[Job]
    show: Callable[[Rows], str]
    figure: Callable[[Rows], Sequence[Panel]] = nothing
    data: str = ""
