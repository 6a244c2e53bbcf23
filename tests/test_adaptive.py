"""GAdam and GRMSprop: invariant, and the frameworks' own methods where nothing can be rescaled."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import Model, Params, mlp

import gsgd

METHODS: dict[str, Callable[..., Any]] = {
    "adam": lambda p, net, **o: gsgd.GAdam(p, net, lr=0.01, weight_decay=1e-3, decoupled=False, **o),
    "adamw": lambda p, net, **o: gsgd.GAdam(p, net, lr=0.01, weight_decay=1e-2, **o),
    "rmsprop": lambda p, net, **o: gsgd.GRMSprop(p, net, lr=0.01, weight_decay=1e-3, **o),
    "rmsprop, momentum": lambda p, net, **o: gsgd.GRMSprop(p, net, lr=0.01, alpha=0.9, momentum=0.9, **o),
}
TORCH: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=1e-3),
    "rmsprop, momentum": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, momentum=0.9),
}


def residual_model() -> Model:
    model = Model(1, 2, (4, 4))
    h = model.activation(model.conv(model.x, 4, (3, 3)), "relu")
    r = model.activation(model.batch_norm(model.conv(h, 4, (3, 3))), "relu")
    return model.output(model.dense(model.flatten(model.add(h, r, "tie"), "channels_first"), 3))


def rescaled(model: Model, seed: int = 0) -> Params:
    params = model.copy()
    scales = 10 ** np.random.default_rng(seed).uniform(-1, 1, model.net.num_units)
    gsgd.rescale(params, model.net, scales)
    return params


def outputs(model: Model, params: Params) -> np.ndarray:
    return model.forward(params).detach().numpy()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [mlp(5, 8, 3, 7, 4), residual_model()], ids=["mlp", "residual"])
def test_rescaling_changes_nothing(backend: str, method: str, model: Model) -> None:
    runs = [model.copy(), rescaled(model)]
    optimizers = [METHODS[method](params, model.net, backend=backend) for params in runs]
    for step in range(50):
        if step == 25:
            gsgd.rescale(runs[0], model.net, np.linspace(0.5, 2, model.net.num_units))
        for params, opt in zip(runs, optimizers, strict=True):
            opt.step(model.gradients(params))
    assert not np.allclose(outputs(model, runs[0]), outputs(model, model.params), rtol=1e-2)
    np.testing.assert_allclose(outputs(model, runs[0]), outputs(model, runs[1]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_the_ordinary_methods_are_not_invariant(method: str) -> None:
    model = mlp(5, 8, 3, 7, 4)
    ends = []
    for start in (model.copy(), rescaled(model)):
        tensors = {n: torch.from_numpy(p) for n, p in start.items()}
        opt = TORCH[method](list(tensors.values()))
        for _ in range(50):
            for name, g in model.gradients(start).items():
                tensors[name].grad = torch.from_numpy(g)
            opt.step()
        ends.append(outputs(model, start))
    assert np.abs(ends[0] - ends[1]).max() > 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", METHODS)
def test_without_units_it_is_the_framework_s_own(backend: str, method: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (17, 33), "b": (100,), "conv": (4, 3, 3, 3)}
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    tensors = {name: torch.from_numpy(p.copy()) for name, p in params.items()}
    opt, own = METHODS[method](params, gsgd.Network(), backend=backend), TORCH[method](list(tensors.values()))
    for _ in range(10):
        grads = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
        for name, g in grads.items():
            tensors[name].grad = torch.from_numpy(g)
        opt.step(grads)
        own.step()
    for name, p in params.items():
        np.testing.assert_allclose(p, tensors[name].numpy(), rtol=0, atol=2e-6 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_the_core_is_the_reference(method: str) -> None:
    model = residual_model()
    runs = {backend: model.copy() for backend in ("c", "reference")}
    optimizers = {b: METHODS[method](p, model.net, backend=b, rule="largest") for b, p in runs.items()}
    for _ in range(10):
        for backend, params in runs.items():
            optimizers[backend].step(model.gradients(params))
    for name in model.params:
        np.testing.assert_allclose(runs["c"][name], runs["reference"][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_not_stopping(backend: str, method: str) -> None:
    model = mlp(4, 6, 6, 3)
    params, other = model.copy(), rescaled(model)
    opt, resumed = (METHODS[method](p, model.net, backend=backend) for p in (params, other))
    for step in range(8):
        if step == 4:
            for name, p in params.items():
                other[name][...] = p
            resumed.load_state_dict(opt.state_dict())
        if step >= 4:
            resumed.step(model.gradients(other))
        opt.step(model.gradients(params))
    assert all(np.array_equal(params[name], other[name]) for name in params)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (gsgd.GAdam, {"betas": (1.0, 0.9)}, "betas"),
        (gsgd.GAdam, {"eps": -1.0}, "eps"),
        (gsgd.GRMSprop, {"alpha": 1.5}, "alpha"),
        (gsgd.GRMSprop, {"momentum": float("nan")}, "momentum"),
    ],
)
def test_hyperparameters_are_checked(make: Any, options: dict[str, Any], named: str) -> None:
    model = mlp(3, 4, 2)
    with pytest.raises(ValueError, match=named):
        make(model.copy(), model.net, **options)


def test_a_state_of_another_method_is_refused() -> None:
    model = mlp(3, 4, 2)
    state = gsgd.GSGD(model.copy(), model.net).state_dict()
    with pytest.raises(ValueError, match="another method"):
        gsgd.GAdam(model.copy(), model.net).load_state_dict(state)
