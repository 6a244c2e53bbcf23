"""From a PyTorch module to `gsgd.Network`.

The module is copied to the meta device (shapes, no values) and run once on inputs without values, while every torch
function is observed. Each value carries an integer array of its own shape: the network's node of every element.
Whatever moves elements about (reshape, permute, cat, slices, channel shuffles) then moves the nodes about in just the
same way, and a layer reads its columns' nodes off its input (`gsgd.trace.nodes`).

Three rules make it safe. An operation that is not known to be positively homogeneous pins every unit that it reads.
A parameter is described only if the whole forward pass reads it once, and a layer does. What a value overwrites in
place becomes one unit with it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gsgd.network import BatchNormMode, Features, Network, Residual
from gsgd.torch.follow import (
    OUT_OF_SIGHT,
    Follow,
    arguments,
    copy_without_values,
    count_reads,
    is_continuous,
    name_of,
    output_tensors,
    own_tensors,
    tensors_in,
    unwrap,
)
from gsgd.trace.names import match
from gsgd.trace.nodes import Algebra, Nodes, NotUnderstood, along, compact, expanded

# fmt: off
# what they draw differs from pass to pass
DRAWING = {
    "bernoulli", "binomial", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "poisson",
    "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random", "randperm", "uniform",
}
# fmt: on


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    residual: Residual = "tie",
    batch_norm: BatchNormMode = "exact",
    leave_out: str | Iterable[str] = (),
    pin_after: str | Iterable[str] = (),
) -> Network:
    """Describe `model` as a `gsgd.Network`, with parameters under their ``named_parameters()`` names.

    Neither the model (weights, buffers, training flags) nor the random state changes. The forward pass is followed
    in training mode, without values. Anything that is not understood pins the units that meet it, and
    ``print(net)`` shows the reason: the operation and the module. It also lists the parameters that are not described,
    with what reads them; they are left out of the network. Frozen ones (``requires_grad=False``) are described like
    others, since the symmetry holds.

    Parameters
    ----------
    model : nn.Module
    example_inputs : tensor, tuple of positional or dict of keyword arguments, optional
        Only shapes and dtypes are used. Without it, inputs of common sizes are tried: ``(2, in_features)`` or
        ``(2, in_channels, size, ...)``, as the model's first layer reads.
    residual : {"tie", "pin"}
        What additions do to the units they add; see `Network.add`.
    batch_norm : {"exact", "paper", "released"}
        See `Network.batch_norm`.
    leave_out : str or iterable of str
        Names of parameters or of modules whose parameters take plain steps; the units that meet them are pinned. A
        convolution that is left out takes raw gradients whatever `batch_norm` is.
    pin_after : str or iterable of str
        Names of modules whose outputs are pinned: chains end there. With ``("layer1", "layer2")`` every stage of a
        residual network has chains of its own.

    Warns
    -----
    UserWarning
        A trainable parameter was not read, and is not in `leave_out`.

    Raises
    ------
    ValueError
        `leave_out` or `pin_after` names nothing. Or:
        The forward pass cannot be followed: it fails on the inputs, it branches on a tensor's values, or a value is
        made out of sight (TorchScript, an extension). The message names the module and the operation.
        Or the model can't be copied, or its forward reads the original's parameters (by a closure).
    TypeError
        `model` is no module, or returns what can't be looked into.

    Notes
    -----
    What is seen is one forward pass: not a penalty on weights in the loss, not values that a hook keeps elsewhere,
    not the other branch of a choice that Python made (by a random number, say). Indices that torch draws in the pass
    pin what they select, unless they select among samples or positions; those of Python and NumPy are taken as fixed.
    """
    if residual not in ("tie", "pin"):
        raise ValueError(f"residual {residual!r}: expected 'tie' or 'pin'")
    if batch_norm not in ("exact", "paper", "released"):
        raise ValueError(f"batch_norm {batch_norm!r}: expected 'exact', 'paper' or 'released'")
    inner, names = unwrap(model)
    ghost, parameters = copy_without_values(inner, names)
    left_out = match(leave_out, names.values(), "leave_out")
    ends = {pin_after} if isinstance(pin_after, str) else set(pin_after)
    outer = {id(module): name for name, module in model.named_modules()}
    match(ends, outer.values(), "pin_after")
    ends = {name for name, module in inner.named_modules() if outer[id(module)] in ends}
    given = arguments(example_inputs) if example_inputs is not None else None
    args, kwargs, reads = count_reads(ghost, given, {id(p) for p in inner.parameters()})
    describe = _Describe(residual, batch_norm, parameters, reads, ends)
    describe.follow(ghost, args, kwargs)
    alone, ids = set(parameters.values()), {name: i for i, name in parameters.items()}
    net = describe.net.without([name for name in left_out if name in describe.net.shapes], "left out")
    net.add_plain(left_out, "left out")
    for name in names.values():
        if name not in net.shapes:
            read = describe.reasons.get(name, "not read by the forward pass")
            net.add_plain([name], read if name in alone else "shares its memory with another")
    trained = {name for name, p in model.named_parameters() if p.requires_grad} - set(left_out)
    warn_of_unread([name for name in parameters.values() if name in trained and reads[ids[name]] == 0])
    return net


def warn_of_unread(names: Sequence[str]) -> None:
    """Say that the pass which was followed did not read these parameters."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"the traced forward pass did not read {', '.join(names[:3])}{more}. If other passes do (layer drop, "
            "stochastic depth, a branch on a size or on self.training), the network is wrong for these: trace the "
            "model with the dropping switched off and inputs as in training, and pass network=. If none does, name "
            "them in leave_out, or freeze them",
            stacklevel=3,
        )


