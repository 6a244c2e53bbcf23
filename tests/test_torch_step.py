"""GSGD for PyTorch: the step of gsgd.GSGD, and the laws that it keeps."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch_models import (
    Branches,
    Net,
    assert_close,
    assert_same,
    backward,
    example,
    make,
    momenta,
    named,
    train,
    views,
    weights,
)

import gsgd
from gsgd.torch import GSGD, GAdam, GRMSprop, trace, verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0},
        {"momentum": 0.0, "weight_decay": 0.01, "scale": "initial"},
        {"nesterov": True, "weight_decay": 0.01, "rule": "largest"},
        {"scale": "ones", "threads": 2},
        {"momentum": 0.0, "scale": "initial", "rule": "largest", "max_ratio": 1.01},
        {"max_ratio": None, "clip_norm": 0.05},
    ],
)
def test_the_same_bits_as_on_arrays(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    model = Net(dtype)
    params = {name: w.numpy() for name, w in weights(model).items()}
    opt = make(model, **settings)
    other = gsgd.GSGD(params, opt.network, **{"lr": 0.05, "momentum": 0.9, **settings})
    assert opt.network.num_units == 24
    assert set(params) - set(opt.network.shapes) == {"gain", "empty"}
    for step in range(4):
        backward(model, step)
        opt.step()
        other.step({name: p.grad.numpy() for name, p in model.named_parameters()})
        assert_same(model, {name: torch.from_numpy(w) for name, w in params.items()})
    assert opt.stats == other.stats


def test_the_papers_method() -> None:
    model = Net()
    before = weights(model)
    net = trace(model, example(), residual="pin", batch_norm="paper")
    params = {name: w.numpy() for name, w in weights(model).items()}
    other = gsgd.GSGD(params, net, lr=0.02, scale="ones", rule="modulo")
    opt = GSGD.paper(model, 0.02, example_inputs=example())
    for name, w in before.items():
        changed = model.get_parameter(name) != w
        assert (model.get_parameter(name)[changed] == 1).all()
    for step in range(3):
        backward(model, step)
        opt.step()
        other.step({name: p.grad.numpy() for name, p in model.named_parameters()})
        assert_same(model, {name: torch.from_numpy(w) for name, w in params.items()})


@pytest.mark.parametrize("method", [GSGD, GAdam, GRMSprop])
def test_clipping_is_inside_the_step(engine: str, method: Any) -> None:
    """From a rescaled start the outputs stay the same; gradients clipped before the step part them."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(37, 29), nn.ReLU(), nn.Linear(29, 17), nn.ReLU(), nn.Linear(17, 5)).double()
    x, target = torch.randn(8, 37).double(), torch.randn(8, 5).double()
    net = trace(one, x)
    scales = 10 ** np.random.default_rng(0).uniform(-1, 1, net.num_units)

    def part(clip_norm: float | None) -> float:
        models = copy.deepcopy(one), copy.deepcopy(one)
        gsgd.rescale({n: p.detach().numpy() for n, p in models[1].named_parameters()}, net, scales)
        for model in models:
            opt = method(model.named_parameters(), lr=0.05, network=net, clip_norm=clip_norm)
            for _ in range(4):
                opt.zero_grad()
                (model(x) - target).square().mean().backward()
                if clip_norm is None:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                opt.step()
        return float((models[0](x) - models[1](x)).detach().abs().max())

    assert part(0.05) < 1e-9
    assert part(None) > 1e-3


def everything_pinned(model: nn.Module) -> gsgd.Network:
    net = gsgd.Network()
    h = net.pin(net.dense("0.weight", net.input(37), 29, bias="0.bias"), "GELU")
    net.output(net.dense("2.weight", h, 5, bias="2.bias"))
    return net


