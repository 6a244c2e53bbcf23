"""A step in three Triton kernels: gather, solve, apply (METHOD.md, section 3).

A kernel sees an array as sheets: lines of entries. The units of the entries' rows (destinations) belong either
to its lines or to the positions on them, and so do those of its columns (sources). Unit `units` stands for every pinned
end, where A = B = rho = 1; no table of units means that all are pinned. Tables that hold several numbers of every unit,
or of every array, hold them one after the other.

There are no atomics, and every sum has one order: the bits are the same every time. `apply` writes nothing if anything
that the kernels before it saw was not finite.

Triton's kernels have no types that mypy knows.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sheet(NamedTuple):
    """A part of an array, as it lies in memory: `lines` lines, `stride` entries apart, of `length` positions.

    Attributes
    ----------
    array, start : int
        The number of its array, and its first entry there.
    step : int
        From position to position, in entries.
    line_rows, line_cols, position_rows, position_cols : int
        Where in the table of ids the units of its lines or positions begin; -1: there are none.
    along, span : int
        Over what gather sums, and over how many lines or positions in a program.
    part : int
        Where gather puts its sums.
    first_gather, first_apply : int
        The first of its tiles.
    wide : int
        Whether it can be read by 16 bytes, which needs step 1.
    """

    array: Any
    start: Any
    lines: Any
    length: Any
    stride: Any
    step: Any = 1
    line_rows: Any = -1
    line_cols: Any = -1
    position_rows: Any = -1
    position_cols: Any = -1
    along: Any = 0
    span: Any = 0
    part: Any = 0
    first_gather: Any = 0
    first_apply: Any = 0
    wide: Any = 0


FIELDS = tl.constexpr(len(Sheet._fields))
NO_SUM, ALONG_LINES, ALONG_POSITIONS = map(tl.constexpr, range(3))

# of arrays: addresses of weights, gradients and moments; which rates they have; of which type, and of how many bytes,
# their entries are
WEIGHT, GRADIENT, M, V, GROUP, KIND, SIZE = map(tl.constexpr, range(7))

# of units, int32: the next unit on either tree; the chain's root; the array of the in-edge where it is a chain's, else
# -1; the array of the out-edge, which is free; the types of both edges
IN_UNIT, OUT_UNIT, ROOT, CHAIN_ARRAY, FREE_ARRAY, IN_KIND, OUT_KIND = map(tl.constexpr, range(7))
# int64: where both edges lie in their arrays, and their addresses
IN_PLACE, OUT_PLACE, IN_ADDRESS, OUT_ADDRESS = map(tl.constexpr, range(4))
# float64, the reference scale: tree weights and c
IN_WEIGHT, OUT_WEIGHT, C = map(tl.constexpr, range(3))
# float64, found by solve: A and B, the chain's ratio R, their inverses, and dl/dx of the chain
A, B, INV_A, INV_B, RATIO, INV_RATIO, D = map(tl.constexpr, range(7))

# the rates begin with max_ratio and clip_norm; then these of every group
RATES = ("lr", "momentum", "weight_decay", "second", "eps", "nesterov", "decoupled")
LR, MOMENTUM, WEIGHT_DECAY, SECOND, EPS, NESTEROV, DECOUPLED = map(tl.constexpr, range(7))
LIMITS, NUMBERS = tl.constexpr(2), tl.constexpr(len(RATES))
SGD, ADAM = tl.constexpr(0), tl.constexpr(1)

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
INT_MAX = tl.constexpr(2**31 - 1)
MANY = tl.constexpr(1024)


class Net(NamedTuple):
    """Tables of units, and how many there are."""

    ids: Any
    links: Any
    places: Any
    found: Any
    units: Any


@triton.jit
def sheet_of(sheets, s):
    p = sheets + s.to(tl.int64) * FIELDS
    return Sheet(
        tl.load(p).to(tl.int32), tl.load(p + 1), tl.load(p + 2).to(tl.int32), tl.load(p + 3).to(tl.int32),
        tl.load(p + 4).to(tl.int32), tl.load(p + 5).to(tl.int32), tl.load(p + 6), tl.load(p + 7), tl.load(p + 8),
        tl.load(p + 9), tl.load(p + 10).to(tl.int32), tl.load(p + 11).to(tl.int32), tl.load(p + 12),
        tl.load(p + 13).to(tl.int32), tl.load(p + 14).to(tl.int32), tl.load(p + 15) != 0,
    )  # fmt: skip


@triton.jit
def at(table, column, u, count):
    """A number of each of u, from a table for `count`."""
    return tl.load(table + column * count + u)


@triton.jit
def units_of(net, first, i, end):
    """The units of lines or positions i < end."""
    return tl.load(net.ids + first + i, i < tl.where(first >= 0, end, 0), net.units)


@triton.jit
def entries_of(r, c, sheet, WIDTH: tl.constexpr):
    """Where the entries of a tile lie; if WIDTH > 1, all extents are multiples of it."""
    if WIDTH == 1:
        return r[:, None] * sheet.stride + c[None, :] * sheet.step
    else:
        return r[:, None] * (sheet.stride // WIDTH * WIDTH) + c[None, :]


@triton.jit
def tree_edges(e, line_unit, position_unit, array_of: tl.constexpr, place_of: tl.constexpr, sheet, net):
    """Which entries e of a tile are the tree edges of their units."""
    of_line = place_in(line_unit, array_of, place_of, sheet, net)
    of_position = place_in(position_unit, array_of, place_of, sheet, net)
    return (e == of_line[:, None]) | (e == of_position[None, :])


@triton.jit
def place_in(u, array_of: tl.constexpr, place_of: tl.constexpr, sheet, net):
    """Where in a sheet the tree edges of units lie; -1: elsewhere."""
    place = at(net.places, place_of, u, net.units + 1) - sheet.start
    here = (at(net.links, array_of, u, net.units + 1) == sheet.array) & (place >= 0) & (place <= INT_MAX)
    return tl.where(here, place, -1).to(tl.int32)


@triton.jit
def spread(x: tl.constexpr, y: tl.constexpr, line_row, line_col, position_row, position_col, net, REAL: tl.constexpr):
    """Per entry of a tile, x of its row's unit times y of its column's."""
    n = net.units + 1
    of_line = at(net.found, x, line_row, n) * at(net.found, y, line_col, n)
    of_position = at(net.found, x, position_row, n) * at(net.found, y, position_col, n)
    return of_line.to(REAL)[:, None] * of_position.to(REAL)[None, :]


@triton.jit
def load_any(address, kind, inside, TYPES: tl.constexpr):
    """What lies at addresses, of type `TYPES[kind]`, in float64; 0 outside."""
    x = tl.zeros(address.shape, tl.float64)
    for k in tl.static_range(len(TYPES)):
        here = inside & (kind == k)
        x += tl.load(address.to(tl.pointer_type(TYPES[k])), here, 0.0).to(tl.float64)
    return x


@triton.jit
def product_along(u, next_unit: tl.constexpr, address: tl.constexpr, kind: tl.constexpr, start: tl.constexpr, scale,
                  net, TYPES: tl.constexpr):  # fmt: skip
    """The product of tree weights, relative to the reference scale, from units to the end of the tree."""
    n = net.units + 1
    product = tl.full(u.shape, 1.0, tl.float64)
    while tl.min(u) < net.units:
        of_kind = at(net.links, kind, u, n)
        has_edge = of_kind >= 0
        w = load_any(at(net.places, address, u, n), of_kind, has_edge, TYPES)
        product *= tl.where(has_edge, w / at(scale, start, u, n), 1.0)
        u = at(net.links, next_unit, u, n)
    return product


@triton.jit
def is_not_finite(x):
    return (x - x) != 0


@triton.jit
def correction(beta, step):
    """1 / (1 - beta ** step), of Adam's moments."""
    return 1 / (1 - tl.exp(tl.maximum(step, 1).to(tl.float64) * tl.log(beta)))


