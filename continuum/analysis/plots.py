"""Pictures of what the analysis found: the only door to matplotlib."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axis import Axis
from matplotlib.figure import Figure

from continuum.analysis.compare import Row
from continuum.files import whole_file

MARKERS = "osD^vP*X<>hd"


def draw_comparison(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Accuracy, and the largest difference of the logits from the training solver's, against field evaluations."""
    solved = [row for row in rows if not row.error]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, row in enumerate(solved):
        style = {"marker": MARKERS[index % len(MARKERS)], "color": f"C{index % 10}", "markersize": 8, "linestyle": "none"}
        label = f"{row.solver} (training)" if index == 0 else row.solver
        left.plot(row.evaluations, 100 * row.accuracy, label=label, **style)
        if row.logit_difference > 0:
            right.plot(row.evaluations, row.logit_difference, **style)
    left.set_ylabel("accuracy (%)")
    right.set_ylabel("largest logit difference\nfrom the training solver")
    if differences := [row.logit_difference for row in solved if row.logit_difference > 0]:
        right.set_yscale("log")
        _plain_ticks(right.yaxis, differences)
    for axes in (left, right):
        axes.set_xlabel("field evaluations per sample")
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis, [row.evaluations for row in solved])
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title="solver")
    _save(figure, path)


def draw_steps(rows: Sequence[Row], path: str | os.PathLike[str]) -> bool:
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
    _save(figure, path)
    return True


def _uneven(row: Row) -> bool:
    return row.rejected > 0 or any(
        not math.isclose(b - a, grid[1] - grid[0], rel_tol=1e-6) for grid in row.grids for a, b in pairwise(grid)
    )


def _plain_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Label a logarithmic axis at 1, 2 and 5 across the data (only at powers of ten where they span many decades)."""
    low, high = min(values) / 1.25, max(values) * 1.25
    digits = (1, 2, 5) if high < 2000 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-16, 16) for digit in digits if low <= digit * 10.0**power <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
    axis.set_view_interval(low, high, ignore=True)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
