"""What holds of every optimizer: in NumPy, PyTorch and Optax; SGD, Adam and RMSProp."""

from typing import Any

import numpy as np
import pytest
import torch
from frameworks import FRAMEWORKS, METHODS, WAYS
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Model, Params, everything, mlp, models
from oracles import rescaled

import gsgd

pytestmark = pytest.mark.filterwarnings("ignore:no unit was found")

MODEL = everything()
SMALL = mlp(4, 6, 5, 3)


def random_rescaling(model: Model, seed: int = 0) -> Params:
    scales = 10 ** np.random.default_rng(seed).uniform(-1, 1, model.net.num_units)
    return rescaled(model.net, model.params, scales)


def outputs(model: Model, params: Params) -> Any:
    return model.forward(params).detach().numpy()


def assert_close(one: Params, other: Params, rtol: float, atol: float) -> None:
    for name, w in one.items():
        np.testing.assert_allclose(w, other[name], rtol=rtol, atol=atol, err_msg=name)


def compare_with_the_specification(framework: str, method: str, model: Model) -> None:
    """Parameters that the network does not mention included; with gradients that all take from the specification."""
    params = {**model.copy(), "beside": np.ones((3, 2))}
    one = FRAMEWORKS["NumPy, reference"](method, params, model.net)
    other = FRAMEWORKS[framework](method, params, model.net)
    for _ in range(4):
        grads = {**model.gradients({n: one.params[n] for n in model.params}), "beside": 0.1 * one.params["beside"]}
        one.step(grads)
        other.step(grads)
    largest = max(np.abs(w).max(initial=1) for w in one.params.values())
    assert_close(other.params, one.params, 1e-9, 1e-9 * largest)


@pytest.mark.parametrize("framework", ["NumPy, core", "PyTorch, core", "PyTorch, array"])
@given(models(zeros=False), st.sampled_from(list(METHODS)))
@settings(max_examples=40)
def test_steps_are_those_of_the_specification(framework: str, model: Model, method: str) -> None:
    compare_with_the_specification(framework, method, model)


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_optax_are_those_of_the_specification(method: str) -> None:
    """A network each has to be compiled."""
    compare_with_the_specification("Optax", method, MODEL)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_rescaling_changes_nothing(framework: str, method: str) -> None:
    """Theorem 4.1: from weights and from a rescaling of them, and rescaled in the middle of training."""
    runs = [FRAMEWORKS[framework](method, params, MODEL.net) for params in (MODEL.params, random_rescaling(MODEL))]
    for step in range(20):
        if step == 10:
            scales = np.linspace(0.5, 2, MODEL.net.num_units)
            runs[0].write(rescaled(MODEL.net, runs[0].params, scales))
        for run in runs:
            run.step(MODEL.gradients(run.params))
    assert not np.allclose(outputs(MODEL, runs[0].params), outputs(MODEL, MODEL.params), rtol=1e-2)
    np.testing.assert_allclose(outputs(MODEL, runs[0].params), outputs(MODEL, runs[1].params), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_rescaling_changes_what_plain_methods_do(method: str) -> None:
    ends = []
    for params in (MODEL.copy(), random_rescaling(MODEL)):
        tensors = {name: torch.nn.Parameter(torch.from_numpy(w)) for name, w in params.items()}
        opt = METHODS[method].torch(list(tensors.values()))
        for _ in range(20):
            for name, g in MODEL.gradients(params).items():
                tensors[name].grad = torch.from_numpy(g)
            opt.step()
        ends.append(outputs(MODEL, params))
    assert not np.allclose(*ends, atol=1e-3)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_units_it_is_the_plain_method(framework: str, method: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (17, 33), "b": (100,), "conv": (4, 3, 3, 3)}
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    tensors = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in params.items()}
    ours, theirs = FRAMEWORKS[framework](method, params, NOTHING), METHODS[method].torch(list(tensors.values()))
    for _ in range(10):
        grads = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
        for name, g in grads.items():
            tensors[name].grad = torch.from_numpy(g.copy())
        ours.step(grads)
        theirs.step()
    assert all(w.dtype == dtype for w in ours.params.values())
    plain = {name: p.detach().numpy() for name, p in tensors.items()}
    assert_close(ours.params, plain, rtol=0, atol=4e-6 if dtype == np.float32 else 1e-13)


NOTHING = gsgd.Network()


@pytest.mark.parametrize(("framework", "way"), WAYS)
@pytest.mark.parametrize("method", ["sgd", "nesterov", "adamw", "rmsprop, momentum"])
def test_resuming_is_not_stopping(framework: str, way: str, method: str) -> None:
    """The same bits from a state that went another way into an optimizer which was made from other weights."""
    model = MODEL if framework == "Optax" else SMALL
    one = FRAMEWORKS[framework](method, model.params, model.net)
    for step in range(8):
        if step == 4:
            other = one.resumed(way, random_rescaling(model))
        if step >= 4:
            other.step(model.gradients(other.params))
        one.step(model.gradients(one.params))
    for name, w in one.params.items():
        np.testing.assert_array_equal(w, other.params[name])
