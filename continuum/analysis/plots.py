"""Pictures of what the analysis found: the only door to matplotlib."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
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
    if any(row.logit_difference > 0 for row in solved):
        right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("field evaluations per sample")
        axes.set_xscale("log")
        _plain_ticks(axes, [row.evaluations for row in solved])
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


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Label a logarithmic axis at round numbers across the data, as plain numbers."""
    candidates = [m * 10**e for e in range(7) for m in (1, 2, 5)]
    low, high = min(values) / 1.2, max(values) * 1.2
    ticks = [tick for tick in candidates if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
