"""The three stages over the array API standard: the specification, and the oracle of the tests.

`gather`, `solve` and `apply` are pure functions of arrays of any namespace that array-api-compat knows. Units are
numbered from 0; vectors over units have one more entry, H, which stands for every pinned end: A = B = rho = 1.
Formulas: a is the product of tree weights from a pinned source, b to a pinned destination, relative to the
reference scale (A and B); x = w A(u) B(v) is the coordinate of an ordinary edge u -> v, A(v) B(v) that of a chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from gsgd.network import PINNED, Block
from gsgd.rates import Rates

Array = Any
Edges = NDArray[np.int64]


Moments = tuple[Array | None, Array | None]


def direction(xp: Any, o: Rates, d: Array, m: Array | None, v: Array | None) -> tuple[Array, Moments]:
    """The direction in which coordinates move, from their gradients d and moments; and the new moments."""
    if o.method == "sgd":
        if m is None:
            return d, (None, v)
        m = o.momentum * m + d
        return (d + o.momentum * m if o.nesterov else m), (m, v)
    v = o.second * v + (1 - o.second) * (d * d)
    if o.method == "adam":
        m = o.momentum * m + (1 - o.momentum) * d
        return o.correct_m * m / (xp.sqrt(o.correct_v * v) + o.eps), (m, v)
    d = d / (xp.sqrt(v) + o.eps)
    if m is not None:
        m = d = o.momentum * m + d
    return d, (m, v)


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


def _at_tree(xp: Any, t: Tables, tree: TreeTables, arrays: Sequence[Array | None], end: float) -> Array:
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


def _along(tree: TreeTables, x: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """Combine a number per unit from every unit to the end of its tree."""
    for jump in tree.jumps:
        x = combine(x, x[jump])
    return x


# the three stages


@dataclass(frozen=True)
class Scale:
    """The reference scale: weights of in-edges and out-edges, and c, per unit; 1 at the end."""

    in_weights: Array
    out_weights: Array
    c: Array


@dataclass(frozen=True)
class Solution:
    """What solve finds per unit: A, B, the chain ratio R, rho, the chain's new moments; and what went wrong."""

    a: Array
    b: Array
    ratio: Array
    rho: Array
    m: Array
    v: Array
    clip: Array
    clamped: Array
    finite: Array


def chain_products(t: Tables, scale: Scale, weights: Sequence[Array]) -> tuple[Array, Array]:
    """A and B per unit, the products of tree weights relative to the reference scale (METHOD.md, section 4)."""
    xp = array_namespace(*weights)
    a = _along(t.in_tree, _at_tree(xp, t, t.in_tree, weights, 1.0) / scale.in_weights, xp.multiply) / scale.c
    b = _along(t.out_tree, _at_tree(xp, t, t.out_tree, weights, 1.0) / scale.out_weights, xp.multiply) * scale.c
    return a, b


def gather(t: Tables, weights: Sequence[Array], sums: Sequence[Array | None]) -> Array:
    """S per chain root: the sum of w g over the edges that leave the units of a chain, free edges left out."""
    xp = array_namespace(*weights)
    where = device(weights[0])
    real = real_type(xp, where)
    columns = []
    for b in t.blocks:
        if sums[b.array] is None or (b.block.cols == PINNED).all():  # of pinned sources no sum is needed
            columns.append(xp.zeros((b.block.extents[0] * b.block.extents[2],), dtype=real, device=where))
            continue
        w, g = view(xp, b, weights), view(xp, b, sums)
        if xp.finfo(w.dtype).bits < 32:  # products of float16 would underflow
            w, g = xp.astype(w, real), xp.astype(g, real)
        products = xp.astype(w * g, real)
        products = xp.where(b.free, xp.zeros_like(products), products)
        columns.append(xp.reshape(xp.sum(products, axis=(1, 3, 4, 5)), (-1,)))
    columns.append(xp.zeros((1,), dtype=real, device=where))
    return xp.sum(xp.concat(columns)[t.columns_of_root], axis=1)


def sum_of_squares(t: Tables, a: Array, b: Array, gradients: Sequence[Array | None]) -> Array:
    """The sum of (dl/dx)^2 over ordinary edges, from the products A and B."""
    xp = array_namespace(a)
    total = xp.sum(xp.zeros_like(a))
    for k in t.blocks:
        if gradients[k.array] is not None:
            d = xp.astype(view(xp, k, gradients), a.dtype) / (a[k.cols] * b[k.rows])
            total = total + xp.sum(xp.where(k.chain | k.free, xp.zeros_like(d), d * d))
    return total


