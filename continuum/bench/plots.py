"""The picture of `continuum bench`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import axes as mpl
from matplotlib.figure import Figure

from continuum.analysis.plots import plain_ticks, save
from continuum.bench.report import Report, ways_of


def plot_overhead(report: Report, path: str | os.PathLike[str]) -> None:
    """What a solve costs beyond its evaluations, on every field and by every library: one panel forward, one in training.

    A bar begins at 1, a solver that costs nothing; its line joins the quartiles.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 1)
    colors = {name: f"C{index}" for index, name in enumerate(ways_of(report["overhead"]))}
    for axes, direction, title in zip(
        panels, ("forward", "training"), ("forward, without gradient", "forward and backward"), strict=True
    ):
        rows = [row for row in report["overhead"] if row["pass"] == direction]
        _bars(axes, rows, colors)
        axes.set_title(title, fontsize="medium")
        axes.set_ylabel("time of the solve /\ntime of its evaluations")
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small", title="dopri5 of")
    machine = report["machine"]
    figure.supxlabel(f"{machine['processor'] if machine['device'] == 'CPU' else machine['device']}, torch {machine['torch']}")
    save(figure, path)


def _bars(axes: mpl.Axes, rows: Sequence[dict[str, Any]], colors: Mapping[str, str]) -> None:
    """A group of bars for each field, on a logarithmic axis, where half and twice as long are equally far from 1."""
    names = ways_of(rows)
    width = 0.8 / max(len(names), 1)
    values = [1.0]
    for index, name in enumerate(names):
        shown = [(place, row["ways"][name]) for place, row in enumerate(rows) if name in row["ways"]]
        places = [place + width * (index - (len(names) - 1) / 2) for place, _ in shown]
        ratios = [way["ratio"] for _, way in shown]
        spread = [[abs(way["quartiles"][end] - way["ratio"]) for _, way in shown] for end in (0, 1)]
        heights = [ratio - 1 for ratio in ratios]
        bars = axes.bar(places, heights, width, bottom=1, yerr=spread, color=colors[name], label=name, error_kw={"lw": 0.8})
        axes.bar_label(bars, [f"{ratio:.3g}" for ratio in ratios], rotation=90, fontsize=6, padding=3)
        values += ratios
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [f"{row['field']}\nbatch {row['batch']}" for row in rows])
    axes.set_yscale("log")
    plain_ticks(axes.yaxis, [*values, 1.5 * max(values)])  # with room for the labels
    axes.grid(alpha=0.3, axis="y")
