"""What training loops do with an optimizer."""

import copy
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch_models import Net, Weights, assert_close, assert_same, backward, loss_of, make, named, train, weights

import gsgd
from gsgd.torch import GSGD, trace

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda opt: StepLR(opt, 2, 0.5),
    "one cycle": lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=6, base_momentum=0.5, max_momentum=0.9),
    "plateau": lambda opt: ReduceLROnPlateau(opt, patience=0, threshold=1.0, factor=0.5),
    "lambda": lambda opt: LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
}


@pytest.mark.parametrize("lr", [lambda: 0.1, lambda: torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules(name: str, lr: Callable[[], Any]) -> None:
    """Where SGD and G-SGD are the same method, a schedule has the same effect on both."""
    ours, theirs = Net(), Net()
    optimizers = [
        GSGD(ours.named_parameters(), lr(), momentum=0.9, network=gsgd.Network()),
        torch.optim.SGD(theirs.parameters(), lr(), momentum=0.9),
    ]
    schedulers = [SCHEDULERS[name](opt) for opt in optimizers]
    used = set()
    for step in range(5):
        for model, opt, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True):
            loss = backward(model, step).detach()
            opt.step()
            scheduler.step(loss) if name == "plateau" else scheduler.step()
            used.add((float(opt.param_groups[0]["lr"]), opt.param_groups[0]["momentum"]))
    assert len(used) > 1
    assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_closure_is_called_once_and_first() -> None:
    models = [Net(), Net()]
    opt, other = (make(model) for model in models)
    seen: list[Weights] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        seen.append(weights(models[0]))
        return backward(models[0], 0)

    start = weights(models[0])
    loss = opt.step(closure)
    assert len(seen) == 1
    assert_same(seen[0], start)
    assert torch.equal(loss, loss_of(Net(), 0))
    train(models[1], other, range(1))
    assert_same(models[0], models[1])


def test_hooks() -> None:
    model, calls = Net(), []
    opt = make(model)
    assert isinstance(opt, torch.optim.Optimizer)
    start = weights(model)
    opt.register_step_pre_hook(lambda o, args, kwargs: calls.append((o, torch.equal(model.gain, start["gain"]))))
    opt.register_step_post_hook(lambda o, args, kwargs: calls.append((o, torch.equal(model.gain, start["gain"]))))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "mine": len(state["param_groups"][0]["gsgd"]["c"])})
    opt.register_load_state_dict_pre_hook(lambda o, state: calls.append((o, state["mine"])))
    train(model, opt, range(1))
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert calls == [(opt, True), (opt, False), (opt, opt.network.num_units)]
    assert set(state) == {"state", "param_groups", "mine"}


def test_grad_scaler() -> None:
    """A step whose gradients overflow is left out, and nothing of it stays."""
    model, plain = Net(), Net()
    opt, other = make(model), make(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model.gain.grad.fill_(torch.inf)
        else:
            train(plain, other, range(step, step + 1))
        scaler.step(opt)
        scaler.update()
        assert_same(model, plain)
    assert scaler.get_scale() == 2.0**9
    assert opt.stats.steps == 3


def test_clipped_gradients_and_both_ways_of_zero_grad() -> None:
    models = [Net(), Net()]
    optimizers = [make(model, lr=0.1) for model in models]
    for model, opt, to_none in zip(models, optimizers, (True, False), strict=True):
        for step in range(3):
            opt.zero_grad(set_to_none=to_none)
            loss_of(model, step).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert norm > 0.1
            opt.step()
    assert_same(*models)
    before = weights(models[0])
    optimizers[0].zero_grad()
    optimizers[0].step()
    assert_same(models[0], before)
    assert optimizers[0].stats.steps == 3


def test_a_new_group_takes_plain_steps() -> None:
    model, head = Net(), nn.Linear(10, 10).double()
    opt = make(model)
    train(model, opt, range(2))
    with pytest.raises(ValueError, match="names"):
        opt.add_param_group({"params": list(head.parameters())})
    with pytest.raises(ValueError, match="lr: expected"):
        opt.add_param_group({"params": list(head.named_parameters()), "lr": -1.0})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": list(head.named_parameters()), "lr": 2**-4, "momentum": 0.0})
    both, start = nn.Sequential(model, head), weights(head)
    backward(both, 2)
    opt.step()
    for name, p in head.named_parameters():
        assert torch.equal(p, start[name] - 2**-4 * p.grad)
    other = Net()
    again = make(other)
    train(other, again, range(2))
    backward(nn.Sequential(other, copy.deepcopy(head)), 2)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        p.grad = q.grad
    again.step()
    assert_same(model, other)


def test_a_group_that_is_removed() -> None:
    model, plain = mlp((4, 6, 3)), nn.Linear(3, 3)
    groups = [{"params": named(model)[:2]}, {"params": named(model)[2:]}]
    opt = GSGD(groups, lr=0.1, network=trace(model))
    opt.add_param_group({"params": [(f"plain.{n}", p) for n, p in named(plain)]})

    def step() -> None:
        opt.zero_grad()
        plain(model(torch.ones(2, 4))).sum().backward()
        opt.step()

    step()
    opt.param_groups.pop()
    before = weights(plain)
    step()
    assert_same(plain, before)
    opt.param_groups.pop()
    with pytest.raises(ValueError, match=r"parameter '2\.weight' was removed from its group"):
        step()


def test_a_retained_graph_is_out_of_date_after_a_step(engine: str) -> None:
    torch.manual_seed(0)
    model = mlp((6, 5, 4, 3)).double()
    opt = GSGD(model, lr=0.1)
    model[2].requires_grad_(False)  # follows the units of the first layer
    out = model(torch.randn(7, 6, dtype=torch.float64, requires_grad=True)).square().sum()
    out.backward(retain_graph=True)
    model[4].weight.grad = model[4].bias.grad = None
    before = weights(model)
    opt.step()
    assert not torch.equal(model[2].weight, before["2.weight"])
    for name, p in model.named_parameters():
        assert p._version > 0 or torch.equal(p, before[name]), name
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_parameter_that_is_frozen_after_construction_is_named_in_a_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    opt = GSGD(model, lr=0.1)
    model[2].weight.requires_grad_(False)
    caught = []
    for _ in range(2):
        opt.zero_grad()
        model(torch.ones(5, 4, dtype=torch.float64)).square().sum().backward()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            opt.step()
        caught.append([str(w.message) for w in found])
    assert len(caught[0]) == 1
    assert "'2.weight' was frozen" in caught[0][0]
    assert caught[1] == []


def test_children_of_a_process_that_ran_in_parallel() -> None:
    """After a step on two threads: workers of a DataLoader, and a child that takes steps itself."""
    script = """
        import os, torch
        from gsgd.torch import GSGD

        torch.set_num_threads(2)
        model = torch.nn.Sequential(torch.nn.Linear(500, 500), torch.nn.ReLU(), torch.nn.Linear(500, 10))
        opt = GSGD(model, lr=0.1, momentum=0.9)

        def step(x):
            opt.zero_grad()
            for p in model.parameters():
                p.grad = torch.ones_like(p) * x
            opt.step()

        step(1e-4)
        loader = torch.utils.data.DataLoader(torch.full((4,), 1e-4), num_workers=2, multiprocessing_context="fork")
        for x in loader:
            step(x)
        child = os.fork()
        if child == 0:
            opt.step()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        step(1e-4)
        print(opt.stats.steps)
    """
    run = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)], timeout=100, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "6"), run.stderr
