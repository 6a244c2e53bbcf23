"""Networks of JAX functions: traced as they would be described by hand, and verified."""

from __future__ import annotations

import random as python_random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gsgd

jax = pytest.importorskip("jax", reason="JAX is not installed")
gjax = pytest.importorskip("gsgd.jax")
jnp, lax = jax.numpy, jax.lax
jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes time here
pytestmark = pytest.mark.filterwarnings("ignore:the traced forward pass did not read")

Params = dict[str, Any]
Apply = Callable[[Params, Any], Any]


def random(**shapes: tuple[int, ...]) -> Params:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def traced(apply: Apply, params: Params, example: Any) -> gsgd.Network:
    """The network, which is verified."""
    net: gsgd.Network = gjax.trace(apply, params, example)
    gjax.verify(apply, params, net, example)
    return net


def same(net: gsgd.Network, other: gsgd.Network) -> None:
    """The same blocks between the same units, and the same units pinned."""
    assert net.shapes == other.shapes
    assert net.num_units == other.num_units
    number: dict[int, int] = {}
    mine, theirs = ({(b.name, b.start): b for b in n.blocks} for n in (net, other))
    assert mine.keys() == theirs.keys()
    for key, a in mine.items():
        b = theirs[key]
        assert [d.extent for d in a.dims] == [d.extent for d in b.dims]
        for x, y in zip((*a.rows, *a.cols), (*b.rows, *b.cols), strict=True):
            assert number.setdefault(int(x), int(y)) == y
    assert len(set(number.values())) == len(number)


def images(n: int = 4, *spatial: int, channels: int = 2) -> Any:
    return jnp.asarray(np.random.default_rng(1).standard_normal((n, *spatial, channels)), jnp.float32)


def conv(x: Any, w: Any, groups: int = 1) -> Any:
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def pool(x: Any) -> Any:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def cnn(p: Params, x: Any) -> Any:
    """A convolution, a residual block of two, one in groups; pooled, flattened channels last, two dense layers."""
    h = jax.nn.relu(conv(x, p["conv1"]) + p["b1"])
    r = jax.nn.leaky_relu(conv(h, p["conv2"], groups=2) + p["b2"])
    h = pool(h + jnp.maximum(conv(r, p["conv3"]), 0))
    h = jnp.abs(h.reshape(h.shape[0], -1) @ p["dense1"] + p["b3"])
    return jnp.dot(h, p["dense2"].T) + p["b4"]


CNN = {
    "conv1": (3, 3, 2, 4),
    "b1": (4,),
    "conv2": (3, 3, 2, 4),
    "b2": (4,),
    "conv3": (1, 1, 4, 4),
    "dense1": (16, 5),
    "b3": (5,),
    "dense2": (3, 5),
    "b4": (3,),
}


def test_a_residual_network_of_images_is_what_one_would_write() -> None:
    net = gsgd.Network()
    h = net.relu(net.conv("conv1", net.input(2), 4, (3, 3), bias="b1", layout="hwio"))
    r = net.conv("conv2", h, 4, (3, 3), groups=2, bias="b2", layout="hwio")
    h = net.add(h, net.conv("conv3", r, 4, (1, 1), layout="hwio"))
    h = net.dense("dense1", net.flatten(h, 4, order="channels_last"), 5, bias="b3", layout="io")
    net.output(net.dense("dense2", h, 3, bias="b4"))
    same(traced(cnn, random(**CNN), images(4, 4, 4)), net)


def first_channels(p: Params, x: Any) -> Any:
    h = jax.nn.relu(x @ p["w1"])
    a, b = jnp.unstack(h.reshape(-1, 2, 3), axis=1)
    shuffled = jnp.stack(jnp.split(h, 2, axis=1), axis=2).reshape(-1, 6)
    return jnp.concatenate([a, 2 * b, -shuffled[:, 1:3]], axis=1) @ p["w2"]


def normalized(p: Params, x: Any) -> Any:
    h = x @ p["w1"]
    h = (h - h.mean(0)) * (lax.rsqrt(h.var(0) + 1e-5) * p["gamma"]) + p["beta"]
    return jax.nn.relu(h) @ p["w2"]


