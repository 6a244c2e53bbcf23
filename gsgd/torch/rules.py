"""Rules of torch's functions: what each makes of the nodes that it reads. A function that has none pins them.

A new rule is a line of a table and a test: most functions do what one of the rules here does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from gsgd.torch import attention, layers, moves, norms
from gsgd.torch.run import Run
from gsgd.torch.values import LIKE, is_continuous, tensors_in
from gsgd.trace import rules
from gsgd.trace.nodes import Nodes, NotUnderstood

# element by element, and along dimensions: each is told the result, and the arguments as they were given


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


def cumulate(run: Run, out: Any, x: Tensor, dim: int = -1, *_: Any, **options: Any) -> Nodes:
    """Of every line along `dim`, sums of some elements, or these in another order."""
    return rules.pool(run.on, run.nodes(x), [dim % x.ndim], tensors_in(out)[0].shape)


def topk(run: Run, out: Any, x: Tensor, k: int, dim: int = -1, *_: Any, **options: Any) -> Nodes:
    return cumulate(run, out, x, dim)


def sample(run: Run, out: Tensor, x: Tensor, grid: Tensor, *_: Any, **options: Any) -> Nodes:
    run.on.pin(run.nodes(grid), f"{run.current}: as its places")
    return interpolate(run, out, x)


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


def glu(run: Run, out: Tensor, x: Tensor, dim: int = -1) -> Nodes:
    """One half, times a sigmoid of the other."""
    value, gate = np.split(run.nodes(x), 2, axis=dim)
    run.on.pin(gate, f"{run.current}: as its gate")
    return value


def threshold(run: Run, out: Tensor, x: Tensor, threshold: Any, value: Any, inplace: bool = False) -> Nodes:
    if threshold != 0 or value != 0:
        raise NotUnderstood
    return run.nodes(x)


def clamp(run: Run, out: Tensor, x: Tensor, min: Any = None, max: Any = None) -> Nodes:
    no_bound = not isinstance(max, Tensor) and max in (None, float("inf"))
    if min is None or not run.on.is_zero(run.operand(min).nodes) or not no_bound:
        raise NotUnderstood
    return run.nodes(x)


Rule = Callable[[Run, Callable[..., Any], Any, Any, Any], Any]


def _made(rule: Callable[..., Any]) -> Rule:
    """A rule that is told the result and the arguments; others than it expects are not understood."""
    signature = inspect.signature(rule)

    def apply(run: Run, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name != "out"}  # it is None
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
    return norms.normalization(run, out, *args, **kwargs)


# These may be done in place:
# fmt: off
ELEMENTWISE: dict[str, Rule] = {
    # f(c x) = c f(x) for c > 0, element by element, whatever the other arguments are
    **dict.fromkeys((
        "abs", "absolute", "bfloat16", "clone", "contiguous", "cpu", "cuda", "double", "dropout", "dropout1d",
        "dropout2d", "dropout3d", "feature_dropout", "float", "half", "leaky_relu", "neg", "negative", "positive",
        "relu", "requires_grad_", "rrelu", "to", "tril", "triu", "type", "type_as",
    ), _made(same)),
    **dict.fromkeys(("add", "rsub", "sub", "subtract"), _made(add)),
    **dict.fromkeys(("clamp", "clamp_min", "clip"), _made(clamp)),
    **dict.fromkeys(("div", "divide", "true_divide"), _made(divide)),
    **dict.fromkeys(("mul", "multiply"), _made(multiply)),
    **dict.fromkeys(("index_add", "scatter", "scatter_add"), _made(moves.scatter)),
    "scatter_reduce": _made(moves.scatter_reduce),
    "masked_fill": _made(masked_fill),
    **dict.fromkeys(("_threshold", "threshold"), _made(threshold)),
}
RULES: dict[str, Rule] = {
    "gather": _made(moves.gather),
    "batch_norm": _normalized,
    "bilinear": _made(layers.bilinear),
    **dict.fromkeys(("cummax", "cummin", "cumsum", "sort"), _made(cumulate)),
    "topk": _made(topk),
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), _made(layers.convolution)),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), _made(layers.transposed_convolution)),
    "__setitem__": _made(set_item),
    **dict.fromkeys(("eq", "ge", "greater", "greater_equal", "gt", "le", "less", "less_equal", "lt", "ne", "not_equal"),
                    _made(compare)),
    **dict.fromkeys(("isfinite", "isinf", "isnan", "sgn", "sign", "signbit"), _made(unchanged)),
    "glu": _made(glu),
    "where": _made(where),
    "group_norm": _made(norms.group_norm),
    "instance_norm": _made(norms.instance_norm),
    "layer_norm": _made(norms.layer_norm),
    "linear": _made(layers.linear),
    **dict.fromkeys(("__matmul__", "bmm", "dot", "matmul", "mm", "mv"), _made(layers.matmul)),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), _made(layers.add_matmul)),
    "einsum": _made(layers.einsum),
    **dict.fromkeys(("ger", "outer"), _made(layers.outer)),
    "tensordot": _made(layers.tensordot),
    "embedding": _made(layers.embedding),
    "embedding_bag": _made(layers.embedding_bag),
    "grid_sample": _made(sample),
    "multi_head_attention_forward": _made(attention.multi_head_attention),
    "pad": _made(pad),
    "prelu": _made(prelu),
    "rms_norm": _made(norms.rms_norm),
    "scaled_dot_product_attention": _made(attention.attention),
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
        "T", "__getitem__", "broadcast_to", "cat", "channel_shuffle", "chunk", "column_stack", "concat", "concatenate",
        "diagonal", "dsplit", "fliplr", "flipud", "ravel", "rot90",
        "dstack", "expand", "expand_as", "flatten", "flip", "hsplit", "hstack", "index_select", "mT", "moveaxis",
        "movedim", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave", "reshape",
        "reshape_as", "roll", "select", "split", "split_with_sizes", "squeeze", "stack", "swapaxes", "swapdims", "t",
        "tensor_split", "tile", "transpose", "unbind", "unflatten", "unfold", "unsafe_chunk", "unsafe_split",
        "unsqueeze", "view", "view_as", "vsplit", "vstack",
    ), moves.rearrange),
}
# fmt: on


def find_rule(name: str) -> Rule | None:
    """The rule of the function of this name."""
    plain = name.strip("_") if name.endswith("_") else name  # in place or not
    return RULES.get(name) or ELEMENTWISE.get(name) or ELEMENTWISE.get(plain)
