"""A plan of the C core for parts of arrays: gsgd_set_shard of csrc/gsgd.h, from a layout of the parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsgd import _core
from gsgd.blocks import PINNED
from gsgd.layout import IN, OUT, ArrayLayout, Ids, Layout, Span


def shard_plan(t: Layout, arrays: Mapping[str, NDArray[Any]], counts: Sequence[bool]) -> _core.Plan:
    """The plan of `arrays`, whose layout is `t`, with its trees.

    `t` is `gsgd.layout.part`'s, of a layout that is the same for all shards; `counts` says of which arrays this shard's
    part enters sums.
    """
    units = len(t.root) - 1
    specs: list[_core.Spec] = [(n, a.shape, a.dtype.char) for n, a in arrays.items()]
    blocks: list[_core.BlockTuple] = []
    edges = np.full((2, units, 2), (-1, 0))
    for k, a in enumerate(t.arrays):
        axes, apart = _axes(a)
        extents = tuple(1 if axis is None else a.shape[axis] for axis in axes)
        steps = tuple(int(axis is not None) for axis in axes)
        tree, unit = np.divmod(t.owner[a.edges.start : a.edges.stop], units + 1)
        at = [0 * unit if axis is None else a.index[axis] for axis in axes]
        number = len(blocks) + (0 * unit if apart is None else a.index[apart])
        edges[tree, unit] = np.stack([number, np.ravel_multi_index(at, extents)], axis=1)
        for i in range(1 if apart is None else a.shape[apart]):
            rows, cols = (
                _ids(a, span, table, (axes[0], axes[dim]), apart, i, units)
                for dim, span, table in ((1, a.rows, t.rows), (2, a.cols, t.cols))
            )
            blocks.append((k, extents, tuple(axis or 0 for axis in axes), steps, apart or 0, i, rows, cols))
    end, in_array = (x.astype(np.int64) for x in (t.end[:, :-1], t.array[:-1]))
    free = (in_array >= 0) & ~t.chain[:-1]
    edges[IN, free] = edges[OUT, end[IN, free]]
    end[end == units] = PINNED
    plan = _core.Plan(units, specs, blocks)
    plan.set_shard(edges[IN], edges[OUT], end[IN], end[OUT], in_array, free, np.array(counts, dtype=bool))
    return plan


def _axes(a: ArrayLayout) -> tuple[list[int | None], int | None]:
    """Which axis of the array each of a block's six dimensions is; and one of which every index is a block, if any."""
    on = [{i for i, n in enumerate(span.shape) if n != 1} if span else set() for span in (a.rows, a.cols)]
    groups = on[0] & on[1]  # every index on these has ids of its own
    found: list[int | None] = [None] * 6
    for dim, own in zip((1, 2), on, strict=True):
        side = sorted(own - groups, key=lambda i: a.shape[i])
        found[dim] = side.pop() if side else None
        groups |= {*side}
    rest = [i for i in range(len(a.shape)) if i not in groups and i not in found]
    found[0], apart = [*sorted(groups, key=lambda i: -a.shape[i]), None, None][:2]
    if found[1] is None and rest:  # lines for threads to share; taps would take memory per column
        found[1] = rest.pop(0)
    vacant = (dim for dim in (5, 4, 3, 2, 1, 0) if found[dim] is None)
    for dim, axis in zip(vacant, reversed(rest), strict=False):
        found[dim] = axis
    return found, apart


def _ids(
    a: ArrayLayout, span: Span | None, table: Ids, axes: Sequence[int | None], apart: int | None, i: int, units: int
) -> NDArray[np.int64]:
    """Unit ids in the order of these axes, at index `i` on the axis that is set apart."""
    ids = span.of(np, table) if span else np.full([1] * len(a.shape), units)
    if apart is not None and ids.shape[apart] > 1:
        ids = ids.take([i], axis=apart)
    here = [axis for axis in axes if axis is not None]
    ids = np.broadcast_to(ids, [n if axis in here else 1 for axis, n in enumerate(a.shape)])
    ids = ids.transpose([*here, *(axis for axis in range(len(a.shape)) if axis not in here)]).reshape(-1)
    return np.where(ids == units, PINNED, ids).astype(np.int64)
