"""The three methods of the paper, each by itself: skeleton construction, inverse chain rule, weight allocation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from gsgd import entries, reference
from gsgd.arrays import Arrays, as_array, check_gradients, check_parameters
from gsgd.network import Block, Network, Sum, plain_block
from gsgd.scale import balanced_scale, core_plan
from gsgd.warn import warn

Rule = Literal["modulo", "largest"]
Backend = Literal["c", "reference"]
Edge = tuple[str, tuple[int, ...]]


def check_rule(rule: Rule) -> Rule:
    """`rule`, if it is one."""
    if rule not in ("modulo", "largest"):
        raise ValueError(f"rule: expected 'modulo' or 'largest', got {rule!r}")
    return rule


def make_plan(net: Network, arrays: Arrays, backend: Backend) -> tuple[Any, list[Block]]:
    """A plan of the network's blocks, and of a plain block for every array that it does not mention."""
    mentioned = net.shapes.keys()
    blocks = [*net.blocks, *(plain_block(n, a.shape) for n, a in arrays.items() if n not in mentioned)]
    number = {name: i for i, name in enumerate(arrays)}
    if backend == "reference":
        return reference.Plan(
            net.num_units, [a.shape for a in arrays.values()], [(number[b.name], b) for b in blocks]
        ), blocks
    if backend != "c":
        raise ValueError(f"backend: expected 'c' or 'reference', got {backend!r}")
    return core_plan(blocks, arrays, net.num_units), blocks


def batch_norm_gradients(
    net: Network, arrays: Mapping[str, Any], gradients: Sequence[Any], in_edges: NDArray[np.int64]
) -> tuple[list[Any], list[Any], Any]:
    """Gradients of layers before a batch normalization: for ordinary edges; for in-edges and their sums; and norms.

    "paper": times the norm of each row (equation 30), in both. "released", as in the authors' code (METHOD.md, section
    5): times the norm n over input channels, per row and tap; raw in the inverse chain rule of an in-edge, whose dl/dx
    is divided by the n of its own tap: the third result, (H,), or None. Norms are summed in a fixed order. Arrays are
    of any namespace with assignment to views.
    """
    xp = array_namespace(*arrays.values())
    number = {name: i for i, name in enumerate(arrays)}
    scaled, sums = list(gradients), list(gradients)
    squares: dict[str, Any] = {}
    chain_norm = None

    def sum_of_squares(b: Block, axes: tuple[int, ...]) -> Any:
        w = b.view(arrays[b.name], xp)
        in_order = xp.reshape(xp.reshape(w * w, (-1,)), w.shape)  # NumPy's sums follow the strides
        return xp.sum(in_order, axis=axes, keepdims=True)

    for b in net.blocks:
        if b.batch_norm == "paper":
            squares[b.name] = squares.get(b.name, 0) + sum_of_squares(b, (2, 3, 4, 5))
    for k, b in enumerate(net.blocks):
        i, g = number[b.name], gradients[number[b.name]]
        if b.batch_norm is None or g is None:
            continue
        norm = xp.sqrt(squares[b.name] if b.batch_norm == "paper" else sum_of_squares(b, (2,)))
        own = scaled[i]
        if own is None or own is g:
            own = scaled[i] = xp.asarray(g, copy=True)
        part = b.view(own, xp)
        part *= norm
        if b.batch_norm == "paper":
            sums[i] = own
            continue
        here = np.flatnonzero(in_edges[:, 0] == k)
        group, row, _, *taps = np.unravel_index(in_edges[here, 1], b.extents)
        if chain_norm is None:
            real = entries.real_type(xp, device(norm))
            chain_norm = xp.ones(net.num_units, dtype=real, device=device(norm))
        unit, *at = (xp.asarray(x, device=device(norm)) for x in (here, group, row, 0 * row, *taps))
        chain_norm[unit] = xp.astype(norm[tuple(at)], chain_norm.dtype)
    return scaled, sums, chain_norm


