"""Arrays as users have them: sizes, strides, threads, dtypes, states, processes."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from networks import Array, Model, Params, mlp

import gsgd

HYPER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


def he(net: gsgd.Network, dtype: type = np.float32, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    return {
        n: (rng.standard_normal(s) * np.sqrt(2 / max(1, np.prod(s[1:])))).astype(dtype) for n, s in net.shapes.items()
    }


def noise(params: Mapping[str, Array], seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return {name: (0.01 * rng.standard_normal(value.shape)).astype(value.dtype) for name, value in params.items()}


def large() -> gsgd.Network:
    """Large enough for several threads: dense, tied, and a convolution that is read flattened."""
    net = gsgd.Network()
    h = net.relu(net.conv("c1", net.input(16), 130, (3, 3), bias="b1"))
    h = net.add(h, net.relu(net.conv("c2", h, 130, (3, 3), groups=2)))
    h = net.relu(net.dense("d1", net.flatten(h, 7), 601, bias="b2"))
    h = net.relu(net.dense("d2", h, 703, layout="io"))
    net.output(net.dense("d3", h, 509, bias="b3"))
    return net


def train(params: Params, net: gsgd.Network, make: Callable[[Array], Array] = lambda g: g, **settings: Any) -> Params:
    """Three steps on noise; `make` lays the gradients out."""
    opt = gsgd.GSGD(params, net, **{**HYPER, **settings})
    for seed in range(3):
        opt.step({name: make(g) for name, g in noise(params, seed).items()})
    return params


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2e-4), (np.float64, 1e-11)])
def test_the_core_equals_the_reference(dtype: type, rtol: float) -> None:
    net = large()
    one, other = (
        train(he(net, dtype), net, backend=backend, momentum=0.0, nesterov=False) for backend in ("c", "reference")
    )
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=rtol, atol=rtol * np.abs(value).max())


def transposed(a: Array) -> Array:
    return np.ascontiguousarray(a.T).T


def sliced(a: Array) -> Array:
    out = np.full([2 * n + 1 for n in a.shape], np.nan, a.dtype)
    view = out[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def backwards(a: Array) -> Array:
    flip = (slice(None, None, -1),) * a.ndim
    return np.ascontiguousarray(a[flip])[flip]


def channels_last(a: Array) -> Array:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) if a.ndim > 2 else a.copy()


LAYOUTS = [transposed, sliced, backwards, channels_last]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_any_number_of_threads_gives_the_same_bits(dtype: type, clip_norm: float | None) -> None:
    net = large()
    results = [train(he(net, dtype), net, threads=threads, clip_norm=clip_norm) for threads in (1, 2, 3, 4)]
    strided = {name: channels_last(value) for name, value in he(net, dtype).items()}
    results.append(train(strided, net, transposed, threads=2, clip_norm=clip_norm))
    assert not same(results[0], he(net, dtype))
    assert all(same(results[0], result) for result in results[1:])


def medium() -> gsgd.Network:
    net = gsgd.Network()
    h = net.relu(net.conv("c1", net.input(3), 10, (3, 3), bias="b1"))
    h = net.add(h, net.conv("c2", h, 10, (3, 1), groups=5))
    h = net.relu(net.dense("d1", net.flatten(h, 5, "channels_last"), 37, layout="io"))
    net.output(net.dense("d2", h, 33, bias="b2"))
    return net


def test_strides_may_change_from_step_to_step(backend: str) -> None:
    net, turns = medium(), cycle(LAYOUTS)
    for dtype in (np.float32, np.float64):
        desired = train(he(net, dtype), net, backend=backend)
        assert same(train(he(net, dtype), net, lambda g: next(turns)(g), backend=backend), desired)


def test_clipping_may_begin_and_end_between_steps(backend: str) -> None:
    """What the core has cut into pieces for the step before is cut again."""
    net = medium()
    params = he(net, np.float64)
    opt = gsgd.GSGD(params, net, lr=0.01, backend=backend)
    for clip_norm in (None, 0.1, None, 0.1):
        grads = {name: np.sin(np.arange(w.size)).reshape(w.shape) for name, w in params.items()}
        fresh = {name: w.copy() for name, w in params.items()}
        other = gsgd.GSGD(fresh, net, lr=0.01, clip_norm=clip_norm, backend=backend)
        opt.clip_norm = clip_norm
        other.load_state_dict(opt.state_dict())
        other.step(grads)
        opt.step(grads)
        assert same(params, fresh)


@pytest.mark.parametrize("of_gradients", LAYOUTS)
@pytest.mark.parametrize("of_params", LAYOUTS)
def test_strides_do_not_matter(
    backend: str, of_params: Callable[[Array], Array], of_gradients: Callable[[Array], Array]
) -> None:
    net = medium()
    for dtype in (np.float32, np.float64):
        desired = train(he(net, dtype), net, backend=backend)
        params = {name: of_params(value) for name, value in he(net, dtype).items()}
        assert same(train(params, net, of_gradients, backend=backend), desired)
    bases = [value.base for value in params.values() if of_params is sliced]
    for base in bases:
        assert base is not None
        assert np.isnan(base[tuple(slice(0, None, 2) for _ in base.shape)]).all()


def test_expanded_gradients(backend: str) -> None:
    net = medium()
    results = []
    for expand in (lambda g: np.broadcast_to(g.ravel()[0], g.shape), lambda g: np.full_like(g, g.ravel()[0])):
        results.append(train(he(net), net, expand, backend=backend))
    assert same(*results)


@pytest.mark.parametrize("width", [*range(1, 36), 63, 64, 65, 127, 128, 129, 100003])
def test_every_element_of_every_size_is_updated(backend: str, width: int) -> None:
    """As sources and as destinations of hidden units, as a bias, and as a parameter that no network mentions."""
    net = gsgd.Network()
    h = net.relu(net.dense("w1", net.input(1), width, bias="b1"))
    net.output(net.dense("w3", net.relu(net.dense("w2", h, 2)), 1))
    rng = np.random.default_rng(1)
    start = {name: rng.uniform(0.5, 1.5, shape) for name, shape in {**net.shapes, "other": (width,)}.items()}
    grads = {name: rng.uniform(0.5, 1.5, value.shape) for name, value in start.items()}

    def moves(dtype: type, backend: str) -> Params:
        params = {name: value.astype(dtype) for name, value in start.items()}
        opt = gsgd.GSGD(params, net, lr=1e-3, scale="initial", backend=backend)
        opt.step({name: g.astype(dtype) for name, g in grads.items()})
        return {name: value - start[name] for name, value in params.items()}

    desired = moves(np.float64, "reference")
    assert (desired["other"] < -4e-4).all()
    for dtype, atol in ((np.float32, 1e-6), (np.float64, 1e-14)):
        for name, move in moves(dtype, backend).items():
            np.testing.assert_allclose(move, desired[name], rtol=0, atol=atol)


def test_gradients_are_left_alone_and_may_be_read_only(backend: str) -> None:
    net = medium()
    params = he(net)
    opt = gsgd.GSGD(params, net, **HYPER, backend=backend)
    grads = noise(params, 0)
    before = {name: g.copy() for name, g in grads.items()}
    for g in grads.values():
        g.flags.writeable = False
    opt.step(grads)
    assert same(grads, before)


def test_gradients_may_be_the_parameters_themselves(backend: str) -> None:
    """As for a loss of half the squared weights."""
    net = medium()
    one, other = he(net), he(net)
    gsgd.GSGD(one, net, **HYPER, backend=backend).step(one)
    gsgd.GSGD(other, net, **HYPER, backend=backend).step({name: value.copy() for name, value in other.items()})
    assert same(one, other)


def test_arrays_of_another_framework(backend: str) -> None:
    """Tensors are updated in their own memory."""
    net = medium()
    desired = train(he(net), net, backend=backend)
    arrays = he(net)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    opt = gsgd.GSGD(tensors, net, **HYPER, backend=backend)
    for seed in range(3):
        opt.step({name: torch.from_numpy(g) for name, g in noise(arrays, seed).items()})
    assert same(arrays, desired)


def test_parameters_that_the_network_does_not_mention(backend: str) -> None:
    """Plain SGD with the same momentum: empty and 0-d arrays, up to six dimensions."""
    net = medium()
    shapes: dict[str, tuple[int, ...]] = {"empty": (0, 3), "scalar": (), "many": (2, 1, 3, 1, 2, 2)}
    params = he(net) | {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    alone = he(net)
    desired = {name: params[name].copy() for name in shapes}
    opt = gsgd.GSGD(params, net, lr=0.1, momentum=0.9, backend=backend)
    other = gsgd.GSGD(alone, net, lr=0.1, momentum=0.9, backend=backend)
    buffers = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for seed in range(3):
        grads = noise(params, seed)
        opt.step(grads)
        other.step({name: grads[name] for name in alone})
        for name in shapes:
            buffers[name] = 0.9 * buffers[name] + grads[name]
            desired[name] -= 0.1 * buffers[name]
    assert same({name: params[name] for name in shapes}, desired)
    assert same(alone, {name: params[name] for name in alone})


def test_an_empty_network(backend: str) -> None:
    params = {"w": np.ones(3)}
    gsgd.GSGD(params, gsgd.Network(), lr=0.5, backend=backend).step({"w": np.ones(3)})
    assert (params["w"] == 0.5).all()


def test_state_is_valid_from_construction(backend: str) -> None:
    net = medium()
    one, other = he(net), he(net)
    opt = gsgd.GSGD(one, net, **HYPER, backend=backend)
    again = gsgd.GSGD(other, net, **HYPER, backend=backend)
    again.load_state_dict(opt.state_dict())
    for o, params in ((opt, one), (again, other)):
        o.step(noise(params, 0))
    assert same(one, other)


@pytest.mark.parametrize("scale", ["balanced", "initial", "ones"])
@pytest.mark.parametrize("carry", [lambda s: s, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_resuming_equals_not_stopping(backend: str, carry: Callable[[Any], Any], scale: str) -> None:
    """The state goes into an optimizer that was made from other weights and other settings of the trees."""
    net = medium()
    one = he(net)
    opt = gsgd.GSGD(one, net, **HYPER, scale=scale, rule="largest", backend=backend)
    for seed in range(2):
        opt.step(noise(one, seed))
    state = carry(opt.state_dict())
    saved = {name: value.copy() for name, value in one.items()}
    other = he(net, seed=9)
    again = gsgd.GSGD(other, net, **HYPER, scale=scale, rule="largest", backend=backend)
    for name, value in saved.items():
        other[name][...] = value
    again.load_state_dict(state)
    for seed in range(2, 5):
        for o, params in ((opt, one), (again, other)):
            o.step(noise(params, seed))
    assert same(one, other)
    assert again.stats == opt.stats


def test_a_saved_state_does_not_move(backend: str) -> None:
    net = medium()
    params = he(net)
    opt = gsgd.GSGD(params, net, **HYPER, backend=backend)
    opt.step(noise(params, 0))
    state = opt.state_dict()
    before = pickle.dumps(state)
    opt.step(noise(params, 1))
    assert pickle.dumps(state) == before


def test_the_two_backends_share_their_states() -> None:
    net = medium()
    one, other = he(net, np.float64), he(net, np.float64)
    core = gsgd.GSGD(one, net, **HYPER, backend="c")
    core.step(noise(one, 0))
    reference = gsgd.GSGD(other, net, **HYPER, backend="reference")
    for name, value in one.items():
        other[name][...] = value
    reference.load_state_dict(core.state_dict())
    for opt, params in ((core, one), (reference, other)):
        opt.step(noise(params, 1))
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-12)


def test_weights_changed_by_others_between_steps(backend: str) -> None:
    """A step reads the weights that it finds: as an optimizer with the same state that found them there."""
    model: Model = mlp(3, 5, 4, 2)
    params = model.copy()
    opt = gsgd.GSGD(params, model.net, lr=0.01, scale="initial", backend=backend)
    opt.step(model.gradients(params))
    for value in params.values():
        value *= 1.1
    found = {name: value.copy() for name, value in params.items()}
    again = gsgd.GSGD(found, model.net, lr=0.01, scale="initial", backend=backend)
    again.load_state_dict(opt.state_dict())
    for o, weights in ((opt, params), (again, found)):
        o.step(model.gradients(weights))
    assert same(params, found)
    assert not same(params, model.params)


FORK = """
import os, numpy as np, gsgd
net = gsgd.Network.sequential([(700, 600), (900, 700), (600, 900)])
def run():
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(s).astype("f") / 20 for n, s in net.shapes.items()}
    opt = gsgd.GSGD(params, net, lr=0.01, threads=2)
    opt.step({n: p / 100 for n, p in params.items()})
    return opt, params
opt, params = run()
child = os.fork()
if child == 0:
    opt.step({n: p / 100 for n, p in params.items()})
    os._exit(0 if all(np.isfinite(p).all() for p in run()[1].values()) else 1)
assert os.waitpid(child, 0)[1] == 0
opt.step({n: p / 100 for n, p in params.items()})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_steps_and_ends() -> None:
    subprocess.run([sys.executable, "-P", "-c", FORK], check=True, timeout=60)
