"""How a network's weights lie in arrays: the unit at either end of every entry, and the places of tree edges.

Every entry of an array leads from the unit of its column to the unit of its row. Either is known from the entry's
index on one axis, or on two where there are groups, so that tables hold one id per line of an array and one per
position on it, never one per weight. A tree edge is given by its index on every axis: nothing here flattens an array,
and a part of an array has a part of its tables.

Units are numbered from 0. H, the number of units, stands for every pinned end: tables over units have H + 1 entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gsgd.blocks import PINNED, Block

if TYPE_CHECKING:
    from gsgd.network import Network

Array = Any
Edges = NDArray[np.int64]
Ids = NDArray[np.int32]
Shape = tuple[int, ...]

IN, OUT = 0, 1  # the rows of tables over both trees
UNREAD = {"rows", "cols", "owner", "edge", "end"}  # tables of which the stages read no more than the length


@dataclass(frozen=True)
class Span:
    """Consecutive entries of a table, in a shape of their own."""

    start: int
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size

    def of(self, xp: Any, table: Array) -> Array:
        """These entries of `table`."""
        return xp.reshape(table[self.start : self.stop], self.shape)


@dataclass(frozen=True, eq=False)
class Places:
    """Tree edges of an array, at most one on each line, or at each position.

    Attributes
    ----------
    edge : int array, of the shape of the array's `rows` or `cols`
        Which of the array's tree edges lies there; -1: none.
    at : tuple of int arrays of that shape, or None, one per axis of the array's `shape`
        Where it lies on this axis; None where the lines themselves have the axis.
    """

    edge: Array
    at: tuple[Array | None, ...]


@dataclass(frozen=True, eq=False)
class ArrayLayout:
    """What is known of one array of weights.

    Attributes
    ----------
    shape : tuple of int
        The array's shape as `rows` and `cols` see it: the axis of a grouped convolution's groups is split in two,
        (groups, channels of a group).
    rows, cols : Span or None
        The array's part of the layout's `rows` and `cols`, of a shape that broadcasts against `shape`. None where all
        are pinned.
    edges : Span
        Its part of the tree edges.
    index : tuple of int arrays, shape ``edges.shape``, one per axis of the array
        Where these tree edges lie.
    groups : int
        The first of the two axes of `shape` that are one of the array; -1: none are.
    chain, free : Places or None
        The same tree edges: in-edges of chains, by row; free edges, by column. None where the array has none.
    has_chains : bool
        Whether chains have their in-edges here.
    summed : bool
        Whether all entries leave units, and so enter the sums of chains (`Layout.sums`), which then are not finite
        where one of them is not.
    parts : tuple of Part
        Of a vector of several arrays, see `join`, where these are: they have its rows and columns.
    """

    shape: Shape
    rows: Span | None
    cols: Span | None
    edges: Span
    index: tuple[Array, ...]
    groups: int
    chain: Places | None
    free: Places | None
    has_chains: bool
    summed: bool
    parts: tuple[Part, ...] = ()

    @property
    def arrays(self) -> list[ArrayLayout]:
        """The arrays that it consists of."""
        return [p.array for p in self.parts] or [self]

    @property
    def whole(self) -> Shape:
        """The array's own shape."""
        g = self.groups
        return self.shape if g < 0 else (*self.shape[:g], self.shape[g] * self.shape[g + 1], *self.shape[g + 2 :])

    @property
    def over_rows(self) -> Shape:
        """The axes of `shape` to sum over for one number per position of `cols`."""
        assert self.cols is not None
        return tuple(axis for axis, n in enumerate(self.cols.shape) if n == 1)


@dataclass(frozen=True, eq=False)
class Part:
    """Where an array lies in a vector of several.

    Attributes
    ----------
    span : Span
        Its entries, of the shape that it has in the order in which they lie there.
    axes : tuple of int
        Which axis of that shape is each axis of the array.
    array : ArrayLayout
        Without tree edges, which are those of the vector.
    """

    span: Span
    axes: tuple[int, ...]
    array: ArrayLayout


