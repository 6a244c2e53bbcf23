"""Gather, solve, apply over the array API standard: the specification of a step, and the oracle of the tests.

All are pure functions of arrays of any namespace that array-api-compat knows. Vectors over units have one more entry,
H, for every pinned end, where A = B = rho = 1; the two rows of what is given per tree are of in-edges and of out-edges.
Formulas are METHOD.md's: a and b are the products of tree weights from a pinned source and to a pinned destination,
relative to the reference scale (A and B); x = w A(u) B(v) is the coordinate of an ordinary edge u -> v, A(v) B(v) that
of a chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from gsgd.entries import along, at_edges, cut, largest, product, real_type, set_edges
from gsgd.layout import IN, OUT, Array, ArrayLayout, Layout
from gsgd.methods import Method, Moments


@dataclass(frozen=True)
class Scale:
    """The reference scale: the weights of tree edges, (2, H + 1), and c, (H + 1,); 1 where there is none."""

    weights: Array
    c: Array

    @classmethod
    def of(cls, asarray: Callable[[NDArray[Any]], Array], in_weights: Any, out_weights: Any, c: Any) -> Scale:
        """From NumPy arrays of shape (H,)."""
        rows = np.stack([np.append(x, 1.0) for x in (in_weights, out_weights, c)])
        return cls(asarray(rows[:2]), asarray(rows[2]))


@dataclass(frozen=True)
class Gathered:
    """What a step needs of the arrays per unit; of parts of them, these add up to those of the whole.

    S, the sum per chain root; weights of tree edges, (2, H + 1); of in-edges the gradient and the moments. They are 0
    where there is no edge. And, not per unit, the largest gradients, which shows whether all are finite.
    """

    s: Array
    weights: Array
    g: Array
    m: Array | None
    v: Array | None
    largest: Array


@dataclass(frozen=True)
class Solution:
    """What solve finds.

    1 / rho, 1 / A and 1 / B per unit, (3, H + 1); new weights and moments of tree edges, (2, H + 1); the factor that
    clips dl/dx; the number of limited ratios; what has to be finite per unit, (9, H + 1), in the types of the weights
    from the fourth on, and whether it is.
    """

    inverse: Array
    weights: Array
    m: Array | None
    v: Array | None
    clip: Array | None
    clamped: Array
    checked: Array
    finite: Array


@dataclass(frozen=True)
class Factors:
    """The part of a solution that one array needs, in its dtype: shapes that broadcast, None where all are 1."""

    per_row: Array | None
    per_col: Array | None
    per_rho: Array | None
    weights: Array
    m: Array | None
    v: Array | None
    clip: Array | None


def gather(t: Layout, weights: Sequence[Array], sums: Sequence[Array | None], moments: Sequence[Moments]) -> Gathered:
    """S(v): w g over all edges that leave the units of a chain and are not free (METHOD.md, section 2)."""
    xp = array_namespace(*weights)
    real = real_type(xp, device(weights[0]))
    parts = []
    for a, w, g in zip(t.arrays, weights, sums, strict=True):
        if a.cols is not None and g is None:
            parts.append(xp.zeros((a.cols.size,), dtype=real, device=device(w)))
        elif a.cols is not None:
            products = xp.reshape(product(w, g), a.shape)
            parts.append(xp.reshape(xp.sum(products, axis=a.over_rows, dtype=real), (-1,)))
    in_w, in_g = at_edges(t, weights, weights), at_edges(t, sums, weights)
    s = xp.concat([*parts, -xp.astype(product(in_w, in_g), real)])  # what free edges have added is taken back
    for rows in t.sums:
        s = xp.sum(s[rows], axis=1)
    m, v = (None if all(x is None for x in own) else at_edges(t, own, weights) for own in zip(*moments, strict=True))
    g, m, v = (None if x is None else xp.astype(x, real)[t.edge[IN, ...]] for x in (in_g, m, v))
    return Gathered(s, xp.astype(in_w, real)[t.edge], g, m, v, largest(sums, weights))


def relative(t: Layout, scale: Scale, weights: Array) -> tuple[Array, Array]:
    """A and B (METHOD.md, section 4), from the weights of tree edges."""
    xp = array_namespace(weights)
    ratios = along(t.jumps, xp.where(t.edge < t.owner.shape[0], weights / scale.weights, 1.0), xp.multiply)
    return ratios[IN, ...] / scale.c, ratios[OUT, ...] * scale.c


def sum_of_squares(t: Layout, a: Array, b: Array, gradients: Sequence[Array | None]) -> Array:
    """The sum of (dl/dx)^2 over ordinary edges; dl/dx = g / (A(u) B(v)) (METHOD.md, section 4)."""
    xp = array_namespace(a)
    total = xp.sum(xp.zeros_like(a))
    for own, g in zip(t.arrays, gradients, strict=True):
        if g is not None:
            d = xp.astype(xp.reshape(g, own.shape), a.dtype)
            d = d if own.rows is None else d / b[own.rows.of(xp, t.rows)]
            d = d if own.cols is None else d / a[own.cols.of(xp, t.cols)]
            if own.edges.size:
                d = set_edges(own, d, xp.zeros(own.edges.shape, dtype=d.dtype, device=device(d)))
            total = total + xp.sum(d * d)
    return total


def solve(
    t: Layout,
    a: Array,
    b: Array,
    found: Gathered,
    norm: Array | None,
    squares: Array | None,
    methods: Sequence[Method | None],
    types: Sequence[Any],
    max_ratio: float | Array,
    clip_norm: float | Array | None,
) -> Solution:
    """On the trees: the inverse chain rule, clipping, path ratios (METHOD.md, sections 2 and 3).

    The method is None of arrays without gradient, whose chains keep their values. `types` are those of the weights.
    """
    xp = array_namespace(a)
    x = a * b
    d = (found.weights[IN, ...] * found.g - found.s) / x
    d = d if norm is None else d / norm
    clip = None
    if squares is not None:
        moves = t.chain & among(xp, t.array, [i for i, o in enumerate(methods) if o is not None], len(methods))
        total = xp.sqrt(squares + xp.sum(xp.where(moves, d * d, 0.0)))
        clip = xp.minimum(xp.ones_like(total), clip_norm / (total + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        d = clip * d
    r, m, v = xp.ones_like(x), found.m, found.v
    for o in {id(o): o for o in methods if o is not None}.values():
        mine = [i for i, own in enumerate(methods) if own is o]
        here = t.chain & among(xp, t.array, mine, len(methods))
        e, (new_m, new_v) = o.direction(xp, d, m if o.has_m else None, v)
        r = xp.where(here, 1 - o.lr * e / x, r)
        m, v = m if new_m is None else xp.where(here, new_m, m), v if new_v is None else xp.where(here, new_v, v)
    limited = not isinstance(max_ratio, float) or math.isfinite(max_ratio)
    ratio = xp.copysign(xp.clip(xp.abs(r), 1 / max_ratio, max_ratio), r) if limited else r
    rho = ratio[t.root]
    in_weights = found.weights[IN, ...] * ratio / rho[t.end[IN, ...]]
    known = xp.stack([r, x, rho, a, b, in_weights])
    inverse = 1 / known[2:5, ...]
    checked = xp.concat([known, inverse])
    finite = xp.max(xp.abs(xp.concat([xp.reshape(checked, (-1,)), found.largest]))) < math.inf
    finite = finite if clip is None else finite & xp.isfinite(clip)
    if {*types} != {x.dtype}:  # they may overflow there
        finite = finite & (xp.max(xp.abs(checked[3:, ...])) <= min(xp.finfo(dtype).max for dtype in types))
    m, v = (None if y is None else xp.stack([y, xp.zeros_like(y)]) for y in (m, v))
    weights = xp.stack([in_weights, found.weights[OUT, ...]])
    return Solution(inverse, weights, m, v, clip, xp.count_nonzero(r != ratio), checked, finite)


def among(xp: Any, ids: Array, wanted: Sequence[int], count: int) -> Array:
    """Where `ids` (from 0 to count - 1) are wanted."""
    if len(wanted) == count:
        return xp.ones_like(ids, dtype=xp.bool)
    found = xp.zeros_like(ids, dtype=xp.bool)
    for i in wanted:
        found = found | (ids == i)
    return found


def spread(t: Layout, solution: Solution, weights: Sequence[Array]) -> Iterator[Factors]:
    """The solution as every array sees it."""
    xp = array_namespace(*weights)
    parts = {}
    for dtype in {w.dtype for w in weights}:
        inverse = xp.astype(solution.inverse, dtype)
        edges = (None if x is None else xp.astype(x, dtype) for x in (solution.weights, solution.m, solution.v))
        rows, cols, places = ([getattr(a, name) for a in t.arrays] for name in ("rows", "cols", "edges"))
        none = [None] * len(weights)
        parts[dtype] = list(
            zip(
                cut(inverse[2, ...], t.rows, rows),
                cut(inverse[1, ...], t.cols, cols),
                cut(inverse[0, ...], t.cols, cols),
                *(none if x is None else cut(xp.reshape(x, (-1,)), t.owner, places) for x in edges),
                none if solution.clip is None else [xp.astype(solution.clip, dtype)] * len(weights),
                strict=True,
            )
        )
    for i, w in enumerate(weights):
        yield Factors(*parts[w.dtype][i])


def apply(
    a: ArrayLayout, f: Factors, w: Array, g: Array | None, moments: Moments, method: Method
) -> tuple[Array, Moments]:
    """One array's new weights and moments (METHOD.md, sections 3 and 4): ordinary edges, and then those of trees.

    Without gradient it has no terms of its own: its paths keep their values.
    """
    xp = array_namespace(w)
    if g is None and f.per_rho is None:
        return w, moments
    new = xp.reshape(w, a.shape)
    if g is not None:
        m, v = (None if x is None else xp.reshape(x, a.shape) for x in moments)
        per_x = _product(f.per_row, f.per_col)  # dw / dx = 1 / (A(u) B(v))
        d = _product(f.clip, _product(per_x, xp.reshape(g, a.shape)))
        decays = not isinstance(method.weight_decay, float | int) or method.weight_decay != 0
        decay = method.weight_decay * (new if per_x is None else new / per_x) if decays else None
        e, (m, v) = method.direction(xp, d if decay is None or method.decoupled else d + decay, m, v)
        e = e + decay if decay is not None and method.decoupled else e
        new = new - _product(per_x, method.lr) * e
        m, v = (
            x if x is None else xp.reshape(set_edges(a, x, at) if a.edges.size else x, w.shape)
            for x, at in ((m, f.m), (v, f.v))
        )
        moments = m, v
    new = new if f.per_rho is None else new * f.per_rho
    return xp.reshape(set_edges(a, new, f.weights) if a.edges.size else new, w.shape), moments


def _product(x: Array | None, y: Array | None) -> Array | None:
    """Of two factors, None standing for 1."""
    return y if x is None else x if y is None else x * y


def step(
    t: Layout,
    scale: Scale,
    weights: Sequence[Array],
    gradients: Sequence[Array | None],
    sums: Sequence[Array | None],
    norm: Array | None,
    moments: Sequence[Moments],
    methods: Sequence[Method],
    max_ratio: float | Array,
    clip_norm: float | Array | None,
) -> tuple[Iterator[tuple[Array, Moments]], Solution]:
    """Gather, solve, apply: new weights and moments array by array, each made when it is asked for.

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
    found = gather(t, weights, sums, moments)
    a, b = relative(t, scale, found.weights)
    squares = None if clip_norm is None else sum_of_squares(t, a, b, gradients)
    taken = [None if g is None else o for g, o in zip(gradients, methods, strict=True)]
    types = [w.dtype for w in weights]
    solution = solve(t, a, b, found, norm, squares, taken, types, max_ratio, clip_norm)
    each = zip(t.arrays, spread(t, solution, weights), weights, gradients, moments, methods, strict=True)
    return (apply(*own) for own in each), solution
