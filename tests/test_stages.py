"""The stages need nothing but the array API standard."""

import array_api_strict as xp
import numpy as np
import pytest

import gsgd
from gsgd import stages
from gsgd.layout import convert, layout
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


def test_a_step_on_strict_arrays_is_the_core_s(net: gsgd.Network) -> None:
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape) for name, shape in net.shapes.items()}
    grads = {name: 0.01 * rng.standard_normal(shape) for name, shape in net.shapes.items()}
    skeleton = gsgd.Skeleton(net, params)
    number = {name: i for i, name in enumerate(params)}
    blocks, shapes = [(number[b.name], b) for b in net.blocks], list(net.shapes.values())
    tables = convert(layout(net.num_units, shapes, blocks, *skeleton.edge_arrays), xp.asarray)
    scale = stages.Scale.of(xp.asarray, *skeleton.tree_weights(params), np.ones(net.num_units))
    weights, gradients = ([xp.asarray(x.copy()) for x in arrays.values()] for arrays in (params, grads))
    methods = [SGD(lr=0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)] * len(params)
    moments = [(xp.zeros_like(w), None) for w in weights]
    new, solution = stages.step(tables, scale, weights, gradients, gradients, None, moments, methods, 10.0, 1.0)

    opt = gsgd.GSGD(params, net, lr=0.01, momentum=0.9, weight_decay=1e-3, nesterov=True, scale="initial")
    opt.step(grads)
    assert bool(solution.finite)
    for (value, _), expected in zip(new, params.values(), strict=True):
        np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-12)
