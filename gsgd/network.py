"""Describe a feed-forward network: which weight meets which unit.

A *unit* is whatever can be rescaled: a hidden node, a feature map. A *block* is a weight tensor seen as
``(groups, rows, columns, taps)``: rows are destination units, columns are source units. A description holds
names, shapes and unit ids, and no values.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PINNED = -1

BatchNormMode = Literal["exact", "paper", "released"]
Residual = Literal["tie", "pin"]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Dim:
    """One logical dimension of a block: `extent` entries, `step` apart along the parameter's `axis`."""

    extent: int = 1
    axis: int = 0
    step: int = 0


@dataclass(frozen=True, eq=False)
class Block:
    """A (part of a) parameter as edges between units.

    Attributes
    ----------
    name : str
        The parameter.
    dims : tuple of six Dim
        Groups, rows, columns and up to three tap dimensions.
    start : tuple of int
        Axis of the parameter and index on it at which the block begins.
    rows, cols : int64 arrays, shapes (groups * rows,) and (groups * cols,)
        Unit ids of destinations and sources; `PINNED` where no rescaling is possible.
    row_nodes, col_nodes : int64 arrays of the same shapes
        The values in the computation (before ties), for walks along paths.
    batch_norm : str or None
        "paper" or "released" when the layer feeds a batch normalization that is treated so.
    """

    name: str
    dims: tuple[Dim, Dim, Dim, Dim, Dim, Dim]
    start: tuple[int, int]
    rows: Ids
    cols: Ids
    row_nodes: Ids
    col_nodes: Ids
    batch_norm: str | None = None

    @property
    def extents(self) -> tuple[int, ...]:
        return tuple(d.extent for d in self.dims)

    @property
    def size(self) -> int:
        return math.prod(self.extents)

    def view(self, array: Any, xp: Any = np) -> Any:
        """`array` (shaped as the parameter) as ``(groups, rows, cols, t0, t1, t2)``; NumPy makes no copy."""
        axis, first = self.start
        order, shape = self._memory_order
        if array.ndim and shape[axis] != array.shape[axis]:
            array = array[(slice(None),) * axis + (slice(first, first + shape[axis]),)]
        array = xp.reshape(array, tuple(self.dims[i].extent for i in order))
        return xp.permute_dims(array, tuple(order.index(i) for i in range(6)))

    def unview(self, entries: Any, xp: Any = np) -> Any:
        """The inverse of `view`: the part of the parameter that the block covers."""
        order, shape = self._memory_order
        return xp.reshape(xp.permute_dims(entries, order), shape)

    @cached_property
    def _memory_order(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The dims from the parameter's first axis to its last, then unused ones; the extents of the axes."""
        used = sorted((i for i in range(6) if self.dims[i].step), key=lambda i: (self.dims[i].axis, -self.dims[i].step))
        shape = [1] * (1 + max((self.dims[i].axis for i in used), default=-1))
        for i in used:
            shape[self.dims[i].axis] *= self.dims[i].extent
        return (*used, *(i for i in range(6) if i not in used)), tuple(shape)

    def index(self, flat: int) -> tuple[int, ...]:
        """The parameter's index of the block's `flat`-th entry (C order over `extents`)."""
        return self.indices(np.array([flat]))[0]

    def indices(self, flat: Ids) -> list[tuple[int, ...]]:
        """The same of several entries."""
        at = [np.zeros_like(flat) for _ in range(1 + max(self.start[0], *(d.axis for d in self.dims)))]
        at[self.start[0]] += self.start[1]
        for d, i in zip(self.dims, np.unravel_index(flat, self.extents), strict=True):
            at[d.axis] += d.step * i
        return list(zip(*(axis.tolist() for axis in at), strict=True))


def plain_block(name: str, shape: tuple[int, ...]) -> Block:
    """A parameter between pinned ends: its step is the plain one."""
    if len(shape) > 6:
        raise ValueError(f"parameter {name!r}: expected at most 6 dimensions, got shape {shape}")
    dims = [Dim()] * 6
    places = {0: (), 1: (5,), 2: (1, 5), 3: (1, 4, 5), 4: (1, 3, 4, 5), 5: (1, 2, 3, 4, 5), 6: (0, 1, 2, 3, 4, 5)}
    for axis, place in enumerate(places[len(shape)]):
        dims[place] = Dim(shape[axis], axis, 1)
    rows, cols = (np.full(dims[0].extent * dims[i].extent, PINNED, dtype=np.int64) for i in (1, 2))
    d = tuple(dims)
    assert len(d) == 6
    return Block(name, d, (0, 0), rows, cols, rows, cols)


@dataclass(frozen=True, eq=False)
class Sum:
    """A residual addition: `out` nodes are the sums of the `terms`, node by node."""

    out: Ids
    terms: tuple[Ids, ...]


@dataclass(frozen=True, eq=False)
class Features:
    """What flows between layers: segments of channels, each channel seen at one or several positions."""

    network: Network = field(repr=False)
    segments: tuple[tuple[Ids, int, str], ...]  # (nodes, positions, order)

    @property
    def count(self) -> int:
        """Number of features: channels times positions, over all segments."""
        return sum(len(nodes) * positions for nodes, positions, _ in self.segments)

    @property
    def per_feature(self) -> Ids:
        """The node of every feature, in order."""
        return np.concatenate(
            [
                np.repeat(nodes, positions) if order == "channels_first" else np.tile(nodes, positions)
                for nodes, positions, order in self.segments
            ]
        )


def segment(nodes: Ids) -> tuple[Ids, int, str]:
    """Channels, positions and order, if these are flattened maps; otherwise as many channels of one position."""
    n, same = len(nodes), nodes == nodes[0]
    run = n if same.all() else int(np.argmin(same))
    if 1 < run < n and n % run == 0 and (nodes == np.repeat(nodes[::run], run)).all():
        return nodes[::run], run, "channels_first"
    period = 1 + int(np.argmax(same[1:])) if same[1:].any() else n
    if 1 < period < n and n % period == 0 and (nodes == np.tile(nodes[:period], n // period)).all():
        return nodes[:period], n // period, "channels_last"
    return nodes, 1, "channels_first"


@dataclass(frozen=True, eq=False)
class _Layer:
    """One parameter as it was described; `parts` holds the columns' segments with their offsets."""

    name: str
    kind: str
    shape: tuple[int, ...]
    blocks: tuple[tuple[tuple[Dim, ...], tuple[int, int], Ids, Ids], ...]  # dims, start, rows, cols


def _unit_axes(layout: str, what: str) -> tuple[str, str]:
    """The two axes that name units in `layout`, and where they stand: first or last."""
    spatial = str(layout).replace("o", "").replace("i", "")
    for units in ("oi", "io"):
        for candidate, place in ((units + spatial, "first"), (spatial + units, "last")):
            if layout == candidate and spatial in ("", "w", "hw", "dhw"):
                return units, place
    raise ValueError(f"{what}: layout {layout!r}: expected one like 'oi', 'io', 'oihw', 'iohw' or 'hwio'")


def _integer(value: Any, what: str, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what}: expected an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{what}: expected at least {least}, got {number}")
    return number


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what}: expected a string, got {value!r}")
    if not value:
        raise ValueError(f"{what}: expected a string that is not empty")
    return value


def _shape(value: Any, what: str) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, getattr(value, "shape", value)))
    except TypeError:
        raise TypeError(f"{what}: expected an array or a shape, got {type(value).__name__}") from None


