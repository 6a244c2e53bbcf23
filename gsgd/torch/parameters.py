"""What an optimizer is made from: named parameters, and the network that is given or that tracing finds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from gsgd.network import Network
from gsgd.torch.shards import any_sharded, is_sharded
from gsgd.torch.trace import trace

Params: TypeAlias = nn.Module | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Closure: TypeAlias = Callable[[], Any]

EXPECTED = (
    "params: expected the model itself, or named parameters (model.named_parameters()) and network=. "
    "In place of SGD(model.parameters(), ...) write GSGD(model, ...)"
)


def refuse_unsupported(name: str, p: Tensor) -> None:
    """A TypeError names a parameter that no step can be taken on."""
    if any(c.__name__ == "FlatParameter" for c in type(p).__mro__):
        raise TypeError(
            f"parameter {name!r} is a FlatParameter of FullyShardedDataParallel, which mixes layers: use fully_shard"
        )
    if is_sharded(p) and p.is_complex():
        raise TypeError(f"parameter {name!r}: expected real numbers in sharded parameters, got {p.dtype}")
    if p.is_conj() or p.is_neg():
        raise TypeError(f"parameter {name!r}: expected memory of its own, got a conjugate or negative view")
    if p.is_sparse or p.device.type == "meta":
        raise TypeError(f"parameter {name!r}: expected a dense tensor with values, got {p.layout} on {p.device}")


def named_network(params: Params, network: Network | None, example_inputs: Any, **tracing: Any) -> tuple[Any, Network]:
    """Named parameters, and the network that is given, or that tracing with these options (None: its own) finds."""
    if network is not None and not isinstance(network, Network):
        raise TypeError(f"network: expected a gsgd.Network, got {type(network).__name__}")
    tracing = {name: value for name, value in tracing.items() if value not in (None, ())}
    if network is not None or not isinstance(params, nn.Module):
        for name in tracing:
            raise ValueError(
                f"{name}: is for tracing a model, which network= replaces: give network=trace(model, {name}=...)"
            )
    if isinstance(params, nn.Module):
        model = params
        # integers are no parameters of a step, but some models keep them as frozen ones
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad or p.is_floating_point()}
        if not parameters:
            raise ValueError("the model has no parameters")
        for name, p in parameters.items():
            refuse_unsupported(name, p)
        if network is None:
            if any_sharded(parameters):
                raise ValueError("network: expected that of the model before it was sharded: net = trace(model, ...)")
            network = trace(model, example_inputs, **tracing)
        for name in network.shapes:
            if name not in parameters:
                raise ValueError(f"network: the model has no parameter {name!r}, its names are {[*parameters][:3]}...")
        params = list(parameters.items())
    if network is None:
        raise ValueError(EXPECTED)
    return params, network


class Owner:
    """The model whose parameters an optimizer has: whether they are its own still, or a module was replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._note()

    def has_changed(self) -> bool:
        """Whether anything in the model was replaced. Every step asks, of thousands of modules: no loop in Python."""
        return not all(map(operator.is_, map(dict.get, *self._places), self._held))

    def lost(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of those that the model no longer has. As it is now, it counts as unchanged."""
        self._note()
        own = set(map(id, self.model.parameters()))
        return [name for name, p in tensors.items() if id(p) not in own]

    def _note(self) -> None:
        dicts: list[dict[str, Any]] = [d for m in self.model.modules() for d in (m._modules, m._parameters)]
        self._places = [d for d in dicts for _ in d], [name for d in dicts for name in d]
        self._held = [x for d in dicts for x in d.values()]
