"""Weights as edges between units: a parameter's geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

PINNED = -1

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Dim:
    """One logical dimension of a block: `extent` entries, `step` apart along the parameter's `axis`."""

    extent: int = 1
    axis: int = 0
    step: int = 0


Dims = tuple[Dim, Dim, Dim, Dim, Dim, Dim]  # groups, rows, columns and up to three taps


@dataclass(frozen=True, eq=False)
class Block:
    """A (part of a) parameter as edges between units.

    Attributes
    ----------
    name : str
        The parameter.
    dims : tuple of six Dim
        Groups, rows, columns and up to three tap dimensions.
    start : tuple of int
        Axis of the parameter and index on it at which the block begins.
    rows, cols : int64 arrays, shapes (groups * rows,) and (groups * cols,)
        Unit ids of destinations and sources; `PINNED` where no rescaling is possible.
    row_nodes, col_nodes : int64 arrays of the same shapes
        The values in the computation (before ties), for walks along paths.
    batch_norm : str or None
        "paper" or "released" when the layer feeds a batch normalization that is treated so.
    """

    name: str
    dims: Dims
    start: tuple[int, int]
    rows: Ids
    cols: Ids
    row_nodes: Ids
    col_nodes: Ids
    batch_norm: str | None = None

    @property
    def extents(self) -> tuple[int, ...]:
        return tuple(d.extent for d in self.dims)

    @property
    def size(self) -> int:
        return math.prod(self.extents)

    def view(self, array: Any, xp: Any = np) -> Any:
        """`array` (shaped as the parameter) as ``(groups, rows, cols, t0, t1, t2)``; NumPy makes no copy."""
        axis, first = self.start
        order, shape = self._memory_order
        if array.ndim and shape[axis] != array.shape[axis]:
            array = array[(slice(None),) * axis + (slice(first, first + shape[axis]),)]
        array = xp.reshape(array, tuple(self.dims[i].extent for i in order))
        return xp.permute_dims(array, tuple(order.index(i) for i in range(6)))

    @cached_property
    def _memory_order(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The dims from the parameter's first axis to its last, then unused ones; the extents of the axes."""
        used = sorted((i for i in range(6) if self.dims[i].step), key=lambda i: (self.dims[i].axis, -self.dims[i].step))
        shape = [1] * (1 + max([self.start[0], *(self.dims[i].axis for i in used)]))
        for i in used:
            shape[self.dims[i].axis] *= self.dims[i].extent
        return (*used, *(i for i in range(6) if i not in used)), tuple(shape)

    def index(self, flat: int) -> tuple[int, ...]:
        """The parameter's index of the block's `flat`-th entry (C order over `extents`)."""
        return self.indices(np.array([flat]))[0]

    def indices(self, flat: Ids) -> list[tuple[int, ...]]:
        """The same of several entries."""
        return list(zip(*(axis.tolist() for axis in self.places(flat)), strict=True))

    def places(self, flat: Ids) -> list[Ids]:
        """The same as one array per axis."""
        at = [np.zeros_like(flat) for _ in range(1 + max(self.start[0], *(d.axis for d in self.dims)))]
        at[self.start[0]] += self.start[1]
        for d, i in zip(self.dims, np.unravel_index(flat, self.extents), strict=True):
            if d.step:
                at[d.axis] += d.step * i
        return at


def plain_block(name: str, shape: tuple[int, ...]) -> Block:
    """A parameter between pinned ends: its step is the plain one."""
    if len(shape) > 6:
        raise ValueError(f"parameter {name!r}: expected at most 6 dimensions, got shape {shape}")
    dims = [Dim()] * 6
    places = {0: (), 1: (5,), 2: (1, 5), 3: (1, 4, 5), 4: (1, 3, 4, 5), 5: (1, 2, 3, 4, 5), 6: (0, 1, 2, 3, 4, 5)}
    for axis, place in enumerate(places[len(shape)]):
        dims[place] = Dim(shape[axis], axis, 1)
    rows, cols = (np.full(dims[0].extent * dims[i].extent, PINNED, dtype=np.int64) for i in (1, 2))
    d = tuple(dims)
    assert len(d) == 6
    return Block(name, d, (0, 0), rows, cols, rows, cols)


@dataclass(frozen=True, eq=False)
class Sum:
    """A residual addition: `out` nodes are the sums of the `terms`, node by node."""

    out: Ids
    terms: tuple[Ids, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """Dims and start of a block, and the nodes that its rows and columns are."""

    dims: Dims
    start: tuple[int, int]
    rows: Ids
    cols: Ids


@dataclass(frozen=True, eq=False)
class Layer:
    """A parameter as it was described.

    Its parts lie side by side along one axis: one per segment of the features that a dense weight reads, per head, or
    per projection of a fused matrix; most often there is one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    batch_norm: str | None = None

    def blocks(self, unit_of_node: Ids) -> list[Block]:
        """Its parts as blocks between units."""
        u, mode = unit_of_node, self.batch_norm
        return [Block(self.name, p.dims, p.start, u[p.rows], u[p.cols], p.rows, p.cols, mode) for p in self.parts]
