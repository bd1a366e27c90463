"""Seeded inputs that nobody should trust: solvers' texts, configurations, damaged files, files that state what is not so."""

import copy
import io
import random
import zipfile
from collections.abc import Callable
from typing import Any

import torch

PLANTED = "continuum_hostile_module"
"""A module that leaves a mark when it is imported; where a name can stand, it stands in these files."""

NAMES = ("euler", "rk4", "dopri5", "dopri8", "bosh3", "milstein", "brownian", "per_image", "adams_bashforth", "scipy_solver")
KEYS = ("h", "rtol", "atol", "order", "grid", "method", "gradient", "every", "norm", "engine", "max_evaluations", "increments")
VALUES = (
    "0.5",
    "1",
    "3",
    "-1",
    "0",
    "nan",
    "inf",
    "1e-310",
    "1e400",
    "1e-8",
    "99999999999999999999",
    "0/1",
    "0/0.5/1",
    "milstein",
)
VALUES += (
    "checkpoint",
    "own",
    "sample",
    "true",
    "None",
    "1_0",
    "0x10",
    "½",
    " ",
    "",
    "1e-3",
    f"{PLANTED}.evil",
    "(1,2)",
    "5e-324",
)
ODD: tuple[Any, ...] = (10**9, -1, -(2**63), 10**400, 1e308, float("nan"), float("inf"), True, None, "", "x", [], {})
ODD += ([[[[1]]]], [0] * 50_000, "A" * 2_000_000, b"bytes", 600_000_000, f"{PLANTED}.evil")
ODD += ({"class_path": f"{PLANTED}.Evil"}, f"!!python/object:{PLANTED}.Evil")
OWN = (*(str(value)[:50] for value in ODD if PLANTED not in str(value) and value not in (10**9, 600_000_000)), "2", "0.5")
"""A configuration is the user's own: it may name modules, and widths that fill the memory."""

BUILDERS = ("Network", "WritePredictions", f"{PLANTED}.Evil", f"{PLANTED}.evil", "__class__", "os.system", "__main__.main")
BUILDERS += (f"{PLANTED}.evil --builder {PLANTED}.evil", f"{PLANTED}\n\x1b[2J.evil", f"{PLANTED}:evil", ".", "a." * 10_000)
"""Names in the place of a builder's, some of them import paths."""

ARGUMENTS = ("width", "stages", "solver", "in_channels", "new", "downsample")


def solver_text(draw: random.Random) -> str:
    """A solver's text, often with something wrong in it."""
    options = ",".join(f"{draw.choice(KEYS)}={draw.choice(VALUES)}" for _ in range(draw.randrange(4)))
    text = f"{draw.choice(NAMES)}:{options}" if options else draw.choice(NAMES)
    if draw.random() < 0.2:
        place = draw.randrange(len(text) + 1)
        text = text[:place] + draw.choice(":,=/ \0é\n") + text[place:]
    return text


SCALARS = ("!!float abc", "!!int xyz", "!!python/name:os.system", "&a [*a]", "{a: 1, a: 2}", "-9223372036854775808", "1e999")
SCALARS += (
    "*unknown",
    "'",
    "{",
    "\t",
    "? :",
    "2026-99-99",
    "!!timestamp x",
    "!!binary x",
    "0o99",
    "1__0",
    "~",
    "[]",
    "~~",
    ".nan",
)


def configuration(draw: random.Random) -> str:
    """A configuration of `fit` with something wrong in it."""
    options = {
        "seed_everything": "0",
        "model.network.class_path": "continuum.zoo.odenet",
        "model.network.init_args.downsample": "false",
        "model.network.init_args.width": "8",
        "model.label_smoothing": "0.1",
        "data.class_path": "continuum.training.Digits",
        "trainer.max_epochs": "1",
    }
    for name in draw.sample(sorted(options), draw.randrange(1, 3)):
        options[name] = draw.choice([*SCALARS, *OWN])
    if draw.random() < 0.2:
        options["lots"] = bomb()
    lines, above = [], []
    for name, value in sorted(options.items()):
        *parts, last = name.split(".")
        for depth, part in enumerate(parts):
            if above[: depth + 1] != parts[: depth + 1]:
                lines.append("  " * depth + f"{part}:")
        above = parts
        lines.append("  " * len(parts) + f"{last}: {value}")
    text = "\n".join(lines)
    if draw.random() < 0.2:
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice("\t:{}[]&*!|>'\"%@`\0\r") + text[place + 1 :]
    return text