def masked(p: Params, x: Any) -> Any:
    h = x @ p["w1"]
    h = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h / 0.5, 0)
    return jnp.where(h > 0, h, 0.1 * h) @ p["w2"]


@jax.checkpoint
def layer(w: Any, x: Any) -> Any:
    return jax.nn.relu(x @ w)


CASES: dict[str, tuple[Apply, Params, Any, int]] = {
    "split, shuffled, concatenated": (first_channels, random(w1=(3, 6), w2=(8, 2)), images(4, channels=3), 6),
    "batch normalization": (
        normalized,
        random(w1=(3, 6), gamma=(6,), beta=(6,), w2=(6, 2)),
        images(5, channels=3),
        6,
    ),
    "dropout and where": (masked, random(w1=(3, 6), w2=(6, 2)), images(4, channels=3), 6),
    "checkpoint": (
        lambda p, x: layer(p["w1"], x) @ p["w2"],
        random(w1=(3, 6), w2=(6, 2)),
        images(4, channels=3),
        6,
    ),
    "vmap, columns": (
        lambda p, x: jax.vmap(lambda x: p["w2"] @ jnp.clip(p["w1"] @ x + p["b"], 0))(x),
        random(w1=(6, 3), b=(6,), w2=(2, 6)),
        images(4, channels=3),
        6,
    ),
    "channels of zeros": (
        lambda p, x: jax.nn.relu(jnp.pad(x @ p["w1"], ((0, 0), (1, 1))) + x @ p["skip"]) @ p["w2"],
        random(w1=(3, 4), skip=(3, 6), w2=(6, 2)),
        images(4, channels=3),
        6,
    ),
    "zeros between channels": (
        lambda p, x: lax.pad(jax.nn.relu(x @ p["w1"]), 0.0, ((0, 0, 0), (0, 0, 1))) @ p["w2"],
        random(w1=(3, 4), w2=(7, 2)),
        images(4, channels=3),
        0,
    ),
    "mean over positions": (
        lambda p, x: jax.nn.relu(conv(x, p["w1"])).mean((1, 2)) @ p["w2"],
        random(w1=(3, 3, 2, 4), w2=(4, 3)),
        images(2, 3, 3),
        4,
    ),
    "up-sampling, and the last position": (
        lambda p, x: (
            jax.image.resize(
                jax.image.resize(jax.nn.relu(conv(x, p["w1"])), (2, 6, 6, 4), "nearest"), (2, 8, 8, 4), "linear"
            )[:, -1, jnp.argmax(x[0, :, 0, 0])]
            @ p["w2"]
        ),
        random(w1=(3, 3, 2, 4), w2=(4, 3)),
        images(2, 3, 3),
        4,
    ),
    "maxout": (
        lambda p, x: (jnp.maximum((h := x @ p["w1"])[:, :3], h[:, 3:]) + p["b"]) @ p["w2"],
        random(w1=(3, 6), b=(3,), w2=(3, 2)),
        images(4, channels=3),
        3,
    ),
    "sums of features": (
        lambda p, x: jnp.tile(jax.nn.relu(x @ p["w1"]).reshape(-1, 2, 3).sum(1), (1, 2)) @ p["w2"],
        random(w1=(3, 6), w2=(6, 2)),
        images(4, channels=3),
        3,
    ),
    "channels at constant places": (
        lambda p, x: (
            jnp.concatenate(
                [
                    (h := jax.nn.relu(x @ p["w1"]))[:, jnp.array([2, 0, -1])],
                    jnp.take(h.reshape(-1, 2, 3), jnp.arange(3)[::-2], axis=2).reshape(-1, 4),
                ],
                axis=1,
            )
            @ p["w2"]
        ),
        random(w1=(3, 6), w2=(7, 2)),
        images(4, channels=3),
        4,
    ),
    "one unit": (
        lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"],
        random(w1=(3, 1), w2=(1, 2)),
        images(4, channels=3),
        1,
    ),
    "an output of features": (
        lambda p, x: (h := jax.nn.relu(x @ p["w1"]), jax.nn.relu(h @ p["w2"]) @ p["w3"]),
        random(w1=(3, 4), w2=(4, 5), w3=(5, 2)),
        images(4, channels=3),
        5,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_understood(case: str) -> None:
    apply, params, example, units = CASES[case]
    net = traced(apply, params, example)
    assert net.num_units == units
    assert net.shapes == {name: w.shape for name, w in params.items()}


def attention(p: Params, x: Any) -> Any:
    scores = jnp.einsum("bqc,bkc->bqk", x @ p["query"], x @ p["key"])
    return jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores), x @ p["value"]) @ p["out"]


