"""Imports point one way, and each third party has one door. Imports inside functions count too."""

import ast
from pathlib import Path

import pytest

import continuum

ROOT = Path(continuum.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Parts of one rank know nothing of each other. `files` writes files for everybody and needs nobody.
RANKS = [{"types", "files", "bases"}, {"fields"}, {"weights", "noise"}, {"schemes"}, {"solvers"}, {"integral"}, {"flow"}]
RANKS += [{"models"}, {"zoo"}, {"models.checkpoint"}, {"convert", "export"}, {"analysis"}, {"training", "bench", "verify"}]
RANKS += [{"cli"}]
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}

DOORS = {
    "torchdiffeq": ("solvers/", "bench/"),
    "torchsde": ("solvers/",),
    "torchode": ("solvers/", "bench/"),
    "torchvision": ("convert.py", "training/data.py"),
    "pytorch_lightning": ("training/", "cli/"),
    "lightning": (),
    "matplotlib": ("analysis/plots.py", "bench/plots.py"),
}


def imports(source, package=()):
    """The absolute names that a module of `package` imports, wherever the statement stands."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def found(path):
    return imports(path.read_text(), package=("continuum", *path.relative_to(ROOT).parts[:-1]))


def part_of(path):
    return part_named(path.relative_to(ROOT).with_suffix("").parts)


def part_named(names):
    """The part that a module or a name belongs to: its package, unless the module has a rank of its own."""
    return ".".join(names[:2]) if ".".join(names[:2]) in RANK else names[0]


def against_the_order(part, names):
    """The imports of the library's own parts that a module of `part` may not have."""
    wrong = []
    for name in names:
        package, *rest = name.split(".")
        target = part_named(rest) if rest else ""
        if package != "continuum" or target == part:
            continue
        if target not in RANK or RANK[target] >= RANK[part]:
            wrong.append(name)
    return wrong


def test_every_part_has_its_place():
    assert {part_of(path) for path in FILES} - {"__init__", "__main__"} <= RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if part_of(path) in RANK:
        # The command line is the front door's user: it may ask the package itself for its version.
        allowed = {"continuum"} if part_of(path) == "cli" else set()
        assert not set(against_the_order(part_of(path), found(path))) - allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_third_parties_come_in_by_their_doors(path):
    place = path.relative_to(ROOT).as_posix()
    for name in found(path):
        doors = DOORS.get(name.partition(".")[0])
        assert doors is None or place.startswith(doors), f"{place} imports {name}"


def test_the_check_sees_every_kind_of_import():
    source = "import a.b\ndef f():\n  from c import d as e\n  if f:\n    from . import g\n    from ..flow import Flow\n"
    assert imports(source, ("continuum", "solvers")) == ["a.b", "c.d", "continuum.solvers.g", "continuum.flow.Flow"]
    assert against_the_order("solvers", ["torch.nn", "continuum.fields.Field", "continuum.solvers.g"]) == []
    above = ["continuum.flow.Flow", "continuum.Flow", "continuum"]
    assert against_the_order("solvers", above) == above
    assert against_the_order("types", ["continuum.files.whole_file"]) == ["continuum.files.whole_file"]
