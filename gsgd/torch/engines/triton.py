"""The engine of CUDA devices: a step in three launches of Triton's kernels per dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from gsgd.coordinates import Coordinates
from gsgd.layout import IN, OUT, Layout, lines, network_layout
from gsgd.network import Network
from gsgd.optimizer import Stats
from gsgd.torch.engines import triton_kernels as kernels
from gsgd.torch.engines.base import Engine, Step, Tensors, Unsupported

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
REACH = kernels.INT_MAX.value


@dataclass(frozen=True)
class Tiling:
    """How work is cut into programs; no result depends on `programs`.

    Attributes
    ----------
    lines, positions : int
        The extents of a tile.
    fewest, most, runs : int
        A program of gather sums over a run of tiles: at least and at most so many. Within these bounds, the lines or
        positions of a sheet make `runs` runs.
    units, parts : int
        Units of a program of solve, and how many sums of each it reads at once.
    programs : int
        The most programs of apply.
    """

    lines: int = 16
    positions: int = 128
    fewest: int = 8
    most: int = 64
    runs: int = 16
    units: int = 64
    parts: int = 16
    programs: int = 2048

    def span(self, extent: int, step: int) -> int:
        """How much of an extent a run covers, tiles being `step` apart."""
        return step * min(self.most, max(self.fewest, _ratio_up(extent, step * self.runs)))


@dataclass(frozen=True)
class Launch:
    """The tiles of gather and of apply, from first to last, in which the arrays of a dtype are."""

    dtype: torch.dtype
    gather: tuple[int, int]
    apply: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Tables:
    """What the kernels read, of a network and the memory of its weights; `kernels` says more.

    Attributes
    ----------
    launches : list of Launch
        One per dtype.
    kinds : list of int
        For every array its dtype's place in `types`, the dtypes of tree edges; -1 where it has none that count.
    parts : int
        How many sums gather finds.
    """

    launches: list[Launch]
    types: list[torch.dtype]
    kinds: list[int]
    parts: int
    sheets: Tensor
    ids: Tensor
    gather_tiles: Tensor
    apply_tiles: Tensor
    links: Tensor
    places: Tensor
    scale: Tensor
    part_first: Tensor
    part_of: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))


def tables(
    t: Layout, coordinates: Coordinates, params: Mapping[str, Tensor], counts: Sequence[bool], tiling: Tiling
) -> Tables:
    """The tables of parameters, on their device.

    Parameters
    ----------
    counts : sequence of bool
        Which of the arrays enter sums.

    Raises
    ------
    Unsupported
        A parameter does not lie in memory line by line.
    """
    units = len(t.root) - 1
    ids: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
    edges = np.full((2, len(t.owner) + 1), -1, dtype=np.int64)  # the array of every tree edge, and its place there
    by_dtype: dict[torch.dtype, list[kernels.Sheet]] = {p.dtype: [] for p in params.values()}
    for i, (name, p) in enumerate(params.items()):
        if p.numel():
            by_dtype[p.dtype] += _sheets(t, i, name, p, ids, edges, 8 * tiling.positions)

    all_ids = np.concatenate(ids)
    launches = []
    sheets: list[kernels.Sheet] = []
    gather_tiles: list[int] = []
    apply_tiles: list[int] = []
    owners = [np.zeros(0, np.int64)]  # of the sums of gather: the chain root of the unit that is left
    parts = 0
    for dtype, pieces in by_dtype.items():
        first = len(gather_tiles), len(apply_tiles)
        for s in pieces:
            by_line = s.line_cols >= 0
            sums = by_line or s.position_cols >= 0
            extent, step, across, width = s.lines, tiling.lines, s.length, tiling.positions
            if by_line:
                extent, step, across, width = across, width, extent, step
            span = tiling.span(extent, step)
            runs = _ratio_up(extent, span)
            along = kernels.NO_SUM if not sums else kernels.ALONG_POSITIONS if by_line else kernels.ALONG_LINES
            cut = s._replace(
                along=along.value,
                span=span,
                part=parts,
                first_gather=len(gather_tiles),
                first_apply=len(apply_tiles),
                wide=s.step == 1 and all(n * dtype.itemsize % 16 == 0 for n in (s.start, s.stride, s.length)),
            )
            gather_tiles += [len(sheets)] * (counts[s.array] * runs * _ratio_up(across, width))
            apply_tiles += [len(sheets)] * (_ratio_up(s.lines, tiling.lines) * _ratio_up(s.length, tiling.positions))
            sheets.append(cut)
            if sums and counts[s.array]:
                table = s.line_cols if by_line else s.position_cols
                owners.append(np.tile(t.root[all_ids[table : table + across]], runs))
                parts += runs * across
        if pieces:
            launches.append(Launch(dtype, (first[0], len(gather_tiles)), (first[1], len(apply_tiles))))

    array, place = edges[0][t.edge], np.maximum(edges[1][t.edge], 0)
    of_array = list(params.values())
    types = list(dict.fromkeys(of_array[i].dtype for i in np.unique(array[array >= 0]))) or [of_array[0].dtype]
    kinds = [
        types.index(p.dtype) if enters and p.dtype in types else -1 for p, enters in zip(of_array, counts, strict=True)
    ]
    sizes, addresses, all_kinds = (  # the last are for units without an edge
        np.array([*x, last], dtype=np.int64)
        for x, last in (
            ([p.element_size() for p in of_array], 0),
            ([p.data_ptr() for p in of_array], 0),
            (kinds, -1),
        )
    )
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    part_first = np.searchsorted(owner[order], np.arange(units + 2))
    part_first[-1] = part_first[-2]  # what leaves pinned ends is not summed
    device = of_array[0].device

    def put(table: Any, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.append(table, 0)).to(dtype).to(device)  # not empty

    return Tables(
        launches=launches,
        types=types,
        kinds=kinds,
        parts=parts,
        sheets=put(sheets, torch.int64),
        ids=put(all_ids, torch.int32),
        gather_tiles=put(gather_tiles, torch.int32),
        apply_tiles=put(apply_tiles, torch.int32),
        links=put(
            [*t.end, t.root, np.where(t.chain, array[IN], -1), array[OUT], *all_kinds[array]],
            torch.int32,
        ),
        places=put([*place, *(addresses[array] + place * sizes[array])], torch.int64),
        scale=put([np.append(x, 1.0) for x in coordinates.scale], torch.float64),
        part_first=put(part_first, torch.int32),
        part_of=put(order[: part_first[-1]], torch.int32),
    )


def _sheets(
    t: Layout, number: int, name: str, p: Tensor, ids: list[NDArray[np.int32]], edges: NDArray[np.int64], fold: int
) -> Iterator[kernels.Sheet]:
    """An array's sheets; adds their units to `ids` and their tree edges to `edges`."""
    if t.arrays[number].rows is None and t.arrays[number].cols is None and _is_dense(p):
        full, rest = divmod(p.numel(), fold)
        if full:
            yield from _pieces(kernels.Sheet(number, 0, full, fold, fold))
        if rest:
            yield kernels.Sheet(number, full * fold, 1, rest, 0)
        return
    parts = lines(t, number, p.stride())
    if parts is None:
        raise Unsupported(f"parameter {name!r}, of strides {p.stride()}, does not lie in memory line by line")
    units = len(t.root) - 1
    for part in parts:
        of_edge, line, position = part.edges.astype(np.int64)
        edges[0, of_edge] = number
        edges[1, of_edge] = part.start + line * part.strides[0] + position * part.strides[1]
        at = {}
        for side, table, axis in (("rows", part.rows, part.row_axis), ("cols", part.cols, part.col_axis)):
            if (table < units).any():
                at[f"{('line', 'position')[axis]}_{side}"] = sum(map(len, ids))
                ids.append(table)
        n, length = part.shape
        stride, step = (by if extent > 1 else 0 for by, extent in zip(part.strides, part.shape, strict=True))
        yield from _pieces(kernels.Sheet(number, part.start, n, length, stride, step)._replace(**at))


