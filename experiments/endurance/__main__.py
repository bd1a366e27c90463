"""What nobody should trust, at length: texts, configurations and files by the thousand, kills with resume, solves for leaks.

    OMP_NUM_THREADS=1 python -m experiments.endurance --out experiments/endurance/results/endurance.json

takes about an hour on one core, and goes on where it was interrupted. Each part counts what it should not have seen;
`--share 0.01` tries all of it out.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import continuum
from continuum.cli import main as command
from continuum.files import write_json
from continuum.models.archive import CheckpointError
from continuum.solvers import Solver, parse
from experiments.common import facts, machine, publish, table
from experiments.endurance import hostile

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false")
SHORT = ("--trainer.max_steps", "1", "--trainer.limit_val_batches", "1")
LONG = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "100000")
ENDLESS = (*LONG, "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1")
SLOW = 5.0
"""Seconds of processor time that no refusal takes."""
MEMORY = 2**20
"""KiB that no refusal takes beyond what the process had."""


def texts(count: int) -> Counter[str]:
    """Texts of solvers, each a solver or a ValueError."""
    found, draw = Counter[str](), random.Random(0)
    for _ in range(count):
        text = hostile.solver_text(draw)
        found[judged(lambda text=text: isinstance(parse(text), Solver), ValueError)] += 1
    return found


def judged(call: Callable[[], object], *errors: type[Exception]) -> str:
    """How a call ends: well, refused by one of `errors`, or in a way that it should not, too slow or too large included."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        call()
        ended = "done"
    except errors as error:
        ended = "refused" if "\n" not in str(error) and str(error) else "more than a line"
    except BaseException as error:
        ended = type(error).__name__
    if time.process_time() - start > SLOW:
        ended = f"over {SLOW:g} s"
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > MEMORY:
        ended = "over 1 GiB"
    return "imported" if hostile.PLANTED in sys.modules else ended


