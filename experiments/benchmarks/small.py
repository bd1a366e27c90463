"""What lies around the evaluations of a small field: a solve by dopri5 as a ratio to a bare loop of thirty lines.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.small --out experiments/benchmarks/results/small.json

The field is 2-64-2 with a tanh, for 128 states and tolerances of 1e-5. Each library alternates with the bare loop alone; the
ratio is the median over pairs of neighbours, of three rounds the median with the smallest and the largest. diffrax, under
jax.jit, is measured where it is installed. "Evaluations, one graph" are as many as a solve needs, compiled in a chain without
any solver: no solver on torch can take less.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU as TABLEAU

from continuum import Adaptive, Autonomous, Flow
from continuum.files import write_json
from experiments.common import facts, machine, table

RTOL = ATOL = 1e-5
ALPHA = [0.0, *TABLEAU.alpha.tolist()]
BETA = [[], *(row.tolist() for row in TABLEAU.beta)]
ERROR = TABLEAU.c_error.tolist()
PAIRS = 300


def bare(field: Callable[[float, Tensor], Tensor], x: Tensor) -> Tensor:
    """x(1), by the loop a person would write: nothing is checked, counted or kept."""
    k, t = field(0.0, x), 0.0
    with torch.no_grad():
        scale = ATOL + RTOL * x.abs()
        size, speed = float((x / scale).square().mean().sqrt()), float((k / scale).square().mean().sqrt())
        h = 0.01 * size / speed
        change = float(((field(h, x + h * k) - k) / scale).square().mean().sqrt()) / h
        h = min(100 * h, (0.01 / max(speed, change)) ** (1 / 5))
    while t < 1:
        h, slopes, end = min(h, 1 - t), [k], x
        for alpha, row in zip(ALPHA[1:], BETA[1:], strict=True):
            end = x
            for weight, slope in zip(row, slopes, strict=True):
                if weight:
                    end = torch.add(end, slope, alpha=h * weight)
            slopes.append(field(t + alpha * h, end))
        with torch.no_grad():
            error = sum(h * weight * slope for weight, slope in zip(ERROR, slopes, strict=True) if weight)
            ratio = float((error / (ATOL + RTOL * torch.maximum(x.abs(), end.abs()))).square().mean().sqrt())
        if ratio <= 1:
            t, x, k = t + h, end, slopes[-1]
        h *= min(10.0, max(0.9 * ratio**-0.2, 1.0 if ratio < 1 else 0.2))
    return x


Pass = Callable[[bool], object]
"""A solve, and its backward pass if asked for."""


def by_torch(solve: Callable[[Tensor], Tensor], x: Tensor) -> Pass:
    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            end = solve(x)
        if backward:
            end.square().sum().backward()

    return run


def by_diffrax(net: nn.Sequential, x: Tensor) -> Pass:
    """The same solve and gradient, each as one function that XLA compiles."""
    jax, diffrax = import_module("jax"), import_module("diffrax")
    numpy, y0 = jax.numpy, jax.numpy.asarray(x.numpy(force=True))
    weights = [numpy.asarray(weight.numpy(force=True).T) for weight in net.parameters()]

    def field(t: Any, y: Any, args: Any) -> Any:
        return numpy.tanh(y @ args[0] + args[1]) @ args[2] + args[3]

    def solve(args: Any, y: Any) -> Any:
        norm = diffrax.PIDController(RTOL, ATOL, norm=lambda error: numpy.sqrt(numpy.mean(error**2)))
        term, none = diffrax.ODETerm(field), None
        return diffrax.diffeqsolve(term, diffrax.Dopri5(), 0.0, 1.0, none, y, args, stepsize_controller=norm).ys[0]

    forward, both = jax.jit(solve), jax.jit(jax.grad(lambda args, y: (solve(args, y) ** 2).sum()))
    return lambda backward: jax.block_until_ready((both if backward else forward)(weights, y0))


def seconds(run: Pass, backward: bool) -> float:
    start = time.perf_counter()
    run(backward)
    return time.perf_counter() - start


def measured() -> dict[str, Any]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2)), torch.randn(128, 2)
    times = torch.tensor([0.0, 1.0])

    def field(t: float | Tensor, x: Tensor) -> Tensor:
        return net(x)

    def loop(x: Tensor) -> Tensor:
        return bare(field, x)

    def by_torchdiffeq(x: Tensor) -> Tensor:
        return torchdiffeq.odeint(field, x, times, rtol=RTOL, atol=ATOL, method="dopri5")[-1]

    flow = Flow(Autonomous(net), Adaptive("dopri5", RTOL, ATOL), depth=1)
    torch.testing.assert_close(flow(x), loop(x), rtol=1e-6, atol=1e-6)
    assert flow.cost is not None
    evaluations = flow.cost.evaluations

    def chain(x: Tensor) -> Tensor:
        for _ in range(evaluations):
            x = net(x)
        return x

    compiled = copy.deepcopy(flow)
    compiled.compile()
    solves = {"here": flow, "torchdiffeq": by_torchdiffeq, "here, compiled": compiled}
    solves["evaluations, one graph"] = torch.compile(chain)
    passes = {name: by_torch(solve, x) for name, solve in solves.items()}
    if find_spec("diffrax"):
        passes["diffrax, jit"] = by_diffrax(net, x)
    base, rows = by_torch(loop, x), []
    for name, run in passes.items():
        for backward in (False, True):
            for _ in range(3):
                run(backward)  # compiles
            rounds, times_of = [], ([], [])
            for _ in range(3):
                pairs = [(seconds(run, backward), seconds(base, backward)) for _ in range(PAIRS)]
                rounds.append(statistics.median(a / b for a, b in pairs))
                for values, of in zip(times_of, zip(*pairs, strict=True), strict=True):
                    values += of
            ms = [round(1e3 * statistics.median(values), 2) for values in times_of]
            rows.append({"solve": name, "backward": backward, "ratios": sorted(rounds), "ms": ms})
    return {"machine": machine(), "evaluations": evaluations, "rows": rows}


def report(content: dict[str, Any]) -> str:
    rows = []
    for row in content["rows"]:
        low, ratio, high = row["ratios"]
        way = "forward and backward" if row["backward"] else "forward"
        rows.append([row["solve"], way, *(f"{ms:.2f}" for ms in row["ms"]), f"{ratio:.2f} ({low:.2f} to {high:.2f})"])
    return table(["solve", "pass", "ms", "bare loop, ms", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    content = measured()
    print(f"{report(content)}\n\n{content['evaluations']} evaluations; {facts(content['machine'])}")
    write_json(content, out)


if __name__ == "__main__":
    main()
