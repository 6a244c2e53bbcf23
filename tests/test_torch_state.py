"""States: saved, loaded, of other optimizers, and refused."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from models import mlp
from torch import nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch_models import Net, assert_same, example, make, momenta, train, weights

import gsgd
from gsgd.torch import GSGD, GAdam, GRMSprop, trace


def through_memory(model: nn.Module, opt: GSGD) -> tuple[nn.Module, GSGD]:
    other = Net(seed=1)
    resumed = make(other, rule="largest", lr=1.0, momentum=0.0)
    train(other, resumed, range(2))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    return other, resumed


def test_a_state_replaces_everything(engine: str) -> None:
    """Other hyperparameters, another rule, steps that were taken; the counts and the moments are those of the state."""
    model = Net()
    opt = make(model, weight_decay=0.01, nesterov=True)
    train(model, opt, range(3))
    other, resumed = through_memory(model, opt)
    train(model, opt, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(model, other)
    assert opt.stats == resumed.stats
    for mine, theirs in zip(momenta(opt), momenta(resumed), strict=True):
        assert torch.equal(mine, theirs)


def test_a_copy_has_no_more_keys() -> None:
    """torch.optim.Optimizer adds "differentiable" to the defaults of what it unpickles."""
    opt = make(Net())
    assert copy.deepcopy(opt).param_groups[0].keys() == opt.param_groups[0].keys()


def test_momentum_may_be_cleared() -> None:
    models = [Net(), Net(), Net()]
    for i, model in enumerate(models):
        opt = make(model)
        train(model, opt, range(2))
        if i == 0:
            opt.state.clear()
        for state in opt.state.values():
            buffer = state["momentum_buffer"]
            buffer.data = torch.zeros_like(buffer) if i == 1 else buffer.zero_()
        train(model, opt, range(2, 4))
        assert_same(models[0], model)


def test_the_state_of_torch_sgd_loads() -> None:
    """Also of a wrapped model, without some hyperparameters, and with a buffer that is None."""
    ours, theirs = Net(), Net()
    settings: dict[str, Any] = {"lr": 2**-4, "momentum": 0.5}
    sgd = torch.optim.SGD([(f"module.{n}", p) for n, p in theirs.named_parameters()], **settings)
    train(theirs, sgd, range(2))
    ours.load_state_dict(theirs.state_dict())
    state = copy.deepcopy(sgd.state_dict())
    del state["param_groups"][0]["maximize"], state["param_groups"][0]["nesterov"]
    state["state"][0]["momentum_buffer"] = None
    nn.init.zeros_(sgd.state[theirs.gain]["momentum_buffer"])
    opt = GSGD(ours.named_parameters(), lr=1.0, network=gsgd.Network())
    opt.load_state_dict(state)
    assert opt.param_groups[0]["param_names"] == [n for n, _ in ours.named_parameters()]
    train(ours, opt, range(2, 4))
    train(theirs, sgd, range(2, 4))
    assert_same(ours, theirs)


def test_a_state_of_another_network_is_refused() -> None:
    opt = make(Net())
    other = mlp((3, 4, 2)).double()
    state = opt.state_dict()
    with pytest.raises(ValueError, match=r"'in_edges' of shape \(4, 2\), expected \(24, 2\)"):
        opt.load_state_dict(GSGD(other, lr=0.1).state_dict())
    bad = copy.deepcopy(state)
    bad["param_groups"][0]["gsgd"]["in_edges"] += 10**6
    with pytest.raises(ValueError, match="make no tree"):
        opt.load_state_dict(bad)
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict({**state, "param_groups": []})
    assert opt.param_groups[0]["gsgd"] is None
    for name, x in opt.state_dict()["param_groups"][0]["gsgd"].items():
        assert np.array_equal(x, state["param_groups"][0]["gsgd"][name])


def test_states_that_do_not_fit_are_told_of() -> None:
    """Without the skeleton; with half of one; of another method; with the skeleton where version 0.1 had it."""
    models = [Net(), Net(), Net()]
    opt, adam = make(models[0]), GAdam(models[1], example_inputs=example())
    for model, o in zip(models, (opt, adam), strict=False):
        train(model, o, range(1))
    state, resumed = opt.state_dict(), make(models[2])
    (group,) = state["param_groups"]
    bare = {**state, "param_groups": [{name: x for name, x in group.items() if name != "gsgd"}]}
    for given in ({}, None):
        with pytest.raises(ValueError, match='"gsgd" does not hold'):
            resumed.load_state_dict({**bare, "gsgd": given})
    with pytest.raises(ValueError, match=r"of another method than GSGD: it has \['exp_avg', 'exp_avg_sq'\]"):
        resumed.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match=r"of another method than GRMSprop: it has \['momentum_buffer'\]"):
        GRMSprop(models[2], example_inputs=example()).load_state_dict(state)
    assert not resumed.state
    with pytest.warns(UserWarning, match="saved without the skeleton"):
        resumed.load_state_dict(bare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict({**bare, "gsgd": group["gsgd"]})
        assert resumed.stats.steps == 1
        resumed.load_state_dict(state)
        make(Net(), momentum=0.0).load_state_dict(torch.optim.SGD(Net().parameters()).state_dict())


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("kind", [GSGD, GAdam])
@pytest.mark.parametrize(("momentum", "flat"), [(0.0, False), (0.9, False), (0.9, True)])
def test_distributed_checkpoints(kind: type[GSGD | GAdam], momentum: float, flat: bool, looked: bool) -> None:
    """torch.distributed.checkpoint's helpers carry all state, also into an optimizer that they looked at first."""
    options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flat)
    settings = {"betas": (momentum, 0.99)} if kind is GAdam else {"momentum": momentum}
    model, resumed = Net(), Net()
    with torch.no_grad():
        for p in resumed.parameters():
            p.mul_(0.1)
    opt, other = (kind(m, lr=0.01, example_inputs=example(), **settings) for m in (model, resumed))
    train(model, opt, range(3))
    state = copy.deepcopy(checkpoint.get_state_dict(model, opt, options=options))
    if looked:
        checkpoint.get_state_dict(resumed, other, options=options)
        assert other.stats.steps == 0
    weights, moments = state
    checkpoint.set_state_dict(resumed, other, model_state_dict=weights, optim_state_dict=moments, options=options)
    assert other.stats.steps == 3
    for m, o in ((model, opt), (resumed, other)):
        train(m, o, range(3, 6))
    assert_same(model, resumed)


