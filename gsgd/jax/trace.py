"""From a JAX function of parameters and inputs to `gsgd.Network`.

The function is traced to a jaxpr, and calls in it are written out. Each value carries an integer array of its own
shape: the network's node of every element. Whatever moves elements about (reshape, transpose, concatenate, slices) then
moves the nodes about in just the same way, and a layer reads its columns' nodes off its input (`gsgd.trace.nodes`).

Two rules make it safe. A primitive that is not known to be positively homogeneous pins every unit that it reads.
A parameter is described only if the whole function reads it once, and a layer does, perhaps through a transposition.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from numpy.typing import NDArray

from gsgd.network import Network, Residual
from gsgd.trace import rules
from gsgd.trace.names import match
from gsgd.trace.nodes import Algebra, Nodes, NotUnderstood, along, compact, expanded
from gsgd.trace.rules import Operand
from gsgd.trace.weights import Weight, weight_view

# what is computed is computed by a jaxpr among the parameters
CALLING = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "remat2"}


@dataclass(frozen=True)
class _Parameter:
    """A view of a parameter that no layer has read yet: a byte per entry, of which only the strides are looked at."""

    name: str
    whole: NDArray[Any]
    view: NDArray[Any]

    @property
    def weight(self) -> Weight | None:
        """As a layer reads it; None if some of its entries are missing."""
        return weight_view(self.name, self.whole.shape, self.whole.strides, self.view.shape, self.view.strides)


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
        self.on = Algebra(residual)
        self.net = self.on.net
        self.values: list[Nodes | _Parameter] = []
        self.known: dict[int, NDArray[Any]] = {}  # values of constant integers: places in a gather
        self.reasons: dict[str, str] = {}  # of parameters: what reads them first

    def follow(self, closed: ClosedJaxpr, params: list[str]) -> None:
        """Describe a function of these parameters and of inputs."""
        shapes = [x.shape for x in closed.in_avals]
        given = int(self.net.input(1).per_feature[0])
        blank = [np.empty(s, np.int8) for s in shapes[: len(params)]]
        arguments = [self.know(_Parameter(n, a, a)) for n, a in zip(params, blank, strict=True)]
        arguments += [self.know(np.broadcast_to(given, s)) for s in shapes[len(params) :]]
        steps: list[_Step] = []
        outputs = self.write_out(closed.jaxpr, closed.consts, arguments, steps)
        self.reads = Counter(i for step in steps for i in step.reads) + Counter(outputs)
        for step in steps:
            self.see(step)
        for i in outputs:
            self.ends(i, "the output")
            self.on.pin(self.nodes(i), "network output")
        self.net.pin_unmet()

    # the jaxpr

    def know(self, value: Nodes | _Parameter) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def know_constant(self, value: Any) -> int:
        """A number, or an array that the function closes over: a running mean, say, that is 0 only at first."""
        number = not np.shape(value) and jnp.issubdtype(jnp.result_type(value), np.number)
        i = self.know(self.on.zero(()) if number and not np.any(value) else self.on.fill(np.shape(value)))
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
                makes = [self.know(self.on.fill(())) for _ in equation.outvars]
                to.append(_Step(equation, tuple(reads), tuple(makes)))
            else:
                makes = self.write_out(called.jaxpr, called.consts, reads, to)
            known.update(zip(equation.outvars, makes, strict=True))
        return [number(v) for v in jaxpr.outvars]

    # values

    def nodes(self, i: int) -> Nodes:
        """The nodes of a value; those of a parameter that is read by no layer are constant."""
        value = self.values[i]
        return self.on.fill(value.view.shape) if isinstance(value, _Parameter) else value

    def parameter(self, i: int) -> _Parameter | None:
        """The parameter that can be described here: nothing else may read it."""
        value = self.values[i]
        return value if isinstance(value, _Parameter) and self.reads[i] == 1 else None

    def weight(self, i: int) -> Weight | None:
        p = self.parameter(i)
        return None if p is None else p.weight

    def operand(self, i: int) -> Operand:
        return Operand(self.nodes(i), self.weight(i))

    def ends(self, i: int, reader: str) -> None:
        """If value `i` is a parameter, it is one no more: `reader` describes it, or is the reason that nothing does."""
        value, times = self.values[i], self.reads[i]
        if isinstance(value, _Parameter):
            how = f"read {times} times, first by" if times > 1 else "read by"
            self.reasons.setdefault(value.name, f"{how} {reader}")

    # primitives

    def see(self, step: _Step) -> None:
        shapes, reason = [value.shape for value in step.made], step.label
        try:
            if step.equation.primitive.name not in RULES:
                raise NotUnderstood
            made = RULES[step.equation.primitive.name](self, step)
        except NotUnderstood as why:
            reason = f"{step.label}: {why}".removesuffix(": ")
            reads = [self.nodes(i) for i in step.reads]
            for nodes in reads:
                self.on.pin(nodes, reason)
            free = all(map(self.on.is_constant, reads))
            node = None if free else int(self.net.input(1, reason).per_feature[0])
            made = [self.on.fill(shape, node) for shape in shapes]
        if not any(isinstance(value, _Parameter) for value in made):
            for i in step.reads:
                self.ends(i, reason)
        for i, value, shape in zip(step.makes, made, shapes, strict=True):
            if isinstance(value, _Parameter):
                self.values[i] = value
            else:
                assert value.shape == shape, (step.label, value.shape, shape)
                self.values[i] = expanded(value)
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
            found = along(np.arange(made.shape[options["dimension"]]), options["dimension"], made.shape)
        else:
            return
        self.known[step.makes[0]] = np.asarray(found).astype(made.dtype)

    def contract(self, shape: tuple[int, ...], a: int, b: int, *, dimension_numbers: Any, **_: Any) -> Nodes:
        contracted, batch = dimension_numbers
        labels: list[list[tuple[Hashable, int]]] = [
            [(side, d) for d in range(self.nodes(i).ndim)] for side, i in enumerate((a, b))
        ]
        for kind, dims in (("sum", contracted), ("batch", batch)):
            for number, places in enumerate(zip(*dims, strict=True)):
                for side, d in enumerate(places):
                    labels[side][d] = (kind, number)
        made: list[tuple[Hashable, int]] = [("batch", i) for i in range(len(batch[0]))]
        made += [label for own in labels for label in own if isinstance(label[0], int)]
        why = "not by a matrix of weights that is read once"
        return rules.contract(self.on, self.operand(a), labels[0], self.operand(b), labels[1], made, shape, why)

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
            raise NotUnderstood(f"filled with {fill_value}")
        nodes, dims, places = self.nodes(x), dimension_numbers, self.known.get(indices)
        batch, moved = dims.operand_batching_dims, dims.start_index_map
        last = [nodes.shape[d] - slice_sizes[d] for d in moved]
        if places is None or batch or (places < 0).any() or (places > last).any():
            places = None
            nodes = self.on.one(nodes, [d for d, n in enumerate(slice_sizes) if n != nodes.shape[d] or d in batch])
        nodes = compact(nodes)[0]
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
        w, why = self.weight(kernel), "not by weights that are read once"
        if batch_group_count != 1:
            raise NotUnderstood("of this form")
        if w is None and self.on.is_pinned(self.nodes(kernel)):
            features = shape[of_output[1]]
            return rules.by_constants(
                self.on, self.nodes(x), of_input[1], feature_group_count, of_output[1], features, shape, why
            )
        if w is None or w.axes is None:
            raise NotUnderstood(why)
        axes = w.axes
        if not 3 <= len(w.shape) <= 5:
            raise NotUnderstood("of this form")
        units = {axes[of_kernel[0]]: "o", axes[of_kernel[1]]: "i"}
        spatial = [axis for axis in range(len(w.shape)) if axis not in units]
        letters = units | dict(zip(spatial, "dhw"[3 - len(spatial) :], strict=True))
        layout = "".join(letters[axis] for axis in range(len(w.shape)))
        if sorted(units) not in ([0, 1], [len(spatial), len(spatial) + 1]):
            raise NotUnderstood(f"with weights {layout!r}")
        if layout.startswith("io") and feature_group_count != 1:
            raise NotUnderstood(f"in groups, with weights {layout!r}")
        channels = self.on.read(self.nodes(x), of_input[1])
        features = self.net.conv(
            w.name,
            channels,
            shape[of_output[1]],
            tuple(w.shape[axis] for axis in spatial),
            groups=feature_group_count,
            layout=layout,
        )
        return along(features.per_feature, of_output[1], shape)

    def passed(self, step: _Step) -> list[Nodes | _Parameter]:
        for value, i in zip(step.made, step.reads, strict=True):
            if not jnp.issubdtype(value.dtype, np.inexact) and not self.on.is_constant(self.nodes(i)):
                raise NotUnderstood(f"to {value.dtype}")
        keep = step.equation.primitive.name in ("convert_element_type", "copy")
        return [(self.parameter(i) if keep else None) or self.nodes(i) for i in step.reads]

    def rearranged(self, step: _Step) -> list[Nodes | _Parameter]:
        name, options, shape = step.equation.primitive.name, step.equation.params, step.made[0].shape
        if len(step.reads) > 1 and name not in ("concatenate", "stack"):  # shapes that are computed
            raise NotUnderstood("of this form")
        p = self.parameter(step.reads[0])
        if p is not None and len(step.reads) == 1:
            view = REARRANGING[name]([p.view], options, shape)
            if isinstance(view, np.ndarray) and np.may_share_memory(view, p.whole):
                moved = _Parameter(p.name, p.whole, view)
                if moved.weight is not None:
                    return [moved]
        made = REARRANGING[name]([self.nodes(i) for i in step.reads], options, shape)
        return list(made) if isinstance(made, list) else [made]

    def pad(self, shape: tuple[int, ...], x: int, value: int, *, padding_config: Any) -> Nodes:
        if not self.on.is_zero(self.nodes(value)):
            raise NotUnderstood("not by zeros")
        nodes = self.nodes(x)
        for d, (before, after, between) in enumerate(padding_config):
            if between and nodes.strides[d]:
                raise NotUnderstood("of this form")
            if before or after or between:
                nodes = rules.pad(self.on, nodes, d, before, shape[d] - nodes.shape[d] - before)
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
        trivial = [
            (size, step, tuple(ends), base) == (1, 1, (0, 0), 1)
            for size, step, ends, base in zip(window_dimensions, window_strides, padding, base_dilation, strict=True)
        ]
        return rules.pool(self.on, self.nodes(x), (d for d, same in enumerate(trivial) if not same), shape)

    def reduce(self, shape: tuple[int, ...], x: int, *, axes: Any, **_: Any) -> Nodes:
        return self.on.collapse(self.nodes(x), axes).reshape(shape)

    def slice(self, shape: tuple[int, ...], x: int, *_: int, slice_sizes: Any) -> Nodes:
        """Some positions, wherever they are."""
        nodes = self.nodes(x)
        return np.broadcast_to(self.on.one(nodes, [d for d, n in enumerate(slice_sizes) if n != nodes.shape[d]]), shape)

    def add(self, shape: tuple[int, ...], a: int, b: int) -> Nodes:
        return rules.add(self.on, self.operand(a), self.operand(b))

    def multiply(self, shape: tuple[int, ...], a: int, b: int) -> Nodes:
        return rules.multiply(self.on, self.operand(a), self.operand(b))

    def divide(self, shape: tuple[int, ...], a: int, b: int) -> Nodes:
        return rules.divide(self.on, self.nodes(a), self.nodes(b))

    def choose(self, shape: tuple[int, ...], *values: int) -> Nodes:
        return np.broadcast_to(rules.choose(self.on, *map(self.nodes, values)), shape)

    def select(self, shape: tuple[int, ...], which: int, *values: int) -> Nodes:
        if not self.on.is_pinned(self.nodes(which)):
            raise NotUnderstood("by a feature")
        return self.choose(shape, *values)

    def sign(self, shape: tuple[int, ...], x: int) -> Nodes:
        """No rescaling changes it."""
        return self.on.fill(shape)

    def compare(self, shape: tuple[int, ...], a: int, b: int) -> Nodes:
        return np.broadcast_to(rules.compare(self.on, self.nodes(a), self.nodes(b)), shape)


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
REARRANGING: dict[str, Callable[[Sequence[NDArray[Any]], Any, tuple[int, ...]], NDArray[Any] | list[NDArray[Any]]]] = {
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


Rule = Callable[[_Describe, _Step], list[Nodes | _Parameter]]


def _made(rule: Callable[..., Nodes]) -> Rule:
    """A rule that is told the result's shape, what is read, and the primitive's parameters."""

    @functools.wraps(rule)
    def apply(describe: _Describe, step: _Step) -> list[Nodes | _Parameter]:
        return [rule(describe, step.made[0].shape, *step.reads, **step.equation.params)]

    return apply


def _plain(rule: Callable[..., Nodes]) -> Rule:
    """A rule for which the primitive's parameters do not matter."""

    @functools.wraps(rule)
    def apply(describe: _Describe, step: _Step) -> list[Nodes | _Parameter]:
        return [rule(describe, step.made[0].shape, *step.reads)]

    return apply