def test_attention_is_free_in_its_values_only() -> None:
    params = random(query=(3, 4), key=(3, 4), value=(3, 6), out=(6, 2))
    net = traced(attention, params, images(2, 5, channels=3))
    assert net.shapes == {name: w.shape for name, w in params.items()}
    assert net.num_units == 6
    assert {unit.partition("[")[0] for unit in net.units} == {"value"}
    assert "pinned (dot_general in bqc,bkc->bqk" in str(net)


def test_arrays_that_are_closed_over_may_change() -> None:
    """Running means are 0 at first: a layer before them is no more homogeneous for that."""
    mean, params = jnp.zeros(6), random(w1=(3, 6), gamma=(6,), beta=(6,), w2=(6, 2))

    def evaluate(p: Params, x: Any) -> Any:
        return jax.nn.relu((x @ p["w1"] - mean) * p["gamma"] + p["beta"]) @ p["w2"]

    net = traced(evaluate, params, images(4, channels=3))
    assert net.num_units == 6
    assert {unit.partition("[")[0] for unit in net.units} == {"gamma"}


TWO = random(w1=(3, 4), w2=(4, 4), w3=(4, 2))


@pytest.mark.parametrize(
    ("apply", "params", "described", "units", "reason"),
    [
        (lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w3"], TWO, {"w1", "w3"}, 0, "tanh"),
        (lambda p, x: jax.nn.relu6(x @ p["w1"]) @ p["w3"], TWO, {"w1", "w3"}, 0, "min"),
        (lambda p, x: (jax.nn.relu(x @ p["w1"]) + 1) @ p["w3"], TWO, {"w1", "w3"}, 0, "add"),
        (lambda p, x: jnp.where(x[:, :1] @ p["w1"][:1] > 1, 1.0, 2.0) @ p["w3"], TWO, {"w3"}, 0, "gt"),
        (
            lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["w1"]) @ p["w2"] @ p["w2"]) @ p["w3"],
            TWO,
            {"w1", "w3"},
            0,
            "dot_general",
        ),
        (
            lambda p, x: jax.nn.relu(lax.fori_loop(0, 2, lambda i, h: h @ p["w2"], x @ p["w1"])) @ p["w3"],
            TWO,
            {"w1", "w3"},
            0,
            "scan",
        ),
        (lambda p, x: jax.nn.relu(x @ p["w1"]) @ (p["w3"] / jnp.sum(p["w3"] ** 2)), TWO, {"w1"}, 0, "dot_general"),
        (lambda p, x: (h := x @ p["w1"]) * (h > 0) @ p["w3"], TWO, {"w1", "w3"}, 4, ""),
        (lambda p, x: (h := x @ p["w1"]) * h @ p["w3"], TWO, {"w1", "w3"}, 0, "mul"),
        (lambda p, x: (x @ p["w1"])[:, jnp.argsort(x[:, 0])] @ p["w3"], TWO, {"w1", "w3"}, 0, "gather"),
        (
            lambda p, x: jnp.take(x @ p["w1"], jnp.array([1, 0, 2, 4]), axis=1, mode="clip") @ p["w3"],
            TWO,
            {"w1", "w3"},
            0,
            "gather",
        ),
    ],
)
def test_what_is_not_understood_is_pinned(
    apply: Apply, params: Params, described: set[str], units: int, reason: str
) -> None:
    net = traced(apply, params, images(4, channels=3))
    assert net.shapes.keys() == described
    assert net.num_units == units
    assert reason in " ".join(net.pins.values())


def test_names() -> None:
    with pytest.raises(ValueError, match="two parameters are named"):
        gjax.names({"a.b": 1.0, "a": {"b": 2.0}})
    params = {**random(w1=(3, 4), w2=(4, 2)), "slope": 0.5}
    net = traced(lambda p, x: jax.nn.leaky_relu(x @ p["w1"], p["slope"]) @ p["w2"], params, images(4, channels=3))
    assert str(net).endswith("not described, plain steps: slope (read by mul in the function)")


