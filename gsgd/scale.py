"""The scale on which path values are measured: the rescaling of least sum of squares (METHOD.md, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsgd import _core
from gsgd.network import Block
from gsgd.warn import warn

Floats = NDArray[np.float64]


def over_taps(entries: Floats) -> Floats:
    """Sums over taps, (groups, rows, cols), of entries in C order."""
    taps = entries.reshape(*entries.shape[:3], -1)
    return taps[..., 0] if taps.shape[-1] == 1 else taps.sum(axis=-1)


def core_plan(blocks: Sequence[Block], arrays: Mapping[str, NDArray[Any]], units: int) -> _core.Plan:
    """The C core's plan of `blocks` that lie in `arrays`."""
    number = {name: i for i, name in enumerate(arrays)}
    specs: list[tuple[str, tuple[int, ...], str]] = [(n, a.shape, a.dtype.char) for n, a in arrays.items()]
    described = [
        (
            number[b.name],
            b.extents,
            tuple(d.axis for d in b.dims),
            tuple(d.step for d in b.dims),
            *b.start,
            b.rows,
            b.cols,
        )
        for b in blocks
    ]
    return _core.Plan(units, specs, described)


def balanced_scale(plan: _core.Plan, arrays: Mapping[str, NDArray[Any]]) -> Floats:
    """The c per unit, (units,), that carries weights to their rescaling of least sum of squares (csrc/balance.c).

    `plan` is one of `arrays`, with its trees: units without edges are pinned. All others have a unique solution.
    """
    c, left = plan.balance(list(arrays.values()))
    if left != 0:
        warn(f"the balanced scale did not converge: {left:.1e} is left", RuntimeWarning)
    return c
