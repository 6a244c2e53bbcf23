"""Parameters whose memory the model reads by another tensor, too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsgd import Network
from gsgd.torch import SymmetryError, trace, verify


class Tied(nn.Module):
    """The decoder reads a view of an encoder's weight, kept somewhere at construction."""

    def __init__(self, keep: Callable[[nn.Module, Tensor], Callable[[Any], Tensor]]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 8)
        self.read = keep(self, self.b.weight.t())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(torch.relu(self.a(x))))
        return self.c(torch.relu(F.linear(h, self.read(self))))


def kept(name: str, value: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> Any:
    def keep(model: nn.Module, view: Tensor) -> Callable[[Any], Tensor]:
        setattr(model, name, value(view))
        return lambda m: read(getattr(m, name))

    return keep


def as_buffer(model: nn.Module, view: Tensor) -> Callable[[Any], Tensor]:
    model.register_buffer("kept", view.detach())
    return lambda m: m.kept


KEEP: dict[str, Any] = {
    "attribute": kept("kept", lambda v: v, lambda k: k),
    "list": kept("kept", lambda v: [0, [v]], lambda k: k[1][0]),
    "dict": kept("kept", lambda v: {"w": v.detach()}, lambda k: k["w"]),
    "object": kept("kept", lambda v: SimpleNamespace(w=v), lambda k: k.w),
    "buffer": as_buffer,
    "closure": lambda model, view: lambda m: view,
}


@pytest.mark.parametrize("where", KEEP)
def test_a_weight_with_a_view_is_left_out(where: str) -> None:
    torch.manual_seed(0)
    model, x = Tied(KEEP[where]), torch.randn(16, 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    net = trace(model, x)
    assert "b.weight (shares its memory with another)" in str(net)
    assert not any(block.name == "a.weight" and (block.rows >= 0).any() for block in net.blocks)
    careless = Network()
    h = careless.dense("b.weight", careless.dense("a.weight", careless.input(8), 6, bias="a.bias"), 3, bias="b.bias")
    careless.output(h)
    if where == "closure":
        with pytest.raises(ValueError, match="forward refers to the original model"):
            verify(model, net, x)
    else:
        verify(model, net, x)
        with pytest.raises(SymmetryError):
            verify(model, careless, x)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("offset", "shared"), [(35, True), (36, False)])
def test_parameters_that_overlap_in_part(dtype: torch.dtype, offset: int, shared: bool) -> None:
    memory = torch.randn(80, dtype=dtype)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).to(dtype)
    model[0].weight = nn.Parameter(memory[:36].view(6, 6))
    model[2].weight = nn.Parameter(memory[offset : offset + 36].view(6, 6))
    net = trace(model)
    assert net.num_units == (0 if shared else 6)
    assert ("0.weight, 2.weight (shares its memory with another)" in str(net)) == shared


def test_a_parameter_that_repeats_its_entries() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.randn(1, 6).expand(6, 6))
    assert "0.weight (shares its memory with another)" in str(trace(model))