def test_what_is_left_out_has_a_reason() -> None:
    params = random(w1=(3, 4), square=(4, 4), scale=(4,), table=(5, 4), out=(4, 2), alone=(2, 3), unused=(3,))

    def apply(p: Params, x: Any) -> Any:
        h = jax.nn.relu(x @ p["w1"]) @ p["square"] @ p["square"]
        return (h + p["table"][0] * jnp.tanh(p["scale"])) @ p["out"], p["alone"].T

    with pytest.warns(UserWarning, match=r"^the traced forward pass did not read unused\. If other passes do") as said:
        net = gjax.trace(apply, params, images(4, channels=3))
    assert [w.filename for w in said] == [__file__]
    gjax.verify(apply, params, net, images(4, channels=3))
    assert net.plain == {
        "alone": "read by the output",
        "scale": "read by tanh in the function",
        "square": "read 2 times, first by dot_general in the function: not by a matrix of weights that is read once",
        "table": "read by slice in the function",
        "unused": "not read",
    }
    assert "not described, plain steps: scale (read by tanh in the function)" in str(net)


def test_parameters_that_one_leaves_out_take_plain_steps() -> None:
    params = {"a": random(w=(3, 4), b=(4,)), "c": random(w=(4, 5)), "d": random(w=(5, 2))}

    def apply(p: Params, x: Any) -> Any:
        return jax.nn.relu(jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"]) @ p["c"]["w"]) @ p["d"]["w"]

    x = images(4, channels=3)
    net = gjax.trace(apply, params, x, leave_out="a")
    gjax.verify(apply, params, net, x)
    assert net.shapes.keys() == {"c.w", "d.w"}
    assert net.num_units == 5
    assert net.plain == {"a.b": "left out", "a.w": "left out"}
    assert "meets a parameter that is left out" in net.pins.values()

    assert gjax.trace(apply, params, x, leave_out=["d.w"]).num_units == 4
    with pytest.raises(ValueError, match=r"leave_out: nothing is named 'c.v'.*'c.w'"):
        gjax.trace(apply, params, x, leave_out="c.v")


def test_parameters_that_are_read_or_left_out_are_no_warning() -> None:
    params = {**random(w=(3, 4), out=(4, 2)), "unused": random(a=(3,), b=(2,))}
    inner = jax.jit(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gjax.trace(inner, params, images(4, channels=3), leave_out="unused")
    with pytest.warns(UserWarning, match=r"did not read unused\.a, unused\.b\."):
        gjax.trace(inner, params, images(4, channels=3))


def test_a_wrong_network_is_caught() -> None:
    params = random(**CNN)
    wrong = gsgd.Network()
    h = wrong.relu(wrong.conv("conv1", wrong.input(2), 4, (3, 3), bias="b1", layout="hwio"))
    r = wrong.conv("conv2", h, 4, (3, 3), groups=2, layout="hwio")  # without its bias
    h = wrong.add(h, wrong.conv("conv3", r, 4, (1, 1), layout="hwio"))
    h = wrong.dense("dense1", wrong.flatten(h, 4, order="channels_first"), 5, bias="b3", layout="io")
    wrong.output(wrong.dense("dense2", h, 3, bias="b4"))
    with pytest.raises(gjax.SymmetryError, match=r"'conv1' and read by .*'dense1'.*'conv2' and read by 'conv3'"):
        gjax.verify(cnn, params, wrong, images(4, 4, 4))
    net = gjax.trace(cnn, params, images(4, 4, 4))

    @jax.custom_vjp
    def straight(h: Any) -> Any:
        return jax.nn.relu(h)

    straight.defvjp(lambda h: (jax.nn.relu(h), None), lambda _, g: (g,))
    two = random(w1=(3, 4), w2=(4, 2))
    through = gjax.trace(lambda p, x: straight(x @ p["w1"]) @ p["w2"], two, images(4, channels=3))
    assert through.num_units == 4
    with pytest.raises(gjax.SymmetryError, match="gradients"):
        gjax.verify(lambda p, x: straight(x @ p["w1"]) @ p["w2"], two, through, images(4, channels=3))
    without = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    with pytest.raises(TypeError, match=r"example: expected arrays with values, got jax.ShapeDtypeStruct"):
        gjax.verify(first_channels, two, net, without)
    with pytest.raises(TypeError, match=r"params: expected arrays with values, got jax.ShapeDtypeStruct"):
        gjax.verify(first_channels, {**two, "w1": without}, net, images(4, channels=3))
    with pytest.raises(ValueError, match="conv2: the network describes"):
        gjax.verify(cnn, {**params, "conv2": params["conv1"][:1]}, net, images(4, 4, 4))


def test_flax() -> None:
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.relu(nn.Conv(4, (3, 3))(x))
            r = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(h)))
            h = nn.max_pool(h + r, (2, 2), (2, 2))
            h = nn.Dropout(0.5, deterministic=False)(h.reshape(h.shape[0], -1))
            return nn.Dense(3)(nn.relu(nn.Dense(5)(h)))

    x = images(4, 4, 4)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    model = Model()
    variables = model.init(keys, x)

    def apply(params: Params, x: Any) -> Any:
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        return model.apply(given, x, rngs={"dropout": keys["dropout"]}, mutable=["batch_stats"])

    net = traced(apply, variables["params"], x)
    assert net.shapes.keys() == set(gjax.names(variables["params"]))
    assert net.num_units == 4 + 5
    assert "square in Model/BatchNorm_0" in str(net)


