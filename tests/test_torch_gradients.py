"""Gradients as PyTorch hands them out: any strides, views, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch_models import Net, assert_close, assert_same, backward, make, named, weights

from gsgd.torch import GSGD, trace


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
