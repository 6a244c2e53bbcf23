"""What is public has a docstring that names what it takes and says what it raises, and a place in the reference."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

import gsgd.jax
import gsgd.optax
import gsgd.torch

API = Path(__file__).parents[1] / "docs" / "api"
OBVIOUS = {"self", "cls", "value", "message"}  # the value of a property, the message of an exception


def public() -> dict[str, Any]:
    """All that the packages name in `__all__`, and what `gsgd.optax` has of its own."""
    found = {f"{m.__name__}.{name}": getattr(m, name) for m in (gsgd, gsgd.torch, gsgd.jax) for name in m.__all__}
    functions = inspect.getmembers(gsgd.optax, inspect.isfunction)
    own = {f"gsgd.optax.{name}": f for name, f in functions if f.__module__ == "gsgd.optax" and name[0] != "_"}
    return found | own | {"gsgd.optax.State": gsgd.optax.State}


def documented(owner: Any) -> Iterator[tuple[Any, str]]:
    """Functions that are written in this project, those of a class one by one, and where each is documented."""
    if not inspect.isclass(owner):
        yield owner, inspect.getdoc(owner) or ""
        return
    for name, x in inspect.getmembers_static(owner):
        if name[0] != "_" or name == "__init__":
            doc = inspect.getdoc(owner if name == "__init__" else getattr(owner, name)) or ""
            for f in (x.fget, x.fset) if isinstance(x, property) else [getattr(x, "__func__", x)]:
                if inspect.isfunction(f) and f.__module__.startswith("gsgd") and f.__code__.co_filename != "<string>":
                    yield f, doc


def raises(function: Any) -> bool:
    """Whether its body has a raise, apart from functions in it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    nodes = list(ast.iter_child_nodes(tree))
    for node in nodes:
        if not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return any(isinstance(node, ast.Raise) for node in nodes)


@pytest.mark.parametrize("name", public())
def test_docstrings_name_parameters_and_errors(name: str) -> None:
    assert inspect.getdoc(public()[name])
    for f, doc in documented(public()[name]):
        assert doc, f
        named = {p.name for p in inspect.signature(f).parameters.values() if p.kind is not p.VAR_KEYWORD}
        assert [p for p in named - OBVIOUS if not re.search(rf"\b{p}\b", doc)] == [], f
        assert "Raises\n---" in doc or not raises(f), f


def test_the_reference_has_all_of_it() -> None:
    paths = {p for page in API.glob("*.md") for p in re.findall("^::: (.*)$", page.read_text(), flags=re.M)}
    pages = [resolve_name(path) for path in paths]
    assert [name for name, x in public().items() if x not in pages] == []
