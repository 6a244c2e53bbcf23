"""Taking arrays from the outside: views of parameters and gradients as NumPy arrays, checked before any use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsgd.network import Network

Arrays = dict[str, NDArray[Any]]


def as_array(what: str, x: Any) -> NDArray[Any]:
    """A NumPy view of `x`: an array, or an object that exports a CPU buffer or DLPack."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{what}: expected a plain array, got a masked one")
    if isinstance(x, np.ndarray):
        return np.asarray(x)
    try:
        if hasattr(x, "__dlpack__"):
            return np.from_dlpack(x)
        return np.asarray(memoryview(x))
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{what}: expected an array on the CPU, got {type(x).__name__} ({error})") from error


def _self_overlapping(a: NDArray[Any]) -> bool:
    """Whether two of the array's entries may share memory."""
    reach = 0
    for stride, extent in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < reach + a.itemsize:
            return True
        reach += stride * (extent - 1)
    return False


def _check_overlap(arrays: Arrays) -> None:
    spans = []
    for name, a in arrays.items():
        if a.size:
            low, high = np.lib.array_utils.byte_bounds(a)
            spans.append((low, high, name))
            if _self_overlapping(a):
                raise ValueError(f"parameter {name!r}: its entries overlap in memory")
    spans.sort()
    for i, (_, high, name) in enumerate(spans):
        for low, _, other in spans[i + 1 :]:
            if low >= high:
                break
            if np.shares_memory(arrays[name], arrays[other]):
                raise ValueError(f"parameters {name!r} and {other!r} overlap in memory")


def check_parameters(params: Mapping[str, Any], net: Network, *, writable: bool = True, others: bool = False) -> Arrays:
    """Views of the parameters that `net` names (and of all others, if asked), in the order of `net`."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a mapping of names to arrays, got {type(params).__name__}")
    shapes = net.shapes
    missing = [name for name in shapes if name not in params]
    if missing:
        raise ValueError(f"parameter {missing[0]!r} of the network is missing in params")
    names = list(shapes)
    if others:
        names += [name for name in params if name not in shapes]
    arrays: Arrays = {}
    for name in names:
        a = as_array(f"parameter {name!r}", params[name])
        if a.dtype not in (np.float32, np.float64) or not a.dtype.isnative or not a.flags.aligned:
            got = f"{a.dtype.str}, aligned: {a.flags.aligned}"
            raise TypeError(f"parameter {name!r}: expected native aligned float32 or float64, got {got}")
        expected = shapes.get(name, a.shape)
        if a.shape != expected:
            raise ValueError(f"parameter {name!r}: expected shape {expected}, got {a.shape}")
        if writable and not a.flags.writeable:
            raise ValueError(f"parameter {name!r}: expected a writable array, it is read-only")
        arrays[name] = a
    if writable:
        _check_overlap(arrays)
    return arrays


def check_names(grads: Mapping[str, Any], arrays: Arrays) -> None:
    """Exactly the names of the parameters."""
    if not isinstance(grads, Mapping):
        raise TypeError(f"grads: expected a mapping of names to arrays, got {type(grads).__name__}")
    for name in arrays:
        if name not in grads:
            raise ValueError(f"gradient of {name!r} is missing")
    for name in grads:
        if name not in arrays:
            raise ValueError(f"gradient of {name!r}: there is no such parameter")


def check_gradients(grads: Mapping[str, Any], arrays: Arrays) -> Arrays:
    """Views of the gradients, of the shapes and dtypes of the parameters."""
    check_names(grads, arrays)
    gradients: Arrays = {}
    for name, w in arrays.items():
        g = as_array(f"gradient of {name!r}", grads[name])
        if g.dtype != w.dtype:
            raise TypeError(f"gradient of {name!r}: expected dtype {w.dtype}, got {g.dtype}")
        if g.shape != w.shape:
            raise ValueError(f"gradient of {name!r}: expected shape {w.shape}, got {g.shape}")
        gradients[name] = g
    return gradients
