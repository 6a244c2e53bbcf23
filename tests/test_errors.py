"""Bad input: an error that names the parameter, and weights that are bit for bit what they were."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from networks import Array, Params, mlp

import gsgd

MODEL = mlp(3, 4, 5, 2)  # dense0 (4, 3), bias1, dense2 (5, 4), bias3, dense4 (2, 5), bias5
NET = MODEL.net


@contextmanager
def refused(params: Mapping[str, Any], error: type | tuple[type, ...], match: str) -> Iterator[None]:
    """What happens inside raises `error` and writes nothing."""
    before = {name: np.array(value) for name, value in params.items()}
    with pytest.raises(error, match=match):
        yield
    for name, value in before.items():
        assert np.array_equal(params[name], value, equal_nan=value.dtype.kind == "f"), name


def edited(name: str, edit: Callable[[Array], Any]) -> Params:
    params = MODEL.copy()
    params[name] = edit(params[name])
    return params


def read_only(a: Array) -> Array:
    a.flags.writeable = False
    return a


def poisoned(value: float) -> Callable[[Array], Array]:
    def edit(a: Array) -> Array:
        a[-1, -1] = value
        return a

    return edit


BAD_PARAMETERS = {
    "transposed": ("dense2", lambda a: np.ascontiguousarray(a.T), ValueError, r"dense2.*\(5, 4\)"),
    "a row too many": ("dense2", lambda a: np.zeros((6, 4)), ValueError, r"dense2.*\(5, 4\)"),
    "flat": ("dense2", np.ravel, ValueError, r"dense2.*\(5, 4\)"),
    "float16": ("dense2", lambda a: a.astype(np.float16), TypeError, "dense2.*float32"),
    "integers": ("dense2", lambda a: a.astype(int), TypeError, "dense2.*float32"),
    "complex": ("dense2", lambda a: a.astype(complex), TypeError, "dense2.*float32"),
    "other byte order": ("dense2", lambda a: a.astype(a.dtype.newbyteorder()), TypeError, "dense2"),
    "a list": ("dense2", lambda a: a.tolist(), TypeError, "dense2.*list"),
    "None": ("dense2", lambda a: None, TypeError, "dense2"),
    "read-only": ("dense2", read_only, ValueError, "dense2.*read-only"),
    "nan": ("dense2", poisoned(np.nan), (ValueError, FloatingPointError), "dense2"),
    "inf": ("dense2", poisoned(np.inf), (ValueError, FloatingPointError), "dense2"),
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
@pytest.mark.parametrize("scale", ["balanced", "ones"])
def test_bad_parameters(backend: str, case: str, scale: Any) -> None:
    name, edit, error, match = BAD_PARAMETERS[case]
    params = edited(name, edit)
    with pytest.raises(error, match=match):
        gsgd.GSGD(params, NET, lr=0.1, scale=scale, backend=backend)
    for key, value in MODEL.params.items():
        assert key == name or (params[key] == value).all()


def test_a_missing_parameter(backend: str) -> None:
    params = MODEL.copy()
    del params["dense2"]
    with refused(params, ValueError, "dense2"):
        gsgd.GSGD(params, NET, lr=0.1, scale="ones", backend=backend)


def test_one_memory_under_two_names(backend: str) -> None:
    for other in (lambda a: a, lambda a: a[::-1], lambda a: a[1:]):
        params = MODEL.copy()
        params["other"] = other(params["dense2"])
        with refused(params, ValueError, "(dense2.*other|other.*dense2)"):
            gsgd.GSGD(params, NET, lr=0.1, scale="ones", backend=backend)


def test_an_array_that_overlaps_itself(backend: str) -> None:
    params = MODEL.copy()
    params["dense2"] = np.lib.stride_tricks.as_strided(np.ones(20), (5, 4), (8, 8))
    with refused(params, ValueError, "dense2"):
        gsgd.GSGD(params, NET, lr=0.1, scale="ones", backend=backend)


def test_arrays_that_interleave_do_not_overlap(backend: str) -> None:
    params, desired = MODEL.copy(), MODEL.copy()
    memory = np.empty((5, 8))
    memory[:, ::2] = params["dense2"]
    params["dense2"], params["other"] = memory[:, ::2], memory[:, 1::2]
    params["other"][...] = 1.0
    grads = MODEL.gradients(MODEL.params)
    gsgd.GSGD(params, NET, lr=0.1, backend=backend).step({**grads, "other": np.ones((5, 4))})
    gsgd.GSGD(desired, NET, lr=0.1, backend=backend).step(grads)
    assert all((params[name] == value).all() for name, value in desired.items())
    assert (params["other"] == 0.9).all()


BAD_GRADIENTS = {
    "transposed": ("dense2", lambda a: a.T, ValueError, r"dense2.*\(5, 4\)"),
    "one number": ("dense2", lambda a: np.float64(1), ValueError, r"dense2.*\(5, 4\)"),
    "float32": ("dense2", lambda a: a.astype(np.float32), TypeError, "dense2.*float32"),
    "float16": ("dense2", lambda a: a.astype(np.float16), TypeError, "dense2.*float16"),
    "integers": ("dense2", lambda a: a.astype(int), TypeError, "dense2.*int64"),
    "nan": ("dense2", poisoned(np.nan), FloatingPointError, "dense2"),
    "inf": ("dense2", poisoned(np.inf), FloatingPointError, "dense2"),
    "nan in the first layer": ("dense0", poisoned(np.nan), FloatingPointError, "dense0"),
    "nan in the last layer": ("dense4", poisoned(np.nan), FloatingPointError, "dense4"),
    "nan where nothing else is": ("other", poisoned(np.nan), FloatingPointError, "other"),
}


@pytest.mark.parametrize("case", BAD_GRADIENTS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bad_gradients(backend: str, case: str, momentum: float) -> None:
    """The state stays as well: the next good step is as if the bad one had not been."""
    name, edit, error, match = BAD_GRADIENTS[case]
    params, desired = ({**MODEL.copy(), "other": np.ones((2, 2))} for _ in range(2))
    grads = {**MODEL.gradients(MODEL.params), "other": np.ones((2, 2))}
    opt = gsgd.GSGD(params, NET, lr=0.1, momentum=momentum, backend=backend)
    bad = {**grads, name: edit(grads[name].copy())}
    with refused(params, error, match):
        opt.step(bad)
    opt.step(grads)
    gsgd.GSGD(desired, NET, lr=0.1, momentum=momentum, backend=backend).step(grads)
    assert all((params[key] == value).all() for key, value in desired.items())
    assert opt.stats.steps == 1


@pytest.mark.parametrize("lay_out", [np.copy, lambda g: g.copy("F"), lambda g: np.repeat(g, 2, axis=-1)[..., ::2]])
def test_a_gradient_that_is_not_finite_anywhere(backend: str, lay_out: Callable[[Array], Array]) -> None:
    params = MODEL.copy()
    opt = gsgd.GSGD(params, NET, lr=0.1, backend=backend)
    good = MODEL.gradients(params)
    for name, g in good.items():
        for at in np.ndindex(g.shape):
            for value in (np.nan, np.inf, -np.inf):
                bad = {**good, name: lay_out(g)}
                bad[name][at] = value
                with refused(params, FloatingPointError, name):
                    opt.step(bad)


@pytest.mark.parametrize("edit", ["missing", "unknown"])
def test_gradients_have_the_parameters_names(backend: str, edit: str) -> None:
    params = MODEL.copy()
    grads = MODEL.gradients(params)
    if edit == "missing":
        del grads["bias3"]
    else:
        grads["bias33"] = np.zeros(5)
    opt = gsgd.GSGD(params, NET, lr=0.1, backend=backend)
    with refused(params, ValueError, "bias3"):
        opt.step(grads)


def test_a_skeleton_weight_that_became_zero(backend: str) -> None:
    params = MODEL.copy()
    opt = gsgd.GSGD(params, NET, lr=0.1, backend=backend)
    grads = MODEL.gradients(params)
    for name in ("dense0", "dense2"):
        kept = params[name][1, 1]
        params[name][1, 1] = 0.0
        with refused(params, (ValueError, FloatingPointError), name):
            opt.step(grads)
        params[name][1, 1] = kept
    opt.step(grads)


def test_a_weight_that_became_non_finite(backend: str) -> None:
    params = MODEL.copy()
    opt = gsgd.GSGD(params, NET, lr=0.1, backend=backend)
    params["dense2"][3, 0] = np.nan
    with refused(params, (ValueError, FloatingPointError), "dense2"):
        opt.step(MODEL.gradients(MODEL.params))


@pytest.mark.parametrize("half", ["read", "written"])
def test_a_unit_that_nobody_reads_or_writes(backend: str, half: str) -> None:
    net = gsgd.Network()
    if half == "read":
        net.dense("w", net.input(2), 3)
    else:
        net.output(net.dense("w", net.features(net.nodes.new(2, "h")), 3))
    params = {"w": np.ones(net.shapes["w"])}
    with refused(params, ValueError, rf"unit (w|h)\[0\] is never {half}"):
        gsgd.GSGD(params, net, lr=0.1, scale="ones", backend=backend)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": -0.1}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"nesterov": True}, "nesterov"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"scale": "unit"}, "scale.*'unit'"),
        ({"rule": "smallest"}, "rule.*'smallest'"),
        ({"threads": 0}, "threads"),
        ({"backend": "fortran"}, "backend.*'fortran'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    params = MODEL.copy()
    with refused(params, ValueError, match):
        gsgd.GSGD(params, NET, **{"lr": 0.1, "scale": "ones", **settings})


def test_a_bad_learning_rate_between_steps(backend: str) -> None:
    params = MODEL.copy()
    opt = gsgd.GSGD(params, NET, lr=0.1, backend=backend)
    for lr in (-1.0, float("nan")):
        with refused(params, ValueError, "lr"):
            opt.lr = lr
            opt.step(MODEL.gradients(params))


@pytest.mark.parametrize("damage", ["other network", "no state"])
def test_a_state_that_does_not_fit(backend: str, damage: str) -> None:
    params, desired = MODEL.copy(), MODEL.copy()
    opt, untouched = (gsgd.GSGD(p, NET, lr=0.1, momentum=0.9, backend=backend) for p in (params, desired))
    state: Any = {}
    if damage != "no state":
        other = mlp(3, 4, 6, 2)
        state = gsgd.GSGD(other.params, other.net, lr=0.1, momentum=0.9, backend=backend).state_dict()
    with refused(params, ValueError, "state_dict"):
        opt.load_state_dict(state)
    for o in (opt, untouched):
        o.step(MODEL.gradients(MODEL.params))
    assert all((params[name] == value).all() for name, value in desired.items())


@pytest.mark.parametrize("what", ["path_values", "path_gradients", "allocate"])
def test_the_skeletons_methods_name_what_is_wrong(backend: str, what: str) -> None:
    params, grads = MODEL.copy(), MODEL.gradients(MODEL.params)
    sk = gsgd.Skeleton(NET, params, backend=backend)
    bad = {**params, "dense2": np.ones((4, 5))}
    with refused(params, ValueError, r"dense2.*\(5, 4\)"):
        if what == "path_values":
            sk.path_values(bad)
        elif what == "path_gradients":
            sk.path_gradients(params, {**grads, "dense2": grads["dense2"].T})
        else:
            sk.allocate(params, bad)


@pytest.mark.parametrize("function", [gsgd.balance, lambda p, n: gsgd.rescale(p, n, np.ones(9)), gsgd.path_norm])
def test_functions_name_what_is_wrong(function: Callable[[Params, gsgd.Network], Any]) -> None:
    params = edited("dense2", lambda a: np.ones((4, 5)))
    with refused(params, ValueError, r"dense2.*\(5, 4\)"):
        function(params, NET)
    for name in ("dense0", "dense2"):
        params = edited(name, read_only)
        if function is not gsgd.path_norm:
            with refused(params, ValueError, f"{name}.*read-only"):
                function(params, NET)


@pytest.mark.parametrize("make", [lambda w: w.T, lambda w: w[::-1], lambda w: w.reshape(-1)[::-1].reshape(w.shape)])
def test_a_gradient_that_lies_over_its_parameter(make: Callable[[Array], Array]) -> None:
    params = {"w1": np.ones((5, 4)), "w2": np.random.default_rng(0).normal(size=(5, 5)), "w3": np.ones((2, 5))}
    opt = gsgd.GSGD(params, gsgd.Network.sequential(params), lr=0.1)
    grads = {name: np.ones_like(p) for name, p in params.items()}
    with refused(params, ValueError, "w2"):
        opt.step({**grads, "w2": make(params["w2"])})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_ratio": "x"}, "max_ratio"),
        ({"max_ratio": 0.1}, "max_ratio"),
        ({"scale": "zz"}, "scale"),
        ({"rule": 5}, "rule"),
        ({"in_weights": np.zeros(NET.num_units)}, "reference scale"),
        ({"c": np.full(NET.num_units, np.nan)}, "reference scale"),
        ({"in_edges": np.zeros((NET.num_units, 2), dtype=np.int64)}, "tree"),
    ],
)
def test_a_bad_state_changes_nothing(backend: str, change: dict[str, Any], named: str) -> None:
    runs = [MODEL.copy() for _ in range(2)]
    optimizers = [gsgd.GSGD(params, NET, lr=0.1, momentum=0.9, backend=backend) for params in runs]
    state = gsgd.GSGD(MODEL.copy(), NET, lr=0.3, momentum=0.5, rule="largest", backend=backend).state_dict()
    with pytest.raises((ValueError, TypeError), match=named):
        optimizers[0].load_state_dict({**state, **change})
    for params, opt in zip(runs, optimizers, strict=True):
        opt.step(MODEL.gradients(params))
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in MODEL.params)


def test_edges_that_go_in_a_circle(backend: str) -> None:
    net = gsgd.Network()
    h = net.dense("a", net.input(2), 3)
    h = net.add(h, net.dense("b", h, 3))  # units that feed each other
    net.output(net.dense("c", h, 2))
    params = {name: np.ones(shape) for name, shape in net.shapes.items()}
    opt = gsgd.GSGD(params, net, backend=backend)
    state = opt.state_dict()
    state["in_edges"] = np.array([[1, 1], [1, 3], [1, 8]])  # 1 -> 0, 0 -> 1, 2 -> 2
    with refused(params, ValueError, "tree"):
        opt.load_state_dict(state)


def test_rescaling_out_of_range() -> None:
    params = {name: p.astype(np.float32) for name, p in MODEL.params.items()}
    with refused(params, ValueError, "overflow"):
        gsgd.rescale(params, NET, np.full(NET.num_units, 1e45))


def test_units_that_wait_are_told_of() -> None:
    params = {"w1": np.ones((4, 3)), "w2": np.zeros((2, 4))}
    with pytest.warns(UserWarning, match=r"4 units wait with plain steps.*w1\[0\]"):
        gsgd.GSGD(params, gsgd.Network.sequential(params))


@pytest.mark.parametrize("call", [lambda p: gsgd.GSGD(list(p.values()), NET), lambda p: gsgd.GSGD(p, None)])
def test_what_is_no_mapping_and_no_network(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="expected a"):
        call(MODEL.copy())


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
