"""What sums, products, selections and layers make of the nodes of the values that they read, in any framework."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gsgd.network import Residual
from gsgd.trace.nodes import Algebra, Nodes, NotUnderstood, along, compact, varies
from gsgd.trace.weights import Labels, Weight, layer
from gsgd.units import unique_pairs


@dataclass(frozen=True)
class Operand:
    """A value: its nodes, and how it views a parameter that nothing else reads, if it does."""

    nodes: Nodes
    weight: Weight | None = None

    @property
    def ndim(self) -> int:
        return self.nodes.ndim


def pair(a: Nodes, b: Nodes) -> tuple[Nodes, Nodes]:
    """Both broadcast to one shape."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    return np.broadcast_to(a, shape), np.broadcast_to(b, shape)


# element by element: shapes are broadcast


def add(on: Algebra, a: Operand, b: Operand) -> Nodes:
    """A sum: what is added becomes one unit. A parameter of one's own is a bias."""
    p, q = pair(a.nodes, b.nodes)
    for x, other in ((p, q), (q, p)):
        if on.is_zero(x):
            return other
    for bias, x in ((a, q), (b, p)):
        if bias.weight is not None and not on.is_constant(x):
            return _sum(on, x, _bias(on, bias.weight, x), "tie")
    if on.is_constant(p) or on.is_constant(q):
        raise NotUnderstood("of a constant")
    return _sum(on, p, q, on.residual)


def _sum(on: Algebra, p: Nodes, q: Nodes, residual: Residual) -> Nodes:
    x, y = compact(p, q)
    pairs, which = unique_pairs(x, y)
    zero = on.zeros_in(pairs)
    out, both = np.where(zero[0], pairs[1], pairs[0]), ~zero.any(axis=0)
    out[both] = on.net.add(*map(on.net.features, pairs[:, both]), residual=residual).per_feature
    return np.broadcast_to(out[which].reshape(x.shape), p.shape)


def _bias(on: Algebra, w: Weight, x: Nodes) -> Nodes:
    """A parameter that is added to `x`, as edges from a constant: rows are where `x` has several units."""
    first = x.ndim - len(w.dims)
    rows = [first + d for d in w.long if len(w.long) == 1 or _has_several_units(on, x, first + d)]
    if not rows:
        raise NotUnderstood("of a constant")
    return _from_one(on, w, on.fill(()), rows, x.shape, "bias")


def _from_one(on: Algebra, w: Weight, source: Nodes, rows: Sequence[int], shape: Sequence[int], kind: str) -> Nodes:
    """A parameter that is broadcast to `shape`, as edges from one node into a row for every place along `rows`."""
    own = range(len(shape) - len(w.dims), len(shape))
    edges = layer(on, w, own, source, (), rows, [shape[d] for d in rows], kind)
    return np.broadcast_to(edges.reshape([n if d in rows else 1 for d, n in enumerate(shape)]), tuple(shape))


def _has_several_units(on: Algebra, x: Nodes, dim: int) -> bool:
    """Whether units that are not pinned differ along `dim`, in which one bias for all of them would tie them."""
    small = compact(x)[0]
    free = np.where(on.net.nodes.is_pinned(small), -1, small)
    return bool(((free != free.max(axis=dim, keepdims=True)) & (free >= 0)).any())


def multiply(on: Algebra, a: Operand, b: Operand) -> Nodes:
    """A product scales as one factor; the other is pinned. A vector of one's own scales channels."""
    p, q = pair(a.nodes, b.nodes)
    for gain, x in ((b, p), (a, q)):
        w = gain.weight
        if w is None or len(w.long) != 1 or (a if gain is b else b).weight is not None:
            continue
        labels = tuple(range(x.ndim))
        own = labels[x.ndim - len(w.dims) :]
        channel = own[w.long[0]]
        if on.is_pinned(x):
            return _from_one(on, w, on.fill((), int(x.flat[0])), [channel], x.shape, "scale")
        if [d for d in labels if x.strides[d] and x.shape[d] > 1] == [channel]:
            edges = layer(on, w, own, x, labels, [channel], [x.shape[channel]], "scale")
            return along(edges, channel, x.shape)
        # another factor of the same units
    return _product(on, p, q)


def divide(on: Algebra, a: Nodes, b: Nodes) -> Nodes:
    """A quotient scales as what is divided; the divisor is pinned."""
    p, q = pair(a, b)
    on.pin(q, "divides a feature")
    return p


def normalize(on: Algebra, x: Nodes, gain: Operand) -> Nodes:
    """A normalization over several dimensions, with a weight for every element."""
    on.pin(x, "scale lost in normalization")
    if gain.weight is None:
        return on.fill(x.shape)
    rows = [x.ndim - gain.ndim + d for d in gain.weight.long]
    return _from_one(on, gain.weight, on.fill(()), rows, x.shape, "norm")


