"""Reading and writing arrays by their layout, over the array API standard: what the stages of a step are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from array_api_compat import array_namespace, device, is_numpy_array, is_torch_array

from gsgd.layout import Array, ArrayLayout, Layout


def real_type(xp: Any, where: Any) -> Any:
    """In what the trees are computed: float64, or float32 where there is no more (Apple's MPS; JAX by default)."""
    return xp.__array_namespace_info__().dtypes(device=where, kind="real floating").get("float64", xp.float32)


def product(w: Array, g: Array) -> Array:
    """``w * g``, wider than float16, where it would underflow."""
    xp = array_namespace(w, g)
    if xp.finfo(w.dtype).bits < 32:
        w, g = (xp.astype(x, xp.float32) for x in (w, g))
    return w * g


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


def along(jumps: Sequence[Array], x: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """Combine what is given per unit and tree, (2, H + 1), from every unit to the end of its tree."""
    xp = array_namespace(x)
    for jump in jumps:
        x = combine(x, xp.reshape(x, (-1,))[jump])
    return x
