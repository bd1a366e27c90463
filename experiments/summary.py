"""The tables of experiments/README.md, in Markdown, from what the runs left in runs/ and experiments/results/.

python experiments/summary.py
"""

import csv
import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parent.parent / "runs"
NETWORKS = ("preresnet20", "lm_resnet20", "odenet")


def table(headings: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(headings) + " |")
    print("| --- |" + " ---: |" * (len(headings) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def training() -> None:
    """Accuracy after each epoch, and how long the run took by the clock."""
    rows = []
    for name in NETWORKS:
        accuracies: list[float] = []
        seconds = 0.0
        for file in sorted((RUNS / name).glob("events*")):
            events = EventAccumulator(str(file))
            events.Reload()
            if "val/accuracy" in events.Tags()["scalars"]:
                found = events.Scalars("val/accuracy")
                accuracies += [event.value for event in found]
                seconds += found[-1].wall_time - events.FirstEventTimestamp()
        with open(RESULTS / f"cifar10_{name}" / "compare.csv") as results:
            tested = next(csv.DictReader(results))
        epochs = ", ".join(f"{100 * a:.1f}" for a in accuracies)
        rows.append([name, epochs, f"{100 * float(tested['accuracy']):.2f}", f"{seconds / 60:.0f}"])
    table(["network", "validation accuracy after each epoch (%)", "test accuracy, 2,000 images (%)", "minutes"], rows)


def comparison(name: str) -> None:
    with open(RESULTS / f"cifar10_{name}" / "compare.csv") as file:
        found = list(csv.DictReader(file))
    rows = []
    for row in found:
        numbers = [
            f"{float(row['evaluations']):.1f}",
            f"{float(row['accepted']):.1f}",
            f"{float(row['rejected']):.1f}",
            f"{100 * float(row['accuracy']):.2f}",
            f"{float(row['loss']):.3f}",
            f"{100 * float(row['agreement']):.1f}",
            f"{float(row['logit_difference']):.2e}",
            f"{float(row['milliseconds']):.2f}",
            f"{float(row['memory']):.0f}",
        ]
        rows.append([f"`{row['solver']}`", *(numbers if not row["error"] else ["failed", *["-"] * 8])])
    headings = [
        "solver",
        "evaluations",
        "accepted",
        "rejected",
        "accuracy %",
        "loss",
        "agreement %",
        "logit difference",
        "ms/image",
        "MiB",
    ]
    print(f"`{name}`:\n")
    table(headings, rows)


def solvers() -> None:
    content = json.loads((RESULTS / "solvers.json").read_text())
    errors = content["errors_in_tolerances"]
    tolerances = list(errors["dopri5"])
    rows = [
        [f"`{method}`", *(f"{found[t]:.3g}" if t in found else "-" for t in tolerances)] for method, found in errors.items()
    ]
    table(["error / tolerance", *tolerances], rows)
    rows = [
        [
            tolerance,
            f"{row['evaluations']:g} / {row['evaluations_without']:g}",
            f"{row['error']:.1e} / {row['error_without']:.1e}",
            f"{row['smallest_error_ratio']:.0f}",
        ]
        for tolerance, row in content["knots"].items()
    ]
    table(["tolerance", "evaluations, knots known / not", "error, known / not", "smallest ratio of errors"], rows)


def main() -> None:
    solvers()
    training()
    for name in NETWORKS:
        comparison(name)


if __name__ == "__main__":
    main()
