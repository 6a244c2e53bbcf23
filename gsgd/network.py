"""Describe a feed-forward network: which weight meets which unit.

A *unit* is whatever can be rescaled: a hidden node, a feature map. A *block* is a weight tensor seen as
``(groups, rows, columns, taps)``: rows are destination units, columns are source units. A description holds
names, shapes and unit ids, and no values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gsgd import geometry
from gsgd.blocks import PINNED, Block, Ids, Layer, Part, Sum, plain_block
from gsgd.checks import integer, text
from gsgd.features import Features
from gsgd.sequential import describe_chain
from gsgd.table import table
from gsgd.units import Numbering, Units

__all__ = ["PINNED", "BatchNormMode", "Block", "Features", "Network", "Residual", "Sum", "plain_block"]

BatchNormMode = Literal["exact", "paper", "released"]
Residual = Literal["tie", "pin"]


class Network:
    """A feed-forward network of positively homogeneous units, described layer by layer.

    Every method that adds a layer takes and returns `Features`. Layers are named by their parameters.
    Network inputs and outputs, and whatever is given to `pin`, are *pinned*: never rescaled. A method that raises
    leaves the network as it was. `Features` of another network are a ValueError.

    Attributes
    ----------
    nodes : Units
        The nodes of all values, for tracers, which make, tie and pin them one by one.

    Examples
    --------
    >>> net = Network()
    >>> h = net.relu(net.dense("w1", net.input(784), 64, bias="b1"))
    >>> net.output(net.dense("w2", h, 10))
    >>> net.num_units, net.num_weights, net.num_basis_paths
    (64, 50880, 50816)
    """

    def __init__(self) -> None:
        self.nodes = Units()
        self._operations: list[str | Sum] = []
        self._layers: dict[str, Layer] = {}
        self._writer: dict[int, str] = {}  # node -> the layer that made it
        self._plain: dict[str, str] = {}  # parameters that are known and not described -> reason
        self._compiled: _Compiled | None = None

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

    def _check_names(self, *names: str | None) -> None:
        for name in names:
            if name is None:
                continue
            text(name, "a parameter's name")
            if name in self._layers or names.count(name) > 1:
                raise ValueError(f"parameter {name!r} is described twice; a shared weight must be left out and pinned")

    def _add_layer(self, name: str, kind: str, shape: tuple[int, ...], *parts: Part) -> None:
        self._layers[name] = Layer(name, kind, shape, parts)
        self._operations.append(name)
        self._compiled = None

    # layers: everything is checked before the first node is made, so that an error leaves the network as it was

    def input(self, channels: int, reason: str = "network input") -> Features:
        """`channels` pinned channels: what the network reads, or what an operation that is not described returns.

        `reason` says why they are pinned; `print` shows it.

        Raises
        ------
        ValueError
            `channels` is negative, or `reason` empty.
        TypeError
            `channels` is not an integer, or `reason` is not a string.
        """
        channels = integer(channels, "input: channels", least=0)
        nodes = self.nodes.new(channels, text(reason, "input: reason"))
        self.nodes.pin(nodes, reason)
        return self.features(nodes)

    def features(self, nodes: Ids) -> Features:
        """Channels that are these nodes (int64, shape ``(channels,)``), for tracers."""
        return Features(self, ((nodes, 1, "channels_first"),))

    def dense(self, name: str, x: Features, features: int, *, bias: str | None = None, layout: str = "oi") -> Features:
        """A fully connected layer.

        Parameters
        ----------
        name, bias : str
            Parameters of shapes ``(features, x.count)`` and ``(features,)``.
        layout : {"oi", "io"}
            "io": the weight is ``(x.count, features)``.

        Raises
        ------
        ValueError
            A name is described already; `features` or `x.count` is below 1; or `layout` is unknown.
        TypeError
            `x` is not `Features`, a name is not a string, or `features` is not an integer.
        """
        self._check_names(name, bias)
        self._check(x, name)
        integer(x.count, f"{name}: features that it reads")
        features = integer(features, f"{name}: features")
        if layout not in ("oi", "io"):
            raise ValueError(f"{name}: layout {layout!r}: expected 'oi' or 'io'")
        rows = self.nodes.new(features, name)
        shape = (features, x.count) if layout == "oi" else (x.count, features)
        self._add_layer(name, "dense", shape, *geometry.dense(rows, x.segments, layout))
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
            Both `features` and the channels of `x` must be multiples of it.
        layout : str
            "oihw": ``(features, channels / groups, *kernel)``; "hwio": ``(*kernel, channels / groups, features)``;
            "iohw": ``(channels, features / groups, *kernel)``, a transposed convolution. The spatial letters
            stand for however many extents `kernel` has.

        Raises
        ------
        ValueError
            A name is described already; an extent is below 1; `groups` does not divide both; `x` is flattened; or
            `layout` is unknown.
        TypeError
            `x` is not `Features`, a name is not a string, or an extent is not an integer.
        """
        self._check_names(name, bias)
        cols = self._channels(x, name)
        integer(len(cols), f"{name}: channels that it reads")
        features = integer(features, f"{name}: features")
        kernel = tuple(kernel) if isinstance(kernel, Iterable) else (kernel,)
        kernel = tuple(integer(extent, f"{name}: kernel") for extent in kernel)
        if not 1 <= len(kernel) <= 3:
            raise ValueError(f"{name}: kernel {kernel}: expected 1, 2 or 3 extents")
        groups = integer(groups, f"{name}: groups")
        if features % groups or len(cols) % groups:
            raise ValueError(f"{name}: groups={groups} must divide {len(cols)} channels and {features} features")
        shape, dims = geometry.convolution(features, len(cols), kernel, groups, layout, name)
        rows = self.nodes.new(features, name)
        self._add_layer(name, "conv", shape, Part(dims, (0, 0), rows, cols))
        return self._written(name, rows, bias)

    def _written(self, name: str, rows: Ids, bias: str | None) -> Features:
        self._writer.update((node, name) for node in rows.tolist())
        if bias is not None:
            self._source_layer(bias, "bias", rows)
        return self.features(rows)

    def _source_layer(self, name: str, kind: str, rows: Ids) -> None:
        """A vector of edges from a pinned source: a bias, or a normalization's weight."""
        source = self.nodes.new(1, f"source of {name}")
        self.nodes.pin(source, "constant")
        self._add_layer(name, kind, (len(rows),), geometry.vector(rows, source))

    def edges(self, name: str, kind: str, shape: tuple[int, ...], *parts: Part) -> None:
        """A parameter as edges between nodes, for tracers.

        Parameters
        ----------
        name : str
        kind : str
            What it is called in tables: "dense", "bias", "scale".
        shape : tuple of int
            That of the parameter.
        *parts : Part
            They cover the parameter, one after the other along one axis.

        Raises
        ------
        ValueError
            `name` is described already.
        """
        self._check_names(name)
        self._add_layer(name, kind, shape, *parts)

    def bias(self, name: str, x: Features) -> Features:
        """A vector of shape ``(x.count,)`` that is added to channels: edges from a constant into their units.

        Raises
        ------
        ValueError
            `name` is described already, or `x` is flattened.
        TypeError
            `x` is not `Features`, or `name` is not a string.
        """
        self._check_names(name)
        self._source_layer(name, "bias", self._channels(x, name))
        return x

    def homogeneous(self, x: Features) -> Features:
        """Any map f of single channels with f(c x) = c f(x) for c > 0: it passes units through.

        `relu`, `max_pool` and the like are other names of this method. They take no options, such as a slope or a
        kernel size, since units do not depend on these.

        Raises
        ------
        ValueError
            `x` belongs to another network.
        TypeError
            `x` is not `Features`.
        """
        self._check(x, "homogeneous")
        return x

    relu = leaky_relu = prelu = abs = identity = homogeneous
    max_pool = avg_pool = dropout = upsample = zero_pad = homogeneous

    def flatten(
        self, x: Features, positions: int, order: Literal["channels_first", "channels_last"] = "channels_first"
    ) -> Features:
        """Channels seen at `positions` places, as one vector of ``x.count * positions`` features.

        `order` "channels_first": all places of a channel lie side by side; "channels_last": all channels of a place.

        Raises
        ------
        ValueError
            `x` is flattened already, `positions` is below 1, or `order` is unknown.
        TypeError
            `x` is not `Features`, or `positions` is not an integer.
        """
        if order not in ("channels_first", "channels_last"):
            raise ValueError(f"order {order!r}: expected 'channels_first' or 'channels_last'")
        positions = integer(positions, "flatten: positions")
        nodes = self._channels(x, "flatten")
        return Features(self, ((nodes, positions, order if positions > 1 else "channels_first"),))

    def add(self, *xs: Features, residual: Residual = "tie") -> Features:
        """The sum of features `xs` of equal count.

        ``residual="tie"`` makes one unit of the channels that are added (METHOD.md, section 1): multiplying all that
        writes them by c, and all that reads them by 1/c, is exact. "pin" pins them, as the paper does (section 10.2).

        Raises
        ------
        ValueError
            Counts differ, or `residual` is unknown.
        TypeError
            An argument is not `Features`.
        """
        if residual not in ("tie", "pin"):
            raise ValueError(f"residual {residual!r}: expected 'tie' or 'pin'")
        for x in xs:
            self._check(x, "add")
        if len({x.count for x in xs}) != 1:
            raise ValueError(f"add: expected features of equal count, got {[x.count for x in xs]}")
        like = [[(len(n), p, o) for n, p, o in x.segments] for x in xs]
        if any(shape != like[0] for shape in like):
            xs = tuple(self.features(x.per_feature) for x in xs)
        segments = []
        for parts in zip(*(x.segments for x in xs), strict=True):
            terms = tuple(nodes for nodes, _, _ in parts)
            out = self.nodes.new(len(terms[0]), "sum")
            for nodes in terms:
                self.nodes.tie(out, nodes)
            if residual == "pin":
                self.nodes.pin(out, "residual addition")
            self._operations.append(Sum(out, terms))
            segments.append((out, parts[0][1], parts[0][2]))
        return Features(self, tuple(segments))

    def concat(self, *xs: Features) -> Features:
        """The features `xs` side by side.

        Raises
        ------
        ValueError
            There is no argument.
        TypeError
            An argument is not `Features`.
        """
        if not xs:
            raise ValueError("concat: expected at least one argument")
        for x in xs:
            self._check(x, "concat")
        if all(positions == 1 for x in xs for _, positions, _ in x.segments):
            return self.features(np.concatenate([x.per_feature for x in xs]))
        return Features(self, tuple(s for x in xs for s in x.segments))

    def take(self, x: Features, features: slice | Sequence[int] | Ids) -> Features:
        """Some of the features, in any order: a slice, a chunk, a shuffle of channels.

        Raises
        ------
        ValueError
            `features` is neither a slice nor a list of indices of `x`.
        TypeError
            `x` is not `Features`.
        """
        self._check(x, "take")
        expected = f"take: expected a slice or a list of indices of {x.count} features"
        try:
            nodes = x.per_feature[features if isinstance(features, slice) else list(features)]
        except (IndexError, TypeError) as error:
            raise ValueError(f"{expected}: {error}") from error
        if nodes.ndim != 1:
            raise ValueError(f"{expected}, got {features!r}")
        return self.features(nodes)

    def batch_norm(
        self,
        x: Features,
        weight: str | None = None,
        bias: str | None = None,
        mode: BatchNormMode = "exact",
    ) -> Features:
        """Batch normalization (the paper's section 10.2; METHOD.md, section 5).

        Parameters
        ----------
        weight, bias : str, optional
            Its parameters gamma and beta, of shape ``(channels,)``.
        mode : str
            "exact": the scale of `x` is lost in the normalization, so its units are pinned, and gamma and beta are
            the in-edges of the units that follow: a symmetry in training and in evaluation. "paper" (equation 30):
            units pass through, and the gradients of the layer before are multiplied by the norm of each row; gamma
            and beta take plain steps. "released": as in the authors' code, by the norm over input channels only, with
            raw gradients in the sums. The last two are approximations, not symmetries.

        Raises
        ------
        ValueError
            A name is described already; `x` is flattened; `mode` is unknown; or it is not "exact", and `x` is not the
            output of a dense or convolution layer.
        TypeError
            `x` is not `Features`, or a name is not a string.
        """
        self._check_names(weight, bias)
        nodes = self._channels(x, "batch_norm")
        if mode not in ("exact", "paper", "released"):
            raise ValueError(f"batch_norm mode {mode!r}: expected 'exact', 'paper' or 'released'")
        if mode != "exact":
            if not self.is_written(x):
                raise ValueError(f"batch_norm mode {mode!r}: expected the output of a dense or conv layer")
            for name in {self._writer[node] for node in nodes.tolist()}:
                self._layers[name] = replace(self._layers[name], batch_norm=mode)
            self._compiled = None
            return x
        return self._normalized(nodes, weight, bias, "batch normalization")

    def norm(self, x: Features, weight: str | None = None, bias: str | None = None) -> Features:
        """The affine part of a layer, group, instance or RMS normalization (METHOD.md, section 9).

        `x` is pinned, since the normalization loses its scale or mixes its channels; gamma and beta are the in-edges of
        a unit per channel.

        Parameters
        ----------
        weight, bias : str, optional
            Its parameters gamma and beta, of shape ``(channels,)``.

        Raises
        ------
        ValueError
            A name is described already, or `x` is flattened.
        TypeError
            `x` is not `Features`, or a name is not a string.
        """
        self._check_names(weight, bias)
        return self._normalized(self._channels(x, "norm"), weight, bias, "normalization")

    def _normalized(self, nodes: Ids, weight: str | None, bias: str | None, what: str) -> Features:
        self.nodes.pin(nodes, f"scale lost in {what}")
        names = [name for name in (weight, bias) if name is not None]
        kind = "batch_norm" if what.startswith("batch") else "norm"
        rows = self.nodes.new(len(nodes), names[0] if names else kind)
        for name in names:
            self._source_layer(name, kind, rows)
        if weight is None:
            self.nodes.pin(rows, f"{what} without weight")
        return self.features(rows)

    def scale(self, name: str, x: Features) -> Features:
        """Channels times the entries of a vector of shape ``(channels,)``: each is one edge, from a unit to a unit.

        Raises
        ------
        ValueError
            `name` is described already, `x` is flattened, or it has no channels.
        TypeError
            `x` is not `Features`, or `name` is not a string.
        """
        self._check_names(name)
        cols = self._channels(x, name)
        integer(len(cols), f"{name}: channels that it reads")
        rows = self.nodes.new(len(cols), name)
        self._add_layer(name, "scale", (len(cols),), geometry.diagonal(rows, cols))
        return self.features(rows)

    def pin(self, x: Features, reason: str) -> Features:
        """Never rescale these units: they meet an operation that is not positively homogeneous.

        Raises
        ------
        ValueError
            `reason` is empty.
        TypeError
            `x` is not `Features`, or `reason` is not a string.
        """
        self._check(x, "pin")
        self.nodes.pin(x.per_feature, text(reason, "pin: reason"))
        return x

    def output(self, x: Features) -> None:
        """What the network returns: pinned.

        Raises
        ------
        ValueError
            `x` belongs to another network.
        TypeError
            `x` is not `Features`.
        """
        self.pin(x, "network output")

    @classmethod
    def sequential(
        cls,
        shapes_or_params: Mapping[str, Any] | Sequence[Any],
        *,
        layout: Literal["oi", "io"] = "oi",
    ) -> Network:
        """A chain of dense and convolution layers with ReLUs between them, from its weights or their shapes.

        Parameters
        ----------
        shapes_or_params : mapping or sequence of arrays or shapes
            Weights in the order of the layers, each followed by its bias if it has one (a vector). A list's
            parameters are named "0", "1", ... A dense weight after a convolution reads flattened maps.
        layout : str
            "oi": ``(out, in, *kernel)``; "io": ``(*kernel, in, out)``, flattened channels last.

        Raises
        ------
        ValueError
            There is no weight, a shape is not that of a weight, a layer does not read what the one before writes, or
            `layout` is unknown.
        TypeError
            A value is neither an array nor a shape.
        """
        net = cls()
        describe_chain(net, shapes_or_params, layout)
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
            The network describes no such parameter, or `reason` is empty.
        TypeError
            `reason` is not a string.
        """
        text(reason, "without: reason")
        net, names = copy.deepcopy(self), list(dict.fromkeys(names))
        for name in names:
            if name not in net._layers:
                raise ValueError(f"without: the network has no parameter {name!r}")
            net._operations.remove(name)
            for part in net._layers.pop(name).parts:
                net.nodes.pin([*part.rows, *part.cols], f"meets a parameter that is {reason}")
            net._plain[name] = reason
        net._compiled = None
        return net

    def add_plain(self, names: Iterable[str], reason: str = "") -> None:
        """Note that the parameters `names`, which are not described, take plain steps; a known `reason` stays."""
        for name in names:
            self._plain.setdefault(name, reason)

    @property
    def plain(self) -> dict[str, str]:
        """Parameters that are known but not described, which take plain steps, and the reason, "" where unknown."""
        return dict(self._plain)

    def is_written(self, x: Features) -> bool:
        """Whether each channel of `x` is what a dense or convolution layer returned, with nothing in between."""
        return self._writer.keys() >= set(x.per_feature.tolist())

    def pin_unmet(self) -> None:
        """Pin the units that no layer reads or that none writes, for tracers."""
        compiled = self._compile()
        unmet: tuple[tuple[Literal["rows", "cols"], str], ...] = (("cols", "never read"), ("rows", "never written"))
        for attribute, reason in unmet:
            self.nodes.pin(np.flatnonzero(compiled.unmet(attribute)[compiled.numbering.unit_of_node]), reason)

    # what follows from the description

    def _compile(self) -> _Compiled:
        numbering = self.nodes.numbering
        if self._compiled is None or self._compiled.numbering is not numbering:
            operations: list[Block | Sum] = []
            for op in self._operations:
                operations += [op] if isinstance(op, Sum) else self._layers[op].blocks(numbering.unit_of_node)
            self._compiled = _Compiled(numbering, tuple(operations))
        return self._compiled

    def _complete(self) -> _Compiled:
        """The same, of a network in which every unit is read and written."""
        compiled = self._compile()
        if not compiled.complete:
            verbs: tuple[tuple[Literal["rows", "cols"], str], ...] = (("rows", "written"), ("cols", "read"))
            for attribute, verb in verbs:
                missing = np.flatnonzero(compiled.unmet(attribute))
                if len(missing):
                    raise ValueError(
                        f"unit {compiled.numbering.labels[missing[0]]} is never {verb}: pass it to a layer, or to "
                        f"net.output or net.pin ({len(missing)} such units)"
                    )
            compiled.complete = True
        return compiled

    @property
    def layers(self) -> dict[str, Layer]:
        """Every parameter that the description names, by name, in order."""
        return dict(self._layers)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All edges, in the order of the description.

        Raises
        ------
        ValueError
            A unit is never read or never written.
        """
        return self._complete().blocks

    @property
    def operations(self) -> tuple[Block | Sum, ...]:
        """Blocks and residual sums in the order of the description.

        Raises
        ------
        ValueError
            A unit is never read or never written.
        """
        return self._complete().operations

    @property
    def unit_of_node(self) -> Ids:
        """The unit of every node, or `PINNED`: an int64 array of shape ``(nodes,)``.

        Raises
        ------
        ValueError
            A unit is never read or never written.
        """
        return self._complete().numbering.unit_of_node

    @property
    def units(self) -> tuple[str, ...]:
        """A label per unit, H in all: the layer that writes it first, and the channel.

        Raises
        ------
        ValueError
            A unit is never read or never written.
        """
        return self._complete().numbering.labels

    @property
    def pins(self) -> dict[str, str]:
        """The reason of every pinned channel, by label."""
        return self.nodes.pins

    @property
    def num_units(self) -> int:
        """H: units that can be rescaled.

        Raises
        ------
        ValueError
            A unit is never read or never written.
        """
        return len(self._complete().numbering.labels)

    @property
    def num_weights(self) -> int:
        """m: weights that the description names."""
        return sum(math.prod(s) for s in self.shapes.values())

    @property
    def num_basis_paths(self) -> int:
        """m - H: the rank of the structure matrix (the paper's theorem 3.4).

        Raises
        ------
        ValueError
            A unit is never read or never written.
        """
        return self.num_weights - self.num_units

    @property
    def invariant_ratio(self) -> float:
        """H / m, a number from 0 to 1 (the paper's section 5.2); 0 for a network without weights.

        Raises
        ------
        ValueError
            A unit is never read or never written.
        """
        return self.num_units / max(1, self.num_weights)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter that the description names."""
        return {layer.name: layer.shape for layer in self._layers.values()}

    def __repr__(self) -> str:
        units, weights = len(self.nodes.numbering.labels), self.num_weights
        return f"<gsgd.Network: {len(self._layers)} parameters, {weights} weights (m), {units} units (H)>"

    def __str__(self) -> str:
        return table(self)


class _Compiled:
    """The operations between units."""

    def __init__(self, numbering: Numbering, operations: tuple[Block | Sum, ...]) -> None:
        self.numbering, self.operations = numbering, operations
        self.blocks = tuple(op for op in operations if isinstance(op, Block))
        self.complete = False  # every unit is known to be read and written

    def unmet(self, attribute: Literal["rows", "cols"]) -> NDArray[np.bool_]:
        """Units that are among no block's rows or columns; the last entry stands for what is pinned: False."""
        unmet = np.ones(len(self.numbering.labels) + 1, dtype=bool)
        unmet[PINNED] = False
        for block in self.blocks:
            unmet[getattr(block, attribute)] = False
        return unmet
