"""The plan of the C core in Python, on the stages of `gsgd.stages`: the oracle of the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gsgd.blocks import PINNED, Block
from gsgd.entries import along, at_edges, set_edges
from gsgd.layout import IN, Array, ArrayLayout, Edges, Shape, layout
from gsgd.methods import METHODS, Row
from gsgd.stages import Scale, bounds_of, gather, step, unsummed


class Plan:
    """`gsgd._core.Plan` in Python: the same methods on lists of NumPy arrays."""

    def __init__(self, units: int, shapes: Sequence[Shape], blocks: Sequence[tuple[int, Block]]) -> None:
        self.units = units
        self.shapes = shapes
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
        self._layout = layout(self.units, self.shapes, self.blocks, in_edges, out_edges)
        return np.asarray((in_edges[:, 0] >= 0) & ~self._layout.chain[:-1])

    def set_reference(self, in_weights: Array, out_weights: Array, c: Array) -> None:
        """Measure path values relative to these tree weights and scale (METHOD.md, section 4)."""
        self._scale = Scale.of(np.asarray, in_weights, out_weights, c)

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
        shared = {row: METHODS[int(row[0])].of_row(Row(*row)) for row in map(tuple, rates.tolist())}
        given = sum(g is not None and g.size > 0 for g in unsummed(self._layout, gradients))
        bounds = bounds_of(self._scale.c, [w.dtype for w in weights], given)
        with np.errstate(all="ignore"):
            # in C order, in which sums have the same bits for any strides
            new, solution = step(
                self._layout,
                self._scale,
                [np.ascontiguousarray(w) for w in weights],
                gradients,
                [None if g is None else np.ascontiguousarray(g) for g in (gradients if sums is None else sums)],
                None if norm is None else np.append(norm, 1.0),
                list(zip(m, v, strict=True)),
                [shared[tuple(row)] for row in rates.tolist()],
                max_ratio,
                None if math.isinf(clip_norm) else clip_norm,
                bounds,
            )
            if not solution.finite:
                fine = np.abs(solution.checked) <= bounds[: len(solution.checked), None]
                raise FloatingPointError(int(np.argmin(fine.all(axis=0))))
            for *old, (value, moments) in zip(weights, m, v, new, strict=True):
                for x, y in zip(old, (value, *moments), strict=True):
                    if x is not None:
                        x[...] = y
        return int(solution.clamped)

    def _along(self, values: Sequence[Array], combine: Callable[[Array, Array], Array], end: float) -> Array:
        """What `combine` makes of the values of tree edges along both trees, per unit, (2, H + 1)."""
        t = self._layout
        return along(t.jumps, np.append(at_edges(t, values), end)[t.edge], combine)

    def _at_ends(self, number: int, a: Array, b: Array) -> tuple[Array, Array, ArrayLayout]:
        """What is given per unit at the sources and the destinations of an array's entries."""
        own, t = self._layout.arrays[number], self._layout
        source = a[-1] if own.cols is None else a[own.cols.of(np, t.cols)]
        return source, b[-1] if own.rows is None else b[own.rows.of(np, t.rows)], own

    def path_values(self, weights: list[Array], values: list[Array], logs: list[Array] | None) -> None:
        """The value of the basis path that each weight owns, or its sign and logarithm."""

        def paths(
            to: list[Array], f: Callable[[Array], Array], combine: Callable[[Array, Array], Array], end: float
        ) -> None:
            x = [f(w.astype(np.float64)) for w in weights]
            a, b = self._along(x, combine, end)
            for i, (values, out) in enumerate(zip(x, to, strict=True)):
                source, destination, own = self._at_ends(i, a, b)
                found = combine(combine(source, values.reshape(own.shape)), destination).reshape(own.whole)
                is_free = own.edges.of(np, self._layout.owner) > self.units
                found[tuple(x[is_free] for x in own.index)] = np.nan
                out[...] = found

        with np.errstate(divide="ignore"):
            if logs is None:
                paths(values, lambda w: w, np.multiply, 1.0)
            else:
                paths(values, np.sign, np.multiply, 1.0)
                paths(logs, lambda w: np.log(np.abs(w)), np.add, 0.0)

    def path_gradients(
        self, weights: list[Array], gradients: list[Array], sums: list[Array], norm: Array | None, out: list[Array]
    ) -> None:
        """The inverse chain rule (section 4.2)."""
        t = self._layout
        found = gather(t, weights, sums, [(None, None)] * len(weights))
        if not np.isfinite(found.q).all():
            raise FloatingPointError(-1)
        a, b = self._along(weights, np.multiply, 1.0)
        d = found.q / (a * b)
        d = d if norm is None else d / np.append(norm, 1.0)
        of_edges = np.concatenate((d, np.full(self.units + 1, np.nan)))[t.owner]
        for i, (g, to) in enumerate(zip(gradients, out, strict=True)):
            source, destination, own = self._at_ends(i, a, b)
            new = (g.reshape(own.shape) / (source * destination)).reshape(g.shape)
            to[...] = set_edges(own, new, own.edges.of(np, of_edges))

    def allocate(self, weights: list[Array], ratios: list[Array], out: list[Array]) -> None:
        """Weight allocation (section 4.3)."""
        t = self._layout
        ratio = np.append(at_edges(t, ratios), 1.0)[t.edge[IN]]
        rho = np.where(t.chain, ratio, 1.0)[t.root]
        for i, (w, r, to) in enumerate(zip(weights, ratios, out, strict=True)):
            source, _, own = self._at_ends(i, rho, rho)
            new = (w.reshape(own.shape) * r.reshape(own.shape) / source).reshape(w.shape)
            is_free = own.edges.of(np, t.owner) > self.units
            to[...] = set_edges(own, new, np.where(is_free, w[own.index], new[own.index]))
