"""Gradients as PyTorch hands them out: any strides, views, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch_models import Net, assert_close, assert_same, backward, example, make, named, train, weights

from gsgd._core import lie_at, takes
from gsgd.torch import GSGD, GAdam, trace
from gsgd.torch.engines import core


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


class Wrapper(Tensor):
    """A shape without memory, as DTensors and quantized tensors have it."""

    @staticmethod
    def __new__(cls, wrapped: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, wrapped.shape, dtype=wrapped.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor without values")


@pytest.mark.parametrize("without_memory", [Wrapper, lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype)])
def test_gradients_without_memory_are_refused(without_memory: Callable[[Tensor], Tensor]) -> None:
    """By the C core, which would read what lies elsewhere."""
    model = Net()
    opt = make(model)
    train(model, opt, range(1))
    backward(model, 1)
    before, p = weights(model), model.body.fc.weight
    p.grad = without_memory(p.grad)
    with pytest.raises((RuntimeError, ValueError)):
        opt.step()
    assert_same(model, before)


def negate_lazily(g: Tensor) -> None:
    g.data = torch._neg_view(-g)


# how a gradient may change from step to step, though it stays the same tensor
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "strides": lambda g: g.set_(LAYOUTS["wide"](g)),
    "order of axes": lambda g: g.set_(LAYOUTS["transposed"](g)),
    "memory": lambda g: g.set_(g.clone()),
    "part of another memory": lambda g: setattr(g, "data", LAYOUTS["part of a bucket"](g)),
    "memory of the same storage": lambda g: g.untyped_storage().resize_(g.untyped_storage().nbytes() + 2**20),
    "sign": negate_lazily,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_that_is_kept_and_has_changed(engine: str, change: str) -> None:
    models = [Net(), Net()]
    optimizers = [make(model) for model in models]
    for step in range(3):
        for model in models:
            old = [p.grad for p in model.parameters()]
            backward(model, step)
            for p, g in zip(model.parameters(), old, strict=True):
                if model is models[1] and g is not None:
                    g.data = p.grad
                    CHANGES[change](g)
                    p.grad = g
        for opt in optimizers:
            opt.step()
    assert_close(*models, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda g: g.resize_(2, 3), ValueError),
        (lambda g: g.unsqueeze_(0), ValueError),
        (lambda g: setattr(g, "data", g.float()), TypeError),
        (lambda g: setattr(g, "data", g.long()), TypeError),
        (lambda g: setattr(g, "data", g.view(torch.int64)), TypeError),
    ],
)
def test_a_gradient_that_is_kept_and_no_longer_fits(
    engine: str, change: Callable[[Tensor], Any], error: type[Exception]
) -> None:
    model = Net()
    opt = make(model)
    train(model, opt, range(1))
    backward(model, 1)
    g = model.body.fc.weight.grad
    good, before = g.clone(), weights(model)
    change(g)
    with pytest.raises(error, match=r"gradient of 'body\.fc\.weight': expected"):
        opt.step()
    assert_same(model, before)
    model.body.fc.weight.grad = good
    opt.step()


def test_moments_that_were_replaced() -> None:
    """By hand; the core writes to them, so that a copy won't do."""
    model = Net()
    opt = make(model, momentum=0.9)
    train(model, opt, range(1))
    engine, state, before = opt._engine, opt.state[model.body.fc.weight], weights(model)
    good = state["momentum_buffer"]
    for bad in (good.float(), good.mT, torch._neg_view(-good)):
        state["momentum_buffer"] = bad
        with pytest.raises((RuntimeError, ValueError)):
            opt.step()
        assert_same(model, before)
    state["momentum_buffer"] = good.clone()
    opt.step()
    assert opt._engine is engine


@pytest.mark.parametrize("optimizer", [GSGD, GAdam])
def test_without_dlpack(monkeypatch: pytest.MonkeyPatch, optimizer: Any) -> None:
    """Before PyTorch 2.10 the core reads NumPy's views of tensors."""
    models = [Net(), Net()]
    for reads, model in zip((True, False), models, strict=True):
        monkeypatch.setattr(core, "READS_TENSORS", reads and takes(Tensor))
        train(model, optimizer(model, network=trace(model, example())), range(3))
    assert_same(models[0], weights(models[1]))


@pytest.mark.skipif(not takes(Tensor), reason="PyTorch 2.10 is the first to say where tensors lie")
def test_whether_tensors_lie_where_they_did() -> None:
    memory = torch.zeros(4, 4)
    t, a = memory[:2, :2], memory[:2, :2].numpy()
    assert lie_at([t, torch.zeros(0)], [a, torch.zeros(0).numpy()])
    for other in (
        t.clone(),
        memory[1:3, :2],
        memory[:2, :3],
        memory[:2],
        memory[0, :2],
        t.mT,
        t.view(torch.int32),
        torch.zeros(2, 2, dtype=torch.float64),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, 2, device="meta"),
        a,
        None,
    ):
        assert not lie_at([other], [a])
    assert not lie_at([t], [t])
    assert not lie_at([t], [])
    assert not takes(int)
