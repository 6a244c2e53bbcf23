"""Reading and writing arrays by their layout, over the array API standard: what the stages of a step are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_jax_array, is_numpy_array, is_torch_array

from gsgd.layout import Array, ArrayLayout, Layout, Span


def real_type(xp: Any, where: Any) -> Any:
    """In what the trees are computed: float64, or float32 where there is no more (Apple's MPS; JAX by default)."""
    return xp.__array_namespace_info__().dtypes(device=where, kind="real floating").get("float64", xp.float32)


def product(w: Array, g: Array) -> Array:
    """``w * g``, wider than float16, where it would underflow."""
    xp = array_namespace(w, g)
    if xp.finfo(w.dtype).bits < 32:
        w, g = (xp.astype(x, xp.float32) for x in (w, g))
    return w * g


def largest(arrays: Sequence[Array | None], like: Sequence[Array]) -> Array:
    """The largest magnitude of every array that is there and not empty, NaN where an entry is, and a 0."""
    xp = array_namespace(*like)
    given = [x for x in arrays if x is not None and math.prod(x.shape)]
    real = real_type(xp, device(like[0]))
    if given and is_torch_array(like[0]):
        import torch

        found = list(torch._foreach_norm(given, math.inf))  # one call for all
    else:
        found = [xp.max(xp.abs(x)) for x in given]
    return xp.stack([xp.zeros((), dtype=real, device=device(like[0])), *(xp.astype(x, real) for x in found)])


def at_edges(t: Layout, arrays: Sequence[Array | None], like: Sequence[Array]) -> Array:
    """The entries of `arrays` at the tree edges, (E + 1,): 0 for the last, and where there is no array.

    Types and devices are those of the arrays `like`.
    """
    xp, where = array_namespace(*like), device(like[0])
    found = [
        xp.zeros(a.edges.shape, dtype=old.dtype, device=where) if x is None else x[a.index]
        for a, x, old in zip(t.arrays, arrays, like, strict=True)
        if a.edges.size
    ]
    return xp.concat([*found, xp.zeros((1,), dtype=like[0].dtype, device=where)])


def set_edges(a: ArrayLayout, x: Array, values: Array) -> Array:
    """`x`, an array or shaped as ``a.shape``, with `values` at the tree edges; NumPy and PyTorch write to it.

    Elsewhere lines are compared with the places of their edges, which compiles to less than a scatter does, and leaves
    a sharded array where it is.
    """
    xp = array_namespace(x)
    if is_numpy_array(x) or is_torch_array(x):
        x = xp.reshape(x, a.whole)
        x[a.index] = values
        return x
    for places in (a.chain, a.free):
        if places is not None:
            here = places.edge >= 0
            for axis, at in enumerate(places.at):
                if at is not None:
                    extents = tuple(n if i == axis else 1 for i, n in enumerate(a.shape))
                    here = here & (xp.reshape(xp.arange(a.shape[axis]), extents) == at)
            x = xp.where(here, values[places.edge], x)
    return x


def cut(values: Array, ids: Array, spans: Sequence[Span | None]) -> list[Array | None]:
    """``values[ids]`` in parts, None for None.

    In one call, but for JAX, whose compiler makes one kernel of equal ones: they must not differ in where they begin.
    """
    xp = array_namespace(values)
    if is_jax_array(values):
        return [None if span is None else values[span.of(np, ids)] for span in spans]
    values = values[ids]
    return [None if span is None else span.of(xp, values) for span in spans]


def along(jumps: Sequence[Array], x: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """Combine what is given per unit and tree, (2, H + 1), from every unit to the end of its tree."""
    xp = array_namespace(x)
    for jump in jumps:
        x = combine(x, xp.reshape(x, (-1,))[jump])
    return x
