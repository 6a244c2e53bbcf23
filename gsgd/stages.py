"""Gather, solve, apply over the array API standard: the specification of a step, and the oracle of the tests.

All are pure functions of arrays of any namespace that array-api-compat knows. Vectors over units have one more entry,
H, for every pinned end, where A = B = rho = 1. Formulas are METHOD.md's: a and b are the products of tree weights from
a pinned source and to a pinned destination, relative to the reference scale (A and B); x = w A(u) B(v) is the
coordinate of an ordinary edge u -> v, A(v) B(v) that of a chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace, device

from gsgd.blocks import PINNED
from gsgd.layout import Array, Tables, along, assemble, at_tree, real_type, view
from gsgd.methods import Method, Moments


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


def chain_products(t: Tables, scale: Scale, weights: Sequence[Array]) -> tuple[Array, Array, Array]:
    """The in-edge's weight, A and B per unit: A and B relative to the reference scale (METHOD.md, section 4)."""
    xp = array_namespace(*weights)
    in_weights = at_tree(xp, t, t.in_tree, weights, 1.0)
    a = along(t.in_tree, in_weights / scale.in_weights, xp.multiply) / scale.c
    b = along(t.out_tree, at_tree(xp, t, t.out_tree, weights, 1.0) / scale.out_weights, xp.multiply) * scale.c
    return in_weights, a, b


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
    in_weights: Array,
    a: Array,
    b: Array,
    weights: Sequence[Array],
    gradients: Sequence[Array | None],
    sums: Sequence[Array | None],
    norm: Array | None,
    s: Array,
    squares: Array | None,
    moments: Sequence[Moments],
    methods: Sequence[Method],
    max_ratio: float | Array,
    clip_norm: float | Array,
) -> Solution:
    """On the trees: the inverse chain rule, clipping, path ratios."""
    xp = array_namespace(*weights)
    x = a * b
    d = (in_weights * at_tree(xp, t, t.in_tree, sums, 0.0) - s) / x
    d = d if norm is None else d / norm
    clip = xp.ones_like(xp.sum(x))
    if squares is not None:
        given = [i for i, g in enumerate(gradients) if g is not None]
        moves = t.chain & among(xp, t.in_array, given, len(gradients))
        total = xp.sqrt(squares + xp.sum(xp.where(moves, d * d, xp.zeros_like(d))))
        clip = xp.minimum(clip, clip_norm / (total + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        d = clip * d
    m, v = (at_tree(xp, t, t.in_tree, [pair[i] for pair in moments], 0.0) for i in (0, 1))
    r = xp.ones_like(x)
    for o in {id(o): o for o in methods}.values():
        mine = [i for i, own in enumerate(methods) if own is o and gradients[i] is not None]
        if not mine:
            continue
        here = t.chain & among(xp, t.in_array, mine, len(methods))
        has_m = any(moments[i][0] is not None for i in mine)
        e, (new_m, new_v) = o.direction(xp, d, m if has_m else None, v)
        r = xp.where(here, 1 - o.lr * e / x, r)
        m, v = m if new_m is None else xp.where(here, new_m, m), xp.where(here, new_v, v)
    size = xp.clip(xp.abs(r), 1 / max_ratio, max_ratio)
    ratio = xp.where(r < 0, -size, size)
    finite = xp.isfinite(clip)
    for values in (r, 1 / ratio, x, 1 / x):
        finite = finite & xp.all(xp.isfinite(values))
    factors = xp.concat([a, b, 1 / a, 1 / b, 1 / ratio])
    for dtype in {w.dtype for w in weights} - {factors.dtype}:  # they may overflow there
        finite = finite & xp.all(xp.isfinite(xp.astype(factors, dtype)))
    return Solution(a, b, ratio, ratio[t.root], m, v, clip, xp.count_nonzero(r != ratio), finite)


def among(xp: Any, ids: Array, wanted: Sequence[int], count: int) -> Array:
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
    methods: Sequence[Method],
) -> tuple[list[Array], list[Moments]]:
    """New weights and moments: ordinary edges, chains, and free edges, which stay.

    An array without gradient has no terms of its own: its paths keep their values.
    """
    xp = array_namespace(*weights)
    new_weights: list[Array] = []
    new_moments: list[list[Array | None]] = [[], []]
    per_unit: dict[Any, list[Array]] = {}  # in the dtype of the weights
    for k in t.blocks:
        o, w, m, v = methods[k.array], view(xp, k, weights), *(view(xp, k, x) for x in zip(*moments, strict=True))
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
            e, (m, v) = o.direction(xp, d if o.decoupled else d + decay, m, v)
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
    methods: Sequence[Method],
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
    in_weights, a, b = chain_products(t, scale, weights)
    s = gather(t, weights, sums)
    squares = None if clip_norm is None else sum_of_squares(t, a, b, gradients)
    limits = (max_ratio, math.inf if clip_norm is None else clip_norm)
    solution = solve(t, in_weights, a, b, weights, gradients, sums, norm, s, squares, moments, methods, *limits)
    return *apply(t, solution, weights, gradients, moments, methods), solution
