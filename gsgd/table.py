"""A network as a table: parameters, the units that they read and write, what is pinned and why."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from gsgd.blocks import Ids

if TYPE_CHECKING:
    from gsgd.network import Network


def table(net: Network) -> str:
    """A line per parameter, the counts, and the parameters that take plain steps."""
    rows = [("parameter", "kind", "shape", "weights", "reads", "writes")]
    for layer in net.layers.values():
        cols = np.concatenate([part.cols for part in layer.parts])
        reads = "constant" if layer.kind in ("bias", "batch_norm", "norm") else _describe(net, cols)
        kind = layer.kind + (f" ({layer.batch_norm})" if layer.batch_norm else "")
        shape = " x ".join(map(str, layer.shape))
        writes = _describe(net, np.unique(np.concatenate([part.rows for part in layer.parts])))
        rows.append((layer.name, kind, shape, f"{math.prod(layer.shape):,}", reads, writes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    weights, units = net.num_weights, len(net.nodes.numbering.labels)
    lines += ["", f"{weights:,} weights (m), {units:,} units (H), {weights - units:,} basis paths (m - H)"]
    plain: dict[str, list[str]] = {}
    for name, reason in net.plain.items():
        plain.setdefault(reason, []).append(name)
    for reason, names in plain.items():
        lines.append(f"not described, plain steps: {', '.join(names)}" + (f" ({reason})" if reason else ""))
    return "\n".join(lines)


def _describe(net: Network, nodes: Ids) -> str:
    """How many units these nodes are, and how many of the nodes are pinned for which reason."""
    units = net.nodes.numbering.unit_of_node[nodes]
    parts = [f"{len(np.unique(units[units >= 0]))} units"] if (units >= 0).any() else []
    reasons = Counter(net.nodes.why(node) for node in nodes[units < 0].tolist())
    return ", ".join(parts + [f"{count} pinned ({reason})" for reason, count in reasons.items()])