def solve(
    t: Tables,
    a: Array,
    b: Array,
    weights: Sequence[Array],
    gradients: Sequence[Array | None],
    sums: Sequence[Array | None],
    norm: Array | None,
    s: Array,
    squares: Array | None,
    moments: Sequence[Moments],
    rates: Sequence[Rates],
    max_ratio: float | Array,
    clip_norm: float | Array,
) -> Solution:
    """On the trees: the inverse chain rule, clipping, path ratios."""
    xp = array_namespace(*weights)
    x = a * b
    d = (_at_tree(xp, t, t.in_tree, weights, 1.0) * _at_tree(xp, t, t.in_tree, sums, 0.0) - s) / x
    d = d if norm is None else d / norm
    clip = xp.ones_like(xp.sum(x))
    if squares is not None:
        given = [i for i, g in enumerate(gradients) if g is not None]
        moves = t.chain & _among(xp, t.in_array, given, len(gradients))
        total = xp.sqrt(squares + xp.sum(xp.where(moves, d * d, xp.zeros_like(d))))
        clip = xp.minimum(clip, clip_norm / (total + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        d = clip * d
    m, v = (_at_tree(xp, t, t.in_tree, [pair[i] for pair in moments], 0.0) for i in (0, 1))
    r = xp.ones_like(x)
    for o in {id(o): o for o in rates}.values():
        mine = [i for i, own in enumerate(rates) if own is o and gradients[i] is not None]
        if not mine:
            continue
        here = t.chain & _among(xp, t.in_array, mine, len(rates))
        has_m = any(moments[i][0] is not None for i in mine)
        e, (new_m, new_v) = direction(xp, o, d, m if has_m else None, v)
        r = xp.where(here, 1 - o.lr * e / x, r)
        m, v = m if new_m is None else xp.where(here, new_m, m), xp.where(here, new_v, v)
    size = xp.clip(xp.abs(r), 1 / max_ratio, max_ratio)
    ratio = xp.where(r < 0, -size, size)
    finite = xp.isfinite(clip)
    for values in (r, 1 / ratio, x, 1 / x):
        finite = finite & xp.all(xp.isfinite(values))
    return Solution(a, b, ratio, ratio[t.root], m, v, clip, xp.count_nonzero(r != ratio), finite)


def _among(xp: Any, ids: Array, wanted: Sequence[int], count: int) -> Array:
    """Where `ids` (from 0 to count - 1) are wanted."""
    if len(wanted) == count:
        return xp.ones_like(ids, dtype=xp.bool)
    found = xp.zeros_like(ids, dtype=xp.bool)
    for i in wanted:
        found = found | (ids == i)
    return found


def apply(
    t: Tables,
    solution: Solution,
    weights: Sequence[Array],
    gradients: Sequence[Array | None],
    moments: Sequence[Moments],
    rates: Sequence[Rates],
) -> tuple[list[Array], list[Moments]]:
    """New weights and moments: ordinary edges, chains, and free edges, which stay.

    An array without gradient has no terms of its own: its paths keep their values.
    """
    xp = array_namespace(*weights)
    new_weights: list[Array] = []
    new_moments: list[list[Array | None]] = [[], []]
    per_unit: dict[Any, list[Array]] = {}  # in the dtype of the weights
    for k in t.blocks:
        o, w, m, v = rates[k.array], view(xp, k, weights), *(view(xp, k, x) for x in zip(*moments, strict=True))
        if w.dtype not in per_unit:
            a, b, ratio, rho = solution.a, solution.b, solution.ratio, solution.rho
            per_unit[w.dtype] = [
                xp.astype(x, w.dtype)
                for x in (a, b, 1 / a, 1 / b, ratio, 1 / rho, solution.clip, solution.m, solution.v)
            ]
        a, b, per_a, per_b, ratio, per_rho, clip, *of_chain = per_unit[w.dtype]
        rho = per_rho[k.cols]
        new = w
        if gradients[k.array] is not None:
            per_x = per_a[k.cols] * per_b[k.rows]  # dw / dx
            d = clip * (view(xp, k, gradients) * per_x)
            decay = o.weight_decay * (w * (a[k.cols] * b[k.rows]))
            e, (m, v) = direction(xp, o, d if o.decoupled else d + decay, m, v)
            new = w - o.lr * ((e + decay if o.decoupled else e) * per_x)
        new = xp.where(k.chain, w * ratio[k.rows] * rho, new * rho)
        new_weights.append(xp.where(k.free, w, new))
        for found, x, chain in zip(new_moments, (m, v), of_chain, strict=True):
            if x is not None:
                x = xp.where(k.free, xp.zeros_like(x), xp.where(k.chain, chain[k.rows], x))
            found.append(x)
    assembled = [assemble(xp, t, new_moments[i], [pair[i] for pair in moments]) for i in (0, 1)]
    return assemble(xp, t, new_weights, weights), list(zip(*assembled, strict=True))


def step(
    t: Tables,
    scale: Scale,
    weights: Sequence[Array],
    gradients: Sequence[Array | None],
    sums: Sequence[Array | None],
    norm: Array | None,
    moments: Sequence[Moments],
    rates: Sequence[Rates],
    max_ratio: float | Array,
    clip_norm: float | Array | None,
) -> tuple[list[Array], list[Moments], Solution]:
    """Gather, solve, apply.

    Parameters
    ----------
    sums, norm
        What approximations of batch normalization put in the place of gradients in the inverse chain rule of in-edges,
        and by what they divide dl/dx of a chain, (H + 1,); `gradients` and None without.
    max_ratio : float
        Limits the magnitudes of path ratios to ``[1 / max_ratio, max_ratio]``; infinity does not.
    clip_norm : float, optional
        Limits the norm of dl/dx over all coordinates.
    """
    a, b = chain_products(t, scale, weights)
    s = gather(t, weights, sums)
    squares = None if clip_norm is None else sum_of_squares(t, a, b, gradients)
    limits = (max_ratio, math.inf if clip_norm is None else clip_norm)
    solution = solve(t, a, b, weights, gradients, sums, norm, s, squares, moments, rates, *limits)
    return *apply(t, solution, weights, gradients, moments, rates), solution


# the plan: what the C core offers, on the functions above


class Plan:
    """`gsgd._core.Plan` in Python: the same methods on lists of NumPy arrays."""

    def __init__(self, units: int, arrays: int, blocks: Sequence[tuple[int, Block]]) -> None:
        self.units = units
        self.arrays = arrays
        self.blocks = list(blocks)

    def choose_trees(self, weights: Sequence[Array], largest: bool, scale: Array | None) -> tuple[Edges, Edges]:
        """Skeleton construction (section 4.1): the in-edge and the out-edge of every unit, (block, entry)."""
        views = [np.abs(b.view(weights[i])) for i, b in self.blocks]
        c = np.append(np.ones(self.units) if scale is None else scale, 1.0)
        pinned: set[int] = set()
        trees = []
        for source_side in (True, False):
            edges = np.full((self.units, 2), (-1, 0), dtype=np.int64)
            done = {PINNED} | pinned
            while True:
                found = True
                while found:
                    found = False
                    for k in range(len(views)) if source_side else reversed(range(len(views))):
                        found |= self._choose_in_block(k, views[k], source_side, largest, c, done, edges)
                stuck = [u for u in range(self.units) if u not in done]
                if not stuck:
                    break
                alive = {u for k in range(len(views)) for u in self._alive(k, views[k], source_side)}
                dead = [u for u in stuck if u not in alive] or stuck[:1]
                pinned.update(dead)
                done.update(dead)
            trees.append(edges)
        for edges in trees:
            edges[list(pinned)] = (-1, 0)
        return trees[0], trees[1]

    def _ends(self, k: int, source_side: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Units that seek an edge in a block, and those at the other end: (groups, entries) each."""
        b = self.blocks[k][1]
        rows, cols = b.rows.reshape(b.extents[0], -1), b.cols.reshape(b.extents[0], -1)
        return (rows, cols) if source_side else (cols, rows)

    def _alive(self, k: int, w: Array, source_side: bool) -> set[int]:
        seekers, _ = self._ends(k, source_side)
        return set(seekers[np.any(w != 0, axis=(2, 3, 4, 5) if source_side else (1, 3, 4, 5))].tolist())

    def _choose_in_block(
        self, k: int, w: Array, source_side: bool, largest: bool, c: Array, done: set[int], edges: Edges
    ) -> bool:
        seekers, others = self._ends(k, source_side)
        taps = w.shape[3:]
        centre = int(np.ravel_multi_index([n // 2 for n in taps], taps)) if all(taps) else 0
        order = [centre, *(n for n in range(int(np.prod(taps))) if n != centre)]
        found = False
        for g, i in np.ndindex(seekers.shape):
            if seekers[g, i] in done:
                continue
            count = others.shape[1]
            best, best_size = None, 0.0
            for n in range(count):
                j = n if largest else (i + n) % count
                if others[g, j] not in done:
                    continue
                r, col = (i, j) if source_side else (j, i)
                factor = 1 / c[others[g, j]] if source_side else c[others[g, j]]
                for tap in order:
                    size = float(w[g, r, col].reshape(-1)[tap]) * factor
                    if size > best_size:
                        best, best_size = (r * w.shape[2] + col) * len(order) + tap, size
                        if not largest:
                            break
                if best is not None and not largest:
                    break
            if best is not None:
                edges[seekers[g, i]] = k, g * w.shape[1] * w.shape[2] * len(order) + best
                done.add(int(seekers[g, i]))
                found = True
        return found

    def set_trees(self, in_edges: Edges, out_edges: Edges) -> NDArray[np.bool_]:
        """Use these trees; whether the in-edge of each unit is free."""
        self._tables = tables(self.units, self.blocks, in_edges, out_edges)
        return np.asarray((in_edges[:, 0] >= 0) & ~self._tables.chain[:-1])

    def set_reference(self, in_weights: Array, out_weights: Array, c: Array) -> None:
        """Measure path values relative to these tree weights and scale (METHOD.md, section 4)."""
        self._scale = Scale(*(np.append(x, 1.0) for x in (in_weights, out_weights, c)))

    def step(
        self,
        weights: list[Array],
        gradients: list[Array | None],
        sums: list[Array | None] | None,
        norm: Array | None,
        m: list[Array | None],
        v: list[Array | None],
        rates: NDArray[np.float64],
        max_ratio: float,
        clip_norm: float,
        threads: int,
    ) -> int:
        """One step in place; the number of ratios that were limited."""
        if not all(g is None or np.isfinite(g).all() for g in gradients):
            raise FloatingPointError(-1)
        shared = {row: Rates.of_row(row) for row in map(tuple, rates.tolist())}
        summed = gradients if sums is None else sums
        with np.errstate(all="ignore"):
            new, moments, solution = step(
                self._tables,
                self._scale,
                weights,
                gradients,
                summed,
                None if norm is None else np.append(norm, 1.0),
                list(zip(m, v, strict=True)),
                [shared[tuple(row)] for row in rates.tolist()],
                max_ratio,
                None if math.isinf(clip_norm) else clip_norm,
            )
        if not solution.finite:
            x = solution.a * solution.b
            good = np.isfinite(x) & (x != 0) & np.isfinite(solution.m) & np.isfinite(solution.v)
            good &= np.isfinite(solution.ratio) & (solution.ratio != 0)
            raise FloatingPointError(int(np.argmin(good)))
        new_m, new_v = zip(*moments, strict=True)
        for old, value in zip([*weights, *m, *v], [*new, *new_m, *new_v], strict=True):
            if old is not None:
                old[...] = value
        return int(solution.clamped)

    def path_values(self, weights: list[Array], values: list[Array], logs: list[Array] | None) -> None:
        """The value of the basis path that each weight owns, or its sign and logarithm."""
        t = self._tables
        in_weights, out_weights = (_at_tree(np, t, tree, weights, 1.0) for tree in (t.in_tree, t.out_tree))

        def paths(f: Callable[[Array], Array], combine: Callable[[Array, Array], Array]) -> list[Array]:
            a, b = _along(t.in_tree, f(in_weights), combine), _along(t.out_tree, f(out_weights), combine)
            found = [
                combine(combine(a[k.cols], f(view(np, k, weights).astype(np.float64))), b[k.rows]) for k in t.blocks
            ]
            return assemble(np, t, [np.where(k.free, np.nan, x) for k, x in zip(t.blocks, found, strict=True)], weights)

        with np.errstate(divide="ignore"):
            if logs is None:
                for to, x in zip(values, paths(lambda w: w, np.multiply), strict=True):
                    to[...] = x
            else:
                for to, x in zip(values, paths(np.sign, np.multiply), strict=True):
                    to[...] = x
                for to, x in zip(logs, paths(lambda w: np.log(np.abs(w)), np.add), strict=True):
                    to[...] = x

    def path_gradients(
        self, weights: list[Array], gradients: list[Array], sums: list[Array], norm: Array | None, out: list[Array]
    ) -> None:
        """The inverse chain rule (section 4.2)."""
        t = self._tables
        s = gather(t, weights, sums)
        in_weights, out_weights = (_at_tree(np, t, tree, weights, 1.0) for tree in (t.in_tree, t.out_tree))
        a, b = _along(t.in_tree, in_weights, np.multiply), _along(t.out_tree, out_weights, np.multiply)
        d = (in_weights * _at_tree(np, t, t.in_tree, sums, 0.0) - s) / (a * b)
        d = d if norm is None else d / np.append(norm, 1.0)
        if not np.isfinite(s).all():
            raise FloatingPointError(-1)
        parts = [
            np.where(k.free, np.nan, np.where(k.chain, d[k.rows], view(np, k, gradients) / (a[k.cols] * b[k.rows])))
            for k in t.blocks
        ]
        for to, x in zip(out, assemble(np, t, parts, weights), strict=True):
            to[...] = x

    def allocate(self, weights: list[Array], ratios: list[Array], out: list[Array]) -> None:
        """Weight allocation (section 4.3)."""
        t = self._tables
        rho = np.where(t.chain, _at_tree(np, t, t.in_tree, ratios, 1.0), 1.0)[t.root]
        parts = []
        for k in t.blocks:
            w = view(np, k, weights)
            parts.append(np.where(k.free, w, w * view(np, k, ratios) / rho[k.cols]))
        for to, x in zip(out, assemble(np, t, parts, weights), strict=True):
            to[...] = x
