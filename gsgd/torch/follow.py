"""Runs of a PyTorch module without values, in which every call of a torch function is seen.

The module is copied to the meta device (shapes, no values). A value that no observed operation made is an error.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gsgd.torch.memory import converted, held_tensors, shared_parameters

OUT_OF_SIGHT = "it reads a value made out of sight: by TorchScript, vmap or an extension"
# where torch keeps its kernels without values that are written in Python
_KERNELS = ("torch._refs", "torch._prims", "torch._decomp", "torch._meta_registrations")
_TRIED_SIZES = (224, 32, 28, 64, 96, 128, 256, 299, 16, 8)  # spatial extents, when no example inputs are given
_LITERALS = (bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)


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
    """A deep copy of `model` with every tensor `convert`ed on the way; what shares memory does so in the copy."""
    for module in model.modules():
        if any(map(nn.parameter.is_lazy, own_tensors(module))):
            raise ValueError(f"{type(module).__name__} is lazy: run the model once before it is traced")
    tensors = held_tensors(model)
    memo: dict[int, Any] = dict(converted(tensors, convert))
    for t in tensors:
        if isinstance(t, nn.Parameter):
            memo[id(t)] = nn.Parameter(memo[id(t)], is_continuous(memo[id(t)]))
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


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers and plain attributes."""
    return tensors_in([module._parameters, module._buffers, *vars(module).values()])


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the forward pass."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}


@contextmanager
def kept_random_states() -> Iterator[None]:
    """What is drawn inside leaves torch's, Python's and NumPy's states as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def output_tensors(out: Any) -> list[Tensor]:
    """The tensors of real or complex numbers in what a model returns."""
    tensors = []
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            tensors += [leaf] if is_continuous(leaf) else []
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


def copy_without_values(model: nn.Module, names: Mapping[str, str]) -> tuple[nn.Module, dict[int, str]]:
    """A copy of `model` without values, in training mode, and the names of its parameters by identity."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"module {name!r}" if name else "the model"
            raise ValueError(f"{where} is compiled by TorchScript, and can't be seen into")
    # integers keep their values: they are indices, such as a fixed permutation of channels
    ghost = copy_model(model, lambda t: t.to("meta") if is_continuous(t) else t.to("cpu", copy=True)).train()
    for module in ghost.modules():  # nothing goes backward here
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    shared = shared_parameters(model)
    return ghost, {id(p): names[name] for name, p in ghost.named_parameters() if name not in shared}


def count_reads(
    ghost: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]] | None, originals: set[int]
) -> tuple[tuple[Any, ...], dict[str, Any], Counter[int]]:
    """Arguments on which `ghost` runs, and how often it then reads every tensor (by identity)."""
    failure: Exception | None = None
    first: tuple[tuple[Any, ...], dict[str, Any], _CountReads] | None = None
    for args, kwargs in [given] if given is not None else _guesses(ghost):
        mode = _CountReads(originals)
        try:
            mode.follow(ghost, args, kwargs)
        except ValueError as error:
            if _asks_for_values(error.__cause__):  # other inputs would not help
                raise
            failure = failure or error
            continue
        if given is not None:
            return args, kwargs, mode.reads
        if first is None:
            first = args, kwargs, mode
            continue
        if mode.calls != first[2].calls:
            one, other = (tuple(x.shape) for x in (first[0][0], args[0]))
            warnings.warn(
                f"the model calls other functions on inputs of shape {one}, with which it was traced, than on those of "
                f"{other}: pass example_inputs of the shape that it is trained on",
                stacklevel=4,
            )
        break
    if first is not None:
        return first[0], first[1], first[2].reads
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


def name_of(func: Callable[..., Any]) -> str:
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
    name = name_of(func)
    if name in ("cpu", "cuda"):
        return args[0]
    if name == "to":
        dtypes = [a.dtype if isinstance(a, Tensor) else a for a in (*args[1:], *kwargs.values())]
        return args[0].to(next((a for a in dtypes if isinstance(a, torch.dtype)), args[0].dtype))
    if func is F.batch_norm:  # it would refuse a batch of one
        return args[0].clone()
    return func(*args, **kwargs)


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def is_continuous(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


class Follow(TorchFunctionMode):
    """Runs a model without values and hands every call of a torch function to `see`."""

    def follow(self, ghost: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model = copy.deepcopy(ghost, {id(p): p for p in ghost.parameters()})  # whatever a run leaves behind is dropped
        self.path: list[str] = []
        self.current = ""
        self.enter(held_tensors(model))
        for name, module in model.named_modules():
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
            raise ValueError(OUT_OF_SIGHT)
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        self.current = f"{name_of(func).strip('_')} in {(self.path or [''])[-1] or 'the model'}"
        out = _call(func, args, kwargs)
        metadata = out is not None and all(isinstance(leaf, _LITERALS) for leaf in tree_leaves(out))
        if not metadata:
            self.see(func, args, kwargs, out)
        return out


def _base(t: Tensor) -> Tensor:
    """What `t` is a view of, or `t`."""
    return t if t._base is None else t._base


class _CountReads(Follow):
    def __init__(self, originals: set[int]) -> None:
        super().__init__()
        self.originals = originals  # parameters of which `ghost` has copies
        self.reads: Counter[int] = Counter()
        self.calls: list[str] = []

    def see(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        self.calls.append(name_of(func))
        viewed = {id(_base(t)) for t in tensors_in(out)}
        views = viewed if len(viewed) == 1 and all(t._base is not None for t in tensors_in(out)) else set()
        reads = [id(_base(t)) for t in tensors_in((args, kwargs)) if id(_base(t)) not in views]
        if not self.originals.isdisjoint(reads):
            raise ValueError("forward refers to the original model, by a closure: it must read parameters through self")
        self.reads.update(reads)
