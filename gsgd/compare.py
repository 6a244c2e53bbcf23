"""Are two sets of weights the same function up to positive scaling?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsgd.arrays import Arrays, check_parameters
from gsgd.network import Block, Network
from gsgd.paths import require_symmetry
from gsgd.skeleton import Skeleton

Floats = NDArray[np.float64]


class NotEquivalent(ValueError):
    """Two sets of weights are not rescalings of each other.

    Attributes
    ----------
    parameter : str
        Where they part first, in the order in which the network computes.
    unit : str or None
        The unit that they lead into there; None at the network's outputs, and in parameters that meet no unit.
    """

    def __init__(self, message: str, parameter: str, unit: str | None) -> None:
        super().__init__(message)
        self.parameter, self.unit = parameter, unit


def equivalence(a: Mapping[str, Any], b: Mapping[str, Any], net: Network, rtol: float = 1e-5) -> Floats:
    """The scale per unit that takes the weights `a` to the weights `b`.

    Two networks have the same path values and the same signs of free weights exactly when one is a positive rescaling
    of the other (the paper's theorems 3.3 and 3.6). No path value is computed, so that depth does no harm: unit by
    unit, in the order in which the network computes, the scale is the least-squares fit to all its in-edges of the
    first layer that writes it; then every weight is compared. Weights that no path of non-zero weights passes are left
    out: they reach no output.

    Parameters
    ----------
    a, b : mapping of str to array
        float32 or float64 weights, only read. What `net` does not mention must be equal.
    net : Network
    rtol : float
        How far weights may part, relative to the largest among the in-edges of the same unit and layer.

    Returns
    -------
    array, shape (H,)
        Positive numbers c with ``rescale(a, net, c)`` equal to `b`; 1 for units that no path passes.

    Raises
    ------
    NotEquivalent
        They are not rescalings of each other; the error names the first unit where they part.
    ValueError, TypeError
        The parameters are not those of `net`, `rtol` is negative, or the network is an approximation of batch
        normalization.
    """
    require_symmetry(net)
    if not rtol >= 0:
        raise ValueError(f"rtol: expected a number >= 0, got {rtol!r}")
    one, other = (check_parameters(x, net, writable=False, others=True) for x in (a, b))
    for name in {*one} ^ {*other}:
        raise ValueError(f"parameter {name!r} is in one of the two only")
    alive = _alive(net, one)
    for unit in np.flatnonzero(alive != _alive(net, other)):
        label, writer = net.units[unit], next(k.name for k in net.blocks if unit in k.rows)
        raise NotEquivalent(f"only one of the two has non-zero paths through unit {label}", writer, label)
    passed = np.append(alive, True)
    c = np.append(np.where(alive, np.nan, 1.0), 1.0)
    blocks = [(k, _entries(k, one), _entries(k, other)) for k in net.blocks]
    unknown = 0
    while unknown != (unknown := int(np.isnan(c).sum())):  # a scale of 0 has none after it: refused below
        for k, w, v in blocks:
            _fit(k, w, v, passed, c)
    for k, w, v in blocks:
        _compare(net, k, w, v, passed, c, rtol)
    for name in one.keys() - net.shapes.keys():
        if not np.allclose(one[name], other[name], rtol=rtol, atol=0):
            raise NotEquivalent(f"parameter {name!r}, which is of no unit, differs", name, None)
    return c[:-1]


def _alive(net: Network, arrays: Arrays) -> NDArray[np.bool_]:
    """Units that some path of non-zero weights passes."""
    return np.asarray(Skeleton(net, arrays).edge_arrays[0][:, 0] >= 0)


def _entries(k: Block, arrays: Arrays) -> Floats:
    """The block's entries in float64, (groups, rows, cols, taps)."""
    w = k.view(arrays[k.name])
    return np.reshape(w, (*w.shape[:3], -1)).astype(np.float64)


def _fit(k: Block, w: Floats, v: Floats, passed: NDArray[np.bool_], c: Floats) -> None:
    """Set the scale of units that have none yet, from these in-edges."""
    known = passed[k.cols] & ~np.isnan(c[k.cols])
    sources = np.where(known, c[k.cols], np.inf).reshape(k.extents[0], 1, -1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(np.isfinite(sources), w / sources, 0)
        fitted = (v * expected).sum(axis=(2, 3)) / np.square(expected).sum(axis=(2, 3))
    fitted = np.where(np.isnan(c[k.rows]), fitted.reshape(-1), c[k.rows])
    c[k.rows] = np.where(np.isfinite(fitted), fitted, np.nan)


def _compare(net: Network, k: Block, w: Floats, v: Floats, passed: NDArray[np.bool_], c: Floats, rtol: float) -> None:
    """Refuse the first row of a block whose weights are not those that the scales say."""
    groups = k.extents[0]
    rows, cols = c[k.rows].reshape(groups, -1, 1, 1), c[k.cols].reshape(groups, 1, -1, 1)
    expected = w * rows / cols
    between = passed[k.rows].reshape(groups, -1, 1, 1) & passed[k.cols].reshape(groups, 1, -1, 1)
    wrong = np.where(between, np.abs(v - expected), 0).max(axis=(2, 3), initial=0)
    largest = np.where(between, np.maximum(np.abs(v), np.abs(expected)), 0).max(axis=(2, 3), initial=0)
    bad = ~(wrong <= rtol * largest) | ((c[k.rows] <= 0) & passed[k.rows]).reshape(groups, -1)
    for row in np.flatnonzero(bad):
        unit = net.units[k.rows[row]] if k.rows[row] >= 0 else None
        where = f"into unit {unit}" if unit else f"of row {row % k.extents[1]}, which leads to no unit,"
        raise NotEquivalent(f"the weights of {k.name!r} {where} are no positive multiple of each other", k.name, unit)
