"""Parameters that a layer reads: how the elements of a view are entries, and what blocks of edges these make."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gsgd.blocks import Dim, Part
from gsgd.trace.nodes import Algebra, Nodes, NotUnderstood, along

Labels = Sequence[Hashable]  # of dimensions, as in einsum


@dataclass(frozen=True)
class Weight:
    """A view of a whole parameter: transposed, with axes split, joined, or of extent 1.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Of the parameter.
    dims : tuple of tuples of Dim
        Per dimension of the view the parts of the parameter's axes that stand along it, outermost first; none where
        only one entry does.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[tuple[Dim, ...], ...]

    @property
    def long(self) -> list[int]:
        """The dimensions along which several entries stand."""
        return [d for d, parts in enumerate(self.dims) if parts]

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The parameter's axis along each dimension, if the view is the parameter with its axes in another order."""
        found = [parts[0].axis if len(parts) == 1 else None for parts in self.dims]
        if len(self.dims) != len(self.shape) or any(len(parts) > 1 for parts in self.dims):
            return None
        alone = iter(sorted(set(range(len(self.shape))) - set(found)))
        axes = tuple(next(alone) if axis is None else axis for axis in found)
        return axes if len(set(axes)) == len(axes) else None


def weight_view(
    name: str, shape: Sequence[int], strides: Sequence[int], of_shape: Sequence[int], of_strides: Sequence[int]
) -> Weight | None:
    """The view of a parameter of this `shape` and these `strides`; None if it lacks entries or mixes axes."""
    dims = [
        _parts(n, step, shape, strides) if n > 1 and step else () for n, step in zip(of_shape, of_strides, strict=True)
    ]
    if any(parts is None for parts in dims):
        return None
    found = tuple(parts for parts in dims if parts is not None)
    for axis, extent in enumerate(shape):
        step = 1
        for part in sorted((p for parts in found for p in parts if p.axis == axis), key=lambda p: p.step):
            if part.step != step:
                return None
            step *= part.extent
        if step != extent:
            return None
    return Weight(name, tuple(shape), found)


def _parts(n: int, step: int, shape: Sequence[int], strides: Sequence[int]) -> tuple[Dim, ...] | None:
    """`n` entries that stand `step` apart in memory, as parts of axes, outermost first."""
    below = [a for a in range(len(shape)) if shape[a] > 1 and 0 < strides[a] <= step]
    axis = max(below, key=lambda a: strides[a], default=None)
    if axis is None or step % strides[axis] or shape[axis] % (step // strides[axis]):
        return None
    room = shape[axis] * strides[axis] // step
    if n <= room:
        return (Dim(n, axis, step // strides[axis]),)
    outer = _parts(n // room, step * room, shape, strides) if n % room == 0 and room > 1 else None
    return None if outer is None else (*outer, Dim(room, axis, step // strides[axis]))


def layer(
    on: Algebra,
    w: Weight,
    w_labels: Labels,
    x: Nodes,
    x_labels: Labels,
    labels: Labels,
    shape: Sequence[int],
    kind: str = "dense",
) -> Nodes:
    """The sum of products of a parameter with a value: every entry of the parameter is an edge.

    Dimensions are labelled as in einsum; `labels` and `shape` are the result's. Those of the weight are rows if only
    the result has them, columns if only the value has, groups if both, and taps if neither. Along its other dimensions
    the value is made one.
    """
    parts = {label: found for label, found in zip(w_labels, w.dims, strict=True) if found}
    x = on.collapse(x, [d for d, label in enumerate(x_labels) if label not in parts])
    matrix = w.axes
    if matrix is not None and len(matrix) == 2:
        for row, col in ((0, 1), (1, 0)):
            r, c = w_labels[row], w_labels[col]
            if r in labels and r not in x_labels and c in x_labels and c not in labels:
                features = on.read_flattened(x, x_labels.index(c))
                layout = "oi" if matrix[row] == 0 else "io"
                features = on.net.dense(w.name, features, w.shape[matrix[row]], layout=layout)
                return along(features.per_feature, labels.index(r), shape)
    varies = [label for d, label in enumerate(x_labels) if label in parts and x.strides[d] and x.shape[d] > 1]

    def keys(in_value: bool, in_result: bool) -> list[tuple[Hashable, Dim]]:
        """What stands in these places, in the order of memory."""
        here = [label for label in parts if (label in varies, label in labels) == (in_value, in_result)]
        return sorted(((label, dim) for label in here for dim in parts[label]), key=lambda k: (k[1].axis, -k[1].step))

    groups, rows, cols, taps = keys(True, True), keys(False, True), keys(True, False), keys(False, False)
    read = [(label, dim) for label in varies for dim in parts[label]]
    x = x[tuple(slice(None) if label in varies else 0 for label in x_labels)]
    x = x.reshape([dim.extent for _, dim in read]).transpose([read.index(k) for k in (*groups, *cols)])
    made = [*groups, *rows]
    new = on.net.nodes.new(math.prod(dim.extent for _, dim in made), w.name)
    roles = [_joined(dim for _, dim in found) for found in (groups, rows, cols, taps)]
    on.net.edges(w.name, kind, w.shape, *_blocks(w.shape, roles, new, x))
    extents = [math.prod(d.extent for d in parts[n]) if n in parts else 1 for n in labels]
    order = [made.index((label, dim)) for label in labels for dim in parts.get(label, ())]
    new = new.reshape([dim.extent for _, dim in made]).transpose(order).reshape(extents)
    return np.broadcast_to(new, tuple(shape))


def _joined(dims: Iterable[Dim]) -> list[Dim]:
    """Parts that stand side by side on one axis as one."""
    found: list[Dim] = []
    for dim in dims:
        if found and found[-1].axis == dim.axis and found[-1].step == dim.step * dim.extent:
            dim = Dim(found.pop().extent * dim.extent, dim.axis, dim.step)
        found.append(dim)
    return found


def _blocks(shape: Sequence[int], roles: list[list[Dim]], rows: Nodes, cols: Nodes) -> Iterator[Part]:
    """One block, or, where a role has one part too many, a block for each of its places."""
    groups, of_rows, of_cols, _ = roles
    too_many = [role for role, most in zip(roles, (1, 1, 1, 3), strict=True) if len(role) > most]
    apart: Dim | None = None
    if too_many:
        outermost = [dim for dim in too_many[0] if dim.step * dim.extent == shape[dim.axis]]
        apart = min(outermost, key=lambda dim: dim.extent, default=None)
        roles = [[dim for dim in role if dim != apart] for role in roles]
        if apart is None or [len(role) > most for role, most in zip(roles, (1, 1, 1, 3), strict=True)].count(True):
            raise NotUnderstood("of this form")

    def at(place: int, nodes: Nodes, dims: list[Dim]) -> Nodes:
        nodes = nodes.reshape([dim.extent for dim in dims])
        return (nodes.take(place, dims.index(apart)) if apart in dims else nodes).reshape(-1)

    none = Dim(axis=len(shape) - 1)
    g, r, c = (role[0] if role else none for role in roles[:3])
    t0, t1, t2 = *(none for _ in range(3 - len(roles[3]))), *roles[3]
    for i in range(apart.extent if apart else 1):
        start = (apart.axis, i * apart.step) if apart else (0, 0)
        yield Part((g, r, c, t0, t1, t2), start, at(i, rows, groups + of_rows), at(i, cols, groups + of_cols))
