"""From a PyTorch module to `gsgd.Network`.

The module is copied to the meta device (shapes, no values) and run once on inputs without values, while every torch
function is observed. Each value carries an integer tensor of its own shape: the network's node of every element.
Whatever moves elements about (reshape, permute, cat, slices, channel shuffles) then moves the nodes about in just the
same way, and a layer reads its columns' nodes off its input.

Four rules make it safe. An operation that is not known to be positively homogeneous pins every unit that it reads.
A parameter is described only if the whole forward pass reads it once, and a layer does. Elements that must scale
alike (those that one weight meets, that are added, pooled, or overwritten in place) become one unit. A value that
no observed operation made is an error.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gsgd.network import BatchNormMode, Features, Network, Residual, segment
from gsgd.trace.names import match

Nodes = NDArray[np.int64]

# fmt: off
# f(c x) = c f(x) for c > 0, element by element, whatever the other arguments are
HOMOGENEOUS = {
    "abs", "absolute", "bfloat16", "clone", "contiguous", "cpu", "cuda", "double", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "feature_dropout", "float", "half", "leaky_relu", "neg", "negative", "positive",
    "relu", "requires_grad_", "rrelu", "to", "type", "type_as",
}
# each element of the result is an element of an argument
REARRANGING = {
    "T", "__getitem__", "broadcast_to", "cat", "channel_shuffle", "chunk", "concat", "concatenate", "dsplit",
    "dstack", "expand", "expand_as", "flatten", "flip", "hsplit", "hstack", "index_select", "mT", "moveaxis",
    "movedim", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave", "reshape",
    "reshape_as", "roll", "select", "split", "split_with_sizes", "squeeze", "stack", "swapaxes", "swapdims", "t",
    "tensor_split", "tile", "transpose", "unbind", "unflatten", "unfold", "unsafe_chunk", "unsafe_split",
    "unsqueeze", "view", "view_as", "vsplit", "vstack",
}
# what they draw differs from pass to pass
DRAWING = {
    "bernoulli", "binomial", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "poisson",
    "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random", "randperm", "uniform",
}
# fmt: on
# of an argument only its shape and dtype are used
MAKING = re.compile(r"(zeros|ones|empty|full|rand|randn|randint)_like|new_(zeros|ones|empty|full)")
POOLING = re.compile(r"(adaptive_|fractional_)?(max|avg|lp)_(un)?pool([123])d(_with_indices)?")
REDUCING = {"sum", "mean", "amax", "amin", "max", "min"}
CONVOLUTION = re.compile(r"conv(_transpose)?([123])d")

_OUT_OF_SIGHT = "it reads a value made out of sight: by TorchScript, vmap or an extension"
# where torch keeps its kernels without values that are written in Python
_KERNELS = ("torch._refs", "torch._prims", "torch._decomp", "torch._meta_registrations")
_TRIED_SIZES = (224, 32, 28, 64, 96, 128, 256, 299, 16, 8)  # spatial extents, when no example inputs are given
_LITERALS = (bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _NotUnderstood(Exception):
    """The operation pins what it reads; the message says why, beyond its name."""


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
    ghost, parameters = _ghost(inner, names)
    left_out = match(leave_out, names.values(), "leave_out")
    ends = {pin_after} if isinstance(pin_after, str) else set(pin_after)
    outer = {id(module): name for name, module in model.named_modules()}
    match(ends, outer.values(), "pin_after")
    ends = {name for name, module in inner.named_modules() if outer[id(module)] in ends}
    given = arguments(example_inputs) if example_inputs is not None else None
    args, kwargs, reads = _count_reads(ghost, given, {id(p) for p in inner.parameters()})
    describe = _Describe(Network(), residual, batch_norm, parameters, reads, ends)
    describe.follow(ghost, args, kwargs)
    alone = set(parameters.values())
    net = describe.net.without([name for name in left_out if name in describe.net.shapes], "left out")
    net.add_plain(left_out, "left out")
    for name in names.values():
        if name not in net.shapes:
            read = describe.reasons.get(name, "not read by the forward pass")
            net.add_plain([name], read if name in alone else "shares its memory with another")
    return net


def unwrap(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """The module inside DataParallel, DDP and torch.compile, and its parameters' names -> those of `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inner: Any = model
    while isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    outer = {id(p): name for name, p in model.named_parameters()}
    return inner, {name: outer[id(p)] for name, p in inner.named_parameters()}