@dataclass(frozen=True, eq=False)
class Layout:
    """Tables of a network and its trees.

    Attributes
    ----------
    arrays : tuple of ArrayLayout
    rows, cols : int arrays, shapes (lines,) and (positions,)
        The units that entries lead to and come from, array after array.
    owner : int array, shape (E,)
        Whose tree edges these are, array after array: unit v for the in-edge of a chain, H + 1 + u for the out-edge of
        u, which is free. (They index what has the shape (2, H + 1), flattened.)
    edge : int array, shape (2, H + 1)
        The inverse: the in-edge and the out-edge of every unit among tree edges; E where there is none.
    reads : int array, shape (4, H + 1)
        Where a step finds what is at tree edges: the weights of in-edges and out-edges among those of all, and after
        them two rows of moments of chains, each at the tree edges of arrays that have chains. The last of every row
        are for units without.
    end : int array, shape (2, H + 1)
        The unit at the other end of the in-edge, its source, and of the out-edge.
    roots : int array, shape (2, H + 1)
        The chain root: where following free in-edges ends (METHOD.md, section 2), and that of the in-edge's source.
    chain : bool array, shape (H + 1,)
        Whether a unit owns a chain: it has an in-edge, which is not free.
    array : int array, shape (H + 1,)
        The array in which the in-edge lies; -1: none.
    jumps : tuple of int arrays, shape (2, H + 1)
        For products along both trees: after each jump a unit has gathered twice as many. They index as `owner` does.
    sums : tuple of int arrays, shapes (n, k)
        For q per chain (METHOD.md, section 2). The first adds up entries of a vector, (positions + E + 1,): one number
        per position, one per tree edge, and 0; the next does so with the sums, and the last has H + 1 rows.
    sign : array, shape (positions + E + 1,)
        1 or -1: whether they are added or subtracted.
    ends : array, shape (2,)
        What stands for tree edges that are not there: 0, and 1 for their weights. In a part of a layout both are 0.
    factors : int array, shape (lines + 2 positions + 2 E,)
        What arrays need of the table `stages.Solution.checked`, (10, H + 1), flattened: 1 / A of their positions, 1 / B
        of their lines, 1 / rho of their positions, new weights of their tree edges and dl/dx of these.
    """

    arrays: tuple[ArrayLayout, ...]
    rows: Array
    cols: Array
    owner: Array
    edge: Array
    reads: Array
    end: Array
    roots: Array
    chain: Array
    array: Array
    jumps: tuple[Array, ...]
    sums: tuple[Array, ...]
    sign: Array
    ends: Array
    factors: Array

    @property
    def root(self) -> Array:
        """The chain root."""
        return self.roots[0]