@pytest.mark.parametrize("network", [everything_pinned, lambda model: gsgd.Network()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 2**-6, "maximize": True},
        {"momentum": 0.5, "weight_decay": 2**-6},
        {"momentum": 0.5, "nesterov": True, "maximize": True},
    ],
)
def test_without_units_it_is_torch_sgd(
    network: Callable[[nn.Module], gsgd.Network], dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """Powers of two make every product exact, so that torch's fused multiply-add has the same bits as two roundings."""
    torch.manual_seed(0)
    ours = mlp((37, 29, 5)).to(dtype)
    theirs = copy.deepcopy(ours)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        return [{"params": named[:2], "lr": 2**-3}, {"params": named[2:], **settings}]

    optimizers = [GSGD(groups(ours), lr=2**-5, network=network(ours)), torch.optim.SGD(groups(theirs), lr=2**-5)]
    for step in range(4):
        x = torch.randn(8, 37, generator=torch.Generator().manual_seed(step), dtype=dtype)
        for model, opt in zip((ours, theirs), optimizers, strict=True):
            model.zero_grad()
            model(x).square().mean().backward()
            opt.step()
        assert_same(ours, theirs)


def test_without_units_it_is_torch_sgd_to_rounding() -> None:
    """In general torch's multiply-add rounds once where the core, alike on every CPU, rounds twice."""
    ours, theirs = Net(torch.float32), Net(torch.float32)
    settings: dict[str, Any] = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.01}
    train(ours, GSGD(ours.named_parameters(), network=gsgd.Network(), **settings), range(1))
    train(theirs, torch.optim.SGD(theirs.parameters(), **settings), range(1))
    assert_close(ours, theirs, rtol=4e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["gsgd", "sgd"])
def test_theorem_4_1(method: str) -> None:
    """From a model and from a randomly rescaled copy: the same function after every step, but not by SGD."""
    models = [Net(), Net()]
    net = trace(models[0], example())
    c = 10 ** np.random.default_rng(0).uniform(-0.5, 0.5, net.num_units)
    gsgd.rescale({name: w for name, w in views(models[1]).items() if name in net.shapes}, net, c)
    start, rescaled = (model(example()).detach() for model in models)
    torch.testing.assert_close(rescaled, start)
    for model in models:
        settings: dict[str, Any] = {"lr": 0.02, "momentum": 0.9}
        opt = make(model, **settings) if method == "gsgd" else torch.optim.SGD(model.parameters(), **settings)
        train(model, opt, range(20))
    one, other = (model(example()).detach() for model in models)
    assert (one - start).abs().max() > 0.5
    if method == "gsgd":
        torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(models[1].eval()(example()), models[0].eval()(example()), rtol=1e-8, atol=1e-8)
    else:
        assert (one - other).abs().max() > 0.1


def test_late_gradients(engine: str) -> None:
    """No momentum, no decay, no step for a branch without gradients; its weights follow the units that it reads."""
    model, net = Branches(), Branches.network()
    opt = GSGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=0.5, network=net)
    skeleton = gsgd.Skeleton(net, views(model))
    start, paths = weights(model), skeleton.path_values(views(model))
    versions = {name: p._version for name, p in model.named_parameters()}
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):
        opt.zero_grad()
        model(x, both=False).square().mean().backward()
        opt.step()
    for name, value in skeleton.path_values(views(model)).items():
        p = model.get_parameter(name)
        if not name.startswith("right"):
            assert not np.allclose(value, paths[name], rtol=1e-3, equal_nan=True)
            continue
        np.testing.assert_allclose(value, paths[name], rtol=1e-12)
        assert torch.equal(p, start[name]) == (p._version == versions[name]) == name.endswith("bias")
        assert not opt.state[p]["momentum_buffer"].any()
    reached = [w.clone() for w in model.right.parameters()]
    opt.zero_grad()
    model(x, both=True).square().mean().backward()
    opt.step()
    for p, w in zip(model.right.parameters(), reached, strict=True):
        assert not torch.allclose(p, w, rtol=1e-4)


@pytest.mark.parametrize("kind", [GSGD, GAdam, GRMSprop])
def test_a_group_without_gradients(engine: str, kind: Any) -> None:
    model, net = Branches(), Branches.network()
    groups: dict[bool, list[tuple[str, Tensor]]] = {False: [], True: []}
    for name, p in model.named_parameters():
        groups[name.startswith("right")].append((name, p))
    opt = kind([{"params": groups[False]}, {"params": groups[True], "lr": 0.02}], lr=0.01, network=net)
    skeleton = gsgd.Skeleton(net, views(model))
    start, paths = weights(model), skeleton.path_values(views(model))
    model(torch.ones(8, 4, dtype=torch.float64), both=False).square().mean().backward()
    opt.step()
    assert not any(torch.equal(p, start[name]) for name, p in groups[False])
    for name, _ in groups[True]:
        np.testing.assert_allclose(skeleton.path_values(views(model))[name], paths[name], rtol=1e-12)


