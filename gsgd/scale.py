"""The scale on which path values are measured: the rescaling of least sum of squares (METHOD.md, section 4)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsgd.network import Block

Floats = NDArray[np.float64]


def over_taps(entries: Floats) -> Floats:
    """Sums over taps, (groups, rows, cols), of entries in C order."""
    taps = entries.reshape(*entries.shape[:3], -1)
    return taps[..., 0] if taps.shape[-1] == 1 else taps.sum(axis=-1)


def balanced_scale(blocks: Sequence[Block], arrays: Mapping[str, NDArray[Any]], units: int) -> Floats:
    """The c per unit that carries weights to the representative of least sum of squares among their rescalings.

    With t = log c this is the minimum of the convex sum of w^2 exp(2 t(v) - 2 t(u)) over edges u -> v. Sweeps of
    c(v) = sqrt(|out(v)| / |in(v)|) over the layers find it (METHOD.md, section 4). What they leave varies slowly with
    depth: after each sweep Newton's method finds the best shift of every layer as a whole.

    Units that some path of non-zero weights passes have a unique solution; all others must be pinned.
    """
    # in C order, so that the sums do not depend on strides
    squares = [over_taps(np.square(b.view(arrays[b.name]), dtype=np.float64, order="C")) for b in blocks]
    first = np.full(units + 1, len(blocks))  # the block that writes a unit first; the last entry is for pinned ends
    for k in reversed(range(len(blocks))):
        first[blocks[k].rows[blocks[k].rows >= 0]] = k
    layers, layer = np.unique(first, return_inverse=True)
    members = [np.flatnonzero(layer[:-1] == i) for i in range(len(layers) - 1)]
    writers: list[list[int]] = [[] for _ in layers]
    readers: list[list[int]] = [[] for _ in layers]
    for k, b in enumerate(blocks):
        for those, ends in ((writers, b.rows), (readers, b.cols)):
            for i in np.unique(layer[ends]):
                those[i].append(k)

    def sums_in(k: int, of_source: Floats) -> Floats:
        found: Floats = np.matmul(squares[k], of_source.reshape(blocks[k].extents[0], -1, 1))
        return found.reshape(-1)

    def sums_out(k: int, of_destination: Floats) -> Floats:
        found: Floats = np.matmul(of_destination.reshape(blocks[k].extents[0], 1, -1), squares[k])
        return found.reshape(-1)

    t, total_in, total_out = np.zeros((3, units + 1))
    largest = 0.0
    for _ in range(200):
        largest = 0.0
        for i, here in enumerate(members):  # the work of a layer is of its own size, or depth would count twice
            total_in[here] = total_out[here] = 0
            for k in writers[i]:
                np.add.at(total_in, blocks[k].rows, sums_in(k, np.exp(-2 * t[blocks[k].cols])))
            for k in readers[i]:
                np.add.at(total_out, blocks[k].cols, sums_out(k, np.exp(2 * t[blocks[k].rows])))
            move = np.log(total_out[here] / total_in[here]) / 4 - t[here]
            # units of a layer that feed each other move together: half a step is safe, more is not
            t[here] += move / 2 if set(writers[i]) & set(readers[i]) else move
            largest = max(largest, float(np.abs(move).max()))
        if largest <= 1e-13 * max(1.0, float(np.abs(t).max())):
            break
        energy = np.zeros((len(layers), len(layers)))  # between layers, destinations first
        for source, reading in enumerate(readers):
            for k in reading:
                b = blocks[k]
                from_there = np.where(layer[b.cols] == source, np.exp(-2 * t[b.cols]), 0.0)
                into = sums_in(k, from_there) * np.exp(2 * t[b.rows])
                energy[:, source] += np.bincount(layer[b.rows], into, len(layers))
        t += _best_shifts(energy)[layer]
    else:
        warnings.warn(f"the balanced scale did not converge: {largest:.1e} is left", RuntimeWarning, stacklevel=2)
    return np.exp(t[:-1])


def _best_shifts(energy: Floats) -> Floats:
    """The d of least sum of energy[i, j] exp(2 d[i] - 2 d[j]), the last one 0: Newton's method with halved steps."""
    d = np.zeros(len(energy))
    np.fill_diagonal(energy, 0)

    def at(d: Floats) -> Floats:
        return energy * np.exp(2 * (d[:, None] - d[None, :]))

    for _ in range(50):
        now = at(d)
        into, out = now.sum(axis=1), now.sum(axis=0)
        hessian = 4 * (np.diag(into + out) - now - now.T)
        step = np.append(np.linalg.solve(hessian[:-1, :-1], 2 * (out - into)[:-1]), 0.0)
        while at(d + step).sum() > now.sum() * (1 + 1e-15) and np.abs(step).max() > 1e-12:
            step /= 2
        d = d + step
        if np.abs(step).max() < 1e-12:
            break
    return d
