"""Gradient descent on the values of basis paths as Optax transformations: `gsgd`, `gadam`, `grmsprop`.

A loop that was written for Optax changes one line, the one that makes the optimizer:

>>> import jax, jax.numpy as jnp, optax
>>> import gsgd.jax, gsgd.optax
>>> def apply(params, x):
...     return jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["out"]["kernel"]
>>> def loss(params, x, y):
...     return jnp.mean((apply(params, x) - y) ** 2)
>>> keys = jax.random.split(jax.random.key(0), 4)
>>> params = {
...     "hidden": {"kernel": jax.random.normal(keys[0], (4, 8)) / 2, "bias": jnp.zeros(8)},
...     "out": {"kernel": jax.random.normal(keys[1], (8, 1)) / 3},
... }
>>> x, y = jax.random.normal(keys[2], (32, 4)), jax.random.normal(keys[3], (32, 1))
>>> tx = gsgd.optax.gsgd(0.1, gsgd.jax.trace(apply, params, x), momentum=0.9)  # was: optax.sgd(0.1, momentum=0.9)
>>> state = tx.init(params)
>>> @jax.jit
... def step(params, state):
...     updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
...     return optax.apply_updates(params, updates), state
>>> before = loss(params, x, y)
>>> for _ in range(20):
...     params, state = step(params, state)
>>> bool(loss(params, x, y) < before)
True

Parameters are any pytree. The network names its leaves by their key paths, joined by dots: "hidden.kernel" above,
"layers.0.weight" in an Equinox module, "linear.kernel.value" in the state of a Flax NNX one; see `gsgd.jax.names`.
Leaves that the network does not mention take the plain steps of SGD, Adam or RMSProp; parameters that `optax.masked` or
`optax.multi_transform` keeps from a transformation pin the units that they meet.

An update is the difference of new and old weights, so these transformations belong at the end of `optax.chain`, with
nothing after them that changes updates, and `update` must be given `params`. Weights that never move (the skeleton's
out-edges) have updates of exactly 0; at the others `params + updates` rounds once more than the step itself.
Per-unit numbers are computed in float64 in JAX's x64 mode and in float32 without it, all else in the types of the
parameters, bfloat16 included.

Where a gradient or a path ratio is not finite, updates are 0 and the state stays as it is, its `count` included, and
`skipped` counts one more: raising an error would mean waiting for the device.

`init` chooses the skeleton by the weights' values, passing over exact zeros. Inside ``jax.jit`` and ``jax.vmap``
(over seeds, say) it has no values: there the skeleton is the one of non-zero weights, the same for every seed, and the
reference scale is found by a host callback, which raises an error if a skeleton weight turns out to be 0.

`optax.tree_map_params` maps the moments as parameters; the reference scale it gives to ``transform_non_params`` whole.

The state can be pickled, and is a pytree of arrays for Orbax and ``flax.serialization``. These restore it into another
state, of the same skeleton: that of `init` for the same network, rule and zeros among the weights. A state of another
skeleton is an error there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsgd import stages
from gsgd.coordinates import set_to_one
from gsgd.jax import anchor
from gsgd.jax.anchor import Reference, Trees
from gsgd.layout import ArrayLayout, Places, Span
from gsgd.methods import SGD, Adam, Method, RMSprop
from gsgd.network import Network
from gsgd.options import MaxRatio, Options, limit
from gsgd.skeleton import Rule

Array: TypeAlias = jax.Array
Arrays: TypeAlias = list[Any]  # None where there is no array
Tree: TypeAlias = Any
Number: TypeAlias = float | Array
Schedule: TypeAlias = Number | Callable[[Array], Number]
ScaleName = Literal["balanced", "initial"]


class State(NamedTuple):
    """The state of `gsgd`, `gadam` and `grmsprop`.

    Attributes
    ----------
    count, clamped, skipped : int arrays
        Counts of steps taken, of path ratios that were limited, and of steps left out because something was not finite.
    reference : dict of one Trees to its Reference
        As a key the skeleton is not a leaf, but has a name: whatever restores arrays by name into a state of another
        skeleton (Orbax, Flax's serialization) finds none.
    m, v : pytrees like the parameters, or None
        First and second moments of the coordinates' gradients.
    """

    count: Array  # type: ignore[assignment, unused-ignore]  # Optax's name, and a method of tuples
    clamped: Array
    skipped: Array
    reference: dict[Trees, Reference]
    m: Tree
    v: Tree


def gsgd(
    learning_rate: Schedule,
    network: Network,
    momentum: Number | None = SGD.momentum,
    nesterov: bool = SGD.nesterov,
    weight_decay: Number = SGD.weight_decay,
    scale: ScaleName = "balanced",
    rule: Rule = "modulo",
    max_ratio: MaxRatio = "auto",
    clip_norm: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
    """G-SGD: stochastic gradient descent in the positively scale-invariant space (Meng et al., ICLR 2019).

    Parameters
    ----------
    learning_rate : float or schedule
        A schedule is given the number of steps taken.
    network : Network
        Of parameters named by their key paths, see `gsgd.jax.names`.
    momentum, nesterov, weight_decay, scale, rule, max_ratio, clip_norm
        See `gsgd.GSGD`. There is no scale "ones", which would overwrite weights; see `ones`.

    Raises
    ------
    ValueError, TypeError
        A hyperparameter is out of its range, or not a number, or `network` is an approximation of batch normalization.
        In `init`: parameters of the network are missing, of another shape, or not floating point. In `update`:
        `params` are missing, parameters or gradients are of other shapes than in `init`, or the state is that of
        another transformation.
    """
    make = partial(SGD, momentum=_or_zero(momentum), nesterov=nesterov, weight_decay=weight_decay)
    return _transformation(learning_rate, network, make, scale, rule, max_ratio, clip_norm)


def gadam(
    learning_rate: Schedule,
    network: Network,
    b1: Number = Adam.betas[0],
    b2: Number = Adam.betas[1],
    eps: Number = Adam.eps,
    weight_decay: Number = Adam.weight_decay,
    decoupled: bool = Adam.decoupled,
    scale: ScaleName = "balanced",
    rule: Rule = "modulo",
    max_ratio: MaxRatio = "auto",
    clip_norm: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam on the values of basis paths, with the options of `optax.adamw`.

    Parameters
    ----------
    learning_rate, network, scale, rule, max_ratio, clip_norm
        See `gsgd`.
    b1, b2, eps, weight_decay, decoupled
        ``betas=(b1, b2)`` and the others of `gsgd.GAdam`.

    Raises
    ------
    ValueError, TypeError
        As in `gsgd`.
    """
    make = partial(Adam, betas=(b1, b2), eps=eps, weight_decay=weight_decay, decoupled=decoupled)
    return _transformation(learning_rate, network, make, scale, rule, max_ratio, clip_norm)


def grmsprop(
    learning_rate: Schedule,
    network: Network,
    decay: Number = 0.9,
    eps: Number = RMSprop.eps,
    weight_decay: Number = RMSprop.weight_decay,
    momentum: Number | None = RMSprop.momentum,
    scale: ScaleName = "balanced",
    rule: Rule = "modulo",
    max_ratio: MaxRatio = "auto",
    clip_norm: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp on the values of basis paths, as ``optax.rmsprop(..., eps_in_sqrt=False)``.

    Parameters
    ----------
    learning_rate, network, scale, rule, max_ratio, clip_norm
        See `gsgd`.
    decay, eps, weight_decay, momentum
        ``alpha=decay`` and the others of `gsgd.GRMSprop`.

    Raises
    ------
    ValueError, TypeError
        As in `gsgd`.
    """
    make = partial(RMSprop, alpha=decay, eps=eps, weight_decay=weight_decay, momentum=_or_zero(momentum))
    return _transformation(learning_rate, network, make, scale, rule, max_ratio, clip_norm)


def ones(params: Tree, network: Network) -> Tree:
    """`params` with every skeleton weight 1: the paper's start (its section 11.2).

    A transformation can't overwrite weights in `init`. What ``gsgd.GSGD(params, network, lr, scale="ones")`` does is
    ``gsgd.optax.gsgd(lr, network, scale="initial")`` from ``gsgd.optax.ones(params, network)``.

    Parameters
    ----------
    params : pytree of arrays
    network : Network
        Of parameters named by their key paths; the skeleton is that of rule "modulo".

    Returns
    -------
    pytree like `params`
        With the same shapes and dtypes.

    Raises
    ------
    ValueError, TypeError
        Parameters of the network are missing, of another shape, or not floating point.
    """
    leaves, _, skeleton = anchor.skeleton_of(params, network, "modulo", False)
    masks = {name: np.zeros(np.shape(x), bool) for name, x in leaves.items()}
    set_to_one(skeleton, masks)
    structure: Any = jax.tree.structure(params)
    return structure.unflatten(jnp.where(masks[name], jnp.ones_like(x), x) for name, x in leaves.items())


def join(state: Tree, params: Tree) -> Tree:
    """`state` after units have joined that waited for weights which were exactly 0, such as LoRA's.

    Where no path of non-zero weights passes a unit, `init` gives it no coordinates, and its weights take plain steps.
    Call this between steps, outside `jax.jit`, after a few steps and again later: PyTorch's optimizers look after 1, 2,
    4, 8, ... steps. Units all of whose weights have become non-zero then join, with the weights of that moment as
    their scale. The skeleton is static: a step that is given the new state is compiled anew.

    Parameters
    ----------
    state : pytree
        Of `gsgd`, `gadam` or `grmsprop`, or of what Optax makes of them, such as `optax.chain`.
    params : pytree of arrays
        The weights of this moment.

    Returns
    -------
    pytree
        `state` itself if no unit is ready.

    Raises
    ------
    ValueError
        `params` are of other shapes than in `init`.
    """

    def zero(moments: Tree, places: list[list[tuple[int, ...]]]) -> Tree:
        """These moments were of other coordinates."""
        if moments is None:
            return None
        structure: Any = jax.tree.structure(moments)
        pairs = zip(jax.tree.leaves(moments), places, strict=True)
        return structure.unflatten(x.at[tuple(zip(*at, strict=True))].set(0) if at else x for x, at in pairs)

    def joined(x: Any) -> Any:
        if not isinstance(x, State):
            return x
        ((trees, reference),) = x.reference.items()
        leaves = jax.tree.leaves(params)
        _check_shapes(trees, leaves, [None] * len(leaves))
        found = anchor.join(trees, reference, leaves)
        return x if found is None else x._replace(reference=found[0], m=zero(x.m, found[1]), v=zero(x.v, found[1]))

    return jax.tree.map(joined, state, is_leaf=lambda x: isinstance(x, State))


def _of_both(x: Number, y: Number) -> Array:
    """One row for either tree: a choice, which XLA compiles in a third of the time of a concatenation."""
    return jnp.where(np.array([[True], [False]]), x, y)


def _or_zero(momentum: Number | None) -> Number:
    """The momentum; None, Optax's own default, is none."""
    return 0.0 if momentum is None else momentum


def _transformation(
    learning_rate: Schedule,
    network: Network,
    make: Callable[..., Method],
    scale: ScaleName,
    rule: Rule,
    max_ratio: MaxRatio,
    clip_norm: Number | None,
) -> optax.GradientTransformationExtraArgs:
    if not isinstance(network, Network):
        raise TypeError(f"network: expected a gsgd.Network, got {type(network).__name__}")
    method = make(lr=0.0 if callable(learning_rate) else learning_rate)
    if scale not in ("balanced", "initial"):
        raise ValueError(f"scale: expected 'balanced', or 'initial' (for 'ones' from gsgd.optax.ones), got {scale!r}")
    options = Options(scale, rule, None, max_ratio, clip_norm)
    if any(b.batch_norm for b in network.blocks):
        raise ValueError("batch_norm 'paper' and 'released' are not supported here; describe the network with 'exact'")

    def init(params: Tree) -> State:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            state: State = jax.eval_shape(init, params)
            return state._replace(m=params if method.has_m else None, v=params if method.has_v else None)
        reference: Any = (
            0 if _is_placeholder(params) else anchor.anchor(params, network, type(method).__name__, scale, rule)
        )
        # no array twice: a loop may donate the state's buffers
        count, clamped, skipped = (jnp.zeros([], jnp.int32) for _ in range(3))
        m, v = (jax.tree.map(jnp.zeros_like, params) if has else None for has in (method.has_m, method.has_v))
        state = State(count, clamped, skipped, reference, m, v)
        meshes = {x.sharding.mesh for x in jax.tree.leaves(params) if _is_on_several_devices(x)}
        if len(meshes) == 1:  # where update leaves them, so that it is compiled once
            own = state._replace(m=None, v=None)
            state = jax.device_put(own, _replicated(*meshes))._replace(m=m, v=v)
        return state

    def step(
        trees: Trees, reference: Reference, weights: Arrays, gradients: Arrays, m: Arrays, v: Arrays, count: Array
    ) -> Any:
        """The updates and the new moments, and the numbers of steps and of limited ratios that they add."""
        now = (make(lr=learning_rate(count)) if callable(learning_rate) else method).at(count + 1)
        new, solution = stages.step(
            trees.layout,
            stages.Scale(
                _of_both(reference.in_weights, reference.out_weights),
                _of_both(1.0, reference.c) / _of_both(reference.c, 1.0),  # 1 / c alone would be another kernel
            ),
            weights,
            gradients,
            gradients,
            None,
            list(zip(m, v, strict=True)),
            [now] * len(weights),
            limit(options.max_ratio),
            options.clip_norm,
            apply=_traced_once(now) if _compiles() else _update_of,
        )
        updates, moments = zip(*new, strict=True) if weights else ((), ())
        taken = solution.finite.astype(jnp.int32)
        clamped = taken * solution.clamped.astype(jnp.int32)
        return list(updates), [m for m, _ in moments], [v for _, v in moments], taken, clamped

    compiled = jax.jit(step, static_argnums=0)

    def update(updates: Tree, state: State, params: Tree = None, **extra_args: Any) -> tuple[Tree, State]:
        if params is None:
            raise ValueError("expected params: tx.update(grads, state, params)")
        wanted = "state: expected what this transformation's init returns"
        if not isinstance(state, State):
            raise TypeError(f"{wanted}, got {type(state).__name__}")
        ((trees, reference),) = state.reference.items()
        if trees.method != type(method).__name__:
            raise TypeError(f"{wanted}, got one of {trees.method}")
        for name, has, moment in (("m", method.has_m, state.m), ("v", method.has_v, state.v)):
            if has != (moment is not None):
                raise TypeError(f"{wanted}, got one {'without' if has else 'with'} moments {name}")
        weights = [jnp.asarray(w) for w in jax.tree.leaves(params)]
        structure: Any = jax.tree.structure(params)
        # None where the parameter takes no step of its own: its paths keep their values
        gradients = [None if g is None else jnp.asarray(g) for g in structure.flatten_up_to(updates)]
        _check_shapes(trees, weights, gradients)
        m, v = ([None] * len(weights) if x is None else structure.flatten_up_to(x) for x in (state.m, state.v))
        # on one device operation by operation, as usual; on several, not every operation takes sharded arrays
        run = compiled if any(_is_on_several_devices(w) for w in weights) else step
        run = _on_automatic_axes(run, weights)
        with jax.numpy_dtype_promotion("standard"):  # whatever the caller's is
            updates, m, v, taken, clamped = run(trees, reference, weights, gradients, m, v, state.count)
        return structure.unflatten(updates), State(
            state.count + taken,
            state.clamped + clamped,
            state.skipped + 1 - taken,
            state.reference,
            None if state.m is None else structure.unflatten(m),
            None if state.v is None else structure.unflatten(v),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _compiles() -> bool:
    """Whether operations are compiled together, as in ``jax.jit``: `jax.vmap` alone runs them one by one."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _update_of(
    a: ArrayLayout, f: stages.Factors, finite: Array, w: Array, g: Array | None, moments: Any, method: Method
) -> tuple[Array, Any]:
    """What `stages.apply` adds to the weights, and the moments."""
    new, moments = stages.apply(a, f, finite, w, g, moments, method)
    return new - w, moments


def _traced_once(method: Method) -> Callable[..., Any]:
    """`_update_of` by this method, traced once for all arrays that look alike."""
    traced = jax.jit(partial(_update_of, method=method))

    def apply(a: ArrayLayout, *args: Any) -> Any:
        alike = replace(  # it needs no more
            a, rows=None, cols=None, edges=Span(0, a.edges.shape), index=(), has_chains=False, summed=False
        )
        return traced(alike, *args[:-1])

    return apply


jax.tree_util.register_dataclass(Places, ["edge", "at"], [])
jax.tree_util.register_dataclass(
    ArrayLayout,
    ["index", "chain", "free", "parts"],
    ["shape", "rows", "cols", "edges", "groups", "has_chains", "summed"],
)
jax.tree_util.register_dataclass(stages.Factors, [f.name for f in fields(stages.Factors)], [])


def _is_on_several_devices(x: Any) -> bool:
    is_placed = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return is_placed and isinstance(x.sharding, jax.sharding.NamedSharding) and len(x.sharding.device_set) > 1


def _replicated(mesh: Any) -> jax.sharding.NamedSharding:
    """A whole array on every device."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())  # type: ignore[no-untyped-call]


def _on_automatic_axes(step: Callable[..., Any], weights: Sequence[Array]) -> Callable[..., Any]:
    """`step` where axes of a mesh are explicit: inside, the compiler places arrays; results lie as the weights."""
    shardings = [jax.typeof(w).sharding for w in weights]
    meshes = {s.mesh for s in shardings if s.mesh.explicit_axes}
    if not meshes:
        return step
    if len(meshes) > 1:
        raise ValueError(f"params: expected arrays on one mesh, got {meshes}")
    (mesh,) = meshes
    one = _replicated(mesh)

    def on_mesh(trees: Trees, reference: Reference, w: Arrays, g: Arrays, m: Arrays, v: Arrays, count: Array) -> Any:
        places = [[s if x is not None else None for x, s in zip(xs, shardings, strict=True)] for xs in (m, v)]
        out = (shardings, *places, one, one)
        run = jax.sharding.auto_axes(partial(step, trees), axes=mesh.explicit_axes, out_sharding=out)
        return run(reference, w, g, m, v, count)

    return on_mesh


def _check_shapes(trees: Trees, weights: Sequence[Array], gradients: Sequence[Array | None]) -> None:
    """Parameters are those that `init` saw (where Flax NNX gives them other names), and gradients are theirs."""
    if len(weights) != len(trees.shapes):
        raise ValueError(f"params: expected {len(trees.shapes)} arrays, as in init, got {len(weights)}")
    for (name, shape), w, g in zip(trees.shapes.items(), weights, gradients, strict=True):
        if w.shape != shape:
            raise ValueError(f"parameter {name!r}: expected shape {shape}, as in init, got {w.shape}")
        if g is not None and g.shape != shape:
            raise ValueError(f"gradient of {name!r}: expected shape {shape}, got {g.shape}")


def _is_placeholder(params: Tree) -> bool:
    """Whether they are what `optax.tree_map_params` puts in their place: a node of another kind, without leaves."""
    return not isinstance(params, dict | list | tuple | None) and not jax.tree.leaves(params)
