"""Rules of JAX's primitives: what each makes of the nodes that it reads. A primitive that has none pins them.

A new rule is a line of a table and a test: most primitives do what one of the rules here does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from numpy.typing import NDArray

from gsgd.trace import rules
from gsgd.trace.nodes import Algebra, Nodes, NotUnderstood, along, compact
from gsgd.trace.rules import Operand
from gsgd.trace.weights import Weight, weight_view


@dataclass(frozen=True)
class Parameter:
    """A view of a parameter that no layer has read yet: a byte per entry, of which only the strides are looked at."""

    name: str
    whole: NDArray[Any]
    view: NDArray[Any]

    @property
    def weight(self) -> Weight | None:
        """As a layer reads it; None if some of its entries are missing."""
        return weight_view(self.name, self.whole.shape, self.whole.strides, self.view.shape, self.view.strides)


@dataclass(frozen=True)
class Step:
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


class Run(Protocol):
    """A function that is traced, in which every value has a number and its nodes."""

    on: Algebra
    known: dict[int, NDArray[Any]]  # values of constant integers: places in a gather

    def nodes(self, i: int) -> Nodes:
        """The nodes of a value; those of a parameter that is read by no layer are constant."""

    def parameter(self, i: int) -> Parameter | None:
        """The parameter that can be described here: nothing else may read it."""

    def weight(self, i: int) -> Weight | None:
        """The same, as a layer reads it."""

    def operand(self, i: int) -> Operand:
        """A value as the rules that all frameworks share take it."""


def contract(run: Run, shape: tuple[int, ...], a: int, b: int, *, dimension_numbers: Any, **_: Any) -> Nodes:
    contracted, batch = dimension_numbers
    labels: list[list[tuple[Hashable, int]]] = [
        [(side, d) for d in range(run.nodes(i).ndim)] for side, i in enumerate((a, b))
    ]
    for kind, dims in (("sum", contracted), ("batch", batch)):
        for number, places in enumerate(zip(*dims, strict=True)):
            for side, d in enumerate(places):
                labels[side][d] = (kind, number)
    made: list[tuple[Hashable, int]] = [("batch", i) for i in range(len(batch[0]))]
    made += [label for own in labels for label in own if isinstance(label[0], int)]
    why = "not by a matrix of weights that is read once"
    operands = [(run.operand(i), own) for i, own in zip((a, b), labels, strict=True)]
    return rules.contract(run.on, operands, made, shape, why)


def gather(
    run: Run,
    shape: tuple[int, ...],
    x: int,
    indices: int,
    *,
    dimension_numbers: Any,
    slice_sizes: Any,
    fill_value: Any,
    **_: Any,
) -> Nodes:
    """Features at constant places; at others some positions, or some examples of the batch, or rows of a table."""
    if fill_value and not math.isnan(fill_value):
        raise NotUnderstood(f"filled with {fill_value}")
    nodes, dims, places = run.nodes(x), dimension_numbers, run.known.get(indices)
    batch, moved = dims.operand_batching_dims, dims.start_index_map
    window = [d for d in range(nodes.ndim) if d not in (*dims.collapsed_slice_dims, *batch)]
    offsets = dict(zip(window, dims.offset_dims, strict=True))
    table = run.operand(x)
    if table.weight is not None:
        if any(slice_sizes[d] != nodes.shape[d] for d in window):
            raise NotUnderstood("of a part")
        own = [offsets.get(d, ("place", d)) for d in range(nodes.ndim)]
        return rules.look_up(run.on, table, own, range(len(shape)), shape)
    last = [nodes.shape[d] - slice_sizes[d] for d in moved]
    if places is None or batch or (places < 0).any() or (places > last).any():
        places = None
        nodes = run.on.equal_along(nodes, [d for d, n in enumerate(slice_sizes) if n != nodes.shape[d] or d in batch])
    nodes = compact(nodes)[0]
    index = [np.zeros([1] * len(shape), np.int64) for _ in nodes.shape]
    for d, n in enumerate(nodes.shape):
        if n != 1 and places is not None and d in moved:
            view = [1 if i in dims.offset_dims else extent for i, extent in enumerate(shape)]
            index[d] = places[..., moved.index(d)].reshape(view)
        if n != 1 and d in offsets:
            view = [-1 if i == offsets[d] else 1 for i in range(len(shape))]
            index[d] = index[d] + np.arange(slice_sizes[d]).reshape(view)
    return np.broadcast_to(nodes[tuple(index)], shape)


def scatter(
    run: Run, shape: tuple[int, ...], x: int, indices: int, updates: int, *, dimension_numbers: Any, **_: Any
) -> Nodes:
    """Sums and extrema of what is written to a position, and of what was there."""
    dims, added = dimension_numbers, run.nodes(updates)
    window = [d for d in range(len(shape)) if d not in dims.inserted_window_dims]
    if dims.operand_batching_dims or [added.shape[d] for d in dims.update_window_dims] != [shape[d] for d in window]:
        raise NotUnderstood("of a part")
    added = run.on.collapse(added, set(range(added.ndim)) - set(dims.update_window_dims))
    added = added.reshape([n if d in window else 1 for d, n in enumerate(shape)])
    before = run.on.collapse(run.nodes(x), dims.inserted_window_dims)
    return np.broadcast_to(rules.choose(run.on, before, added), shape)


def convolution(
    run: Run,
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
    w, why = run.weight(kernel), "not by weights that are read once"
    if batch_group_count != 1:
        raise NotUnderstood("of this form")
    if w is None and run.on.is_pinned(run.nodes(kernel)):
        features = shape[of_output[1]]
        return rules.by_constants(
            run.on, run.nodes(x), of_input[1], feature_group_count, of_output[1], features, shape, why
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
    channels = run.on.read(run.nodes(x), of_input[1])
    features = run.on.net.conv(
        w.name,
        channels,
        shape[of_output[1]],
        tuple(w.shape[axis] for axis in spatial),
        groups=feature_group_count,
        layout=layout,
    )
    return along(features.per_feature, of_output[1], shape)


def passed(run: Run, step: Step) -> list[Nodes | Parameter]:
    for value, i in zip(step.made, step.reads, strict=True):
        if not jnp.issubdtype(value.dtype, np.inexact) and not run.on.is_constant(run.nodes(i)):
            raise NotUnderstood(f"to {value.dtype}")
    keep = step.equation.primitive.name in ("convert_element_type", "copy")
    return [(run.parameter(i) if keep else None) or run.nodes(i) for i in step.reads]


def rearranged(run: Run, step: Step) -> list[Nodes | Parameter]:
    name, options, shape = step.equation.primitive.name, step.equation.params, step.made[0].shape
    if len(step.reads) > 1 and name not in ("concatenate", "stack"):  # shapes that are computed
        raise NotUnderstood("of this form")
    p = run.parameter(step.reads[0])
    if p is not None and len(step.reads) == 1:
        view = REARRANGING[name]([p.view], options, shape)
        if isinstance(view, np.ndarray) and np.may_share_memory(view, p.whole):
            moved = Parameter(p.name, p.whole, view)
            if moved.weight is not None:
                return [moved]
    made = REARRANGING[name]([run.nodes(i) for i in step.reads], options, shape)
    return list(made) if isinstance(made, list) else [made]


def cumulate(run: Run, step: Step) -> list[Nodes | Parameter]:
    """Of every line along a dimension, sums of some elements, or these in another order."""
    options, made = step.equation.params, step.made
    dim = options["dimension"] if "dimension" in options else options["axis"]
    found = [run.nodes(i) for i in step.reads]
    values = [rules.pool(run.on, n, [dim % n.ndim], v.shape) for n, v in zip(found, made, strict=False)]
    return [*values, *(run.on.fill(v.shape) for v in made[len(values) :])]  # indices


def pad(run: Run, shape: tuple[int, ...], x: int, value: int, *, padding_config: Any) -> Nodes:
    if not run.on.is_zero(run.nodes(value)):
        raise NotUnderstood("not by zeros")
    nodes = run.nodes(x)
    for d, (before, after, between) in enumerate(padding_config):
        if between and nodes.strides[d]:
            raise NotUnderstood("of this form")
        if before or after or between:
            nodes = rules.pad(run.on, nodes, d, before, shape[d] - nodes.shape[d] - before)
    return nodes


def pool(
    run: Run,
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
    return rules.pool(run.on, run.nodes(x), (d for d, same in enumerate(trivial) if not same), shape)


def reduce(run: Run, shape: tuple[int, ...], x: int, *, axes: Any, **_: Any) -> Nodes:
    return run.on.collapse(run.nodes(x), axes).reshape(shape)


def slice_positions(run: Run, shape: tuple[int, ...], x: int, *_: int, slice_sizes: Any) -> Nodes:
    """Some positions, wherever they are."""
    nodes = run.nodes(x)
    return np.broadcast_to(
        run.on.equal_along(nodes, [d for d, n in enumerate(slice_sizes) if n != nodes.shape[d]]), shape
    )


def add(run: Run, shape: tuple[int, ...], a: int, b: int) -> Nodes:
    return rules.add(run.on, run.operand(a), run.operand(b))


def multiply(run: Run, shape: tuple[int, ...], a: int, b: int) -> Nodes:
    return rules.multiply(run.on, run.operand(a), run.operand(b))


def divide(run: Run, shape: tuple[int, ...], a: int, b: int) -> Nodes:
    return rules.divide(run.on, run.nodes(a), run.nodes(b))


def choose(run: Run, shape: tuple[int, ...], *values: int) -> Nodes:
    return np.broadcast_to(rules.choose(run.on, *map(run.nodes, values)), shape)


def select(run: Run, shape: tuple[int, ...], which: int, *values: int) -> Nodes:
    if not run.on.is_pinned(run.nodes(which)):
        raise NotUnderstood("by a feature")
    return choose(run, shape, *values)


def sign(run: Run, shape: tuple[int, ...], x: int) -> Nodes:
    """No rescaling changes it."""
    return run.on.fill(shape)


def compare(run: Run, shape: tuple[int, ...], a: int, b: int) -> Nodes:
    return np.broadcast_to(rules.compare(run.on, run.nodes(a), run.nodes(b)), shape)


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


Rule = Callable[[Run, Step], list[Nodes | Parameter]]


def _made(rule: Callable[..., Nodes]) -> Rule:
    """A rule that is told the result's shape, what is read, and the primitive's parameters."""

    @functools.wraps(rule)
    def apply(run: Run, step: Step) -> list[Nodes | Parameter]:
        return [rule(run, step.made[0].shape, *step.reads, **step.equation.params)]

    return apply


def _plain(rule: Callable[..., Nodes]) -> Rule:
    """A rule for which the primitive's parameters do not matter."""

    @functools.wraps(rule)
    def apply(run: Run, step: Step) -> list[Nodes | Parameter]:
        return [rule(run, step.made[0].shape, *step.reads)]

    return apply


