"""How the weights of layers lie: which entry of a parameter stands between which row and column."""

from __future__ import annotations

from collections.abc import Sequence

from gsgd.blocks import Dim, Dims, Ids, Part

_ONE = Dim()


def vector(rows: Ids, source: Ids) -> Part:
    """A vector of edges from one source, one per row: a bias."""
    return Part((_ONE, Dim(len(rows), 0, 1), _ONE, _ONE, _ONE, _ONE), (0, 0), rows, source)


def diagonal(rows: Ids, cols: Ids) -> Part:
    """A vector of edges from every column to the row of the same number."""
    return Part((Dim(len(rows), 0, 1), _ONE, _ONE, _ONE, _ONE, _ONE), (0, 0), rows, cols)


def dense(rows: Ids, segments: Sequence[tuple[Ids, int, str]], layout: str) -> list[Part]:
    """A matrix, one part per segment of the features that it reads; positions are taps."""
    row_axis, col_axis = layout.index("o"), layout.index("i")
    parts, first = [], 0
    for nodes, positions, order in segments:
        channels = len(nodes)
        col_step, tap_step = (positions, 1) if order == "channels_first" else (1, channels)
        row, col = Dim(len(rows), row_axis, 1), Dim(channels, col_axis, col_step)
        taps = Dim(positions, col_axis, tap_step) if positions > 1 else _ONE
        parts.append(Part((_ONE, row, col, _ONE, _ONE, taps), (col_axis, first), rows, nodes))
        first += channels * positions
    return parts


def convolution(
    rows: int, cols: int, kernel: Sequence[int], groups: int, layout: str, what: str
) -> tuple[tuple[int, ...], Dims]:
    """The shape of a kernel of 1 to 3 spatial extents in `layout` ("oihw", "hwio", "iohw"), and how its edges lie.

    Raises
    ------
    ValueError
        `layout` is none of these; the message begins with `what`.
    """
    units, first = _unit_axes(layout, what)
    spatial, unit = (2, 0) if first else (0, len(kernel))
    o, i = units.index("o") + unit, units.index("i") + unit
    r, c = rows // groups, cols // groups
    transposed = units == "io" and first
    shape = [*kernel]
    for axis, extent in sorted(((o, r if transposed else rows), (i, cols if transposed else c))):
        shape.insert(axis, extent)
    group = Dim(groups, i, c) if transposed else Dim(groups, o, r)
    taps = [Dim(extent, axis + spatial, 1) for axis, extent in enumerate(kernel)]
    t0, t1, t2 = *(_ONE for _ in range(3 - len(taps))), *taps
    return tuple(shape), (group if groups > 1 else _ONE, Dim(r, o, 1), Dim(c, i, 1), t0, t1, t2)


def _unit_axes(layout: str, what: str) -> tuple[str, bool]:
    """The two axes that name units in `layout`, and whether they stand first."""
    spatial = str(layout).replace("o", "").replace("i", "")
    for units in ("oi", "io"):
        for candidate, first in ((units + spatial, True), (spatial + units, False)):
            if layout == candidate and spatial in ("", "w", "hw", "dhw"):
                return units, first
    raise ValueError(f"{what}: layout {layout!r}: expected one like 'oi', 'io', 'oihw', 'iohw' or 'hwio'")
