"""The Optax transformations: the core's steps, under everything that Optax and JAX do to a transformation."""

from __future__ import annotations

import doctest
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from networks import everything

import gsgd

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="Optax is not installed")
jnp = jax.numpy
gopt = pytest.importorskip("gsgd.optax")
jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes time here

Make = Callable[..., Any]
SIZES = [5, 6, 4, 2]


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def chain() -> gsgd.Network:
    """What `forward` is."""
    net = gsgd.Network()
    x = net.input(SIZES[0])
    for i, size in enumerate(SIZES[1:]):
        x = net.dense(f"{i}.kernel", net.relu(x), size, bias=f"{i}.bias", layout="io")
    net.output(x)
    return net


def start(key: Any) -> list[dict[str, Any]]:
    shapes = list(itertools.pairwise(SIZES))
    keys = jax.random.split(key, len(shapes))
    return [
        {"kernel": jax.random.normal(k, s) * np.sqrt(2 / s[0]), "bias": jnp.zeros(s[1])}
        for k, s in zip(keys, shapes, strict=True)
    ]


def forward(params: Any, x: Any) -> Any:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def inputs() -> Any:
    return np.random.default_rng(1).standard_normal((16, SIZES[0]))


def loss(params: Any) -> Any:
    x = jnp.asarray(inputs())
    return jnp.mean((forward(params, x) - jnp.sin(x[:, :2])) ** 2)


def train(tx: Any, params: Any, state: Any, steps: int) -> Any:
    """Weights and state after `steps`, in one compiled loop."""

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), None, steps)[0]


