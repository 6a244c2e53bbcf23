"""The scale at which every unit's largest weights in and out are equal: cross-layer equalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsgd.network import Network
from gsgd.warn import warn

Floats = NDArray[np.float64]

_TOLERANCE = 1e-7  # of log c between two sweeps
_MOST_SWEEPS = 2000


def equalized_scale(net: Network, arrays: Mapping[str, NDArray[Any]], start: Floats) -> Floats:
    """The c per unit, (H,), after which the largest magnitudes in and out of every unit are equal.

    Osborne's iteration in the maximum norm (Schulman and Sinclair, 2017), in logarithms: each unit in turn takes the
    geometric mean of what its two sides ask for. Nagel et al. (2019) do this for pairs of layers. The solution need
    not be unique; it is the one that `start`, positive numbers per unit, leads to. Units without a non-zero weight on
    one side keep their scale.
    """
    t = np.append(np.log(start), 0.0)
    with np.errstate(divide="ignore"):
        logs = [
            np.log(np.abs(b.view(arrays[b.name])).max(axis=(3, 4, 5), initial=0).astype(np.float64)) for b in net.blocks
        ]
    first = np.full(net.num_units, len(net.blocks))
    for k, b in reversed(list(enumerate(net.blocks))):
        first[b.rows[b.rows >= 0]] = k
    layers = []
    for k in np.unique(first):
        mask = np.append(first == k, False)
        writers = [i for i, b in enumerate(net.blocks) if mask[b.rows].any()]
        readers = [i for i, b in enumerate(net.blocks) if mask[b.cols].any()]
        feeds_itself = any(mask[net.blocks[i].cols].any() for i in writers)
        layers.append((mask, writers, readers, 0.5 if feeds_itself else 1.0))
    moved = 0.0
    for _ in range(_MOST_SWEEPS):
        moved = 0.0
        for mask, writers, readers, part in layers:
            largest_in, largest_out = np.full((2, net.num_units + 1), -np.inf)
            for i in writers:
                b = net.blocks[i]
                found = (logs[i] - t[b.cols].reshape(b.extents[0], 1, -1)).max(axis=2, initial=-np.inf)
                np.maximum.at(largest_in, b.rows, found.reshape(-1))
            for i in readers:
                b = net.blocks[i]
                found = (logs[i] + t[b.rows].reshape(b.extents[0], -1, 1)).max(axis=1, initial=-np.inf)
                np.maximum.at(largest_out, b.cols, found.reshape(-1))
            here = mask & np.isfinite(largest_in) & np.isfinite(largest_out)
            move = (largest_out[here] - largest_in[here]) / 2 - t[here]
            t[here] += part * move
            moved = max(moved, float(np.abs(move).max(initial=0.0)))
        if moved <= _TOLERANCE:
            break
    else:
        warn(f"equalizing did not converge: log c still moves by {moved:.1e}", RuntimeWarning)
    scale: Floats = np.exp(t[:-1])
    return scale
