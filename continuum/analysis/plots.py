"""Pictures of what the analysis found: the door to matplotlib."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib import axes as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from continuum.analysis.compare import Row
from continuum.analysis.figures import Axes, Matrix, Panel
from continuum.analysis.weak import WeakReport
from continuum.files import whole_file

MARKERS = "osD^vP*X<>hd"
GAPS = {"h=1": "network and SDE", "h=1/2": "h = 1/2 and SDE", "evaluation": "evaluation and network with noise"}


def plot(panels: Sequence[Panel], path: str | os.PathLike[str]) -> None:
    """The panels side by side, in a file whose ending says which kind of picture it is."""
    save(_drawn(panels), path)


def svg(panels: Sequence[Panel]) -> str:
    """The panels side by side, as an <svg> element to put into a page; it refers to nothing outside."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "continuum"}):
        _drawn(panels).savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _drawn(panels: Sequence[Panel]) -> Figure:
    wide = [max(4.8, 1.6 + 0.75 * len(panel.columns)) if isinstance(panel, Matrix) else 4.8 for panel in panels]
    high = max([3.6, *(1.6 + 0.42 * len(panel.rows) for panel in panels if isinstance(panel, Matrix))])
    figure = Figure(figsize=(sum(wide), high), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False, width_ratios=wide)[0], strict=True):
        _matrix(axes, panel) if isinstance(panel, Matrix) else _lines(axes, panel)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.y)
    return figure


def _lines(axes: mpl.Axes, panel: Axes) -> None:
    for index, line in enumerate(panel.lines):
        color, marker = f"C{index % 10}", MARKERS[index % len(MARKERS)]
        style: dict[str, Any] = {
            "line": {"color": color, "marker": marker, "markersize": 4 if len(line.x) < 50 else 0},
            "points": {"color": color, "marker": marker, "linestyle": "none"},
            "reference": {"color": "0.4", "linestyle": "--"},
        }[line.style]
        axes.plot(line.x, line.y, label=line.name, **style)
    axes.set_xscale(panel.x_scale)
    axes.set_yscale(panel.y_scale)
    if panel.x_scale == "log" and (values := [x for line in panel.lines for x in line.x]):
        plain_ticks(axes.xaxis, values)
    elif all(float(x).is_integer() for line in panel.lines for x in line.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(panel.lines) > 1 or any(line.style == "reference" for line in panel.lines):
        axes.legend(fontsize="x-small" if len(panel.lines) > 5 else "small")


def _matrix(axes: mpl.Axes, panel: Matrix) -> None:
    axes.imshow(panel.values, aspect="auto", cmap="viridis")
    middle = (min(map(min, panel.values)) + max(map(max, panel.values))) / 2
    axes.set_xticks(range(len(panel.columns)), panel.columns, rotation=45, ha="right", fontsize="small")
    axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize="small")
    for row, values in enumerate(panel.values):
        for column, value in enumerate(values):
            color = "w" if value < middle else "k"  # on dark and on bright colours
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize="small", color=color)