def explain(
    net: Network,
    edges: Sequence[NDArray[np.int64]],
    arrays: Arrays,
    gradients: Sequence[NDArray[Any] | None],
    unit: int,
) -> str:
    """What was not finite in a step on the trees `edges`; `unit` is that of the plan's FloatingPointError."""
    for name, g in zip(arrays, gradients, strict=True):
        if g is not None and not np.isfinite(g).all():
            return f"gradient of {name!r} is not finite"
    for name, w in arrays.items():
        if not np.isfinite(w).all():
            return f"parameter {name!r} has entries that are not finite"
    for k, entry in (e for tree in edges for e in tree.tolist() if e[0] >= 0):
        name, index = net.blocks[k].name, net.blocks[k].index(entry)
        if arrays[name][index] == 0:
            return f"the skeleton weight {name}{list(index)} has become 0: paths through it have no ratio"
    if unit < 0:
        return "the sums of weights times gradients overflow"
    return f"the path through unit {net.units[unit]} has no finite ratio"


def _named(edges: NDArray[np.int64], blocks: Sequence[Block]) -> tuple[Edge | None, ...]:
    """(name, index) of edges that are given as (block, entry), block < 0: none."""
    named: list[Edge | None] = [None] * len(edges)
    by_block = np.argsort(edges[:, 0], kind="stable")
    ends = np.searchsorted(edges[by_block, 0], np.arange(len(blocks) + 1))
    for block, (first, last) in zip(blocks, pairwise(ends), strict=True):
        here = by_block[first:last]
        for unit, index in zip(here.tolist(), block.indices(edges[here, 1]), strict=True):
            named[unit] = (block.name, index)
    return tuple(named)


def _pinned(net: Network, in_edges: NDArray[np.int64]) -> list[str]:
    """Labels of the units without an in-edge."""
    return [net.units[u] for u in np.flatnonzero(in_edges[:, 0] < 0)]


def warn_of_pinned(net: Network, in_edges: NDArray[np.int64], waiting: bool = False) -> None:
    """Warn of units without an in-edge: training does not become free of their scale, or not yet."""
    if pinned := _pinned(net, in_edges):
        some = ", ".join(pinned[:3]) + (", ..." if len(pinned) > 3 else "")
        how = "wait with plain steps until all their weights are non-zero" if waiting else "are pinned for good"
        warn(f"{len(pinned)} units {how}, since no path of non-zero weights passes them: {some}")


