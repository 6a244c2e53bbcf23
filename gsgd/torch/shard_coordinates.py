"""Trees and balanced scale of parameters that are cut between processes, without gathering a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsgd import stages
from gsgd.coordinates import Coordinates, ScaleName
from gsgd.layout import IN, OUT, Edges, Layout, Span, convert, network_layout, part
from gsgd.network import Network
from gsgd.skeleton import Rule, make_plan, warn_of_pinned
from gsgd.torch.engines.base import to_device
from gsgd.torch.shards import Shards, local
from gsgd.waiting import with_trees
from gsgd.warn import warn

Floats = NDArray[np.float64]

_MOST_SWEEPS = 200
_MOST_NEWTON_STEPS = 50


def find_coordinates(net: Network, tensors: Mapping[str, Tensor], rule: Rule, scale: ScaleName) -> Coordinates:
    """As those of a `Skeleton` of the whole weights, by sums over processes; with "ones", tree weights become 1.

    Raises
    ------
    ValueError
        The rule is "largest"; a parameter is not finite; processes have other networks, or other weights where they
        should have the same.
    """
    if rule != "modulo":
        raise ValueError("rule: expected 'modulo' for sharded parameters, 'largest' would have to gather them")
    shards, weights = Shards(tensors), [local(p) for p in tensors.values()]
    blocks = {name: [b for b in net.blocks if b.name == name] for name in sorted(tensors)}
    described = [f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}" for name in blocks]
    shards.check_agreement({"the set of parameters, or their shapes and dtypes,": described})
    at = {name: [x for b in own for x in (str(b.dims), b.rows, b.cols)] for name, own in blocks.items()}
    copies = {
        name: _copied(w, own, p) for (name, p), w, own in zip(tensors.items(), weights, shards.index, strict=True)
    }
    shards.check_agreement(
        {
            **{f"the network at parameter {name!r}": own for name, own in at.items()},
            **{f"parameter {name!r}": copies[name] for name in blocks},
        }
    )
    bad = torch.tensor([float(not w.isfinite().all()) for w in weights], dtype=torch.float64, device=weights[0].device)
    for name, count in zip(tensors, shards.total(bad).tolist(), strict=True):
        if count:
            raise ValueError(f"parameter {name!r} has entries that are not finite")

    whole, counted, edges, tree_weights = _choose_trees(net, tensors, weights, shards)
    warn_of_pinned(net, edges[0], waiting=True)
    c = np.ones(net.num_units)
    if scale == "balanced":
        c = _balanced(whole, counted, weights, shards)
    if scale == "ones":
        everywhere = part(whole, shards.index)
        for a, w in zip(everywhere.arrays, weights, strict=True):
            w[tuple(map(torch.from_numpy, a.index))] = 1
        tree_weights = np.ones_like(tree_weights)
    tree_weights = np.where(whole.edge < len(whole.owner), tree_weights, 1.0)[:, :-1]
    in_edges, out_edges = edges
    return Coordinates(in_edges, out_edges, tree_weights[IN], tree_weights[OUT], c)


def join(
    net: Network, tensors: Mapping[str, Tensor], coordinates: Coordinates
) -> tuple[Coordinates, NDArray[np.int64]] | None:
    """As `gsgd.waiting.join`, by sums over processes."""
    shards, weights = Shards(tensors), [local(p) for p in tensors.values()]
    shapes = {name: tuple(p.shape) for name, p in tensors.items()}
    ready = (coordinates.in_edges[:, 0] < 0) & (_meet_zero(net, tensors, weights, shards) == 0)
    if not ready.any():
        return None
    chosen = _choose_trees(net, tensors, weights, shards)[2]
    return with_trees(
        net, shapes, coordinates, ready, chosen, lambda t: _tree_weights(_counted(t, weights, shards), weights, shards)
    )


def _choose_trees(
    net: Network, tensors: Mapping[str, Tensor], weights: Sequence[Tensor], shards: Shards
) -> tuple[Layout, Layout, tuple[Edges, Edges], Floats]:
    """The layout of the whole, of what this process counts, the trees, and the weights of their edges, (2, H + 1)."""
    shapes = {name: tuple(p.shape) for name, p in tensors.items()}
    plan, stand_ins = _plan_of_ones(net, tensors)  # for weights that are not known to be zero
    while True:
        edges = plan.choose_trees(stand_ins, False, None)
        whole = network_layout(net, shapes, *edges)
        here = _counted(whole, weights, shards)
        tree_weights = _tree_weights(here, weights, shards)
        zero = (tree_weights == 0) & (whole.edge < len(whole.owner))
        if not zero.any():
            return whole, here, edges, tree_weights
        for i in np.unique(_arrays_of(whole, whole.edge[zero])):
            stand_ins[i] = _without_zeros(stand_ins[i], whole, int(i), zero, weights[i], shards)


def _counted(whole: Layout, weights: Sequence[Tensor], shards: Shards) -> Layout:
    """What this process counts, in tensors."""
    return convert(part(whole, shards.counted), to_device(weights[0].device))


def _tree_weights(here: Layout, weights: Sequence[Tensor], shards: Shards) -> Floats:
    """The weights of tree edges, (2, H + 1), wherever they are."""
    none: list[Any] = [None] * len(weights)
    found = stages.gather(here, weights, none, [(None, None)] * len(weights)).weights
    everywhere: Floats = shards.total(found).cpu().numpy()
    return everywhere


def _meet_zero(net: Network, tensors: Mapping[str, Tensor], weights: Sequence[Tensor], shards: Shards) -> Floats:
    """How many of every unit's weights are 0."""
    plan, ones = _plan_of_ones(net, tensors)
    shapes = {name: tuple(p.shape) for name, p in tensors.items()}
    here = _counted(network_layout(net, shapes, *plan.choose_trees(ones, False, None)), weights, shards)
    count = torch.zeros(net.num_units + 1, dtype=torch.float64, device=weights[0].device)
    asarray = to_device(count.device)
    for a, w in zip(here.arrays, weights, strict=True):
        for span, table in ((a.rows, here.rows), (a.cols, here.cols)):
            if span is not None:
                _add(count, span.of(torch, asarray(table)), (w == 0).reshape(a.shape).double())
    found: Floats = shards.total(count)[:-1].cpu().numpy()
    return found


