"""What only a GPU can say, asked in one command that goes on where the last call stopped.

    python -m experiments.gpu --data data --minutes 9 --out experiments/gpu/results

takes the parts truth, solves, epochs, momentum, noise, infinite depth and fashion in this order. What is done is left out, and
so is what cannot end in the time; a training that does not fit is cut after an epoch, and the next call goes on from its
checkpoint. A job that fails is recorded with its error, and tried again where --only names it. `--data` holds cifar10/ (train/
and test/, or torchvision's files) and FashionMNIST/. `--quick --device cpu` tries all in small, anywhere, on random images.
"""

import argparse
from pathlib import Path

import torch

from experiments.gpu.jobs import Part, Settings
from experiments.gpu.parts import all_parts
from experiments.gpu.publish import publish_all
from experiments.gpu.results import Results
from experiments.gpu.runner import in_processes, run

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = Path("runs") / "gpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of cifar10/ and FashionMNIST/; what it does not hold is left out")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="nothing is begun that takes longer (default: 9); 0 only shows"
    )
    parser.add_argument("--out", help="folder of the results (default: experiments/gpu/results)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", metavar="NAME", help="this part or job alone, and again if it has failed")
    parser.add_argument("--list", action="store_true", help="what is done, what is next, and how long it takes")
    parser.add_argument("--quick", action="store_true", help="small networks, few epochs: whether it runs")
    options = parser.parse_args()
    settings = Settings(options.data, options.out or str(QUICK if options.quick else RESULTS), options.device, options.quick)
    parts = all_parts(settings)
    names = [name for part in parts for name in (part.name, *(job.name for job in part.jobs))]
    if options.only not in (None, *names):
        parser.error(
            f"--only {options.only!r} is no part or job: give one of {', '.join(part.name for part in parts)}, or see --list"
        )
    if options.list:
        print(listing(parts, settings))
        return
    run(available(parts, settings), settings, 60 * options.minutes, in_processes(settings), options.only)
    publish_all(parts, Path(settings.out), published=Path(settings.out).resolve() == RESULTS)


def available(parts: list[Part], settings: Settings) -> list[Part]:
    """The parts whose images are there; the others are named."""
    found = []
    for part in parts:
        if settings.quick or not part.data or (settings.data and (Path(settings.data) / part.data).is_dir()):
            found.append(part)
        else:
            print(f"{part.name}: left out, there is no folder {part.data}/ in --data {settings.data}", flush=True)
    return found


def listing(parts: list[Part], settings: Settings) -> str:
    """A line a job."""
    lines = []
    for part in parts:
        results = Results(part.name, settings)
        for job in part.jobs:
            state = results.state(job)
            time = "" if state == "done" else f"{results.left(job):7.0f} s"
            lines.append(f"{part.name:15} {job.name:42} {state:8} {time:>9}  {results.errors.get(job.name, '')}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
