"""Modules that are replaced after an optimizer was made of the model."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import mlp
from torch import Tensor, nn

from gsgd.torch import GSGD

X, Y = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2


def make(**options: Any) -> tuple[nn.Sequential, GSGD]:
    torch.manual_seed(0)
    model = mlp((5, 6, 6, 2))
    return model, GSGD(model, lr=0.1, **options)


def train(model: nn.Module, optimizer: Any, steps: int, set_to_none: bool = True) -> None:
    for _ in range(steps):
        optimizer.zero_grad(set_to_none)
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_replaced_head(before: int, set_to_none: bool, momentum: float) -> None:
    """As torch's SGD: neither moves. The rest is trained, and there is a warning, once."""
    model, optimizer = make(momentum=momentum)
    train(model, optimizer, before, set_to_none)
    old, model[4] = model[4], nn.Linear(6, 2)
    heads, rest = weights(old) + weights(model[4]), weights(model[2])
    with pytest.warns(UserWarning, match=r"4\.weight, 4\.bias: no longer a parameter of the model"):
        train(model, optimizer, 1, set_to_none)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 5, set_to_none)
    now = weights(old) + weights(model[4])
    if before == 0 or momentum == 0 or set_to_none:
        assert all(map(torch.equal, heads, now))
    assert not torch.equal(rest[0], model[2].weight)
    assert optimizer.network.num_units == 6
    assert "4.weight, 4.bias (no longer the model's)" in str(optimizer.network)


def test_parameters_that_are_assigned_are_others() -> None:
    model, optimizer = make()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias, 2\.weight, \.\.\.: no longer a parameter"):
        train(model, optimizer, 1)
    assert optimizer.network.num_units == 0


def test_what_stays_a_parameter_of_the_model_is_not_lost() -> None:
    """Wrapped, moved to another place, parametrized, converted, copied with its optimizer."""
    model, optimizer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[2] = nn.Sequential(model[2])
        train(model, optimizer, 1)
        nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
        train(model, optimizer, 1)
        model.to(torch.float64).to(torch.float32)
        train(model, optimizer, 1)
        train(*copy.deepcopy((model, optimizer)), 1)
        train(*pickle.loads(pickle.dumps((mlp((5, 6, 6, 2)), make()[1]))), 1)
    assert optimizer.network.num_units == 12