def copy_model(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of `model` with every tensor `convert`ed on the way, so that nothing is held twice."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in _own_tensors(module):
            if nn.parameter.is_lazy(t):
                raise ValueError(f"{type(module).__name__} is lazy: run the model once before it is traced")
            new = convert(t.detach())
            memo[id(t)] = nn.Parameter(new, _continuous(new)) if isinstance(t, nn.Parameter) else new
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"the model can't be copied ({type(error).__name__}: {error}): describe it by hand, and pass network="
        ) from error
    for module in copied.modules():
        if isinstance(module, nn.SyncBatchNorm):  # it insists on a GPU
            module.forward = nn.BatchNorm3d.forward.__get__(module)  # type: ignore[method-assign]
    return copied


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers and plain attributes."""
    return _tensors([module._parameters, module._buffers, *vars(module).values()])


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the forward pass."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}


@contextmanager
def kept_random_states() -> Iterator[None]:
    """What is drawn inside leaves torch's and Python's states as they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


def output_tensors(out: Any) -> list[Tensor]:
    """The tensors of real or complex numbers in what a model returns."""
    tensors = []
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            tensors += [leaf] if _continuous(leaf) else []
        elif isinstance(leaf, Mapping):
            tensors += output_tensors(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf):
            tensors += output_tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        elif hasattr(leaf, "to_tuple"):
            tensors += output_tensors(leaf.to_tuple())
        elif not isinstance(leaf, bool | int | float | str | None):
            raise TypeError(
                f"the model returns a {type(leaf).__name__}, which can't be looked into: expected tensors, or tuples, "
                "lists, dicts and dataclasses of them. Wrap the model in a module that returns such"
            )
    return tensors


