"""Units that no path of non-zero weights passes at the start wait, and join."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsgd
from gsgd import rescale
from gsgd.torch import GSGD, GAdam, trace, verify
from gsgd.waiting import is_due


class LoRA(nn.Module):
    """A frozen layer with a trained product B A beside it, between a hidden layer and the next."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.b.weight)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), LoRA(8, 3), nn.ReLU(), nn.Linear(8, 2)).double()
    return model, torch.randn(16, 5).double(), torch.randn(16, 2).double()


def train(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def active(optimizer: Any) -> int:
    return int((optimizer._coordinates.in_edges[:, 0] >= 0).sum())


def make(kind: Any, model: nn.Module, **options: Any) -> Any:
    with pytest.warns(UserWarning, match="3 units wait with plain steps until all their weights are non-zero"):
        return kind(model, **options)


KINDS: list[tuple[Any, dict[str, Any]]] = [
    (GSGD, {"lr": 0.05}),
    (GSGD, {"lr": 0.05, "momentum": 0.9, "scale": "initial"}),
    (GSGD, {"lr": 0.05, "momentum": 0.9, "engine": "array"}),
    (GAdam, {"lr": 0.01}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_units_of_lora_join(kind: Any, options: dict[str, Any]) -> None:
    model, x, y = model_and_data()
    net = trace(model, x)
    verify(model, net, x)
    optimizer = make(kind, model, **options)
    assert optimizer.network.num_units == 3  # what the frozen layer meets is pinned
    assert active(optimizer) == 0
    plain, before = copy.deepcopy(model), F.mse_loss(model(x), y).item()
    train(model, optimizer, x, y, 1)
    assert active(optimizer) == 3
    if kind is GSGD and "momentum" not in options:  # the first step was a plain one
        train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), x, y, 1)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
    free = {tuple(e) for e in optimizer._coordinates.out_edges.tolist()}
    edges = [(optimizer.network.blocks[k].name, optimizer.network.blocks[k].index(e)) for k, e in free]
    weights = dict(model.named_parameters())
    kept = [weights[name][index].item() for name, index in edges]
    train(model, optimizer, x, y, 30)
    assert [weights[name][index].item() for name, index in edges] == kept
    assert F.mse_loss(model(x), y).item() < before


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_after_they_have_joined_no_rescaling_matters(momentum: float) -> None:
    first, x, y = model_and_data()
    optimizer = make(GSGD, first, lr=0.05, momentum=momentum)
    train(first, optimizer, x, y, 4)
    second, other = copy.deepcopy((first, optimizer))
    arrays = {name: p.detach().numpy() for name, p in second.named_parameters()}
    rescale(arrays, other.network, np.array([3.0, 0.25, 2.0]))
    assert not torch.equal(first[2].a.weight, second[2].a.weight)
    for _ in range(5):
        train(first, optimizer, x, y, 1)
        train(second, other, x, y, 1)
        torch.testing.assert_close(first(x), second(x), rtol=1e-10, atol=1e-12)


def test_what_joins_changes_no_other_coordinate() -> None:
    """Units around them that were active move on as before: compared with float64 coordinates x = w A B."""
    model, x, y = model_and_data()
    model[2].base.requires_grad_(True)
    optimizer = make(GSGD, model, lr=0.05, momentum=0.9)
    assert active(optimizer) == 8 + 8
    old = optimizer._coordinates
    train(model, optimizer, x, y, 1)
    new = optimizer._coordinates
    assert active(optimizer) == 8 + 8 + 3
    had = old.in_edges[:, 0] >= 0
    for name in ("in_edges", "out_edges", "in_weights", "out_weights", "c"):
        assert np.array_equal(getattr(old, name)[had], getattr(new, name)[had])
    values = {name: p.detach().numpy() for name, p in model.named_parameters()}
    waiting = optimizer._coordinates.in_edges[:, 0] >= 0
    a, b = relative_of(optimizer, values)
    assert np.allclose(a[waiting & ~had], 1, rtol=1e-12)
    assert np.allclose(b[waiting & ~had], 1, rtol=1e-12)
    assert not np.allclose(a[had] * b[had], 1, rtol=1e-6)


def relative_of(optimizer: Any, values: dict[str, Any]) -> tuple[Any, Any]:
    """A and B of every unit by walking along the trees."""
    net, at = optimizer.network, optimizer._coordinates

    def walk(unit: int, tree: int) -> float:
        (edges, reference) = ((at.in_edges, at.in_weights), (at.out_edges, at.out_weights))[tree]
        product = 1.0
        while unit >= 0:
            block = net.blocks[edges[unit, 0]]
            group, row, col, *_ = np.unravel_index(edges[unit, 1], block.extents)
            product *= values[block.name][block.index(int(edges[unit, 1]))] / reference[unit]
            ids, i = (
                (block.cols, group * block.extents[2] + col)
                if tree == 0
                else (block.rows, group * block.extents[1] + row)
            )
            unit = int(ids[i])
        return product

    units = range(net.num_units)
    return np.array([walk(u, 0) for u in units]) / at.c, np.array([walk(u, 1) for u in units]) * at.c


def test_numpy_s_optimizer_does_the_same() -> None:
    model, x, y = model_and_data()
    optimizer = make(GSGD, model, lr=0.05, momentum=0.9)
    arrays = {name: p.detach().numpy().copy() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.warns(UserWarning, match="3 units wait with plain steps"):
        other = gsgd.GSGD(arrays, optimizer.network, lr=0.05, momentum=0.9)
    for _ in range(5):
        train(model, optimizer, x, y, 1)
        other.step({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        for name, w in arrays.items():
            np.testing.assert_array_equal(w, dict(model.named_parameters())[name].detach())
    assert other.skeleton.num_units == active(optimizer) == 3


def test_some_weights_stay_zero() -> None:
    """They wait on; looking for them costs little: at steps 1, 2, 4, 8, ..."""
    assert [step for step in range(20) if is_due(step)] == [1, 2, 4, 8, 16]
    model, x, y = model_and_data()
    model[2].b.weight.register_hook(lambda g: g * torch.tensor([1.0, 1.0, 0.0]))
    optimizer = make(GSGD, model, lr=0.05)
    train(model, optimizer, x, y, 5)
    assert active(optimizer) == 2
    assert (model[2].b.weight[:, 2] == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, x, y, 5)


def test_a_state_after_they_have_joined_is_loaded() -> None:
    model, x, y = model_and_data()
    optimizer = make(GSGD, model, lr=0.05, momentum=0.9)
    train(model, optimizer, x, y, 3)
    state = copy.deepcopy(optimizer.state_dict())
    again = model_and_data()[0]
    other = make(GSGD, again, lr=0.05, momentum=0.9)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    assert active(other) == 3
    train(model, optimizer, x, y, 4)
    train(again, other, x, y, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