def layout(
    units: int, shapes: Sequence[Shape], blocks: Sequence[tuple[int, Block]], in_edges: Edges, out_edges: Edges
) -> Layout:
    """The layout of a network of `units` units and its trees, in arrays of the given shapes.

    Parameters
    ----------
    blocks : sequence of (int, Block)
        Every block with the number of its array. An array without blocks lies between pinned ends.
    in_edges, out_edges : int64 arrays, shape (H, 2)
        The trees: a block and an entry of it per unit; block -1: none, and the unit is pinned.

    Raises
    ------
    ValueError
        The edges make no trees.
    """
    trees = (in_edges, out_edges)
    active = in_edges[:, 0] >= 0
    unit_of = np.append(np.where(active, np.arange(units), units), units)  # also of PINNED, the last
    end = np.stack([np.append(_ends(blocks, trees, tree, unit_of), units) for tree in (IN, OUT)])
    jumps = _jumps(end)
    in_is_free = np.zeros(units + 1, dtype=bool)
    inner = np.flatnonzero(end[IN] < units)
    in_is_free[inner] = (out_edges[end[IN, inner]] == in_edges[inner]).all(axis=1)
    root = np.arange(units + 1)
    while in_is_free[root].any():
        root = np.where(in_is_free[root], end[IN, root], root)
    chain = np.append(active, False) & ~in_is_free

    # the tree edges, each once, in the order of arrays
    owner = np.concatenate((np.flatnonzero(chain), units + 1 + np.flatnonzero(active)))
    edges = np.concatenate((in_edges[chain[:-1]], out_edges[active]))
    number = np.array([i for i, _ in blocks], dtype=np.int64)
    order = np.lexsort((edges[:, 0], number[edges[:, 0]]))
    owner, edges = owner[order], edges[order]
    edge = np.full((2, units + 1), len(edges))
    edge.reshape(-1)[owner] = np.arange(len(edges))
    edge[IN, in_is_free] = edge[OUT, end[IN, in_is_free]]
    array = np.full(units + 1, -1)
    array[:-1][active] = number[in_edges[active, 0]]

    of_array: list[list[Block]] = [[] for _ in shapes]
    for i, block in blocks:
        if block.size and shapes[i]:  # a number lies between pinned ends
            of_array[i].append(block)
    arrays = []
    rows: list[NDArray[np.int64]] = []
    cols: list[NDArray[np.int64]] = []
    bounds = np.searchsorted(number[edges[:, 0]], np.arange(len(shapes) + 1)).tolist()
    for i, (shape, mine) in enumerate(zip(shapes, of_array, strict=True)):
        here = edges[bounds[i] : bounds[i + 1]]
        index = [np.zeros(len(here), dtype=np.int32) for _ in shape]
        for k in np.unique(here[:, 0]):
            at = np.flatnonzero(here[:, 0] == k)
            for axis, places in zip(index, blocks[k][1].places(here[at, 1]), strict=True):
                axis[at] = places
        split, axis_of_groups = _split(shape, mine)
        spans = []
        for found, dim in ((rows, 1), (cols, 2)):
            table = unit_of[_ids(split, axis_of_groups, mine, dim)]
            spans.append(Span(sum(map(len, found)), table.shape) if (table < units).any() else None)
            if spans[-1]:
                found.append(table.reshape(-1))
        is_free = owner[bounds[i] : bounds[i + 1]] > units
        chain_places, free_places = (
            _places(split, span, axis_of_groups, index, kind)
            for span, kind in ((spans[0], ~is_free), (spans[1], is_free))
        )
        arrays.append(
            ArrayLayout(
                shape=split,
                rows=spans[0],
                cols=spans[1],
                edges=Span(bounds[i], (len(here),)),
                index=tuple(index),
                groups=axis_of_groups,
                chain=chain_places,
                free=free_places,
                has_chains=not is_free.all(),
                summed=spans[1] is not None and bool((cols[-1] < units).all()),
            )
        )
    all_rows, all_cols = (np.concatenate([np.zeros(0, np.int64), *found]) for found in (rows, cols))
    return Layout(
        **_tables(arrays, all_rows, all_cols, owner, edge, chain, root),
        end=end.astype(np.int32),
        roots=np.stack([root, root[end[IN]]]).astype(np.int32),
        chain=chain,
        array=array.astype(np.int32),
        jumps=jumps,
        ends=np.array([0.0, 1.0]),
    )


def part(t: Layout, held: Sequence[Sequence[NDArray[np.int64]] | None]) -> Layout:
    """The layout of parts of the arrays, which are products of indices: what `gather` finds in parts adds up.

    Parameters
    ----------
    held : sequence of sequences of int64 arrays, or None
        Of every array the indices on each axis that are here, ascending. None: nothing is, as if all of the array lay
        between pinned ends, and without tree edges.
    """
    units = len(t.root) - 1
    arrays: list[ArrayLayout] = []
    rows: list[NDArray[np.int32]] = []
    cols: list[NDArray[np.int32]] = []
    kept: list[NDArray[np.int64]] = []  # tree edges that are here
    for a, own in zip(t.arrays, held, strict=True):
        if own is None:
            none = Span(sum(map(len, kept)), (0,))
            index = tuple(x[:0] for x in a.index)
            pinned = replace(a, rows=None, cols=None, edges=none, index=index, chain=None, free=None)
            arrays.append(replace(pinned, has_chains=False, summed=False))
            continue
        spans: list[Span | None] = []
        for found, span, table in ((rows, a.rows, t.rows), (cols, a.cols, t.cols)):
            if span is None:
                spans.append(None)
                continue
            ids = _merged(span.of(np, table), a)
            for axis, here in enumerate(own):
                ids = ids if ids.shape[axis] == 1 else ids.take(here, axis=axis)
            spans.append(Span(sum(map(len, found)), ids.shape))
            found.append(ids.reshape(-1))
        at = []
        for n, here, index in zip(a.whole, own, a.index, strict=True):
            place = np.full(n, -1, dtype=np.int32)
            place[here] = np.arange(len(here))
            at.append(place[index])
        inside = np.all([x >= 0 for x in at], axis=0) if at else np.ones(a.edges.shape, dtype=bool)
        edges = Span(sum(map(len, kept)), (int(np.count_nonzero(inside)),))
        kept.append(a.edges.start + np.flatnonzero(inside))
        shape, index = tuple(map(len, own)), tuple(x[inside] for x in at)
        in_chain = t.owner[kept[-1]] < units + 1
        chain, free = _places(shape, spans[0], -1, index, in_chain), _places(shape, spans[1], -1, index, ~in_chain)
        arrays.append(
            ArrayLayout(
                shape=shape,
                rows=spans[0],
                cols=spans[1],
                edges=edges,
                index=index,
                groups=-1,
                chain=chain,
                free=free,
                has_chains=bool(in_chain.any()),
                summed=a.summed,
            )
        )
    numbers = np.concatenate([np.zeros(0, np.int64), *kept])
    of_edge = np.full(len(t.owner) + 1, len(numbers), dtype=np.int32)
    of_edge[numbers] = np.arange(len(numbers))
    owner = t.owner[numbers]
    all_rows, all_cols = (np.concatenate([np.zeros(0, np.int32), *found]) for found in (rows, cols))
    tables = _tables(arrays, all_rows, all_cols, owner, of_edge[t.edge], t.chain, t.root)
    return replace(t, **tables, ends=np.zeros(2))