def plot_comparison(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Accuracy, its difference from the training solver's, and the largest difference of logits, against field evaluations.

    Bars are 95% intervals over the images; those of the differences are paired by image.
    """
    solved = [row for row in rows if not row.error]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    middle.axhline(0, color="0.4", linestyle="--", linewidth=0.8)
    for index, row in enumerate(solved):
        style = {"marker": MARKERS[index % len(MARKERS)], "color": f"C{index % 10}", "markersize": 7, "linestyle": "none"}
        label = f"{row.solver} (training)" if index == 0 else row.solver
        _bar(left, row, "accuracy", {**style, "label": label})
        if index:
            _bar(middle, row, "difference", style)
        if row.logit_difference > 0:
            right.plot(row.evaluations, row.logit_difference, **style)
    left.set_ylabel("accuracy (%)")
    middle.set_ylabel("accuracy minus that of\nthe training solver (%)")
    right.set_ylabel("largest logit difference\nfrom the training solver")
    if differences := [row.logit_difference for row in solved if row.logit_difference > 0]:
        right.set_yscale("log")
        plain_ticks(right.yaxis, differences)
    for axes in (left, middle, right):
        axes.set_xlabel("field evaluations per sample")
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, [row.evaluations for row in solved])
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title="solver")
    save(figure, path)


def _bar(axes: mpl.Axes, row: Row, what: str, style: Mapping[str, Any]) -> None:
    """A value of the row with its interval, in %; the bars are no less than nothing where the value is not quite inside."""
    value, low, high = (100 * getattr(row, f"{what}{end}") for end in ("", "_low", "_high"))
    ends = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
    axes.errorbar(row.evaluations, value, ends, capsize=3, elinewidth=1, **style)


def plot_steps(rows: Sequence[Row], path: str | os.PathLike[str]) -> bool:
    """The size of each step that the adaptive solvers chose, along the depth of each flow; False if there is none."""
    adaptive = [row for row in rows if row.grids and _uneven(row)]
    if not adaptive:
        return False
    flows = len(adaptive[0].grids)
    figure = Figure(figsize=(max(6.0, 3.6 * flows + 2.4), 3.6), layout="constrained")
    panels = figure.subplots(1, flows, squeeze=False, sharey=True)[0]
    for number, axes in enumerate(panels):
        for index, row in enumerate(adaptive):
            grid = row.grids[number]
            # Never below rounding, for a logarithmic axis.
            steps = [max(b - a, 1e-12) for a, b in pairwise(grid)]
            axes.stairs(steps, grid, baseline=None, color=f"C{index % 10}", label=row.solver if number == 0 else None)
        axes.set_title(f"flow {number}", fontsize="medium")
        axes.set_xlabel("depth (layers)")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("step size (layers)")
    figure.legend(loc="outside right upper", fontsize="small", title="adaptive solver")
    save(figure, path)
    return True


def plot_weak(report: WeakReport, path: str | os.PathLike[str]) -> None:
    """The third moment of every layer's increment beside +-sqrt(h), and the weak errors with their 95% intervals."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _third_moments(left, report)
    _gaps(right, report)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save(figure, path)


def _third_moments(axes: mpl.Axes, report: WeakReport) -> None:
    bounds = [layer.bound for layer in report.layers]
    edges = [place - 0.5 for place in range(len(bounds) + 1)]
    band = {"baseline": [-bound for bound in bounds], "fill": True, "color": "C2", "alpha": 0.25}
    axes.stairs(bounds, edges, label=r"$\pm\sqrt{h}$, h = 1 / layers of the flow", **band)
    noisy = [(place, layer) for place, layer in enumerate(report.layers) if layer.noisy]
    for small, color, label in ((True, "C0", "within"), (False, "C3", "beyond")):
        chosen = [(place, layer) for place, layer in noisy if layer.small == small]
        if chosen:
            third = [layer.moments[2] for _, layer in chosen]
            bars = [layer.confidence[2] for _, layer in chosen]
            axes.errorbar([place for place, _ in chosen], third, bars, fmt="o", color=color, capsize=3, label=label)
    if silent := [place for place, layer in enumerate(report.layers) if not layer.noisy]:
        axes.plot(silent, [0.0] * len(silent), "x", color="0.4", label="no noise")
    axes.set_xlabel("layer, through all flows")
    axes.set_ylabel(r"third moment $E\,\xi^3$ of the increment")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _gaps(axes: mpl.Axes, report: WeakReport) -> None:
    largest = report.largest()
    for index, (between, label) in enumerate(GAPS.items()):
        gaps = [gaps[between] for gaps in largest.values()]
        errors, halves = [abs(gap.error) for gap in gaps], [gap.confidence for gap in gaps]
        # On a logarithmic axis an interval that holds zero goes down to the edge.
        lower = [min(half, error * (1 - 1e-6)) for half, error in zip(halves, errors, strict=True)]
        places = [place + 0.2 * (index - 1) for place in range(len(gaps))]
        axes.errorbar(places, errors, (lower, halves), fmt=MARKERS[index], color=f"C{index}", capsize=3, label=label)
    if errors := [abs(gap.error) for gaps in largest.values() for gap in gaps.values() if gap.error]:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(errors) / 3)
    axes.set_xticks(range(len(largest)), [test.replace(" ", "\n") for test in largest])
    axes.set_xlabel("g (of the class furthest from the SDE at h = 1)")
    axes.set_ylabel("|difference of E g|, with 95% interval")


def _uneven(row: Row) -> bool:
    return row.rejected > 0 or any(
        not math.isclose(b - a, grid[1] - grid[0], rel_tol=1e-6) for grid in row.grids for a, b in pairwise(grid)
    )


def plain_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Label a logarithmic axis at 1, 2 and 5 across the data (only at powers of ten where they span many decades)."""
    low, high = min(values) / 1.25, max(values) * 1.25
    digits = (1, 2, 5) if high < 2000 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-16, 16) for digit in digits if low <= digit * 10.0**power <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
    axis.set_view_interval(low, high, ignore=True)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