def _ghost(model: nn.Module, names: Mapping[str, str]) -> tuple[nn.Module, dict[int, str]]:
    """A copy of `model` without values, in training mode, and the names of its parameters by identity."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"module {name!r}" if name else "the model"
            raise ValueError(f"{where} is compiled by TorchScript, and can't be seen into")
    # integers keep their values: they are indices, such as a fixed permutation of channels
    ghost = copy_model(model, lambda t: t.to("meta") if _continuous(t) else t.to("cpu", copy=True)).train()
    for module in ghost.modules():  # nothing goes backward here
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    places = Counter(p.data_ptr() for p in model.parameters() if p.data_ptr())
    alone = {name for name, p in model.named_parameters() if places[p.data_ptr()] <= 1}
    return ghost, {id(p): names[name] for name, p in ghost.named_parameters() if name in alone}


def _count_reads(
    ghost: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]] | None, originals: set[int]
) -> tuple[tuple[Any, ...], dict[str, Any], Counter[int]]:
    """Arguments on which `ghost` runs, and how often it then reads every tensor (by identity)."""
    failure: Exception | None = None
    for args, kwargs in [given] if given is not None else _guesses(ghost):
        mode = _CountReads(originals)
        try:
            mode.follow(ghost, args, kwargs)
        except ValueError as error:
            if _asks_for_values(error.__cause__):  # other inputs would not help
                raise
            failure = failure or error
        else:
            return args, kwargs, mode.reads
    if given is not None and failure is not None:
        raise failure
    reason = f" (the first that was tried: {failure})" if failure else ""
    raise ValueError(f"no input was found on which the model runs: pass example_inputs{reason}") from failure


def _asks_for_values(error: BaseException | None) -> bool:
    return re.search(r"(?<![a-z])meta(?![a-z])", str(error), re.IGNORECASE) is not None


def _guesses(model: nn.Module) -> Iterator[tuple[tuple[Tensor], dict[str, Any]]]:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shapes = [(2, module.in_features), (2, 16, module.in_features)]
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            shapes = [(2, module.in_channels, *(size,) * len(module.kernel_size)) for size in _TRIED_SIZES]
        else:
            continue
        for shape in shapes:
            yield (torch.empty(shape, device="meta", dtype=module.weight.dtype),), {}
        return


def _name(func: Callable[..., Any]) -> str:
    """A name for torch's own functions; others', with their module, are none that is known here."""
    if isinstance(func, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        return str(func)
    name: str = getattr(func, "__name__", repr(func))
    if name == "__get__":  # a property
        return func.__self__.__name__  # type: ignore[attr-defined, no-any-return]
    module = getattr(func, "__module__", None) or "torch"
    return name if module.partition(".")[0] == "torch" else f"{module}.{name}"


def _call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`func` without values: constants follow meta tensors to their device, and nothing leaves it."""
    if not any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs))
    name = _name(func)
    if name in ("cpu", "cuda"):
        return args[0]
    if name == "to":
        dtypes = [a.dtype if isinstance(a, Tensor) else a for a in (*args[1:], *kwargs.values())]
        return args[0].to(next((a for a in dtypes if isinstance(a, torch.dtype)), args[0].dtype))
    if func is F.batch_norm:  # it would refuse a batch of one
        return args[0].clone()
    return func(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _continuous(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


class _Follow(TorchFunctionMode):
    """Runs a model without values and hands every call of a torch function to `see`."""

    def follow(self, ghost: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model = copy.deepcopy(ghost, {id(p): p for p in ghost.parameters()})  # whatever a run leaves behind is dropped
        self.path: list[str] = []
        self.current = ""
        for name, module in model.named_modules():
            self.enter(_own_tensors(module))
            module.register_forward_pre_hook(lambda _module, _args, name=name: self.path.append(name))
            module.register_forward_hook(lambda _module, _args, out, name=name: self.leave(name, out))
        args, kwargs = tree_map_only(Tensor, self.start, (args, kwargs))
        try:
            with kept_random_states(), torch.enable_grad(), torch.compiler.set_stance("force_eager"), self:
                out = model(*args, **kwargs)
        except Exception as error:
            where = self.current or "the arguments of forward"
            message = f"the model can't be followed, at {where}: {type(error).__name__}: {error}"
            if _asks_for_values(error):
                message += " (a tensor's values are asked for; describe such a network by hand)"
            raise ValueError(message) from error
        self.finish(model, output_tensors(out))

    def leave(self, name: str, out: Any) -> None:
        """The module of this name has returned."""
        self.path.pop()

    def start(self, t: Tensor) -> Tensor:
        """An argument without values."""
        return t.detach().to("meta")

    def enter(self, tensors: list[Tensor]) -> None: ...

    def finish(self, model: nn.Module, outputs: list[Tensor]) -> None: ...

    def see(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_KERNELS):  # of an operation that was not seen
            raise ValueError(_OUT_OF_SIGHT)
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        self.current = f"{_name(func).strip('_')} in {(self.path or [''])[-1] or 'the model'}"
        out = _call(func, args, kwargs)
        metadata = out is not None and all(isinstance(leaf, _LITERALS) for leaf in tree_leaves(out))
        if not metadata:
            self.see(func, args, kwargs, out)
        return out


class _CountReads(_Follow):
    def __init__(self, originals: set[int]) -> None:
        super().__init__()
        self.originals = originals  # parameters of which `ghost` has copies
        self.reads: Counter[int] = Counter()

    def see(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        reads = [id(t) for t in _tensors((args, kwargs))]
        if not self.originals.isdisjoint(reads):
            raise ValueError("forward refers to the original model, by a closure: it must read parameters through self")
        self.reads.update(reads)


class _Describe(_Follow):
    """Builds `net`. A value's nodes are an int64 tensor of its shape, expanded (stride 0) wherever it can be."""

    def __init__(
        self,
        net: Network,
        residual: Residual,
        batch_norm: BatchNormMode,
        parameters: Mapping[int, str],
        reads: Mapping[int, int],
        ends: Collection[str],
    ) -> None:
        super().__init__()
        self.net, self.residual, self.batch_norm = net, residual, batch_norm
        self.parameters, self.reads, self.ends = parameters, reads, ends
        self.constant = int(net.input(1, "constant").per_feature[0])
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # id -> the value, kept alive, and its nodes
        self.drawn: set[int] = set()  # ids of what was made of random numbers
        self.reasons: dict[str, str] = {}  # of parameters: what reads them first

    # values

    def nodes(self, t: Tensor) -> Tensor:
        if id(t) in self.known:
            return self.known[id(t)][1]
        if t.is_meta:
            raise ValueError(_OUT_OF_SIGHT)
        return _scalar(self.constant).expand(t.shape)

    def know(self, t: Tensor, nodes: Tensor) -> None:
        if id(t) in self.known:  # made in place: what views of it were taken to be must stay true
            before = self.known[id(t)][1]
            if before.shape == nodes.shape:
                self.tie(before, nodes)
        self.known[id(t)] = (t, _expanded(nodes))

    def start(self, t: Tensor) -> Tensor:
        t = super().start(t)
        dim = min(1, t.ndim - 1)
        self.know(t, _along(self.net.input(t.shape[dim] if t.ndim else 1).per_feature, dim, t.shape))
        return t

    def enter(self, tensors: list[Tensor]) -> None:
        self.known.update((id(t), (t, _scalar(self.constant).expand(t.shape))) for t in tensors)

    def leave(self, name: str, out: Any) -> None:
        super().leave(name, out)
        if name in self.ends:
            for t in output_tensors(out):
                self.pin(self.nodes(t), f"output of {name}")

    def finish(self, model: nn.Module, outputs: list[Tensor]) -> None:
        for t in outputs:
            self.pin(self.nodes(t), "network output")
        for name, module in model.named_modules():
            for t in _own_tensors(module):
                self.pin(self.nodes(t), f"kept by {name or 'the model'}")
        self.net.pin_unmet()

    def pin(self, nodes: Tensor, reason: str) -> None:
        self.net.nodes.pin(_compact(nodes)[0], reason)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Make one unit of each pair of elements."""
        self.net.nodes.tie(*_compact(a, b))

    def collapse(self, nodes: Tensor, dims: Iterable[int]) -> Tensor:
        """What stands along `dims`, which keep extent 1, made one unit."""
        for d in dims:
            if nodes.shape[d] == 0:
                raise _NotUnderstood("of no elements")
            first = nodes.narrow(d, 0, 1)
            self.tie(first.expand_as(nodes), nodes)
            nodes = first
        return nodes

    def read(self, x: Tensor, dim: int) -> Nodes:
        """The nodes along `dim`, for a layer whose weights meet all that stands along the other dimensions."""
        nodes = self.nodes(x)
        dim %= nodes.ndim
        return self.collapse(nodes, (d for d in range(nodes.ndim) if d != dim)).flatten().numpy()

    def described(self, t: Any) -> str | None:
        """The name under which a parameter can be described: nothing else may read it."""
        return self.parameters[id(t)] if id(t) in self.parameters and self.reads[id(t)] == 1 else None

    def weight(self, t: Any) -> str:
        name = self.described(t)
        if name is None:
            if id(t) in self.parameters:
                raise _NotUnderstood(f"its weight {self.parameters[id(t)]} is read {self.reads[id(t)]} times")
            raise _NotUnderstood("its weight is computed, or shares its memory")
        if not t.numel():
            raise _NotUnderstood("its weight has no entries")
        return name

    # operations

    def see(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        reads = [t for t in _tensors((args, kwargs)) if _continuous(t)]
        results = [t for t in _tensors(out) if _continuous(t)]
        reason = self.current
        if _name(func).strip("_") in DRAWING or any(id(t) in self.drawn for t in _tensors((args, kwargs))):
            self.drawn.update(id(t) for t in _tensors((out, args[:1] if out is None else ())))
        try:
            if not torch.is_grad_enabled():
                raise _NotUnderstood("without gradients")
            if kwargs.get("out") is not None:
                raise _NotUnderstood("out=")
            made = self.describe(func, args, kwargs, out)
            nodes = list(made) if isinstance(made, tuple | list) else [made]
            if [n.shape for n in nodes] != [t.shape for t in results]:
                raise _NotUnderstood("an unexpected result")
        except _NotUnderstood as why:
            reason = f"{self.current}: {why}".removesuffix(": ")
            for t in reads:
                self.pin(self.nodes(t), reason)
            node = int(self.net.input(1, reason).per_feature[0]) if reads and results else self.constant
            nodes = [_scalar(node).expand(t.shape) for t in results]
        for t in reads:
            if id(t) in self.parameters:
                self.reasons.setdefault(self.parameters[id(t)], reason)
        for t, n in zip(results, nodes, strict=True):
            self.know(t, n)
        for t in _tensors(out):
            self.known.setdefault(id(t), (t, _scalar(self.constant).expand(t.shape)))  # indices and masks

    def describe(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Tensor | Any:
        """The nodes of what `func` returns (of its real or complex tensors)."""
        name = _name(func)
        plain = name.strip("_") if name.endswith("_") else name  # in place or not
        if name == "linear":
            return self.linear(out, *args, **kwargs)
        if match := CONVOLUTION.fullmatch(name):
            return self.convolution(out, bool(match[1]), int(match[2]), *args, **kwargs)
        if func is F.batch_norm:
            return self.normalization(*args, **kwargs)
        if plain in HOMOGENEOUS or name in HOMOGENEOUS:
            return self.nodes(args[0])
        if name == "prelu":
            return self.prelu(*args, **kwargs)
        if name in REARRANGING:
            return self.rearrange(func, args, kwargs)
        if MAKING.fullmatch(name):
            return _scalar(self.constant).expand(out.shape)
        if match := POOLING.fullmatch(name):
            return self.pool(args[0], int(match[4]), _tensors(out)[0].shape)
        if name in ("interpolate", "upsample"):
            return self.pool(args[0], out.ndim - 2, out.shape)
        if name == "pad":
            return self.pad(out.shape, *args, **kwargs)
        if plain in ("add", "sub", "subtract", "rsub"):
            return self.add(args[0], args[1] if len(args) > 1 else kwargs["other"])
        if plain in ("mul", "multiply", "div", "divide", "true_divide") and kwargs.get("rounding_mode") is None:
            return self.multiply(args[0], args[1] if len(args) > 1 else kwargs["other"], "div" in plain)
        if plain in ("clamp", "clip", "clamp_min"):
            return self.clamp(*args, **kwargs)
        if name in ("maximum", "minimum", "max", "min") and len(_tensors(args)) == 2:
            return self.extremum(*args)
        if name in REDUCING and kwargs.keys() <= {"dim", "axis", "keepdim", "dtype"}:
            return self.reduce(args, kwargs, _tensors(out)[0].shape)
        raise _NotUnderstood

    def linear(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        name = self.weight(weight)
        nodes = self.read(x, -1)
        part = (nodes, 1, "channels_first") if self.net.nodes.is_pinned(nodes).all() else segment(nodes)
        features = Features(self.net, (part,))
        y = self.net.dense(name, features, weight.shape[0], bias=self.described(bias))
        return self.written(y, bias, -1, out.shape)

    def convolution(
        self,
        out: Tensor,
        transposed: bool,
        spatial: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        *more: Any,
        **kwargs: Any,
    ) -> Tensor:
        # conv(..., dilation, groups) and conv_transpose(..., output_padding, groups, dilation)
        groups = kwargs.get("groups", more[1] if len(more) > 1 else 1)
        name = self.weight(weight)
        channels = self.net.features(self.read(x, -spatial - 1))
        layout = "iohw" if transposed else "oihw"
        y = self.net.conv(
            name,
            channels,
            out.shape[-spatial - 1],
            tuple(weight.shape[2:]),
            groups=groups,
            bias=self.described(bias),
            layout=layout.replace("hw", "dhw"[3 - spatial :]),
        )
        return self.written(y, bias, -spatial - 1, out.shape)

    def written(self, y: Features, bias: Tensor | None, dim: int, shape: torch.Size) -> Tensor:
        if bias is not None and self.described(bias) is None:
            reason = f"{self.current}: its bias is read elsewhere, or computed"
            self.pin(self.nodes(bias), reason)
            self.net.pin(y, reason)
        return _along(y.per_feature, dim, shape)

    def normalization(
        self,
        x: Tensor,
        mean: Any,
        var: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *_: Any,
        **options: Any,
    ) -> Tensor:
        channels = self.net.features(self.read(x, 1))
        if self.batch_norm != "exact" and not self.net.is_written(channels):
            raise _NotUnderstood("no layer is right before it")
        if weight is not None and self.described(weight) is None:
            self.pin(self.nodes(weight), f"{self.current}: as its weight")
        y = self.net.batch_norm(channels, self.described(weight), self.described(bias), self.batch_norm)
        return self.written(y, bias, 1, x.shape)

    def prelu(self, x: Tensor, weight: Tensor) -> Tensor:
        self.pin(self.nodes(weight), f"{self.current}: as its slope")
        return self.nodes(x)

    def rearrange(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if any(isinstance(a, torch.dtype) for a in tree_leaves((args, kwargs))):
            raise _NotUnderstood("reinterpreted as another dtype")
        if any(t.is_meta and not _continuous(t) for t in _tensors((args, kwargs))):
            raise _NotUnderstood("computed indices")
        # a view of the value may need a copy of its nodes, which have strides of their own
        copying: dict[str, Callable[..., Any]] = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
        func = copying.get(_name(func), func)
        try:
            self.refuse_drawn(func, args, kwargs)
            args, kwargs = tree_map_only(Tensor, lambda t: self.nodes(t) if _continuous(t) else t, (args, kwargs))
            return func(*args, **kwargs)
        except (IndexError, RuntimeError) as error:  # another function of the same name
            raise _NotUnderstood from error

    def refuse_drawn(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Indices that were drawn may only select along dimensions along which the nodes are equal."""
        tensors = _tensors((args, kwargs))
        values = [t for t in tensors if _continuous(t)]
        drawn = {id(t) for t in tensors if id(t) in self.drawn and not _continuous(t)}
        if not values or not drawn:
            return
        nodes = self.nodes(values[0])
        shape = [max(2, n) for n in nodes.shape]  # 0 and 1 are indices along every dimension
        differ = [n if n > 1 and step else 1 for n, step in zip(nodes.shape, nodes.stride(), strict=True)]
        places = torch.arange(math.prod(differ)).reshape(differ).expand(shape)

        def select(index: int) -> Tensor:
            def convert(t: Tensor) -> Tensor:
                return places if _continuous(t) else torch.full_like(t, index) if id(t) in drawn else t

            a, k = tree_map_only(Tensor, convert, (args, kwargs))
            return func(*a, **k)  # type: ignore[no-any-return]

        if not torch.equal(select(0), select(1)):
            raise _NotUnderstood("random indices")

    def pool(self, x: Tensor, spatial: int, shape: torch.Size) -> Tensor:
        nodes = self.nodes(x)
        return self.collapse(nodes, range(nodes.ndim - spatial, nodes.ndim)).expand(shape)

    def reduce(self, args: Any, kwargs: Any, shape: torch.Size) -> Tensor:
        nodes = self.nodes(args[0])
        dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        dims = [dims] if isinstance(dims, int) else dims or range(nodes.ndim)
        return self.collapse(nodes, [d % nodes.ndim for d in dims]).reshape(shape)

    def pad(self, shape: torch.Size, x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
        """Zeros, like copies of an element, scale as what they stand next to; channels of zeros are new units."""
        if mode == "constant" and value:
            raise _NotUnderstood(f"value={value}")
        nodes = self.nodes(x)
        for i in range(len(pad) // 2):
            d, (before, after) = nodes.ndim - 1 - i, pad[2 * i : 2 * i + 2]
            if before == after == 0:
                continue
            if mode != "constant" or nodes.stride(d) == 0:
                nodes = self.collapse(nodes, [d]).expand(*nodes.shape[:d], shape[d], *nodes.shape[d + 1 :])
                continue
            nodes = nodes.narrow(d, max(0, -before), nodes.shape[d] - max(0, -before) - max(0, -after))
            zeros = [self.net.nodes.new(max(0, n), "zero padding") for n in (before, after)]
            ends = [_along(z, d, (*nodes.shape[:d], len(z), *nodes.shape[d + 1 :])) for z in zeros]
            nodes = torch.cat([ends[0], nodes, ends[1]], d)
        return nodes

    def pair(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        shape = np.broadcast_shapes(a.shape, b.shape)
        return self.nodes(a).expand(shape), self.nodes(b).expand(shape)

    def add(self, a: Any, b: Any) -> Tensor:
        for x, y in ((a, b), (b, a)):
            if not isinstance(y, Tensor):
                if y != 0:
                    raise _NotUnderstood("of a constant")
                return self.nodes(x)
        p, q = self.pair(a, b)
        x, y = _compact(p, q)
        if (x == self.constant).all() or (y == self.constant).all():
            raise _NotUnderstood("of a constant")
        pairs, which = np.unique(np.stack([x.ravel(), y.ravel()]), axis=1, return_inverse=True)
        terms = [self.net.features(nodes) for nodes in pairs]
        out = self.net.add(*terms, residual=self.residual).per_feature
        return torch.from_numpy(out[which].reshape(x.shape)).expand(p.shape)

    def multiply(self, a: Any, b: Any, divide: bool) -> Tensor:
        """A product scales as one factor if the other one is pinned."""
        if not isinstance(b, Tensor):
            return self.nodes(a)
        if not isinstance(a, Tensor):
            if divide:
                raise _NotUnderstood
            return self.nodes(b)
        p, q = self.pair(a, b)
        x, y = _compact(p, q)
        fixed = [self.net.nodes.is_pinned(n) for n in (x, y)]
        if not (fixed[1] if divide else fixed[0] | fixed[1]).all():
            raise _NotUnderstood("by a feature")
        return torch.from_numpy(np.where(fixed[1], x, y)).expand(p.shape)

    def clamp(self, x: Tensor, min: Any = None, max: Any = None) -> Tensor:
        if not _is_zero(min) or max not in (None, float("inf")):
            raise _NotUnderstood
        return self.nodes(x)

    def extremum(self, a: Tensor, b: Tensor) -> Tensor:
        p, q = self.pair(a, b)
        if _is_zero(b):
            return p
        self.tie(p, q)
        return p


def _scalar(node: int) -> Tensor:
    return torch.tensor(node, device="cpu")


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_meta and not value.any()
    return value is not None and value == 0


def _along(nodes: Nodes, dim: int, shape: tuple[int, ...]) -> Tensor:
    """`nodes` along one dimension of `shape`, the same along the others."""
    view = [1] * len(shape)
    if view:
        view[dim] = -1
    return torch.from_numpy(nodes).reshape(view).expand(shape)


def _expanded(nodes: Tensor) -> Tensor:
    """The same nodes with stride 0 along every dimension along which they are equal."""
    index = tuple(slice(0, 1) if step == 0 else slice(None) for step in nodes.stride())
    small = nodes[index]
    for d in range(small.ndim):
        first = small.narrow(d, 0, min(1, small.shape[d]))
        if torch.equal(first.expand_as(small), small):
            small = first
    return small.expand(nodes.shape)


def _compact(*tensors: Tensor) -> tuple[Nodes, ...]:
    """Tensors of one shape, with extent 1 along dimensions along which all of them are expanded."""
    strides = zip(*(t.stride() for t in tensors), strict=True)
    index = tuple(slice(None) if any(steps) else slice(0, 1) for steps in strides)
    return tuple(t[index].numpy() for t in tensors)