def test_frozen_layers(engine: str) -> None:
    model = Net()
    for name in ("layers.0", "bn1", "layers.1.0.conv2"):
        model.body.get_submodule(name).requires_grad_(False)
    frozen = {name: w for name, w in weights(model).items() if not model.get_parameter(name).requires_grad}
    opt = make(model, weight_decay=0.1)
    assert not set(frozen) & set(opt.network.shapes)
    assert "meets a parameter that is not trained" in opt.network.pins.values()
    assert 0 < opt.network.num_units < 24
    start = weights(model)
    train(model, opt, range(3))
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == (name in frozen or name == "empty"), name
    verify(model, opt.network, example())


@pytest.mark.parametrize("what", ["pruned", "nan", "inf with graph"])
def test_a_step_that_is_not_finite_changes_nothing(engine: str, what: str) -> None:
    model = Net()
    opt = make(model)
    train(model, opt, range(2))
    name, index = gsgd.Skeleton(opt.network, views(model)).in_edges[3]
    backward(model, 2)
    if what == "pruned":
        with torch.no_grad():
            model.get_parameter(name)[index] = 0
        message = "skeleton weight"
    else:
        bad = model.body.conv1.weight.grad.clone()
        bad[1, 2, 0, 0] = torch.nan if what == "nan" else torch.inf
        model.body.conv1.weight.grad = bad.requires_grad_(what != "nan")
        message = r"gradient of 'body\.conv1\.weight' is not finite"
    before, buffers = weights(model), momenta(opt)
    if engine == "core":
        with pytest.raises(FloatingPointError, match=message):
            opt.step()
        assert opt.stats.steps == 2
        assert opt.stats.skipped == 0
    else:
        opt.step()
        assert opt.stats.skipped == 1
        assert copy.deepcopy(opt).stats == opt.stats
    assert_same(model, before)
    for mine, desired in zip(momenta(opt), buffers, strict=True):
        assert torch.equal(mine, desired)
    if what == "nan":
        train(model, opt, range(3, 4))
        assert all(p.isfinite().all() for p in model.parameters())


def test_steps_that_fail_are_not_counted() -> None:
    model = mlp((4, 6, 3))
    opt = GAdam(model, lr=0.01)
    for bad in (False, True):
        opt.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        if bad:
            model[0].weight.grad[0, 0] = torch.nan
            with pytest.raises(FloatingPointError):
                opt.step()
        else:
            opt.step()
    assert {state["step"] for state in opt.state.values()} == {1}


@pytest.mark.filterwarnings("ignore:no unit was found")
def test_a_late_gradient_has_its_own_bias_correction(engine: str) -> None:
    net = gsgd.Network()
    one, late = (("one", torch.nn.Parameter(torch.ones(3))), ("late", torch.nn.Parameter(torch.ones(3))))
    own = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    opt, adam = GAdam([one, late], lr=0.1, network=net), torch.optim.Adam(own, lr=0.1)
    for step in range(5):
        for (_, p), q in zip((one, late), own, strict=True):
            p.grad = q.grad = None if q is own[1] and step < 3 else torch.tensor([1.0, -2.0, 0.1 * step])
        opt.step()
        adam.step()
    for (_, p), q in zip((one, late), own, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        (GSGD, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1)),
        (GAdam, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
        (GRMSprop, lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.1)),
    ],
)
def test_complex_parameters_take_torch_s_steps_and_integers_stay(engine: str, method: Any, own: Any) -> None:
    """Beside the network; a complex gradient may be a conjugate view. Memory may be replaced between steps."""
    model = mlp((4, 6, 3)).double()
    values = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    number, theirs = (nn.Parameter(torch.view_as_complex(values.clone())) for _ in range(2))
    counts = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    flags = nn.Parameter(torch.tensor([True]), requires_grad=False)
    beside = [("number", number), ("counts", counts), ("flags", flags)]
    momentum = {} if method is GAdam else {"momentum": 0.9}
    opt = method([*named(model), *beside], 0.1, weight_decay=0.1, network=trace(model), **momentum)
    plain = own([theirs])
    for step in range(4):
        if step == 2:
            number.data = number.data.clone()
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.zero_grad()
        model(torch.ones(2, 4).double()).square().sum().backward()
        grad = torch.view_as_complex(values + step)
        number.grad, theirs.grad = grad.conj() if step % 2 else grad, grad.conj().resolve_conj() if step % 2 else grad
        opt.step()
        plain.step()
    torch.testing.assert_close(number, theirs, rtol=1e-12, atol=1e-12)
    assert (counts.tolist(), flags.tolist()) == ([1, 2], [True])
    assert not opt.state[counts]
    assert not opt.state[flags]
