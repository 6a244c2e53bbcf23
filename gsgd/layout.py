"""How the skeleton's edges lie in arrays: tables of integers and masks that the stages read.

Units are numbered from 0; vectors over units have one more entry, H, which stands for every pinned end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from gsgd.blocks import Block

Array = Any
Edges = NDArray[np.int64]


@dataclass(frozen=True)
class BlockTables:
    """A block, and masks over its entries of the tree edges that lie in it."""

    block: Block
    array: int
    rows: Array
    cols: Array
    chain: Array
    free: Array


@dataclass(frozen=True)
class TreeTables:
    """Where tree edges lie, and how to multiply along them: after each jump a unit has gathered twice as many.

    `entries` are grouped by block; `order` brings them in the order of units, and units without an edge to the end.
    """

    blocks: tuple[int, ...]
    entries: tuple[Array, ...]
    order: Array
    jumps: tuple[Array, ...]


@dataclass(frozen=True)
class Tables:
    """Everything about a network and its skeleton that does not change: integers and masks."""

    blocks: tuple[BlockTables, ...]
    in_tree: TreeTables
    out_tree: TreeTables
    in_array: Array  # in which array the in-edge of a unit lies
    root: Array
    chain: Array
    columns_of_root: Array


def tables(units: int, blocks: Sequence[tuple[int, Block]], in_edges: Edges, out_edges: Edges) -> Tables:
    """Tables of a skeleton: `blocks` with the number of their array, edges as (block, entry) per unit."""
    active = in_edges[:, 0] >= 0
    can_move = np.append(active, False)  # the last for what is pinned

    def ids(units_of: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(can_move[units_of], units_of, units)

    def ends(edges: Edges, source: bool) -> NDArray[np.int64]:
        """The other ends of in-edges (their sources) or of out-edges."""
        found = np.full(units + 1, units, dtype=np.int64)
        for u in np.flatnonzero(active):
            block = blocks[edges[u, 0]][1]
            g, r, c, *_ = np.unravel_index(edges[u, 1], block.extents)
            row, col = block.rows[g * block.dims[1].extent + r], block.cols[g * block.dims[2].extent + c]
            if u != (row if source else col):
                raise ValueError(f"the skeleton edges of unit {u} make no tree")
            found[u] = col if source else row
        return ids(found)

    def tree(edges: Edges, ends: NDArray[np.int64]) -> TreeTables:
        found, entries, order = [], [], np.full(units + 1, int(active.sum()), dtype=np.int64)
        seen = 0
        for k in range(len(blocks)):
            here = np.flatnonzero(active & (edges[:, 0] == k))
            if len(here):
                found.append(k)
                entries.append(edges[here, 1])
                order[here] = np.arange(seen, seen + len(here))
                seen += len(here)
        jumps: list[NDArray[np.int64]] = []
        while (ends != units).any():
            if 2 ** len(jumps) > units:
                raise ValueError("the skeleton edges make no tree: following them never ends")
            jumps.append(ends)
            ends = ends[ends]
        return TreeTables(tuple(found), tuple(entries), order, tuple(jumps))

    in_unit, out_unit = ends(in_edges, True), ends(out_edges, False)
    in_is_free = np.zeros(units + 1, dtype=bool)
    for v in np.flatnonzero(active):
        in_is_free[v] = in_unit[v] < units and tuple(out_edges[in_unit[v]]) == tuple(in_edges[v])
    in_tree, out_tree = tree(in_edges, in_unit), tree(out_edges, out_unit)
    root = np.arange(units + 1)
    while in_is_free[root].any():
        root = np.where(in_is_free[root], in_unit[root], root)

    per_block = []
    columns: list[list[int]] = [[] for _ in range(units + 1)]
    count = 0
    for k, (array, block) in enumerate(blocks):
        masks = []
        for edges, wanted in ((in_edges, active & ~in_is_free[:-1]), (out_edges, active)):
            mask = np.zeros(block.size, dtype=bool)
            mask[edges[wanted & (edges[:, 0] == k), 1]] = True
            masks.append(mask.reshape(block.extents))
        g, r, c = block.extents[:3]
        rows = ids(block.rows).reshape(g, r, 1, 1, 1, 1)
        cols = ids(block.cols).reshape(g, 1, c, 1, 1, 1)
        for u in cols.reshape(-1).tolist():
            columns[root[u]].append(count)
            count += 1
        per_block.append(BlockTables(block, array, rows, cols, masks[0], masks[1]))
    longest = max((len(found) for found in columns[:units]), default=0)
    padded = np.full((units + 1, longest), count, dtype=np.int64)
    for u in range(units):
        padded[u, : len(columns[u])] = columns[u]

    in_array = np.full(units + 1, -1)
    in_array[:-1][active] = [blocks[k][0] for k in in_edges[active, 0]]
    return Tables(
        tuple(per_block),
        in_tree,
        out_tree,
        in_array,
        root,
        can_move & ~in_is_free,
        padded,
    )


def convert(t: Tables, asarray: Callable[[NDArray[Any]], Array]) -> Tables:
    """The same tables as arrays of another namespace or device."""

    def of(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return asarray(x)
        if isinstance(x, tuple):
            return tuple(of(y) for y in x)
        if isinstance(x, (BlockTables, TreeTables, Tables)):
            return type(x)(*(of(getattr(x, f.name)) for f in fields(x)))
        return x

    converted: Tables = of(t)
    return converted


# reading blocks and trees


def real_type(xp: Any, where: Any) -> Any:
    """In what the trees are computed: float64, or float32 where there is no more (Apple's MPS; JAX by default)."""
    return xp.__array_namespace_info__().dtypes(device=where, kind="real floating").get("float64", xp.float32)


def view(xp: Any, b: BlockTables, arrays: Sequence[Array | None]) -> Array:
    """The block's entries, (groups, rows, cols, t0, t1, t2); None where there is no array."""
    return None if arrays[b.array] is None else b.block.view(arrays[b.array], xp)


def assemble(xp: Any, t: Tables, parts: Sequence[Array], like: Sequence[Array]) -> list[Array]:
    """Arrays shaped as `like` from the entries of their blocks; None where `like` is None."""
    pieces: dict[int, list[tuple[int, int, Array]]] = {}
    for b, part in zip(t.blocks, parts, strict=True):
        axis, first = b.block.start
        if like[b.array] is None:
            continue
        pieces.setdefault(b.array, []).append((first, axis, b.block.unview(part, xp)))
    arrays: list[Array] = []
    for i, old in enumerate(like):
        if old is None:
            arrays.append(None)
            continue
        found = sorted(pieces[i], key=lambda p: p[0])
        joined = xp.concat([p[2] for p in found], axis=found[0][1]) if len(found) > 1 else found[0][2]
        arrays.append(xp.reshape(joined, old.shape))
    return arrays


def at_tree(xp: Any, t: Tables, tree: TreeTables, arrays: Sequence[Array | None], end: float) -> Array:
    """The entries of `arrays` at the edges of a tree, one per unit.

    `end` where there is no edge, 0 where there is no array.
    """
    where = device(tree.order)
    real = real_type(xp, where)
    found = []
    for k, entries in zip(tree.blocks, tree.entries, strict=True):
        if arrays[t.blocks[k].array] is None:
            found.append(xp.zeros(entries.shape, dtype=real, device=where))
        else:
            values = xp.reshape(view(xp, t.blocks[k], arrays), (-1,))[entries]
            found.append(xp.astype(values, real))
    found.append(xp.full((1,), end, dtype=real, device=where))
    return xp.concat(found)[tree.order]


def along(tree: TreeTables, x: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """Combine a number per unit from every unit to the end of its tree."""
    for jump in tree.jumps:
        x = combine(x, x[jump])
    return x
