"""The skeleton and the reference scale of a pytree of parameters, as the state of a transformation holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from gsgd import waiting
from gsgd.coordinates import Coordinates
from gsgd.jax.trace import names
from gsgd.layout import Edges, Layout, network_layout
from gsgd.network import Network
from gsgd.skeleton import Rule, Skeleton
from gsgd.warn import warn

Array: TypeAlias = jax.Array
Tree: TypeAlias = Any


@dataclass(frozen=True)
class Trees:
    """The skeleton of a network, equal to others of the same method and digest: what of a state has no values."""

    method: str
    digest: str
    network: Network = field(compare=False, repr=False)
    rule: Rule = field(compare=False, repr=False)
    shapes: dict[str, tuple[int, ...]] = field(compare=False, repr=False)
    edges: tuple[Edges, Edges] = field(compare=False, repr=False)
    layout: Layout = field(compare=False, repr=False)

    @classmethod
    def of(
        cls, method: str, network: Network, rule: Rule, shapes: dict[str, tuple[int, ...]], edges: tuple[Edges, Edges]
    ) -> Trees:
        """Those of a network and its tree edges, in arrays of these shapes."""
        digest = hashlib.sha256(repr(shapes).encode())
        for b in network.blocks:
            digest.update(repr((b.name, b.dims, b.start)).encode() + b.rows.tobytes() + b.cols.tobytes())
        for own in edges:
            digest.update(own.tobytes())
        found = network_layout(network, shapes, *edges)
        return cls(method, digest.hexdigest()[:32], network, rule, shapes, edges, found)

    def __str__(self) -> str:
        return f"{self.method} on skeleton {self.digest}"


class Reference(NamedTuple):
    """The reference scale (METHOD.md, section 4): arrays of shape (H + 1,), with 1 at the end."""

    in_weights: Array
    out_weights: Array
    c: Array


def skeleton_of(params: Tree, network: Network, rule: Rule, balanced: bool) -> tuple[dict[str, Any], bool, Skeleton]:
    """The leaves of `params` by name, whether they have no values yet, and their skeleton."""
    leaves = dict(zip(names(params), jax.tree.leaves(params), strict=True))
    for name, x in leaves.items():
        kind = getattr(x, "dtype", type(x))
        if not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(f"parameter {name!r}: expected floating point numbers, got {kind}")
    network = _restrict(network, params, leaves)
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves.values())
    if traced and rule == "largest":
        raise ValueError("rule 'largest' chooses by values: call init outside of jit and vmap")
    host = {n: np.ones(np.shape(x), np.float32) if traced else on_host(x) for n, x in leaves.items()}
    return leaves, traced, Skeleton(network, host, rule, balanced=balanced and not traced)


def anchor(params: Tree, network: Network, method: str, scale: str, rule: Rule) -> dict[Trees, Reference]:
    """The trees and the reference scale of `params`."""
    leaves, traced, skeleton = skeleton_of(params, network, rule, scale == "balanced")
    skeleton.warn_of_pinned(waiting=True)
    network, shapes = skeleton.net, {name: np.shape(x) for name, x in leaves.items()}
    if not network.num_units:
        warn("no unit was found that can be rescaled: every step is a plain one")
    trees = Trees.of(method, network, rule, shapes, skeleton.edge_arrays)
    real = jnp.result_type(float)

    def reference_scale(*arrays: Any) -> list[NDArray[Any]]:
        values = dict(zip(network.shapes, map(on_host, arrays), strict=True))
        for edge in (*skeleton.in_edges, *skeleton.out_edges):
            if edge is not None and not np.abs(values[edge[0]][edge[1]]) > 0:
                what = f"{edge[0]}{list(edge[1])}"
                raise ValueError(f"the skeleton weight {what} is 0: call init outside of jit and vmap")
        c = skeleton.balanced_scale(values) if traced and scale == "balanced" else skeleton.c
        return [np.append(x, 1.0).astype(real) for x in (*skeleton.tree_weights(values), c)]

    arrays = [leaves[name] for name in network.shapes]
    found = _call_host(reference_scale, arrays, (network.num_units + 1,), real) if traced else reference_scale(*arrays)
    return {trees: Reference(*map(jnp.asarray, found))}


def _call_host(
    function: Callable[..., list[NDArray[Any]]], arrays: Sequence[Array], shape: tuple[int, ...], dtype: Any
) -> list[Array]:
    """Three arrays that `function` makes of values of `arrays`, once there are any.

    64-bit numbers travel as pairs of 32-bit ones: a callback's thread does not know of ``with jax.enable_x64(True)``.
    """

    def split(x: Any) -> Any:
        return jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype == jnp.float64 else x

    def join(x: Any) -> NDArray[Any]:
        a = np.asarray(x)
        return a.view(np.float64)[..., 0] if a.dtype == np.uint32 else a

    def call(*arrays: Any) -> list[NDArray[Any]]:
        found = function(*map(join, arrays))
        return [x.view(np.uint32).reshape(*shape, 2) if x.dtype == np.float64 else x for x in found]

    kinds = [jax.eval_shape(lambda: split(jnp.zeros(shape, dtype)))] * 3
    found = jax.pure_callback(call, kinds, *map(split, arrays), vmap_method="sequential")
    return [jax.lax.bitcast_convert_type(x, dtype) for x in found]


def _restrict(network: Network, params: Tree, leaves: Mapping[str, Any]) -> Network:
    """The network of the parameters that are there: those masked out pin what they meet, others must not be missing."""
    shown = jax.tree.map(lambda x: "masked" if _is_masked(x) else x, params, is_leaf=_is_masked)
    masked = [name for name, x in zip(names(shown), jax.tree.leaves(shown), strict=True) if isinstance(x, str)]
    missing, others = [name for name in network.shapes if name not in leaves], ", ".join(leaves) or "none"
    for name in missing:
        if not any(name == m or name.startswith(f"{m}.") for m in masked):
            raise ValueError(f"parameter {name!r} of the network is missing in params, which has {others}")
    return network.without(missing, "trained by another transformation") if missing else network


def join(
    trees: Trees, reference: Reference, leaves: Sequence[Array]
) -> tuple[dict[Trees, Reference], list[list[tuple[int, ...]]]] | None:
    """The same with units that have waited, and by leaf where their tree edges lie; see `gsgd.waiting.join`."""
    arrays = dict(zip(trees.shapes, map(on_host, leaves), strict=True))
    scale = [np.asarray(x, np.float64)[:-1] for x in reference]
    joined = waiting.join(trees.network, arrays, Coordinates(*trees.edges, *scale), trees.rule)
    if joined is None:
        return None
    found, units = joined
    places: dict[str, list[tuple[int, ...]]] = {name: [] for name in trees.shapes}
    for name, index in found.places(trees.network, units):
        places[name].append(index)
    new = [jnp.asarray(np.append(x, 1.0), old.dtype) for x, old in zip(found.scale, reference, strict=True)]
    new = [jax.device_put(x, old.sharding) if old.committed else x for x, old in zip(new, reference, strict=True)]
    of = Trees.of(trees.method, trees.network, trees.rule, trees.shapes, found.edges)
    return {of: Reference(*new)}, list(places.values())


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def on_host(x: Any) -> NDArray[Any]:
    a = np.asarray(x)
    return a if a.dtype == np.float64 else a.astype(np.float32)
