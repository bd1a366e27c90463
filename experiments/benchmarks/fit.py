"""A training step of `fit` against the plain loop over the same modules: the section of `continuum bench`, on its own.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.fit --out experiments/benchmarks/results/fit.json

writes the table into docs/performance.md too, if the results are the repository's. It takes a few minutes.
"""

import argparse
import logging
from pathlib import Path

import torch

from continuum.bench.fit import HEADINGS, fit_table
from continuum.bench.report import Report, fit_parts, new_report, plan
from continuum.files import write_json
from experiments.common import facts, publish, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "benchmarks" / "results"


def report(results: Report) -> str:
    machine = results["machine"]
    device = machine["processor"] if machine["device"] == "CPU" else machine["device"]
    return f"{table(HEADINGS, fit_table(results['fit_step']))}\n\n{facts({**machine, 'device': device})}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the small network alone: whether it runs")
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    device, chosen = torch.device(options.device), plan(options.quick)
    results = new_report(chosen, device)
    for part in fit_parts(chosen.steps, device):
        part.add_to(results)
        print(part.title, flush=True)
        write_json({name: results[name] for name in ("machine", "seed", "seconds", "fit_step")}, options.out)
    print(report(results))
    if options.out.resolve().parent == RESULTS:
        publish(ROOT / "docs" / "performance.md", "fit", report(results))


if __name__ == "__main__":
    main()
