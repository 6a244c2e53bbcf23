"""What takes a step on tensors: `choose` says which engine does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gsgd.coordinates import Coordinates
from gsgd.network import Network
from gsgd.torch.engines.array import ArrayEngine
from gsgd.torch.engines.base import CountingEngine, Engine, EngineName, Step, Tensors, Unsupported, as_real
from gsgd.torch.engines.core import CoreEngine
from gsgd.torch.engines.sharded import ShardedArrayEngine, ShardedCoreEngine, ShardedTritonEngine
from gsgd.torch.shards import any_sharded

__all__ = [
    "ArrayEngine",
    "CoreEngine",
    "CountingEngine",
    "Engine",
    "EngineName",
    "EngineOption",
    "Step",
    "Tensors",
    "as_real",
    "check_engine",
    "choose",
]

EngineOption = Literal["auto", "core", "array", "triton"]


def check_engine(engine: EngineOption) -> EngineOption:
    """`engine`, if it is one."""
    if engine not in ("auto", "core", "array", "triton"):
        raise ValueError(f"engine: expected 'auto', 'core', 'array' or 'triton', got {engine!r}")
    return engine


def choose(
    engine: EngineOption, net: Network, coordinates: Coordinates, tensors: Mapping[str, Tensor], plan: Any = None
) -> Engine:
    """The engine that is asked for, on `tensors` as they are now; "auto": the fastest that can take them.

    `plan`, if given, is a plan of the C core that has the trees of `coordinates`.

    Raises
    ------
    ValueError
        The parameters are on several devices, or the engine can't take them: it says why.
    """
    sharded = any_sharded(tensors)
    devices = {p.device for p in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"expected all parameters on one device, got {sorted(map(str, devices))}")
    why = None
    if engine == "triton" or (engine == "auto" and devices == {torch.device("cuda", d.index) for d in devices}):
        try:
            from gsgd.torch.engines.triton import TritonEngine

            return (ShardedTritonEngine if sharded else TritonEngine)(net, coordinates, tensors)
        except (ImportError, Unsupported) as error:
            why = f"triton {error}"
            if engine == "triton":
                raise ValueError(f"engine 'triton': {error}") from None
    outside = _outside_of_core(tensors)
    if engine == "core" and outside is not None:
        raise ValueError(f"engine 'core': takes float32 and float64 parameters on the CPU, {outside}")
    if engine == "array" or outside is not None:
        found = (ShardedArrayEngine if sharded else ArrayEngine)(net, coordinates, tensors)
        found.why = why or found.why
        return found
    if sharded:
        return ShardedCoreEngine(net, coordinates, tensors)
    return CoreEngine(net, coordinates, tensors, plan)


def _outside_of_core(tensors: Mapping[str, Tensor]) -> str | None:
    """Why the C core can't take the tensors."""
    for name, p in tensors.items():
        if p.device != torch.device("cpu") or as_real(p).dtype not in (torch.float32, torch.float64):
            return f"{name!r} is of {p.dtype} on {p.device}"
    return None
