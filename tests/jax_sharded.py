"""Steps on eight devices against those of one: what test_jax_sharded.py reads, written to a file as JSON."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gsgd.jax
import gsgd.optax

jax.config.update("jax_enable_x64", True)
WIDTH, STEPS = 128, 5
SHAPES = {"first": (16, WIDTH), "bias": (WIDTH,), "second": (WIDTH, WIDTH), "last": (WIDTH, 8)}
COLLECTIVE = re.compile(
    r"= \(?\w+\[([\d,]*)\][^=]*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def apply(p: Any, x: Any) -> Any:
    h = jax.nn.relu(x @ p["first"] + p["bias"])
    return jax.nn.relu(h @ p["second"]) @ p["last"]


PLACES = {
    "rows": lambda shape: P("x"),
    "columns": lambda shape: P(*[None] * (len(shape) - 1), "x"),
    "both": lambda shape: P("x", "y") if len(shape) == 2 else P("y"),
    "largest axis": lambda shape: P(*[None] * int(np.argmax(shape)), "x"),
}
MAKE = {
    "sgd": lambda net: gsgd.optax.gsgd(0.05, net, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda net: gsgd.optax.gadam(0.01, net, clip_norm=0.1),
}
SCENARIOS = [
    ("Auto", "rows", "sgd", "optimized"),
    ("Auto", "columns", "sgd", ""),
    ("Auto", "both", "adam", ""),
    ("Auto", "largest axis", "sgd", "in loops"),
    ("Explicit", "largest axis", "sgd", "optimized"),
    ("Explicit", "both", "adam", "in loops"),
]


def start() -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(0), len(SHAPES) + 1)
    params = {
        n: jax.random.normal(k, s) * (2 / s[0]) ** 0.5 for (n, s), k in zip(SHAPES.items(), keys[1:], strict=True)
    }
    x = jax.random.normal(keys[0], (32, 16))
    return params, x, gsgd.jax.trace(apply, params, x)


def alone(tx: Any, params: Any, x: Any) -> tuple[list[Any], list[Any]]:
    """Weights and states of one device after every step, and the gradients on its way."""
    update, gradient = jax.jit(tx.update), jax.jit(jax.grad(lambda p: jnp.mean((apply(p, x) - 1) ** 2)))
    ends, grads, state = [], [], tx.init(params)
    for _ in range(STEPS):
        grads.append(gradient(params))
        updates, state = update(grads[-1], state, params)
        params = optax.apply_updates(params, updates)
        ends.append((params, state))
    return ends, grads


def difference(found: Any, expected: Any) -> float:
    """The largest, relative to the largest entry of an array."""
    pairs = [map(np.asarray, x) for x in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)]
    return max(float(np.abs(x - y).max() / (np.abs(y).max() or 1)) for x, y in pairs)


def lie_as(like: Any, trees: list[Any]) -> bool:
    pairs = [(x, like[n]) for tree in trees if tree is not None for n, x in tree.items()]
    return all(x.sharding.is_equivalent_to(y.sharding, y.ndim) for x, y in pairs)


def run(kind: str, place: str, method: str, how: str, expected: tuple[list[Any], list[Any]]) -> dict[str, Any]:
    params, _, net = start()
    ends, grads = expected
    tx = MAKE[method](net)
    names = ("x", "y") if place == "both" else ("x",)
    axis_types = (getattr(AxisType, kind),) * len(names)
    mesh = jax.make_mesh((4, 2) if place == "both" else (8,), names, axis_types=axis_types)

    def put(tree: Any, *ahead: None) -> Any:
        return {
            n: jax.device_put(w, NamedSharding(mesh, P(*ahead, *PLACES[place](SHAPES[n])))) for n, w in tree.items()
        }

    first = w = put(params)
    beginning = state = tx.init(first)
    jax.config.update("jax_disable_most_optimizations", how != "optimized")  # compiling is what takes time here
    # a compiled function takes no arrays that lie elsewhere than those that it was compiled for
    update = jax.jit(tx.update).lower(first, state, first).compile()
    sizes = [math.prod(int(n) for n in m[1].split(",") if n) for m in COLLECTIVE.finditer(update.as_text())]
    for g in grads:
        updates, state = update(put(g), state, w)
        w = optax.apply_updates(w, updates)
    found = {
        "units": net.num_units,
        "collectives": len(sizes),
        "largest collective": max(sizes, default=0),
        "temporaries": update.memory_analysis().temp_size_in_bytes if how == "optimized" else None,
        "differences": [difference((w, state), ends[-1])],
        "lies as given": lie_as(first, [w, updates, beginning.m, beginning.v, state.m, state.v]),
    }
    if how == "in loops":
        w, state = first, beginning
        for g in grads[:2]:
            updates, state = tx.update(put(g), state, w)
            w = optax.apply_updates(w, updates)
        found["differences"].append(difference((w, state), ends[1]))
        found["lies as given"] &= lie_as(first, [w, updates, state.m, state.v])

        def body(carry: Any, g: Any) -> Any:
            w, state = carry
            updates, state = tx.update(g, state, w)
            return (optax.apply_updates(w, updates), state), None

        each = put({n: jnp.stack([g[n] for g in grads]) for n in SHAPES}, None)
        scan = jax.jit(lambda w, state, each: jax.lax.scan(body, (w, state), each)[0], donate_argnums=(0, 1))
        w, state = scan(first, beginning, each)
        found["differences"].append(difference((w, state), ends[-1]))
        found["lies as given"] &= lie_as(w, [state.m, state.v]) and first["last"].is_deleted()
    return found


def main() -> None:
    params, x, net = start()
    jax.config.update("jax_disable_most_optimizations", True)
    expected = {method: alone(make(net), params, x) for method, make in MAKE.items()}
    found = {" ".join(scenario): run(*scenario, expected[scenario[2]]) for scenario in SCENARIOS}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
