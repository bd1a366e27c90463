"""Figures as numbers: what an analysis has to show, before anything is drawn. `plots.plot` and `plots.svg` draw them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Line:
    """Points (x, y) under a name: joined, as markers alone, or as a dashed line to compare with."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["line", "points", "reference"] = "line"


@dataclass(frozen=True)
class Axes:
    """Lines between two axes, which say what they measure and in which unit."""

    title: str
    x: str
    y: str
    lines: Sequence[Line] = field(default_factory=list)
    x_scale: Literal["linear", "log"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"


@dataclass(frozen=True)
class Matrix:
    """Numbers by row and column, drawn as colours with the numbers written in them."""

    title: str
    x: str
    y: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]


Panel = Axes | Matrix