def bomb(levels: int = 30) -> str:
    """A few lines that stand for a thousand million values."""
    lists = ", ".join(f"&b{n} [*b{n - 1}, *b{n - 1}]" for n in range(1, levels))
    return f"[&b0 [x], {lists}]"


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes of a file after something has happened to them."""
    return _repacked(content, draw) if draw.random() < 0.2 else scratched(content, draw)


def scratched(content: bytes, draw: random.Random) -> bytes:
    """Bytes that are cut off, flipped, zeroed or put in between."""
    kind = draw.randrange(4)
    place, length = draw.randrange(len(content)), draw.randrange(1, 400)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + bytes(length) + content[place + length :]
    return content[:place] + draw.randbytes(length) + content[place:]


def _repacked(content: bytes, draw: random.Random) -> bytes:
    """The archive with a record that is left out, compressed, doubled or of other bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen, kind = draw.choice(names), draw.randrange(4)
        for name in names:
            record = old.read(name)
            if name != chosen:
                new.writestr(name, record)
            elif kind == 1:
                new.writestr(name, record, zipfile.ZIP_DEFLATED)
            elif kind == 2:
                new.writestr(name, record[: len(record) // 2])
            elif kind == 3:
                new.writestr(name, bytes(len(record) + 8))
    return out.getvalue()


def misstated(content: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A checkpoint whose description, or another part, states something that is not so."""
    content = copy.copy(content)
    stated = content["continuum"] = copy.deepcopy(content["continuum"])
    odd = copy.deepcopy(draw.choice(ODD))
    changes: list[Callable[[], Any]] = [
        lambda: stated.update(builder=draw.choice([odd, *BUILDERS])),
        lambda: stated["arguments"].update({draw.choice(ARGUMENTS): odd}),
        lambda: stated.update(arguments=odd),
        lambda: stated.update(solvers=draw.choice([odd, [odd], [f"{PLANTED}.evil"], ["rk4:h=1e-8"], ["euler", "euler"]])),
        lambda: stated.update(changes=draw.choice([odd, [["refine", odd]], [["project", "hat", odd]], [["refine", 9000]] * 3])),
        lambda: stated.update(format=odd),
        lambda: stated["data"].update(
            {draw.choice(["class", "arguments"]): draw.choice([odd, "WritePredictions", "__class__"])}
        ),
        lambda: stated["data"]["arguments"].update({draw.choice(["batch_size", "seed", "root", "workers"]): odd}),
        lambda: stated.pop(draw.choice(sorted(stated))),
        lambda: content.pop(draw.choice(sorted(content))),
        lambda: content.update(state_dict=odd),
        lambda: content.update(state_dict={**content["state_dict"], "network.new": torch.zeros(1)}),
        lambda: content.update(state_dict={name: torch.zeros(()) for name in content["state_dict"]}),
        lambda: content.update(state_dict={name: torch.zeros(1).expand(10**9) for name in content["state_dict"]}),
        lambda: content.update({draw.choice(["loops", "callbacks", "optimizer_states", "epoch", "lr_schedulers"]): odd}),
        lambda: content.update({"pytorch-lightning_version": draw.choice([odd, "not a version"])}),
        lambda: content.update(
            hyper_parameters={"_class_path": f"{PLANTED}.Evil", "network": {"class_path": f"{PLANTED}.Evil"}}
        ),
    ]
    draw.choice(changes)()
    return content


def written(content: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()