def assert_close(a: Any, b: Any, **tolerance: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def reference(state: Any) -> Any:
    (found,) = state.reference.values()
    return found


METHODS: dict[str, tuple[Make, Make]] = {
    "sgd": (lambda net, **o: gopt.gsgd(0.1, net, **o), lambda p, net, **o: gsgd.GSGD(p, net, 0.1, **o)),
    "nesterov": (
        lambda net, **o: gopt.gsgd(0.1, net, 0.9, True, 1e-3, **o),
        lambda p, net, **o: gsgd.GSGD(p, net, 0.1, 0.9, True, 1e-3, **o),
    ),
    "adam": (
        lambda net, **o: gopt.gadam(0.01, net, weight_decay=1e-3, decoupled=False, **o),
        lambda p, net, **o: gsgd.GAdam(p, net, lr=0.01, weight_decay=1e-3, decoupled=False, **o),
    ),
    "adamw": (
        lambda net, **o: gopt.gadam(0.01, net, 0.8, 0.99, weight_decay=1e-2, **o),
        lambda p, net, **o: gsgd.GAdam(p, net, lr=0.01, betas=(0.8, 0.99), weight_decay=1e-2, **o),
    ),
    "rmsprop": (
        lambda net, **o: gopt.grmsprop(0.01, net, momentum=0.9, **o),
        lambda p, net, **o: gsgd.GRMSprop(p, net, lr=0.01, alpha=0.9, momentum=0.9, **o),
    ),
}


def compare_with_core(method: str, dtype: type, rtol: float, **options: Any) -> None:
    model = everything()
    params: Any = {n: w.astype(dtype) for n, w in model.copy().items()}
    params["alone"] = np.ones(3, dtype)
    ours, core = METHODS[method]
    tx, opt = ours(model.net, **options), core(params, model.net, **options)
    weights = {n: jnp.array(w) for n, w in params.items()}
    state, update = tx.init(weights), jax.jit(tx.update)
    for _ in range(5):
        double = {n: params[n].astype(np.float64) for n in model.params}
        grads: Any = {n: g.astype(dtype) for n, g in model.gradients(double).items()}
        grads["alone"] = np.full(3, 0.1, dtype)
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        opt.step(grads)
    assert all(w.dtype == dtype for w in weights.values())
    assert_close(weights, params, rtol=rtol, atol=rtol)
    for name, free in opt.skeleton.free.items():
        np.testing.assert_array_equal(np.asarray(updates[name])[free], 0)
    assert update._cache_size() == 1
    assert (int(state.count), int(state.clamped)) == (opt.stats.steps, opt.stats.clamped)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limits", [{"max_ratio": None, "clip_norm": 0.1}, {"max_ratio": 1.001}])
@pytest.mark.usefixtures("x64")
def test_steps_are_the_core_s(method: str, limits: dict[str, Any]) -> None:
    compare_with_core(method, np.float64, 1e-10, **limits)


@pytest.mark.parametrize(("method", "options"), [("nesterov", {"scale": "initial"}), ("adamw", {"rule": "largest"})])
def test_steps_without_x64(method: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_with_core(method, np.float32, 3e-4, **options)


@pytest.mark.parametrize("method", METHODS)
def test_steps_where_dtypes_are_promoted_by_hand_alone(method: str) -> None:
    tx, params = METHODS[method][0](chain(), clip_norm=1.0), start(jax.random.key(0))
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_bfloat16_keeps_its_type() -> None:
    tx, params, losses = gopt.gadam(lambda step: 0.1 / (10 + step), chain()), start(jax.random.key(0)), []
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda w, dtype=dtype: w.astype(dtype), params)
        ends, state = train(tx, cast, tx.init(cast), 10)
        assert {x.dtype for x in jax.tree.leaves((ends, state.m, state.v))} == {jnp.dtype(dtype)}
        losses.append(float(loss(ends)))
    assert losses[0] < 0.7 * float(loss(params))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


OPTAX: dict[str, tuple[Make, Make]] = {
    "nesterov": (lambda: optax.sgd(0.03, 0.9, True), lambda net: gopt.gsgd(0.03, net, 0.9, True)),
    "adamw": (lambda: optax.adamw(0.01, weight_decay=0.1), lambda net: gopt.gadam(0.01, net, weight_decay=0.1)),
    "rmsprop": (
        lambda: optax.rmsprop(0.01, eps_in_sqrt=False, momentum=0.9),
        lambda net: gopt.grmsprop(0.01, net, momentum=0.9),
    ),
}


@pytest.mark.filterwarnings("ignore:no unit was found")
@pytest.mark.parametrize("method", OPTAX)
@pytest.mark.usefixtures("x64")
def test_where_nothing_can_be_rescaled_it_is_optax_s_own(method: str) -> None:
    params = start(jax.random.key(0))
    theirs, ours = OPTAX[method]
    ends = [train(tx, params, tx.init(params), 20)[0] for tx in (theirs(), ours(gsgd.Network()))]
    assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_seeds_in_parallel_are_seeds_one_by_one() -> None:
    tx = gopt.gsgd(0.1, chain(), momentum=0.9)
    keys = jax.random.split(jax.random.key(3), 3)

    def run(key: Any) -> Any:
        params = start(key)
        return train(tx, params, tx.init(params), 10)

    one = jax.jit(lambda p, s: train(tx, p, s, 10))
    together, states = jax.jit(jax.vmap(run))(keys)
    assert states.count.shape == (3,)
    for i, key in enumerate(keys):
        params = start(key)
        alone, _ = one(params, tx.init(params))
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-9, atol=1e-12)


def test_seeds_in_parallel_compile_nothing_new_at_later_steps(caplog: pytest.LogCaptureFixture) -> None:
    """Where `jax.vmap` runs operation by operation."""
    tx = gopt.gadam(0.1, chain())
    params = jax.vmap(start)(jax.random.split(jax.random.key(3), 3))
    state, grads = jax.vmap(tx.init)(params), jax.tree.map(jnp.ones_like, params)
    for step in range(3):
        caplog.clear()
        with jax.log_compiles(step == 2):
            _, state = jax.vmap(tx.update)(grads, state, params)
    assert not [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]


