"""A warning names the line of the user's that it is about, whatever wrappers the frameworks put between."""

import warnings
from collections.abc import Callable

import jax
import pytest
import torch
from networks import mlp
from torch import nn

import gsgd
import gsgd.optax as gopt
import gsgd.torch as gt


def dead() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[0] = 0
    return model


def make_for_numpy() -> None:
    model = mlp(3, 4, 2)
    params = model.copy()
    params["dense0"][0] = 0
    params["bias1"][0] = 0
    gsgd.GSGD(params, model.net, 0.1)


def make_for_torch() -> None:
    gt.GSGD(dead(), 0.1)


def make_without_units() -> None:
    gt.GSGD(nn.Linear(2, 2), 0.1)


def step_with_a_frozen_parameter() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    opt = gt.GSGD(model, 0.1)
    model[2].weight.requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()


def init_without_units() -> None:
    gopt.gsgd(0.1, gsgd.Network()).init({"w": jax.numpy.ones(2)})


@pytest.mark.parametrize(
    "make", [make_for_numpy, make_for_torch, make_without_units, step_with_a_frozen_parameter, init_without_units]
)
@pytest.mark.filterwarnings("default")
def test_warnings_name_the_callers_line(make: Callable[[], None]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    ours = [w for w in caught if "unit" in str(w.message) or "frozen" in str(w.message)]
    assert [w.filename for w in ours] == [__file__]
