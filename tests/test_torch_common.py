"""What torch's own tests ask of every default optimizer, of GSGD, GAdam and GRMSprop."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, SequentialLR
from torch.optim.swa_utils import SWALR, AveragedModel
from torch_models import Weights, assert_close, assert_same, weights

from gsgd.torch import GSGD, GAdam, GRMSprop, trace

Optimizer = GSGD | GAdam | GRMSprop
KINDS: dict[str, Callable[..., Optimizer]] = {
    "sgd": GSGD,
    "momentum": lambda params, lr=0.1, **settings: GSGD(params, lr, 0.9, nesterov=True, weight_decay=0.01, **settings),
    "adam": GAdam,
    "rmsprop": lambda params, lr=0.01, **settings: GRMSprop(params, lr, momentum=0.9, **settings),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp((5, 6, 4, 3)).to(dtype)


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()))
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()


def keys(opt: torch.optim.Optimizer) -> list[set[str]]:
    return [set(group) for group in opt.param_groups]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES: dict[str, Callable[[nn.Module, Optimizer], tuple[nn.Module, Optimizer]]] = {
    "deepcopy": lambda net, opt: copy.deepcopy((net, opt)),
    "pickle": lambda net, opt: pickle.loads(pickle.dumps((net, opt))),
}


@kinds
@pytest.mark.parametrize("through", COPIES.values(), ids=COPIES)
def test_copies_go_on_alike_and_gain_no_keys(kind: Any, through: Any) -> None:
    net = model()
    opt = kind(net)
    before = keys(opt)
    for steps in (range(1), range(1, 3)):
        other, copied = through(net, opt)
        assert keys(copied) == before == keys(opt)
        assert copied.state_dict()["param_groups"][0].keys() == opt.state_dict()["param_groups"][0].keys()
        train(net, opt, steps)
        train(other, copied, steps)
        assert_same(net, other)
        assert copied.stats == opt.stats


@kinds
def test_a_state_through_a_file(kind: Any) -> None:
    """Of safe types only; and through a shallow copy, whose load leaves the given state as it is."""
    net, other = model(), model()
    opt = kind(net)
    train(net, opt, range(3))
    state = opt.state_dict()
    resumed = kind(other)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(through_a_file(state))
    given = copy.deepcopy(state)
    kind(model()).load_state_dict(state)
    assert str(state) == str(given)
    assert keys(resumed) == keys(opt)
    train(net, opt, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(net, other)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_takes_the_dtype_of_the_parameters(kind: Any, dtype: torch.dtype) -> None:
    """Moments are cast, the count of steps and the reference scale are not."""
    net, other = model(), model(dtype)
    opt, resumed = kind(net), kind(other)
    train(net, opt, range(2))
    other.load_state_dict(net.state_dict())
    state = opt.state_dict()
    resumed.load_state_dict(state)
    for p, mine in zip(net.parameters(), other.parameters(), strict=True):
        assert resumed.state[mine].keys() == opt.state[p].keys()
        for name, x in opt.state[p].items():
            got = resumed.state[mine][name]
            if name == "step":
                assert got == x
            else:
                assert torch.equal(got, x.to(dtype))
    assert torch.equal(resumed.state_dict()["param_groups"][0]["gsgd"]["c"], state["param_groups"][0]["gsgd"]["c"])
    train(net, opt, range(2, 4))
    train(other, resumed, range(2, 4))
    tolerance = 8 * torch.finfo(dtype).eps
    assert_close(other, net, rtol=tolerance, atol=tolerance)


@kinds
def test_hooks_around_the_state(kind: Any) -> None:
    """In torch's order, `prepend` before others. They see the skeleton, and what they return is what is loaded."""
    net = model()
    opt, calls = kind(net), []

    def note(name: str) -> Callable[..., None]:
        def hook(o: Any, state: Any = None) -> None:
            assert o is opt
            assert state is None or len(state["param_groups"][0]["gsgd"]["c"]) == opt.network.num_units == 10
            calls.append(name)

        return hook

    def marked(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "mine": 1}

    handles = [
        opt.register_state_dict_pre_hook(note("pre")),
        opt.register_state_dict_post_hook(marked),
        opt.register_state_dict_post_hook(note("first"), prepend=True),
        opt.register_load_state_dict_pre_hook(note("load")),
        opt.register_load_state_dict_post_hook(note("loaded")),
        opt.register_load_state_dict_pre_hook(lambda o, state: {**state, "param_groups": lowered(state)}, prepend=True),
    ]

    def lowered(state: dict[str, Any]) -> list[dict[str, Any]]:
        assert state["mine"] == 1
        return [{**group, "lr": 0.0625, "gsgd": {**group["gsgd"], "steps": 7}} for group in state["param_groups"]]

    handles.append(opt.register_load_state_dict_post_hook(lambda o: calls.append(o.stats.steps)))
    train(net, opt, range(1))
    opt.load_state_dict(opt.state_dict())
    assert calls == ["pre", "first", "load", "loaded", 7]
    assert opt.param_groups[0]["lr"] == 0.0625
    for handle in handles:
        handle.remove()
    opt.load_state_dict(opt.state_dict())
    assert len(calls) == 5


