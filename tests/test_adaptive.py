"""GAdam and GRMSprop: invariant, and the frameworks' own methods where nothing can be rescaled."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import Model, Params, mlp

import gsgd
import gsgd.torch
from gsgd.torch.engines import ArrayEngine

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


TORCH_METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p, net: gsgd.torch.GAdam(p, lr=0.01, weight_decay=1e-3, decoupled=False, network=net),
    "adamw": lambda p, net: gsgd.torch.GAdam(p, lr=0.01, weight_decay=1e-2, network=net),
    "rmsprop": lambda p, net: gsgd.torch.GRMSprop(p, lr=0.01, weight_decay=1e-3, network=net),
    "rmsprop, momentum": lambda p, net: gsgd.torch.GRMSprop(p, lr=0.01, alpha=0.9, momentum=0.9, network=net),
}


def named(params: Params) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(torch.from_numpy(p.copy()))) for name, p in params.items()]


def give(parameters: list[tuple[str, torch.nn.Parameter]], grads: Params) -> None:
    for name, p in parameters:
        p.grad = torch.from_numpy(grads[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arrays", [False, True], ids=["core", "array operations"])
def test_pytorch_takes_the_same_steps(method: str, arrays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if arrays:
        monkeypatch.setattr("gsgd.torch.engines.CoreEngine", lambda *args: ArrayEngine(*args[:-1]))
    model = residual_model()
    params, parameters = model.copy(), named(model.params)
    opt, other = METHODS[method](params, model.net), TORCH_METHODS[method](parameters, model.net)
    for step in range(6):
        if step == 3:  # a state goes through a file, into an optimizer of other weights
            buffer = io.BytesIO()
            torch.save(other.state_dict(), buffer)
            buffer.seek(0)
            resumed = TORCH_METHODS[method](named(rescaled(model)), model.net)
            resumed.load_state_dict(torch.load(buffer, weights_only=True))
            for (_, old), (_, new) in zip(parameters, zip_names(resumed), strict=True):
                new.data.copy_(old.data)
            parameters, other = list(zip_names(resumed)), resumed
        grads = model.gradients(params)
        give(parameters, grads)
        opt.step(grads)
        other.step()
    for name, p in parameters:
        np.testing.assert_allclose(p.detach().numpy(), params[name], rtol=1e-9 if arrays else 0, atol=1e-12 * arrays)


@pytest.mark.filterwarnings("ignore:no unit was found")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arrays", [False, True], ids=["core", "array operations"])
def test_pytorch_is_invariant_as_its_own_are_not_and_equal_to_them_without_units(
    method: str, arrays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arrays:
        monkeypatch.setattr("gsgd.torch.engines.CoreEngine", lambda *args: ArrayEngine(*args[:-1]))
    model = residual_model()
    starts = [model.params, rescaled(model)]

    def train(make: Callable[[Any], torch.optim.Optimizer], start: Params) -> np.ndarray:
        parameters = named(start)
        views, opt = {name: p.detach().numpy() for name, p in parameters}, make(parameters)
        for _ in range(50):
            give(parameters, model.gradients(views))
            opt.step()
        return outputs(model, views)

    ours = [train(lambda p: TORCH_METHODS[method](p, model.net), start) for start in starts]
    plain = train(lambda p: TORCH_METHODS[method](p, gsgd.Network()), starts[0])
    theirs = [train(lambda p: TORCH[method]([q for _, q in p]), start) for start in starts]
    assert not np.allclose(ours[0], outputs(model, model.params), rtol=1e-2)
    np.testing.assert_allclose(ours[0], ours[1], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(plain, theirs[0], rtol=1e-9, atol=1e-11)
    assert not np.allclose(theirs[0], theirs[1], atol=1e-3)


def zip_names(opt: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    (group,) = opt.param_groups
    return list(zip(group["param_names"], group["params"], strict=True))


def test_a_late_gradient_has_its_own_bias_correction() -> None:
    net = gsgd.Network()
    one, late = (("one", torch.nn.Parameter(torch.ones(3))), ("late", torch.nn.Parameter(torch.ones(3))))
    own = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    opt, adam = gsgd.torch.GAdam([one, late], lr=0.1, network=net), torch.optim.Adam(own, lr=0.1)
    for step in range(5):
        for (_, p), q in zip((one, late), own, strict=True):
            p.grad = q.grad = None if q is own[1] and step < 3 else torch.tensor([1.0, -2.0, 0.1 * step])
        opt.step()
        adam.step()
    for (_, p), q in zip((one, late), own, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
