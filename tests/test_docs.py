"""The reference: every public name of a package, and every network of the zoo, has an entry."""

import importlib
import re
from pathlib import Path

import pytest

from continuum.zoo import BUILDERS

PACKAGES = ("analysis", "fields", "models", "noise", "schemes", "solvers", "training", "verify")
REFERENCE = Path(__file__).parents[1] / "docs" / "api"
ENTRIES = {entry for page in REFERENCE.glob("*.md") for entry in re.findall(r"(?m)^::: ([\w.]+)", page.read_text())}


@pytest.mark.parametrize("package", ["continuum", *(f"continuum.{name}" for name in PACKAGES)])
def test_public_names_have_an_entry(package):
    """Of their own, by the front door or their package, or that of their module."""
    module = importlib.import_module(package)
    named = {entry.rpartition(".")[2] for entry in ENTRIES}
    public = {name: getattr(module, name) for name in module.__all__}
    missing = {name for name, value in public.items() if name not in named and getattr(value, "__module__", "") not in ENTRIES}
    assert missing <= {"zoo", "Memory"}  # a package, and the name of a type


def test_the_zoo_is_all_there():
    assert {entry for entry in ENTRIES if entry.startswith("continuum.zoo.")} == {f"continuum.zoo.{name}" for name in BUILDERS}
