"""From a JAX function of parameters and inputs to `gsgd.Network`.

The function is traced to a jaxpr, and calls in it are written out. Each value carries an integer array of its own
shape: the network's node of every element. Whatever moves elements about (reshape, transpose, concatenate, slices) then
moves the nodes about in just the same way, and a layer reads its columns' nodes off its input (`gsgd.trace.nodes`).

Two rules make it safe. A primitive that is not known to be positively homogeneous pins every unit that it reads.
A parameter is described only if the whole function reads it once, and a layer does, perhaps through a transposition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from numpy.typing import NDArray

from gsgd.jax.rules import REARRANGING, RULES, Parameter, Step
from gsgd.network import Network, Residual
from gsgd.trace.names import match, unread
from gsgd.trace.nodes import Algebra, Nodes, NotUnderstood, along, expanded
from gsgd.trace.rules import Operand
from gsgd.trace.weights import Weight
from gsgd.warn import warn

# what is computed is computed by a jaxpr among the parameters
CALLING = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "remat2"}


def names(params: Any) -> list[str]:
    """The names of the leaves of the pytree `params`, in its order: their key paths, joined by dots.

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
        over counts as constant.
    params : pytree of arrays
    example : array, pytree or tuple of these
        The inputs, a tuple for several. Only shapes and dtypes are used: `jax.ShapeDtypeStruct` will do.
    residual : {"tie", "pin"}
        What additions do to the units they add; see `Network.add`.
    leave_out : str or iterable of str
        `names` of parameters, or prefixes of them (of modules), that take plain steps; the units that meet them are
        pinned.

    Warns
    -----
    UserWarning
        A parameter was not read, and is not in `leave_out`.

    Raises
    ------
    ValueError
        `leave_out` names no parameter, `residual` is unknown, or two parameters have the same name.

    Notes
    -----
    Batch normalization in training mode comes out as "exact", see `Network.batch_norm`: its statistics are not
    homogeneous, so that what they are taken of is pinned. What is seen is one forward pass: not a penalty on
    weights in the loss, not the derivative that `jax.custom_vjp` puts in place of another.
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
    not_read = [name for i, name in enumerate(known) if describe.reads[i] == 0 and name not in left_out]
    if not_read:
        warn(f"{unread(not_read)}. If none does, name them in leave_out")
    return net


class _Describe:
    """Builds `net`. A value's nodes have stride 0 wherever they can."""

    def __init__(self, residual: Residual) -> None:
        self.on = Algebra(residual)
        self.net = self.on.net
        self.values: list[Nodes | Parameter] = []
        self.known: dict[int, NDArray[Any]] = {}  # values of constant integers: places in a gather
        self.reasons: dict[str, str] = {}  # of parameters: what reads them first

    def follow(self, closed: ClosedJaxpr, params: list[str]) -> None:
        """Describe a function of these parameters and of inputs."""
        shapes = [x.shape for x in closed.in_avals]
        given = int(self.net.input(1).per_feature[0])
        blank = [np.empty(s, np.int8) for s in shapes[: len(params)]]
        arguments = [self.number(Parameter(n, a, a)) for n, a in zip(params, blank, strict=True)]  # the first values
        arguments += [self.number(np.broadcast_to(given, s)) for s in shapes[len(params) :]]
        steps: list[Step] = []
        outputs = self.write_out(closed.jaxpr, closed.consts, arguments, steps)
        self.reads = Counter(i for step in steps for i in step.reads) + Counter(outputs)
        for step in steps:
            self.apply_rule(step)
        for i in outputs:
            self.note_reader(i, "the output")
            self.on.pin(self.nodes(i), "network output")
        self.net.pin_unmet()

    # the jaxpr

    def number(self, value: Nodes | Parameter) -> int:
        """Values are numbered as they are made."""
        self.values.append(value)
        return len(self.values) - 1

    def number_constant(self, value: Any) -> int:
        """A number, or an array that the function closes over: a running mean, say, that is 0 only at first."""
        number = not np.shape(value) and jnp.issubdtype(jnp.result_type(value), np.number)
        i = self.number(self.on.zero(()) if number and not np.any(value) else self.on.fill(np.shape(value)))
        if _counts(jnp.result_type(value)) and not isinstance(value, jax.core.Tracer):
            self.known[i] = np.asarray(value)
        return i

    def write_out(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[int], to: list[Step]) -> list[int]:
        """Add the equations of `jaxpr` with calls written out; what it returns."""
        known: dict[Var, int] = dict(zip(jaxpr.invars, arguments, strict=True))
        known.update(zip(jaxpr.constvars, map(self.number_constant, consts), strict=True))

        def number_of(v: Var | Literal) -> int:
            return self.number_constant(v.val) if isinstance(v, Literal) else known[v]

        for equation in jaxpr.eqns:
            reads = [number_of(v) for v in equation.invars]
            called = _called(equation)
            if called is None:
                # nodes are found when its rule is applied
                makes = [self.number(self.on.fill(())) for _ in equation.outvars]
                to.append(Step(equation, tuple(reads), tuple(makes)))
            else:
                makes = self.write_out(called.jaxpr, called.consts, reads, to)
            known.update(zip(equation.outvars, makes, strict=True))
        return [number_of(v) for v in jaxpr.outvars]

    # values

    def nodes(self, i: int) -> Nodes:
        """The nodes of a value; those of a parameter that is read by no layer are constant."""
        value = self.values[i]
        return self.on.fill(value.view.shape) if isinstance(value, Parameter) else value

    def parameter(self, i: int) -> Parameter | None:
        """The parameter that can be described here: nothing else may read it."""
        value = self.values[i]
        return value if isinstance(value, Parameter) and self.reads[i] == 1 else None

    def weight(self, i: int) -> Weight | None:
        p = self.parameter(i)
        return None if p is None else p.weight

    def operand(self, i: int) -> Operand:
        return Operand(self.nodes(i), self.weight(i))

    def note_reader(self, i: int, reader: str) -> None:
        """If value `i` is a parameter, it is one no more: `reader` describes it, or is the reason that nothing does."""
        value, times = self.values[i], self.reads[i]
        if isinstance(value, Parameter):
            how = f"read {times} times, first by" if times > 1 else "read by"
            self.reasons.setdefault(value.name, f"{how} {reader}")

    # primitives

    def apply_rule(self, step: Step) -> None:
        shapes, reason = [value.shape for value in step.made], step.label
        try:
            if step.equation.primitive.name not in RULES:
                raise NotUnderstood
            made = RULES[step.equation.primitive.name](self, step)
        except NotUnderstood as why:
            reason = f"{step.label}: {why}".removesuffix(": ")
            reads = [self.nodes(i) for i in step.reads]
            constant = all(map(self.on.is_constant, reads))
            for nodes in reads:
                self.on.pin(nodes, reason)
            node = None if constant else int(self.net.input(1, reason).per_feature[0])
            made = [self.on.fill(shape, node) for shape in shapes]
        if not any(isinstance(value, Parameter) for value in made):
            for i in step.reads:
                self.note_reader(i, reason)
        for i, value, shape in zip(step.makes, made, shapes, strict=True):
            if isinstance(value, Parameter):
                self.values[i] = value
            else:
                assert value.shape == shape, (step.label, value.shape, shape)
                self.values[i] = expanded(value)
        self.compute(step)

    def compute(self, step: Step) -> None:
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
