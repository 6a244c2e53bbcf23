"""The step against enumeration and autograd, and the laws that it keeps."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import Model, Params, mlp, models
from oracles import Descent, Structure, balanced_scale, flat_loss, rescaled

import gsgd

Rule = Literal["modulo", "largest"]
Scale = Literal["balanced", "initial", "ones"]


def reference_scale(
    model: Model, params: Params, rule: Rule, scale: Scale, backend: str
) -> tuple[Structure, np.ndarray]:
    """The trees that GSGD takes and the constants k of its coordinates; for "ones", `params` are overwritten."""
    sk = gsgd.Skeleton(model.net, params, rule=rule, backend=backend)
    structure = Structure(model.net, sk.in_edges, sk.out_edges)
    c = np.ones(model.net.num_units)
    if scale == "balanced":
        c = balanced_scale(structure, structure.pack(params))
        balanced = rescaled(model.net, params, c)
        sk = gsgd.Skeleton(model.net, balanced, rule=rule, backend=backend)
        structure = Structure(model.net, sk.in_edges, sk.out_edges)
    if scale == "ones":
        for edge in (*sk.in_edges, *sk.out_edges):
            if edge is not None:
                params[edge[0]][edge[1]] = 1.0
    return structure, structure.reference_scale(structure.pack(params), c)


@given(
    models(),
    st.sampled_from(["modulo", "largest"]),
    st.sampled_from(["balanced", "initial", "ones"]),
    st.sampled_from([(0.0, False), (0.9, False), (0.9, True)]),
    st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=150)
def test_step_equals_enumeration_and_autograd(
    backend: str, model: Model, rule: Rule, scale: Scale, momentum: tuple[float, bool], weight_decay: float
) -> None:
    start, params = model.copy(), model.copy()
    structure, k = reference_scale(model, start, rule, scale, backend)
    settings: dict[str, Any] = {"momentum": momentum[0], "nesterov": momentum[1], "weight_decay": weight_decay}
    opt = gsgd.GSGD(params, model.net, lr=0.02, rule=rule, scale=scale, max_ratio=None, backend=backend, **settings)
    first = structure.pack(start)
    assert (structure.pack(params) == first).all()
    enumeration = Descent(structure, k, None, **settings)
    autograd = Descent(structure, k, flat_loss(model, structure), **settings)
    waits = None in opt.skeleton.in_edges  # units that join later have other coordinates than the enumeration's
    rates = (0.02,) if waits else (0.02, 0.05, 0.01)
    for lr in rates:
        w, grads = structure.pack(params), model.gradients(params)
        opt.lr = lr
        opt.step(grads)
        for oracle in (enumeration, autograd):
            desired = oracle.step(w, structure.pack(grads), lr)
            np.testing.assert_allclose(
                structure.pack(params), desired, rtol=1e-9, atol=1e-9 * np.abs(desired).max(initial=0)
            )
    assert (structure.pack(params)[structure.free] == first[structure.free]).all()
    assert opt.stats.steps == len(rates)
    assert opt.stats.clamped == 0


@given(
    models(zeros=False, max_parts=3),
    st.sampled_from(["balanced", "initial", "ones"]),
    st.sampled_from([0.3, 1.0, 10.0, 100.0]),
    st.sampled_from([None, 1.5, 4.0]),
    st.sampled_from([None, None, 0.5, 0.01]),
    st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=150)
def test_step_through_negative_and_huge_ratios(
    backend: str,
    model: Model,
    scale: Scale,
    lr: float,
    max_ratio: float | None,
    clip_norm: float | None,
    weight_decay: float,
) -> None:
    """Path values may pass through zero; limits on ratios keep their signs; clipping is of the norm of dl/dx."""
    start, params = model.copy(), model.copy()
    structure, k = reference_scale(model, start, "modulo", scale, backend)
    options = {"max_ratio": max_ratio, "clip_norm": clip_norm}
    opt = gsgd.GSGD(params, model.net, lr, weight_decay=weight_decay, scale=scale, backend=backend, **options)
    limits = {name: np.inf if value is None else value for name, value in options.items()}
    w, grads = structure.pack(params), model.gradients(params)
    oracles = [
        Descent(structure, k, loss, 0, False, weight_decay, **limits) for loss in (None, flat_loss(model, structure))
    ]
    desired = [oracle.step(w, structure.pack(grads), lr) for oracle in oracles]
    assume(max_ratio is not None or np.abs(oracles[0].ratios).min(initial=1) > 1e-4)  # 0 is singular
    opt.step(grads)
    for expected in desired:
        largest = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(structure.pack(params), expected, rtol=1e-9, atol=1e-9 * largest)
    assert opt.stats.clamped == oracles[0].clamped


def residual_cnn() -> Model:
    model = Model(1, 2, (3, 2))
    x = model.activation(model.conv(model.x, 4, (3, 3)), "relu")
    x = model.add(x, model.conv(model.activation(model.conv(x, 3, (1, 3)), "relu"), 4, (3, 1), layout="iohw"), "tie")
    x = model.activation(model.batch_norm(model.conv(x, 4, (3, 3), groups=2)), "leaky_relu")
    x = model.flatten(x, "channels_last")
    return model.output(model.dense(x, 3, layout="io"))


MODELS: dict[str, Callable[[], Model]] = {
    "ragged": lambda: mlp(3, 6, 2, 6, 3, seed=5),
    "residual_cnn": residual_cnn,
}


@pytest.mark.parametrize("limits", [{}, {"max_ratio": None}, {"clip_norm": 0.05}])
@pytest.mark.parametrize("rule", ["modulo", "largest"])
@pytest.mark.parametrize("name", MODELS)
def test_theorem_4_1(backend: str, name: str, rule: Rule, limits: dict[str, Any]) -> None:
    """From w and from any rescaling of w, and rescaled again in the middle: the same function, the same paths."""
    model = MODELS[name]()
    net, rng = model.net, np.random.default_rng(2)
    one, other = model.copy(), rescaled(net, model.params, 10 ** rng.uniform(-1, 1, net.num_units))
    settings: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "rule": rule, "backend": backend}
    settings |= limits
    runs = [(params, gsgd.GSGD(params, net, **settings)) for params in (one, other)]
    sk = gsgd.Skeleton(net, one, backend=backend)
    for step in range(50):
        if step == 20:
            again = rescaled(net, other, 10 ** rng.uniform(-1, 1, net.num_units))
            for key, value in again.items():
                other[key][...] = value
        for params, opt in runs:
            opt.step(model.gradients(params))
        torch.testing.assert_close(model.forward(other), model.forward(one), rtol=1e-8, atol=1e-8)
    assert (model.forward(one) - model.forward(model.params)).abs().max() > 0.01
    for mine, desired in zip(sk.path_values(other).values(), sk.path_values(one).values(), strict=True):
        np.testing.assert_allclose(mine, desired, rtol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_theorem_4_1_does_not_hold_for_sgd(name: str) -> None:
    model = MODELS[name]()
    one, c = model.copy(), 10 ** np.random.default_rng(2).uniform(-1, 1, model.net.num_units)
    other = rescaled(model.net, model.params, c)
    for params in (one, other):
        for key, g in model.gradients(params).items():
            params[key] -= 0.01 * g
    assert (model.forward(other) - model.forward(one)).abs().max() > 1e-3


@pytest.mark.parametrize("scale", ["balanced", "initial", "ones"])
def test_rescaling_in_the_middle_of_training_changes_nothing(backend: str, scale: Scale) -> None:
    model = residual_cnn()
    net = model.net
    one, other = model.copy(), model.copy()
    runs = [(p, gsgd.GSGD(p, net, lr=0.01, momentum=0.9, scale=scale, backend=backend)) for p in (one, other)]
    for step in range(6):
        if step == 3:
            c = 10 ** np.random.default_rng(3).uniform(-1, 1, net.num_units)
            for name, value in rescaled(net, other, c).items():
                other[name][...] = value
        for params, opt in runs:
            opt.step(model.gradients(params))
    torch.testing.assert_close(model.forward(other), model.forward(one), rtol=1e-9, atol=1e-9)


def papers_step(weights: list[np.ndarray], grads: list[np.ndarray], lr: float) -> None:
    """Equations (25) to (28) of the paper, in place, for hidden layers of equal width h and inputs of width >= h.

    ``weights[l]`` has shape (rows, columns). Basis paths that share the skeleton weight w_j of the first layer
    run along diagonal j.
    """
    h, last = weights[0].shape[0], len(weights) - 1
    w, d = [value.copy() for value in weights], grads

    def is_skeleton(layer: int, row: int, col: int) -> bool:
        return row == col if layer < last else row == col % w[last].shape[0]

    ratio = np.empty(h)
    for j in range(h):
        through = 0.0  # sum over the basis paths p_i through w_j of dl/dv_i w_i, where dl/dv_i = dl/dw_i / w_j
        for layer in range(1, last + 1):
            for row in range(w[layer].shape[0]):
                if not is_skeleton(layer, row, j):
                    through += d[layer][row, j] / w[0][j, j] * w[layer][row, j]
        ratio[j] = 1 - lr * (d[0][j, j] - through) / w[0][j, j]  # (25)
        weights[0][j, j] = w[0][j, j] * ratio[j]  # (26)
    for layer in range(last + 1):
        for row, col in np.ndindex(w[layer].shape):
            if is_skeleton(layer, row, col):
                continue  # (28), and (26) above
            value = w[layer][row, col] * (1.0 if layer == 0 else w[0][col, col])
            skeleton_ratio = 1.0 if layer == 0 else ratio[col]
            step = lr * d[layer][row, col] * w[layer][row, col] ** 2 / value**2
            weights[layer][row, col] = (w[layer][row, col] - step) / skeleton_ratio  # (27)


def test_the_papers_equations(backend: str) -> None:
    model = mlp(6, 4, 4, 4, 3, bias=False)
    params = model.copy()
    opt = gsgd.GSGD(params, model.net, lr=0.02, scale="ones", rule="modulo", backend=backend)
    weights = [value.copy() for value in params.values()]
    for j in range(4):
        assert all(value[j % len(value), j] == 1.0 for value in weights)
    for lr in (0.02, 0.05, 0.01):
        grads = model.gradients(params)
        opt.lr = lr
        opt.step(grads)
        papers_step(weights, list(grads.values()), lr)
        for mine, desired in zip(params.values(), weights, strict=True):
            np.testing.assert_allclose(mine, desired, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"), [(0, False, 0), (0, False, 0.1), (0.9, False, 0.1), (0.9, True, 0.1)]
)
def test_everything_pinned_is_plain_sgd(
    backend: str, dtype: type, momentum: float, nesterov: bool, weight_decay: float
) -> None:
    net = gsgd.Network()
    h = net.pin(net.dense("w1", net.input(37), 29, bias="b1"), "GELU")
    net.output(net.dense("w2", net.pin(net.conv("c", h, 11, 3), "GELU"), 5))
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in net.shapes.items()}
    desired = {name: value.copy() for name, value in params.items()}
    buffers: Params = {}
    opt = gsgd.GSGD(
        params, net, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, backend=backend
    )
    for lr in (0.1, 0.03, 0.07):
        grads = {name: rng.standard_normal(shape).astype(dtype) for name, shape in net.shapes.items()}
        opt.lr = lr
        opt.step(grads)
        for name, g in grads.items():
            if weight_decay:
                g = g + weight_decay * desired[name]
            if momentum:
                buffers[name] = momentum * buffers[name] + g if name in buffers else g
                g = g + momentum * buffers[name] if nesterov else buffers[name]
            desired[name] -= lr * g
        for name, value in params.items():
            assert (value == desired[name]).all()


def batch_norm_pair(mode: str) -> tuple[Model, gsgd.Network]:
    """A CNN with batch norms that units pass through, and the description that knows of no batch norm."""
    model = Model(4, 2, (4,))
    plain = gsgd.Network()
    x, h = model.x, plain.input(2)
    for width in (4, 3):
        x = model.activation(model.batch_norm(model.conv(x, width, (3,), bias=False), False, False, mode), "relu")
        h = plain.relu(plain.conv(list(model.params)[-1], h, width, 3))
    model.output(model.dense(model.mean(x), 2))
    weight, bias = list(model.params)[-2:]
    plain.output(plain.dense(weight, h, 2, bias=bias))
    return model, plain


def test_batch_norm_of_the_paper(backend: str) -> None:
    """Equation (30): the gradients of a convolution before a batch norm count times the norm of its rows."""
    model, plain = batch_norm_pair("paper")
    one, other = model.copy(), model.copy()
    first = gsgd.GSGD(one, model.net, lr=0.01, momentum=0.9, backend=backend)
    second = gsgd.GSGD(other, plain, lr=0.01, momentum=0.9, backend=backend)
    for _ in range(3):
        grads = model.gradients(one)
        first.step(grads)
        for name, g in grads.items():
            if name.startswith("conv"):
                g *= np.sqrt((other[name] ** 2).sum(axis=(1, 2), keepdims=True))
        second.step(grads)
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-10)


def test_the_inverse_chain_rule_knows_batch_norm(backend: str) -> None:
    model, plain = batch_norm_pair("paper")
    grads = model.gradients(model.params)
    mine = gsgd.Skeleton(model.net, model.params, backend=backend).path_gradients(model.params, grads)
    for name, g in grads.items():
        if name.startswith("conv"):
            g *= np.sqrt((model.params[name] ** 2).sum(axis=(1, 2), keepdims=True))
    desired = gsgd.Skeleton(plain, model.params, backend=backend).path_gradients(model.params, grads)
    for name, value in desired.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-10)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_norms_do_not_depend_on_strides(backend: str, mode: gsgd.network.BatchNormMode) -> None:
    """The same bits from channels_last weights."""
    rng, shape, net = np.random.default_rng(0), (8, 8, 3, 3), gsgd.Network()
    h = net.relu(net.batch_norm(net.conv("first", net.input(8), 8, (3, 3)), mode=mode))
    net.output(net.batch_norm(net.conv("second", h, 8, (3, 3)), mode=mode))
    params = {name: rng.standard_normal(shape).astype(np.float32) for name in net.shapes}
    grads = {name: rng.standard_normal(shape).astype(np.float32) for name in net.shapes}
    last = {name: np.ascontiguousarray(w.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for name, w in params.items()}
    for weights in (params, last):
        gsgd.GSGD(weights, net, lr=0.01, clip_norm=1.0, backend=backend).step(grads)
    for name, w in params.items():
        np.testing.assert_array_equal(w, last[name])


@pytest.mark.parametrize("max_ratio", [None, 10.0])
def test_ratios_keep_their_sign(backend: str, max_ratio: float | None) -> None:
    """R is 1 - 100, 1 + 100 and 1 - 1: limited or as they are; 0 counts as positive, without limit it is an error."""
    model = mlp(3, 4, 2, bias=False)
    first, _ = model.params
    np.fill_diagonal(model.params[first], 2.0)
    params = model.copy()
    opt = gsgd.GSGD(params, model.net, lr=1.0, scale="initial", max_ratio=max_ratio, backend=backend)
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    for unit, size in ((0, 100.0), (1, -100.0)):
        grads[first][unit, unit] = size / params[first][unit, unit]
    if max_ratio is not None:
        grads[first][2, 2] = 1 / params[first][2, 2]
    scaled = [10.0, 10.0, 0.1] if max_ratio else [99.0, 101.0, 1.0]
    opt.step(grads)
    for unit, sign, size in zip(range(3), (-1, 1, 1), scaled, strict=True):
        np.testing.assert_allclose(params[first][unit, unit], sign * size * model.params[first][unit, unit])
    np.testing.assert_allclose(params[first][3], model.params[first][3], rtol=1e-15)
    assert (opt.stats.steps, opt.stats.clamped) == (1, 3 if max_ratio else 0)
    if max_ratio is None:
        before = {name: value.copy() for name, value in params.items()}
        fresh = gsgd.GSGD(params, model.net, lr=1.0, scale="initial", max_ratio=None, backend=backend)
        grads = {name: np.zeros_like(value) for name, value in params.items()}
        grads[first][2, 2] = 1 / params[first][2, 2]
        with pytest.raises(FloatingPointError, match="no finite ratio"):
            fresh.step(grads)
        for name, value in params.items():
            np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 1e6])
def test_clip_norm_without_units_is_that_of_torch(backend: str, clip_norm: float) -> None:
    """Nothing can be rescaled: the norm is that of the gradients, those of other parameters included."""
    rng, net = np.random.default_rng(0), gsgd.Network()
    net.output(net.dense("w", net.input(5), 7, bias="b"))
    params = {name: rng.standard_normal(shape) for name, shape in {**net.shapes, "other": (3, 4, 2)}.items()}
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    mine = gsgd.GSGD(params, net, lr=0.1, momentum=0.9, clip_norm=clip_norm, backend=backend)
    theirs = torch.optim.SGD(tensors.values(), lr=0.1, momentum=0.9)
    for _ in range(3):
        grads = {name: rng.standard_normal(value.shape) for name, value in params.items()}
        mine.step(grads)
        for name, p in tensors.items():
            p.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
        theirs.step()
        for name, p in tensors.items():
            np.testing.assert_allclose(params[name], p.detach().numpy(), rtol=1e-13, atol=1e-13)


def test_depth_where_products_underflow(backend: str) -> None:
    """36 layers whose tree weights are 0.05: float32 steps as float64 does, to rounding."""
    model = mlp(*[3] * 37, seed=6, bias=False, activation="leaky_relu")
    for value in model.params.values():
        np.fill_diagonal(value, 0.05)
    results = []
    grads = model.gradients(model.params)
    for dtype in (np.float32, np.float64):
        params = {name: value.astype(dtype) for name, value in model.params.items()}
        opt = gsgd.GSGD(params, model.net, lr=1e-3, scale="initial", backend=backend)
        opt.step({name: g.astype(dtype) for name, g in grads.items()})
        results.append(params)
    for single, double in zip(results[0].values(), results[1].values(), strict=True):
        assert (double != 0).all()
        np.testing.assert_allclose(single, double, rtol=2e-5)


def test_a_factor_that_overflows_in_float32(backend: str) -> None:
    """1 / A of a unit is 1e40, which float32 does not hold: an error, and nothing is written."""
    net = gsgd.Network()
    net.output(net.dense("out", net.relu(net.dense("in", net.input(1), 1)), 1))
    params = {"in": np.full((1, 1), 1e-42, np.float32), "out": np.full((1, 1), 1e38, np.float32)}
    before = {name: w.copy() for name, w in params.items()}
    opt = gsgd.GSGD(params, net, lr=1e-30, backend=backend)
    with pytest.raises(FloatingPointError, match=r"in\[0\]"):
        opt.step({name: np.ones_like(w) for name, w in params.items()})
    for name, w in params.items():
        np.testing.assert_array_equal(w, before[name])
