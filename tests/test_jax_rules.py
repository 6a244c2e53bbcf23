"""Rules of JAX's primitives beyond layers and ReLUs: products, norms, attention, masks (METHOD.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gsgd

jax = pytest.importorskip("jax", reason="JAX is not installed")
gjax = pytest.importorskip("gsgd.jax")
jax_rules = pytest.importorskip("gsgd.jax.rules")
jnp, lax = jax.numpy, jax.lax
jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes time here

Params = dict[str, Any]
Apply = Callable[[Params, Any], Any]
Op = Callable[[Params, Any], Any]


def random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


X = random({"x": (4, 5)}, 1)["x"]
TOKENS = random({"x": (2, 3, 5)}, 1)["x"]


def between(op: Op) -> Apply:
    """`op` between a layer of 6 units and a head."""
    return lambda p, x: op(p, jax.nn.relu(x @ p["i"])) @ p["o"]


# the operation, parameters of its own, units (6 before it)
PRODUCTS: dict[str, tuple[Op, dict[str, tuple[int, ...]], int]] = {
    "einsum": (lambda p, h: jnp.einsum("bi,oi->bo", h, p["w"]), {"w": (6, 6)}, 12),
    "into heads": (lambda p, h: jnp.einsum("bd,dhe->bhe", h, p["w"]).reshape(4, 6), {"w": (6, 2, 3)}, 12),
    "from heads": (lambda p, h: jnp.einsum("bhe,hed->bd", h.reshape(4, 2, 3), p["w"]), {"w": (2, 3, 6)}, 12),
    "per head": (
        lambda p, h: jnp.einsum("bgi,gio->bgo", h.reshape(4, 2, 3), p["w"]).reshape(4, 6),
        {"w": (2, 3, 3)},
        12,
    ),
    "axes split, joined": (
        lambda p, h: jnp.einsum("bd,hde->bhe", h, p["w"].reshape(2, 6, 3)).reshape(4, 6) @ p["v"].reshape(6, 6),
        {"w": (12, 3), "v": (3, 2, 6)},
        18,
    ),
    "a bias of two axes": (
        lambda p, h: jax.nn.relu(h.reshape(4, 2, 3) + p["b"]).reshape(4, 6),
        {"b": (2, 3)},
        6,
    ),
    "looked up": (lambda p, h: h + p["w"][jnp.argsort(X[:, 0])], {"w": (5, 6)}, 6),
    "looked up at constant places": (lambda p, h: h + jnp.take(p["w"], jnp.arange(4), axis=1).T, {"w": (6, 5)}, 6),
    "an entry": (lambda p, h: h * p["w"][jnp.arange(4), 0][:, None], {"w": (5, 6)}, 6),
    "cumulated": (
        lambda p, h: h.cumsum(0) + jnp.sort(h, 0) + lax.cummax(h) + lax.top_k(h.T, 1)[0].T,
        {},
        6,
    ),
    "summed by segments": (lambda p, h: jax.ops.segment_sum(h, jnp.array([0, 2, 2, 1]), 4), {}, 6),
    "written in place": (lambda p, h: h.at[jnp.array([0, 2])].max(h[1:3] @ p["w"]), {"w": (6, 6)}, 6),
    "a gain": (lambda p, h: h * p["g"], {"g": (6,)}, 12),
    "layer scale": (lambda p, h: h + p["g"] * jax.nn.relu(h @ p["w"]), {"g": (6,), "w": (6, 6)}, 12),
    "gated": (lambda p, h: jax.nn.silu(h @ p["v"]) * (h @ p["w"]), {"v": (6, 6), "w": (6, 6)}, 12),
    "gated by a ReLU": (lambda p, h: jax.nn.relu(h @ p["v"]) * (h @ p["w"]), {"v": (6, 6), "w": (6, 6)}, 12),
    "low rank": (lambda p, h: h @ p["w"] + h @ p["a"] @ p["b"], {"w": (6, 6), "a": (6, 2), "b": (2, 6)}, 14),
    "masked by products": (lambda p, h: -h * (h > 0), {}, 6),
    "windows of one, moved by one": (
        lambda p, h: lax.reduce_window(h, 0.0, lax.add, (1, 1), (1, 1), ((0, 0), (1, -1))),
        {},
        1,
    ),
    "masked by where": (lambda p, h: jnp.where(-h > 0, h, jnp.zeros_like(h)), {}, 6),
    "masked by maximum": (lambda p, h: jnp.maximum(-h, 0.0), {}, 6),
    "masked above its mean": (lambda p, h: h * (h > h.mean(1, keepdims=True)), {}, 1),
    "masked above a half": (lambda p, h: jnp.where(h > 0.5, h, 0.0), {}, 0),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_and_masks(case: str) -> None:
    op, own, units = PRODUCTS[case]
    params = random({"i": (5, 6), "o": (6, 2), **own})
    net = gjax.trace(between(op), params, X)
    gjax.verify(between(op), params, net, X)
    assert net.num_units == units
    assert net.shapes == {name: w.shape for name, w in params.items()}


WIDTH, FFN = 8, 12
BLOCK = 3 * WIDTH + FFN  # two norms, the values, the hidden layer


def layer_norm(x: Any, gamma: Any, beta: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta


def rms_norm(x: Any, gamma: Any) -> Any:
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gamma


def transformer(p: Params, x: Any) -> Any:
    """A pre-norm block, in einsums."""
    x = x @ p["i"]
    h = layer_norm(x, p["g1"], p["b1"])
    q, k, v = (jnp.einsum("bnd,dhe->bhne", h, p[name]) for name in ("q", "k", "v"))
    scores = jnp.where(jnp.tril(jnp.ones((3, 3))) == 1, jnp.einsum("bhqe,bhke->bhqk", q, k), -1e9)
    x = x + jnp.einsum("bhqk,bhke,hed->bqd", jax.nn.softmax(scores), v, p["p"]) + p["c"]
    x = x + jax.nn.relu(rms_norm(x, p["g2"]) @ p["w1"] + p["c1"]) @ p["w2"]
    return layer_norm(x, p["g3"], p["b3"]) @ p["o"]


def grouped_queries(p: Params, x: Any) -> Any:
    """Two heads of values for four of queries."""
    h = rms_norm(x @ p["i"], p["g"])
    q, k, v = (h @ p["q"]).reshape(2, 3, 2, 2, 4), (h @ p["k"]).reshape(2, 3, 2, 4), (h @ p["v"]).reshape(2, 3, 2, 4)
    weights = jax.nn.softmax(jnp.einsum("bqgre,bkge->bgrqk", q, k))
    return jnp.einsum("bgrqk,bkge->bqgre", weights, v).reshape(2, 3, 16) @ p["p"] @ p["o"]


def by_one_function(p: Params, x: Any) -> Any:
    h = rms_norm(x @ p["i"], p["g"])
    q, k, v = ((h @ p[name]).reshape(2, 3, 2, 4) for name in "qkv")
    return jax.nn.dot_product_attention(q, k, v).reshape(2, 3, 8) @ p["o"]


def group_norm(p: Params, x: Any) -> Any:
    h = (x @ p["i"]).reshape(2, 3, 2, 4)
    h = (h - h.mean((1, 3), keepdims=True)) * lax.rsqrt(h.var((1, 3), keepdims=True) + 1e-5)
    return jax.nn.relu(h.reshape(2, 3, 8) * p["g"] + p["b"]) @ p["o"]


def blurred(p: Params, x: Any) -> Any:
    """A filter per channel that is no parameter."""
    h = jax.nn.relu(x @ p["i"])
    kernel = jnp.full((2, 1, 8), 0.5, h.dtype)
    dims = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(h, kernel, (1,), "SAME", dimension_numbers=dims, feature_group_count=8) @ p["o"]


STEM = {"i": (5, 8), "o": (8, 2)}
NORMS = {"g1": (8,), "b1": (8,), "g2": (8,), "g3": (8,), "b3": (8,)}
HEADS = {"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "p": (2, 4, 8), "c": (8,)}
SQUARE = {"q": (8, 8), "k": (8, 8), "v": (8, 8)}
MODELS: dict[str, tuple[Apply, dict[str, tuple[int, ...]], int]] = {
    "transformer": (transformer, STEM | NORMS | HEADS | {"w1": (8, 12), "c1": (12,), "w2": (12, 8)}, BLOCK + WIDTH),
    # the norm, the values of two heads, what is projected
    "grouped queries": (grouped_queries, STEM | SQUARE | {"g": (8,), "q": (8, 16), "p": (16, 8)}, 3 * WIDTH),
    "by one function": (by_one_function, STEM | SQUARE | {"g": (8,)}, 2 * WIDTH),
    "group norm": (group_norm, STEM | {"g": (8,), "b": (8,)}, WIDTH),
    "filters that stay": (blurred, STEM, WIDTH),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_and_norms(name: str) -> None:
    apply, shapes, units = MODELS[name]
    params = random(shapes)
    net = gjax.trace(apply, params, TOKENS)
    gjax.verify(apply, params, net, TOKENS)
    assert net.shapes == shapes
    assert net.num_units == units


def test_flax() -> None:
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(WIDTH)(x)
            x = x + nn.MultiHeadDotProductAttention(2)(h := nn.LayerNorm()(x), h)
            x = x + nn.Dense(WIDTH)(nn.relu(nn.Dense(FFN)(nn.RMSNorm()(x))))
            return nn.Dense(2)(nn.GroupNorm(2)(x))

    model = Block()
    described_and_verified(lambda p, x: model.apply({"params": p}, x), model.init(jax.random.key(0), TOKENS)["params"])


def test_flax_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

    class Block(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.i, self.o = nnx.Linear(5, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 2, rngs=rngs)
            self.n1, self.n2, self.n3 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3))
            self.a = nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False)
            self.w1, self.w2 = nnx.Linear(WIDTH, FFN, rngs=rngs), nnx.Linear(FFN, WIDTH, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = self.i(x)
            x = x + self.a(self.n1(x))
            return self.o(self.n3(x + self.w2(jax.nn.relu(self.w1(self.n2(x))))))

    graph, params, rest = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)
    described_and_verified(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params)


def test_equinox() -> None:
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
    keys = iter(jax.random.split(jax.random.key(0), 5))
    model = {
        "i": eqx.nn.Linear(5, WIDTH, key=next(keys)),
        "n": [eqx.nn.LayerNorm(WIDTH), eqx.nn.RMSNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)],
        "a": eqx.nn.MultiheadAttention(2, WIDTH, key=next(keys)),
        "w1": eqx.nn.Linear(WIDTH, FFN, key=next(keys)),
        "w2": eqx.nn.Linear(FFN, WIDTH, key=next(keys)),
        "o": eqx.nn.Linear(WIDTH, 2, key=next(keys)),
    }
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(p: Any, x: Any) -> Any:
        m, each = eqx.combine(p, static), jax.vmap
        x = each(m["i"])(x)
        x = x + m["a"](h := each(m["n"][0])(x), h, h)
        x = x + each(m["w2"])(jax.nn.relu(each(m["w1"])(each(m["n"][1])(x))))
        return each(m["o"])(each(m["n"][2])(x))

    described_and_verified(lambda p, x: jax.vmap(lambda x: apply(p, x))(x), params)


def described_and_verified(apply: Callable[[Any, Any], Any], params: Any) -> None:
    net = gjax.trace(apply, params, TOKENS)
    gjax.verify(apply, params, net, TOKENS)
    assert net.shapes.keys() == set(gjax.names(params))
    assert net.num_units == BLOCK + WIDTH


UNARY: list[Callable[[Any], Any]] = [
    jax.nn.relu,
    lambda x: x * (x > 0),
    lambda x: jnp.where(x < 0, jnp.zeros_like(x), x),
    lambda x: jnp.where(jnp.abs(x) < 0.5, 0.0, x),
    jax.nn.softmax,
    lambda x: x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1),
    lambda x: x.reshape(2, 4, 2, 3).swapaxes(2, 3).reshape(2, 4, 6),
    lambda x: jnp.broadcast_to(x.mean(1, keepdims=True), x.shape),
]
BINARY: list[Callable[[Any, Any], Any]] = [
    jnp.add,
    jnp.multiply,
    lambda x, y: jnp.where(y > 0, x, y),
    lambda x, y: x * (y > x),
    lambda x, y: jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, y)) @ y,
    lambda x, y: jnp.tanh(y @ y.swapaxes(1, 2)) @ x,
]
# of a value and of parameters of its own
LEARNED: list[tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = [
    (lambda x, w: x @ w, ((6, 6),)),
    (lambda x, w: jnp.einsum("bnd,hde->bnhe", x, w).reshape(2, 4, 6), ((2, 6, 3),)),
    (lambda x, w: jnp.einsum("bnhe,hed->bnd", x.reshape(2, 4, 2, 3), w), ((2, 3, 6),)),
    (lambda x, w: jnp.einsum("bnge,gef->bngf", x.reshape(2, 4, 2, 3), w).reshape(2, 4, 6), ((2, 3, 3),)),
    (lambda x, w: jnp.einsum("nm,bmd->bnd", w, x), ((4, 4),)),
    (lambda x, g: x * g, ((6,),)),
    (lambda x, g: x * g, ((4, 1),)),
    (lambda x, b: x + b, ((6,),)),
    (lambda x, b: x + b, ((4, 6),)),
    (layer_norm, ((6,), (6,))),
]
Lines = list[tuple[int, int, int]]


def program(lines: Lines) -> tuple[Apply, Params]:
    """Each line makes a value of 4 positions and 6 channels out of those before it."""
    shapes: dict[str, tuple[int, ...]] = {"stem": (3, 6), "head": (6, 2)}
    for i, (kind, _, _) in enumerate(lines):
        shapes |= {f"{i}.{k}": shape for k, shape in enumerate(LEARNED[kind % len(LEARNED)][1])}

    def apply(p: Params, x: Any) -> Any:
        values = [x @ p["stem"]]
        for i, (kind, one, two) in enumerate(lines):
            a, b = values[-1 - one % len(values)], values[-1 - two % len(values)]
            which = kind // len(LEARNED) % (len(UNARY) + len(BINARY) + 10)
            if which < len(UNARY):
                values.append(UNARY[which](a))
            elif which < len(UNARY) + len(BINARY):
                values.append(BINARY[which - len(UNARY)](a, b))
            else:
                rule, own = LEARNED[kind % len(LEARNED)]
                values.append(rule(a, *(p[f"{i}.{k}"] for k in range(len(own)))))
        return (values[-1] @ p["head"]).mean(1)

    return apply, random(shapes, 3)


@given(st.lists(st.tuples(*[st.integers(0, 10_000)] * 3), min_size=3, max_size=8), st.sampled_from(["tie", "pin"]))
@settings(max_examples=15)
def test_random_programs_are_never_misdescribed(lines: Lines, residual: Any) -> None:
    apply, params = program(lines)
    x = random({"x": (2, 4, 3)}, 4)["x"]
    gjax.verify(apply, params, gjax.trace(apply, params, x, residual), x)


# rules that say too little, and what finds them

Rule = Callable[..., Any]


def passed(rule: Rule) -> Rule:
    """As if the primitive did nothing to the last feature that it reads."""

    def mutant(describe: Any, step: Any) -> Any:
        found = [n for n in map(describe.nodes, step.reads) if not describe.on.is_constant(n)]
        return [np.broadcast_to(found[-1], step.made[0].shape)] if found else rule(describe, step)

    return mutant


def constant(rule: Rule) -> Rule:
    return lambda describe, step: [describe.on.fill(step.made[0].shape)]


def rolled(rule: Rule) -> Rule:
    """Channels are taken for their neighbours."""

    def mutant(describe: Any, step: Any) -> Any:
        return [np.roll(made, 1, -1) if isinstance(made, np.ndarray) else made for made in rule(describe, step)]

    return mutant


def of_first(rule: Rule) -> Rule:
    """What is taken together is what comes first."""
    return lambda describe, step: [describe.nodes(step.reads[0])[:, 0]]


def conv(h: Any, w: Any) -> Any:
    return lax.conv_general_dilated(h[:, None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))[:, 0]


def window(h: Any) -> Any:
    return lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME")


# a primitive of each rule, the mutant, an operation that finds it
MUTANTS: dict[str, tuple[Callable[[Rule], Rule], Op]] = {
    "abs": (rolled, lambda p, h: jnp.abs(h)),
    "add": (passed, lambda p, h: h @ p["w"] + h),
    "conv_general_dilated": (rolled, lambda p, h: conv(h, p["f"])),
    "cumsum": (rolled, lambda p, h: h.cumsum(0)),
    "div": (passed, lambda p, h: h / (h + jnp.abs(h @ p["w"]))),
    "dot_general": (rolled, lambda p, h: h @ p["w"]),
    "dynamic_slice": (rolled, lambda p, h: lax.dynamic_slice(h, (jnp.argmax(h[:, 0] * 0), 0), (2, 6))),
    "gather": (rolled, lambda p, h: h[:, jnp.array([2, 1, 0, 3, 4, 5])]),
    "gt": (constant, lambda p, h: h * (h > 0.5) + h * (h > 1.0) + h * (h > 2.0)),
    "max": (passed, lambda p, h: jnp.maximum(h @ p["w"], h)),
    "mul": (passed, lambda p, h: h * h),
    "pad": (rolled, lambda p, h: jnp.pad(h, ((1, 0), (0, 0)))),
    "reduce_max": (of_first, lambda p, h: jnp.broadcast_to(h.max(1, keepdims=True), h.shape)),
    "reduce_window_max": (passed, lambda p, h: window(h)),
    "rev": (rolled, lambda p, h: h[:, ::-1]),
    "scatter-add": (rolled, lambda p, h: jax.ops.segment_sum(h, jnp.array([0, 2, 2, 1]), 4)),
    "select_n": (passed, lambda p, h: jnp.where(h > 0, h, 1.0)),
    "sign": (passed, lambda p, h: jnp.sign(h - 0.5 * h @ p["w"])),
}


def test_every_rule_has_a_mutant() -> None:
    rules = jax_rules.RULES
    assert {rule.__name__ for rule in rules.values()} == {rules[name].__name__ for name in MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_verify_finds_rules_that_say_too_little(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, op = MUTANTS[name]
    params, rules = random({"i": (5, 6), "w": (6, 6), "f": (1, 6, 6), "o": (6, 2)}), jax_rules.RULES
    apply = between(op)
    gjax.verify(apply, params, gjax.trace(apply, params, X), X)
    for known, rule in list(rules.items()):
        if rule.__name__ == rules[name].__name__:
            monkeypatch.setitem(rules, known, mutant(rule))
    wrong = gjax.trace(apply, params, X)
    with pytest.raises(gjax.SymmetryError):
        gjax.verify(apply, params, wrong, X)


def test_optax_takes_blocks_of_any_form() -> None:
    """A step of the specification in JAX on heads, a bias of two axes and a gain is that of NumPy."""
    gopt = pytest.importorskip("gsgd.optax", reason="Optax is not installed")

    def op(p: Params, h: Any) -> Any:
        h = jnp.einsum("bd,dhe->bhe", h, p["w"]) + p["b"]
        return h.reshape(4, 6) * p["g"]

    params = random({"i": (5, 6), "o": (6, 2), "w": (6, 2, 3), "b": (2, 3), "g": (6,)})
    net = gjax.trace(between(op), params, X)
    grads = jax.grad(lambda p: (between(op)(p, X) ** 2).mean())(params)
    tx = gopt.gsgd(0.01, net)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    ours = {name: np.array(w) for name, w in params.items()}
    gsgd.GSGD(ours, net, lr=0.01).step({name: np.asarray(g) for name, g in grads.items()})
    for name, w in ours.items():
        np.testing.assert_allclose(params[name] + updates[name], w, rtol=1e-5, atol=1e-6)
