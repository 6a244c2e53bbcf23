"""Equivalence up to positive scaling against enumeration of all paths, and equalized largest weights."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import Array, Model, Params, mlp, models
from oracles import Structure, all_paths, modulo_trees

import gsgd
import gsgd.jax

small_models = models(parts=["layer", "residual", "concat", "shuffle", "sigmoid"], zeros=True, max_parts=2)


def rescaled(model: Model, seed: int) -> tuple[Params, Array]:
    c = np.exp(np.random.default_rng(seed).uniform(-2, 2, model.net.num_units))
    params = model.copy()
    gsgd.rescale(params, model.net, c)
    return params, c


def same_paths(model: Model, a: Params, b: Params) -> bool:
    """Whether all path values agree, and the signs of the weights on paths that are not zero."""
    pack = Structure(model.net, *modulo_trees(model.net)).pack
    one, other = pack(a), pack(b)
    for path in all_paths(model.net):
        x, y = (math.prod(w[e] for e in path) for w in (one, other))
        if abs(x - y) > 1e-7 * abs(x) or (x != 0 and any(one[e] * other[e] < 0 for e in path)):
            return False
    return True


@given(models(), st.integers(0, 2**16))
def test_scales_are_found(model: Model, seed: int) -> None:
    params, c = rescaled(model, seed)
    alive = gsgd.Skeleton(model.net, model.params).edge_arrays[0][:, 0] >= 0
    found = gsgd.equivalence(model.params, params, model.net, rtol=1e-9)
    np.testing.assert_allclose(found, np.where(alive, c, 1.0), rtol=1e-9)


@given(small_models, st.integers(0, 2**16), st.sampled_from([1.0, 1.01, -1.0, 0.0]))
def test_equivalent_where_all_paths_agree(model: Model, seed: int, factor: float) -> None:
    params, _ = rescaled(model, seed)
    rng = np.random.default_rng(seed)
    name = list(model.net.shapes)[rng.integers(len(model.net.shapes))]
    params[name].reshape(-1)[rng.integers(params[name].size)] *= factor
    if same_paths(model, model.params, params):
        gsgd.equivalence(model.params, params, model.net)
        return
    before = {n: w.copy() for n, w in params.items()}
    with pytest.raises(gsgd.NotEquivalent) as caught:
        gsgd.equivalence(model.params, params, model.net)
    assert caught.value.parameter in model.net.shapes
    assert all((params[n] == w).all() for n, w in before.items())


def test_the_first_unit_where_they_part_is_named() -> None:
    model = mlp(3, 6, 5, 2)
    params, _ = rescaled(model, 0)
    names = [name for name in params if name.startswith("dense")]
    params[names[1]][4, 2] *= 1.5
    params[names[2]][0, 1] *= 1.5
    with pytest.raises(gsgd.NotEquivalent, match=rf"'{names[1]}' into unit .*\[4\]") as caught:
        gsgd.equivalence(model.params, params, model.net)
    assert (caught.value.parameter, caught.value.unit) == (names[1], f"{names[1]}[4]")
    with pytest.raises(ValueError, match="'more' is in one of the two only"):
        gsgd.equivalence({**params, "more": np.ones(2)}, params, model.net)
    with pytest.raises(gsgd.NotEquivalent, match="'more', which is of no unit"):
        gsgd.equivalence({**params, "more": np.ones(2)}, {**params, "more": np.zeros(2)}, model.net)
    with pytest.raises(ValueError, match="rtol"):
        gsgd.equivalence(params, params, model.net, rtol=float("nan"))


def test_depth_does_no_harm() -> None:
    """Path values of 600 layers overflow; scales are found nevertheless, in float32."""
    net, rng = gsgd.Network(), np.random.default_rng(0)
    params = {str(i): (20 * rng.standard_normal((4, 4))).astype(np.float32) for i in range(600)}
    h = net.input(4)
    for name in params:
        h = net.relu(net.dense(name, h, 4))
    net.output(h)
    c = np.exp(rng.uniform(-3, 3, net.num_units))
    other = {name: w.copy() for name, w in params.items()}
    gsgd.rescale(other, net, c)
    np.testing.assert_allclose(gsgd.equivalence(params, other, net), c, rtol=1e-3)


@given(models(), st.integers(0, 2**16))
def test_largest_magnitudes_become_equal(model: Model, seed: int) -> None:
    """On random networks with ties, groups and taps: of the same function."""
    params, _ = rescaled(model, seed)
    gsgd.balance(params, model.net, norm="max")
    gsgd.equivalence(model.params, params, model.net, rtol=1e-9)
    largest = np.zeros((2, model.net.num_units + 1))
    for block in model.net.blocks:
        size = np.abs(block.view(params[block.name])).max(axis=(3, 4, 5))
        np.maximum.at(largest[0], block.rows, size.max(axis=2).reshape(-1))
        np.maximum.at(largest[1], block.cols, size.max(axis=1).reshape(-1))
    alive = gsgd.Skeleton(model.net, params).edge_arrays[0][:, 0] >= 0
    np.testing.assert_allclose(largest[0, :-1][alive], largest[1, :-1][alive], rtol=1e-5)


def test_norm_is_checked() -> None:
    model = mlp(2, 3, 2)
    with pytest.raises(ValueError, match="norm: expected 2 or 'max', got 1"):
        gsgd.balance(model.copy(), model.net, norm=1)


def test_pytrees() -> None:
    """JAX: the same on trees of any nesting, which come back with their dtypes."""
    w = np.random.default_rng(0).standard_normal
    params = {"a": {"w": jnp.asarray(w((3, 5)), jnp.float32)}, "b": {"w": jnp.asarray(w((5, 2)), jnp.bfloat16)}, "n": 3}
    net = gsgd.jax.trace(
        lambda p, x: jnp.maximum(x @ p["a"]["w"], 0) @ p["b"]["w"].astype(jnp.float32),
        {k: v for k, v in params.items() if k != "n"},
        jnp.zeros((2, 3)),
    )
    assert net.num_units == 5
    c = np.array([0.5, 2, 4, 1, 8.0])  # powers of two: exact in bfloat16
    other = gsgd.jax.rescale(params, net, c)
    assert other["b"]["w"].dtype == jnp.bfloat16
    assert other["n"] == 3
    np.testing.assert_array_equal(np.asarray(other["a"]["w"]), np.asarray(params["a"]["w"]) * c)
    np.testing.assert_allclose(gsgd.jax.equivalence(params, other, net), c, rtol=1e-6)
    for norm in (2, "max"):
        balanced = gsgd.jax.balance(other, net, norm=norm)
        gsgd.jax.equivalence(params, balanced, net, rtol=1e-2)
