"""Imports point one way, and each third party has one door. Imports inside functions count too.

Objects answer for themselves: `isinstance` and class patterns ask for capabilities, and seldom. A field, scheme, solver, basis
or law that others sort by its class is one that a new kind cannot stand in for.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import continuum

ROOT = Path(continuum.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Parts of one rank know nothing of each other. `files` writes files for everybody and needs nobody.
RANKS = [{"types", "files", "bases"}, {"fields"}, {"weights", "noise"}, {"schemes"}, {"solvers"}, {"integral"}, {"flow"}]
RANKS += [{"models"}, {"zoo"}, {"models.checkpoint"}, {"convert", "export"}, {"analysis"}, {"training", "verify"}]
RANKS += [{"bench"}, {"cli"}]
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}

DOORS = {
    "torchdiffeq": ("solvers/", "bench/"),
    "torchsde": ("solvers/",),
    "torchode": ("solvers/", "bench/"),
    "torchvision": ("convert/published.py", "training/sets.py"),
    "pytorch_lightning": ("training/", "bench/", "cli/"),
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


def test_nothing_that_another_library_keeps_to_itself_is_needed_to_import_this_one():
    """A name that moves there is an error of the one solver that uses it."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, continuum; print(*[name for name in sys.modules if name.startswith('continuum')])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    files = [path for path in FILES if module_name(path) in loaded]
    assert ROOT / "solvers" / "adaptive.py" in files
    for path in files:
        body = ast.parse(path.read_text()).body  # not inside functions
        statements = ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        for name in imports(ast.unparse(statements)):
            private = any(part.startswith("_") for part in name.split("."))
            assert not (private and name.startswith(("torch", "pytorch"))), f"{path} imports {name}"


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("continuum", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def test_a_name_that_has_moved_in_torchsde_is_an_error_of_brownian_solves():
    code = (
        "import sys; sys.modules['torchsde._core.methods'] = None\n"
        "import torch; from continuum import Flow, MLP; from continuum.noise import StochasticDepth\n"
        "Flow(MLP(2, 4), 'rk4:h=0.5', 1)(torch.zeros(1, 2))\n"
        "Flow(StochasticDepth(MLP(2, 4), 0.5), 'brownian:method=euler', 1)(torch.zeros(1, 2))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: Brownian solves take torchsde's own steps, known to work with 0.2.6" in ended.stderr


# Classes
KINDS = {"Field", "Scheme", "Solver", "Basis", "Law"}
INTERFACES = {*KINDS, "StochasticField", "ReversibleScheme", "StochasticScheme"}
"""What any kind may be asked for; a network and its parts, data and panels are no kinds."""

AT_MOST = 60


def classes_in(trees: dict[Path, ast.Module]) -> dict[str, tuple[str, list[str]]]:
    """The part of the library in which each class stands, and its bases."""
    found: dict[str, tuple[str, list[str]]] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                found[node.name] = (path.parts[0], bases)
    return found


def names(node: ast.expr) -> list[str]:
    """The classes that the second argument of isinstance, or a pattern, names."""
    if isinstance(node, ast.Tuple):
        return [name for element in node.elts for name in names(element)]
    if isinstance(node, ast.BinOp):
        return [*names(node.left), *names(node.right)]
    return [node.attr] if isinstance(node, ast.Attribute) else [node.id] if isinstance(node, ast.Name) else []


def dispatches(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """The line and the classes of every test of a class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
            yield node.lineno, names(node.args[1])
        elif isinstance(node, ast.MatchClass):
            yield node.cls.lineno, names(node.cls)


def kinds_of(name: str, classes: dict[str, tuple[str, list[str]]]) -> set[str]:
    """The names of a class and of all that it derives from."""
    _, bases = classes.get(name, ("", []))
    return {name}.union(*(kinds_of(base, classes) for base in bases))


TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in FILES}
CLASSES = classes_in(TREES)


def test_few_places_ask_for_a_class_of_the_library() -> None:
    found = [
        f"{path}:{line}: {', '.join(asked)}"
        for path, tree in TREES.items()
        for line, asked in dispatches(tree)
        if any(name in CLASSES for name in asked)
    ]
    assert len(found) <= AT_MOST, "\n".join(found)


def test_none_asks_for_a_concrete_kind_of_another_part() -> None:
    wrong = [
        f"{path}:{line}: {name}"
        for path, tree in TREES.items()
        for line, asked in dispatches(tree)
        for name in asked
        if name in CLASSES and name not in INTERFACES and kinds_of(name, CLASSES) & KINDS and CLASSES[name][0] != path.parts[0]
    ]
    assert not wrong


def test_the_count_sees_every_form() -> None:
    source = (
        "isinstance(x, A | B)\nissubclass(x, (fields.C, D))\n"
        "match x:\n    case E(1):\n        pass\n    case [F(), *_]:\n        pass\nisinstance"
    )
    assert [asked for _, asked in dispatches(ast.parse(source))] == [["A", "B"], ["C", "D"], ["E"], ["F"]]
    classes = classes_in({Path("fields/base.py"): ast.parse("class Field: ...\nclass A(Field): ...\nclass B(A): ...")})
    assert kinds_of("B", classes) == {"A", "B", "Field"}
    assert classes["B"] == ("fields", ["A"])