def _plan_of_ones(net: Network, tensors: Mapping[str, Tensor]) -> tuple[Any, list[NDArray[np.float32]]]:
    """A plan to choose trees with, and ones for all weights: single numbers seen as whole arrays."""
    ones = [np.broadcast_to(np.float32(1), tuple(p.shape)) for p in tensors.values()]
    return make_plan(net, dict(zip(tensors, ones, strict=True)), "c")[0], ones


def _copied(w: Tensor, own: Sequence[Any], p: Tensor) -> list[Any]:
    """What must be the same on all processes: whether they hold all of it, and then the weights."""
    copied = all(len(x) == n for x, n in zip(own, p.shape, strict=True))
    return [str(copied), *([w.cpu().float().numpy()] if copied else [])]


def _arrays_of(whole: Layout, edges: NDArray[np.int32]) -> NDArray[np.int64]:
    """In which arrays tree edges lie, by their numbers."""
    return np.searchsorted([a.edges.stop for a in whole.arrays], edges, side="right")


def _without_zeros(
    stand_in: NDArray[np.float32], whole: Layout, i: int, zero: NDArray[np.bool_], w: Tensor, shards: Shards
) -> NDArray[np.float32]:
    """The stand-in of an array with zeros where candidates were zero, and where all on an index of an axis are."""
    a = whole.arrays[i]
    if not stand_in.flags.writeable:
        stand_in = stand_in.copy()
        for axis, (n, own) in enumerate(zip(a.whole, shards.index[i], strict=True)):
            count = torch.zeros(n, dtype=torch.float64, device=w.device)
            if shards.counts[i]:
                others = [d for d in range(w.ndim) if d != axis]
                count[torch.from_numpy(own)] = (w != 0).sum(others).double() if others else (w != 0).double()
            nothing = shards.total(count).cpu().numpy() == 0
            stand_in[(slice(None),) * axis + (nothing,)] = 0
    numbers = whole.edge[zero] - a.edges.start
    mine = numbers[(numbers >= 0) & (numbers < a.edges.size)]
    stand_in[tuple(x[mine] for x in a.index)] = 0
    return stand_in


# the balanced scale