def test_equinox() -> None:
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(4 * 4, 2, 5, 1, key=keys[1]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jnp.moveaxis(images(3, 6, 6), -1, 1)
    net = traced(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x)
    assert net.shapes["layers.0.bias"] == (4, 1, 1)
    assert net.shapes.keys() == set(gjax.names(params))
    assert net.num_units == 4 + 5
    gopt = pytest.importorskip("gsgd.optax", reason="Optax is not installed")
    state = gopt.gsgd(0.1, net).init(params)
    (scale,) = state.reference.values()
    assert scale.c.shape == (4 + 5 + 1,)


def test_an_omitted_bias_that_is_zero_is_found() -> None:
    def apply(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]

    draw = np.random.default_rng(0).standard_normal
    params, x = {"a": draw((4, 8)), "b": np.zeros(8), "c": draw((8, 2))}, draw((16, 4))
    for bias in ("b", None):
        net = gsgd.Network()
        net.output(net.dense("c", net.dense("a", net.input(4), 8, bias=bias, layout="io"), 2, layout="io"))
        if bias:
            gsgd.jax.verify(apply, params, net, x)
        else:
            with pytest.raises(gsgd.jax.SymmetryError, match="written by 'a'"):
                gsgd.jax.verify(apply, params, net, x)


def test_random_numbers_of_python_and_numpy_are_seeded() -> None:
    def apply(p: Any, x: Any) -> Any:
        x = x * np.random.uniform(0.5, 1, 4) * python_random.uniform(0.5, 1)  # noqa: NPY002
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    draw = np.random.default_rng(0).standard_normal
    params, x = {"a": draw((4, 8)), "b": draw((8, 2))}, draw((16, 4))
    net = gsgd.jax.trace(apply, params, x)
    assert net.num_units == 8
    states = (python_random.getstate(), np.random.get_state()[2])  # noqa: NPY002
    gsgd.jax.verify(apply, params, net, x)
    assert states == (python_random.getstate(), np.random.get_state()[2])  # noqa: NPY002


def test_verify_explains_what_does_not_run_in_float64() -> None:
    """A convolution takes no mixture of types; a matrix product does."""
    constant = jnp.ones((4, 4, 1), jnp.float32)
    net = gsgd.Network()
    net.output(net.dense("w", net.input(3), 4, layout="io"))
    params, x = {"w": jnp.ones((3, 4))}, jnp.ones((2, 3))
    gjax.verify(lambda p, x: x @ p["w"] @ constant[..., 0], params, net, x)

    def convolve(p: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated((x @ p["w"])[..., None], constant, (1,), "SAME")

    with pytest.raises(TypeError, match="apply: it does not run in float64"):
        gjax.verify(convolve, params, net, x)
