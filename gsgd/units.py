"""Nodes of a computation, tied to units or pinned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsgd.blocks import PINNED, Ids


@dataclass(frozen=True, eq=False)
class Numbering:
    """Ids of units, in the order of their first nodes.

    Attributes
    ----------
    unit_of_node : int64 array, shape (nodes,)
        `PINNED` where the node is pinned.
    labels : tuple of str
        Of every unit, that of its first node.
    """

    unit_of_node: Ids
    labels: tuple[str, ...]


def unique_pairs(a: Ids, b: Ids) -> tuple[Ids, Ids]:
    """The pairs of nodes that occur, shape (2, count), sorted; and which of them every pair is, as a flat array."""
    stride = 1 + int(b.max(initial=0))
    keys, which = np.unique(a.ravel() * stride + b.ravel(), return_inverse=True)
    return np.stack(np.divmod(keys, stride)), which


class Units:
    """Nodes (one per channel of a value), the units that they are tied to, and why some are pinned.

    A pin holds for all that is tied to the node, before or after.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []  # union-find over nodes; a root is its unit's first node
        self._labels: list[str] = []
        self._groups: dict[str, int] = {}  # the labels without their channels -> how many were asked for
        self._reasons: dict[int, str] = {}  # root -> why it is pinned
        self._numbering: Numbering | None = None

    def new(self, count: int, label: str) -> Ids:
        """`count` nodes, each a unit of its own, labelled ``label[0]``, ...: with a number if there is such a label."""
        first, group, number = len(self._parent), label, self._groups.get(label, 0)
        while group in self._groups:
            number += 1
            group = f"{label} {number}"
        self._groups[label] = max(1, number)
        self._groups.setdefault(group, 1)
        self._parent.extend(range(first, first + count))
        self._labels.extend(f"{group}[{i}]" for i in range(count))
        self._numbering = None
        return np.arange(first, first + count, dtype=np.int64)

    def tie(self, a: Ids, b: Ids) -> None:
        """Make one unit of each pair of nodes; the arrays have one shape."""
        differ = a != b
        for i, j in unique_pairs(a[differ], b[differ])[0].T.tolist():
            first, second = sorted((self._root(i), self._root(j)))
            if first != second:
                self._parent[second] = first
                reason = self._reasons.pop(second, None)
                if reason is not None:
                    self._reasons.setdefault(first, reason)
                self._numbering = None

    def pin(self, nodes: Ids | Iterable[int], reason: str) -> None:
        """Pin the units of these nodes; the first reason stays."""
        for node in np.unique(np.asarray(nodes, dtype=np.int64)).tolist():
            self._reasons.setdefault(self._root(node), reason)
        self._numbering = None

    def is_pinned(self, nodes: Ids) -> NDArray[np.bool_]:
        """Which of the nodes are pinned; an array of the same shape."""
        return np.isin(nodes, [n for n in np.unique(nodes).tolist() if self._root(n) in self._reasons])

    def are_tied(self, a: Ids, b: Ids) -> NDArray[np.bool_]:
        """Which pairs of nodes are one unit; the arrays have one shape."""
        pairs = zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)
        return np.array([self._root(i) == self._root(j) for i, j in pairs], dtype=np.bool_)

    def why(self, node: int) -> str | None:
        """The reason for which a node is pinned; None if it is not."""
        return self._reasons.get(self._root(node))

    @property
    def pins(self) -> dict[str, str]:
        """The reason of every pinned unit, by the label of its first node."""
        return {self._labels[root]: self._reasons[root] for root in sorted(self._reasons)}

    @property
    def numbering(self) -> Numbering:
        """Which units there are now; the same object until something changes."""
        if self._numbering is None:
            of_root: dict[int, int] = {}
            labels: list[str] = []
            units = np.full(len(self._parent), PINNED, dtype=np.int64)
            for node, label in enumerate(self._labels):
                root = self._root(node)
                if root in self._reasons:
                    continue
                if root not in of_root:
                    of_root[root] = len(labels)
                    labels.append(label)
                units[node] = of_root[root]
            self._numbering = Numbering(units, tuple(labels))
        return self._numbering

    def _root(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node