def _balanced(whole: Layout, here: Layout, weights: Sequence[Tensor], shards: Shards) -> Floats:
    """The c per unit, (H,), of least sum of squares (METHOD.md, section 4): csrc/balance.c's method, in sums.

    With t = log c it is the minimum of the sum of w^2 exp(2 t(v) - 2 t(u)) over edges u -> v. Sweeps over layers set
    each unit to its own minimum; after each, Newton's method shifts every layer as a whole.
    """
    units = len(whole.root) - 1
    t = torch.zeros(units + 1, dtype=torch.float64, device=weights[0].device)
    first = np.full(units + 1, len(weights))  # the array that writes a unit first; of pinned ends the last
    ends: list[list[NDArray[np.int32]]] = []
    for i, a in reversed(list(enumerate(whole.arrays))):
        both = [
            np.array([units]) if span is None else np.unique(span.of(np, table))
            for span, table in ((a.rows, whole.rows), (a.cols, whole.cols))
        ]
        first[both[0][both[0] < units]] = i
        ends.insert(0, both)
    layers, layer = np.unique(first, return_inverse=True)
    of_array = [[np.unique(layer[x]) for x in both] for both in ends]
    flows = sorted({(int(v), int(u)) for rows, cols in of_array for v in rows for u in cols if u != v})
    place = np.full((len(layers), len(layers)), len(flows))
    for n, flow in enumerate(flows):
        place[flow] = n
    layer_of, place_of = torch.from_numpy(layer).to(t.device), torch.from_numpy(place).to(t.device)

    squares = [
        w.double().square().reshape(a.shape) if counts else None
        for w, a, counts in zip(weights, here.arrays, shards.counts, strict=True)
    ]

    asarray = to_device(t.device)

    def at(span: Span | None, table: NDArray[np.int32]) -> Tensor:
        """Units at the rows or columns of an array."""
        return torch.tensor(units, device=t.device) if span is None else span.of(torch, asarray(table))

    moved = 0.0
    for _ in range(_MOST_SWEEPS):
        moved = 0.0
        for i in range(len(layers) - 1):
            members = torch.from_numpy(np.flatnonzero(layer[:-1] == i)).to(t.device)
            sums, feeds_itself = torch.zeros(2, units + 1, dtype=torch.float64, device=t.device), False
            for a, w2, (into, out_of) in zip(here.arrays, squares, of_array, strict=True):
                feeds_itself |= i in into and i in out_of
                if w2 is None or not (i in into or i in out_of):
                    continue
                rows, cols = at(a.rows, here.rows), at(a.cols, here.cols)
                if i in into:
                    _add(sums[0], rows, w2 * torch.exp(-2 * t[cols]))
                if i in out_of:
                    _add(sums[1], cols, w2 * torch.exp(2 * t[rows]))
            total_in, total_out = shards.total(sums[:, members])
            alive = (total_in > 0) & (total_out > 0)  # others are pinned
            move = torch.where(alive, torch.log(total_out / total_in) / 4 - t[members], 0.0)
            t[members] += move / 2 if feeds_itself else move
            moved = max(moved, float(move.abs().max()))
        if moved <= 1e-13 * max(1.0, float(t.abs().max())):
            break
        energy = torch.zeros(len(flows) + 1, dtype=torch.float64, device=t.device)
        for a, w2 in zip(here.arrays, squares, strict=True):
            if w2 is not None:
                rows, cols = at(a.rows, here.rows), at(a.cols, here.cols)
                e = w2 * torch.exp(2 * t[rows] - 2 * t[cols])
                between = place_of[layer_of[rows], layer_of[cols]]
                _add(energy, between, e)
        shifts = _best_shifts(len(layers), flows, shards.total(energy).cpu().numpy())
        t += torch.from_numpy(shifts).to(t.device)[layer_of]
    else:
        warn(f"the balanced scale did not converge: {moved:.1e} is left", RuntimeWarning)
    scale: Floats = torch.exp(t[:-1]).cpu().numpy()
    return scale


def _add(to: Tensor, ids: Tensor, x: Tensor) -> None:
    """Add up by unit, or by flow, what is given per entry."""
    over = [d for d in range(x.ndim) if ids.ndim == 0 or ids.shape[d] == 1]
    to.index_add_(0, ids.reshape(-1), (x.sum(over) if over else x).reshape(-1))


def _best_shifts(layers: int, flows: Sequence[tuple[int, int]], energy: Floats) -> Floats:
    """The d of least sum of energy exp(2 d[to] - 2 d[from]), the last one 0: Newton's method with halved steps."""
    d = np.zeros(layers)
    to, source = np.array(flows, dtype=np.int64).reshape(-1, 2).T
    for _ in range(_MOST_NEWTON_STEPS):

        def after(d: Floats) -> Floats:
            return np.asarray(energy[:-1] * np.exp(2 * (d[to] - d[source])))

        now = after(d)
        slope, curvature = np.zeros(layers), np.zeros((layers, layers))
        np.add.at(slope, to, 2 * now)
        np.add.at(slope, source, -2 * now)
        for i, j, sign in ((to, to, 4), (source, source, 4), (to, source, -4), (source, to, -4)):
            np.add.at(curvature, (i, j), sign * now)
        step = np.append(-np.linalg.lstsq(curvature[:-1, :-1], slope[:-1], rcond=None)[0], 0.0)
        while np.abs(step).max() > 1e-12 and after(d + step).sum() > now.sum() * (1 + 1e-15):
            step = step / 2
        d = d + step
        if np.abs(step).max() < 1e-12:
            break
    return d
