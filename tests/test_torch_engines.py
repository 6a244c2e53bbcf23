"""Engines: which is chosen, and that array operations take the core's steps on any device."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_models import Net, assert_close, backward, example, make, momenta, train

import gsgd
from gsgd.torch import GSGD, trace
from gsgd.torch.engines import ArrayEngine, Step


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The option says which engine takes the steps, or why that can't be; printing tells."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = Net(torch.float32)
    named = list(model.named_parameters())
    net = trace(model, example(dtype=torch.float32))
    for option, name in (("auto", "core"), ("core", "core"), ("array", "array")):
        opt = GSGD(named, network=net, engine=option)
        assert opt.engine == copy.deepcopy(opt).engine == name
        assert f"engine: {name}\n" in repr(opt)
    with pytest.raises(ValueError, match="engine 'triton'"):
        GSGD(named, network=net, engine="triton")
    with pytest.raises(ValueError, match="engine: expected 'auto'"):
        GSGD(named, network=net, engine="cuda")
    half = [(name, p.detach().bfloat16().requires_grad_()) for name, p in named]
    assert GSGD(half, network=net).engine == "array"
    with pytest.raises(ValueError, match=r"engine 'core': .* is of torch.bfloat16 on cpu"):
        GSGD(half, network=net, engine="core")


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Every third parameter, with hyperparameters of its own."""
    named = list(model.named_parameters())
    return [
        {"params": named[0::3]},
        {"params": named[1::3], "lr": 0.02, "momentum": 0.0, "weight_decay": 0.1},
        {"params": named[2::3], "lr": 0.01, "momentum": 0.5, "nesterov": True, "maximize": True},
    ]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
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
    written: list[Tensor] = []
    where = torch.where

    def where_out(condition: Tensor, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        value = where(condition, x, y)
        if out is not None:
            assert (out.shape, out.dtype, out.device) == (value.shape, value.dtype, value.device)
            written.append(out)
        return value if out is None else out

    def copy(to: list[Tensor], given: list[Tensor]) -> None:
        assert [(x.shape, x.dtype, x.device) for x in to] == [(x.shape, x.dtype, x.device) for x in given]
        written.extend(to)

    def get(x: Tensor, at: Any) -> Tensor:
        first, *others = at if isinstance(at, tuple) else (at,)
        if isinstance(first, slice):
            start, stop, _ = first.indices(len(x))
            return x.narrow(0, start, stop - start)
        return x.select(0, first) if isinstance(first, int) else torch.ops.aten.index.Tensor(x, [first, *others])

    def put(x: Tensor, at: tuple[Tensor, ...], values: Tensor | float) -> None:
        values = values if isinstance(values, Tensor) else x.new_full((), values)
        torch.ops.aten.index_put_(x, [*at], values)

    # these want to see the device before they ask whether the tensors are of this kind
    monkeypatch.setattr(torch, "where", where_out)
    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    monkeypatch.setattr(Tensor, "copy_", lambda x, y: x)
    monkeypatch.setattr(Tensor, "__getitem__", get)
    monkeypatch.setattr(Tensor, "__setitem__", put)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tensors = {name: torch.empty(p.shape, device=device) for name, p in opt._tensors().items()}
        engine = ArrayEngine(opt.network, opt._coordinates, tensors)
        gradients, momenta = ([torch.empty_like(p) for p in tensors.values()] for _ in range(2))
        for wait in (lambda p: p.sum().item(), lambda p: p.nonzero(), lambda p: p + torch.ones(p.shape)):
            with pytest.raises(RuntimeError):
                wait(gradients[0])
        methods = [gsgd.methods.SGD(0.05, 0.9, True, 0.1)]
        which, stats = [0] * len(tensors), gsgd.optimizer.Stats()
        engine.step(Step(gradients, (momenta, [None] * len(tensors)), methods, which, 10.0, 1.0, 1, stats))
    storages = {x.untyped_storage()._cdata for x in written}
    assert all(x.untyped_storage()._cdata in storages for x in (*engine.aliases, *momenta) if x.numel())
    assert stats.steps.device.type == stats.clamped.device.type == device


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
    opt = make(model, lr=torch.tensor(0.05), weight_decay=0.01, nesterov=True, engine="array")
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
