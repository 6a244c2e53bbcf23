"""The stages need nothing but the array API standard."""

from typing import Any

import array_api_strict as xp
import numpy as np
import pytest

import gsgd
from gsgd import stages
from gsgd.layout import Layout, convert, network_layout
from gsgd.methods import SGD


@pytest.fixture
def net() -> gsgd.Network:
    net = gsgd.Network()
    h = net.relu(net.conv("conv1", net.input(3), 4, (3, 3), bias="bias1"))
    r = net.relu(net.conv("conv2", h, 4, (3, 3), groups=2))
    joined = net.concat(net.flatten(net.add(h, r), 4), net.flatten(r, 2, order="channels_last"))
    hidden = net.relu(net.dense("fc2", net.relu(net.dense("fc1", joined, 5)), 5))
    net.output(net.dense("fc3", hidden, 5))
    return net


def arrays_of(net: gsgd.Network, seed: int, size: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: size * rng.standard_normal(shape) for name, shape in net.shapes.items()}


def described(net: gsgd.Network, params: dict[str, np.ndarray], asarray: Any) -> tuple[Layout, stages.Scale]:
    skeleton = gsgd.Skeleton(net, params)
    tables = convert(network_layout(net, net.shapes, *skeleton.edge_arrays), asarray)
    return tables, stages.Scale.of(asarray, *skeleton.tree_weights(params), np.ones(net.num_units))


def test_a_step_on_strict_arrays_is_the_core_s(net: gsgd.Network) -> None:
    params, grads = arrays_of(net, 0, 1.0), arrays_of(net, 1, 0.01)
    tables, scale = described(net, params, xp.asarray)
    weights, gradients = ([xp.asarray(x.copy()) for x in arrays.values()] for arrays in (params, grads))
    methods = [SGD(lr=0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)] * len(params)
    moments = [(xp.zeros_like(w), None) for w in weights]
    new, solution = stages.step(tables, scale, weights, gradients, gradients, None, moments, methods, 10.0, 1.0)

    opt = gsgd.GSGD(params, net, lr=0.01, momentum=0.9, weight_decay=1e-3, nesterov=True, scale="initial")
    opt.step(grads)
    assert bool(solution.finite)
    for (value, _), expected in zip(new, params.values(), strict=True):
        np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_entry_that_is_not_finite_is_seen(net: gsgd.Network, value: float) -> None:
    """By its array's magnitude; or by q where all entries of an array leave units, as not in the last layer here."""
    wide = gsgd.Network()
    x = wide.input(2)
    hidden = wide.relu(wide.dense("in", x, 3, bias="bias"))
    wide.output(wide.dense("out", wide.concat(hidden, x), 2))
    for each in (net, wide):
        params, grads = arrays_of(each, 0, 1.0), arrays_of(each, 1, 0.01)
        tables, scale = described(each, params, np.asarray)
        weights, gradients = list(params.values()), list(grads.values())
        rest = ([(None, None)] * len(weights), [SGD(lr=0.01)] * len(weights), 4.0, None)
        assert any(a.summed for a in tables.arrays) == (each is net)
        for g in gradients:
            for place in np.ndindex(g.shape):
                before, g[place] = g[place], value
                with np.errstate(all="ignore"):
                    _, solution = stages.step(tables, scale, weights, gradients, gradients, None, *rest)
                g[place] = before
                assert not solution.finite
        assert stages.step(tables, scale, weights, gradients, gradients, None, *rest)[1].finite


def asarray_of(library: str) -> Any:
    if library == "torch":
        return pytest.importorskip("torch").from_numpy
    return np.asarray if library == "numpy" else pytest.importorskip("jax.numpy").asarray


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("given", ["all", "not the bias"])
def test_what_leaves_by_a_free_edge_alone_cancels(library: str, dtype: Any, given: str) -> None:
    """Adam would make steps of any rest: of chains whose in-edges have no gradient q is exactly 0."""
    net = gsgd.Network()
    net.output(net.dense("out", net.relu(net.dense("in", net.input(20), 16)), 1, bias="bias"))
    params, grads = arrays_of(net, 0, 1.0), arrays_of(net, 1, 1.0)
    grads["in"][:, :16] = 0
    asarray = asarray_of(library)
    tables, _ = described(net, params, np.asarray if library == "jax" else asarray)
    weights, gradients = ([asarray(x.astype(dtype)) for x in each.values()] for each in (params, grads))
    if given != "all":
        gradients[list(net.shapes).index("bias")] = None

    def q(weights: Any, gradients: Any) -> Any:
        return stages.gather(tables, weights, gradients, [(None, None)] * len(weights)).q

    assert (np.asarray(q(weights, gradients)) == 0).all()
    if library == "jax":
        import jax

        assert (np.asarray(jax.jit(q)(weights, gradients)) == 0).all()