def join(t: Layout, groups: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...]]) -> Layout:
    """The layout in which arrays are joined.

    Parameters
    ----------
    groups : sequence of tuples of int
        All arrays in their order, those together that are to be one vector. One by itself stays as it is.
    strides : sequence of tuples of int
        Of every array: entries are joined in the order in which they lie in memory, without gaps.
    """
    arrays: list[ArrayLayout] = []
    for group in groups:
        if len(group) == 1:
            arrays.append(t.arrays[group[0]])
            continue
        own = [t.arrays[i] for i in group]
        parts: list[Part] = []
        places = [np.zeros(0, np.int32)]
        start = 0
        for i, a in zip(group, own, strict=True):
            order = sorted(range(len(a.whole)), key=lambda axis: -strides[i][axis])
            shape = tuple(a.whole[axis] for axis in order)
            if a.edges.size:
                at = np.ravel_multi_index([a.index[axis] for axis in order], shape)
                places.append((start + at).astype(np.int32))
            bare = replace(a, edges=Span(0, (0,)), index=(), chain=None, free=None, has_chains=False, summed=False)
            part = Part(Span(start, shape), tuple(order.index(axis) for axis in range(len(shape))), bare)
            start = part.span.stop
            both = _in_one(parts[-1], part) if parts else None
            parts = [*parts[:-1], both] if both else [*parts, part]
        index = np.concatenate(places)
        edges = Span(own[0].edges.start, (len(index),))
        has_chains, summed = any(a.has_chains for a in own), all(a.summed for a in own)
        arrays.append(
            ArrayLayout((start,), None, None, edges, (index,), -1, None, None, has_chains, summed, tuple(parts))
        )
    number = np.full(len(t.arrays) + 1, -1, dtype=np.int32)  # the last for units that are pinned
    for new, group in enumerate(groups):
        number[list(group)] = new
    return replace(t, arrays=tuple(arrays), array=number[t.array], reads=_reads(t.edge, t.chain, arrays))


def _in_one(first: Part, second: Part) -> Part | None:
    """Two vectors as one, if what stands for their entries stands in the tables one after the other."""
    a, b = first.array, second.array
    if len(a.shape) != 1 or len(b.shape) != 1:
        return None
    spans: list[Span | None] = []
    for x, y in ((a.rows, b.rows), (a.cols, b.cols)):
        if x is None and y is None:
            spans.append(None)
        elif x is None or y is None or x.shape != a.shape or y.shape != b.shape or x.stop != y.start:
            return None
        else:
            spans.append(Span(x.start, (x.size + y.size,)))
    n = (a.shape[0] + b.shape[0],)
    return Part(Span(first.span.start, n), (0,), replace(a, shape=n, rows=spans[0], cols=spans[1]))


def network_layout(net: Network, shapes: Mapping[str, Shape], in_edges: Edges, out_edges: Edges) -> Layout:
    """The layout of a network and its trees in arrays by name, in their order; see `layout`."""
    number = {name: i for i, name in enumerate(shapes)}
    blocks = [(number[b.name], b) for b in net.blocks]
    return layout(net.num_units, list(shapes.values()), blocks, in_edges, out_edges)


