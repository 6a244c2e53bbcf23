"""Defaults that stand in a dataclass, as `lr: float = SGD.lr`, are shown in the reference by their values."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Replaces `Class.field`, perhaps with an index, by what the class says."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when all of the package is known."""
        classes = {c.name: c for m in _modules(pkg) for c in m.classes.values() if not c.is_alias}
        for module in _modules(pkg):
            for function in _functions(module):
                for parameter in function.parameters:
                    name, _, rest = str(parameter.default).partition(".")
                    field, _, index = rest.partition("[")
                    found = classes[name].members.get(field) if name in classes else None
                    if isinstance(found, griffe.Attribute) and found.value is not None:
                        value = ast.literal_eval(str(found.value))
                        parameter.default = repr(value[int(index[:-1])] if index else value)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    return [module, *(m for child in module.modules.values() if not child.is_alias for m in _modules(child))]


def _functions(scope: Any) -> list[griffe.Function]:
    own = [f for f in scope.functions.values() if not f.is_alias]
    return own + [f for c in scope.classes.values() if not c.is_alias for f in _functions(c)]