@pytest.mark.usefixtures("x64")
def test_the_scale_is_the_same_where_weights_have_no_values_yet() -> None:
    """Nor does the thread of a host callback know of x64 mode."""
    keys = jax.random.split(jax.random.key(3), 3)
    tx = gopt.gsgd(0.1, chain())
    together = reference(jax.jit(jax.vmap(lambda key: tx.init(start(key))))(keys))
    for i, key in enumerate(keys):
        alone = reference(tx.init(start(key)))
        assert alone.c.dtype == np.float64
        assert_close([x[i] for x in together], list(alone), rtol=1e-14)


@pytest.mark.usefixtures("x64")
def test_ones_is_the_paper_s_start() -> None:
    model = everything()
    params = model.copy()
    tx, weights = gopt.gsgd(0.01, model.net, scale="initial"), {n: jnp.array(w) for n, w in params.items()}
    weights = jax.jit(lambda p: gopt.ones(p, model.net))(weights)
    opt = gsgd.GSGD(params, model.net, 0.01, scale="ones")
    jax.tree.map(np.testing.assert_array_equal, weights, dict(params))
    state, update = tx.init(weights), jax.jit(tx.update)
    for _ in range(5):
        grads = model.gradients(params)
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        opt.step(grads)
    assert_close(weights, dict(params), rtol=1e-10, atol=1e-10)


def test_a_state_of_another_skeleton_is_refused() -> None:
    serialization = pytest.importorskip("flax.serialization", reason="Flax is not installed")
    tx, params = gopt.gadam(0.01, chain()), start(jax.random.key(0))
    state = serialization.to_bytes(tx.init(params))
    params[1]["kernel"] = params[1]["kernel"].at[0, 0].set(0)
    with pytest.raises(ValueError, match="skeleton"):
        serialization.from_bytes(tx.init(params), state)


@pytest.mark.usefixtures("x64")
def test_a_loop_may_donate_weights_and_state() -> None:
    tx, params = gopt.gadam(0.01, chain()), start(jax.random.key(0))
    expected = train(tx, params, tx.init(params), 3)
    step = jax.jit(lambda params, state: train(tx, params, state, 1), donate_argnums=(0, 1))
    found = params, tx.init(params)
    for _ in range(3):
        found = step(*found)
    assert step._cache_size() == 1
    assert_close(found, expected, rtol=1e-12)


