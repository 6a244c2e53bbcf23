"""Reading and writing arrays by their layout, over the array API standard: what the stages of a step are made of."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_jax_array, is_numpy_array, is_torch_array

from gsgd.layout import Array, ArrayLayout, Layout, Places, Span


def real_type(xp: Any, where: Any) -> Any:
    """In what the trees are computed: float64, or float32 where there is no more (Apple's MPS; JAX by default)."""
    return xp.__array_namespace_info__().dtypes(device=where, kind="real floating").get("float64", xp.float32)


def take(x: Array, index: Any) -> Array:
    """``x[index]``, an array or one per axis, of indices that are not negative."""
    if not is_jax_array(x):
        return x[index]
    return _take()(x, np.stack(index if isinstance(index, tuple) else (index,), axis=-1))


@cache
def _take() -> Callable[[Array, Array], Array]:
    """For JAX, traced once for all arrays alike, and no call in what is compiled: each would be copied and inlined.

    Its own indexing would look for negative ones.
    """
    import jax

    def gather(x: Array, index: Array) -> Array:
        axes = tuple(range(x.ndim))
        numbers = jax.lax.GatherDimensionNumbers((), collapsed_slice_dims=axes, start_index_map=axes)
        return jax.lax.gather(x, index, numbers, (1,) * x.ndim, mode="promise_in_bounds")

    return jax.jit(gather, inline=True)


def read(x: Array | Sequence[Array]) -> Array:
    """An array; of several vectors that are joined, a new one."""
    if not isinstance(x, Sequence):
        return x
    return array_namespace(*x).concat(x)


def types_of(weights: Sequence[Array | Sequence[Array]]) -> list[Any]:
    """The dtype of each, or of those that are joined."""
    return [(w[0] if isinstance(w, Sequence) else w).dtype for w in weights]


def wide(x: Array) -> Array:
    """`x` in float32 at least: products of float16 underflow."""
    xp = array_namespace(x)
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x


def views(a: ArrayLayout, x: Array) -> list[tuple[ArrayLayout, Array]]:
    """The arrays that `x` consists of, in their shapes."""
    xp = array_namespace(x)
    if not a.parts:
        return [(a, xp.reshape(x, a.shape))]
    parts = ((p, p.span.of(xp, x)) for p in a.parts)
    return [(p.array, xp.reshape(xp.permute_dims(part, p.axes), p.array.shape)) for p, part in parts]


def times(
    a: ArrayLayout, x: Array, *factors: Sequence[Array | None], by: Callable[..., Array] = operator.imul
) -> Array:
    """`x` times factors of its lines or positions, of which every part has one or None; in place where joined."""
    xp = array_namespace(x)
    if a.parts:
        for (_, view), *own in zip(views(a, x), *factors, strict=True):
            for factor in own:
                if factor is not None:
                    by(view, factor)
        return x
    given = [factor for (factor,) in factors if factor is not None]
    if not given:
        return x
    new = xp.reshape(x, a.shape)
    new = new / given[0] if by is operator.itruediv else new * given[0]
    for factor in given[1:]:
        new = by(new, factor)
    return xp.reshape(new, x.shape)


def scaled(a: ArrayLayout, x: Array, factor: Any) -> Array:
    """`x` times a number; in place where joined."""
    if a.parts:
        x *= factor
        return x
    return x * factor


def average(x: Array, y: Array, beta: Any) -> Array:
    """``beta * x + (1 - beta) * y``, in the place of y where arrays can be written to."""
    if is_torch_array(y) and isinstance(beta, float):
        return y.lerp_(x, beta)
    y *= 1 - beta
    y += beta * x
    return y


def select(finite: Array, old: Array, new: Array) -> Array:
    """The new array, or the old one unless all is `finite`; PyTorch writes it to the old one."""
    if is_torch_array(old):
        import torch

        return torch.where(finite, new, old, out=old)
    xp = array_namespace(old)
    return xp.where(finite, xp.astype(new, old.dtype), old)


def products(a: ArrayLayout, w: Array, g: Array | None, real: Any) -> tuple[list[Array], Array]:
    """The sums of ``w * g`` over rows for every position, of dtype `real`, and g at the tree edges; 0 without g.

    Joined arrays' products are written over g.
    """
    xp, where = array_namespace(w), device(w)
    if g is None:
        sizes = [own.cols.size for own, _ in views(a, w) if own.cols]
        none = xp.zeros(a.edges.shape, dtype=w.dtype, device=where)
        return [xp.zeros((n,), dtype=real, device=where) for n in sizes], none
    at_edges = take(g, a.index)
    if a.parts:
        g = wide(g)
        g *= wide(w)
    elif a.cols:
        g = wide(w) * wide(g)
    with_columns = [(own, view) for own, view in views(a, g) if own.cols]
    return [xp.reshape(xp.sum(x, axis=own.over_rows, dtype=real), (-1,)) for own, x in with_columns], at_edges


def magnitudes(arrays: Sequence[Array | Sequence[Array] | None]) -> list[Array]:
    """A norm of every array that is there and not empty: infinity or NaN where an entry is.

    Of JAX's arrays the sum, infinite where that overflows, too: its maximum overlooks NaN among 4,096 numbers or more
    on a CPU (JAX 0.10.2). Of its vectors there is one for all, of at least as many numbers: to compile reductions of
    fewer takes long.
    """
    each = [y for x in arrays if x is not None for y in (x if isinstance(x, Sequence) else [x])]
    given = [x for x in each if math.prod(x.shape)]
    if given and is_torch_array(given[0]):
        import torch

        return list(torch._foreach_norm(given, math.inf))  # one call for all
    if given and is_jax_array(given[0]):
        vectors, others = ([x for x in given if (x.ndim == 1) is wanted] for wanted in (True, False))
        if vectors:
            xp = array_namespace(*vectors)
            more = np.resize([0.0, 1.0], max(0, 4096 - sum(x.size for x in vectors)))  # XLA would compute a constant 0
            others.append(xp.concat([*vectors, xp.asarray(more, dtype=vectors[0].dtype)]))
        return [array_namespace(x).sum(array_namespace(x).abs(wide(x))) for x in others]
    return [array_namespace(x).max(array_namespace(x).abs(x)) for x in given]


def verdict(checked: Array, magnitudes: Sequence[Array], bounds: Array, limited: Array) -> tuple[Array, Array]:
    """Whether the rows of `checked` and then the `magnitudes` are within `bounds`; and how many are `limited`."""
    xp, rows = array_namespace(checked), checked.shape[0]
    if is_jax_array(checked):  # from one sum: of 1 for each that is limited, and infinity for what is out of bounds
        more = xp.concat([xp.zeros((1,), dtype=bounds.dtype), *(xp.reshape(x, (1,)) for x in magnitudes)])
        within = (xp.reshape(xp.abs(checked) <= bounds[:rows, None], (-1,)), more < math.inf)
        total = xp.linalg.vector_norm(xp.concat([*(xp.where(x, 0, math.inf) for x in within), limited]), ord=1)
        return total < math.inf, total
    sizes = xp.linalg.vector_norm(checked, axis=1, ord=math.inf)
    finite = xp.all(xp.concat([sizes, *(xp.reshape(x, (1,)) for x in magnitudes)]) <= bounds)
    return finite, xp.count_nonzero(limited)


def at_edges(t: Layout, arrays: Sequence[Array]) -> Array:
    """The entries of arrays at the tree edges, (E,)."""
    xp = array_namespace(*arrays)
    found = [x[a.index] for a, x in zip(t.arrays, arrays, strict=True) if a.edges.size]
    return xp.concat(found) if found else xp.zeros((0,), dtype=arrays[0].dtype)


def is_written_to(x: Array) -> bool:
    """Whether `set_edges` writes to this array."""
    return is_numpy_array(x) or is_torch_array(x)


def set_edges(a: ArrayLayout, x: Array, values: Any) -> Array:
    """`x` with `values` at the tree edges, or a number; NumPy and PyTorch write to it.

    Elsewhere values are a pair, at chains' in-edges by line and at free edges by position. Lines are compared with the
    places of their edges, which compiles to less than a scatter does, and leaves a sharded array where it is.
    """
    xp = array_namespace(x)
    if not a.edges.size:
        return x
    if is_written_to(x):
        x[a.index] = values
        return x
    new = xp.reshape(x, a.shape)
    by_kind = values if isinstance(values, tuple) else (values, values)
    for places, value in zip((a.chain, a.free), by_kind, strict=True):
        if places is not None:
            here = places.edge >= 0
            for axis, at in enumerate(places.at):
                if at is not None:
                    extents = tuple(n if i == axis else 1 for i, n in enumerate(a.shape))
                    here = here & (xp.reshape(xp.arange(a.shape[axis]), extents) == at)
            new = xp.where(here, value, new)
    return xp.reshape(new, x.shape)


def cut(table: Array, t: Layout) -> Iterator[tuple[Any, ...]]:
    """Of every array, in lists of one for each of its parts, 1 / A of their positions and 1 / B of their lines.

    If the table is that of `stages.Solution.checked` (and not of its first two rows alone), then also 1 / rho of
    positions, and what `set_edges` takes: the new weights of tree edges and dl/dx of these.

    Where arrays are written to, all are read in one call. Elsewhere each is, for JAX: kernels that are equal but for
    where they begin would be compiled one by one. So that JAX compiles one for arrays of one shape, lines that are
    pinned have factors, 1, where those of another array have any.
    """
    xp, (height, width) = array_namespace(table), table.shape
    cols, rows, edges = t.cols.shape[0], t.rows.shape[0], t.owner.shape[0]
    starts = list(accumulate((0, cols, rows, cols, edges)))[: 5 if height > 2 else 2]
    ids = t.factors if len(starts) == 5 else t.factors[: cols + rows]
    table = xp.reshape(table, (-1,))
    values = table[ids] if is_written_to(table) else None
    lines = {a.shape: a.rows.shape for a in t.arrays if a.rows} if is_jax_array(table) else {}

    def of(start: int, span: Span | None) -> Array | None:
        if span is None:
            return None
        here = Span(start + span.start, span.shape)
        return take(table, here.of(array_namespace(ids), ids)) if values is None else here.of(xp, values)

    def of_cols(start: int, a: ArrayLayout) -> Array | None:
        return of(start, a.cols)

    def of_rows(start: int, a: ArrayLayout) -> Array | None:
        found = of(start, a.rows)
        if found is None and a.shape in lines:
            ones = [width - 1, 2 * width - 1]  # two, as XLA would make another kernel for a constant
            return take(table, np.resize(ones, lines[a.shape]).astype(np.int32))
        return found

    def on_lines(start: int, a: ArrayLayout, places: Places | None) -> Array | None:
        """Where a line has no edge, any number."""
        return None if places is None else take(table, ids[start + a.edges.start + places.edge])

    for a in t.arrays:
        each = zip(starts, (of_cols, of_rows, of_cols), strict=False)
        factors = [[factor(start, x) for x in a.arrays] for start, factor in each]
        if len(starts) == 2:
            yield tuple(factors)
        elif values is not None:
            yield (*factors, *(of(start, a.edges) for start in starts[3:]))
        else:
            weights = tuple(on_lines(starts[3], a, places) for places in (a.chain, a.free))
            yield (*factors, weights, (on_lines(starts[4], a, a.chain), 0.0))


def along(jumps: Sequence[Array], x: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """Combine what is given per unit and tree, (2, H + 1), from every unit to the end of its tree."""
    xp = array_namespace(x)
    for jump in jumps:
        x = combine(x, take(xp.reshape(x, (-1,)), jump))
    return x
