"""Rules of torch's functions that move elements about, or select and gather them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from gsgd.torch.follow import name_of
from gsgd.torch.run import Run
from gsgd.torch.values import Kind, is_continuous, tensors_in
from gsgd.trace import rules
from gsgd.trace.nodes import Nodes, NotUnderstood, compact


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
