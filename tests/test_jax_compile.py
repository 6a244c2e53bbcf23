"""What XLA makes of an update, against those of Optax's own: compiling takes a time per kernel, and per instruction."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="Optax is not installed")
gjax = pytest.importorskip("gsgd.jax")
gopt = pytest.importorskip("gsgd.optax")


WIDTH = 128


class Program(NamedTuple):
    """Numbers of instructions, and of kernels that differ."""

    instructions: int
    kernels: int


def compiled(make: Callable[[Any], Any], depth: int) -> Program:
    """The update of a perceptron of so many layers with biases."""
    matrix, vector = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((WIDTH, WIDTH), (WIDTH,)))
    params = [{"kernel": matrix, "bias": vector}] * depth

    def apply(params: Any, x: Any) -> Any:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    params = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), params)
    tx = make(gjax.trace(apply, params, jax.ShapeDtypeStruct((1, WIDTH), "float32")))
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    text = re.sub(r", (metadata|backend_config|frontend_attributes)=\{.*", "", text)
    bodies = dict(re.findall(r"^(%\S+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    entry = text[text.index("\nENTRY") :]
    called = re.findall(r"kind=kLoop, calls=(%[\w.-]+)", entry)
    return Program(text.count(" = "), len({re.sub(r"(%[a-z_-]+)[\w.-]*", r"\1", bodies[name]) for name in called}))


@pytest.mark.parametrize(
    ("make", "most", "kernels"),
    [
        (lambda net: gopt.gsgd(0.1, net, momentum=0.9), 2.0, 22),
        (lambda net: gopt.gadam(0.1, net), 3.0, 28),
    ],
    ids=["gsgd", "gadam"],
)
def test_instructions_are_few_times_adam_s_and_kernels_do_not_grow_in_number(
    make: Callable[[Any], Any], most: float, kernels: int
) -> None:
    found = {depth: compiled(make, depth) for depth in (6, 12)}
    for depth, program in found.items():
        assert program.instructions <= most * compiled(lambda net: optax.adam(0.1), depth).instructions
        assert program.kernels <= kernels
    assert found[12].instructions <= 2 * found[6].instructions