@dataclass(frozen=True, eq=False)
class Lines:
    """A part of an array as it lies in memory: entry (i, j) at ``start + i * strides[0] + j * strides[1]``.

    Attributes
    ----------
    start : int
    shape, strides : tuples of two int
        Numbers of lines and of positions on each, and their distances, in entries.
    rows, cols : int arrays
        The units of rows and columns, one per line or one per position.
    row_axis, col_axis : {0, 1}
        Which of the two: 0 for lines, 1 for positions.
    edges : int array, shape (3, n)
        The tree edges in it: number, line, position.
    """

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    rows: Ids
    cols: Ids
    row_axis: int
    col_axis: int
    edges: Ids


def lines(t: Layout, number: int, strides: Sequence[int]) -> list[Lines] | None:
    """The array of this number, of these strides in entries, as lines; one part per group. None: it does not lie so.

    Of all ways to cut its axes into those of lines and those of positions, the one of the shortest tables.
    """
    a, units = t.arrays[number], len(t.root) - 1
    shape, steps, index = list(a.shape), list(strides), list(a.index)
    if a.groups >= 0:
        steps.insert(a.groups, steps[a.groups] * shape[a.groups + 1])
        index[a.groups : a.groups + 1] = np.divmod(index[a.groups], shape[a.groups + 1])
    rows, cols = (
        np.full([1] * len(shape), units, dtype=np.int32) if span is None else span.of(np, table)
        for span, table in ((a.rows, t.rows), (a.cols, t.cols))
    )
    row_axes, col_axes = ({i for i, n in enumerate(ids.shape) if n > 1} for ids in (rows, cols))
    apart = row_axes & col_axes if row_axes != col_axes else set()  # axes of which every index is a part of its own
    inner = sorted((i for i, n in enumerate(shape) if n > 1 and i not in apart), key=lambda i: -steps[i])
    cuts = []
    for k in range(len(inner) + 1):
        sides = inner[:k], inner[k:]
        even = all(steps[i] == steps[j] * shape[j] for side in sides for i, j in pairwise(side))
        on = [[s for s in (0, 1) if axes - apart <= {*sides[s]}] for axes in (row_axes, col_axes)]
        if even and all(on):
            cuts.append((sum(math.prod(shape[i] for i in side) for side in sides), sides, on[0][0], on[1][0]))
    if not cuts:
        return None
    _, sides, row_axis, col_axis = min(cuts, key=lambda cut: cut[0])
    extents = [math.prod(shape[i] for i in side) for side in sides]

    def along(side: Sequence[int], ids: Ids) -> Ids:
        """The ids, of extent 1 on all other axes, in the order of the side."""
        ids = np.broadcast_to(ids, [n if i in side else 1 for i, n in enumerate(shape)])
        return ids.transpose([*(i for i in range(len(shape)) if i not in side), *side]).reshape(-1)

    numbers = np.arange(a.edges.start, a.edges.stop)
    line, position = (
        sum((index[i] * math.prod(shape[j] for j in side[k + 1 :]) for k, i in enumerate(side)), 0 * numbers)
        for side in sides
    )
    found = []
    for at in np.ndindex(*(shape[i] if i in apart else 1 for i in range(len(shape)))):
        part = [slice(at[i], at[i] + 1) if i in apart else slice(None) for i in range(len(shape))]
        own_rows, own_cols = (
            ids[tuple(p if n > 1 else slice(None) for p, n in zip(part, ids.shape, strict=True))]
            for ids in (rows, cols)
        )
        here = np.all([index[i] == at[i] for i in apart], axis=0) if apart else np.ones(len(numbers), bool)
        found.append(
            Lines(
                sum(at[i] * steps[i] for i in apart),
                tuple(extents),
                tuple(steps[side[-1]] if side else 1 for side in sides),
                along(sides[row_axis], own_rows),
                along(sides[col_axis], own_cols),
                row_axis,
                col_axis,
                np.stack([x[here] for x in (numbers, line, position)]).astype(np.int32),
            )
        )
    return found


