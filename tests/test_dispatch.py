"""Objects answer for themselves: `isinstance` and class patterns ask for capabilities, and seldom.

A field, scheme, solver, basis or law that others sort by its class is one that a new kind cannot stand in for.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import continuum

ROOT = Path(continuum.__file__).parent
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


TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
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
