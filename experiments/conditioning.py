"""Path-conditioned rescaling (Lebeurrier, Vayer and Gribonval, 2026), by the diagonal of the path kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gsgd
from gsgd.paths import path_kappa


def path_condition(params: Mapping[str, NDArray[Any]], net: gsgd.Network, sweeps: int = 100) -> None:
    """Rescale in place so that the kernel's diagonal is as even as it can be: the function stays the same.

    The path kernel is the product of the Jacobian of all path values with its transpose, and a weight's entry of the
    diagonal is kappa, the sum over all paths through it of the squares of the other weights. Of all rescalings, that
    is taken of which ``m log(sum(kappa)) - sum(log(kappa))`` is least, over the m weights that paths pass: the
    divergence of the diagonal from a multiple of 1. It is convex in the logarithms of the scales, and is minimized unit
    by unit.
    """
    kappa = path_kappa(params, net)
    of_rows, of_cols, found = [], [], []
    for block in net.blocks:
        entries = block.view(kappa[block.name])
        groups, rows, cols = entries.shape[:3]
        unit = block.rows.reshape(groups, rows, 1), block.cols.reshape(groups, 1, cols)
        of_row, of_col = (np.broadcast_to(u[..., None, None, None], entries.shape) for u in unit)
        used = entries > 0
        of_rows.append(of_row[used])
        of_cols.append(of_col[used])
        found.append(entries[used])
    row, col, k = (np.concatenate(parts) for parts in (of_rows, of_cols, found))
    edges = [(np.flatnonzero(row == v), np.flatnonzero(col == v)) for v in range(net.num_units)]
    scales = np.ones(net.num_units)
    for _ in range(sweeps):
        before = scales.copy()
        total = k.sum()
        for v, (into, out) in enumerate(edges):
            if not len(into) or not len(out):
                continue
            a, b, d = k[into].sum(), k[out].sum(), len(into) - len(out)
            # with weights in times c, and x = c^2: m (b x - a / x) + d (a / x + b x + the others) = 0
            p, q = (len(k) + d) * b, d * (total - a - b)
            x = (np.sqrt(q * q + 4 * p * (len(k) - d) * a) - q) / (2 * p)
            k[into] /= x
            k[out] *= x
            total += a / x - a + b * x - b
            scales[v] *= np.sqrt(x)
        if np.abs(np.log(scales / before)).max() < 1e-6:
            break
    gsgd.rescale(params, net, scales)
