"""Rescaling, balance and equivalence on a model's own tensors."""

import copy

import numpy as np
import pytest
import torch
from models import mlp
from torch import nn
from torch_models import Net, assert_same, example, views, weights

import gsgd
from gsgd.torch import balance, equivalence, rescale, trace

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [2, "max"])
def test_as_on_arrays(device: str, norm: str) -> None:
    """The same bits; pointers stay, versions do not; the function and the scales are found again."""
    model = Net().to(device)
    start, net = copy.deepcopy(model), trace(model, example().to(device))
    arrays = {name: w.cpu().numpy() for name, w in weights(model).items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    scales = 10 ** np.random.default_rng(0).uniform(-1, 1, net.num_units)
    rescale(model, net, scales)
    gsgd.rescale(arrays, net, scales)
    assert_same({name: w.cpu() for name, w in weights(model).items()}, {n: torch.tensor(w) for n, w in arrays.items()})
    np.testing.assert_allclose(equivalence(start, model, net), scales, rtol=1e-12)
    balance(model, net, norm)
    gsgd.balance(arrays, net, norm)
    assert_same({name: w.cpu() for name, w in weights(model).items()}, {n: torch.tensor(w) for n, w in arrays.items()})
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(model.get_parameter(name)._version > 0 for name in net.shapes)
    torch.testing.assert_close(model(example().to(device)), start(example().to(device)))


def test_balance_traces() -> None:
    model = mlp((5, 9, 3))
    other = copy.deepcopy(model)
    balance(model)
    balance(other, trace(other))
    assert_same(model, other)
    assert not np.allclose(views(model)["0.weight"], views(mlp((5, 9, 3)))["0.weight"])


def test_half_precision_and_what_overflows_there() -> None:
    model = mlp((5, 9, 3)).half()
    model.steps = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)  # no parameter of the network
    net, before = trace(mlp((5, 9, 3))), weights(model)
    rescale(model, net, np.full(9, 2.0))
    assert torch.equal(model[0].weight, before["0.weight"] * 2)
    assert torch.equal(model[2].weight, before["2.weight"] / 2)
    before = weights(model)
    with pytest.raises(ValueError, match=r"parameter '0.weight' would overflow or underflow in torch.float16"):
        rescale(model, net, np.full(9, 1e6))
    with pytest.raises(ValueError, match="scales: expected shape"):
        rescale(model, net, np.ones(3))
    assert_same(model, before)
