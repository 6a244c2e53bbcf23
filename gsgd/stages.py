"""Gather, solve, apply over the array API standard: the specification of a step, and the oracle of the tests.

All are functions of arrays of any namespace that array-api-compat knows; `apply` writes to those of PyTorch. Vectors
over units have one more entry, H, for every pinned end, where A = B = rho = 1; the two rows of what is given per tree
are of in-edges and of out-edges. Where arrays are joined (`layout.join`) a list of vectors stands for the weights, or
the gradients, of one.
Formulas are METHOD.md's: a and b are the products of tree weights from a pinned source and to a pinned destination,
relative to the reference scale (A and B); x = w A(u) B(v) is the coordinate of an ordinary edge u -> v, A(v) B(v) that
of a chain.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from gsgd.entries import (
    along,
    cut,
    magnitudes,
    products,
    read,
    real_type,
    scaled,
    select,
    set_edges,
    take,
    times,
    types_of,
    verdict,
    wide,
)
from gsgd.layout import IN, OUT, Array, ArrayLayout, Layout
from gsgd.methods import Method, Moments


@dataclass(frozen=True)
class Scale:
    """The reference scale: the weights of tree edges, (2, H + 1), 1 where there is none; and 1 / c and c, likewise."""

    weights: Array
    c: Array

    @classmethod
    def of(cls, asarray: Callable[[NDArray[Any]], Array], in_weights: Any, out_weights: Any, c: Any) -> Scale:
        """From NumPy arrays of shape (H,)."""
        weights, c = (
            np.stack([np.append(x, 1.0) for x in rows]) for rows in ((in_weights, out_weights), (1 / np.asarray(c), c))
        )
        return cls(asarray(weights), asarray(c))


@dataclass(frozen=True)
class Gathered:
    """What a step needs of the arrays per unit; of parts of them, these add up to those of the whole.

    q of chains, 0 where there is none; weights of tree edges, (2, H + 1), 1 where there is none (in parts 0); the
    moments of in-edges. And, not per unit, the magnitude of the gradient of every array that is not `summed`, which
    shows whether all is finite; of others q does.
    """

    q: Array
    weights: Array
    m: Array | None
    v: Array | None
    magnitudes: Sequence[Array]


@dataclass(frozen=True)
class Solution:
    """What solve finds.

    Per unit, (10, H + 1), what has to be within `bounds`: 1 / A, 1 / B, 1 / rho, the new weights of in-edges and of
    out-edges, dl/dx of chains, all of which arrays need; and path ratios, A, B, rho. The factor that clips dl/dx; the
    number of limited ratios, if all is within its bounds; whether it is.
    """

    checked: Array
    clip: Array | None
    clamped: Array
    finite: Array


@dataclass(frozen=True)
class Factors:
    """The part of a solution that one array needs, in its dtype.

    1 / A of positions, 1 / B of lines and 1 / rho of positions, for each array that is joined: shapes that broadcast,
    None where all are 1. What `set_edges` takes: new weights of tree edges, and dl/dx of these, 0 where they are free.
    The squares of the first two for plain gradient descent, which multiplies a gradient by both at once.
    """

    per_col: list[Array | None]
    per_row: list[Array | None]
    per_rho: list[Array | None]
    weights: Any
    d: Any
    clip: Array | None
    squares: tuple[list[Array | None], ...] | None


def gather(t: Layout, weights: Sequence[Array], sums: Sequence[Array | None], moments: Sequence[Moments]) -> Gathered:
    """q = w g - S of chains, with S the sum of w g over all edges that leave their units (METHOD.md, section 2).

    Free edges are in the sums of positions, and then taken back.
    """
    xp = array_namespace(weights[0][0] if isinstance(weights[0], Sequence) else weights[0])
    real = real_type(xp, device(t.sign))
    kinds = [k for k in (0, 1) if any(own[k] is not None for own in moments)]
    columns: list[Array] = []
    slopes: list[Array] = []
    own_weights: list[Array] = []
    rows: list[list[Array]] = [[] for _ in kinds]
    for a, w, g, own in zip(t.arrays, weights, sums, moments, strict=True):
        if a.edges.size or any(x.cols for x in a.arrays):
            w = read(w)
            own_weights.append(take(w, a.index))
            found, g_at_edges = products(a, w, None if g is None else read(g), real)
            columns += found
            slopes.append(g_at_edges)
            if a.has_chains:
                for row, x in zip(rows, (own[k] for k in kinds), strict=True):
                    row.append(xp.zeros_like(g_at_edges) if x is None else take(x, a.index))
    # g and w of tree edges; their products are rounded as in the sums: a free edge without others leaves exactly 0
    both = wide(xp.concat([*slopes, *own_weights])) if slopes else t.ends[:0]
    half = both.shape[0] // 2
    zero, one = t.ends[:1], t.ends[1:]
    at_edges = (both[:half] * both[half:], zero, both[half:], one, *(x for row in rows for x in (*row, zero)))
    numbers = xp.concat([*columns, *at_edges])
    n = t.sign.shape[0]
    q = numbers[:n] * t.sign
    for entries in t.sums:
        q = xp.sum(take(q, entries), axis=1)
    table = take(numbers[n:], t.reads[: 2 + len(kinds), ...])
    m, v = table[2, ...] if 0 in kinds else None, table[-1, ...] if 1 in kinds else None
    return Gathered(q, table[:2, ...], m, v, magnitudes(unsummed(t, sums)))


def unsummed(t: Layout, each: Sequence[Any]) -> list[Any]:
    """What is given of arrays of which q does not show whether all gradients are finite."""
    return [x for a, x in zip(t.arrays, each, strict=True) if not a.summed]


def relative(t: Layout, scale: Scale, weights: Array) -> Array:
    """A and B (METHOD.md, section 4), (2, H + 1), from the weights of tree edges."""
    return along(t.jumps, weights / scale.weights, operator.mul) * scale.c


def sum_of_squares(t: Layout, ab: Array, gradients: Sequence[Array | None]) -> Array:
    """The sum of (dl/dx)^2 over ordinary edges; dl/dx = g / (A(u) B(v)) (METHOD.md, section 4)."""
    xp = array_namespace(ab)
    total = xp.zeros((), dtype=ab.dtype, device=device(ab))
    factors: dict[Any, list[Any]] = {}
    for i, (a, g) in enumerate(zip(t.arrays, gradients, strict=True)):
        if g is not None:
            d = wide(read(g))
            if d.dtype not in factors:
                factors[d.dtype] = list(cut(xp.astype(xp.reciprocal(ab), d.dtype), t))
            d = times(a, d, *factors[d.dtype][i])
            d = set_edges(a, d, 0.0)
            total = total + xp.sum(d * d, dtype=ab.dtype)
    return total


def solve(
    t: Layout,
    ab: Array,
    found: Gathered,
    norm: Array | None,
    squares: Array | None,
    methods: Sequence[Method | None],
    bounds: Array,
    max_ratio: float | Array,
    clip_norm: float | Array | None,
) -> Solution:
    """On the trees: the inverse chain rule, clipping, path ratios (METHOD.md, sections 2 and 3).

    The method is None of arrays without gradient, whose chains keep their values. `bounds` are those of `bounds_of`.
    """
    xp = array_namespace(ab)
    a, b = ab[IN, ...], ab[OUT, ...]
    d = found.q / a / b
    d = d if norm is None else d / norm
    clip = None
    if squares is not None:
        moves = owned(t, [o is not None for o in methods])
        total = xp.sqrt(squares + xp.sum(xp.where(moves, d * d, 0.0)))
        clip = xp.minimum(xp.ones_like(total), clip_norm / (total + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        d = clip * d
    r = None
    for o in {id(o): o for o in methods if o is not None}.values():
        e, _ = o.direction(1.0 * d if o.has_v else d, found.m if o.has_m else None, found.v)
        new, mine = 1 - o.lr * e / a / b, [own is o for own in methods]
        if o.has_v or not all(mine):  # otherwise e is 0 where there is no chain
            new = xp.where(owned(t, mine), new, xp.ones_like(d) if r is None else r)
        r = new
    r = xp.ones_like(d) if r is None else r
    limited = not isinstance(max_ratio, float) or math.isfinite(max_ratio)
    ratio = xp.copysign(xp.clip(xp.abs(r), 1 / max_ratio, max_ratio), r) if limited else r
    rho = take(ratio, t.roots)  # of every unit, and of the source of its in-edge
    known = xp.concat([ab, rho[:1, ...]])
    inverse = xp.reciprocal(known)
    in_weights = found.weights[IN, ...] * ratio / rho[1, ...]
    new = (xp.expand_dims(y, axis=0) for y in (in_weights, found.weights[OUT, ...], d, r))
    checked = xp.concat([inverse, *new, known])
    finite, clamped = verdict(checked, found.magnitudes, bounds, r != ratio)
    return Solution(checked, clip, clamped, finite)


def bounds_of(like: Array, types: Sequence[Any], gradients: int) -> Array:
    """The largest magnitudes that a step may have: of `Solution.checked` by row, and of so many `Gathered.magnitudes`.

    What is written, or multiplies what is, has to be finite in the types of the weights, too.
    """
    xp, where = array_namespace(like), device(like)
    real = real_type(xp, where)
    most, least = xp.finfo(real).max, min(xp.finfo(dtype).max for dtype in types)
    return xp.asarray([*[least] * 5, most, most, *[least] * 3, *[most] * gradients], dtype=real, device=where)


def owned(t: Layout, wanted: Sequence[bool]) -> Array:
    """Which units own a chain whose in-edge is in one of these arrays."""
    if all(wanted):
        return t.chain
    found = t.array < -1
    for i, is_wanted in enumerate(wanted):
        found = found | (t.array == i) if is_wanted else found
    return t.chain & found


def spread(t: Layout, solution: Solution, weights: Sequence[Array], methods: Sequence[Method]) -> Iterator[Factors]:
    """The solution as every array sees it."""
    xp = array_namespace(solution.checked)
    types = types_of(weights)
    tables = {dtype: xp.astype(solution.checked, dtype) for dtype in set(types)}
    squares = {
        dtype: list(cut(xp.square(tables[dtype][:2, ...]), t))
        for dtype in {dtype for dtype, method in zip(types, methods, strict=True) if method.is_plain}
    }
    clips = {dtype: None if solution.clip is None else xp.astype(solution.clip, dtype) for dtype in tables}
    cuts: dict[Any, list[Any]] = {dtype: list(cut(table, t)) for dtype, table in tables.items()}
    for i, (dtype, method) in enumerate(zip(types, methods, strict=True)):
        per_col, per_row, per_rho, edges, d = cuts[dtype][i]
        square = squares[dtype][i] if method.is_plain else None
        yield Factors(per_col, per_row, per_rho, edges, d, clips[dtype], square)


def slope(a: ArrayLayout, f: Factors, w: Array, g: Array, method: Method) -> Array:
    """dl/dx, a new array: of ordinary edges with their weight decay, of chains at their in-edges."""
    decay = None
    if method.decays and not method.decoupled:
        decay = scaled(a, times(a, read(w), f.per_col, f.per_row, by=operator.itruediv), method.weight_decay)
    d = times(a, read(g), f.per_col, f.per_row)
    d = array_namespace(d).asarray(d, copy=True) if d is g else d
    if f.clip is not None:
        d *= f.clip
    if decay is not None:
        d += decay
    return set_edges(a, d, f.d)


def apply(
    a: ArrayLayout, f: Factors, finite: Array, w: Array, g: Array | None, moments: Moments, method: Method
) -> tuple[Array, Moments]:
    """One array's new weights and moments (METHOD.md, sections 3 and 4), the old ones unless all is `finite`.

    Ordinary edges, and then those of trees. Without gradient it has no terms of its own: its paths keep their values.
    """
    if g is None and f.per_rho[0] is None:
        return w, moments
    new = None  # at first the change of weights
    if g is not None and f.squares is not None:
        new = times(a, scaled(a, read(g), -method.lr), *f.squares)
        new = new if f.clip is None else f.clip * new
    elif g is not None:
        m, v = moments
        e, moments = method.direction(slope(a, f, w, g, method), m, v, partial(select, finite))
        new = -method.lr * e
        del e  # it may be large
        new = times(a, new, f.per_col, f.per_row)  # dw / dx = 1 / (A(u) B(v))
        if method.decays and method.decoupled:
            new += scaled(a, read(w), -method.lr * method.weight_decay)
    old = read(w)
    if new is not None:
        new += old
    new = set_edges(a, times(a, old if new is None else new, f.per_rho), f.weights)
    return select(finite, old, new), moments


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
    bounds: Array | None = None,
    apply: Callable[..., tuple[Array, Moments]] = apply,
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
    bounds : array, optional
        Those of `bounds_of`, if they are at hand.
    apply : callable, optional
        What takes the place of `apply`.
    """
    found = gather(t, weights, sums, moments)
    ab = relative(t, scale, found.weights)
    squares = None if clip_norm is None else sum_of_squares(t, ab, gradients)
    taken = [None if g is None else o for g, o in zip(gradients, methods, strict=True)]
    bounds = bounds_of(ab, types_of(weights), len(found.magnitudes)) if bounds is None else bounds
    solution = solve(t, ab, found, norm, squares, taken, bounds, max_ratio, clip_norm)
    each = zip(t.arrays, spread(t, solution, weights, methods), weights, gradients, moments, methods, strict=True)
    return (apply(a, f, solution.finite, *own) for a, f, *own in each), solution