@triton.jit
def direction(d, m, v, has_m, row, step, REAL: tl.constexpr, METHOD: tl.constexpr):
    """The direction in which coordinates move, from their gradients d and moments; the new moments."""
    momentum, second = tl.load(row + MOMENTUM), tl.load(row + SECOND)
    decay_m, decay_v, eps = momentum.to(REAL), second.to(REAL), tl.load(row + EPS).to(REAL)
    if METHOD == SGD:
        moved = decay_m * m + d
        e = tl.where(has_m, tl.where(tl.load(row + NESTEROV) != 0, d + decay_m * moved, moved), d)
        m = tl.where(has_m, moved, m)
    else:
        v = decay_v * v + (1 - second).to(REAL) * (d * d)
        if METHOD == ADAM:
            m = decay_m * m + (1 - momentum).to(REAL) * d
            unbiased_m, unbiased_v = correction(momentum, step).to(REAL) * m, correction(second, step).to(REAL) * v
            e = unbiased_m / (tl.sqrt(unbiased_v) + eps)
        else:
            e = d / (tl.sqrt(v) + eps)
            m = tl.where(has_m, decay_m * m + e, m)
            e = tl.where(has_m, m, e)
    return e, m, v


@triton.jit
def pointer_to(address, TYPE: tl.constexpr, BYTES: tl.constexpr):
    """A pointer to an address that is a multiple of BYTES."""
    return tl.multiple_of((address // BYTES * BYTES).to(tl.pointer_type(TYPE)), BYTES)


@triton.jit
def gather_tiles(
    w, g, sheet, net, r0, c0, end_r, end_c, step_r, step_c, steps,
    TYPE: tl.constexpr, REAL: tl.constexpr, CLIP: tl.constexpr, LINES: tl.constexpr, POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Sums of w g and of (dl/dx)^2 over a run of tiles, entry by entry."""
    w, g = pointer_to(w, TYPE, BYTES), pointer_to(g, TYPE, BYTES)
    end_c = end_c // WIDTH * WIDTH
    end_w = tl.where(sheet.along != NO_SUM, end_r, 0)  # without sums no weight is read
    total = tl.zeros((LINES, POSITIONS), REAL)
    squares = tl.zeros((LINES, POSITIONS), REAL)
    for i in range(0, steps):
        r, c = r0 + i * step_r + tl.arange(0, LINES), c0 + i * step_c + tl.arange(0, POSITIONS)
        e = entries_of(r, c, sheet, WIDTH)
        line_col, position_col = units_of(net, sheet.line_cols, r, end_r), units_of(net, sheet.position_cols, c, end_c)
        free = tree_edges(e, line_col, position_col, FREE_ARRAY, OUT_PLACE, sheet, net)
        d = tl.load(g + e, (r < end_r)[:, None] & (c < end_c)[None, :], 0.0).to(REAL)
        x = tl.load(w + e, (r < end_w)[:, None] & (c < end_c)[None, :], 0.0).to(REAL)
        total += tl.where(free, 0.0, x) * d  # NaN if d is not finite, also of 0
        if CLIP:
            line_row = units_of(net, sheet.line_rows, r, end_r)
            position_row = units_of(net, sheet.position_rows, c, end_c)
            d = d * spread(INV_B, INV_A, line_row, line_col, position_row, position_col, net, REAL)
            chain = tree_edges(e, line_row, position_row, CHAIN_ARRAY, IN_PLACE, sheet, net)
            d = tl.where(free | chain, 0.0, d)
            squares += d * d
    return total.to(tl.float64), squares.to(tl.float64)


@triton.jit(do_not_specialize=["count", "first", "units"])
def gather(
    arrays, count, sheets, tiles, first, ids, links, places, found, units, partial, wrong, squares,
    TYPE: tl.constexpr, REAL: tl.constexpr, CLIP: tl.constexpr, LINES: tl.constexpr, POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of w g of what leaves a line's or a position's unit, free edges left out; a program sums a run of tiles.

    It also looks whether gradients are finite. For clip_norm it sums (dl/dx)^2 of ordinary edges.
    """
    tile = first + tl.program_id(0)
    sheet = sheet_of(sheets, tl.load(tiles + tile))
    net = Net(ids, links, places, found, units)
    by_line = sheet.along == ALONG_POSITIONS
    across = tl.where(by_line, tl.cdiv(sheet.lines, LINES), tl.cdiv(sheet.length, POSITIONS))
    run, block = (tile - sheet.first_gather) // across, (tile - sheet.first_gather) % across
    r0 = tl.where(by_line, block * LINES, run * sheet.span)
    c0 = tl.where(by_line, run * sheet.span, block * POSITIONS) // POSITIONS * POSITIONS
    end_r = tl.where(by_line, sheet.lines, tl.minimum(r0 + sheet.span, sheet.lines))
    end_c = tl.where(by_line, tl.minimum(c0 + sheet.span, sheet.length), sheet.length)
    step_r, step_c = tl.where(by_line, 0, LINES), tl.where(by_line, POSITIONS, 0)
    steps = tl.where(by_line, tl.cdiv(end_c - c0, POSITIONS), tl.cdiv(end_r - r0, LINES))
    w, g = at(arrays, WEIGHT, sheet.array, count), at(arrays, GRADIENT, sheet.array, count)
    steps = tl.where(g != 0, steps, 0)
    offset = sheet.start * (TYPE.primitive_bitwidth // 8)
    w, g = w + offset, g + offset
    if sheet.wide & ((w | g) % 16 == 0):
        total, square = gather_tiles(w, g, sheet, net, r0, c0, end_r, end_c, step_r, step_c, steps,
                                     TYPE, REAL, CLIP, LINES, POSITIONS, WIDTH, 16)  # fmt: skip
    else:
        total, square = gather_tiles(w, g, sheet, net, r0, c0, end_r, end_c, step_r, step_c, steps,
                                     TYPE, REAL, CLIP, LINES, POSITIONS, 1, 1)  # fmt: skip
    tl.store(wrong + tile, is_not_finite(tl.sum(total)).to(tl.int32))
    if CLIP:
        tl.store(squares + tile, tl.sum(square))
    if by_line:
        r = r0 + tl.arange(0, LINES)
        tl.store(partial + sheet.part + run * sheet.lines + r, tl.sum(total, 1), r < sheet.lines)
    elif sheet.along == ALONG_LINES:
        c = c0 + tl.arange(0, POSITIONS)
        tl.store(partial + sheet.part + run * sheet.length + c, tl.sum(total, 0), c < sheet.length)


@triton.jit(do_not_specialize=["count", "units", "tiles"])
def solve(
    arrays, count, ids, links, places, found, units, scale, part_first, part_of, partial, rates, counts, wrong, tiles,
    squares, solved, clip,
    METHOD: tl.constexpr, HAS_M: tl.constexpr, TYPES: tl.constexpr, PRODUCTS: tl.constexpr, SUMS: tl.constexpr,
    RATIOS: tl.constexpr, CLIP: tl.constexpr, SINGLE: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """On the trees, a lane per unit: A and B; dl/dx of chains, by the inverse chain rule; path ratios.

    With clip_norm these are three launches: squares need A and B, and their sum every dl/dx.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    net = Net(ids, links, places, found, units)
    n = units + 1
    u = tl.minimum(pid * UNITS + tl.arange(0, UNITS), units)
    inside = u < units
    chain_array = at(links, CHAIN_ARRAY, u, n)
    array = tl.maximum(chain_array, 0)
    g = at(arrays, GRADIENT, array, count)
    given = (chain_array >= 0) & (g != 0)
    kind = at(arrays, KIND, array, count)
    offset = at(places, IN_PLACE, u, n) * at(arrays, SIZE, array, count)
    many = tl.arange(0, MANY)

    if PRODUCTS:
        a = product_along(u, IN_UNIT, IN_ADDRESS, IN_KIND, IN_WEIGHT, scale, net, TYPES) / at(scale, C, u, n)
        b = product_along(u, OUT_UNIT, OUT_ADDRESS, OUT_KIND, OUT_WEIGHT, scale, net, TYPES) * at(scale, C, u, n)
        tl.store(found + A * n + u, a, inside)
        tl.store(found + B * n + u, b, inside)
        tl.store(found + INV_A * n + u, 1 / a, inside)
        tl.store(found + INV_B * n + u, 1 / b, inside)
    else:
        a, b = at(found, A, u, n), at(found, B, u, n)
    x = a * b

    if SUMS:
        first = tl.load(part_first + u)
        parts = tl.load(part_first + u + 1) - first
        s = tl.zeros((UNITS,), tl.float64)
        for i in range(0, tl.max(parts), PARTS):
            k = i + tl.arange(0, PARTS)
            here = k[None, :] < parts[:, None]
            part = tl.load(part_of + first[:, None] + k[None, :], here, 0)
            s += tl.sum(tl.load(partial + part, here, 0.0), 1)
        w = load_any(at(places, IN_ADDRESS, u, n), kind, given, TYPES)
        d = tl.where(given, (w * load_any(g + offset, kind, given, TYPES) - s) / x, 0.0)
        if CLIP:
            tl.store(squares + tiles + pid, tl.sum(d * d))
    else:
        d = at(found, D, u, n)

    if RATIOS:
        bad = 0
        if CLIP:
            total = tl.zeros((MANY,), tl.float64)
            for i in range(0, tiles + programs, MANY):
                total += tl.load(squares + i + many, i + many < tiles + programs, 0.0)
            norm = tl.sqrt(tl.sum(total))
            factor = tl.minimum(1.0, tl.load(rates + 1) / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            d *= factor
            bad += is_not_finite(norm).to(tl.int32)
            if pid == 0:
                tl.store(clip, factor)
        m = tl.zeros((UNITS,), tl.float64)
        v = tl.zeros((UNITS,), tl.float64)
        moves = given
        if HAS_M:
            m_array = at(arrays, M, array, count)
            moves = given & (m_array != 0)
            m = load_any(m_array + offset, kind, moves, TYPES)
        if METHOD != SGD:
            v = load_any(at(arrays, V, array, count) + offset, kind, given, TYPES)
        row = rates + LIMITS + at(arrays, GROUP, array, count) * NUMBERS
        e, m, v = direction(d, m, v, moves & HAS_M, row, tl.load(counts + array) + 1, tl.float64, METHOD)
        r = tl.where(given, 1 - tl.load(row + LR) * e / x, 1.0)
        most = tl.load(rates)
        magnitude = tl.minimum(tl.maximum(tl.abs(r), 1 / most), most)
        ratio = tl.where(r < 0, -magnitude, magnitude)
        tl.store(found + RATIO * n + u, ratio, inside)
        tl.store(found + INV_RATIO * n + u, 1 / ratio, inside)
        not_finite = is_not_finite(r) | is_not_finite(1 / ratio) | is_not_finite(x) | is_not_finite(1 / x)
        if SINGLE:
            largest = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(1 / a), tl.abs(1 / b)))
            not_finite = not_finite | (tl.maximum(largest, tl.abs(1 / ratio)) > FLOAT_MAX)
        bad += tl.sum(not_finite.to(tl.int32))
        share = tl.cdiv(tiles, programs)  # of what gather found
        for i in range(0, share, MANY):
            tile = pid * share + i + many
            bad += tl.sum(tl.load(wrong + tile, (i + many < share) & (tile < tiles), 0))
        tl.store(solved + pid, bad)
        tl.store(solved + programs + pid, tl.sum((r != ratio).to(tl.int32)))
        if pid == 0:  # the steps that arrays will have taken after this one
            for i in range(0, count, MANY):
                here = i + many < count
                takes = tl.load(arrays + GRADIENT * count + i + many, here, 0) != 0
                taken = tl.load(counts + i + many, here, 0)
                tl.store(counts + count + i + many, taken + takes.to(tl.int64), here)
    tl.store(found + D * n + u, d, inside)


@triton.jit
def apply_tile(
    w, g, m, v, sheet, net, r0, c0, row, step, clip,
    TYPE: tl.constexpr, REAL: tl.constexpr, METHOD: tl.constexpr, HAS_M: tl.constexpr, DECAYS: tl.constexpr,
    CLIP: tl.constexpr, LINES: tl.constexpr, POSITIONS: tl.constexpr, WIDTH: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """The step of a tile: ordinary edges, chains, and free edges, which stay."""
    n = net.units + 1
    given, has_m = g != 0, m != 0
    w, g = pointer_to(w, TYPE, BYTES), pointer_to(g, TYPE, BYTES)
    m, v = pointer_to(m, TYPE, BYTES), pointer_to(v, TYPE, BYTES)
    lines, length = sheet.lines, sheet.length // WIDTH * WIDTH
    r, c = r0 + tl.arange(0, LINES), c0 + tl.arange(0, POSITIONS)
    e = entries_of(r, c, sheet, WIDTH)
    inside = (r < lines)[:, None] & (c < length)[None, :]
    line_row, line_col = units_of(net, sheet.line_rows, r, lines), units_of(net, sheet.line_cols, r, lines)
    position_row = units_of(net, sheet.position_rows, c, length)
    position_col = units_of(net, sheet.position_cols, c, length)
    free = tree_edges(e, line_col, position_col, FREE_ARRAY, OUT_PLACE, sheet, net)
    per_line = at(net.found, INV_RATIO, at(net.links, ROOT, line_col, n), n).to(REAL)
    per_position = at(net.found, INV_RATIO, at(net.links, ROOT, position_col, n), n).to(REAL)
    old = tl.load(w + e, inside, 0.0).to(REAL)
    new = old
    if given:
        chain = tree_edges(e, line_row, position_row, CHAIN_ARRAY, IN_PLACE, sheet, net)
        per_x = spread(INV_B, INV_A, line_row, line_col, position_row, position_col, net, REAL)  # dw / dx
        d = tl.load(g + e, inside, 0.0).to(REAL) * per_x
        if CLIP:
            d = clip.to(REAL) * d
        decoupled = 0.0
        if DECAYS:
            x = old * spread(B, A, line_row, line_col, position_row, position_col, net, REAL)
            decay = tl.load(row + WEIGHT_DECAY).to(REAL) * x
            apart = tl.load(row + DECOUPLED) != 0
            d = tl.where(apart, d, d + decay)
            decoupled = tl.where(apart, decay, 0.0)
        of_chain = at(net.found, D, line_row, n)[:, None] + at(net.found, D, position_row, n)[None, :]
        d = tl.where(chain, of_chain.to(REAL), d)
        old_m = tl.zeros((LINES, POSITIONS), REAL)
        old_v = tl.zeros((LINES, POSITIONS), REAL)
        inside_m = (r < tl.where(has_m, lines, 0))[:, None] & (c < length)[None, :]
        if HAS_M:
            old_m = tl.load(m + e, inside_m, 0.0).to(REAL)
        if METHOD != SGD:
            old_v = tl.load(v + e, inside, 0.0).to(REAL)
        change, new_m, new_v = direction(d, old_m, old_v, has_m & HAS_M, row, step, REAL, METHOD)
        if HAS_M:
            tl.store(m + e, tl.where(free, 0.0, new_m).to(TYPE), inside_m)
        if METHOD != SGD:
            tl.store(v + e, tl.where(free, 0.0, new_v).to(TYPE), inside)
        new = old - tl.load(row + LR).to(REAL) * ((change + decoupled) * per_x)
        ratio_of_line = at(net.found, RATIO, line_row, n).to(REAL)
        ratio_of_position = at(net.found, RATIO, position_row, n).to(REAL)
        new = tl.where(chain, old * (ratio_of_line[:, None] * ratio_of_position[None, :]), new)
    new = new * (per_line[:, None] * per_position[None, :])
    tl.store(w + e, tl.where(free, old, new).to(TYPE), inside)


@triton.jit(do_not_specialize=["count", "first", "last", "units", "programs"])
def apply(
    arrays, count, sheets, tiles, first, last, ids, links, places, found, units, rates, counts, solved, programs, clip,
    stats,
    TYPE: tl.constexpr, REAL: tl.constexpr, METHOD: tl.constexpr, HAS_M: tl.constexpr, DECAYS: tl.constexpr,
    CLIP: tl.constexpr, LINES: tl.constexpr, POSITIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """New weights and moments, in one pass; nothing if anything is not finite.

    `stats` counts the ratios that were limited, the steps that were left out, and those that were taken.
    """
    pid = tl.program_id(0)
    net = Net(ids, links, places, found, units)
    many = tl.arange(0, MANY)
    bad, clamped = 0, 0
    for i in range(0, programs, MANY):
        bad += tl.sum(tl.load(solved + i + many, i + many < programs, 0))
    if (first == 0) & (pid == 0):
        for i in range(0, programs, MANY):
            clamped += tl.sum(tl.load(solved + programs + i + many, i + many < programs, 0))
        tl.store(stats, tl.load(stats) + tl.where(bad == 0, clamped, 0))
        tl.store(stats + 1, tl.load(stats + 1) + tl.where(bad == 0, 0, 1))
        tl.store(stats + 2, tl.load(stats + 2) + tl.where(bad == 0, 1, 0))
        for i in range(0, count, MANY):
            here = i + many < tl.where(bad == 0, count, 0)
            tl.store(counts + i + many, tl.load(counts + count + i + many, here, 0), here)
    factor = tl.load(clip)
    last = tl.where(bad == 0, last, first)
    for tile in range(first + pid, last, tl.num_programs(0)):
        sheet = sheet_of(sheets, tl.load(tiles + tile))
        across = tl.cdiv(sheet.length, POSITIONS)
        r0, c0 = (tile - sheet.first_apply) // across * LINES, (tile - sheet.first_apply) % across * POSITIONS
        offset = sheet.start * (TYPE.primitive_bitwidth // 8)
        w, g = at(arrays, WEIGHT, sheet.array, count) + offset, at(arrays, GRADIENT, sheet.array, count)
        m, v = at(arrays, M, sheet.array, count), at(arrays, V, sheet.array, count)
        g, m, v = tl.where(g != 0, g + offset, 0), tl.where(m != 0, m + offset, 0), tl.where(v != 0, v + offset, 0)
        row = rates + LIMITS + at(arrays, GROUP, sheet.array, count) * NUMBERS
        step = tl.load(counts + count + sheet.array)
        if (g != 0) | (sheet.along != NO_SUM):
            if sheet.wide & ((w | g | m | v) % 16 == 0):
                apply_tile(w, g, m, v, sheet, net, r0, c0, row, step, factor, TYPE, REAL, METHOD, HAS_M, DECAYS, CLIP,
                           LINES, POSITIONS, WIDTH, 16)  # fmt: skip
            else:
                apply_tile(w, g, m, v, sheet, net, r0, c0, row, step, factor, TYPE, REAL, METHOD, HAS_M, DECAYS, CLIP,
                           LINES, POSITIONS, 1, 1)  # fmt: skip
