"""Rules of torch's functions: what each makes of the nodes that it reads. A function that has none pins them.

A new rule is a line of a table and a test: most functions do what one of the rules here does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from gsgd.blocks import Dim, Part
from gsgd.network import BatchNormMode, Features
from gsgd.torch.follow import name_of
from gsgd.torch.values import LIKE, Kind, is_continuous, tensors_in
from gsgd.trace import rules
from gsgd.trace.nodes import Algebra, Nodes, NotUnderstood, along, compact
from gsgd.trace.rules import Operand
from gsgd.trace.weights import Labels


class Run(Protocol):
    """What a rule may ask of the run that is traced."""

    on: Algebra
    batch_norm: BatchNormMode
    current: str  # the function that is called, and the module

    def nodes(self, t: Tensor) -> Nodes:
        """The nodes of a value."""

    def described(self, t: Any) -> str | None:
        """The name under which a parameter can be described: nothing else may read it."""

    def weight(self, t: Any) -> str:
        """The same of a parameter that must have one."""

    def kind(self, t: Tensor) -> Kind:
        """Whether its values are the same in every pass."""

    def why_not_described(self, t: Any) -> str:
        """Why a parameter, or a view of one, can't be described; nothing for others and for those that can."""

    def operand(self, value: Any) -> Operand:
        """A tensor or a number."""

    def moved(self, t: Tensor, views: list[Tensor]) -> None:
        """If `t` is a parameter, so are its views."""


# rules that are told the result, and the arguments as they were given


def contracted(
    run: Run, out: Tensor, a: Tensor, a_labels: Labels, b: Tensor, b_labels: Labels, labels: Labels
) -> Nodes:
    """A sum of products, with dimensions labelled as in einsum."""
    why = [run.why_not_described(t) for t in (a, b)]
    operands = [run.operand(t) for t in (a, b)]
    otherwise = why[1] or why[0] or "by a feature"
    return rules.contract(run.on, operands[0], a_labels, operands[1], b_labels, labels, out.shape, otherwise)