def test_a_loop_of_flax_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    gjax = pytest.importorskip("gsgd.jax")

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.first, self.norm = nnx.Linear(5, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
            self.second, self.last = nnx.Linear(6, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(nnx.relu(self.second(nnx.relu(self.norm(self.first(x))))))

    x = jnp.asarray(inputs(), jnp.float32)
    model = Model(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params: Any, x: Any) -> Any:
        return nnx.merge(graph, params, rest, copy=True)(x)

    net = gjax.trace(apply, params, x)
    gjax.verify(apply, params, net, x)
    assert (net.num_units, set(net.shapes)) == (6 + 4, set(gjax.names(params)))
    optimizer = nnx.Optimizer(model, gopt.gsgd(0.05, net, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - jnp.sin(x[:, :2])) ** 2))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.3 * losses[0]
    assert int(optimizer.opt_state.count[...]) == 20


@pytest.mark.usefixtures("x64")
def test_schedules_and_what_optax_wraps_around() -> None:
    net, params = chain(), start(jax.random.key(1))
    schedule = optax.exponential_decay(0.1, 1, 0.8)
    named = {f"{i}.{n}": np.array(w) for i, layer in enumerate(params) for n, w in layer.items()}
    opt = gsgd.GSGD(named, net, momentum=0.9)
    for step in range(4):
        opt.lr = float(schedule(step))
        grads = jax.grad(loss)([{n: named[f"{i}.{n}"] for n in layer} for i, layer in enumerate(params)])
        opt.step({f"{i}.{n}": np.array(g) for i, layer in enumerate(grads) for n, g in layer.items()})
    expected = [{n: named[f"{i}.{n}"] for n in layer} for i, layer in enumerate(params)]

    wrapped = {
        "injected, chained": optax.chain(
            optax.clip_by_global_norm(1e6), optax.inject_hyperparams(gopt.gsgd)(schedule, net, momentum=0.9)
        ),
        "every second": optax.MultiSteps(gopt.gsgd(schedule, net, momentum=0.9), 2),
    }
    for name, tx in wrapped.items():
        run = jax.jit(lambda p, s, n, tx=tx: train(tx, p, s, n), static_argnums=2)
        steps = 1 if name == "every second" else 4
        found, state = params, tx.init(params)
        for _ in range(4 if steps == 1 else 1):  # twice the same gradient is one step
            found, state = run(found, state, 2 if steps == 1 else steps)
        assert_close(found, expected, rtol=1e-6, atol=1e-7)  # the schedule is in float32
        assert run._cache_size() == 1


@pytest.mark.filterwarnings("ignore:no unit was found")
@pytest.mark.usefixtures("x64")
def test_parameters_of_another_transformation_pin_what_they_meet() -> None:
    net, params = chain(), start(jax.random.key(2))
    labels = [{n: "frozen" if i == 1 else "paths" for n in layer} for i, layer in enumerate(params)]
    tx = optax.multi_transform({"paths": gopt.gsgd(0.1, net), "frozen": optax.set_to_zero()}, labels)
    restricted = net.without(["1.kernel", "1.bias"], "frozen")
    named = {f"{i}.{n}": np.array(w) for i, layer in enumerate(params) if i != 1 for n, w in layer.items()}
    opt = gsgd.GSGD(named, restricted, 0.1)
    grads = jax.grad(loss)(params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    opt.step({n: np.array(grads[int(n[0])][n[2:]]) for n in named})
    found = optax.apply_updates(params, updates)
    assert_close(found[1], params[1])
    for name, w in named.items():
        np.testing.assert_allclose(found[int(name[0])][name[2:]], w, rtol=1e-12)


def test_a_step_that_is_not_finite_is_left_out() -> None:
    params = start(jax.random.key(0))
    tx = gopt.gsgd(0.01, chain(), momentum=0.9)
    update = jax.jit(tx.update)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = update(grads, tx.init(params), params)
    grads[2]["bias"] = grads[2]["bias"].at[1].set(jnp.nan)
    updates, after = update(grads, state, params)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
    assert (int(state.skipped), int(after.skipped), int(after.count)) == (0, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, after._replace(skipped=state.skipped), state)


@pytest.mark.parametrize("where", ["kernel", "bias"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_one_entry_of_many_that_is_not_finite_is_seen(layer: int, where: str, value: float) -> None:
    """Some reductions of XLA overlook NaN in arrays of this size."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = [{"kernel": jax.random.normal(k, (96, 96)) / 8, "bias": jnp.zeros(96)} for k in keys]
    net = gsgd.jax.trace(lambda p, x: jax.nn.relu(x @ p[0]["kernel"] + p[0]["bias"]) @ p[1]["kernel"] + p[1]["bias"],
                         params, jnp.ones((2, 96)))  # fmt: skip
    for tx in (gopt.gsgd(0.01, net, momentum=0.9), gopt.gadam(0.01, net)):
        grads = jax.tree.map(jnp.ones_like, params)
        spoilt = grads[layer][where].ravel().at[95].set(value)
        grads[layer][where] = spoilt.reshape(params[layer][where].shape)
        updates, after = jax.jit(tx.update)(grads, tx.init(params), params)
        assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
        assert (int(after.skipped), int(after.count)) == (1, 0)


def test_parameters_of_numpy_and_no_gradient() -> None:
    params = jax.tree.map(np.asarray, start(jax.random.key(0)))
    tx = gopt.gsgd(0.1, chain())
    grads = jax.tree.map(np.ones_like, params)
    grads[-1]["bias"] = None
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates[-1]["bias"], 0)
    assert np.abs(updates[0]["bias"]).min() > 0


def test_what_is_wrong_is_said() -> None:
    net, params = chain(), start(jax.random.key(0))
    tx = gopt.gsgd(0.1, net)
    with pytest.raises(ValueError, match="expected params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"'2.kernel' of the network is missing in params, which has .*1.kernel"):
        tx.init(params[:2])
    with pytest.raises(ValueError, match=r"'0.kernel': expected shape \(5, 6\)"):
        tx.init([{**params[0], "kernel": params[0]["kernel"].T}, *params[1:]])
    for wrong in (jnp.zeros(3, int), jax.nn.relu):
        with pytest.raises(TypeError, match="'3': expected floating point"):
            tx.init([*params, wrong])
    with pytest.raises(ValueError, match=r"'0.kernel' of the network is missing in params, which has none"):
        tx.init([])
    with pytest.raises(TypeError, match="state: expected what this transformation's init returns, got tuple"):
        tx.update(params, optax.sgd(0.1).init(params), params)
    others = (gopt.gsgd(0.1, net, momentum=0.9), gopt.grmsprop(0.1, net, momentum=0.9), gopt.gadam(0.1, net))
    states = [other.init(params) for other in others]
    for i, j, got in (
        (0, None, "without moments m"),
        (None, 0, "with moments m"),
        (0, 1, "of RMSprop"),
        (1, 2, "of Adam"),
        (2, 0, "of SGD"),
    ):
        made, given = (tx if i is None else others[i]), (tx.init(params) if j is None else states[j])
        with pytest.raises(TypeError, match=f"state: .*, got one {got}"):
            made.update(params, given, params)
    state = tx.init(params)
    with pytest.raises(ValueError, match="params: expected 6 arrays, as in init, got 7"):
        tx.update([*params, jnp.ones(3)], state, [*params, jnp.ones(3)])
    with pytest.raises(ValueError, match=r"parameter '1.kernel': expected shape \(6, 4\), as in init, got \(6, 5\)"):
        tx.update(params, state, [params[0], {**params[1], "kernel": jnp.ones((6, 5))}, params[2]])
    with pytest.raises(ValueError, match=r"gradient of '0.kernel': expected shape \(5, 6\), got \(6, 5\)"):
        tx.update([{**params[0], "kernel": params[0]["kernel"].T}, *params[1:]], state, params)
    with pytest.raises(TypeError, match=r"network: expected a gsgd.Network, got float"):
        gopt.gsgd(net, 0.1)
    with pytest.raises(ValueError, match="outside of jit and vmap"):
        jax.eval_shape(gopt.gsgd(0.1, net, rule="largest").init, params)
    for options in (
        {"momentum": np.float32(-1)},
        {"nesterov": True},
        {"scale": "ones"},
        {"rule": "x"},
        {"max_ratio": 1.0},
        {"clip_norm": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            gopt.gsgd(0.1, net, **options)


def test_a_network_without_units_is_told_of() -> None:
    params = start(jax.random.key(0))
    with pytest.warns(UserWarning, match="no unit was found that can be rescaled"):
        gopt.gsgd(0.1, gsgd.Network()).init(params)


def test_what_is_like_parameters_can_be_mapped() -> None:
    """Partition specs of a state, say."""
    tx, params = optax.masked(gopt.gadam(0.1, chain()), True), start(jax.random.key(0))
    state, specs = tx.init(params), jax.tree.map(lambda w: w.shape, params)
    found = optax.tree_utils.tree_map_params(tx, lambda m, w: m + w, state, params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert_close(found.inner_state.m, params)
    jax.tree.map(np.testing.assert_array_equal, found.inner_state.reference, state.inner_state.reference)
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda m, spec: spec, state, specs, transform_non_params=lambda _: "whole"
    )
    assert mapped.inner_state == gopt.State(*["whole"] * 4, specs, specs)


@pytest.mark.parametrize("make", [lambda net: gopt.gsgd(0.1, net, 0.9), lambda net: gopt.gadam(0.1, net)])
def test_the_state_of_parameters_without_values(make: Any) -> None:
    """Of the shapes that a checkpoint is restored into; the names are those of a skeleton of non-zero weights."""
    params, tx = start(jax.random.key(0)), make(chain())
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state))
    for found in (tx.init(shapes[0]), jax.eval_shape(tx.init, params)):
        assert found == shapes[1]
    lowered = jax.jit(tx.update).lower(shapes[0], tx.init(shapes[0]), shapes[0])
    assert jax.tree.structure(lowered.out_info) == jax.tree.structure((params, state))


def test_zero_weights_need_an_init_with_values() -> None:
    params = start(jax.random.key(0))
    params[1]["kernel"] = params[1]["kernel"].at[0].set(0)
    tx = gopt.gsgd(0.1, chain())
    with pytest.warns(UserWarning, match="1 units wait with plain steps"):
        state = tx.init(params)
    assert np.isfinite(reference(state).c).all()
    with pytest.raises(Exception, match=r"skeleton weight 1.kernel\[0, 0\] is 0"):
        jax.block_until_ready(jax.jit(tx.init)(params))


@pytest.mark.parametrize("method", ["nesterov", "adam"])
@pytest.mark.usefixtures("x64")
def test_units_that_wait_join_as_numpy_s_do(method: str) -> None:
    """LoRA's, whose outer weights start at 0."""
    net = gsgd.Network()
    net.output(net.dense("b", net.dense("a", net.input(5), 3), 4))
    random = np.random.default_rng(0)
    params: Any = {"a": random.standard_normal((3, 5)), "b": np.zeros((4, 3))}
    x, y = random.standard_normal((5, 16)), random.standard_normal((4, 16))
    ours, core = METHODS[method]
    tx, opt, weights = optax.chain(ours(net)), core(params, net), {n: jnp.array(w) for n, w in params.items()}
    state, update = tx.init(weights), jax.jit(tx.update)
    assert gopt.join(state, weights) is not None
    for step in range(1, 6):
        a, b = params["a"], params["b"]
        error = b @ a @ x - y
        grads = {"a": b.T @ error @ x.T / 16, "b": error @ (a @ x).T / 16}
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        opt.step(grads)
        if step in (1, 2, 4):
            state = gopt.join(state, weights)
        assert_close(weights, dict(params), rtol=1e-10, atol=1e-12)
    assert opt.skeleton.num_units == 3
    assert update._cache_size() == 2
    with pytest.raises(ValueError, match="params: expected 2 arrays, as in init, got 1"):
        gopt.join(state, {"a": weights["a"]})


def test_the_example_runs() -> None:
    pytest.importorskip("gsgd.jax")
    assert doctest.testmod(gopt).failed == 0


def test_gsgd_alone_does_not_import_jax() -> None:
    code = "import sys, gsgd; sys.exit('jax' in sys.modules or 'optax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_extra_arguments_are_for_others() -> None:
    params = start(jax.random.key(0))
    tx = optax.chain(gopt.gsgd(0.1, chain()), optax.contrib.reduce_on_plateau())
    tx.update(params, tx.init(params), params, value=1.0)


@pytest.mark.parametrize("make", [gopt.gsgd, gopt.grmsprop])
def test_no_momentum_is_none(make: Any) -> None:
    """As Optax's own defaults have it."""
    params = {n: jnp.array(w) for n, w in everything().copy().items()}
    grads = jax.tree.map(jnp.ones_like, params)
    results = []
    for momentum in (None, 0.0):
        tx = make(0.1, everything().net, momentum=momentum)
        results.append(tx.update(grads, tx.init(params), params)[0])
    assert_close(*results, rtol=0, atol=0)
