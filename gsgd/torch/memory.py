"""Tensors that a model holds, and which of its parameters share memory with others of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from logging import Logger
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn


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


def converted(tensors: Iterable[Tensor], convert: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
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