def _product(on: Algebra, p: Nodes, q: Nodes) -> Nodes:
    """Of two features the one with fewer units is pinned."""
    x, y = compact(p, q)
    if len(np.unique(x)) < len(np.unique(y)):
        x, y = y, x
    on.pin(y[~on.net.nodes.is_pinned(x)], "multiplies a feature")
    return np.broadcast_to(np.where(on.net.nodes.is_pinned(x), y, x), p.shape)


def choose(on: Algebra, *values: Nodes) -> Nodes:
    """Each element is one of several, or 0."""
    values = tuple(np.broadcast_arrays(*values))
    made, *others = [nodes for nodes in values if not on.is_zero(nodes)] or values[:1]
    if len({on.is_constant(nodes) for nodes in (made, *others)}) > 1:
        raise NotUnderstood("of a constant")
    for other in others:
        on.tie(made, other)
    return made


def compare(on: Algebra, a: Nodes, b: Nodes) -> Nodes:
    """No rescaling changes on which side of 0 a value is, nor which of two values of one unit is the larger."""
    p, q = pair(a, b)
    x, y = compact(p, q)
    if not (on.is_zero(x) or on.is_zero(y) or on.net.nodes.are_tied(x, y).all()):
        raise NotUnderstood
    return on.fill(p.shape)


# along dimensions


def pool(on: Algebra, nodes: Nodes, dims: Iterable[int], shape: Sequence[int]) -> Nodes:
    """Each element is made, homogeneously, of several along `dims`."""
    return np.broadcast_to(on.collapse(nodes, dims), tuple(shape))


def pad(on: Algebra, nodes: Nodes, dim: int, before: int, after: int) -> Nodes:
    """Zeros at the ends of `dim`, or fewer elements where the numbers are negative.

    Zeros scale as what they stand next to; channels of zeros are new units.
    """
    at = (slice(None),) * dim
    if nodes.strides[dim] == 0:
        shape = (*nodes.shape[:dim], nodes.shape[dim] + before + after, *nodes.shape[dim + 1 :])
        return np.broadcast_to(nodes[(*at, slice(0, 1))], shape)
    nodes = nodes[(*at, slice(max(0, -before), nodes.shape[dim] - max(0, -after)))]
    zeros = [on.net.nodes.new(max(0, n), "zero padding") for n in (before, after)]
    ends = [along(z, dim, (*nodes.shape[:dim], len(z), *nodes.shape[dim + 1 :])) for z in zeros]
    return np.concatenate([ends[0], nodes, ends[1]], axis=dim)


# layers


def contract(
    on: Algebra, operands: Sequence[tuple[Operand, Labels]], labels: Labels, shape: Sequence[int], otherwise: str
) -> Nodes:
    """The sum of products of values, with dimensions labelled as in einsum. All of them but one are pinned.

    If one is a parameter of one's own, it is a layer that reads the other. Otherwise these are sums over positions,
    weighted by what is pinned: the values of attention, interpolation.
    """
    if any(len(set(found)) < len(found) for found in (labels, *(own for _, own in operands))):
        raise NotUnderstood("of this form")
    weights = [(x.weight, own) for x, own in operands if x.weight is not None]
    values = [(x.nodes, own) for x, own in operands if x.weight is None]
    if len(weights) > 1:
        raise NotUnderstood("of two parameters")

    def summed(own: Labels) -> list[int]:
        return [d for d, label in enumerate(own) if label not in labels]

    free = [(nodes, own) for nodes, own in values if not on.is_pinned(nodes)]
    passed = [i for i, (nodes, own) in enumerate(free) if weights or not varies(nodes, summed(own))]
    if not (passed or weights):
        raise NotUnderstood(otherwise)
    nodes, own = free.pop(passed[-1]) if passed else [(on.fill(()), ()), *values][-1]
    for other, _ in free:
        on.pin(other, "multiplies a feature")
    for w, w_labels in weights:
        return layer(on, w, w_labels, nodes, own, labels, shape)
    nodes = on.equal_along(nodes, summed(own))
    kept = [label for label in labels if label in own]
    nodes = nodes.transpose([own.index(label) for label in (*kept, *(n for n in own if n not in labels))])
    view = [nodes.shape[kept.index(label)] if label in kept else 1 for label in labels]
    return np.broadcast_to(nodes.reshape(view), tuple(shape))


def look_up(on: Algebra, table: Operand, table_labels: Labels, labels: Labels, shape: Sequence[int]) -> Nodes:
    """Entries of a table of one's own, at whatever places: a layer that reads one-hot vectors."""
    if table.weight is None:
        raise NotUnderstood
    return layer(on, table.weight, table_labels, on.fill(()), (), labels, shape, "embedding")


def by_constants(
    on: Algebra,
    nodes: Nodes,
    dim: int,
    groups: int,
    out_dim: int,
    features: int,
    shape: Sequence[int],
    otherwise: str,
) -> Nodes:
    """A convolution whose weights are pinned: each group of channels must be one unit."""
    channels = on.read(nodes, dim).per_feature.reshape(groups, -1)
    if (channels != channels[:, :1]).any():
        raise NotUnderstood(otherwise)
    return along(np.repeat(channels[:, 0], features // groups), out_dim, shape)
