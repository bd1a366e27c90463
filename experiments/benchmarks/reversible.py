"""Reversible gradients: peak memory against the number of layers, and the digits that undoing the steps costs.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.reversible --out experiments/benchmarks/results/reversible.json

Memory is the peak of all tensors alive in a forward and backward pass, without parameters and their gradients: counted by
operator on a CPU, `max_memory_allocated` on a GPU. Undone is the relative error of the first state after stepping through all
layers and back; gradients, all parameters as one vector, are compared with those of stored states, and these in float32 with
those in float64, for scale.
"""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from continuum import Autonomous, Coupled, FixedStep, Flow, PiecewiseConstant
from continuum.analysis import peak_memory
from continuum.fields import Antisymmetric, Field, Hamiltonian, PreActivation
from continuum.files import write_json
from continuum.schemes import Coupling, ReversibleScheme, TwoStepMidpoint, Verlet
from experiments.common import table

CHANNELS, SIZE, BATCH = 32, 16, 16


def revnet_block() -> Field:
    half = CHANNELS // 2
    return Coupled(Autonomous(PreActivation(half, half)), Autonomous(PreActivation(half, half)))


FAMILIES: dict[str, tuple[ReversibleScheme, Callable[[], Field]]] = {
    "RevNet, coupling": (Coupling(), revnet_block),
    "RevNet, verlet": (Verlet(), revnet_block),
    "Hamiltonian, coupling": (Coupling(), lambda: Hamiltonian(CHANNELS)),
    "antisymmetric, two-step midpoint": (TwoStepMidpoint(), lambda: Autonomous(Antisymmetric(CHANNELS, 1e-4))),
}


def flow(name: str, layers: int, scale: float, gradient: Any, dtype: torch.dtype, device: torch.device) -> Flow:
    torch.manual_seed(0)
    scheme, block = FAMILIES[name]
    field = PiecewiseConstant(block().scaled(scale) for _ in range(layers))
    return Flow(field, FixedStep(scheme, gradient=gradient), layers).to(device, dtype)


def images(dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64).to(device, dtype)


def memory(name: str, gradient: str, device: torch.device) -> dict[int, float]:
    """MiB by number of layers."""
    found = {}
    for layers in (8, 16, 32, 64, 128):
        model, x = flow(name, layers, 0.1, gradient, torch.float32, device), images(torch.float32, device)
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
        peak = peak_memory(lambda model=model, x=x: model(x).square().mean().backward(), device)
        found[layers] = (peak - gradients) / 2**20
    return found


@torch.no_grad()
def undone(name: str, scale: float, dtype: torch.dtype, device: torch.device) -> float:
    scheme, _ = FAMILIES[name]
    model, x = flow(name, 100, scale, "direct", dtype, device), images(dtype, device)
    end, memory = x, ()
    for n in range(100):
        end, memory = scheme.step(model.field, float(n), end, 1.0, memory)
    for n in reversed(range(100)):
        end, memory = scheme.undo(model.field, float(n), end, 1.0, memory, first=n == 0)
    return float((end - x).norm() / x.norm())


def gradient(name: str, scale: float, gradient: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gradients of all parameters as one vector in float64."""
    model = flow(name, 100, scale, gradient, dtype, device)
    model(images(dtype, device)).square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def errors(name: str, scale: float, device: torch.device) -> list[dict[str, Any]]:
    stored = {dtype: gradient(name, scale, "direct", dtype, device) for dtype in (torch.float32, torch.float64)}
    return [
        {
            "scale": scale,
            "dtype": str(dtype).removeprefix("torch."),
            "undone": undone(name, scale, dtype, device),
            "gradient": error(gradient(name, scale, "reversible", dtype, device), stored[dtype]),
            "stored_gradient_against_float64": error(stored[dtype], stored[torch.float64]),
        }
        for dtype in (torch.float32, torch.float64)
    ]


def report(content: dict[str, Any]) -> str:
    rows = []
    for name, memory in content["memory_mib"].items():
        layers = list(memory["direct"])
        rows.append([name, *(f"{memory['direct'][n]:.1f} / {memory['reversible'][n]:.2f}" for n in layers)])
    first = table(["MiB, stored / rebuilt states", *(f"{n} layers" for n in layers)], rows)
    rows = []
    for name, errors in content["errors_over_100_layers"].items():
        for row in errors:
            stored = f"{row['stored_gradient_against_float64']:.1e}" if row["dtype"] == "float32" else "-"
            rows.append([name, f"{row['scale']:g}", row["dtype"], f"{row['undone']:.1e}", f"{row['gradient']:.1e}", stored])
    headings = ["100 layers", "scale", "precision", "first state rebuilt", "gradient", "stored gradient against float64"]
    return f"{first}\n\n{table(headings, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    content: dict[str, Any] = {
        "machine": f"{card}, torch {torch.__version__}",
        "state": [BATCH, CHANNELS, SIZE, SIZE],
        "memory_mib": {},
        "errors_over_100_layers": {},
    }
    for name in FAMILIES:
        found = {gradient: memory(name, gradient, device) for gradient in ("direct", "reversible")}
        content["memory_mib"][name] = found
        growth = found["reversible"][128] / found["reversible"][8] - 1
        print(
            f"{name}: from 8 to 128 layers {100 * growth:+.2f} %, direct {found['direct'][128] / found['direct'][8]:.1f} times"
        )
        # Without norms, unscaled layers grow beyond all bounds over a hundred layers.
        scales = (0.1, 1.0) if name.startswith("RevNet") else (0.1,)
        content["errors_over_100_layers"][name] = [row for scale in scales for row in errors(name, scale, device)]
        for row in content["errors_over_100_layers"][name]:
            print(f"  {row}", flush=True)
    print(report(content))
    write_json(content, options.out)


if __name__ == "__main__":
    main()