def convert(t: Layout, asarray: Callable[[NDArray[Any]], Array]) -> Layout:
    """The same tables as arrays of another namespace or device, but for those that no stage reads."""

    def of(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return asarray(x)
        if isinstance(x, tuple):
            return tuple(map(of, x))
        if isinstance(x, (Places, ArrayLayout, Part)):
            return type(x)(**{f.name: of(getattr(x, f.name)) for f in fields(x)})
        return x

    return replace(t, **{f.name: of(getattr(t, f.name)) for f in fields(t) if f.name not in UNREAD})


def _ends(
    blocks: Sequence[tuple[int, Block]], trees: tuple[Edges, Edges], tree: int, unit_of: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The units at the other ends of in-edges (their sources) or of out-edges; H where there is none."""
    edges = trees[tree]
    found = np.full(len(edges), len(edges))
    order = np.argsort(edges[:, 0], kind="stable")
    bounds = np.searchsorted(edges[order, 0], np.arange(len(blocks) + 1))
    for (_, block), first, last in zip(blocks, bounds[:-1], bounds[1:], strict=True):
        here = order[first:last]
        g, r, c, *_ = np.unravel_index(edges[here, 1], block.extents)
        row, col = block.rows[g * block.extents[1] + r], block.cols[g * block.extents[2] + c]
        own, other = (row, col) if tree == IN else (col, row)
        if (own != here).any():
            raise ValueError(f"the skeleton edges of unit {here[own != here][0]} make no tree")
        found[here] = unit_of[other]
    return found


def _jumps(end: NDArray[np.int64]) -> tuple[Ids, ...]:
    """Where following both trees leads after 1, 2, 4, ... edges, until nothing is left to follow."""
    units = end.shape[1] - 1
    jumps: list[Ids] = []
    while (end != units).any():
        if 2 ** len(jumps) > units:
            raise ValueError("the skeleton edges make no tree: following them never ends")
        jumps.append((end + np.array([[0], [units + 1]])).astype(np.int32))
        end = np.take_along_axis(end, end, axis=1)
    return tuple(jumps)


def _split(shape: Shape, blocks: Sequence[Block]) -> tuple[Shape, int]:
    """The shape with the axis of groups split in two, and the first of them; -1: none is."""
    for block in blocks:
        group, *others = block.dims
        if group.extent > 1 and any(d.extent > 1 and d.axis == group.axis for d in others):
            axis, n = group.axis, group.extent
            return (*shape[:axis], n, shape[axis] // n, *shape[axis + 1 :]), axis
    return shape, -1


def _ids(shape: Shape, axis_of_groups: int, blocks: Sequence[Block], side: int) -> NDArray[np.int64]:
    """The unit ids of rows (side 1) or columns (side 2), on the axes of `shape` on which they are not all the same."""

    def axis_of(block: Block, i: int) -> int:
        axis = block.dims[i].axis
        return axis + (axis_of_groups >= 0 and (axis > axis_of_groups or (axis == axis_of_groups and i > 0)))

    def ids_of(block: Block) -> NDArray[np.int64]:
        return block.rows if side == 1 else block.cols

    axes = {axis_of(b, i) for b in blocks for i in (0, side) if b.dims[i].extent > 1}
    if any(not np.array_equal(ids_of(b), ids_of(blocks[0])) for b in blocks):
        axes.add(blocks[0].start[0])  # the parts of a layer lie one after the other
    table = np.full([n if axis in axes else 1 for axis, n in enumerate(shape)], PINNED)
    for b in blocks:
        index = [np.zeros((1,) * 6, dtype=np.int64) for _ in shape]
        if b.start[0] in axes:
            index[b.start[0]] += b.start[1]
        for i, dim in enumerate(b.dims):
            axis = axis_of(b, i)
            if dim.extent > 1 and axis in axes:
                step = 1 if i == 0 and axis == axis_of_groups else dim.step
                index[axis] = index[axis] + step * np.arange(dim.extent).reshape(
                    [-1 if j == i else 1 for j in range(6)]
                )
        extents = [dim.extent if i in (0, side) else 1 for i, dim in enumerate(b.dims)]
        table[tuple(index)] = ids_of(b).reshape(extents)
    return table


def _places(
    shape: Shape, lines: Span | None, axis_of_groups: int, index: Sequence[Ids], which: NDArray[np.bool_]
) -> Places | None:
    """Those of the tree edges at `index` that are wanted, by line."""
    if lines is None or not which.any():
        return None
    at = list(index)
    if axis_of_groups >= 0:
        at[axis_of_groups : axis_of_groups + 1] = np.divmod(at[axis_of_groups], shape[axis_of_groups + 1])
    here = tuple(x[which] if n > 1 else 0 * x[which] for x, n in zip(at, lines.shape, strict=True))
    edge = np.full(lines.shape, -1, dtype=np.int32)
    edge[here] = np.flatnonzero(which)
    on_axis = (np.append(x[which], 0) for x in at)
    number = np.full(lines.shape, -1)
    number[here] = np.arange(np.count_nonzero(which))
    return Places(edge, tuple(None if n > 1 else x[number] for x, n in zip(on_axis, lines.shape, strict=True)))


def _merged(ids: Ids, a: ArrayLayout) -> Ids:
    """Ids on the array's own axes: those of groups, where they are split in two, are one again."""
    g = a.groups
    if g < 0:
        return ids
    if ids.shape[g] > 1 or ids.shape[g + 1] > 1:
        ids = np.broadcast_to(ids, (*ids.shape[:g], *a.shape[g : g + 2], *ids.shape[g + 2 :]))
    return ids.reshape(*ids.shape[:g], -1, *ids.shape[g + 2 :])


def _tables(
    arrays: Sequence[ArrayLayout],
    rows: NDArray[Any],
    cols: NDArray[Any],
    owner: NDArray[Any],
    edge: NDArray[Any],
    chain: NDArray[np.bool_],
    root: NDArray[Any],
) -> dict[str, Any]:
    """What differs between a layout and its parts: these, and what follows from them."""
    units = len(root) - 1
    return {
        "arrays": tuple(arrays),
        "rows": rows.astype(np.int32),
        "cols": cols.astype(np.int32),
        "owner": owner.astype(np.int32),
        "edge": edge.astype(np.int32),
        "reads": _reads(edge, chain, arrays),
        "sums": _sums(_owners(root, cols, owner), units),
        "sign": _signs(cols, owner),
        "factors": _factors(rows, cols, owner, units),
    }


def _owners(root: NDArray[Any], cols: NDArray[Any], owner: NDArray[Any]) -> NDArray[np.int64]:
    """Whose q each position and each tree edge enters, H for none: S of positions, less what free edges add to it."""
    units = len(root) - 1
    return np.append(root[cols], np.where(owner > units, root[owner - units - 1], owner)).astype(np.int64)


def _reads(edge: NDArray[Any], chain: NDArray[np.bool_], arrays: Sequence[ArrayLayout]) -> Ids:
    """See `Layout.reads`: moments are read at the tree edges of arrays with chains, one after the other."""
    count = sum(a.edges.size for a in arrays)
    kept = [np.arange(a.edges.start, a.edges.stop) for a in arrays if a.has_chains]
    own = np.concatenate([*kept, [count]])
    place = np.full(count + 1, len(own) - 1)
    place[own] = np.arange(len(own))
    moments = place[np.where(chain, edge[IN], count)]
    return np.stack([*edge, count + 1 + moments, count + 1 + len(own) + moments]).astype(np.int32)


def _signs(cols: NDArray[Any], owner: NDArray[Any]) -> NDArray[np.float64]:
    """See `Layout.sign`."""
    return np.repeat([-1.0, 1.0], [len(cols), len(owner) + 1])


def _factors(rows: NDArray[Any], cols: NDArray[Any], owner: NDArray[Any], units: int) -> Ids:
    """The places in a table of six numbers per unit: see `Layout.factors`."""
    n = units + 1
    slopes = 5 * n + np.minimum(owner, units)  # of free edges that of pinned ends, 0
    return np.concatenate((cols, n + rows, 2 * n + cols, 3 * n + owner, slopes)).astype(np.int32)


def _sums(owner: NDArray[np.int64], units: int, width: int = 64, last: int = 16) -> tuple[Ids, ...]:
    """Tables that add up numbers by owner, at most `width` at once, in the last table `last`; owners `units` have 0."""
    items = np.argsort(owner, kind="stable")[: np.count_nonzero(owner < units)]
    own, zero = owner[items], len(owner)
    tables: list[Ids] = []
    while True:
        count = np.bincount(own, minlength=units)
        rank = np.arange(len(own)) - (np.cumsum(count) - count)[own]
        most = int(count.max(initial=1))
        if most <= last:
            table = np.full((units + 1, most), zero, dtype=np.int32)
            table[own, rank] = items
            return (*tables, table)
        lines = -(-count // width)
        table = np.full((lines.sum() + 1, min(width, most)), zero, dtype=np.int32)
        table[(np.cumsum(lines) - lines)[own] + rank // width, rank % width] = items
        tables.append(table)
        own, items, zero = np.repeat(np.arange(units), lines), np.arange(lines.sum()), len(table) - 1
