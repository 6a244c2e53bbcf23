"""What sums, products, selections and layers make of the nodes of the values that they read, in any framework."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gsgd.network import Residual
from gsgd.trace.nodes import Algebra, Nodes, NotUnderstood, along, compact
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
    shape = [n if d in rows else 1 for d, n in enumerate(x.shape)]
    labels = range(x.ndim)
    edges = layer(on, w, labels[first:], on.fill(()), (), rows, [x.shape[d] for d in rows], "bias")
    return np.broadcast_to(edges.reshape(shape), x.shape)


def _has_several_units(on: Algebra, x: Nodes, dim: int) -> bool:
    """Whether units that are not pinned differ along `dim`, in which one bias for all of them would tie them."""
    small = compact(x)[0]
    free = np.where(on.net.nodes.is_pinned(small), -1, small)
    return bool(((free != free.max(axis=dim, keepdims=True)) & (free >= 0)).any())


def multiply(on: Algebra, a: Operand, b: Operand) -> Nodes:
    """A product scales as one factor if the other is pinned. A vector of one's own scales channels."""
    p, q = pair(a.nodes, b.nodes)
    for gain, x in ((b, p), (a, q)):
        w = gain.weight
        if w is None or len(w.long) != 1 or (a if gain is b else b).weight is not None:
            continue
        labels = tuple(range(x.ndim))
        own = labels[x.ndim - len(w.dims) :]
        channel = own[w.long[0]]
        if on.is_pinned(x):
            edges = layer(on, w, own, on.fill((), int(x.flat[0])), (), [channel], [x.shape[channel]], "scale")
        elif [d for d in labels if x.strides[d] and x.shape[d] > 1] == [channel]:
            edges = layer(on, w, own, x, labels, [channel], [x.shape[channel]], "scale")
        else:  # another factor of the same units
            continue
        return along(edges, channel, x.shape)
    return _product(on, p, q)


def divide(on: Algebra, a: Nodes, b: Nodes) -> Nodes:
    """A quotient scales as what is divided if the divisor is pinned."""
    return _product(on, *pair(a, b), divisor=True)


def _product(on: Algebra, p: Nodes, q: Nodes, divisor: bool = False) -> Nodes:
    x, y = compact(p, q)
    fixed = [on.net.nodes.is_pinned(n) for n in (x, y)]
    if not (fixed[1] if divisor else fixed[0] | fixed[1]).all():
        raise NotUnderstood("by a feature")
    return np.broadcast_to(np.where(fixed[1], x, y), p.shape)


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
    on: Algebra,
    a: Operand,
    a_labels: Labels,
    b: Operand,
    b_labels: Labels,
    labels: Labels,
    shape: Sequence[int],
    otherwise: str,
) -> Nodes:
    """The sum of products of two values, with dimensions labelled as in einsum.

    A parameter of one's own is a layer. Otherwise these are sums over positions, weighted by what is pinned: the values
    of attention, interpolation.
    """
    if any(len(set(found)) < len(found) for found in (a_labels, b_labels, labels)):
        raise NotUnderstood("of this form")
    if a.weight is not None and b.weight is not None:
        raise NotUnderstood("of two parameters")
    for w, w_labels, x, x_labels in ((b.weight, b_labels, a, a_labels), (a.weight, a_labels, b, b_labels)):
        if w is not None:
            return layer(on, w, w_labels, x.nodes, x_labels, labels, shape)
    pinned = [on.is_pinned(x.nodes) for x in (a, b)]
    if pinned[0] == pinned[1]:
        raise NotUnderstood(otherwise)
    nodes, own = (b.nodes, b_labels) if pinned[0] else (a.nodes, a_labels)
    nodes = on.equal_along(nodes, [d for d, label in enumerate(own) if label not in labels], otherwise)
    kept = [label for label in labels if label in own]
    nodes = nodes.transpose([own.index(label) for label in (*kept, *(n for n in own if n not in labels))])
    view = [nodes.shape[kept.index(label)] if label in kept else 1 for label in labels]
    return np.broadcast_to(nodes.reshape(view), tuple(shape))


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
