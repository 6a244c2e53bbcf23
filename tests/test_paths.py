"""Path norms, Path-SGD, rescaling, balancing and the identity of every unit, against enumeration."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PARTS, Model, mlp, models
from oracles import Structure, all_paths, balanced_scale, modulo_trees, rescaled

import gsgd
import gsgd.torch

SMALL = ["layer", "residual", "concat", "shuffle", "batch_norm", "sigmoid"]
small_models = models(parts=SMALL, zeros=False, max_parts=2)


@given(small_models, st.sampled_from([1.0, 2.0, 3.0]))
@settings(max_examples=40)
def test_path_norm(model: Model, power: float) -> None:
    structure = Structure(model.net, *modulo_trees(model.net))
    w = structure.pack(model.params)
    desired = sum(math.prod(abs(w[e]) ** power for e in path) for path in all_paths(model.net))
    assert gsgd.path_norm(model.params, model.net, power=power) == pytest.approx(desired, rel=1e-10)


@given(small_models)
@settings(max_examples=40)
def test_path_sgd(model: Model) -> None:
    """kappa_e: the squared products of the other weights, over all paths through e (Neyshabur et al., 2015)."""
    structure = Structure(model.net, *modulo_trees(model.net))
    params = model.copy()
    opt = gsgd.PathSGD(params, model.net, lr=0.1)
    paths = all_paths(model.net)
    for lr in (0.1, 0.01):
        w = structure.pack(params)
        kappa = np.zeros(structure.size)
        for path in paths:
            for i, e in enumerate(path):
                kappa[e] += math.prod(w[f] ** 2 for f in path[:i] + path[i + 1 :])
        grads = model.gradients(params)
        desired = w - lr * structure.pack(grads) / kappa
        opt.lr = lr
        opt.step(grads)
        np.testing.assert_allclose(structure.pack(params), desired, rtol=1e-10, atol=1e-12)


def test_path_sgd_knows_no_scale() -> None:
    model = mlp(3, 5, 4, 2)
    one = model.copy()
    other = rescaled(model.net, one, 10 ** np.random.default_rng(0).uniform(-1, 1, model.net.num_units))
    runs = [(params, gsgd.PathSGD(params, model.net, lr=0.01)) for params in (one, other)]
    for _ in range(10):
        for params, opt in runs:
            opt.step(model.gradients(params))
        torch.testing.assert_close(model.forward(one), model.forward(other), rtol=1e-9, atol=1e-9)


@given(models(), st.integers(0, 2**16))
def test_rescale(model: Model, seed: int) -> None:
    params = model.copy()
    c = np.exp(np.random.default_rng(seed).uniform(-1, 1, model.net.num_units))
    gsgd.rescale(params, model.net, c)
    for name, value in rescaled(model.net, model.params, c).items():
        np.testing.assert_allclose(params[name], value, rtol=1e-14)


@given(models(zeros=False), st.integers(0, 2**16))
def test_balance(model: Model, seed: int) -> None:
    """The least sum of squares: of the same function, and the same from every rescaling."""
    structure = Structure(model.net, *modulo_trees(model.net))
    params = model.copy()
    c = balanced_scale(structure, structure.pack(params))
    least = rescaled(model.net, params, c)
    start = 10 ** np.random.default_rng(seed).uniform(-1, 1, model.net.num_units)
    other = rescaled(model.net, params, start)
    for weights in (params, other):
        gsgd.balance(weights, model.net)
        for name, value in least.items():
            np.testing.assert_allclose(weights[name], value, rtol=1e-8)
    outputs = model.forward(model.params)
    torch.testing.assert_close(
        model.forward(params), outputs, rtol=1e-9, atol=1e-9 * float(outputs.detach().abs().max() + 1)
    )


@pytest.mark.parametrize("scales", [[1.0, -1.0, 1.0], [1.0, 0.0, 1.0], [1.0, np.nan, 1.0], [1.0, np.inf, 1.0], [1.0]])
def test_rescale_wants_one_positive_scale_per_unit(scales: list[float]) -> None:
    model = mlp(2, 3, 2)
    params = model.copy()
    with pytest.raises(ValueError, match="scale"):
        gsgd.rescale(params, model.net, np.array(scales))
    assert all((params[name] == value).all() for name, value in model.params.items())


@given(models(parts=[part for part in PARTS if part != "batch_norm"]))  # it leaves gradients that are rounding alone
def test_incoming_sums_equal_outgoing_sums(model: Model) -> None:
    residual = gsgd.symmetry_residual(model.params, model.gradients(model.params), model.net)
    assert residual.shape == (model.net.num_units,)
    assert (residual < 1e-9).all()


def without_its_bias(model: Model) -> gsgd.Network:
    """A description that forgets the first bias."""
    net = gsgd.Network()
    names = [name for name in model.params if name != "bias1"]
    h = net.relu(net.dense(names[0], net.input(4), 5))
    net.output(net.dense(names[1], h, 3, bias=names[2]))
    return net


def without_its_sum() -> tuple[Model, gsgd.Network]:
    """A residual network that is described as a chain."""
    model = Model(3, 4)
    x = model.activation(model.dense(model.x, 4), "relu")
    model.output(model.dense(model.add(x, model.activation(model.dense(x, 4), "relu"), "tie"), 2))
    net, names = gsgd.Network(), list(model.params)
    h = net.dense(names[2], net.dense(names[0], net.input(4), 4, bias=names[1]), 4, bias=names[3])
    net.output(net.dense(names[4], h, 2, bias=names[5]))
    return model, net


def flattened_otherwise() -> tuple[Model, gsgd.Network]:
    """Channels last, described as channels first."""
    model = Model(3, 2, (4,))
    x = model.activation(model.conv(model.x, 3, (3,)), "relu")
    model.output(model.dense(model.flatten(x, "channels_last"), 2))
    return model, gsgd.Network.sequential(model.params)


def sigmoid() -> tuple[Model, gsgd.Network]:
    """A sigmoid that is described as a ReLU."""
    model = Model(3, 4)
    model.output(model.dense(model.sigmoid(model.dense(model.x, 5)), 2))
    return model, gsgd.Network.sequential(model.params)


@pytest.mark.parametrize("wrong", [without_its_sum, flattened_otherwise, sigmoid])
def test_symmetry_residual_finds_a_wrong_description(wrong) -> None:
    model, net = wrong()
    grads = model.gradients(model.params)
    assert gsgd.symmetry_residual(model.params, grads, model.net).max(initial=0) < 1e-12
    assert gsgd.symmetry_residual(model.params, grads, net).max() > 1e-2


def test_symmetry_residual_finds_a_bias_that_was_forgotten() -> None:
    model = mlp(4, 5, 3)
    grads = model.gradients(model.params)
    assert gsgd.symmetry_residual(model.params, grads, without_its_bias(model)).max() > 1e-2


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_approximate_batch_norm_is_no_symmetry(mode: str) -> None:
    model = Model(0, 2, (4,))
    x = model.activation(model.batch_norm(model.conv(model.x, 3, (3,), bias=False), False, False, mode), "relu")
    model.output(model.dense(model.mean(x), 2))
    grads = model.gradients(model.params)
    for refuse in (
        lambda: gsgd.rescale(model.params, model.net, np.ones(3)),
        lambda: gsgd.balance(model.params, model.net),
        lambda: gsgd.symmetry_residual(model.params, grads, model.net),
    ):
        with pytest.raises(ValueError, match="exact"):
            refuse()


def test_path_sgd_in_pytorch_is_that_on_arrays() -> None:
    model = mlp(4, 6, 5, 3)
    params = model.copy()
    parameters = [(name, torch.nn.Parameter(torch.from_numpy(p.copy()))) for name, p in params.items()]
    own, other = gsgd.PathSGD(params, model.net, lr=0.01), gsgd.torch.PathSGD(parameters, lr=0.01, network=model.net)
    for _ in range(3):
        grads = model.gradients(params)
        for name, p in parameters:
            p.grad = torch.from_numpy(grads[name])
        own.step(grads)
        other.step()
    before = {name: p.detach().numpy().copy() for name, p in parameters}
    for name, value in before.items():
        np.testing.assert_allclose(value, params[name], rtol=1e-12)
    parameters[-1][1].grad[0] = np.inf
    with pytest.raises(FloatingPointError, match=f"gradient of '{parameters[-1][0]}' is not finite"):
        other.step()
    assert all(np.array_equal(p.detach().numpy(), before[name]) for name, p in parameters)


def test_balance_of_a_deep_network_and_of_units_that_feed_each_other() -> None:
    rng = np.random.default_rng(0)
    deep = gsgd.Network.sequential([(4, 4)] * 150)
    loops = gsgd.Network()
    h = loops.dense("in", loops.input(3), 6)
    for i in range(12):
        h = loops.add(
            h, loops.dense(f"loop{i}", h, 6), loops.dense(f"up{i}", loops.relu(loops.dense(f"down{i}", h, 4)), 6)
        )
    loops.output(loops.dense("out", h, 2))
    for net in (deep, loops):
        params = {name: rng.normal(size=shape) for name, shape in net.shapes.items()}
        gsgd.rescale(params, net, np.exp(rng.normal(size=net.num_units)))
        gsgd.balance(params, net)
        squares = np.zeros((2, net.num_units + 1))
        for block in net.blocks:
            w2 = np.square(block.view(params[block.name])).sum(axis=(3, 4, 5))
            np.add.at(squares[0], block.rows, w2.sum(axis=2).reshape(-1))
            np.add.at(squares[1], block.cols, w2.sum(axis=1).reshape(-1))
        np.testing.assert_allclose(squares[0, :-1], squares[1, :-1], rtol=1e-9)
