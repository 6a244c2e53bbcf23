"""What is known of the values of tensors while a model is followed, and calls on those that are not.

Integers, constants and buffers are known, and what is computed of nothing else. Whatever depends on weights or on real
inputs is on the meta device (shapes, no values), unless the run is a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# fmt: off
# what they give differs from pass to pass
DRAWING = {
    "bernoulli", "binomial", "cauchy", "empty", "empty_like", "exponential", "geometric", "log_normal", "multinomial",
    "new_empty", "normal", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random",
    "randperm", "uniform",
}
# of their first argument only the shape and the dtype are used
LIKE = {
    "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "ones_like",
    "rand_like", "randint_like", "randn_like", "zeros_like",
}
# they tell of a tensor's values
ASKING = {
    "__array__", "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "allclose", "equal",
    "is_nonzero", "item", "numpy", "tolist",
}
# how much they give depends on values
SELECTING = {"argwhere", "masked_select", "nonzero", "unique", "unique_consecutive"}
# they take indices or lengths, whose values tell the shapes of what they select
_INDEXING = {
    "__getitem__", "__setitem__", "_pack_padded_sequence", "_pad_packed_sequence", "embedding", "gather", "gru",
    "index_put", "index_put_", "index_select", "lstm", "repeat_interleave", "rnn_relu", "rnn_tanh", "take_along_dim",
}
# fmt: on
EXTREMES = (0.0, 1 - 2**-24)  # of random numbers between 0 and 1
_CPU = torch.device("cpu")


class Kind(IntEnum):
    """Of what a value is made."""

    FIXED = 0  # of constants and buffers: the same in every pass
    VARYING = 1  # of integer inputs, too
    DRAWN = 2  # of random numbers, too
    REAL = 3  # of weights and real inputs, too: on the meta device in a run without values


class Kinds:
    """The kinds of the values of one pass. Views are of one kind with what they are views of."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Kind, Tensor]] = {}  # by storage; with a tensor that keeps it alive

    def __call__(self, t: Tensor) -> Kind:
        found = self._found.get(storage_of(t))
        return found[0] if found else Kind.REAL if t.is_meta else Kind.FIXED

    def raise_to(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Tensors that were written, or made, of this kind of values."""
        for t in tensors:
            if kind > Kind.FIXED and kind > self(t):
                self._found[storage_of(t)] = (kind, t)

    def set(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            self._found[storage_of(t)] = (kind, t)


def storage_of(t: Tensor) -> int:
    """The identity of its memory, which views share."""
    try:
        return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse
        return id(t)


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def is_continuous(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def on_cpu(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call as they would be on the CPU, where all of a run takes place."""
    if kwargs.get("device") is not None:
        kwargs["device"] = _CPU
    if name == "to":
        given = [*args[1:], *kwargs.values()]
        dtypes = [a.dtype if isinstance(a, Tensor) else a for a in given]
        dtype = next((a for a in dtypes if isinstance(a, torch.dtype)), args[0].dtype)
        return (args[0], dtype), {"copy": kwargs.get("copy", False)}
    return args, kwargs


def call(
    kinds: Kinds, func: Callable[..., Any], name: str, args: Any, kwargs: Any, real: bool
) -> tuple[Any, list[Tensor]]:
    """What `func` returns, and the tensors that it writes.

    In a run that is not `real`, values that are not known are on the meta device, and so is what is made of them. A
    known tensor that is written by such keeps its object, and what it holds is no longer right: its kind tells.
    """
    if name in ("cpu", "cuda", "pin_memory"):
        return args[0], []
    tensors = tensors_in((args, kwargs))
    unknown = set() if real else {id(t) for t in tensors if t.is_meta or kinds(t) is Kind.REAL}
    if unknown and name in LIKE and id(args[0]) in unknown:
        return func(torch.empty(1, dtype=args[0].dtype).expand(args[0].shape), *args[1:], **kwargs), []
    if unknown and func is F.batch_norm:  # it would refuse a batch of one
        return args[0].clone(), []
    passed = {id(t): t for t in tensors}
    for t in tensors if unknown else ():
        is_index = name in _INDEXING and not is_continuous(t)
        if not t.is_meta and (id(t) in unknown or (t.ndim and not is_index)):  # numbers mix with every device
            passed[id(t)] = t.to("meta")
    versions = {i: _version(t) for i, t in passed.items()}
    if unknown:
        args, kwargs = tree_map_only(Tensor, lambda t: passed[id(t)], (args, kwargs))
    out = func(*args, **kwargs)
    if unknown:
        originals = {id(passed[id(t)]): t for t in tensors}
        out = tree_map_only(Tensor, lambda t: originals.get(id(t), t), out)
    return out, [t for t in tensors if _version(passed[id(t)]) != versions[id(t)]]


def with_uniform(out: Any, name: str, uniform: float | None) -> Any:
    """What the function of this name returns, with all random numbers between 0 and 1 replaced by this, if given."""
    return out if uniform is None or name not in ("rand", "rand_like") else torch.full_like(out, uniform)


def _version(t: Tensor) -> int:
    """It grows where the tensor is written."""
    return 0 if t.is_inference() else t._version
