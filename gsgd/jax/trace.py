"""From a JAX function of parameters and inputs to `gsgd.Network`.

The function is traced to a jaxpr, and calls in it are written out. Each value carries an integer array of its own
shape: the network's node of every element. Whatever moves elements about (reshape, transpose, concatenate, slices) then
moves the nodes about in just the same way, and a layer reads its columns' nodes off its input.

Three rules make it safe. A primitive that is not known to be positively homogeneous pins every unit that it reads.
A parameter is described only if the whole function reads it once, and a layer does, perhaps through a transposition.
Elements that must scale alike (those that one weight meets, that are added, or pooled) become one unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from numpy.typing import NDArray

from gsgd.network import Features, Network, Residual, segment
from gsgd.trace.names import match

Nodes = NDArray[np.int64]

# f(c x) = c f(x) for c > 0, element by element
HOMOGENEOUS = {"abs", "copy", "neg", "optimization_barrier", "reduce_precision", "sharding_constraint"}
COMPARING = {"eq", "ge", "gt", "le", "lt", "ne"}
POOLING = {"reduce_window_max", "reduce_window_min", "reduce_window_sum"}
REDUCING = {"reduce_max", "reduce_min", "reduce_sum"}
# what is computed is computed by a jaxpr among the parameters
CALLING = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "remat2"}


class _NotUnderstood(Exception):
    """The primitive pins what it reads; the message says why, beyond its name."""


@dataclass(frozen=True)
class _Weight:
    """A parameter that no layer has read yet; `axes` are the parameter's along those of the value, -1 for new ones."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class _Step:
    """An equation of the jaxpr with calls written out: values are numbered."""

    equation: JaxprEqn
    reads: tuple[int, ...]
    makes: tuple[int, ...]

    @property
    def made(self) -> list[Any]:
        """Shapes and dtypes of what it makes."""
        return [v.aval for v in self.equation.outvars]

    @property
    def label(self) -> str:
        place = str(self.equation.source_info.name_stack)
        return f"{self.equation.primitive.name} in {place or 'the function'}"


