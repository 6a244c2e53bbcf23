"""The algebra of nodes: what layers, sums, products and selections make of the nodes of the values that they read.

A value's nodes are an int64 array of its shape, with stride 0 along the dimensions along which they are equal. Whatever
moves elements of a value about moves its nodes about in just the same way. Elements that must scale alike (those that
one weight meets, that are added, pooled, or chosen from) become one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gsgd.network import Features, Network, Residual, segment

Nodes = NDArray[np.int64]


class NotUnderstood(Exception):
    """The operation pins what it reads; the message says why, beyond its name."""


class Algebra:
    """Builds `net`. `constant` is the pinned node of all that depends on no feature."""

    def __init__(self, residual: Residual) -> None:
        self.net, self.residual = Network(), residual
        self.constant = int(self.net.input(1, "constant").per_feature[0])

    def fill(self, shape: Sequence[int], node: int | None = None) -> Nodes:
        """The same node everywhere: the constant, unless it is given."""
        return np.broadcast_to(np.int64(self.constant if node is None else node), tuple(shape))

    def pin(self, nodes: Nodes, reason: str) -> None:
        self.net.nodes.pin(compact(nodes)[0], reason)

    def is_constant(self, nodes: Nodes) -> bool:
        return bool((compact(nodes)[0] == self.constant).all())

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

    def one(self, nodes: Nodes, dims: Iterable[int], otherwise: str = "among features") -> Nodes:
        """`nodes` with extent 1 along `dims`, which must be positions: one unit stands along them."""
        for d in dims:
            if nodes.strides[d] and nodes.shape[d] > 1:
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

    def add(self, p: Nodes, q: Nodes, residual: Residual | None = None) -> Nodes:
        """The sum of two values of one shape, of which none is constant."""
        x, y = compact(p, q)
        pairs, which = np.unique(np.stack([x.ravel(), y.ravel()]), axis=1, return_inverse=True)
        terms = [self.net.features(nodes) for nodes in pairs]
        out = self.net.add(*terms, residual=residual or self.residual).per_feature
        return np.broadcast_to(out[which].reshape(x.shape), p.shape)

    def multiply(self, p: Nodes, q: Nodes, divide: bool = False) -> Nodes:
        """A product scales as one factor if the other one is pinned; a quotient if the divisor is."""
        x, y = compact(p, q)
        fixed = [self.net.nodes.is_pinned(n) for n in (x, y)]
        if not (fixed[1] if divide else fixed[0] | fixed[1]).all():
            raise NotUnderstood("by a feature")
        return np.broadcast_to(np.where(fixed[1], x, y), p.shape)

    def matmul(
        self,
        shape: tuple[int, ...],
        factors: tuple[Nodes, Nodes],
        contracted: Sequence[Sequence[int]],
        batch: Sequence[Sequence[int]],
        otherwise: str,
    ) -> Nodes:
        """Sums over positions, weighted by what is pinned: interpolation, the values of attention.

        The result has the batch dimensions first, then those of the first factor that are left, then of the second.
        """
        pinned = [self.is_pinned(nodes) for nodes in factors]
        if pinned[0] == pinned[1]:
            raise NotUnderstood(otherwise)
        side = pinned.index(False)
        nodes = self.one(factors[side], contracted[side], otherwise)
        free = [d for d in range(nodes.ndim) if d not in (*batch[side], *contracted[side])]
        first, last = ([nodes.shape[d] for d in dims] for dims in (batch[side], free))
        others = [1] * (len(shape) - len(first) - len(last))
        nodes = nodes.transpose(*batch[side], *free, *contracted[side])
        return np.broadcast_to(nodes.reshape(first + (last + others if side == 0 else others + last)), shape)

    def choose(self, *values: Nodes) -> Nodes:
        """Each element is one of several."""
        if len({self.is_constant(nodes) for nodes in values}) > 1:
            raise NotUnderstood("of a constant")
        for other in values[1:]:
            self.tie(values[0], other)
        return values[0]

    def pool(self, nodes: Nodes, dims: Iterable[int], shape: Sequence[int]) -> Nodes:
        """Each element is made, homogeneously, of several along `dims`."""
        return np.broadcast_to(self.collapse(nodes, dims), tuple(shape))

    def pad(self, nodes: Nodes, dim: int, before: int, after: int) -> Nodes:
        """Zeros at the ends of `dim`, or fewer elements where the numbers are negative.

        Zeros scale as what they stand next to; channels of zeros are new units.
        """
        at = (slice(None),) * dim
        if nodes.strides[dim] == 0:
            shape = (*nodes.shape[:dim], nodes.shape[dim] + before + after, *nodes.shape[dim + 1 :])
            return np.broadcast_to(nodes[(*at, slice(0, 1))], shape)
        nodes = nodes[(*at, slice(max(0, -before), nodes.shape[dim] - max(0, -after)))]
        zeros = [self.net.nodes.new(max(0, n), "zero padding") for n in (before, after)]
        ends = [along(z, dim, (*nodes.shape[:dim], len(z), *nodes.shape[dim + 1 :])) for z in zeros]
        return np.concatenate([ends[0], nodes, ends[1]], axis=dim)


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
