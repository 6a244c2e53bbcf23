"""Signatures as a reader of the reference wants them: defaults by their values, and no `**options: Unpack[...]`."""

from __future__ import annotations

import ast
from typing import Any

import griffe

OPTIONS = "Options"  # the dataclass that has the defaults of options which are passed on


class Signatures(griffe.Extension):
    """Replaces a default `Class.field` by what the class says, and options that are passed on by their names."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when all of the package is known."""
        classes = {c.name: c for m in _modules(pkg) for c in m.classes.values() if not c.is_alias}
        for function in (f for m in _modules(pkg) for f in _functions(m)):
            expanded = []
            for parameter in function.parameters:
                kind = str(parameter.annotation)
                if kind.startswith("Unpack["):
                    expanded += _options(classes, kind.removeprefix("Unpack[").removesuffix("]")).values()
                    continue
                name, _, rest = str(parameter.default).partition(".")
                field, _, index = rest.partition("[")
                value = _value(classes, name, field)
                if value is not None:
                    parameter.default = repr(ast.literal_eval(value)[int(index[:-1])]) if index else value
                expanded.append(parameter)
            function.parameters = griffe.Parameters(*expanded)


def _options(classes: dict[str, griffe.Class], name: str) -> dict[str, griffe.Parameter]:
    """The fields of a TypedDict, and of the one that it extends, as keyword arguments."""
    if name not in classes:
        return {}
    found: dict[str, griffe.Parameter] = {}
    for base in classes[name].bases:
        found |= _options(classes, str(base))
    for field, attribute in classes[name].attributes.items():
        default = _value(classes, OPTIONS, field) or "..."
        kind = griffe.ParameterKind.keyword_only
        found[field] = griffe.Parameter(field, annotation=attribute.annotation, kind=kind, default=default)
    return found


def _value(classes: dict[str, griffe.Class], name: str, field: str) -> str | None:
    attribute = classes[name].members.get(field) if name in classes else None
    return str(attribute.value) if isinstance(attribute, griffe.Attribute) and attribute.value is not None else None


def _modules(module: griffe.Module) -> list[griffe.Module]:
    return [module, *(m for child in module.modules.values() if not child.is_alias for m in _modules(child))]


def _functions(scope: Any) -> list[griffe.Function]:
    own = [f for f in scope.functions.values() if not f.is_alias]
    return own + [f for c in scope.classes.values() if not c.is_alias for f in _functions(c)]