def names(params: Any) -> list[str]:
    """The names of the leaves of a pytree: their key paths, joined by dots.

    Raises
    ------
    ValueError
        Two leaves have the same name, as in ``{"a.b": x, "a": {"b": y}}``.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    found = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    for name, count in Counter(found).items():
        if count > 1:
            raise ValueError(f"two parameters are named {name!r}")
    return found


def trace(
    apply: Callable[..., Any],
    params: Any,
    example: Any,
    residual: Residual = "tie",
    leave_out: str | Iterable[str] = (),
) -> Network:
    """Describe ``apply(params, *example)`` as a `gsgd.Network`, with parameters under their `names`.

    Nothing is computed. Anything that is not understood pins the units that meet it, and ``print(net)`` shows the
    reason: the primitive, and the module if the framework names it. Parameters that are not described are left out, and
    listed with what reads them.

    Parameters
    ----------
    apply : callable
        A function of `params` and inputs, such as ``lambda p, x: model.apply({"params": p}, x)`` (Flax Linen),
        ``lambda p, x: nnx.merge(graph, p, rest, copy=True)(x)`` (Flax NNX, after
        ``graph, params, rest = nnx.split(model, nnx.Param, ...)``), or
        ``lambda p, x: jax.vmap(eqx.combine(p, static))(x)`` (Equinox). All that it returns is pinned. What it closes
        over is taken for constant.
    params : pytree of arrays
    example : array, pytree or tuple of these
        The inputs, a tuple for several. Only shapes and dtypes are used: `jax.ShapeDtypeStruct` will do.
    residual : {"tie", "pin"}
        What additions do to the units they add; see `Network.add`.
    leave_out : str or iterable of str
        `names` of parameters, or prefixes of them (of modules), that take plain steps; the units that meet them are
        pinned.

    Raises
    ------
    ValueError
        `leave_out` names no parameter, or two parameters have the same name.

    Notes
    -----
    Batch normalization in training mode comes out as `Network.batch_norm` describes it as "exact": the statistics
    are not homogeneous, so that what they are taken of is pinned. What is seen is one forward pass: not a penalty on
    weights in the loss, not the derivative that `jax.custom_vjp` puts in the place of another.
    """
    if residual not in ("tie", "pin"):
        raise ValueError(f"residual {residual!r}: expected 'tie' or 'pin'")
    args = example if isinstance(example, tuple) else (example,)
    known = names(params)
    left_out = match(leave_out, known, "leave_out")
    closed = jax.make_jaxpr(apply)(params, *args)
    describe = _Describe(residual)
    describe.follow(closed, known)
    net = describe.net.without([name for name in left_out if name in describe.net.shapes], "left out")
    net.add_plain(left_out, "left out")
    for name in known:
        if name not in net.shapes:
            net.add_plain([name], describe.reasons.get(name, "not read"))
    return net


class _Describe:
    """Builds `net`. A value's nodes have stride 0 wherever they can."""

    def __init__(self, residual: Residual) -> None:
        self.net, self.residual = Network(), residual
        self.constant = int(self.net.input(1, "constant").per_feature[0])
        self.values: list[Nodes | _Weight] = []
        self.zeros: set[int] = set()  # values of which every element is known to be 0
        self.known: dict[int, NDArray[Any]] = {}  # values of constant integers: places in a gather
        self.reasons: dict[str, str] = {}  # of parameters: what reads them first

    def follow(self, closed: ClosedJaxpr, params: list[str]) -> None:
        """Describe a function of these parameters and of inputs."""
        shapes = [x.shape for x in closed.in_avals]
        given = int(self.net.input(1).per_feature[0])
        arguments = [self.know(_Weight(n, s, tuple(range(len(s))))) for n, s in zip(params, shapes, strict=False)]
        arguments += [self.know(np.broadcast_to(given, s)) for s in shapes[len(params) :]]
        steps: list[_Step] = []
        outputs = self.write_out(closed.jaxpr, closed.consts, arguments, steps)
        self.reads = Counter(i for step in steps for i in step.reads) + Counter(outputs)
        for step in steps:
            self.see(step)
        for i in outputs:
            self.ends(i, "the output")
            self.pin(self.nodes(i), "network output")
        self.net.pin_unmet()

    # the jaxpr

    def know(self, value: Nodes | _Weight) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def know_constant(self, value: Any) -> int:
        """A number, or an array that the function closes over: a running mean, say, that is 0 only at first."""
        i = self.know(np.broadcast_to(self.constant, np.shape(value)))
        if not np.shape(value) and jnp.issubdtype(jnp.result_type(value), np.number) and not np.any(value):
            self.zeros.add(i)
        if _counts(jnp.result_type(value)) and not isinstance(value, jax.core.Tracer):
            self.known[i] = np.asarray(value)
        return i

    def write_out(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[int], to: list[_Step]) -> list[int]:
        """Add the equations of `jaxpr` with calls written out; what it returns."""
        known: dict[Var, int] = dict(zip(jaxpr.invars, arguments, strict=True))
        known.update(zip(jaxpr.constvars, map(self.know_constant, consts), strict=True))

        def number(v: Var | Literal) -> int:
            return self.know_constant(v.val) if isinstance(v, Literal) else known[v]

        for equation in jaxpr.eqns:
            reads = [number(v) for v in equation.invars]
            called = _called(equation)
            if called is None:
                # nodes are found when the step is seen
                makes = [self.know(np.broadcast_to(self.constant, ())) for _ in equation.outvars]
                to.append(_Step(equation, tuple(reads), tuple(makes)))
            else:
                makes = self.write_out(called.jaxpr, called.consts, reads, to)
            known.update(zip(equation.outvars, makes, strict=True))
        return [number(v) for v in jaxpr.outvars]

    # values

    def nodes(self, i: int) -> Nodes:
        """The nodes of a value; those of a parameter that is read by no layer are constant."""
        value = self.values[i]
        if isinstance(value, _Weight):
            shape = [1 if axis < 0 else value.shape[axis] for axis in value.axes]
            return np.broadcast_to(self.constant, shape)
        return value

    def weight(self, i: int) -> _Weight | None:
        """The parameter that can be described here: nothing else may read it."""
        value = self.values[i]
        return value if isinstance(value, _Weight) and self.reads[i] == 1 else None

    def ends(self, i: int, reader: str) -> None:
        """If value `i` is a parameter, it is one no more: `reader` describes it, or is the reason that nothing does."""
        value, times = self.values[i], self.reads[i]
        if isinstance(value, _Weight):
            how = f"read {times} times, first by" if times > 1 else "read by"
            self.reasons.setdefault(value.name, f"{how} {reader}")

    def vector(self, i: int) -> Nodes | None:
        """The nodes of a parameter that is described as edges from a pinned source: a bias, say."""
        w = self.weight(i)
        if w is None or not w.shape or len(w.shape) > 6 or math.prod(w.shape) != max(w.shape):
            return None
        rows = self.net.vector(w.name, w.shape).per_feature
        return rows.reshape([1 if axis < 0 else w.shape[axis] for axis in w.axes])

    def pin(self, nodes: Nodes, reason: str) -> None:
        self.net.nodes.pin(_compact(nodes)[0], reason)

    def is_constant(self, nodes: Nodes) -> bool:
        return bool((_compact(nodes)[0] == self.constant).all())

    def tie(self, a: Nodes, b: Nodes) -> None:
        """Make one unit of each pair of elements."""
        self.net.nodes.tie(*_compact(a, b))

    def collapse(self, nodes: Nodes, dims: Iterable[int]) -> Nodes:
        """What stands along `dims`, which keep extent 1, made one unit."""
        for d in dims:
            first = nodes[(slice(None),) * d + (slice(0, 1),)]
            self.tie(np.broadcast_to(first, nodes.shape), nodes)
            nodes = first
        return nodes

    def one(self, nodes: Nodes, dims: Iterable[int], otherwise: str = "among features") -> Nodes:
        """`nodes` with extent 1 along `dims`, which must be positions: one unit stands along them."""
        for d in dims:
            if nodes.strides[d] and nodes.shape[d] > 1:
                raise _NotUnderstood(otherwise)
            nodes = nodes[(slice(None),) * d + (slice(0, 1),)]
        return nodes

    def read(self, nodes: Nodes, dim: int) -> Nodes:
        """The nodes along `dim`, for a layer whose weights meet all that stands along the other dimensions."""
        return self.collapse(nodes, (d for d in range(nodes.ndim) if d != dim)).reshape(-1)

    # primitives

    def see(self, step: _Step) -> None:
        shapes, reason = [value.shape for value in step.made], step.label
        try:
            made = self.describe(step)
        except _NotUnderstood as why:
            reason = f"{step.label}: {why}".removesuffix(": ")
            reads = [self.nodes(i) for i in step.reads]
            for nodes in reads:
                self.pin(nodes, reason)
            free = all(self.is_constant(nodes) for nodes in reads)
            node = self.constant if free else int(self.net.input(1, reason).per_feature[0])
            made = [np.broadcast_to(node, shape) for shape in shapes]
        if not any(isinstance(value, _Weight) for value in made):
            for i in step.reads:
                self.ends(i, reason)
        for i, value, shape in zip(step.makes, made, shapes, strict=True):
            if isinstance(value, _Weight):
                self.values[i] = value
            else:
                assert value.shape == shape, (step.label, value.shape, shape)
                self.values[i] = _expanded(value)
        self.compute(step)

    def compute(self, step: _Step) -> None:
        """What the step makes, if it is integers made of constant ones: places counted from the end, a range."""
        name, options, made = step.equation.primitive.name, step.equation.params, step.made[0]
        if len(step.makes) > 1 or not _counts(made.dtype) or any(i not in self.known for i in step.reads):
            return
        values = [self.known[i] for i in step.reads]
        if name in REARRANGING:
            found = REARRANGING[name](values, options, made.shape)
        elif name in COUNTING:
            found = COUNTING[name](*values)
        elif name == "iota":
            found = _along(np.arange(made.shape[options["dimension"]]), options["dimension"], made.shape)
        else:
            return
        self.known[step.makes[0]] = np.asarray(found).astype(made.dtype)

    def describe(self, step: _Step) -> list[Nodes | _Weight]:
        """What the values that `step` makes are."""
        name, options, reads = step.equation.primitive.name, step.equation.params, step.reads
        shape = step.made[0].shape
        if name == "dot_general":
            return [self.dense(shape, *reads, **options)]
        if name == "conv_general_dilated":
            return [self.convolution(shape, *reads, **options)]
        if name == "convert_element_type" or name in HOMOGENEOUS:
            return self.passed(step)
        if name in REARRANGING:
            return self.rearranged(step)
        if name == "dynamic_slice":
            sizes = options["slice_sizes"]
            nodes = self.nodes(reads[0])
            nodes = self.one(nodes, [d for d, n in enumerate(sizes) if n != nodes.shape[d]])
            return [np.broadcast_to(nodes, shape)]
        if name == "gather":
            return [self.gather(shape, *reads, **options)]
        if name == "pad":
            return [self.pad(shape, *reads, **options)]
        if name in POOLING:
            return [self.pool(shape, *reads, **options)]
        if name in REDUCING:
            nodes = self.collapse(self.nodes(reads[0]), options["axes"])
            return [nodes.reshape(shape)]
        if name in ("add", "sub", "add_any"):
            return [self.add(shape, *reads)]
        if name in ("mul", "div"):
            return [self.multiply(shape, reads[0], reads[1], name == "div")]
        if name in ("max", "min"):
            return [self.choose(shape, reads)]
        if name == "select_n":
            if not self.net.nodes.is_pinned(self.nodes(reads[0])).all():
                raise _NotUnderstood("by a feature")
            return [self.choose(shape, reads[1:])]
        if name == "sign" or (name in COMPARING and any(i in self.zeros for i in reads)):
            return [np.broadcast_to(self.constant, shape)]  # no rescaling changes it
        raise _NotUnderstood

    def dense(self, shape: tuple[int, ...], x: int, y: int, *, dimension_numbers: Any, **_: Any) -> Nodes:
        contracted, batch = dimension_numbers
        if self.weight(x) is not None and self.weight(y) is not None:
            raise _NotUnderstood("of two parameters")
        side = 0 if self.weight(x) is not None else 1
        w, read = self.weight((x, y)[side]), (x, y)[1 - side]
        if w is None or len(w.axes) != 2 or sorted(w.axes) != [0, 1] or len(contracted[0]) != 1 or batch[0]:
            return self.weighted_sum(shape, (x, y), contracted, batch)
        nodes = self.read(self.nodes(read), contracted[1 - side][0])
        column = w.axes[contracted[side][0]]
        part = (nodes, 1, "channels_first") if self.net.nodes.is_pinned(nodes).all() else segment(nodes)
        layout = "io" if column == 0 else "oi"
        features = self.net.dense(w.name, Features(self.net, (part,)), w.shape[1 - column], layout=layout)
        return _along(features.per_feature, 0 if side == 0 else len(shape) - 1, shape)

    def weighted_sum(self, shape: tuple[int, ...], factors: tuple[int, int], contracted: Any, batch: Any) -> Nodes:
        """Sums over positions, weighted by what is pinned: interpolation, the values of attention."""
        pinned = [bool(self.net.nodes.is_pinned(_compact(self.nodes(i))[0]).all()) for i in factors]
        why = "not by a matrix of weights that is read once"
        if pinned[0] == pinned[1]:
            raise _NotUnderstood(why)
        side = pinned.index(False)
        batch, summed = batch[side], contracted[side]
        nodes = self.one(self.nodes(factors[side]), summed, why)
        free = [d for d in range(nodes.ndim) if d not in (*batch, *summed)]
        first, last = ([nodes.shape[d] for d in dims] for dims in (batch, free))
        others = [1] * (len(shape) - len(batch) - len(free))
        nodes = nodes.transpose(*batch, *free, *summed)
        return np.broadcast_to(nodes.reshape(first + (last + others if side == 0 else others + last)), shape)

    def gather(
        self,
        shape: tuple[int, ...],
        x: int,
        indices: int,
        *,
        dimension_numbers: Any,
        slice_sizes: Any,
        fill_value: Any,
        **_: Any,
    ) -> Nodes:
        """Features at constant places; at others some positions, or some examples of the batch."""
        if fill_value and not math.isnan(fill_value):
            raise _NotUnderstood(f"filled with {fill_value}")
        nodes, dims, places = self.nodes(x), dimension_numbers, self.known.get(indices)
        batch, moved = dims.operand_batching_dims, dims.start_index_map
        last = [nodes.shape[d] - slice_sizes[d] for d in moved]
        if places is None or batch or (places < 0).any() or (places > last).any():
            places = None
            nodes = self.one(nodes, [d for d, n in enumerate(slice_sizes) if n != nodes.shape[d] or d in batch])
        nodes = _compact(nodes)[0]
        window = [d for d in range(nodes.ndim) if d not in (*dims.collapsed_slice_dims, *batch)]
        offsets = dict(zip(window, dims.offset_dims, strict=True))
        index = [np.zeros([1] * len(shape), np.int64) for _ in nodes.shape]
        for d, n in enumerate(nodes.shape):
            if n != 1 and places is not None and d in moved:
                view = [1 if i in dims.offset_dims else extent for i, extent in enumerate(shape)]
                index[d] = places[..., moved.index(d)].reshape(view)
            if n != 1 and d in offsets:
                view = [-1 if i == offsets[d] else 1 for i in range(len(shape))]
                index[d] = index[d] + np.arange(slice_sizes[d]).reshape(view)
        return np.broadcast_to(nodes[tuple(index)], shape)

    def convolution(
        self,
        shape: tuple[int, ...],
        x: int,
        kernel: int,
        *,
        dimension_numbers: Any,
        feature_group_count: int,
        batch_group_count: int,
        **_: Any,
    ) -> Nodes:
        of_input, of_kernel, of_output = dimension_numbers
        w = self.weight(kernel)
        if w is None or sorted(w.axes) != list(range(len(w.shape))):
            raise _NotUnderstood("not by weights that are read once")
        if batch_group_count != 1 or not 3 <= len(w.shape) <= 5:
            raise _NotUnderstood("of this form")
        units = {w.axes[of_kernel[0]]: "o", w.axes[of_kernel[1]]: "i"}
        spatial = [axis for axis in range(len(w.shape)) if axis not in units]
        letters = units | dict(zip(spatial, "dhw"[3 - len(spatial) :], strict=True))
        layout = "".join(letters[axis] for axis in range(len(w.shape)))
        if sorted(units) not in ([0, 1], [len(spatial), len(spatial) + 1]):
            raise _NotUnderstood(f"with weights {layout!r}")
        if layout.startswith("io") and feature_group_count != 1:
            raise _NotUnderstood(f"in groups, with weights {layout!r}")
        channels = self.net.features(self.read(self.nodes(x), of_input[1]))
        features = self.net.conv(
            w.name,
            channels,
            shape[of_output[1]],
            tuple(w.shape[axis] for axis in spatial),
            groups=feature_group_count,
            layout=layout,
        )
        return _along(features.per_feature, of_output[1], shape)

    def passed(self, step: _Step) -> list[Nodes | _Weight]:
        for value, i, made in zip(step.made, step.reads, step.makes, strict=True):
            if not jnp.issubdtype(value.dtype, np.inexact) and not self.is_constant(self.nodes(i)):
                raise _NotUnderstood(f"to {value.dtype}")
            if i in self.zeros:
                self.zeros.add(made)
        keep = step.equation.primitive.name in ("convert_element_type", "copy")
        return [(self.weight(i) if keep else None) or self.nodes(i) for i in step.reads]

    def rearranged(self, step: _Step) -> list[Nodes | _Weight]:
        name, options = step.equation.primitive.name, step.equation.params
        if len(step.reads) > 1 and name not in ("concatenate", "stack"):  # shapes that are computed
            raise _NotUnderstood("of this form")
        if all(i in self.zeros for i in step.reads):
            self.zeros.update(step.makes)
        shape = step.made[0].shape
        w = self.weight(step.reads[0])
        if w is not None and name in ("reshape", "transpose", "broadcast_in_dim", "squeeze"):
            # the axes along which only one entry stands come and go; the others must stay what they are
            axes = _moved(name, options, w, shape)
            if axes is not None:
                return [_Weight(w.name, w.shape, axes)]
        made = REARRANGING[name]([self.nodes(i) for i in step.reads], options, shape)
        return list(made) if isinstance(made, list) else [made]

    def pad(self, shape: tuple[int, ...], x: int, value: int, *, padding_config: Any) -> Nodes:
        """Zeros scale as what they stand next to; channels of zeros are new units."""
        if value not in self.zeros:
            raise _NotUnderstood("not by zeros")
        nodes = self.nodes(x)
        for d, (before, after, between) in enumerate(padding_config):
            if (before, after, between) == (0, 0, 0):
                continue
            wanted = (*nodes.shape[:d], shape[d], *nodes.shape[d + 1 :])
            if nodes.strides[d] == 0 or nodes.shape[d] == 1:
                nodes = np.broadcast_to(nodes[(slice(None),) * d + (slice(0, 1),)], wanted)
                continue
            if min(before, after) < 0 or between:
                raise _NotUnderstood("of this form")
            ends = [self.net.nodes.new(n, "zero padding") for n in (before, after)]
            parts = [_along(z, d, (*nodes.shape[:d], len(z), *nodes.shape[d + 1 :])) for z in ends]
            nodes = np.concatenate([parts[0], nodes, parts[1]], axis=d)
        return nodes

    def pool(
        self,
        shape: tuple[int, ...],
        x: int,
        *,
        window_dimensions: Any,
        window_strides: Any,
        padding: Any,
        base_dilation: Any,
        window_dilation: Any,
    ) -> Nodes:
        nodes = self.nodes(x)
        trivial = [
            (size, step, tuple(ends), base) == (1, 1, (0, 0), 1)
            for size, step, ends, base in zip(window_dimensions, window_strides, padding, base_dilation, strict=True)
        ]
        return np.broadcast_to(self.collapse(nodes, (d for d, same in enumerate(trivial) if not same)), shape)

    def add(self, shape: tuple[int, ...], a: int, b: int) -> Nodes:
        for x, y in ((a, b), (b, a)):
            if y in self.zeros:
                return np.broadcast_to(self.nodes(x), shape)
        of_weights = [self.weight(i) is not None for i in (a, b)]
        found = [self.vector(i) if sum(of_weights) == 1 else None for i in (a, b)]
        p, q = (np.broadcast_to(self.nodes(i) if n is None else n, shape) for i, n in zip((a, b), found, strict=True))
        if self.is_constant(p) or self.is_constant(q):
            for nodes in (p, q):
                self.pin(nodes, "added to a constant")
            raise _NotUnderstood("of a constant")
        compact = _compact(p, q)
        pairs, which = np.unique(np.stack([n.ravel() for n in compact]), axis=1, return_inverse=True)
        terms = [self.net.features(nodes) for nodes in pairs]
        out = self.net.add(*terms, residual="tie" if any(of_weights) else self.residual).per_feature
        return np.broadcast_to(out[which].reshape(compact[0].shape), shape)

    def multiply(self, shape: tuple[int, ...], a: int, b: int, divide: bool) -> Nodes:
        """A product scales as one factor if the other one is pinned."""
        p, q = (np.broadcast_to(self.nodes(i), shape) for i in (a, b))
        for i, other in ((a, q), (b, p)):
            if not divide and self.weight(i) is not None and self.net.nodes.is_pinned(_compact(other)[0]).all():
                rows = self.vector(i)
                if rows is not None:
                    return np.broadcast_to(rows, shape)
        x, y = _compact(p, q)
        fixed = [self.net.nodes.is_pinned(n) for n in (x, y)]
        if not (fixed[1] if divide else fixed[0] | fixed[1]).all():
            raise _NotUnderstood("by a feature")
        return np.broadcast_to(np.where(fixed[1], x, y), shape)

    def choose(self, shape: tuple[int, ...], values: Sequence[int]) -> Nodes:
        """Each element is one of several, or 0."""
        nodes = [np.broadcast_to(self.nodes(i), shape) for i in values if i not in self.zeros]
        if not nodes:
            return np.broadcast_to(self.constant, shape)
        if len({self.is_constant(n) for n in nodes}) > 1:
            raise _NotUnderstood("of a constant")
        for other in nodes[1:]:
            self.tie(nodes[0], other)
        return nodes[0]