def commanded(arguments: list[str]) -> None:
    """Run a command; a refusal on one line with status 2, or a failed solve with status 1, is a CheckpointError here."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            command(arguments)
    except SystemExit as ended:
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("continuum:")]
        if ended.code in (1, 2) and len(lines) == 1 and "Traceback" not in errors.getvalue():
            raise CheckpointError(lines[0]) from None
        if ended.code not in (0, None):
            raise RuntimeError(f"status {ended.code}") from None


def configurations(count: int) -> Counter[str]:
    """Configurations of `fit`, each trained by for a step or refused."""
    found, draw = Counter[str](), random.Random(0)
    for _ in range(count):
        Path("config.yaml").write_bytes(hostile.configuration(draw).encode())
        found[judged(lambda: commanded(["fit", "--config", "config.yaml", *QUIET, *SHORT]), CheckpointError)] += 1
    return found


def damaged_files(count: int) -> Counter[str]:
    """Bytes changed at random: an error, or the weights as they were."""
    path = Path("checkpoints/last.ckpt")
    whole, weights = path.read_bytes(), continuum.load(path).state_dict()
    found, draw, file = Counter[str](), random.Random(0), Path("damaged.ckpt")

    def load() -> None:
        loaded = continuum.load(file).state_dict()
        if not all(torch.equal(tensor, loaded[name]) for name, tensor in weights.items()):
            raise RuntimeError("other weights")

    for _ in range(count):
        file.write_bytes(hostile.damaged(whole, draw))
        found[judged(load, CheckpointError)] += 1
    return found


COMMANDS: tuple[Callable[[str], list[str]], ...] = (
    lambda file: ["test", *QUIET, "--ckpt_path", file, "--trainer.limit_test_batches", "1"],
    lambda file: ["predict", *QUIET, "--ckpt_path", file, "--trainer.limit_predict_batches", "1"],
    lambda file: ["fit", "--config", "right.yaml", *QUIET, "--ckpt_path", file, "--trainer.max_steps", "2"],
    lambda file: ["compare", file, "--solver", "euler:h=1", "--images", "4", "--out", "compare"],
    lambda file: ["convert", file, "out.pth"],
    lambda file: ["verify", file],
)


def hostile_files(count: int) -> Counter[str]:
    """Files that state what is not so, each through one of six commands."""
    content = torch.load("checkpoints/last.ckpt", weights_only=True)
    found, draw, file = Counter[str](), random.Random(0), Path("hostile.ckpt")
    for number in range(count):
        file.write_bytes(hostile.written(hostile.misstated(content, draw)))
        found[judged(lambda number=number: commanded(COMMANDS[number % 6](str(file))), CheckpointError)] += 1
    return found


def kills(count: int) -> Counter[str]:
    """Trainings killed at random moments, which go on from the last checkpoint, on two file systems; whether it is whole."""
    found, draw = Counter[str](), random.Random(0)
    for number in range(count):
        base = "/dev/shm" if number % 2 and Path("/dev/shm").is_dir() else "."
        folder = Path(base, f"continuum-kills-{os.getpid()}-{number // 10}")
        folder.mkdir(exist_ok=True)
        (folder / "right.yaml").write_text(Path("right.yaml").read_text())
        last = folder / "checkpoints" / "last.ckpt"
        resume = ["--ckpt_path", str(last.relative_to(folder))] if last.exists() else []
        code = "from continuum.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "fit", "--config", "right.yaml", *QUIET, *ENDLESS, *resume],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        before = last.stat().st_mtime if last.exists() else 0.0
        while process.poll() is None and not (last.exists() and last.stat().st_mtime > before):
            time.sleep(0.02)
        time.sleep(draw.random())
        ended_itself = process.poll() is not None
        process.kill()
        process.communicate()
        try:
            ended = "ended by itself" if ended_itself else "whole"
            for checkpoint in last.parent.glob("*.ckpt"):
                continuum.load(checkpoint)
        except (CheckpointError, FileNotFoundError) as error:
            ended = f"lost: {error}"
        found[ended] += 1
        if number % 10 > 7 or number >= count - 2:
            subprocess.run(["rm", "-r", str(folder)], check=False)
    return found


def solves(count: int) -> Counter[str]:
    """Solves of each kind in turn; memory at the end against that after the first tenth."""
    from continuum import MLP, Flow
    from continuum.noise import StochasticDepth

    names = ("rk4:h=0.25", "dopri5", "dopri5:gradient=checkpoint", "dopri5:gradient=adjoint", "dopri5:engine=torchdiffeq")
    noisy = ("euler_maruyama:h=0.25", "brownian:method=srk,h=0.25", "brownian:method=euler,h=0.25,gradient=adjoint")
    flows = [Flow(MLP(8, 16), name, 1) for name in names] + [Flow(StochasticDepth(MLP(8, 16), 0.5), name, 1) for name in noisy]
    x, settled = torch.randn(256, 8), (0, 0)
    for number in range(count):
        flows[number % len(flows)](x).sum().backward()
        if number == count // 10:
            settled = resident(), alive()
    grown, more = resident() - settled[0], alive() - settled[1]
    return Counter({f"{grown} KiB and {more} tensors more than after a tenth": count})


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def alive() -> int:
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


PARTS: dict[str, tuple[Callable[[int], Counter[str]], int]] = {
    "texts of solvers": (texts, 20_000),
    "damaged files": (damaged_files, 4_000),
    "files that state what is not so": (hostile_files, 1_000),
    "kills with resume": (kills, 100),
    "solves": (solves, 10_000),
    "configurations": (configurations, 2_000),
}


@contextlib.contextmanager
def trained() -> Iterator[None]:
    """A folder with a checkpoint of a training, its configuration, and a module that files and configurations try to import."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        Path(f"{hostile.PLANTED}.py").write_text("class Evil: pass\ndef evil(*a): return a\n")
        sys.argv = ["continuum"]
        with contextlib.redirect_stdout(io.StringIO()):
            command(["fit", *QUIET, "--trainer.max_steps", "1"])
        Path("config.yaml").rename("right.yaml")
        try:
            yield
        finally:
            os.chdir(here)


def report(content: dict[str, Any]) -> str:
    rows = [
        [name, f"{part['count']:,}", part["ended"], f"{part['seconds'] / 60:.0f}"] for name, part in content["parts"].items()
    ]
    return f"{table(['what', 'how many', 'how they ended', 'minutes'], rows)}\n\n{facts(content['machine'])}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of the counts")
    parser.add_argument("--publish", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    out, root = options.out.resolve(), Path.cwd()
    content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"machine": machine(), "parts": {}}
    with trained():
        for name, (part, count) in PARTS.items():
            if name in content["parts"]:  # from an interrupted call
                continue
            start, count = time.perf_counter(), max(2, round(options.share * count))
            found = part(count)
            ended = ", ".join(f"{number:,} {way}" for way, number in found.most_common())
            content["parts"][name] = {"count": count, "ended": ended, "seconds": round(time.perf_counter() - start)}
            print(f"{name}: {ended}", flush=True)
            write_json(content, out)
    if options.publish:
        publish(root / "docs" / "reliability.md", "endurance", report(content))


if __name__ == "__main__":
    main()