# what is not here pins what it reads
RULES: dict[str, Rule] = {
    # f(c x) = c f(x) for c > 0, element by element
    "abs": _Describe.passed,
    "convert_element_type": _Describe.passed,
    "copy": _Describe.passed,
    "neg": _Describe.passed,
    "optimization_barrier": _Describe.passed,
    "reduce_precision": _Describe.passed,
    "sharding_constraint": _Describe.passed,
    # sums, products, choices
    "add": _plain(_Describe.add),
    "add_any": _plain(_Describe.add),
    "div": _plain(_Describe.divide),
    "max": _plain(_Describe.choose),
    "min": _plain(_Describe.choose),
    "mul": _plain(_Describe.multiply),
    "select_n": _plain(_Describe.select),
    "sub": _plain(_Describe.add),
    # what no rescaling changes
    "eq": _plain(_Describe.compare),
    "ge": _plain(_Describe.compare),
    "gt": _plain(_Describe.compare),
    "le": _plain(_Describe.compare),
    "lt": _plain(_Describe.compare),
    "ne": _plain(_Describe.compare),
    "sign": _plain(_Describe.sign),
    # layers, and what takes elements together
    "conv_general_dilated": _made(_Describe.convolution),
    "dot_general": _made(_Describe.contract),
    "dynamic_slice": _made(_Describe.slice),
    "gather": _made(_Describe.gather),
    "pad": _made(_Describe.pad),
    "reduce_max": _made(_Describe.reduce),
    "reduce_min": _made(_Describe.reduce),
    "reduce_sum": _made(_Describe.reduce),
    "reduce_window_max": _made(_Describe.pool),
    "reduce_window_min": _made(_Describe.pool),
    "reduce_window_sum": _made(_Describe.pool),
    **dict.fromkeys(REARRANGING, _Describe.rearranged),
}