def _given(*names: str | None) -> list[str]:
    return [name for name in names if name is not None]


class Network:
    """A feed-forward network of positively homogeneous units, described layer by layer.

    Every method that adds a layer takes and returns `Features`. Layers are named by their parameters.
    Network inputs and outputs, and whatever is given to `pin`, are *pinned*: never rescaled.

    Examples
    --------
    >>> net = Network()
    >>> h = net.relu(net.dense("w1", net.input(784), 64, bias="b1"))
    >>> net.output(net.dense("w2", h, 10))
    >>> net.num_units, net.num_weights, net.num_basis_paths
    (64, 50880, 50816)
    """

    def __init__(self) -> None:
        self._parent: list[int] = []  # union-find over nodes
        self._labels: list[str] = []
        self._groups: set[str] = set()  # the labels without their channels
        self._pins: dict[int, str] = {}  # root -> reason
        self._operations: list[_Layer | Sum] = []
        self._by_name: dict[str, _Layer] = {}
        self._batch_norm: dict[str, str] = {}
        self._writer: dict[int, str] = {}  # node -> the layer that made it
        self._compiled: _Compiled | None = None
        self._plain: dict[str, str] = {}  # parameters that are known and not described -> reason

    # nodes and units

    def _new(self, count: int, label: str) -> Ids:
        first, group, number = len(self._parent), label, 1
        while group in self._groups:
            number += 1
            group = f"{label} {number}"
        self._groups.add(group)
        self._parent.extend(range(first, first + count))
        self._labels.extend(f"{group}[{i}]" for i in range(count))
        self._compiled = None
        return np.arange(first, first + count, dtype=np.int64)

    def _find(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _tie(self, a: int, b: int) -> None:
        a, b = sorted((self._find(a), self._find(b)))
        if a != b:
            self._parent[b] = a
            reason = self._pins.pop(b, None)
            if reason is not None:
                self._pins.setdefault(a, reason)

    def _tie_each(self, a: Ids, b: Ids) -> None:
        """Make one unit of each pair of nodes."""
        differ = a != b
        for i, j in np.unique(np.stack([a[differ], b[differ]]), axis=1).T.tolist():
            self._tie(i, j)

    def _pinned(self, nodes: Ids) -> NDArray[np.bool_]:
        """Which nodes are pinned."""
        return np.isin(nodes, [n for n in np.unique(nodes).tolist() if self._find(n) in self._pins])

    def _pin(self, nodes: Iterable[int], reason: str) -> None:
        for node in nodes:
            self._pins.setdefault(self._find(node), reason)
        self._compiled = None

    def _pin_unmet(self) -> None:
        """Pin units that no layer reads or that none writes, of a network that was traced."""
        compiled = self._compile(check=False)
        for attribute, reason in (("cols", "never read"), ("rows", "never written")):
            met = np.zeros(len(compiled.labels), dtype=bool)
            for block in compiled.blocks:
                ids = getattr(block, attribute)
                met[ids[ids >= 0]] = True
            units = compiled.unit_of_node
            self._pin(np.flatnonzero((units >= 0) & ~np.append(met, True)[units]).tolist(), reason)

    def _features(self, nodes: Ids) -> Features:
        return Features(self, ((nodes, 1, "channels_first"),))

    def _check(self, x: Features, what: str) -> None:
        if not isinstance(x, Features):
            raise TypeError(f"{what}: expected what a layer of this network returns, got {type(x).__name__}")
        if x.network is not self:
            raise ValueError(f"{what}: the features belong to another network")

    def _channels(self, x: Features, what: str) -> Ids:
        self._check(x, what)
        if any(positions != 1 for _, positions, _ in x.segments):
            raise ValueError(f"{what}: expected channels, got flattened features")
        return x.per_feature

    def _check_names(self, *names: str) -> None:
        for name in names:
            _text(name, "a parameter's name")
            if name in self._by_name or names.count(name) > 1:
                raise ValueError(f"parameter {name!r} is described twice; a shared weight must be left out and pinned")

    def _add_layer(self, layer: _Layer) -> None:
        self._by_name[layer.name] = layer
        self._operations.append(layer)
        self._compiled = None

    # layers: everything is checked before the first node is made, so that an error leaves the network as it was

    def input(self, channels: int, reason: str = "network input") -> Features:
        """`channels` pinned channels: what the network reads (or what an operation that is not described makes)."""
        channels = _integer(channels, "input: channels", least=0)
        nodes = self._new(channels, _text(reason, "input: reason"))
        self._pin(nodes.tolist(), reason)
        return self._features(nodes)

    def dense(self, name: str, x: Features, features: int, *, bias: str | None = None, layout: str = "oi") -> Features:
        """A fully connected layer.

        Parameters
        ----------
        name, bias : str
            Parameters of shapes ``(features, x.count)`` and ``(features,)``.
        layout : {"oi", "io"}
            "io": the weight is ``(x.count, features)``.
        """
        self._check_names(name, *_given(bias))
        self._check(x, name)
        _integer(x.count, f"{name}: features that it reads")
        features = _integer(features, f"{name}: features")
        if layout not in ("oi", "io"):
            raise ValueError(f"{name}: layout {layout!r}: expected 'oi' or 'io'")
        row_axis, col_axis = layout.index("o"), layout.index("i")
        rows = self._new(features, name)
        blocks, first = [], 0
        for nodes, positions, order in x.segments:
            channels = len(nodes)
            col_step, tap_step = (positions, 1) if order == "channels_first" else (1, channels)
            dims = (
                Dim(),
                Dim(features, row_axis, 1),
                Dim(channels, col_axis, col_step),
                Dim(),
                Dim(),
                Dim(positions, col_axis, tap_step) if positions > 1 else Dim(),
            )
            blocks.append((dims, (col_axis, first), rows, nodes))
            first += channels * positions
        shape = (features, x.count) if layout == "oi" else (x.count, features)
        self._add_layer(_Layer(name, "dense", shape, tuple(blocks)))
        return self._written(name, rows, bias)

    def conv(
        self,
        name: str,
        x: Features,
        features: int,
        kernel: Sequence[int] | int,
        *,
        groups: int = 1,
        bias: str | None = None,
        layout: str = "oihw",
    ) -> Features:
        """A convolution over 1, 2 or 3 spatial dimensions.

        Parameters
        ----------
        name, bias : str
            The weight, of the shape that `layout` says, and a vector of shape ``(features,)``.
        kernel : sequence of int, or int
            The spatial extents, at least 1 each; a number is the extent of a 1-d convolution.
        groups : int
            Both `features` and the channels of `x` must be multiples.
        layout : str
            "oihw": ``(features, channels / groups, *kernel)``; "hwio": ``(*kernel, channels / groups, features)``;
            "iohw": ``(channels, features / groups, *kernel)``, a transposed convolution. The spatial letters
            stand for however many `kernel` has.
        """
        self._check_names(name, *_given(bias))
        cols = self._channels(x, name)
        _integer(len(cols), f"{name}: channels that it reads")
        features = _integer(features, f"{name}: features")
        kernel = tuple(kernel) if isinstance(kernel, Iterable) else (kernel,)
        kernel = tuple(_integer(extent, f"{name}: kernel") for extent in kernel)
        if not 1 <= len(kernel) <= 3:
            raise ValueError(f"{name}: kernel {kernel}: expected 1, 2 or 3 extents")
        groups = _integer(groups, f"{name}: groups")
        if features % groups or len(cols) % groups:
            raise ValueError(f"{name}: groups={groups} must divide {len(cols)} channels and {features} features")
        units, place = _unit_axes(layout, name)
        o, i = units.index("o"), units.index("i")
        if place == "last":
            o, i = o + len(kernel), i + len(kernel)
        r, c = features // groups, len(cols) // groups
        transposed = units == "io" and place == "first"
        extent = {o: r if transposed else features, i: len(cols) if transposed else c}
        taps = [Dim(k, a + (2 if place == "first" else 0), 1) for a, k in enumerate(kernel)]
        group = Dim(groups, i, c) if transposed else Dim(groups, o, r)
        dims = (
            group if groups > 1 else Dim(),
            Dim(r, o, 1),
            Dim(c, i, 1),
            *(Dim() for _ in range(3 - len(taps))),
            *taps,
        )
        shape = tuple(
            extent[a] if a in extent else kernel[a - (2 if place == "first" else 0)] for a in range(2 + len(kernel))
        )
        rows = self._new(features, name)
        self._add_layer(_Layer(name, "conv", shape, ((dims, (0, 0), rows, cols),)))
        return self._written(name, rows, bias)

    def _written(self, name: str, rows: Ids, bias: str | None) -> Features:
        self._writer.update((node, name) for node in rows.tolist())
        if bias is not None:
            self._source_layer(bias, "bias", rows)
        return self._features(rows)

    def _source_layer(self, name: str, kind: str, rows: Ids, shape: tuple[int, ...] | None = None) -> None:
        """A vector of edges from a pinned source: a bias, or a batch normalization's weight.

        `shape` may add axes of extent 1, on which the vector is broadcast.
        """
        shape = shape or (len(rows),)
        axis = max(range(len(shape)), key=lambda a: shape[a])
        source = self._new(1, f"source of {name}")
        self._pin(source.tolist(), "constant")
        dims = (Dim(), Dim(len(rows), axis, 1), Dim(), Dim(), Dim(), Dim(axis=len(shape) - 1))
        self._add_layer(_Layer(name, kind, shape, ((dims, (axis, 0), rows, source),)))

    def homogeneous(self, x: Features) -> Features:
        """Any map f of single channels with f(c x) = c f(x) for c > 0: it passes units through.

        `relu`, `max_pool` and the others like them are this method by another name: they take no options (no slope,
        no kernel size), since units do not depend on these.
        """
        self._check(x, "homogeneous")
        return x

    relu = leaky_relu = prelu = abs = identity = homogeneous
    max_pool = avg_pool = dropout = upsample = zero_pad = homogeneous

    def flatten(
        self, x: Features, positions: int, order: Literal["channels_first", "channels_last"] = "channels_first"
    ) -> Features:
        """Channels seen at `positions` places, as one vector of features."""
        if order not in ("channels_first", "channels_last"):
            raise ValueError(f"order {order!r}: expected 'channels_first' or 'channels_last'")
        positions = _integer(positions, "flatten: positions")
        nodes = self._channels(x, "flatten")
        return Features(self, ((nodes, positions, order if positions > 1 else "channels_first"),))

    def add(self, *xs: Features, residual: Residual = "tie") -> Features:
        """Add features of equal shape.

        ``residual="tie"`` makes one unit of the channels that are added: scaling all writers by c and all readers
        by 1/c is exact. ``"pin"`` pins them, as the paper does (section 10.2).
        """
        if residual not in ("tie", "pin"):
            raise ValueError(f"residual {residual!r}: expected 'tie' or 'pin'")
        for x in xs:
            self._check(x, "add")
        if len({x.count for x in xs}) != 1:
            raise ValueError(f"add: expected features of equal count, got {[x.count for x in xs]}")
        like = [[(len(n), p, o) for n, p, o in x.segments] for x in xs]
        if any(shape != like[0] for shape in like):
            xs = tuple(self._features(x.per_feature) for x in xs)
        segments = []
        for parts in zip(*(x.segments for x in xs), strict=True):
            terms = tuple(nodes for nodes, _, _ in parts)
            out = self._new(len(terms[0]), "sum")
            for nodes in terms:
                self._tie_each(out, nodes)
            if residual == "pin":
                self._pin(out.tolist(), "residual addition")
            self._operations.append(Sum(out, terms))
            segments.append((out, parts[0][1], parts[0][2]))
        return Features(self, tuple(segments))

    def concat(self, *xs: Features) -> Features:
        """Features side by side."""
        if not xs:
            raise ValueError("concat: expected at least one argument")
        for x in xs:
            self._check(x, "concat")
        if all(positions == 1 for x in xs for _, positions, _ in x.segments):
            return self._features(np.concatenate([x.per_feature for x in xs]))
        return Features(self, tuple(s for x in xs for s in x.segments))

    def take(self, x: Features, features: slice | Sequence[int] | Ids) -> Features:
        """Some of the features, in any order: a slice, a chunk, a shuffle of channels."""
        self._check(x, "take")
        expected = f"take: expected a slice or a list of indices of {x.count} features"
        try:
            nodes = x.per_feature[features if isinstance(features, slice) else list(features)]
        except (IndexError, TypeError) as error:
            raise ValueError(f"{expected}: {error}") from error
        if nodes.ndim != 1:
            raise ValueError(f"{expected}, got {features!r}")
        return self._features(nodes)

    def batch_norm(
        self,
        x: Features,
        weight: str | None = None,
        bias: str | None = None,
        mode: BatchNormMode = "exact",
    ) -> Features:
        """Batch normalization (the paper's section 10.2).

        Parameters
        ----------
        weight, bias : str, optional
            Its parameters gamma and beta, of shape ``(channels,)``.
        mode : str
            "exact": the scale of `x` is lost in the normalization, so its units are pinned, and gamma and beta are
            the in-edges of the unit that follows: a symmetry in training and evaluation. "paper" (equation 30):
            units pass through and the layer before is given gradients times the norm of each row; gamma and beta
            are left to plain SGD. "released": as the authors' released code does, the norm over input channels
            only, and raw gradients in the sums. The last two are approximations, no symmetry.
        """
        names = _given(weight, bias)
        self._check_names(*names)
        nodes = self._channels(x, "batch_norm")
        if mode not in ("exact", "paper", "released"):
            raise ValueError(f"batch_norm mode {mode!r}: expected 'exact', 'paper' or 'released'")
        if mode != "exact":
            if not self._writer.keys() >= set(nodes.tolist()):
                raise ValueError(f"batch_norm mode {mode!r}: expected the output of a dense or conv layer")
            self._batch_norm.update((self._writer[node], mode) for node in nodes.tolist())
            self._compiled = None
            return x
        self._pin(nodes.tolist(), "scale lost in batch normalization")
        rows = self._new(len(nodes), names[0] if names else "batch_norm")
        for name in names:
            self._source_layer(name, "batch_norm", rows)
        if weight is None:
            self._pin(rows.tolist(), "batch normalization without weight")
        return self._features(rows)

    def pin(self, x: Features, reason: str) -> Features:
        """Never rescale these units: they meet an operation that is not positively homogeneous."""
        self._check(x, "pin")
        self._pin(x.per_feature.tolist(), _text(reason, "pin: reason"))
        return x

    def output(self, x: Features) -> None:
        """What the network returns: pinned."""
        self.pin(x, "network output")

    @classmethod
    def sequential(
        cls,
        shapes_or_params: Mapping[str, Any] | Sequence[Any],
        *,
        layout: Literal["oi", "io"] = "oi",
    ) -> Network:
        """The chain that a list or dict of dense and convolution weights describes.

        Parameters
        ----------
        shapes_or_params : mapping or sequence of arrays or shapes
            Weights in the order of the layers, each followed by its bias if it has one (a vector). A list's
            parameters are named "0", "1", ... A dense weight after a convolution reads flattened maps.
        layout : str
            "oi": ``(out, in, *kernel)``; "io": ``(*kernel, in, out)``, flattened channels last.
        """
        if layout not in ("oi", "io"):
            raise ValueError(f"layout {layout!r}: expected 'oi' or 'io'")
        if not isinstance(shapes_or_params, Mapping):
            shapes_or_params = {str(i): s for i, s in enumerate(shapes_or_params)}
        shapes = {name: _shape(value, name) for name, value in shapes_or_params.items()}
        names = list(shapes)
        net, i = cls(), 0
        x: Features | None = None
        while i < len(names):
            name, shape = names[i], shapes[names[i]]
            if not 2 <= len(shape) <= 5 or min(shape) < 1:
                raise ValueError(f"{name}: shape {shape}: expected a weight of 2 to 5 dimensions, at least 1 each")
            out, read = (shape[0], shape[1]) if layout == "oi" else (shape[-1], shape[-2])
            bias = names[i + 1] if i + 1 < len(names) and shapes[names[i + 1]] == (out,) else None
            x = net.input(read) if x is None else net.relu(x)
            have = x.count
            if len(shape) == 2:
                if read % have:
                    raise ValueError(f"{name}: reads {read} features, but the layer before writes {have}")
                if read != have:
                    x = net.flatten(x, read // have, "channels_first" if layout == "oi" else "channels_last")
                x = net.dense(name, x, out, bias=bias, layout=layout)
            else:
                if have % read:
                    raise ValueError(f"{name}: reads {read} channels a group, but the layer before writes {have}")
                kernel = shape[2:] if layout == "oi" else shape[:-2]
                layouts = {"oi": "oihw", "io": "hwio"}
                x = net.conv(name, x, out, kernel, groups=have // read, bias=bias, layout=layouts[layout])
            i += 1 if bias is None else 2
        if x is None:
            raise ValueError("expected at least one weight")
        net.output(x)
        return net

    def without(self, names: Iterable[str], reason: str) -> Network:
        """A copy that does not describe these parameters: they take plain steps, and what they meet is pinned.

        Parameters
        ----------
        names : iterable of str
        reason : str
            What they are, such as "not trained"; `print` shows it.

        Raises
        ------
        ValueError
            The network describes no such parameter, or there is no reason.
        TypeError
            `reason` is no string.
        """
        _text(reason, "without: reason")
        net, names = copy.deepcopy(self), list(dict.fromkeys(names))
        for name in names:
            if name not in net._by_name:
                raise ValueError(f"without: the network has no parameter {name!r}")
            layer = net._by_name.pop(name)
            net._operations.remove(layer)
            net._batch_norm.pop(name, None)
            for _, _, rows, cols in layer.blocks:
                net._pin([*rows.tolist(), *cols.tolist()], f"meets a parameter that is {reason}")
            net._plain[name] = reason
        return net

    def add_plain(self, names: Iterable[str], reason: str = "") -> None:
        """Note parameters beside the network, which take plain steps; a reason that is known already stays."""
        for name in names:
            self._plain.setdefault(name, reason)

    @property
    def plain(self) -> dict[str, str]:
        """Parameters that are known and not described, which take plain steps, and the reason ("" where unknown)."""
        return dict(self._plain)

    # what follows from the description

    def _compile(self, check: bool = True) -> _Compiled:
        if self._compiled is None:
            self._compiled = _Compiled(self)
        if check and not self._compiled.complete:
            self._compiled.raise_if_incomplete()
        return self._compiled

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All edges, in the order of the description."""
        return self._compile().blocks

    @property
    def operations(self) -> tuple[Block | Sum, ...]:
        """Blocks and residual sums in the order of the description."""
        return self._compile().operations

    @property
    def unit_of_node(self) -> Ids:
        """The unit of every node, or `PINNED`."""
        return self._compile().unit_of_node

    @property
    def units(self) -> tuple[str, ...]:
        """A label per unit: the layer that writes it first, and the channel."""
        return self._compile().labels

    @property
    def pins(self) -> dict[str, str]:
        """The reason of every pinned channel, by label."""
        roots = {self._find(n) for n in range(len(self._parent))}
        return {self._labels[r]: self._pins[r] for r in sorted(roots) if r in self._pins}

    @property
    def num_units(self) -> int:
        """H: units that can be rescaled."""
        return len(self._compile().labels)

    @property
    def num_weights(self) -> int:
        """m: weights that the description names."""
        return sum(math.prod(s) for s in self.shapes.values())

    @property
    def num_basis_paths(self) -> int:
        """m - H: the rank of the structure matrix (theorem 3.4)."""
        return self.num_weights - self.num_units

    @property
    def invariant_ratio(self) -> float:
        """H / m (section 3.2); 0 for a network without weights."""
        return self.num_units / max(1, self.num_weights)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter that the description names."""
        return {layer.name: layer.shape for layer in self._by_name.values()}

    def __repr__(self) -> str:
        compiled = self._compile(check=False)
        units, weights = len(compiled.labels), self.num_weights
        return f"<gsgd.Network: {len(self._by_name)} parameters, {weights} weights (m), {units} units (H)>"

    def __str__(self) -> str:
        compiled = self._compile(check=False)

        def describe(nodes: Ids) -> str:
            units = compiled.unit_of_node[nodes]
            parts = [f"{len(np.unique(units[units >= 0]))} units"] if (units >= 0).any() else []
            reasons = Counter(self._pins[self._find(n)] for n in nodes[units < 0].tolist())
            parts += [f"{count} pinned ({reason})" for reason, count in reasons.items()]
            return ", ".join(parts)

        table = [("parameter", "kind", "shape", "weights", "reads", "writes")]
        for layer in self._by_name.values():
            cols = np.concatenate([cols for _, _, _, cols in layer.blocks])
            reads = "constant" if layer.kind in ("bias", "batch_norm") else describe(cols)
            kind = layer.kind + (f" ({self._batch_norm[layer.name]})" if layer.name in self._batch_norm else "")
            shape = " x ".join(map(str, layer.shape))
            size = f"{math.prod(layer.shape):,}"
            table.append((layer.name, kind, shape, size, reads, describe(layer.blocks[0][2])))
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        weights, units = self.num_weights, len(compiled.labels)
        lines.append("")
        lines.append(f"{weights:,} weights (m), {units:,} units (H), {weights - units:,} basis paths (m - H)")
        left_out: dict[str, list[str]] = {}
        for name, reason in self._plain.items():
            left_out.setdefault(reason, []).append(name)
        for reason, names in left_out.items():
            lines.append(f"not described, plain steps: {', '.join(names)}" + (f" ({reason})" if reason else ""))
        return "\n".join(lines)


class _Compiled:
    """Unit ids of a description: nodes that are tied are one unit, numbered in the order of the layers."""

    def __init__(self, net: Network) -> None:
        unit_of_root: dict[int, int] = {}
        labels: list[str] = []
        units = np.full(len(net._parent), PINNED, dtype=np.int64)
        for node in range(len(net._parent)):
            root = net._find(node)
            if root in net._pins:
                continue
            if root not in unit_of_root:
                unit_of_root[root] = len(labels)
                labels.append(net._labels[node])
            units[node] = unit_of_root[root]
        self.unit_of_node = units
        self.labels = tuple(labels)
        operations: list[Block | Sum] = []
        for op in net._operations:
            if isinstance(op, Sum):
                operations.append(op)
                continue
            for dims, start, rows, cols in op.blocks:
                d = tuple(dims)
                assert len(d) == 6
                mode = net._batch_norm.get(op.name)
                operations.append(Block(op.name, d, start, units[rows], units[cols], rows, cols, mode))
        self.operations = tuple(operations)
        self.blocks = tuple(op for op in operations if isinstance(op, Block))
        self.complete = False  # every unit is known to be read and written

    def raise_if_incomplete(self) -> None:
        for attribute, verb in (("rows", "written"), ("cols", "read")):
            met = np.zeros(len(self.labels) + 1, dtype=bool)
            for block in self.blocks:
                met[getattr(block, attribute)] = True
            missing = np.flatnonzero(~met[:-1])
            if len(missing):
                name = self.labels[missing[0]]
                raise ValueError(
                    f"unit {name} is never {verb}: pass it to a layer, or to net.output or net.pin "
                    f"({len(missing)} such units)"
                )
        self.complete = True