# what is not here pins what it reads
RULES: dict[str, Rule] = {
    # f(c x) = c f(x) for c > 0, element by element
    "abs": passed,
    "convert_element_type": passed,
    "copy": passed,
    "neg": passed,
    "optimization_barrier": passed,
    "reduce_precision": passed,
    "sharding_constraint": passed,
    # sums, products, choices
    "add": _plain(add),
    "add_any": _plain(add),
    "div": _plain(divide),
    "max": _plain(choose),
    "min": _plain(choose),
    "mul": _plain(multiply),
    "select_n": _plain(select),
    "sub": _plain(add),
    # what no rescaling changes
    "eq": _plain(compare),
    "ge": _plain(compare),
    "gt": _plain(compare),
    "le": _plain(compare),
    "lt": _plain(compare),
    "ne": _plain(compare),
    "sign": _plain(sign),
    # layers, and what takes elements together
    "conv_general_dilated": _made(convolution),
    **dict.fromkeys(("cummax", "cummin", "cumsum", "sort", "top_k"), cumulate),
    "dot_general": _made(contract),
    "dynamic_slice": _made(slice_positions),
    "gather": _made(gather),
    "pad": _made(pad),
    "reduce_max": _made(reduce),
    "reduce_min": _made(reduce),
    "reduce_sum": _made(reduce),
    "reduce_window_max": _made(pool),
    "reduce_window_min": _made(pool),
    "reduce_window_sum": _made(pool),
    **dict.fromkeys(("scatter-add", "scatter-max", "scatter-min"), _made(scatter)),
    **dict.fromkeys(REARRANGING, rearranged),
}
