"""GSGD for PyTorch: the step of gsgd.GSGD, and everything that users of torch.optim expect."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import BasicBlock, ResNet, mlp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gsgd
import gsgd.torch.engines.core
from gsgd.torch import GSGD, GAdam, GRMSprop, trace, verify
from gsgd.torch.engines import ArrayEngine

Weights = dict[str, Tensor]


class Net(nn.Module):
    """A residual CNN with batch norms, and parameters outside the network: of no dimension, and of no entries."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = ResNet(BasicBlock, (1, 1), 4, cifar=True)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.1)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.cat((self.gain[None], self.empty.flatten()))


class Branches(nn.Module):
    """Two heads on one stem; the second is used only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 6)
        self.left, self.right = mlp((6, 5, 3)), mlp((6, 5, 3))
        self.double()

    def forward(self, x: Tensor, both: bool) -> Tensor:
        h = F.relu(self.stem(x))
        return self.left(h) + self.right(h) if both else self.left(h)

    @staticmethod
    def network() -> gsgd.Network:
        net = gsgd.Network()
        h = net.relu(net.dense("stem.weight", net.input(4), 6, bias="stem.bias"))
        for head in ("left", "right"):
            y = net.relu(net.dense(f"{head}.0.weight", h, 5, bias=f"{head}.0.bias"))
            net.output(net.dense(f"{head}.2.weight", y, 3, bias=f"{head}.2.bias"))
        return net


def example(step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    p = next(model.parameters())
    out = model(example(step).to(p.device, p.dtype))
    return F.cross_entropy(out.float() if out.dtype.itemsize < 4 else out, torch.arange(6, device=p.device) + step % 4)


def backward(model: nn.Module, step: int) -> Tensor:
    model.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        opt.step()


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def momenta(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [s["momentum_buffer"].clone() for s in opt.state.values()]


def views(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def assert_same(one: nn.Module | Weights, other: nn.Module | Weights) -> None:
    """The same bits."""
    a, b = (weights(x) if isinstance(x, nn.Module) else x for x in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(one: nn.Module, other: nn.Module, **tolerances: float) -> None:
    theirs = weights(other)
    for name, w in weights(one).items():
        torch.testing.assert_close(w, theirs[name], **tolerances, check_dtype=False, check_device=False, msg=name)


def make(model: nn.Module, **settings: Any) -> GSGD:
    return GSGD(model, example_inputs=example(), **{"lr": 0.05, "momentum": 0.9, **settings})


@pytest.fixture(params=["core", "array"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the C core, and as on other devices."""
    if request.param == "array":
        monkeypatch.setattr("gsgd.torch.engines.CoreEngine", lambda *args: ArrayEngine(*args[:-1]))
    return str(request.param)


# the step


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


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Every third parameter, with hyperparameters of its own."""
    named = list(model.named_parameters())
    return [
        {"params": named[0::3]},
        {"params": named[1::3], "lr": 0.02, "momentum": 0.0, "weight_decay": 0.1},
        {"params": named[2::3], "lr": 0.01, "momentum": 0.5, "nesterov": True, "maximize": True},
    ]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_array_operations_take_the_same_steps(device: str, dtype: torch.dtype, rtol: float) -> None:
    """With groups, gradients that come late and layers that are frozen later."""
    core, array = Net(dtype), Net(dtype).to(device)
    net = trace(core, example(dtype=dtype))
    optimizers = [GSGD(groups_of(core), lr=0.05, momentum=0.9, network=net)]
    optimizers.append(GSGD(groups_of(array), lr=0.05, momentum=0.9, network=net, engine="array"))
    for step in range(5):
        backward(core, step)
        for (name, p), q in zip(core.named_parameters(), array.parameters(), strict=True):
            if (step < 2 and "layers.1" in name) or (step > 3 and "layers.0.0.conv2" in name):
                p.grad = None
            q.grad = None if p.grad is None else p.grad.to(device)
        for opt in optimizers:
            opt.step()
        assert_close(array, core, rtol=rtol, atol=rtol / 10)
    torch.testing.assert_close(
        [m.cpu() for m in momenta(optimizers[1])], momenta(optimizers[0]), rtol=rtol, atol=rtol / 10
    )
    assert optimizers[0].stats == optimizers[1].stats
    assert_close(array, core, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_array_operations_approximate_batch_norm_alike(mode: str) -> None:
    models = [Net(), Net()]
    settings: dict[str, Any] = {"batch_norm": mode, "residual": "pin", "scale": "ones", "lr": 0.02}
    optimizers = [make(models[0], **settings)]
    optimizers.append(make(models[1], engine="array", **settings))
    for step in range(4):
        backward(models[0], step)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.grad = p.grad.clone() if step else p.grad
        for opt in optimizers:
            opt.step()
        assert_close(*models, rtol=1e-11, atol=1e-12)
    plain = Net()
    train(plain, make(plain, **{**settings, "batch_norm": "exact"}), range(1))
    assert (plain.body.fc.weight - models[0].body.fc.weight).abs().max() > 0.01


class NoDoubles(TorchDispatchMode):
    """Refuses to make float64, as Apple's MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [] if func is torch.ops.aten.lift_fresh.default else tree_leaves(out)  # that is NumPy's, on the host
        if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in made):
            raise TypeError(f"{func}: there is no float64")
        return out


