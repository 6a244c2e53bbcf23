"""Units that no path of non-zero weights passes at the start, such as LoRA's, wait and join (METHOD.md, section 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsgd.coordinates import Coordinates
from gsgd.entries import at_edges
from gsgd.layout import IN, OUT, Layout, network_layout
from gsgd.network import Network
from gsgd.skeleton import Rule, Skeleton
from gsgd.stages import Scale, relative


def is_due(step: int) -> bool:
    """Whether waiting units are looked at after this step: 1, 2, 4, 8, ..."""
    return step > 0 and step & (step - 1) == 0


def join(
    net: Network, arrays: Mapping[str, NDArray[Any]], coordinates: Coordinates, rule: Rule
) -> tuple[Coordinates, NDArray[np.int64]] | None:
    """Coordinates with trees for the waiting units all of whose weights are non-zero by now, and these units.

    The scale of these is that of the moment: A = B = 1, as if they were pinned still, so that no other coordinate and
    no moment of one changes. What the others have stays. None if no unit is ready.
    """
    ready = coordinates.in_edges[:, 0] < 0
    if ready.any():
        ready &= ~_meet_zero(net, arrays)
    if not ready.any():
        return None
    edges = Skeleton(net, arrays, rule).edge_arrays
    given = list(arrays.values())
    shapes = {name: a.shape for name, a in arrays.items()}
    return with_trees(net, shapes, coordinates, ready, edges, lambda t: np.append(at_edges(t, given), 1.0)[t.edge])


def with_trees(
    net: Network,
    shapes: Mapping[str, tuple[int, ...]],
    coordinates: Coordinates,
    ready: NDArray[np.bool_],
    chosen: tuple[NDArray[np.int64], NDArray[np.int64]],
    weights_of: Callable[[Layout], NDArray[Any]],
) -> tuple[Coordinates, NDArray[np.int64]] | None:
    """The coordinates with the chosen trees' edges for units that are ready and have some: see `join`.

    `weights_of` says the weights of tree edges, (2, H + 1), by a layout.
    """
    ready = ready & (chosen[0][:, 0] >= 0)
    if not ready.any():
        return None
    edges = [np.where(ready[:, None], new, old) for new, old in zip(chosen, coordinates.edges, strict=True)]
    t = network_layout(net, shapes, edges[0], edges[1])
    now = np.where(t.edge < len(t.owner), weights_of(t).astype(np.float64), 1.0)
    weights = [np.where(ready, w, old) for w, old in zip(now[:, :-1], coordinates.scale[:2], strict=True)]
    a, b = relative(t, Scale.of(np.asarray, weights[IN], weights[OUT], coordinates.c), now)
    c = np.append(coordinates.c, 1.0)
    for tree, ahead in ((IN, a * c), (OUT, b / c)):  # the products of what follows along the tree
        end = t.end[tree, :-1]
        waited = np.append(ready, False)[end]
        weights[tree] = np.where(ready & ~waited, weights[tree] * ahead[end], weights[tree])
    return Coordinates(edges[0], edges[1], weights[0], weights[1], coordinates.c), np.flatnonzero(ready)


def _meet_zero(net: Network, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Units that have a weight that is 0."""
    meet = np.zeros(net.num_units + 1, dtype=bool)
    for block in net.blocks:
        zero = block.view(arrays[block.name]) == 0
        meet[block.rows[zero.any(axis=(2, 3, 4, 5)).reshape(-1)]] = True
        meet[block.cols[zero.any(axis=(1, 3, 4, 5)).reshape(-1)]] = True
    return meet[:-1]  # PINNED is the last
