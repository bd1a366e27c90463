"""Three networks trained on JPEG CIFAR-10, and a published one, each compared under many solvers.

    OMP_NUM_THREADS=1 python -m experiments.cifar10 [--published cifar10-resnet20-postact-optionA.th]

Started again, training goes on where it stopped. The images lie in data/cifar10, as the configs say. What each training left is
written to results/, which the tables in the README are made of.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from continuum.cli import main as continuum
from continuum.files import write_json
from experiments.common import publish, table

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
HISTORY = RESULTS / "training.json"
PUBLISHED = "published_resnet20"

FINE = "euler:h=0.5 euler:h=0.25 euler:h=0.125 midpoint:h=0.5 rk4:h=1 rk4:h=0.25 dopri5:rtol=1e-2,atol=1e-2"
NETWORKS = {
    "preresnet20": f"{FINE} dopri5:rtol=1e-4,atol=1e-4",
    "lm_resnet20": f"{FINE} dopri5:rtol=1e-4,atol=1e-4",
    "odenet": "euler:h=1 euler:h=0.25 euler:h=0.0625 midpoint:h=0.25 rk4:h=1 rk4:h=0.25 bosh3:rtol=1e-2,atol=1e-2 "
    "dopri5:rtol=1e-1,atol=1e-1 dopri5:rtol=1e-4,atol=1e-4",
}
"""The solvers that each network is compared under, beside that of its training."""


def trained(name: str) -> dict[str, Any]:
    """Train a network, and return accuracy after each epoch in % and minutes by the clock, from what Lightning has logged."""
    continuum(["fit", "--config", str(FOLDER / f"{name}.yaml"), "--ckpt_path", "last"])
    accuracies: list[float] = []
    seconds = 0.0
    for file in sorted(Path("runs", name).glob("events*")):
        events = EventAccumulator(str(file))
        events.Reload()
        if "val/accuracy" in events.Tags()["scalars"]:
            found = events.Scalars("val/accuracy")
            accuracies += [round(100 * event.value, 1) for event in found]
            seconds += found[-1].wall_time - events.FirstEventTimestamp()
    return {"accuracies": accuracies, "minutes": round(seconds / 60)}


def compare(checkpoint: str, name: str, solvers: str, *options: str) -> None:
    chosen = [argument for solver in solvers.split() for argument in ("--solver", solver)]
    continuum(["compare", checkpoint, "--out", str(RESULTS / name), *options, *chosen])


def rows_of(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name / "compare.csv") as file:
        return list(csv.DictReader(file))


def training() -> str:
    history = json.loads(HISTORY.read_text())
    rows = []
    for name in NETWORKS:
        epochs = ", ".join(f"{accuracy:.1f}" for accuracy in history[name]["accuracies"])
        rows.append([name, epochs, f"{100 * float(rows_of(name)[0]['accuracy']):.2f}", str(history[name]["minutes"])])
    return table(["network", "validation accuracy after each epoch (%)", "test accuracy, 2,000 images (%)", "minutes"], rows)


def comparison(name: str) -> str:
    formats = {
        "evaluations": "{:.1f}",
        "accepted": "{:.1f}",
        "rejected": "{:.1f}",
        "accuracy": "{:.2%}",
        "loss": "{:.3f}",
        "agreement": "{:.1%}",
        "logit_difference": "{:.2e}",
        "milliseconds": "{:.2f}",
        "memory": "{:.0f}",
    }
    rows = []
    for row in rows_of(name):
        numbers = [text.format(float(row[key])).removesuffix("%") for key, text in formats.items() if not row["error"]]
        rows.append([f"`{row['solver']}`", *(numbers or ["failed", *["-"] * 8])])
    steps = ["evaluations", "accepted", "rejected"]
    return table(["solver", *steps, "accuracy %", "loss", "agreement %", "logit difference", "ms/image", "MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", help="a published ResNet-20 to convert and compare, on all test images")
    options = parser.parse_args()
    if options.published:
        solvers = f"{FINE} dopri5:rtol=1e-3,atol=1e-3"
        continuum(["convert", options.published, "runs/resnet20.pt"])
        images = ["--data", "ImageFolder", "--data.root", "data/cifar10", "--data.normalisation", "imagenet"]
        compare("runs/resnet20.pt", PUBLISHED, solvers, *images)
    else:
        write_json({name: trained(name) for name in NETWORKS}, HISTORY)
        for name, solvers in NETWORKS.items():
            compare(f"runs/{name}/checkpoints/last.ckpt", name, solvers, "--images", "2000")
    publish(FOLDER / "README.md", "training", training())
    for name in (*NETWORKS, PUBLISHED):
        publish(FOLDER / "README.md", name, comparison(name))


if __name__ == "__main__":
    main()
