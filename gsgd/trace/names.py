"""Parameters by name or by a prefix of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def match(given: str | Iterable[str], names: Iterable[str], argument: str) -> list[str]:
    """Those of `names` that are `given`, or lie below a module that is.

    Raises
    ------
    ValueError
        Nothing has such a name; the message suggests those that are close.
    TypeError
        Something `given` is not a string.
    """
    names = list(names)
    found: dict[str, None] = {}
    for prefix in [given] if isinstance(given, str) else given:
        if not isinstance(prefix, str):
            raise TypeError(f"{argument}: expected names, got {prefix!r}")
        matches = [name for name in names if name == prefix or name.startswith(f"{prefix}.")]
        if not matches:
            parts = [name.split(".") for name in names]
            known = dict.fromkeys(".".join(p[: i + 1]) for p in parts for i in range(len(p)))
            close = difflib.get_close_matches(prefix, known) or list(known)[:3]
            raise ValueError(f"{argument}: nothing is named {prefix!r}; did you mean one of {close}?")
        found.update(dict.fromkeys(matches))
    return list(found)


def unread(names: Sequence[str]) -> str:
    """What there is to say of parameters that the pass which was followed did not read."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"the traced forward pass did not read {', '.join(names[:3])}{more}. If other passes do (layer drop, "
        "stochastic depth, a branch on a size or on a flag of training), the network is wrong for these: trace with "
        "the dropping switched off and inputs as in training"
    )