def linear(run: Run, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Nodes:
    batch = range(-x.ndim + 1, 0)
    row = ("row",) * (weight.ndim - 1)
    nodes = contracted(run, out, x, (*batch, "column"), weight, (*row, "column"), (*batch, *row))
    if bias is None:
        return nodes
    name = run.described(bias)
    if name is None:
        return written(run, run.on.net.features(nodes[0]), bias, -1, out)
    if run.operand(weight).weight is None:
        return rules.add(run.on, Operand(nodes), run.operand(bias))
    return along(run.on.net.bias(name, run.on.read(nodes, -1)).per_feature, -1, out.shape)


def matmul(run: Run, out: Tensor, a: Tensor, other: Tensor) -> Nodes:
    row, column = ("row",) * (a.ndim > 1), ("column",) * (other.ndim > 1)
    batch = [range(-t.ndim + 2, 0) for t in (a, other)]
    labels = (*max(batch, key=len), *row, *column)
    return contracted(run, out, a, (*batch[0], *row, "sum"), other, (*batch[1], "sum", *column), labels)


def add_matmul(run: Run, out: Tensor, x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Nodes:
    return rules.add(run.on, run.operand(x), Operand(matmul(run, out, a, b)))


def einsum(run: Run, out: Tensor, equation: str, *operands: Any) -> Nodes:
    tensors = list(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Tensor) else list(operands)
    if not isinstance(equation, str) or len(tensors) != 2:
        raise NotUnderstood("of this form")
    given, _, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if "->" not in equation:
        letters = [c for c in sorted(set(given) - set(",.")) if given.count(c) == 1]
        result = "..." * ("..." in given) + "".join(letters)

    def labels(term: str, ndim: int) -> Labels:
        before, dots, after = term.partition("...")
        return (*before, *range(len(before) + len(after) - ndim, 0), *after) if dots else tuple(term)

    (a, b), (x, y) = tensors, terms
    return contracted(run, out, a, labels(x, a.ndim), b, labels(y, b.ndim), labels(result, out.ndim))


def convolution(
    run: Run,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Nodes:
    return convolved(run, out, x, weight, bias, groups, "oidhw")


def transposed_convolution(
    run: Run,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Nodes:
    return convolved(run, out, x, weight, bias, groups, "iodhw")


def convolved(
    run: Run, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, letters: str
) -> Nodes:
    spatial = weight.ndim - 2
    dim = -spatial - 1
    if run.described(weight) is None and bias is None and run.on.is_pinned(run.nodes(weight)):
        why = run.why_not_described(weight) or "by constants"
        return rules.by_constants(run.on, run.nodes(x), dim, groups, dim, out.shape[dim], out.shape, why)
    name = run.weight(weight)
    y = run.on.net.conv(
        name,
        run.on.read(run.nodes(x), dim),
        out.shape[dim],
        tuple(weight.shape[2:]),
        groups=groups,
        bias=run.described(bias),
        layout=letters[:2] + letters[-spatial:],
    )
    return written(run, y, bias, dim, out)


def written(run: Run, y: Features, bias: Tensor | None, dim: int, out: Tensor) -> Nodes:
    if bias is not None and run.described(bias) is None:
        reason = f"{run.current}: its bias is read elsewhere, or computed"
        run.on.pin(run.nodes(bias), reason)
        run.on.net.pin(y, reason)
    return along(y.per_feature, dim, out.shape)


def normalization(
    run: Run,
    out: Tensor,
    x: Tensor,
    mean: Any,
    var: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> Nodes:
    channels = run.on.read(run.nodes(x), 1)
    if run.batch_norm != "exact" and not run.on.net.is_written(channels):
        raise NotUnderstood("no layer is right before it")
    pin_computed(run, weight)
    y = run.on.net.batch_norm(channels, run.described(weight), run.described(bias), run.batch_norm)
    return written(run, y, bias, 1, out)


def pin_computed(run: Run, weight: Tensor | None) -> None:
    if weight is not None and run.described(weight) is None:
        run.on.pin(run.nodes(weight), f"{run.current}: as its weight")


def affine(run: Run, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, dim: int) -> Nodes:
    """What a normalization over more than single channels does to these."""
    if any(t is not None and t.ndim != 1 for t in (weight, bias)):
        raise NotUnderstood("of more than one axis")
    pin_computed(run, weight)
    y = run.on.net.norm(run.on.read(run.nodes(x), dim), run.described(weight), run.described(bias))
    return written(run, y, bias, dim, out)


def layer_norm(
    run: Run,
    out: Tensor,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> Nodes:
    return affine(run, out, x, weight, bias, -1)


def rms_norm(
    run: Run, out: Tensor, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Nodes:
    return affine(run, out, x, weight, None, -1)


def group_norm(
    run: Run,
    out: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> Nodes:
    return affine(run, out, x, weight, bias, 1)


def instance_norm(
    run: Run,
    out: Tensor,
    x: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> Nodes:
    return affine(run, out, x, weight, bias, 1)


def attention(
    run: Run,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *_: Any,
    enable_gqa: bool = False,
    **options: Any,
) -> Nodes:
    """Sums of values over positions, whose weights are pinned."""
    for t in (query, key, attn_mask):
        if t is not None:
            run.on.pin(run.nodes(t), f"{run.current}: as its weights")
    nodes = run.on.one(run.nodes(value), [value.ndim - 2])
    if enable_gqa:
        nodes = np.repeat(nodes, query.shape[-3] // value.shape[-3], axis=-3)
    return np.broadcast_to(nodes, out.shape)


def multi_head_attention(
    run: Run,
    out: tuple[Tensor, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    *_: Any,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    attn_mask: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    **options: Any,
) -> list[Nodes]:
    """Three projections by one matrix or three, sums of values over positions, and a fourth projection."""
    on, net, width = run.on, run.on.net, embed_dim_to_check
    biases = [bias for bias in (in_proj_bias, bias_v, out_proj_bias) if bias is not None]
    if static_k is not None or static_v is not None or not all(map(run.described, biases)):
        raise NotUnderstood("of this form")
    own = [q_proj_weight, k_proj_weight, v_proj_weight] if in_proj_weight is None else [in_proj_weight]
    names, last = [run.weight(w) for w in own], run.weight(out_proj_weight)
    read = [on.read(run.nodes(t), -1) for t in (query, key, value)]
    if in_proj_weight is None:
        projected = [net.dense(name, x, width).per_feature for name, x in zip(names, read, strict=True)]
    else:
        projected = np.split(net.nodes.new(3 * width, names[0]), 3)
        none, dims = Dim(), (Dim(width, 0, 1), Dim(in_proj_weight.shape[1], 1, 1))
        parts = [
            Part((none, *dims, none, none, none), (0, i * width), rows, x.per_feature)
            for i, (rows, x) in enumerate(zip(projected, read, strict=True))
        ]
        net.edges(names[0], "dense", tuple(in_proj_weight.shape), *parts)
    if in_proj_bias is not None:
        net.bias(run.weight(in_proj_bias), net.features(np.concatenate(projected)))
    reason, values = f"{run.current}: as its weights", projected[2]
    on.pin(np.concatenate(projected[:2]), reason)
    if attn_mask is not None:
        on.pin(run.nodes(attn_mask), reason)
    if bias_v is not None:  # the value of one more position
        values = rules.add(on, Operand(values), run.operand(bias_v)).reshape(-1)
    y = net.dense(last, net.features(values), width, bias=run.described(out_proj_bias))
    weights = [] if out[1] is None else [on.fill(out[1].shape, int(projected[0][0]))]
    return [along(y.per_feature, -1, out[0].shape), *weights]


def same(run: Run, out: Any, x: Tensor, *_: Any, **options: Any) -> Nodes:
    return run.nodes(x)


def make(run: Run, out: Tensor, *_: Any, **options: Any) -> Nodes:
    return run.on.fill(out.shape)


def prelu(run: Run, out: Tensor, x: Tensor, weight: Tensor) -> Nodes:
    run.on.pin(run.nodes(weight), f"{run.current}: as its slope")
    return run.nodes(x)


def interpolate(run: Run, out: Tensor, x: Tensor, *_: Any, **options: Any) -> Nodes:
    return rules.pool(run.on, run.nodes(x), range(2, out.ndim), out.shape)


def reduce(run: Run, out: Any, x: Tensor, dim: Any = None, *_: Any, axis: Any = None, **options: Any) -> Nodes:
    if not options.keys() <= {"keepdim", "dtype"}:
        raise NotUnderstood
    nodes, dims = run.nodes(x), axis if dim is None else dim
    dims = [dims] if isinstance(dims, int) else dims or range(nodes.ndim)
    return run.on.collapse(nodes, [d % nodes.ndim for d in dims]).reshape(tensors_in(out)[0].shape)


def extremum(run: Run, out: Any, a: Tensor, other: Any = None, *more: Any, **options: Any) -> Nodes:
    """Of two tensors, or of one along a dimension."""
    if not isinstance(other, Tensor):
        return reduce(run, out, a, **options) if other is None else reduce(run, out, a, other, *more, **options)
    return np.broadcast_to(rules.choose(run.on, run.nodes(a), run.nodes(other)), out.shape)


def pad(run: Run, out: Tensor, x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Nodes:
    """By zeros, or by copies, which scale as what they are copies of."""
    if mode == "constant" and value:
        raise NotUnderstood(f"value={value}")
    nodes = run.nodes(x)
    for i in range(len(pad) // 2):
        d, (before, after) = nodes.ndim - 1 - i, pad[2 * i : 2 * i + 2]
        if mode != "constant" and (before or after):
            shape = (*nodes.shape[:d], out.shape[d], *nodes.shape[d + 1 :])
            nodes = np.broadcast_to(run.on.collapse(nodes, [d]), shape)
        elif before or after:
            nodes = rules.pad(run.on, nodes, d, before, after)
    return nodes


def add(run: Run, out: Tensor, a: Any, other: Any, **options: Any) -> Nodes:
    return rules.add(run.on, run.operand(a), run.operand(other))


def multiply(run: Run, out: Tensor, a: Any, other: Any) -> Nodes:
    return rules.multiply(run.on, run.operand(a), run.operand(other))


def divide(run: Run, out: Tensor, a: Any, other: Any, rounding_mode: str | None = None) -> Nodes:
    if rounding_mode is not None:
        raise NotUnderstood
    return rules.divide(run.on, run.operand(a).nodes, run.operand(other).nodes)


def compare(run: Run, out: Tensor, a: Any, other: Any) -> list[Nodes]:
    rules.compare(run.on, run.operand(a).nodes, run.operand(other).nodes)
    return []  # it is none of real numbers


def unchanged(run: Run, out: Tensor, x: Tensor) -> Nodes | list[Nodes]:
    """No rescaling changes it."""
    return run.on.fill(out.shape) if is_continuous(out) else []


def where(run: Run, out: Tensor, condition: Tensor, a: Any, other: Any) -> Nodes:
    if is_continuous(condition):
        raise NotUnderstood
    return np.broadcast_to(rules.choose(run.on, run.operand(a).nodes, run.operand(other).nodes), out.shape)


def masked_fill(run: Run, out: Tensor, x: Tensor, mask: Tensor, value: Any) -> Nodes:
    return where(run, out, mask, x, value)


def set_item(run: Run, out: None, x: Tensor, index: Any, value: Any) -> list[Nodes]:
    """Zeros in some places."""
    if not run.on.is_zero(run.operand(value).nodes):
        raise NotUnderstood
    return []


def threshold(run: Run, out: Tensor, x: Tensor, threshold: Any, value: Any, inplace: bool = False) -> Nodes:
    if threshold != 0 or value != 0:
        raise NotUnderstood
    return run.nodes(x)


def clamp(run: Run, out: Tensor, x: Tensor, min: Any = None, max: Any = None) -> Nodes:
    no_bound = not isinstance(max, Tensor) and max in (None, float("inf"))
    if min is None or not run.on.is_zero(run.operand(min).nodes) or not no_bound:
        raise NotUnderstood
    return run.nodes(x)


# rules that are told the function


def rearrange(run: Run, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
    if any(isinstance(a, torch.dtype) for a in tree_leaves((args, kwargs))):
        raise NotUnderstood("reinterpreted as another dtype")
    if not any(map(is_continuous, tensors_in(out))):  # indices, which may have the shape of a value
        return []
    found = [t for t in tensors_in((args, kwargs)) if is_continuous(t)]
    if len(found) == 1:
        run.moved(found[0], tensors_in(out))
    # a view of the value may need a copy of its nodes, which have strides of their own
    copying: dict[str, Callable[..., Any]] = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
    func = copying.get(name_of(func), func)
    try:
        select_alike(run, func, args, kwargs)
        args, kwargs = tree_map_only(Tensor, partial(as_tensor, run), (args, kwargs))
        return tree_map_only(Tensor, Tensor.numpy, func(*args, **kwargs))
    except (IndexError, RuntimeError) as error:  # another function of the same name
        raise NotUnderstood from error


def as_tensor(run: Run, t: Tensor) -> Tensor:
    """The nodes of a value, for torch to move them about; indices are what they are."""
    if not is_continuous(t):
        return torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t
    nodes = run.nodes(t)
    return torch.from_numpy(compact(nodes)[0].copy()).expand(nodes.shape)


def select_alike(run: Run, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Indices that differ from pass to pass may only select along dimensions along which the nodes are equal."""
    tensors = tensors_in((args, kwargs))
    values = [t for t in tensors if is_continuous(t)]
    indices = [t for t in tensors if not is_continuous(t)]
    varying = {id(t) for t in indices if t.is_meta or run.kind(t) is not Kind.FIXED}
    if not values or not varying:
        return
    nodes = run.nodes(values[0])
    # 0 and 1 are indices along every dimension, but masks have the shape of what they select from
    shape = [n if any(t.dtype is torch.bool for t in indices) else max(2, n) for n in nodes.shape]
    differ = [n if n > 1 and step else 1 for n, step in zip(nodes.shape, nodes.strides, strict=True)]
    places = torch.arange(math.prod(differ)).reshape(differ).expand(shape)

    def select(index: int) -> Tensor:
        def convert(t: Tensor) -> Tensor:
            if is_continuous(t):
                return places
            return _one(t, index) if id(t) in varying else t

        a, k = tree_map_only(Tensor, convert, (args, kwargs))
        return func(*a, **k)  # type: ignore[no-any-return]

    if not torch.equal(select(0), select(1)):
        raise NotUnderstood("indices that vary")


def _one(indices: Tensor, which: int) -> Tensor:
    """Indices which all are this one; of a mask, its first or its last entry."""
    if indices.dtype is not torch.bool:
        return torch.full(indices.shape, which, dtype=indices.dtype)
    mask = torch.zeros(indices.numel(), dtype=torch.bool)
    mask[-which:][:1] = True
    return mask.reshape(indices.shape)


def gather(run: Run, out: Tensor, x: Tensor, dim: int, index: Tensor, **options: Any) -> Nodes:
    """Of every line along `dim`, any elements."""
    nodes = run.nodes(x)
    dim %= nodes.ndim
    nodes = nodes[tuple(slice(None) if d == dim else slice(0, n) for d, n in enumerate(out.shape))]
    return rules.pool(run.on, nodes, [dim], out.shape)


def scatter(run: Run, out: Tensor, x: Tensor, dim: int, index: Tensor, src: Any, **options: Any) -> Nodes:
    """Sums, means and extrema of elements of every line along `dim`, and of what was there."""
    if (
        not isinstance(src, Tensor)
        or not options.keys() <= {"include_self"} | {"reduce"}
        or (options.get("reduce", "sum") not in ("sum", "mean", "amax", "amin"))
    ):
        raise NotUnderstood
    nodes, dim = run.nodes(src), dim % out.ndim
    if any(nodes.shape[d] != n for d, n in enumerate(out.shape) if d != dim):
        raise NotUnderstood("of a part")
    before, added = (rules.pool(run.on, found, [dim], out.shape) for found in (run.nodes(x), nodes))
    return rules.choose(run.on, before, added)


def scatter_reduce(
    run: Run, out: Tensor, x: Tensor, dim: int, index: Tensor, src: Any, reduce: str, *, include_self: bool = True
) -> Nodes:
    return scatter(run, out, x, dim, index, src, reduce=reduce)


Rule = Callable[[Run, Callable[..., Any], Any, Any, Any], Any]


def _made(rule: Callable[..., Any]) -> Rule:
    """A rule that is told the result and the arguments; others than it expects are not understood."""
    signature = inspect.signature(rule)

    def apply(run: Run, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        try:
            bound = signature.bind(run, out, *args, **kwargs)
        except TypeError as error:
            raise NotUnderstood("of this form") from error
        return rule(*bound.args, **bound.kwargs)

    return apply


def _pooled(spatial: int) -> Rule:
    def apply(run: Run, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        nodes = run.nodes(args[0])
        return rules.pool(run.on, nodes, range(nodes.ndim - spatial, nodes.ndim), tensors_in(out)[0].shape)

    return apply


def _normalized(run: Run, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
    if func is not F.batch_norm:
        raise NotUnderstood
    return normalization(run, out, *args, **kwargs)


# These may be done in place:
# fmt: off
ELEMENTWISE: dict[str, Rule] = {
    # f(c x) = c f(x) for c > 0, element by element, whatever the other arguments are
    **dict.fromkeys((
        "abs", "absolute", "bfloat16", "clone", "contiguous", "cpu", "cuda", "double", "dropout", "dropout1d",
        "dropout2d", "dropout3d", "feature_dropout", "float", "half", "leaky_relu", "neg", "negative", "positive",
        "relu", "requires_grad_", "rrelu", "to", "type", "type_as",
    ), _made(same)),
    **dict.fromkeys(("add", "rsub", "sub", "subtract"), _made(add)),
    **dict.fromkeys(("clamp", "clamp_min", "clip"), _made(clamp)),
    **dict.fromkeys(("div", "divide", "true_divide"), _made(divide)),
    **dict.fromkeys(("mul", "multiply"), _made(multiply)),
    **dict.fromkeys(("index_add", "scatter", "scatter_add"), _made(scatter)),
    "scatter_reduce": _made(scatter_reduce),
    "masked_fill": _made(masked_fill),
    **dict.fromkeys(("_threshold", "threshold"), _made(threshold)),
}
RULES: dict[str, Rule] = {
    "gather": _made(gather),
    "batch_norm": _normalized,
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), _made(convolution)),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), _made(transposed_convolution)),
    "__setitem__": _made(set_item),
    **dict.fromkeys(("eq", "ge", "greater", "greater_equal", "gt", "le", "less", "less_equal", "lt", "ne", "not_equal"),
                    _made(compare)),
    **dict.fromkeys(("isfinite", "isinf", "isnan", "sgn", "sign", "signbit"), _made(unchanged)),
    "where": _made(where),
    "group_norm": _made(group_norm),
    "instance_norm": _made(instance_norm),
    "layer_norm": _made(layer_norm),
    "linear": _made(linear),
    **dict.fromkeys(("__matmul__", "bmm", "matmul", "mm"), _made(matmul)),
    **dict.fromkeys(("addmm", "baddbmm"), _made(add_matmul)),
    "einsum": _made(einsum),
    "multi_head_attention_forward": _made(multi_head_attention),
    "pad": _made(pad),
    "prelu": _made(prelu),
    "rms_norm": _made(rms_norm),
    "scaled_dot_product_attention": _made(attention),
    **dict.fromkeys(("interpolate", "upsample"), _made(interpolate)),
    **dict.fromkeys(("amax", "amin", "mean", "sum"), _made(reduce)),
    **dict.fromkeys(("max", "maximum", "min", "minimum"), _made(extremum)),
    **{
        f"{kind}_{pool}{n}d{more}": _pooled(n)
        for n in (1, 2, 3)
        for kind in ("adaptive_avg", "adaptive_max", "avg", "fractional_max", "lp", "max")
        for pool in ("pool", "unpool")
        for more in ("", "_with_indices")
    },
    # of an argument only its shape and dtype are used
    **dict.fromkeys(LIKE - {"new_tensor"}, _made(make)),
    # each element of the result is an element of an argument
    **dict.fromkeys((
        "T", "__getitem__", "broadcast_to", "cat", "channel_shuffle", "chunk", "concat", "concatenate", "dsplit",
        "dstack", "expand", "expand_as", "flatten", "flip", "hsplit", "hstack", "index_select", "mT", "moveaxis",
        "movedim", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave", "reshape",
        "reshape_as", "roll", "select", "split", "split_with_sizes", "squeeze", "stack", "swapaxes", "swapdims", "t",
        "tensor_split", "tile", "transpose", "unbind", "unflatten", "unfold", "unsafe_chunk", "unsafe_split",
        "unsqueeze", "view", "view_as", "vsplit", "vstack",
    ), rearrange),
}
# fmt: on


def find_rule(name: str) -> Rule | None:
    """The rule of the function of this name."""
    plain = name.strip("_") if name.endswith("_") else name  # in place or not
    return RULES.get(name) or ELEMENTWISE.get(name) or ELEMENTWISE.get(plain)
