"""Arguments that describe a network: integers, names, shapes."""

from __future__ import annotations

import operator
from typing import Any


def integer(value: Any, what: str, least: int = 1) -> int:
    """`value` as an int; a TypeError if it is none, a ValueError if it is below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what}: expected an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{what}: expected at least {least}, got {number}")
    return number


def text(value: Any, what: str) -> str:
    """`value`, a string; a TypeError if it is none, a ValueError if it is empty."""
    if not isinstance(value, str):
        raise TypeError(f"{what}: expected a string, got {value!r}")
    if not value:
        raise ValueError(f"{what}: expected a string that is not empty")
    return value


def shape_of(value: Any, what: str) -> tuple[int, ...]:
    """The shape that an array has, or that `value` is; a TypeError if it is neither."""
    try:
        return tuple(map(operator.index, getattr(value, "shape", value)))
    except TypeError:
        raise TypeError(f"{what}: expected an array or a shape, got {type(value).__name__}") from None