class Skeleton:
    """Skeleton weights of a network: an in-edge and an out-edge for every unit (the paper's section 4.1).

    Every weight that is not free owns one basis path: in(u) + e + out(v) for an edge e = (u -> v).

    Parameters
    ----------
    net : Network
    params : mapping of str to array
        float32 or float64 weights; read, not kept. What `net` does not mention is its own coordinate.
    rule : {"modulo", "largest"}
        "modulo": row i takes column i mod columns as in-edge, column j takes row j mod rows as out-edge, centre tap
        (the paper's choice). "largest": the largest weight by magnitude. Both pass over exact zeros, take in-edges
        from the first layer that writes a unit and out-edges from the last that reads it.
    backend : {"c", "reference"}
    balanced : bool
        Find the balanced scale, too, and choose the largest weights of the balanced network.

    Attributes
    ----------
    c : array, shape (H,)
        The balanced scale, if asked for; otherwise 1.
    in_edges, out_edges : tuples of (name, index), one per unit
        None for a unit that no path of non-zero weights passes: it is pinned.
    """

    def __init__(
        self,
        net: Network,
        params: Mapping[str, Any],
        rule: Rule = "modulo",
        *,
        backend: Backend = "c",
        balanced: bool = False,
    ) -> None:
        check_rule(rule)
        arrays = check_parameters(params, net, writable=False, others=True)
        for name, a in arrays.items():
            if not np.isfinite(a).all():
                raise ValueError(f"parameter {name!r} has entries that are not finite")
        self.net, self.rule, self.backend = net, rule, backend
        self.plan, self._blocks = make_plan(net, arrays, backend)
        self._shapes = {name: a.shape for name, a in arrays.items()}
        self.c = np.ones(net.num_units)
        if rule == "modulo" or balanced:
            self._take(self.plan.choose_trees(list(arrays.values()), False, None))
        if balanced:
            self.c = balanced_scale(self.plan, arrays) if backend == "c" else self.balanced_scale(arrays)
        if rule == "largest":
            self._take(self.plan.choose_trees(list(arrays.values()), True, self.c if balanced else None))

    def _take(self, edges: tuple[NDArray[np.int64], NDArray[np.int64]], plan: Any = None) -> None:
        plan = self.plan if plan is None else plan
        plan.set_trees(*edges)
        self.plan, self.edge_arrays = plan, edges
        for name in ("in_edges", "out_edges"):
            self.__dict__.pop(name, None)

    def replace_edges(self, edges: tuple[NDArray[np.int64], NDArray[np.int64]], arrays: Arrays) -> None:
        """Use these trees, (block, entry) per unit; ValueError when they are none."""
        plan, _ = make_plan(self.net, arrays, self.backend)
        self._take(edges, plan)

    @cached_property
    def in_edges(self) -> tuple[Edge | None, ...]:
        """The in-edge of every unit, (name, index)."""
        return _named(self.edge_arrays[0], self._blocks)

    @cached_property
    def out_edges(self) -> tuple[Edge | None, ...]:
        """The out-edge of every unit, (name, index)."""
        return _named(self.edge_arrays[1], self._blocks)

    @property
    def free(self) -> dict[str, NDArray[np.bool_]]:
        """A mask per parameter: True at the out-edges, which never move."""
        masks = {name: np.zeros(shape, dtype=bool) for name, shape in self._shapes.items()}
        for edge in self.out_edges:
            if edge is not None:
                masks[edge[0]][edge[1]] = True
        return masks

    @property
    def pinned(self) -> dict[str, str]:
        """Units of the network that the skeleton had to pin, by label, with the reason."""
        return dict.fromkeys(_pinned(self.net, self.edge_arrays[0]), "no path of non-zero weights passes")

    def warn_of_pinned(self, waiting: bool = False) -> None:
        """Warn of units that the skeleton had to pin: training does not become free of their scale."""
        warn_of_pinned(self.net, self.edge_arrays[0], waiting)

    @property
    def num_units(self) -> int:
        """H: units that the skeleton did not have to pin."""
        return self.net.num_units - len(self.pinned)

    @property
    def num_basis_paths(self) -> int:
        """m - H."""
        return self.net.num_weights - self.num_units

    def tree_weights(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The weights of in-edges and of out-edges, (H,) each; 1 where there is none."""
        found = []
        for edges in self.edge_arrays:
            weights = np.ones(self.net.num_units)
            for k in np.unique(edges[:, 0][edges[:, 0] >= 0]):
                here = np.flatnonzero(edges[:, 0] == k)
                block = self._blocks[k]
                at = tuple(np.array(block.indices(edges[here, 1])).T)
                weights[here] = arrays[block.name][at]
            found.append(weights)
        return found[0], found[1]

    def balanced_scale(self, params: Mapping[str, Any]) -> NDArray[np.float64]:
        """c per unit, (H,): to the representative of least sum of squares; 1 for units that are pinned."""
        arrays = check_parameters(params, self.net, writable=False)
        plan = core_plan(self.net.blocks, arrays, self.net.num_units)
        plan.set_trees(*self.edge_arrays)
        return balanced_scale(plan, arrays)

    # the methods

    def _arrays(self, params: Mapping[str, Any]) -> Arrays:
        return check_parameters(params, self.net, writable=False, others=True)

    def path_values(self, params: Mapping[str, Any]) -> Arrays:
        """The value of the basis path that each weight owns: name -> float64 array; NaN where the weight is free."""
        arrays = self._arrays(params)
        values = {name: np.full(a.shape, np.nan) for name, a in arrays.items()}
        self.plan.path_values(list(arrays.values()), list(values.values()), None)
        return values

    def log_path_values(self, params: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
        """Signs and logarithms of magnitudes of the path values, which underflow in deep networks."""
        arrays = self._arrays(params)
        signs = {name: np.full(a.shape, np.nan) for name, a in arrays.items()}
        logs = {name: np.full(a.shape, np.nan) for name, a in arrays.items()}
        self.plan.path_values(list(arrays.values()), list(signs.values()), list(logs.values()))
        return signs, logs

    def path_gradients(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> Arrays:
        """The inverse chain rule (section 4.2): dl/dv, name -> float64 array; NaN where the weight is free.

        Before a batch normalization that is treated as in the paper or its released code, by `batch_norm_gradients`.

        Raises
        ------
        FloatingPointError
            A gradient is not finite.
        """
        arrays = self._arrays(params)
        gradients = check_gradients(grads, arrays)
        out = {name: np.full(a.shape, np.nan) for name, a in arrays.items()}
        for name, g in gradients.items():
            if not np.isfinite(g).all():
                raise FloatingPointError(f"gradient of {name!r} is not finite")
        scaled, sums, norm = batch_norm_gradients(self.net, arrays, list(gradients.values()), self.edge_arrays[0])
        self.plan.path_gradients(list(arrays.values()), scaled, sums, norm, list(out.values()))
        return out

    def allocate(self, params: Mapping[str, Any], ratios: Mapping[str, Any]) -> Arrays:
        """Weight allocation (section 4.3): the weights whose basis paths are `ratios` times those of `params`.

        Free weights keep their bits; `ratios` are not read there.
        """
        arrays, free = self._arrays(params), self.free
        given = {}
        for name, a in arrays.items():
            if name not in ratios:
                raise ValueError(f"ratios of {name!r} are missing")
            given[name] = as_array(f"ratios of {name!r}", ratios[name]).astype(np.float64)
            if given[name].shape != a.shape:
                raise ValueError(f"ratios of {name!r}: expected shape {a.shape}, got {given[name].shape}")
            if not np.isfinite(given[name][~free[name]]).all():
                raise ValueError(f"ratios of {name!r} are not finite")
        out = {name: np.empty_like(a) for name, a in arrays.items()}
        self.plan.allocate(list(arrays.values()), list(given.values()), list(out.values()))
        return out

    def enumerate_paths(self, limit: int = 100_000) -> NDArray[np.int8]:
        """The structure matrix (section 3.2): weights by paths, 1 where the path uses the weight.

        For small networks: a ValueError when there are more than `limit` paths. Rows are weights in the order of
        ``net.shapes``, each in C order; columns are all paths between pinned ends. Its rank is m - H.
        """
        net = self.net
        active = np.array([e is not None for e in self.in_edges] + [False])
        pinned = ~active[net.unit_of_node]
        first = dict(zip(net.shapes, np.cumsum([0, *(math.prod(s) for s in net.shapes.values())]), strict=False))
        begun: list[list[tuple[int, ...]]] = [[()] if p else [] for p in pinned]
        ended: list[tuple[int, ...]] = []
        for op in net.operations:
            if isinstance(op, Sum):
                for term in op.terms:
                    for node, out in zip(term.tolist(), op.out.tolist(), strict=True):
                        if not pinned[out]:
                            begun[out] += begun[node]
                continue
            for entry, (g, r, c, *_) in enumerate(np.ndindex(op.extents)):
                node, source = op.row_nodes[g * op.extents[1] + r], op.col_nodes[g * op.extents[2] + c]
                row = int(first[op.name] + np.ravel_multi_index(op.index(entry), net.shapes[op.name]))
                grown = [(*path, row) for path in begun[source]]
                (ended if pinned[node] else begun[node]).extend(grown)
                if len(ended) + len(begun[node]) > limit:
                    raise ValueError(f"the network has more than {limit} paths")
        matrix = np.zeros((net.num_weights, len(ended)), dtype=np.int8)
        for k, path in enumerate(ended):
            matrix[list(path), k] = 1
        return matrix
