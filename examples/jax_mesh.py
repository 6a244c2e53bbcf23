"""Train a perceptron on the digits whose weights are cut between the devices of a mesh.

    python examples/jax_mesh.py

Where there is but one device, eight are made of the host's processor.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # of the host, where nothing else is

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import gsgd.jax
import gsgd.optax

WIDTH, STEPS = 256, 60


def apply(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def start() -> Any:
    sizes = (64, WIDTH, WIDTH, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
        for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def by_largest_axis(mesh: Mesh, w: jax.Array) -> P:
    """As FSDP does: every device holds a part of each weight, and of the batch. What can't be cut evenly is copied."""
    axis = max(range(w.ndim), key=lambda i: w.shape[i])
    return P(*[None] * axis, mesh.axis_names) if w.shape[axis] % mesh.size == 0 else P()


def by_rows_and_columns(mesh: Mesh, w: jax.Array) -> P:
    """Rows over the mesh's first axis, columns over its second; biases as columns."""
    names = mesh.axis_names[-w.ndim :]
    return P(*(name if n % mesh.shape[name] == 0 else None for name, n in zip(names, w.shape, strict=True)))


def train(mesh: Mesh, cut: Any) -> None:
    digits = load_digits()
    batch = NamedSharding(mesh, P(mesh.axis_names))
    data = (jnp.asarray(digits.data[:1792], jnp.float32) / 16, jnp.asarray(digits.target[:1792]))
    x, y = jax.device_put(data, batch)

    params = start()
    network = gsgd.jax.trace(apply, params, x)
    params = jax.tree.map(lambda w: jax.device_put(w, NamedSharding(mesh, cut(mesh, w))), params)
    tx = gsgd.optax.gsgd(0.1, network, momentum=0.9)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    w = params[1]["w"]
    part = w.addressable_shards[0].data.shape
    print(f"{cut.__name__}: a device holds {part} of {w.shape}, loss {losses[0]:.3f} -> {losses[-1]:.3f}")


def main() -> None:
    n = len(jax.devices())
    rows = 2 if n % 2 == 0 else 1
    mesh = jax.make_mesh((rows, n // rows), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for cut in (by_largest_axis, by_rows_and_columns):
        train(mesh, cut)


if __name__ == "__main__":
    main()
