"""Rescaling, balance and equivalence of pytrees: as `gsgd.rescale` and others, but they return new parameters."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import gsgd
from gsgd.jax.trace import names
from gsgd.network import Network


def rescale(params: Any, net: Network, scales: Any) -> Any:
    """`params` after a positive scaling operator; see `gsgd.rescale`. Computed on the host.

    Parameters
    ----------
    params : pytree of arrays
    net : Network
        Of the `names` of `params`.
    scales : array, shape (net.num_units,)
        Positive and finite, in the order of ``net.units``.

    Returns
    -------
    pytree like `params`
        Of the same dtypes and shardings.

    Raises
    ------
    ValueError, TypeError
        As in `gsgd.rescale`.
    """
    arrays = _on_host(params)
    gsgd.rescale(arrays, net, scales)
    return _like(params, arrays)


def balance(params: Any, net: Network, norm: Literal[2, "max"] = 2) -> Any:
    """`params` rescaled so that the weights into and out of every unit have equal norms; see `gsgd.balance`.

    Parameters
    ----------
    params : pytree of arrays
        On any device; computed on the host.
    net : Network
        Of the `names` of `params`.
    norm : {2, "max"}
        2: the rescaling of least sum of squares. "max": the largest magnitudes in and out are equal.

    Returns
    -------
    pytree like `params`
        Of the same dtypes and shardings.

    Raises
    ------
    ValueError, TypeError
        As in `gsgd.balance`.
    """
    arrays = _on_host(params)
    gsgd.balance(arrays, net, norm)
    return _like(params, arrays)


def equivalence(a: Any, b: Any, net: Network, rtol: float = 1e-5) -> NDArray[np.float64]:
    """The scale per unit that takes `a` to `b`; see `gsgd.equivalence`.

    Parameters
    ----------
    a, b : pytrees of arrays
        On any device; compared on the host.
    net : Network
        Of the `names` of both.
    rtol : float
        How far weights may part, relative to the largest among the in-edges of the same unit and layer.

    Returns
    -------
    NumPy array, shape (H,)
        Positive numbers, in the order of ``net.units``.

    Raises
    ------
    gsgd.NotEquivalent
        They are not rescalings of each other; the error names the first unit where they part.
    ValueError, TypeError
        As in `gsgd.equivalence`.
    """
    return gsgd.equivalence(_on_host(a), _on_host(b), net, rtol)


def _on_host(params: Any) -> dict[str, NDArray[Any]]:
    """Copies of the real leaves by name, in float32 or float64."""
    arrays = {}
    for name, x in zip(names(params), jax.tree.leaves(params), strict=True):
        if jnp.issubdtype(jnp.result_type(x), jnp.floating):
            arrays[name] = np.array(x, dtype=np.float64 if jnp.result_type(x) == jnp.float64 else np.float32)
    return arrays


def _like(params: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """The pytree with the arrays of `arrays` in their places, of the same dtypes and shardings."""

    def new(name: str, old: Any) -> Any:
        if name not in arrays:
            return old
        found = arrays[name].astype(jnp.result_type(old))
        return jax.device_put(found, old.sharding) if isinstance(old, jax.Array) else found

    leaves = [new(name, x) for name, x in zip(names(params), jax.tree.leaves(params), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