def _called(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The function that an equation calls, if it is one and no more."""
    if equation.primitive.name not in CALLING:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = equation.params.get(key)
        if isinstance(found, ClosedJaxpr):
            return found
        if isinstance(found, Jaxpr) and not found.constvars:
            return ClosedJaxpr(found, ())
    return None


def _moved(name: str, options: Any, w: _Weight, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Which axes of a parameter stand along those of its rearrangement; None if there is no such answer."""
    if name == "transpose":
        return tuple(w.axes[d] for d in options["permutation"])
    extents = [1 if axis < 0 else w.shape[axis] for axis in w.axes]
    long = [axis for axis, n in zip(w.axes, extents, strict=True) if n > 1]
    if name == "broadcast_in_dim":
        axes = [-1] * len(shape)
        for d, axis, n in zip(options["broadcast_dimensions"], w.axes, extents, strict=True):
            if n != shape[d]:
                return None
            axes[d] = axis
        return tuple(axes) if math.prod(shape) == math.prod(extents) else None
    if [n for n in shape if n > 1] != [w.shape[axis] for axis in long]:
        return None
    found = iter(long)
    return tuple(next(found) if n > 1 else -1 for n in shape)


def _broadcast(arrays: Sequence[Nodes], options: Any, shape: tuple[int, ...]) -> Nodes:
    view = [1] * len(shape)
    for d, n in zip(options["broadcast_dimensions"], arrays[0].shape, strict=True):
        view[d] = n
    return np.broadcast_to(arrays[0].reshape(view), shape)


def _sliced(arrays: Sequence[Nodes], options: Any, _: tuple[int, ...]) -> Nodes:
    strides = options["strides"] or (1,) * arrays[0].ndim
    return arrays[0][tuple(map(slice, options["start_indices"], options["limit_indices"], strides))]


def _split(arrays: Sequence[Nodes], options: Any, _: tuple[int, ...]) -> list[Nodes]:
    return np.split(arrays[0], np.cumsum(options["sizes"])[:-1], axis=options["axis"])


# each element of the result is an element of an argument
REARRANGING: dict[str, Callable[[Sequence[Nodes], Any, tuple[int, ...]], Nodes | list[Nodes]]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda arrays, options, _: np.concatenate(arrays, axis=options["dimension"]),
    "reshape": lambda arrays, _, shape: arrays[0].reshape(shape),
    "rev": lambda arrays, options, _: np.flip(arrays[0], options["dimensions"]),
    "slice": _sliced,
    "split": _split,
    "squeeze": lambda arrays, _, shape: arrays[0].reshape(shape),
    "stack": lambda arrays, options, _: np.stack(arrays, axis=options["axis"]),
    "tile": lambda arrays, options, _: np.tile(arrays[0], options["reps"]),
    "transpose": lambda arrays, options, _: arrays[0].transpose(options["permutation"]),
    "unstack": lambda arrays, options, _: list(np.moveaxis(arrays[0], options["axis"], 0)),
}


# integers that are made of others
COUNTING: dict[str, Callable[..., NDArray[Any]]] = {
    "add": np.add,
    "convert_element_type": np.asarray,
    "copy": np.asarray,
    "lt": np.less,
    "mul": np.multiply,
    "select_n": lambda which, *cases: np.choose(which, cases),
    "sub": np.subtract,
}


def _counts(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (np.integer, np.bool_))


def _along(nodes: Nodes, dim: int, shape: tuple[int, ...]) -> Nodes:
    """`nodes` along one dimension of `shape`, the same along the others."""
    return np.broadcast_to(nodes.reshape([-1 if d == dim else 1 for d in range(len(shape))]), shape)


def _expanded(nodes: Nodes) -> Nodes:
    """The same nodes with stride 0 along every dimension along which they are equal."""
    small = _compact(nodes)[0]
    for d in range(small.ndim):
        first = small[(slice(None),) * d + (slice(0, 1),)]
        if (first == small).all():
            small = first
    return np.broadcast_to(small, nodes.shape) if nodes.size else nodes


def _compact(*arrays: Nodes) -> tuple[Nodes, ...]:
    """Arrays of one shape, with extent 1 along dimensions along which all of them have stride 0."""
    strides = zip(*(a.strides for a in arrays), strict=True)
    index = tuple(slice(None) if any(steps) else slice(0, 1) for steps in strides)
    return tuple(a[index] for a in arrays)
