"""Tensors that a model holds: which of its parameters share memory with others of them, and copies that keep this."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from logging import Logger
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

_NO_DATA = (type, ModuleType, Logger, FunctionType, BuiltinFunctionType)


def held_tensors(root: Any) -> list[Tensor]:
    """All tensors that can be reached from `root`: by attributes, containers, and what functions close over."""
    found, seen, ahead = [], {}, [root]
    while ahead:
        x = ahead.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x  # kept alive, so that ids stay those of these objects
        if isinstance(x, Tensor):
            found.append(x)
        else:
            ahead.extend(_held(x))
    return found


def _held(x: Any) -> Iterator[Any]:
    if isinstance(x, dict):
        yield from x.values()
    elif isinstance(x, list | tuple | set | frozenset | deque):
        yield from x
    elif isinstance(x, FunctionType):
        for cell in x.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not bound yet
                continue
        yield from x.__defaults__ or ()
    elif isinstance(x, MethodType):
        yield from (x.__self__, x.__func__)
    elif isinstance(x, partial):
        yield from (x.func, x.args, x.keywords)
    elif hasattr(x, "__dict__") and not isinstance(x, type | ModuleType | Logger):  # loggers lead to all others
        yield vars(x)


def shared_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that share memory with another tensor of the model, if only in part, or with themselves."""
    names = {id(p): name for name, p in model.named_parameters()}
    spans = sorted((_span(t), id(t)) for t in held_tensors(model) if t.layout is torch.strided and t.numel())
    shared = set()
    reach: tuple[Any, int, int] | None = None  # where, up to which byte, whose
    for (where, start, stop), owner in spans:
        if reach is not None and reach[0] == where and start < reach[1]:
            shared |= {owner, reach[2]}
        if reach is None or reach[0] != where or stop > reach[1]:
            reach = (where, stop, owner)
    expanded = {id(p) for p in model.parameters() if p.layout is torch.strided and _repeats(p)}
    return {names[i] for i in shared | expanded if i in names}


def _span(t: Tensor) -> tuple[tuple[str, int], int, int]:
    """Its device (and storage, where there is no memory), and the first byte and the one behind the last there."""
    extent = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    address = 0 if t.is_meta else t.untyped_storage().data_ptr()
    storage = 0 if address else t.untyped_storage()._cdata
    start = int(address + t.storage_offset() * t.element_size())
    return (str(t.device), storage), start, start + int(extent) * t.element_size()


def _repeats(t: Tensor) -> bool:
    return any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True))


def copy_converted(root: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy with every tensor `convert`ed on the way (elementwise); what shares memory does so in the copy.

    Hooks of modules, which may keep or count what they are given, are copied with all that they refer to.
    """
    modules = list(root.modules()) if isinstance(root, nn.Module) else []
    memo = _memo((root, *(hook for module in modules for kept in _hooks_of(module) for hook in kept.values())), convert)
    copied = copy.deepcopy(root, memo)
    for module in modules:
        for kept, own in zip(_hooks_of(memo[id(module)]), _hooks_of(module), strict=True):
            kept.update({key: _isolated(hook, memo) for key, hook in own.items()})
    return copied


def _memo(roots: tuple[Any, ...], convert: Callable[[Tensor], Tensor]) -> dict[int, Any]:
    """For `copy.deepcopy`: every tensor of these, and of what hooks among them refer to, after `convert`."""
    tensors = held_tensors((roots, [list(_globals_of(root).values()) for root in roots]))
    memo: dict[int, Any] = dict(_converted(tensors, convert))
    for t in tensors:
        if isinstance(t, nn.Parameter):
            made = memo[id(t)]
            memo[id(t)] = nn.Parameter(made, made.is_floating_point() or made.is_complex())
    return memo


def _hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks]


@contextmanager
def isolated_global_hooks() -> Iterator[None]:
    """Hooks of all modules there are work on copies of what they refer to."""
    kept: list[dict[int, Any]] = [torch_modules._global_forward_pre_hooks, torch_modules._global_forward_hooks]
    before = [dict(hooks) for hooks in kept]
    memo = _memo(tuple(hook for hooks in before for hook in hooks.values()), Tensor.clone)
    for hooks in kept:
        hooks.update({key: _isolated(hook, memo) for key, hook in hooks.items()})
    try:
        yield
    finally:
        for hooks, own in zip(kept, before, strict=True):
            hooks.update(own)


def _globals_of(hook: Any) -> dict[str, Any]:
    """The data that a hook refers to by global names."""
    if isinstance(hook, partial):
        return _globals_of(hook.func)
    if not isinstance(hook, FunctionType):
        return {}
    codes, names = [hook.__code__], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
    found = {name: hook.__globals__[name] for name in names if name in hook.__globals__}
    return {name: x for name, x in found.items() if not isinstance(x, _NO_DATA)}


def _isolated(hook: Any, memo: dict[int, Any]) -> Any:
    """A copy of a hook that shares no data with it; what can't be copied is left as it is."""

    def copied(x: Any) -> Any:
        try:
            return copy.deepcopy(x, memo)
        except Exception:  # a writer to a file, say
            return x

    if isinstance(hook, partial):
        return partial(_isolated(hook.func, memo), *map(copied, hook.args), **copied(hook.keywords))
    if not isinstance(hook, FunctionType):
        return copied(hook)
    own = {**hook.__globals__, **{name: copied(x) for name, x in _globals_of(hook).items()}}
    cells = []
    for cell in hook.__closure__ or ():
        try:
            cells.append(CellType(copied(cell.cell_contents)))
        except ValueError:  # not bound yet
            cells.append(CellType())
    made = FunctionType(hook.__code__, own, hook.__name__, copied(hook.__defaults__), tuple(cells))
    made.__kwdefaults__ = copied(hook.__kwdefaults__)
    return made


def _converted(tensors: Iterable[Tensor], convert: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Every tensor (by its id) after `convert`, which must be elementwise; those of one storage and dtype share one."""
    groups: dict[Any, list[Tensor]] = {}
    for t in tensors:
        plain = t.layout is torch.strided and not t.is_meta and not t.is_conj() and not t.is_neg()
        key = (t.device, t.untyped_storage().data_ptr(), t.dtype) if plain and t.numel() else id(t)
        groups.setdefault(key, []).append(t)
    made = {}
    for group in groups.values():
        if len(group) == 1:
            made[id(group[0])] = convert(group[0].detach())
            continue
        first = group[0].detach()
        flat = convert(torch.empty(0, dtype=first.dtype, device=first.device).set_(first.untyped_storage()))
        for t in group:
            made[id(t)] = flat.as_strided(t.shape, t.stride(), t.storage_offset())
    return made
