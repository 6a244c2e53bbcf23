"""Nodes of values: which elements scale alike.

A value's nodes are an int64 array of its shape, with stride 0 along the dimensions along which they are equal. Whatever
moves elements of a value about moves its nodes about in just the same way. Elements that must scale alike (those that
one weight meets, that are added, pooled, or chosen from) become one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gsgd.features import Features, segment
from gsgd.network import Network, Residual

Nodes = NDArray[np.int64]


class NotUnderstood(Exception):
    """The operation pins what it reads; the message says why, beyond its name."""


class Algebra:
    """Builds `net`. `constant` is the pinned node of all that depends on no feature, but for `zeros`."""

    def __init__(self, residual: Residual) -> None:
        self.net, self.residual = Network(), residual
        self.constant = int(self.net.input(1, "constant").per_feature[0])
        self.zeros: set[int] = set()  # pinned nodes of values that are known to be 0

    def fill(self, shape: Sequence[int], node: int | None = None) -> Nodes:
        """The same node everywhere: the constant, unless it is given."""
        return np.broadcast_to(np.int64(self.constant if node is None else node), tuple(shape))

    def zero(self, shape: Sequence[int]) -> Nodes:
        """A node of its own for a value that is 0 everywhere."""
        node = int(self.net.input(1, "zero").per_feature[0])
        self.zeros.add(node)
        return self.fill(shape, node)

    def zeros_in(self, nodes: Nodes) -> NDArray[np.bool_]:
        """Which elements are known to be 0."""
        return np.isin(nodes, list(self.zeros))

    def is_zero(self, nodes: Nodes) -> bool:
        return bool(self.zeros_in(compact(nodes)[0]).all())

    def overwrite(self, nodes: Nodes) -> None:
        """What has these nodes is no longer known to be 0."""
        self.zeros.difference_update(np.unique(compact(nodes)[0]).tolist())

    def pin(self, nodes: Nodes, reason: str) -> None:
        """Pin them: the operation may also have overwritten the value."""
        self.overwrite(nodes)
        self.net.nodes.pin(compact(nodes)[0], reason)

    def is_constant(self, nodes: Nodes) -> bool:
        found = compact(nodes)[0]
        return bool(((found == self.constant) | self.zeros_in(found)).all())

    def is_pinned(self, nodes: Nodes) -> bool:
        return bool(self.net.nodes.is_pinned(compact(nodes)[0]).all())

    def tie(self, a: Nodes, b: Nodes) -> None:
        """Make one unit of each pair of elements."""
        self.net.nodes.tie(*compact(a, b))

    def collapse(self, nodes: Nodes, dims: Iterable[int]) -> Nodes:
        """What stands along `dims`, which keep extent 1, made one unit."""
        for d in dims:
            if nodes.shape[d] == 0:
                raise NotUnderstood("of no elements")
            first = nodes[(slice(None),) * d + (slice(0, 1),)]
            self.tie(np.broadcast_to(first, nodes.shape), nodes)
            nodes = first
        return nodes

    def equal_along(self, nodes: Nodes, dims: Iterable[int], otherwise: str = "among features") -> Nodes:
        """`nodes` with extent 1 along `dims`, which must be positions: one unit stands along them."""
        for d in dims:
            if varies(nodes, [d]):
                raise NotUnderstood(otherwise)
            nodes = nodes[(slice(None),) * d + (slice(0, 1),)]
        return nodes

    def read(self, nodes: Nodes, dim: int) -> Features:
        """The channels along `dim`, for a layer whose weights meet all that stands along the other dimensions."""
        dim %= nodes.ndim
        return self.net.features(self.collapse(nodes, (d for d in range(nodes.ndim) if d != dim)).reshape(-1))

    def read_flattened(self, nodes: Nodes, dim: int) -> Features:
        """The same for a dense layer, which may read flattened maps."""
        channels = self.read(nodes, dim)
        found = channels.per_feature
        return channels if self.is_pinned(found) else Features(self.net, (segment(found),))


def varies(nodes: Nodes, dims: Iterable[int]) -> bool:
    """Whether different nodes stand along one of `dims`."""
    return any(nodes.strides[d] and nodes.shape[d] > 1 for d in dims)


def along(nodes: Nodes, dim: int, shape: Sequence[int]) -> Nodes:
    """`nodes` along one dimension of `shape`, the same along the others."""
    view = [1] * len(shape)
    if view:
        view[dim] = -1
    return np.broadcast_to(nodes.reshape(view), tuple(shape))


def expanded(nodes: Nodes) -> Nodes:
    """The same nodes with stride 0 along every dimension along which they are equal."""
    small = compact(nodes)[0]
    for d in range(small.ndim):
        first = small[(slice(None),) * d + (slice(0, 1),)]
        if (first == small).all():
            small = first
    return np.broadcast_to(small, nodes.shape) if nodes.size else nodes


def compact(*arrays: Nodes) -> tuple[Nodes, ...]:
    """Arrays of one shape, with extent 1 along dimensions along which all of them have stride 0."""
    strides = zip(*(a.strides for a in arrays), strict=True)
    index = [slice(None) if any(steps) else slice(0, 1) for steps in strides]
    return tuple(a[(*index, ...)] for a in arrays)
