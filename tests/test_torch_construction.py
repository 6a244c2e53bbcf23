"""Making an optimizer: what is refused, told of, and done once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch_models import Net, assert_same, backward, make, named, weights

import gsgd
import gsgd.torch.engines.core
from gsgd.torch import GSGD


class DTensor(Tensor):
    """Called as torch's own."""


def replace_first(model: nn.Module, to: Tensor) -> list[tuple[str, Tensor]]:
    return [("0.weight", to), *named(model)[1:]]


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any], type[Exception], str]] = {
    "unnamed": (lambda m: m.parameters(), {}, ValueError, "the model itself, or named parameters"),
    "no network": (named, {"network": None}, ValueError, "the model itself, or named parameters .* and network="),
    "names of a wrapped model": (
        lambda m: named(nn.Sequential(m)),
        {},
        ValueError,
        r"expected names of the network, like '0\.weight', got names like '0\.0\.weight'",
    ),
    "a model as network": (named, {"network": nn.ReLU()}, TypeError, r"network: expected a gsgd\.Network, got ReLU"),
    "twice": (lambda m: [*named(m), ("again", m[0].weight)], {}, ValueError, "'0.weight' is given twice"),
    "one name": (
        lambda m: replace_first(m, m[0].weight)[:1] * 1 + [("0.weight", m[2].weight)],
        {},
        ValueError,
        "twice",
    ),
    "one name in two groups": (
        lambda m: [{"params": named(m)}, {"params": [("2.bias", nn.Parameter(torch.ones(3)))]}],
        {},
        ValueError,
        "'2.bias' is given twice",
    ),
    "two groups": (lambda m: [{"params": named(m)}] * 2, {}, ValueError, "more than one parameter group"),
    "shape": (
        lambda m: replace_first(m, nn.Parameter(torch.ones(2, 4))),
        {},
        ValueError,
        r"'0.weight': the network expects shape \(4, 2\), got \(2, 4\)",
    ),
    "sparse": (lambda m: replace_first(m, torch.eye(4)[:, :2].to_sparse()), {}, TypeError, "'0.weight'"),
    "no values": (lambda m: replace_first(m, torch.ones(4, 2, device="meta")), {}, TypeError, "'0.weight'"),
    "sharded": (
        lambda m: replace_first(m, torch.ones(4, 2).as_subclass(DTensor)),
        {},
        TypeError,
        "'0.weight' is sharded.*every process holds whole",
    ),
    "expanded": (
        lambda m: replace_first(m, nn.Parameter(torch.ones(4, 1).expand(4, 2))),
        {},
        ValueError,
        "'0.weight': its entries overlap",
    ),
    "views of one another": (
        lambda m: [*named(m), ("view", m[0].weight.detach()[1:])],
        {},
        ValueError,
        "'0.weight' and 'view' overlap",
    ),
    "nan": (lambda m: replace_first(m, torch.full((4, 2), torch.nan)), {}, ValueError, "'0.weight'"),
    "empty list": (lambda m: [], {}, ValueError, "empty parameter list"),
    "lr": (named, {"lr": -0.1}, ValueError, "lr"),
    "momentum": (named, {"momentum": -0.1}, ValueError, "momentum"),
    "nesterov": (named, {"nesterov": True}, ValueError, "nesterov"),
    "weight decay": (named, {"weight_decay": float("nan")}, ValueError, "weight_decay"),
    "scale": (named, {"scale": "other"}, ValueError, "scale"),
    "rule": (named, {"rule": "other"}, ValueError, "rule"),
    "max_ratio": (named, {"max_ratio": 1.0}, ValueError, "max_ratio"),
    "clip_norm": (named, {"clip_norm": -1.0}, ValueError, "clip_norm"),
    "leave_out": (named, {"leave_out": "fc"}, ValueError, "leave_out: is for tracing"),
    "residual": (lambda m: m, {"residual": "tie"}, ValueError, "residual: is for tracing"),
    "batch_norm": (lambda m: m, {"batch_norm": "paper"}, ValueError, "batch_norm: is for tracing"),
    "threads": (named, {"threads": 0}, ValueError, "threads"),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    """At construction, before anything is written, and by name."""
    params, settings, error, message = REFUSED[case]
    model = mlp((2, 4, 3))
    before = weights(model)
    network = gsgd.Network.sequential({name: p.shape for name, p in model.named_parameters()})
    with pytest.raises(error, match=message):
        GSGD(params(model), **{"network": network, "scale": "ones", **settings})
    assert_same(model, before)


def test_the_network_must_be_of_the_model() -> None:
    model = nn.Sequential(*mlp((4, 6, 3)), nn.Linear(3, 3))

    def network(name: str) -> gsgd.Network:
        net = gsgd.Network()
        h = net.relu(net.dense("0.weight", net.input(4), 6, bias="0.bias"))
        net.output(net.dense(name, h, 3))
        return net

    with pytest.raises(ValueError, match=r"network: the model has no parameter '2\.wieght'"):
        GSGD(model, network=network("2.wieght"))
    net = network("2.weight")
    described = GSGD(model, network=net).network
    assert str(described).endswith("not described, plain steps: 2.bias, 3.weight, 3.bias")
    assert "not described" not in str(net)


def test_frozen_integers_are_no_parameters_of_a_step() -> None:
    model = mlp((4, 6, 3))
    model.steps = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    opt = GSGD(model)
    assert opt.network.num_units == 6
    assert "steps" not in opt.param_groups[0]["param_names"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_units_that_meet_what_is_no_real_number_are_pinned(dtype: torch.dtype) -> None:
    model = mlp((2, 4, 5, 3))
    network = gsgd.Network.sequential({name: p.shape for name, p in named(model)})
    opt = GSGD(replace_first(model, torch.ones(4, 2, dtype=dtype)), network=network)
    assert opt.network.num_units == 5
    assert opt.network.shapes.keys() == network.shapes.keys() - {"0.weight"}


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no parameters"):
        GSGD(nn.Sequential(nn.ReLU()))


def test_a_model_without_units_is_told_of() -> None:
    with pytest.warns(UserWarning, match="no unit was found"):
        GSGD(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)))


@pytest.mark.parametrize("rule", ["modulo", "largest"])
def test_a_plan_and_a_balanced_scale_are_made_once(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for construction and the first step; again where weights have changed between, however they were written."""
    made: list[str] = []
    for module, name in (
        (gsgd.skeleton, "make_plan"),
        (gsgd.skeleton, "core_plan"),
        (gsgd.torch.engines.core, "make_plan"),
        (gsgd.skeleton, "balanced_scale"),
    ):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name: made.append(n) or f(*a))
    model = Net()
    opt = make(model, rule=rule)
    backward(model, 0)
    opt.step()
    opt.step()
    assert sorted(made) == ["balanced_scale", "core_plan", "make_plan"]
    opt = make(model, rule=rule)
    next(model.parameters()).data.mul_(2)
    made.clear()
    opt.step()
    assert sorted(made) == ["balanced_scale", "core_plan", "make_plan"]
