"""Warnings that name the user's line."""

from __future__ import annotations

import sys
import warnings

_NOT_THE_USERS = ("gsgd", "torch", "jax", "optax", "contextlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of what the line that called into this library has done, however many frames lie between."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