class _Describe(Follow):
    """Builds a network by the algebra `on`."""

    def __init__(
        self,
        residual: Residual,
        batch_norm: BatchNormMode,
        parameters: Mapping[int, str],
        reads: Mapping[int, int],
        ends: Collection[str],
    ) -> None:
        super().__init__()
        self.on, self.batch_norm = Algebra(residual), batch_norm
        self.net = self.on.net
        self.parameters, self.reads, self.ends = parameters, reads, ends
        self.known: dict[int, tuple[Tensor, Nodes]] = {}  # id -> the value, kept alive, and its nodes
        self.drawn: set[int] = set()  # ids of what was made of random numbers
        self.reasons: dict[str, str] = {}  # of parameters: what reads them first

    # values

    def nodes(self, t: Tensor) -> Nodes:
        if id(t) in self.known:
            return self.known[id(t)][1]
        if t.is_meta:
            raise ValueError(OUT_OF_SIGHT)
        return self.on.fill(t.shape)

    def know(self, t: Tensor, nodes: Nodes) -> None:
        if id(t) in self.known:  # made in place: what views of it were taken to be must stay true
            before = self.known[id(t)][1]
            if before.shape == nodes.shape:
                self.on.tie(before, nodes)
        self.known[id(t)] = (t, expanded(nodes))

    def start(self, t: Tensor) -> Tensor:
        t = super().start(t)
        dim = min(1, t.ndim - 1)
        self.know(t, along(self.net.input(t.shape[dim] if t.ndim else 1).per_feature, dim, t.shape))
        return t

    def enter(self, tensors: list[Tensor]) -> None:
        self.known.update((id(t), (t, self.on.fill(t.shape))) for t in tensors)

    def leave(self, name: str, out: Any) -> None:
        super().leave(name, out)
        if name in self.ends:
            for t in output_tensors(out):
                self.on.pin(self.nodes(t), f"output of {name}")

    def finish(self, model: nn.Module, outputs: list[Tensor]) -> None:
        for t in outputs:
            self.on.pin(self.nodes(t), "network output")
        for name, module in model.named_modules():
            for t in own_tensors(module):
                self.on.pin(self.nodes(t), f"kept by {name or 'the model'}")
        self.net.pin_unmet()

    def described(self, t: Any) -> str | None:
        """The name under which a parameter can be described: nothing else may read it."""
        return self.parameters[id(t)] if id(t) in self.parameters and self.reads[id(t)] == 1 else None

    def weight(self, t: Any) -> str:
        name = self.described(t)
        if name is None:
            if id(t) in self.parameters:
                raise NotUnderstood(f"its weight {self.parameters[id(t)]} is read {self.reads[id(t)]} times")
            raise NotUnderstood("its weight is computed, or shares its memory")
        if not t.numel():
            raise NotUnderstood("its weight has no entries")
        return name

    # operations

    def see(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        reads = [t for t in tensors_in((args, kwargs)) if is_continuous(t)]
        results = [t for t in tensors_in(out) if is_continuous(t)]
        reason = self.current
        if name_of(func).strip("_") in DRAWING or any(id(t) in self.drawn for t in tensors_in((args, kwargs))):
            self.drawn.update(id(t) for t in tensors_in((out, args[:1] if out is None else ())))
        try:
            if not torch.is_grad_enabled():
                raise NotUnderstood("without gradients")
            if kwargs.get("out") is not None:
                raise NotUnderstood("out=")
            made = self.describe(func, args, kwargs, out)
            nodes = list(made) if isinstance(made, tuple | list) else [made]
            if [n.shape for n in nodes] != [t.shape for t in results]:
                raise NotUnderstood("an unexpected result")
        except NotUnderstood as why:
            reason = f"{self.current}: {why}".removesuffix(": ")
            for t in reads:
                self.on.pin(self.nodes(t), reason)
            node = int(self.net.input(1, reason).per_feature[0]) if reads and results else None
            nodes = [self.on.fill(t.shape, node) for t in results]
        for t in reads:
            if id(t) in self.parameters:
                self.reasons.setdefault(self.parameters[id(t)], reason)
        for t, n in zip(results, nodes, strict=True):
            self.know(t, n)
        for t in tensors_in(out):
            self.known.setdefault(id(t), (t, self.on.fill(t.shape)))  # indices and masks

    def describe(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        """The nodes of what `func` returns (of its real or complex tensors)."""
        name = name_of(func)
        plain = name.strip("_") if name.endswith("_") else name  # in place or not
        rule = RULES.get(name) or ELEMENTWISE.get(name) or ELEMENTWISE.get(plain)
        if rule is None:
            raise NotUnderstood
        return rule(self, func, args, kwargs, out)

    # rules that are told the result, and the arguments as they were given

    def linear(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Nodes:
        name = self.weight(weight)
        features = self.on.read_flattened(self.nodes(x), -1)
        return self.written(self.net.dense(name, features, weight.shape[0], bias=self.described(bias)), bias, -1, out)

    def convolution(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Nodes:
        return self.convolved(out, x, weight, bias, groups, "oidhw")

    def transposed_convolution(
        self,
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
        return self.convolved(out, x, weight, bias, groups, "iodhw")

    def convolved(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, letters: str
    ) -> Nodes:
        spatial = weight.ndim - 2
        name, dim = self.weight(weight), -spatial - 1
        y = self.net.conv(
            name,
            self.on.read(self.nodes(x), dim),
            out.shape[dim],
            tuple(weight.shape[2:]),
            groups=groups,
            bias=self.described(bias),
            layout=letters[:2] + letters[-spatial:],
        )
        return self.written(y, bias, dim, out)

    def written(self, y: Features, bias: Tensor | None, dim: int, out: Tensor) -> Nodes:
        if bias is not None and self.described(bias) is None:
            reason = f"{self.current}: its bias is read elsewhere, or computed"
            self.on.pin(self.nodes(bias), reason)
            self.net.pin(y, reason)
        return along(y.per_feature, dim, out.shape)

    def normalization(
        self,
        out: Tensor,
        x: Tensor,
        mean: Any,
        var: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *_: Any,
        **options: Any,
    ) -> Nodes:
        channels = self.on.read(self.nodes(x), 1)
        if self.batch_norm != "exact" and not self.net.is_written(channels):
            raise NotUnderstood("no layer is right before it")
        self.pin_computed(weight)
        y = self.net.batch_norm(channels, self.described(weight), self.described(bias), self.batch_norm)
        return self.written(y, bias, 1, out)

    def pin_computed(self, weight: Tensor | None) -> None:
        if weight is not None and self.described(weight) is None:
            self.on.pin(self.nodes(weight), f"{self.current}: as its weight")

    def affine(self, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, dim: int) -> Nodes:
        """What a normalization over more than single channels does to these."""
        if any(t is not None and t.ndim != 1 for t in (weight, bias)):
            raise NotUnderstood("of more than one axis")
        self.pin_computed(weight)
        y = self.net.norm(self.on.read(self.nodes(x), dim), self.described(weight), self.described(bias))
        return self.written(y, bias, dim, out)

    def layer_norm(
        self,
        out: Tensor,
        x: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *_: Any,
        **options: Any,
    ) -> Nodes:
        return self.affine(out, x, weight, bias, -1)

    def rms_norm(
        self, out: Tensor, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Nodes:
        return self.affine(out, x, weight, None, -1)

    def group_norm(
        self,
        out: Tensor,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *_: Any,
        **options: Any,
    ) -> Nodes:
        return self.affine(out, x, weight, bias, 1)

    def matmul(self, out: Tensor, a: Tensor, other: Tensor) -> Nodes:
        if a.ndim < 2 or other.ndim < 2:
            raise NotUnderstood("by a vector")
        name = self.described(other)
        if name is not None and other.ndim == 2 and other.numel():
            features = self.on.read_flattened(self.nodes(a), -1)
            return self.written(self.net.dense(name, features, other.shape[1], layout="io"), None, -1, out)
        batch = tuple(out.shape[:-2])
        factors = [np.broadcast_to(self.nodes(t), (*batch, *t.shape[-2:])) for t in (a, other)]
        n = len(batch)
        summed, same = ((n + 1,), (n,)), (range(n), range(n))
        return self.on.matmul(out.shape, (factors[0], factors[1]), summed, same, "by a feature")

    def attention(
        self,
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
                self.on.pin(self.nodes(t), f"{self.current}: as its weights")
        nodes = self.on.one(self.nodes(value), [value.ndim - 2])
        if enable_gqa:
            nodes = np.repeat(nodes, query.shape[-3] // value.shape[-3], axis=-3)
        return np.broadcast_to(nodes, out.shape)

    def same(self, out: Any, x: Tensor, *_: Any, **options: Any) -> Nodes:
        return self.nodes(x)

    def make(self, out: Tensor, *_: Any, **options: Any) -> Nodes:
        return self.on.fill(out.shape)

    def prelu(self, out: Tensor, x: Tensor, weight: Tensor) -> Nodes:
        self.on.pin(self.nodes(weight), f"{self.current}: as its slope")
        return self.nodes(x)

    def interpolate(self, out: Tensor, x: Tensor, *_: Any, **options: Any) -> Nodes:
        return self.on.pool(self.nodes(x), range(2, out.ndim), out.shape)

    def reduce(self, out: Any, x: Tensor, dim: Any = None, *_: Any, axis: Any = None, **options: Any) -> Nodes:
        if not options.keys() <= {"keepdim", "dtype"}:
            raise NotUnderstood
        nodes, dims = self.nodes(x), axis if dim is None else dim
        dims = [dims] if isinstance(dims, int) else dims or range(nodes.ndim)
        return self.on.collapse(nodes, [d % nodes.ndim for d in dims]).reshape(tensors_in(out)[0].shape)

    def extremum(self, out: Any, a: Tensor, other: Any = None, *more: Any, **options: Any) -> Nodes:
        """Of two tensors, or of one along a dimension."""
        if not isinstance(other, Tensor):
            return self.reduce(out, a, **options) if other is None else self.reduce(out, a, other, *more, **options)
        p, q = self.pair(a, other)
        return p if _is_zero(other) else self.on.choose(p, q)

    def pad(self, out: Tensor, x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Nodes:
        """By zeros, or by copies, which scale as what they are copies of."""
        if mode == "constant" and value:
            raise NotUnderstood(f"value={value}")
        nodes = self.nodes(x)
        for i in range(len(pad) // 2):
            d, (before, after) = nodes.ndim - 1 - i, pad[2 * i : 2 * i + 2]
            if mode != "constant" and (before or after):
                shape = (*nodes.shape[:d], out.shape[d], *nodes.shape[d + 1 :])
                nodes = np.broadcast_to(self.on.collapse(nodes, [d]), shape)
            elif before or after:
                nodes = self.on.pad(nodes, d, before, after)
        return nodes

    def pair(self, a: Tensor, b: Tensor) -> tuple[Nodes, Nodes]:
        shape = np.broadcast_shapes(a.shape, b.shape)
        return np.broadcast_to(self.nodes(a), shape), np.broadcast_to(self.nodes(b), shape)

    def add(self, out: Tensor, a: Any, other: Any, **options: Any) -> Nodes:
        for x, y in ((a, other), (other, a)):
            if not isinstance(y, Tensor):
                if y != 0:
                    raise NotUnderstood("of a constant")
                return self.nodes(x)
        p, q = self.pair(a, other)
        if self.on.is_constant(p) or self.on.is_constant(q):
            raise NotUnderstood("of a constant")
        return self.on.add(p, q)

    def multiply(self, out: Tensor, a: Any, other: Any) -> Nodes:
        if not isinstance(other, Tensor):
            return self.nodes(a)
        return self.on.multiply(*self.pair(a, other)) if isinstance(a, Tensor) else self.nodes(other)

    def divide(self, out: Tensor, a: Any, other: Any, rounding_mode: str | None = None) -> Nodes:
        if rounding_mode is not None or not isinstance(a, Tensor):
            raise NotUnderstood
        return self.on.multiply(*self.pair(a, other), divide=True) if isinstance(other, Tensor) else self.nodes(a)

    def clamp(self, out: Tensor, x: Tensor, min: Any = None, max: Any = None) -> Nodes:
        if not _is_zero(min) or max not in (None, float("inf")):
            raise NotUnderstood
        return self.nodes(x)

    # rules that are told the function

    def rearrange(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        if any(isinstance(a, torch.dtype) for a in tree_leaves((args, kwargs))):
            raise NotUnderstood("reinterpreted as another dtype")
        if any(t.is_meta and not is_continuous(t) for t in tensors_in((args, kwargs))):
            raise NotUnderstood("computed indices")
        # a view of the value may need a copy of its nodes, which have strides of their own
        copying: dict[str, Callable[..., Any]] = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
        func = copying.get(name_of(func), func)
        try:
            self.refuse_drawn(func, args, kwargs)
            args, kwargs = tree_map_only(Tensor, lambda t: self.as_tensor(t) if is_continuous(t) else t, (args, kwargs))
            return tree_map_only(Tensor, Tensor.numpy, func(*args, **kwargs))
        except (IndexError, RuntimeError) as error:  # another function of the same name
            raise NotUnderstood from error

    def as_tensor(self, t: Tensor) -> Tensor:
        """The nodes of a value, for torch to move them about."""
        nodes = self.nodes(t)
        return torch.from_numpy(compact(nodes)[0].copy()).expand(nodes.shape)

    def refuse_drawn(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Indices that were drawn may only select along dimensions along which the nodes are equal."""
        tensors = tensors_in((args, kwargs))
        values = [t for t in tensors if is_continuous(t)]
        drawn = {id(t) for t in tensors if id(t) in self.drawn and not is_continuous(t)}
        if not values or not drawn:
            return
        nodes = self.nodes(values[0])
        shape = [max(2, n) for n in nodes.shape]  # 0 and 1 are indices along every dimension
        differ = [n if n > 1 and step else 1 for n, step in zip(nodes.shape, nodes.strides, strict=True)]
        places = torch.arange(math.prod(differ)).reshape(differ).expand(shape)

        def select(index: int) -> Tensor:
            def convert(t: Tensor) -> Tensor:
                return places if is_continuous(t) else torch.full_like(t, index) if id(t) in drawn else t

            a, k = tree_map_only(Tensor, convert, (args, kwargs))
            return func(*a, **k)  # type: ignore[no-any-return]

        if not torch.equal(select(0), select(1)):
            raise NotUnderstood("random indices")


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_meta and not value.any()
    return value is not None and value == 0


Rule = Callable[[_Describe, Callable[..., Any], Any, Any, Any], Any]


def _made(rule: Callable[..., Any]) -> Rule:
    """A rule that is told the result and the arguments; others than it expects are not understood."""
    signature = inspect.signature(rule)

    def apply(describe: _Describe, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        try:
            bound = signature.bind(describe, out, *args, **kwargs)
        except TypeError as error:
            raise NotUnderstood("of this form") from error
        return rule(*bound.args, **bound.kwargs)

    return apply


def _pooled(spatial: int) -> Rule:
    def apply(describe: _Describe, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        nodes = describe.nodes(args[0])
        return describe.on.pool(nodes, range(nodes.ndim - spatial, nodes.ndim), tensors_in(out)[0].shape)

    return apply


def _normalized(describe: _Describe, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
    if func is not F.batch_norm:
        raise NotUnderstood
    return describe.normalization(out, *args, **kwargs)


# what is in neither table pins what it reads. These may be done in place:
# fmt: off
ELEMENTWISE: dict[str, Rule] = {
    # f(c x) = c f(x) for c > 0, element by element, whatever the other arguments are
    **dict.fromkeys((
        "abs", "absolute", "bfloat16", "clone", "contiguous", "cpu", "cuda", "double", "dropout", "dropout1d",
        "dropout2d", "dropout3d", "feature_dropout", "float", "half", "leaky_relu", "neg", "negative", "positive",
        "relu", "requires_grad_", "rrelu", "to", "type", "type_as",
    ), _made(_Describe.same)),
    **dict.fromkeys(("add", "rsub", "sub", "subtract"), _made(_Describe.add)),
    **dict.fromkeys(("clamp", "clamp_min", "clip"), _made(_Describe.clamp)),
    **dict.fromkeys(("div", "divide", "true_divide"), _made(_Describe.divide)),
    **dict.fromkeys(("mul", "multiply"), _made(_Describe.multiply)),
}
RULES: dict[str, Rule] = {
    "batch_norm": _normalized,
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), _made(_Describe.convolution)),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), _made(_Describe.transposed_convolution)),
    "group_norm": _made(_Describe.group_norm),
    "layer_norm": _made(_Describe.layer_norm),
    "linear": _made(_Describe.linear),
    **dict.fromkeys(("__matmul__", "bmm", "matmul", "mm"), _made(_Describe.matmul)),
    "pad": _made(_Describe.pad),
    "prelu": _made(_Describe.prelu),
    "rms_norm": _made(_Describe.rms_norm),
    "scaled_dot_product_attention": _made(_Describe.attention),
    **dict.fromkeys(("interpolate", "upsample"), _made(_Describe.interpolate)),
    **dict.fromkeys(("amax", "amin", "mean", "sum"), _made(_Describe.reduce)),
    **dict.fromkeys(("max", "maximum", "min", "minimum"), _made(_Describe.extremum)),
    **{
        f"{kind}_{pool}{n}d{more}": _pooled(n)
        for n in (1, 2, 3)
        for kind in ("adaptive_avg", "adaptive_max", "avg", "fractional_max", "lp", "max")
        for pool in ("pool", "unpool")
        for more in ("", "_with_indices")
    },
    # of an argument only its shape and dtype are used
    **dict.fromkeys((
        "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "rand_like",
        "randint_like", "randn_like", "zeros_like",
    ), _made(_Describe.make)),
    # each element of the result is an element of an argument
    **dict.fromkeys((
        "T", "__getitem__", "broadcast_to", "cat", "channel_shuffle", "chunk", "concat", "concatenate", "dsplit",
        "dstack", "expand", "expand_as", "flatten", "flip", "hsplit", "hstack", "index_select", "mT", "moveaxis",
        "movedim", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave", "reshape",
        "reshape_as", "roll", "select", "split", "split_with_sizes", "squeeze", "stack", "swapaxes", "swapdims", "t",
        "tensor_split", "tile", "transpose", "unbind", "unflatten", "unfold", "unsafe_chunk", "unsafe_split",
        "unsqueeze", "view", "view_as", "vsplit", "vstack",
    ), _Describe.rearrange),
}
# fmt: on
