"""The tables of experiments/README.md, in Markdown, from what the runs left in runs/ and experiments/results/.

python experiments/summary.py
"""

import csv
import json
import statistics
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


def reversible() -> None:
    content = json.loads((RESULTS / "reversible.json").read_text())
    rows = []
    for name, memory in content["memory_mib"].items():
        layers = list(memory["direct"])
        rows.append([name, *(f"{memory['direct'][n]:.1f} / {memory['reversible'][n]:.2f}" for n in layers)])
    table(["MiB, stored / rebuilt states", *(f"{n} layers" for n in layers)], rows)
    rows = [
        [
            name,
            f"{row['scale']:g}",
            row["dtype"],
            f"{row['undone']:.1e}",
            f"{row['gradient']:.1e}",
            f"{row['stored_gradient_against_float64']:.1e}" if row["dtype"] == "float32" else "-",
        ]
        for name, errors in content["errors_over_100_layers"].items()
        for row in errors
    ]
    table(["100 layers", "scale", "precision", "first state rebuilt", "gradient", "stored gradient against float64"], rows)


def refinement() -> None:
    runs = json.loads((RESULTS / "refine.json").read_text())["runs"]
    rows = []
    for name in dict.fromkeys(run["schedule"] for run in runs):
        mine = [run for run in runs if run["schedule"] == name]
        accuracies = [100 * run["accuracy"] for run in mine]
        minutes = [sum(run["seconds"]) / 60 for run in mine]
        rows.append(
            [
                name,
                f"{mine[0]['layers']}",
                ", ".join(f"{a:.2f}" for a in accuracies),
                f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}",
                f"{statistics.mean(run['loss'] for run in mine):.3f}",
                f"{statistics.mean(minutes):.1f}",
            ]
        )
    headings = ["schedule", "layers at the end", "test accuracy by seed (%)", "mean ± deviation", "test loss", "minutes of CPU"]
    table(headings, rows)


def noise() -> None:
    rows = []
    for path in sorted((RESULTS / "noise").glob("*.json"), reverse=True):
        runs = json.loads(path.read_text())["runs"]
        for name in dict.fromkeys(run["noise"] for run in runs):
            mine = [run for run in runs if run["noise"] == name]
            rows.append(
                [
                    mine[0]["network"],
                    name,
                    ", ".join(f"{100 * run['accuracy']:.2f}" for run in mine),
                    spread([100 * run["accuracy"] for run in mine], 2),
                    spread([run["train_loss"] for run in mine], 3),
                    spread([run["loss"] for run in mine], 3),
                    spread([run["loss"] - run["train_loss"] for run in mine], 3),
                    f"{statistics.mean(run['seconds'] for run in mine) / 60:.1f}",
                ]
            )
    headings = [
        "network",
        "noise",
        "test accuracy by seed (%)",
        "mean ± deviation",
        "training loss",
        "test loss",
        "gap",
        "minutes",
    ]
    table(headings, rows)


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def noise_cost() -> None:
    content = json.loads((RESULTS / "noise_cost.json").read_text())
    solvers = [name for name in content["step"][0] if name not in ("state", "noise", "backward")]
    rows = []
    for row in content["step"]:
        way = "forward and backward" if row["backward"] else "forward"
        rows.append([row["state"], row["noise"], way, *(f"{row[solver]:.2f}" for solver in solvers)])
    table(["state", "noise", "pass", *solvers], rows)
    saved, dropped = (100 * content["stochastic depth"][name] for name in ("saved", "dropped"))
    print(f"stochastic depth: {saved:.1f} % of the time saved, {dropped:.1f} % of the layers dropped\n")


def main() -> None:
    solvers()
    training()
    for name in (*NETWORKS, "published_resnet20"):
        comparison(name)
    refinement()
    reversible()
    noise()
    noise_cost()


if __name__ == "__main__":
    main()