@kinds
def test_step_hooks(kind: Any) -> None:
    net, calls = model(), []
    opt = kind(net)
    opt.register_step_pre_hook(lambda *_: calls.append(opt.stats.steps))
    handle = opt.register_step_post_hook(lambda *_: calls.append(opt.stats.steps))
    train(copy.deepcopy(net), opt, range(1))  # no gradients: hooks run all the same
    train(net, opt, range(2))
    handle.remove()
    train(net, opt, range(2, 3))
    assert calls == [0, 0, 0, 1, 1, 2, 2]


@kinds
def test_tensor_lr(kind: Any) -> None:
    """Of no dimensions or of one element; the caller's tensor is read anew in every step."""
    nets = [model() for _ in range(3)]
    rates: list[Any] = [0.125, torch.tensor(0.125), torch.tensor([0.125])]
    optimizers = [kind(net, lr=lr) for net, lr in zip(nets, rates, strict=True)]
    for net, opt in zip(nets, optimizers, strict=True):
        train(net, opt, range(2))
        assert_same(net, nets[0])
    rates[1].fill_(0.0)
    before = weights(nets[1])
    if kind is GSGD:
        train(nets[1], optimizers[1], range(2, 3))
        assert_same(nets[1], before)


@kinds
@pytest.mark.parametrize("later", [False, True])
def test_an_lr_of_two_elements_is_refused(kind: Any, later: bool) -> None:
    net = model()
    before, two = weights(net), torch.tensor([0.1, 0.2])
    if not later:
        with pytest.raises(ValueError, match="lr: expected"):
            kind(net, lr=two)
    else:
        opt = kind(net)
        with pytest.raises(ValueError, match="lr: expected"):
            opt.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))], "lr": two})
        opt.param_groups[0]["lr"] = two
        with pytest.raises(ValueError, match="lr: expected"):
            train(net, opt, range(1))
    assert_same(net, before)


@kinds
def test_memory_that_is_not_contiguous(kind: Any, engine: str) -> None:
    """Parameters and their gradients, apart or together, whose entries lie apart."""

    def spread(x: Tensor) -> Tensor:
        return torch.stack((x, x), -1)[..., 0]

    results: list[nn.Module] = []
    for params, grads in itertools.product((False, True), repeat=2):
        net, rng = model(), torch.Generator().manual_seed(0)
        for p in net.parameters():
            p.data = spread(p.data) if params else p.data
        opt = kind(net, engine=engine)
        for _ in range(3):
            for p in net.parameters():
                g = torch.randn(p.shape, generator=rng, dtype=p.dtype)
                p.grad = spread(g) if grads else g
            opt.step()
        results.append(net)
    for net in results:
        assert_same(net, results[0])


@kinds
def test_a_complex_parameter_is_two_real_ones(kind: Any) -> None:
    """As view_as_real of it would be, beside a network whose units are not its own."""
    results: list[Weights] = []
    for is_complex in (True, False):
        net = model()
        start = torch.complex(torch.arange(3.0), torch.ones(3)).to(torch.complex128)
        own = nn.Parameter(start if is_complex else torch.view_as_real(start).clone())
        opt = kind([*net.named_parameters(), ("own", own)], network=trace(net))
        for _ in range(3):
            opt.zero_grad()
            parts = torch.view_as_real(own) if is_complex else own
            ((parts - 3).square().sum() + net(torch.ones(2, 5).double()).square().sum()).backward()
            opt.step()
        results.append({**weights(net), "own": parts.detach().clone()})
    assert_same(*results)


SCHEDULES: dict[str, Callable[[Any], list[Any]]] = {
    "chained": lambda opt: [LinearLR(opt, 0.5, total_iters=2), CosineAnnealingLR(opt, 4)],
    "sequential": lambda opt: [SequentialLR(opt, [LinearLR(opt, 0.5), CosineAnnealingLR(opt, 4)], milestones=[2])],
    "plateau": lambda opt: [ReduceLROnPlateau(opt, patience=0, threshold=1.0)],
    "swa": lambda opt: [SWALR(opt, swa_lr=0.01, anneal_epochs=2)],
}


@kinds
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_sets_a_rate_as_one_sets_it_by_hand(kind: Any, schedule: Any) -> None:
    nets = [model(), model()]
    opt, plain = (kind(net) for net in nets)
    schedulers = schedule(opt)
    rates = set()
    for step in range(4):
        plain.param_groups[0]["lr"] = float(opt.param_groups[0]["lr"])
        rates.add(plain.param_groups[0]["lr"])
        for net, o in zip(nets, (opt, plain), strict=True):
            train(net, o, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
    assert len(rates) > 1
    assert_same(*nets)


@kinds
def test_averaged_model(kind: Any) -> None:
    """An average of weights copies the model, and is the mean; training does not notice."""
    nets, seen = [model(), model()], []
    opt, plain = (kind(net) for net in nets)
    average = AveragedModel(nets[0])
    for step in range(3):
        for net, o in zip(nets, (opt, plain), strict=True):
            train(net, o, range(step, step + 1))
        average.update_parameters(nets[0])
        seen.append(weights(nets[0]))
    assert_same(*nets)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, torch.stack([w[name] for w in seen]).mean(0))


@kinds
def test_grad_scaler_leaves_out_an_overflow(kind: Any) -> None:
    net, plain = model(), model()
    opt, other = kind(net), kind(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        opt.zero_grad()
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step)).double()
        scaler.scale(net(x).square().mean()).backward()
        if step == 1:
            net[0].weight.grad[0, 0] = torch.inf
        else:
            train(plain, other, range(step, step + 1))
        scaler.step(opt)
        scaler.update()
        assert_same(net, plain)
    assert opt.stats == other.stats