def test_a_look_at_the_state_settles_nothing() -> None:
    """A checkpoint's helpers take a step of learning rate 0 to make a state: weights that come later have a say."""
    models, start = [Net(), Net()], Net()
    with torch.no_grad():
        for i, p in enumerate(start.parameters()):
            p.mul_(3 if i % 2 else 0.3)
    for i, model in enumerate(models):
        opt = make(model)
        if i:
            checkpoint.get_optimizer_state_dict(model, opt)
        model.load_state_dict(start.state_dict())
        train(model, opt, range(3))
    assert_same(*models)


def test_state_is_matched_by_names(engine: str) -> None:
    """Parameters of equal shapes in another order keep their own momentum; other names are refused."""

    def resumed(order: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
        net = trace(model, torch.rand(1, 6))
        opt = GSGD(list(model.named_parameters()), 0.1, 0.9, network=net)
        x = torch.rand(8, 6)
        for step in range(4):
            if step == 2:
                state = opt.state_dict()
                opt = GSGD(list(model.named_parameters())[::order], 0.1, 0.9, network=net)
                opt.load_state_dict(state)
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
        state["param_groups"][0]["param_names"] = ["a", "b", "c"]
        with pytest.raises(ValueError, match="is in one only"):
            opt.load_state_dict(state)
        return model

    assert_same(resumed(1), weights(resumed(-1)))
