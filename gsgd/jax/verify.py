"""Does a network describe a JAX function? See `gsgd.symmetry`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsgd.jax.trace import names
from gsgd.network import Network
from gsgd.symmetry import Arrays, Probe, check, perturbed, seeded


def verify(apply: Callable[..., Any], params: Any, net: Network, example: Any, seed: int = 0) -> None:
    """Check in float64 that `net` describes ``apply(params, *example)``.

    Every unit is rescaled by a random factor, log-uniform in [1/2, 2]: the outputs must stay the same. And for every
    unit the sums of weight times gradient over its in-edges and over its out-edges must be equal, for a random linear
    functional of the outputs (METHOD.md, section 2). Both are tried at weights a tenth away from `params`, described or
    not.

    Parameters
    ----------
    apply, params, example
        As for `trace`; `example` with values. All floating point arrays among them are taken to float64; a function
        that casts to less can't be verified.
    net : Network
    seed : int
        Of the factors, the functional, and what `apply` draws from Python and NumPy.

    Raises
    ------
    SymmetryError
        The network is wrong: the error names the layers whose units break the symmetry, and by how much.
    ValueError
        `net` names parameters that are not in `params`, or of another shape; it is an approximation ("paper",
        "released"); or the outputs are not finite.
    TypeError
        `params` or `example` has no values; or `apply` does not run in float64, as where it closes over float32 arrays
        and a primitive takes no mixture.
    """
    for argument, tree in (("params", params), ("example", example)):
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
            raise TypeError(f"{argument}: expected arrays with values, got jax.ShapeDtypeStruct")
    args = example if isinstance(example, tuple) else (example,)
    leaves: list[Any] = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    host = {name: np.asarray(x) for name, x in zip(names(params), leaves, strict=True)}
    weights = perturbed(net, {n: x for n, x in host.items() if jnp.issubdtype(x.dtype, jnp.inexact)}, seed)
    random = np.random.default_rng(seed)
    with jax.enable_x64(True):
        fixed = {name: jnp.asarray(x) for name, x in host.items()}
        inputs = jax.tree.map(_double, args)

        def outputs(weights: Arrays) -> list[jax.Array]:
            with seeded(seed):
                found = apply(structure.unflatten({**fixed, **weights}[name] for name in fixed), *inputs)
            return [y for y in jax.tree.leaves(found) if jnp.issubdtype(jnp.result_type(y), jnp.inexact)]

        try:
            made = jax.eval_shape(outputs, weights)
        except TypeError as error:
            raise TypeError(
                "apply: it does not run in float64. Arrays that it closes over stay float32, as does what it casts: "
                f"pass them in params or in the example, or cast them to the type of its input ({error})"
            ) from error
        functional = [random.standard_normal(y.shape) for y in made]

        def of_outputs(weights: Arrays) -> jax.Array:
            pairs = zip(functional, outputs(weights), strict=True)
            return sum((jnp.sum(f * y.real) for f, y in pairs), jnp.zeros(()))

        values, gradients = jax.jit(outputs), jax.jit(jax.grad(of_outputs))
        probe = Probe(
            "",
            lambda weights: [np.asarray(y) for y in values(weights)],
            lambda weights: {name: np.asarray(g) for name, g in gradients(weights).items()},
        )
        check(net, weights, [probe], seed)


def _double(x: Any) -> Any:
    return jnp.asarray(x, jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x
