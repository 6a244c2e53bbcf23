"""The plan of the C core in Python, on the stages of `gsgd.stages`: the oracle of the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gsgd.blocks import PINNED, Block
from gsgd.layout import Array, Edges, along, assemble, at_tree, tables, view
from gsgd.methods import METHODS, Row
from gsgd.stages import Scale, gather, step


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
        shared = {row: METHODS[int(row[0])].of_row(Row(*row)) for row in map(tuple, rates.tolist())}
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
            largest = min(np.finfo(w.dtype).max for w in weights)
            for factor in (solution.a, solution.b, solution.ratio):
                good &= (1 / largest <= np.abs(factor)) & (np.abs(factor) <= largest)
            raise FloatingPointError(int(np.argmin(good)))
        new_m, new_v = zip(*moments, strict=True)
        for old, value in zip([*weights, *m, *v], [*new, *new_m, *new_v], strict=True):
            if old is not None:
                old[...] = value
        return int(solution.clamped)

    def path_values(self, weights: list[Array], values: list[Array], logs: list[Array] | None) -> None:
        """The value of the basis path that each weight owns, or its sign and logarithm."""
        t = self._tables
        in_weights, out_weights = (at_tree(np, t, tree, weights, 1.0) for tree in (t.in_tree, t.out_tree))

        def paths(f: Callable[[Array], Array], combine: Callable[[Array, Array], Array]) -> list[Array]:
            a, b = along(t.in_tree, f(in_weights), combine), along(t.out_tree, f(out_weights), combine)
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
        in_weights, out_weights = (at_tree(np, t, tree, weights, 1.0) for tree in (t.in_tree, t.out_tree))
        a, b = along(t.in_tree, in_weights, np.multiply), along(t.out_tree, out_weights, np.multiply)
        d = (in_weights * at_tree(np, t, t.in_tree, sums, 0.0) - s) / (a * b)
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
        rho = np.where(t.chain, at_tree(np, t, t.in_tree, ratios, 1.0), 1.0)[t.root]
        parts = []
        for k in t.blocks:
            w = view(np, k, weights)
            parts.append(np.where(k.free, w, w * view(np, k, ratios) / rho[k.cols]))
        for to, x in zip(out, assemble(np, t, parts, weights), strict=True):
            to[...] = x
