"""Runs of a copy of a PyTorch module in which every call of a torch function is seen.

First without values (`gsgd.torch.values`): that is fast, and needs little memory. Where this fails, because real values
are asked for or an operation has no kernel without them, a run on the example's values follows. A value that no
observed operation made is an error.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gsgd.symmetry import kept_states
from gsgd.torch.memory import copy_converted, held_tensors, isolated_global_hooks
from gsgd.torch.values import ASKING, DRAWING, LIKE, Kind, Kinds, call, is_continuous, on_cpu, tensors_in, with_uniform

OUT_OF_SIGHT = "it reads a value made out of sight: by TorchScript, vmap or an extension"
# where torch keeps its kernels without values that are written in Python
_KERNELS = ("torch._refs", "torch._prims", "torch._decomp", "torch._meta_registrations")
_LITERALS = (bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)
_TORCH = str(Path(torch.__file__).parent)


def unwrap(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """The module inside DataParallel, DDP and torch.compile, and its parameters' names -> those of `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if any(map(nn.parameter.is_lazy, own_tensors(module))):
            raise ValueError(f"{type(module).__name__} is lazy: run the model once before it is traced")
    inner: Any = model
    while isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    outer = {id(p): name for name, p in model.named_parameters()}
    return inner, {name: outer[id(p)] for name, p in inner.named_parameters()}


def copy_model(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of `model` with every tensor `convert`ed on the way; what shares memory does so in the copy."""
    try:
        copied: nn.Module = copy_converted(model, convert)
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
    with kept_states(), torch.random.fork_rng(devices=[]):
        yield


def output_tensors(out: Any) -> list[Tensor]:
    """The tensors of real or complex numbers in what a model returns, in objects of whatever class."""
    for leaf in tree_leaves(out):
        if isinstance(leaf, GeneratorType):
            raise TypeError(
                "the model returns a generator, which can't be looked into: wrap it in a module that returns tensors, "
                "or tuples, lists, dicts or objects of them"
            )
    return [t for t in held_tensors(out) if is_continuous(t)]


def name_of(func: Callable[..., Any]) -> str:
    """A name for torch's own functions; others', with their module, are none that is known here."""
    if isinstance(func, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        return str(func)
    name: str = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__"):  # a property
        return func.__self__.__name__ + ("" if name == "__get__" else "=")  # type: ignore[attr-defined, no-any-return]
    module = getattr(func, "__module__", None) or "torch"
    return name if module.partition(".")[0] == "torch" else f"{module}.{name}"


def _line_of(frame: FrameType | None) -> str:
    """The innermost line of the model's own code that is running, if any."""
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename == __file__:
        return ""
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Follow(TorchFunctionMode):
    """Runs a model and hands every call of a torch function to `see`; with values if it is `real`.

    `uniform` takes the place of all random numbers between 0 and 1.
    """

    def __init__(self, real: bool, uniform: float | None = None) -> None:
        super().__init__()
        self.real, self.uniform = real, uniform
        self.drawn: list[str] = []  # lines that ask for the values of random numbers
        self.kind = Kinds()
        self.path: list[str] = []
        self.current = ""  # the function that is called, and the module
        self.depth = 0  # of calls that are seen
        self.written: list[Tensor] = []  # by the call
        self.line = ""
        self.out_of_sight = False

    def follow(self, ghost: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model = copy.deepcopy(ghost, {id(p): p for p in ghost.parameters()})  # whatever a run leaves behind is dropped
        self.enter(held_tensors(model))
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _module, _args, name=name: self.path.append(name))
            module.register_forward_hook(lambda _module, _args, out, name=name: self.leave(name, out))
        args, kwargs = copy_converted((args, kwargs), self.convert)
        for t in held_tensors((args, kwargs)):
            self.start(t)
        try:
            with ExitStack() as stack:
                stack.enter_context(kept_random_states())
                stack.enter_context(isolated_global_hooks())
                stack.enter_context(torch.enable_grad())
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                if self.real:
                    stack.enter_context(_Guard(self))
                stack.enter_context(self)
                out = model(*args, **kwargs)
        except Exception as raised:
            # TorchScript makes another error of what it meets
            error = ValueError(OUT_OF_SIGHT) if self.out_of_sight else raised
            where = ", ".join(filter(None, (self.current, self.line))) or "the arguments of forward"
            raise ValueError(f"the model can't be followed, at {where}: {type(error).__name__}: {error}") from error
        self.finish(model, output_tensors(out))

    def convert(self, t: Tensor) -> Tensor:
        """An argument of this run."""
        return t.detach().to("cpu" if self.real or not is_continuous(t) else "meta", copy=True)

    def enter(self, tensors: list[Tensor]) -> None:
        """The model holds these."""
        weights = [t for t in tensors if isinstance(t, nn.Parameter) and is_continuous(t)]
        self.kind.raise_to(Kind.REAL, weights)

    def start(self, t: Tensor) -> None:
        """An argument."""
        self.kind.raise_to(Kind.REAL if is_continuous(t) else Kind.VARYING, [t])

    def leave(self, name: str, out: Any) -> None:
        """The module of this name has returned."""
        self.path.pop()

    def finish(self, model: nn.Module, outputs: list[Tensor]) -> None: ...

    def see(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        raise NotImplementedError

    def ask(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        """A real value is asked for, and is `out`: the answer that is given."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_KERNELS):  # of an operation that was not seen
            raise ValueError(OUT_OF_SIGHT)
        self.depth += 1
        try:
            return self.call(func, args, dict(kwargs or {}))
        finally:
            self.depth -= 1

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        if name in ("device", "is_meta") and args and isinstance(args[0], Tensor):
            return torch.device("cpu") if name == "device" else False
        self.current = f"{name.strip('_')} in {(self.path or [''])[-1] or 'the model'}"
        self.line = _line_of(sys._getframe(2))
        args, kwargs = on_cpu(name, args, kwargs)
        tensors = tensors_in((args, kwargs))
        made_of = max((self.kind(t) for t in tensors[name in LIKE :]), default=Kind.FIXED)
        if name.strip("_") in DRAWING:
            made_of = max(made_of, Kind.DRAWN)
        out, self.written = call(self.kind, func, name, args, kwargs, self.real)
        out = with_uniform(out, name, self.uniform)
        results = tensors_in(out)
        if not self.real and made_of is Kind.REAL:  # what is known all the same was made of nothing else
            known = max((self.kind(t) for t in tensors if self.kind(t) < Kind.REAL), default=Kind.FIXED)
            self.kind.raise_to(known, [t for t in results if not t.is_meta])
            results = [t for t in results if t.is_meta]
        self.kind.raise_to(made_of, results + self.written)
        if name in ASKING and made_of is Kind.DRAWN:
            self.drawn.append(self.line or self.current)
        if name in ASKING and made_of is Kind.REAL:
            return self.ask(func, args, kwargs, out)
        if out is None or not all(isinstance(leaf, _LITERALS) for leaf in tree_leaves(out)):
            self.see(func, args, kwargs, out)
        return out


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What torch does in a real run outside of calls that are seen must read none of its values."""

    def __init__(self, run: Follow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            out = func(*args, **(kwargs or {}))
            if self.run.depth or not any(self.run.kind(t) is Kind.REAL for t in tensors_in((args, kwargs))):
                return out
            if func is torch.ops.aten._local_scalar_dense.default:  # a tensor is given where numbers are expected
                return self.run.ask(func, args, {}, out)
            self.run.out_of_sight = True
            raise ValueError(OUT_OF_SIGHT)