def test_a_device_without_float64() -> None:
    models = [Net(torch.float32), Net(torch.float32)]
    net = trace(models[0], example())
    settings: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "network": net}
    optimizers = [GSGD(models[0], **settings)]
    with NoDoubles(), pytest.raises(TypeError, match="no float64"):
        torch.ones(1, dtype=torch.float64)
    with NoDoubles():
        optimizers.append(GSGD(models[1], engine="array", **settings))
    for step in range(4):
        backward(models[0], step)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.grad = p.grad.clone()
        optimizers[0].step()
        with NoDoubles():
            optimizers[1].step()
    assert_close(*models, rtol=1e-3, atol=1e-5)
    assert optimizers[0].stats == optimizers[1].stats


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_a_step_stays_on_its_device(monkeypatch: pytest.MonkeyPatch, device: str, mode: str) -> None:
    """On tensors without values, which know their device and raise where a value is asked for."""
    opt = make(Net(torch.float32), batch_norm=mode, nesterov=True, weight_decay=0.1)
    written, where = [], torch.where

    def where_out(condition: Tensor, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        value = where(condition, x, y)
        if out is not None:
            assert (out.shape, out.dtype, out.device) == (value.shape, value.dtype, value.device)
            written.append(out)
        return value

    # these want to see the device before they ask whether the tensors are of this kind
    monkeypatch.setattr(torch, "where", where_out)
    monkeypatch.setattr(Tensor, "__getitem__", lambda x, ids: torch.ops.aten.index.Tensor(x, [ids]))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tensors = {name: torch.empty(p.shape, device=device) for name, p in opt._tensors().items()}
        engine = ArrayEngine(opt.network, opt._coordinates, tensors)
        gradients, momenta = ([torch.empty_like(p) for p in tensors.values()] for _ in range(2))
        for wait in (lambda p: p.sum().item(), lambda p: p.nonzero(), lambda p: p + torch.ones(p.shape)):
            with pytest.raises(RuntimeError):
                wait(gradients[0])
        methods = [gsgd.methods.SGD(0.05, 0.9, True, 0.1)]
        which, stats = [0] * len(tensors), gsgd.optimizer.Stats()
        engine.step(gradients, (momenta, [None] * len(tensors)), methods, which, (10.0, 1.0), 1, stats)
    assert [id(t) for t in written] == [id(t) for t in (*engine.aliases, *momenta)]
    assert stats.clamped.device.type == device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """A network of half-precision and single-precision layers."""
    model, double = Net(torch.float32), Net()
    model.body.layers.to(dtype)
    double.load_state_dict(model.state_dict())
    net = trace(double, example())
    optimizers = [GSGD(m.named_parameters(), lr=0.05, momentum=0.9, network=net) for m in (model, double)]
    for step in range(3):
        backward(double, step)
        for p, q in zip(model.parameters(), double.parameters(), strict=True):
            p.grad = q.grad.to(p.dtype)
        for opt in optimizers:
            opt.step()
    eps = torch.finfo(dtype).eps
    assert_close(model, double, rtol=8 * eps, atol=2 * eps)
    assert model.body.layers[0][0].conv1.weight.dtype == dtype
    assert (double.body.fc.weight - Net().body.fc.weight).abs().max() > 5 * eps


class NoWaiting(TorchDispatchMode):
    """Refuses what on a GPU would wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = func._schema.name in {
            f"aten::{n}" for n in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        }
        masked = "index" in func._schema.name and any(
            t is not None and t.dtype == torch.bool for x in args if isinstance(x, list) for t in x
        )
        if waits or masked:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    opt = make(model, weight_decay=0.01, nesterov=True, engine="array")
    train(model, opt, range(1))
    backward(model, 1)

    def refuse(*args: Any) -> Any:
        raise AssertionError("copies to the host")

    for name in ("numpy", "cpu", "tolist", "__array__", "item"):
        monkeypatch.setattr(Tensor, name, refuse)
    with NoWaiting():
        for wait in (lambda p: bool(p.sum() > 0), lambda p: p[p > 0], lambda p: p.cpu()):
            with pytest.raises(AssertionError):
                wait(model.gain.detach().reshape(1))
        opt.step()
    monkeypatch.undo()
    assert opt.stats.steps == 2


# laws


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


# what training loops do


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
    opt.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1})
    opt.register_load_state_dict_pre_hook(lambda o, state: calls.append((o, state["mine"])))
    train(model, opt, range(1))
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert calls == [(opt, True), (opt, False), (opt, 1)]
    assert set(state) == {"state", "param_groups", "gsgd", "mine"}


def through_memory(model: nn.Module, opt: GSGD) -> tuple[nn.Module, GSGD]:
    other = Net(seed=1)
    resumed = make(other, rule="largest", lr=1.0, momentum=0.0)
    train(other, resumed, range(2))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    return other, resumed


def through_file(model: nn.Module, opt: GSGD) -> tuple[nn.Module, GSGD]:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = Net(seed=1)
    resumed = make(other)
    resumed.load_state_dict(state["opt"])
    other.load_state_dict(state["model"])
    return other, resumed


RESUME: dict[str, Callable[[nn.Module, GSGD], Any]] = {
    "memory": through_memory,
    "file": through_file,
    "pickle": lambda *both: pickle.loads(pickle.dumps(both)),
    "deepcopy": lambda *both: copy.deepcopy(both),
}


@pytest.mark.parametrize("way", RESUME)
def test_resuming_equals_not_stopping(engine: str, way: str) -> None:
    model = Net()
    opt = make(model, weight_decay=0.01, nesterov=True)
    train(model, opt, range(3))
    other, resumed = RESUME[way](model, opt)
    train(model, opt, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(model, other)
    assert opt.stats == resumed.stats
    for mine, theirs in zip(momenta(opt), momenta(resumed), strict=True):
        assert torch.equal(mine, theirs)


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
    bad["gsgd"]["in_edges"] += 10**6
    with pytest.raises(ValueError, match="make no tree"):
        opt.load_state_dict(bad)
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict({**state, "param_groups": []})
    assert opt.state_dict()["param_groups"] == state["param_groups"]


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


# what others do to the parameters between steps


def unchanged(model: nn.Module) -> None:
    pass


def replaced(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)
    assert not model.body.layers[1][0].conv1.weight.is_contiguous()


def columns_first(model: nn.Module) -> None:
    p = model.body.fc.weight
    p.data = p.data.t().contiguous().t()


def to_and_fro(model: nn.Module) -> None:
    model.bfloat16()
    model.double()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({n: t.bfloat16() for n, t in model.state_dict().items()})


@pytest.mark.parametrize(
    ("mutate", "like"),
    [
        (replaced, unchanged),
        (channels_last, unchanged),
        (columns_first, unchanged),
        (to_and_fro, loaded),
    ],
)
def test_parameters_may_move_between_steps(
    engine: str, mutate: Callable[[nn.Module], None], like: Callable[[nn.Module], None]
) -> None:
    moved, other = Net(), Net()
    optimizers = [make(moved), make(other)]
    for step in range(4):
        if step == 2:
            mutate(moved)
            like(other)
        backward(other, step)
        for p, q in zip(moved.parameters(), other.parameters(), strict=True):
            p.grad = q.grad.clone()
        for opt in optimizers:
            opt.step()
    assert_close(moved, other, rtol=1e-12, atol=1e-12)
    if engine == "core":
        assert_same(moved, other)


def test_a_model_may_change_its_dtype() -> None:
    model, double = Net(torch.float32), Net()
    double.load_state_dict(model.state_dict())
    optimizers = [make(model), make(double)]
    train(model, optimizers[0], range(2))
    train(double, optimizers[1], range(2))
    model.double()
    train(model, optimizers[0], range(2, 4))
    train(double, optimizers[1], range(2, 4))
    assert_close(model, double, rtol=1e-3, atol=1e-4)
    assert all(m.dtype == torch.float64 for m in momenta(optimizers[0]))


def test_other_strides_at_the_same_address() -> None:
    """A square weight is transposed in place, another one cut."""
    torch.manual_seed(0)
    model = mlp((5, 5, 3)).double()
    other = copy.deepcopy(model)
    optimizers = [GSGD(m, lr=0.1) for m in (model, other)]
    model[0].weight.data = model[0].weight.data.t()
    other[0].weight.data = other[0].weight.data.t().contiguous()
    x = torch.randn(8, 5, dtype=torch.float64)
    for m, opt in zip((model, other), optimizers, strict=True):
        m(x).square().mean().backward()
        opt.step()
    assert_same(model, other)
    model[0].weight.data = model[0].weight.data[:4]
    model[0].weight.grad = torch.ones(4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"parameter '0.weight': expected shape \(5, 5\), got \(4, 5\)"):
        optimizers[0].step()


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
    else:
        opt.step()
    assert_same(model, before)
    for mine, desired in zip(momenta(opt), buffers, strict=True):
        assert torch.equal(mine, desired)
    if what == "nan":
        train(model, opt, range(3, 4))
        assert all(p.isfinite().all() for p in model.parameters())


# gradients


def of_wide_strides(g: Tensor) -> Tensor:
    wide = torch.full((*(2 * n for n in g.shape),), torch.nan, dtype=g.dtype)
    wide[tuple(slice(None, None, 2) for _ in g.shape)] = g
    return wide[tuple(slice(None, None, 2) for _ in g.shape)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda g: g.contiguous(memory_format=torch.channels_last) if g.ndim == 4 else g,
    "transposed": lambda g: g.mT.contiguous().mT if g.ndim > 1 else g,
    "wide": of_wide_strides,
    "expanded": lambda g: torch.ones((), dtype=g.dtype).expand(g.shape),
    "part of a bucket": lambda g: torch.cat([g.reshape(-1), g.reshape(-1)])[g.numel() :].view(g.shape),
}


@pytest.mark.parametrize("settings", [{}, {"maximize": True, "weight_decay": 0.1}, {"batch_norm": "paper"}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients(engine: str, layout: str, settings: dict[str, Any]) -> None:
    """The strides of a gradient make no difference, and its bits stay."""
    models = [Net(), Net().to(memory_format=torch.channels_last)]
    for i, model in enumerate(models):
        opt = make(model, **settings)
        for step in range(2):
            backward(model, step)
            for p in model.parameters():
                g = LAYOUTS[layout](p.grad)
                p.grad = g if i else g.contiguous()
            given = [p.grad for p in model.parameters()]
            copies = [g.clone() for g in given]
            opt.step()
            for p, g, desired in zip(model.parameters(), given, copies, strict=True):
                assert p.grad is g
                assert torch.equal(g, desired)
    assert_close(*models, rtol=1e-12, atol=1e-12)


def test_sparse_gradients_are_refused(engine: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    opt = GSGD(model, lr=0.1, momentum=0.9, example_inputs=torch.tensor([1, 2]))
    model(torch.tensor([1, 2])).sum().backward()
    before = weights(model)
    with pytest.raises(TypeError, match=r"gradient of '0\.weight': expected a dense tensor .*sparse=False"):
        opt.step()
    assert_same(model, before)


def test_gradients_that_no_longer_fit_are_refused(engine: str) -> None:
    """As after a change of a parameter between backward and step, or by `grad_dtype`."""
    model, extra = mlp((2, 4, 3)), nn.Parameter(torch.ones(3))
    opt = GSGD([*named(model), ("extra", extra)], lr=0.1, momentum=0.9, network=trace(model))

    def refused(error: type[Exception], message: str) -> None:
        before = weights(model)
        with pytest.raises(error, match=message):
            opt.step()
        assert_same(model, before)

    for grown in (False, True, False):
        extra.data = torch.ones(3)
        opt.zero_grad()
        (model(torch.ones(5, 2)).sum() * extra.sum()).backward()
        if grown:
            extra.data = torch.ones(50)
            refused(ValueError, r"gradient of 'extra': expected shape \(50,\), got \(3,\)")
        else:
            opt.step()
    if hasattr(extra, "grad_dtype"):
        extra.grad = None
        extra.grad_dtype = torch.bfloat16
        extra.grad = torch.ones(3, dtype=torch.bfloat16)
        refused(TypeError, r"gradient of 'extra': expected .* torch\.float32, got torch\.bfloat16")


# what is refused


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


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
    "integers": (lambda m: replace_first(m, torch.ones(4, 2, dtype=torch.int64)), {}, TypeError, "'0.weight'"),
    "complex": (lambda m: replace_first(m, torch.ones(4, 2, dtype=torch.complex64)), {}, TypeError, "'0.weight'"),
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


# processes


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


def load(opt: GSGD, model: nn.Module, source: nn.Module) -> None:
    model.load_state_dict(source.state_dict())


def load_after_a_round_trip(opt: GSGD, model: nn.Module, source: nn.Module) -> None:
    opt.load_state_dict(opt.state_dict())
    model.load_state_dict(source.state_dict())


def write_unseen(opt: GSGD, model: nn.Module, source: nn.Module) -> None:
    """As `torch.distributed.broadcast(p.data)` does: versions and addresses stay."""
    for p, q in zip(model.parameters(), source.parameters(), strict=True):
        p.data.copy_(q)


@pytest.mark.parametrize("way", [load, load_after_a_round_trip, write_unseen])
@pytest.mark.parametrize("scale", ["balanced", "initial"])
def test_weights_that_are_replaced_before_the_first_step_set_the_scale(
    engine: str, scale: str, way: Callable[[GSGD, nn.Module, nn.Module], None]
) -> None:
    torch.manual_seed(0)
    one, other = (mlp([5, 9, 7, 3]).double() for _ in range(2))
    opt = GSGD(other, lr=0.05, momentum=0.9, scale=scale, rule="largest")
    way(opt, other, one)
    made_then = GSGD(one, lr=0.05, momentum=0.9, scale=scale, rule="largest")
    x = torch.randn(8, 5, dtype=torch.float64)
    for _ in range(4):
        for model, o in ((one, made_then), (other, opt)):
            o.zero_grad()
            model(x).square().mean().backward()
            o.step()
    assert all(map(torch.equal, one.parameters(), other.parameters()))


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


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no parameters"):
        GSGD(nn.Sequential(nn.ReLU()))


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


def test_states_that_do_not_fit_are_told_of() -> None:
    """Without the skeleton, as torch.distributed.checkpoint saves it; with half of one; of another method."""
    models = [Net(), Net(), Net()]
    opt, adam = make(models[0]), GAdam(models[1], example_inputs=example())
    for model, o in zip(models, (opt, adam), strict=False):
        train(model, o, range(1))
    state, resumed = opt.state_dict(), make(models[2])
    for given in ({}, None):
        with pytest.raises(ValueError, match='"gsgd" does not hold'):
            resumed.load_state_dict({**state, "gsgd": given})
    with pytest.raises(ValueError, match=r"of another method than GSGD: it has \['exp_avg', 'exp_avg_sq'\]"):
        resumed.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match=r"of another method than GRMSprop: it has \['momentum_buffer'\]"):
        GRMSprop(models[2], example_inputs=example()).load_state_dict(state)
    assert not resumed.state
    with pytest.warns(UserWarning, match="saved without the skeleton"):
        resumed.load_state_dict({k: v for k, v in state.items() if k != "gsgd"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(state)
        make(Net(), momentum=0.0).load_state_dict(torch.optim.SGD(Net().parameters()).state_dict())


def test_a_model_without_units_is_told_of() -> None:
    with pytest.warns(UserWarning, match="no unit was found"):
        GSGD(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)))


@pytest.mark.parametrize("rule", ["modulo", "largest"])
def test_a_plan_and_a_balanced_scale_are_made_once(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for construction and the first step; again where weights have changed between, however they were written."""
    made: list[str] = []
    for module, name in (
        (gsgd.skeleton, "make_plan"),
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
    assert sorted(made) == ["balanced_scale", "make_plan"]
    opt = make(model, rule=rule)
    next(model.parameters()).data.mul_(2)
    made.clear()
    opt.step()
    assert sorted(made) == ["balanced_scale", "make_plan"]


def test_gradients_with_the_negative_bit(engine: str) -> None:
    """Autograd may hand out views that are to be read with the other sign."""
    models = [Net(), Net()]
    for model, negative in zip(models, (False, True), strict=True):
        opt = make(model)
        for seed, p in enumerate(model.parameters()):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p)
            p.grad = torch._neg_view(-g) if negative else g
        opt.step()
    assert_same(models[0], weights(models[1]))


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


def test_engines() -> None:
    """The option says which engine takes the steps, or why that can't be; printing tells."""
    model = Net(torch.float32)
    named = list(model.named_parameters())
    net = trace(model, example(dtype=torch.float32))
    for option, name in (("auto", "core"), ("core", "core"), ("array", "array")):
        opt = GSGD(named, network=net, engine=option)  # type: ignore[arg-type]
        assert opt.engine == copy.deepcopy(opt).engine == name
        assert f"engine: {name}\n" in repr(opt)
    with pytest.raises(ValueError, match="engine 'triton'"):
        GSGD(named, network=net, engine="triton")
    with pytest.raises(ValueError, match="engine: expected 'auto'"):
        GSGD(named, network=net, engine="cuda")  # type: ignore[arg-type]
    half = [(name, p.detach().bfloat16().requires_grad_()) for name, p in named]
    assert GSGD(half, network=net).engine == "array"
    with pytest.raises(ValueError, match=r"engine 'core': .* is of torch.bfloat16 on cpu"):
        GSGD(half, network=net, engine="core")