def _pieces(sheet: kernels.Sheet) -> Iterator[kernels.Sheet]:
    """The same in sheets whose entries a kernel can count."""
    most = max(1, (REACH - sheet.length * sheet.step) // max(1, sheet.stride))
    for first in range(0, sheet.lines, most):
        yield sheet._replace(
            start=sheet.start + first * sheet.stride,
            lines=min(most, sheet.lines - first),
            line_rows=sheet.line_rows + first if sheet.line_rows >= 0 else -1,
            line_cols=sheet.line_cols + first if sheet.line_cols >= 0 else -1,
        )


def _is_dense(p: Tensor) -> bool:
    """Whether entries lie side by side, in any order."""
    expected = 1
    for stride, extent in sorted(zip(p.stride(), p.shape, strict=True)):
        if extent > 1 and stride != expected:
            return False
        expected *= extent
    return True


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _ratio_up(a: int, b: int) -> int:
    return -(-a // b)


def runs_on(device: torch.device) -> bool:
    """Whether kernels run there. The interpreter, which runs anywhere, is chosen when Triton is imported."""
    interprets = triton.knobs.runtime.interpret and not isinstance(kernels.gather, triton.JITFunction)
    return device.type == "cuda" or interprets


class Upload:
    """A table on the device that is written where its values have changed, without waiting for the device."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.table = torch.zeros(count, dtype=dtype, device=device)
        self.values: list[Any] = []
        self.spare: Tensor | None = self._host()
        self.captured: list[Tensor] = []  # CUDA graphs read these at every replay

    def _host(self) -> Tensor:
        return torch.zeros(self.table.shape, dtype=self.table.dtype, pin_memory=self.table.is_cuda)

    def write(self, values: list[Any]) -> Tensor:
        """The table, with these values."""
        if values == self.values:
            return self.table
        captures = self.table.is_cuda and torch.cuda.is_current_stream_capturing()
        # memory that a graph may read, or that a copy on its way may still read, is not written again
        host = self.spare if captures and self.spare is not None else self._host()
        host.copy_(torch.tensor(values, dtype=host.dtype))
        self.table.copy_(host, non_blocking=True)
        if captures:
            self.captured.append(host)
            self.spare = None
        elif self.spare is None:
            self.spare = self._host()
        self.values = values
        return self.table


@dataclass(frozen=True, eq=False)
class Gathered:
    """What solve reads of units: their tables and sums, in parts; and of tiles whether they are finite, and squares.

    `types` are those of tree edges; programs of solve add their own squares to those of the tiles.
    """

    links: Tensor
    places: Tensor
    part_first: Tensor
    part_of: Tensor
    partial: Tensor
    tiles: int
    wrong: Tensor
    squares: Tensor
    types: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Begun:
    """A step that has begun: tables on the device, gradients that they point to, and what is fixed in the kernels.

    `of_units` is the table of arrays that solve reads; `copies` are moments, and the copies that the kernels write.
    """

    arrays: Tensor
    of_units: Tensor
    rates: Tensor
    gradients: Tensors
    copies: list[tuple[Tensor, Tensor]]
    method: int
    has_m: bool
    decays: bool
    clips: bool


class TritonEngine(Engine):
    """Steps by Triton's kernels on the tensors' own device, without waiting for it.

    A step that is not finite is left out, and `stats.skipped` counts it. What is of 16 bits is computed with in
    float32; the trees are in float64.

    Parameters
    ----------
    layout : Layout, optional
        The layout of parts of the network's arrays, which the tensors are; see `gsgd.layout.part`.
    counts : sequence of bool, optional
        Which of the tensors enter sums; all by default.
    """

    name = "triton"

    def __init__(
        self,
        net: Network,
        coordinates: Coordinates,
        tensors: Mapping[str, Tensor],
        layout: Layout | None = None,
        counts: Sequence[bool] | None = None,
    ) -> None:
        super().__init__(net, tensors)
        self.device = device = self.aliases[0].device
        if not runs_on(device):
            raise Unsupported(
                f"needs a CUDA device (or TRITON_INTERPRET=1 from the start), the parameters are on {device}"
            )
        if torch.version.hip is not None:
            raise Unsupported("needs a CUDA device, not ROCm")
        for name, p in tensors.items():
            if p.dtype not in TYPES:
                raise Unsupported(f"parameter {name!r} is of {p.dtype}")
        if any(b.batch_norm for b in net.blocks):
            raise Unsupported("batch_norm 'paper' and 'released' are left to array operations")
        self.tiling = Tiling()
        layout = layout or network_layout(net, {n: tuple(p.shape) for n, p in tensors.items()}, *coordinates.edges)
        arrays = dict(zip(tensors, self.aliases, strict=True))
        self.tables = t = tables(layout, coordinates, arrays, counts or [True] * len(arrays), self.tiling)
        count, units = len(self.params), net.num_units
        self.programs = max(1, _ratio_up(units, self.tiling.units))

        def zeros(n: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(n, dtype=dtype, device=device)

        self.found = torch.ones(7, units + 1, dtype=torch.float64, device=device)
        self.found[kernels.D.value] = 0
        self.solved = zeros(2 * self.programs, torch.int32)
        self.clip = torch.ones(1, dtype=torch.float64, device=device)
        self.counted = zeros(len(fields(Stats)), torch.int64)
        self.counts = zeros(2 * count, torch.int64)
        self.steps_taken = list(self.counts[:count].unbind())
        self.arrays = Upload(7 * count, torch.int64, device)
        self.rates: Upload | None = None
        self.addresses, self.sizes = [p.data_ptr() for p in self.aliases], [p.element_size() for p in self.aliases]
        self.storages = set(map(_storage, self.aliases))
        self.seen: list[int] = []
        self.shared: list[int] = []  # gradients that lie in the memory of weights
        self.stats: Stats | None = None
        tiles = max((launch.gather[1] for launch in t.launches), default=0)
        self.gathered = self.solved_from = Gathered(
            links=t.links,
            places=t.places,
            part_first=t.part_first,
            part_of=t.part_of,
            partial=zeros(t.parts + 1, torch.float64),
            tiles=tiles,
            wrong=zeros(tiles + 1, torch.int32),
            squares=zeros(tiles + self.programs, torch.float64),
            types=tuple(TYPES[d] for d in t.types),
        )

    def on_device(self) -> AbstractContextManager[Any]:
        """Where kernels are launched."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def step(self, step: Step) -> None:
        with self.on_device():
            begun = self.begin(step)
            if begun.clips:
                self.solve_for(begun, products=True)
            self.gather_sums(begun, begun.clips)
            if begun.clips:
                self.solve_for(begun, sums=True)
            self.solve_for(begun, products=not begun.clips, sums=not begun.clips, ratios=True)
            self.apply(begun)
        self.tell_autograd(step)

    def begin(self, step: Step) -> Begun:
        """Upload what a step needs and what is not on the device yet."""
        self._follow(step.stats)
        found = self._laid_out(self._apart(step.gradients))
        m, v = (self._laid_out(kind) for kind in step.moments)
        # empty tensors have no address, but are there
        pointers = [[0 if x is None else x.data_ptr() or 1 for x in kind] for kind in (found, m, v)]
        arrays = self._write(self.arrays, self.addresses, *pointers, step.which, self.tables.kinds, self.sizes)
        copies = [
            (x, copy)
            for kind, own in zip(step.moments, (m, v), strict=True)
            for x, copy in zip(kind, own, strict=True)
            if x is not None and copy is not None and copy is not x
        ]
        return Begun(
            arrays=arrays,
            of_units=arrays,
            rates=self._write_rates(step),
            gradients=found,
            copies=copies,
            method=step.methods[0].row.method,
            has_m=any(pointers[1]),
            decays=any(isinstance(o.weight_decay, Tensor) or o.weight_decay != 0 for o in step.methods),
            clips=isinstance(step.clip_norm, Tensor) or math.isfinite(step.clip_norm),
        )

    @staticmethod
    def _write(table: Upload, *rows: list[int]) -> Tensor:
        return table.write([n for row in rows for n in row])

    def _follow(self, stats: Stats) -> None:
        """From the first step on, the device counts."""
        if self.stats is not stats:
            self.counted.copy_(torch.tensor([int(n) for n in vars(stats).values()]))
            for name, count in zip(vars(stats), self.counted.unbind(), strict=True):
                setattr(stats, name, count)
            self.stats = stats

    def _apart(self, gradients: Tensors) -> Tensors:
        """Gradients that do not lie where weights are written."""
        addresses = [0 if g is None else g.data_ptr() for g in self.checked(gradients)]
        if addresses != self.seen:
            self.seen = addresses
            self.shared = [i for i, g in enumerate(gradients) if g is not None and _storage(g) in self.storages]
        if not self.shared:
            return gradients
        return [g.clone() if g is not None and i in self.shared else g for i, g in enumerate(gradients)]

    def _laid_out(self, tensors: Tensors) -> Tensors:
        """Tensors that lie in memory as their parameters do: themselves, or copies."""
        return [
            x if x is None or (x.stride() == p.stride() and not x.is_neg()) else torch.empty_like(p).copy_(x)
            for x, p in zip(tensors, self.aliases, strict=True)
        ]

    def _write_rates(self, step: Step) -> Tensor:
        """The table of rates. What is on the device already is copied there."""
        values = [step.max_ratio, step.clip_norm]
        for row in (o.row for o in step.methods):
            values += [getattr(row, name) for name in kernels.RATES]
        if self.rates is None or len(self.rates.table) != len(values):
            self.rates = Upload(len(values), torch.float64, self.device)
        there = {i: x for i, x in enumerate(values) if isinstance(x, Tensor) and x.device == self.device}
        table = self.rates.write([0.0 if i in there else float(x) for i, x in enumerate(values)])
        for i, x in there.items():
            table[i].copy_(x)
        return table

    @property
    def _net(self) -> tuple[Any, ...]:
        """What of the tables the tiles of arrays need."""
        t = self.tables
        return t.ids, t.links, t.places, self.found, self.net.num_units

    def gather_sums(self, begun: Begun, clips: bool) -> None:
        """Sums of w g in parts; with `clips`, of squares of dl/dx, for which A and B have to be known."""
        for launch in self.tables.launches:
            first, last = launch.gather
            if last > first:
                self.launch(
                    kernels.gather, last - first, 8, begun.arrays, len(self.params), self.tables.sheets,
                    self.tables.gather_tiles, first, *self._net, self.gathered.partial, self.gathered.wrong,
                    self.gathered.squares, CLIP=clips, **self._tile(launch.dtype),
                )  # fmt: skip

    def solve_for(self, begun: Begun, *, products: bool = False, sums: bool = False, ratios: bool = False) -> None:
        """A and B; dl/dx of chains; path ratios."""
        s = self.solved_from
        self.launch(
            kernels.solve, self.programs, 4, begun.of_units, len(self.params), self.tables.ids, s.links, s.places,
            self.found, self.net.num_units, self.tables.scale, s.part_first, s.part_of, s.partial, begun.rates,
            self.counts, s.wrong, s.tiles, s.squares, self.solved, self.clip, METHOD=begun.method, HAS_M=begun.has_m,
            TYPES=s.types, PRODUCTS=products, SUMS=sums, RATIOS=ratios, CLIP=begun.clips,
            SINGLE=any(p.dtype != torch.float64 for p in self.aliases), UNITS=self.tiling.units,
            PARTS=self.tiling.parts,
        )  # fmt: skip

    def apply(self, begun: Begun) -> None:
        """New weights and moments, and counts, unless something was not finite."""
        for launch in self.tables.launches:
            first, last = launch.apply
            self.launch(
                kernels.apply, min(last - first, self.tiling.programs), 8, begun.arrays, len(self.params),
                self.tables.sheets, self.tables.apply_tiles, first, last, *self._net, begun.rates, self.counts,
                self.solved, self.programs, self.clip, self.counted, METHOD=begun.method, HAS_M=begun.has_m,
                DECAYS=begun.decays, CLIP=begun.clips, **self._tile(launch.dtype),
            )  # fmt: skip
        for x, copy in begun.copies:
            x.copy_(copy)

    def _tile(self, dtype: torch.dtype) -> dict[str, Any]:
        real = tl.float64 if dtype == torch.float64 else tl.float32
        size = self.tiling
        return {
            "TYPE": TYPES[dtype],
            "REAL": real,
            "LINES": size.lines,
            "POSITIONS": size.positions,
            "WIDTH": min(size.positions, 16 // dtype.itemsize),
        }

    @staticmethod
    def launch(kernel: Any, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
        """One launch. Products and sums are not fused: the same bits on every device."""
        kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
