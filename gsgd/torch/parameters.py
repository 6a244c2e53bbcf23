"""What an optimizer is made from: named parameters, and the network that is given or that tracing finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from gsgd.network import BatchNormMode, Network, Residual
from gsgd.torch.trace import trace

Params: TypeAlias = nn.Module | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Closure: TypeAlias = Callable[[], Any]

EXPECTED = "params: expected the model itself, or named parameters (model.named_parameters()) and network="
_LEAVE_OUT = "leave_out: is for tracing a model; with network=, give gsgd.torch.trace(model, leave_out=...)"


def refuse_unsupported(name: str, p: Tensor) -> None:
    """A TypeError names a parameter that no step can be taken on."""
    kinds = {c.__name__ for c in type(p).__mro__}
    if kinds & {"DTensor", "FlatParameter"}:
        raise TypeError(
            f"parameter {name!r} is sharded ({type(p).__name__}): G-SGD needs whole rows and columns. "
            "Supported are parameters that every process holds whole, as with DistributedDataParallel."
        )
    if p.is_sparse or not p.is_floating_point() or p.device.type == "meta":
        raise TypeError(f"parameter {name!r}: expected a dense floating-point tensor, got {p.dtype} on {p.device}")


def named_network(
    params: Params,
    network: Network | None,
    example_inputs: Any,
    leave_out: str | Sequence[str],
    residual: Residual,
    batch_norm: BatchNormMode,
) -> tuple[Any, Network]:
    """Named parameters, and the network that is given or that tracing finds."""
    if network is not None and not isinstance(network, Network):
        raise TypeError(f"network: expected a gsgd.Network, got {type(network).__name__}")
    if isinstance(params, nn.Module):
        model = params
        # integers are no parameters of a step, but some models keep them as frozen ones
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad or p.is_floating_point()}
        if not parameters:
            raise ValueError("the model has no parameters")
        for name, p in parameters.items():
            refuse_unsupported(name, p)
        if network is None:
            network = trace(model, example_inputs, residual=residual, batch_norm=batch_norm, leave_out=leave_out)
        elif leave_out:
            raise ValueError(_LEAVE_OUT)
        for name in network.shapes:
            if name not in parameters:
                raise ValueError(f"network: the model has no parameter {name!r}, its names are {[*parameters][:3]}...")
        params = list(parameters.items())
    elif leave_out:
        raise ValueError(_LEAVE_OUT)
    if network is None:
        raise ValueError(EXPECTED)
    return params, network
