"""Rescaling, balance, path norms and Path-SGD: what the description of a network alone can tell of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from gsgd.arrays import check_gradients, check_parameters
from gsgd.equalize import equalized_scale
from gsgd.methods import non_negative
from gsgd.network import Block, Network, Sum
from gsgd.scale import Floats, over_taps
from gsgd.skeleton import Skeleton


def require_symmetry(net: Network) -> None:
    """Refuse a network whose batch normalization is treated by an approximation."""
    modes = sorted({b.batch_norm for b in net.blocks if b.batch_norm is not None})
    if modes:
        raise ValueError(f"batch_norm={modes[0]!r} is an approximation, no symmetry; describe the network with 'exact'")


def _of_rows(block: Block, x: Floats) -> Floats:
    """`x` (one entry per unit, and 1 for pinned ends) at the rows of a block, (groups, rows, 1)."""
    return x[block.rows].reshape(block.extents[0], -1, 1)


def _of_cols(block: Block, x: Floats) -> Floats:
    return x[block.cols].reshape(block.extents[0], 1, -1)


def rescale(params: Mapping[str, Any], net: Network, scales: Any) -> None:
    """Apply a positive scaling operator in place (the paper's definition 3.1): the function stays the same.

    Parameters
    ----------
    params : mapping of str to array
        Weights, changed in place: in-edges of unit v times ``scales[v]``, out-edges divided by it.
    net : Network
    scales : array, shape (net.num_units,)
        Positive and finite, in the order of ``net.units``.

    Raises
    ------
    ValueError
        `scales` are of another shape, not positive or not finite; a parameter is missing, of another shape than in
        `net`, or read-only; a weight would overflow or underflow; or the network is an approximation of batch
        normalization. Nothing has changed.
    TypeError
        A parameter is not a float32 or float64 array on the CPU.
    """
    require_symmetry(net)
    arrays = check_parameters(params, net)
    c = np.asarray(scales, dtype=np.float64)
    if c.shape != (net.num_units,):
        raise ValueError(f"scales: expected shape ({net.num_units},), got {c.shape}")
    if not (np.isfinite(c) & (c > 0)).all():
        raise ValueError("scales: expected positive finite numbers")
    c = np.append(c, 1.0)
    rescaled = []
    for block in net.blocks:
        w = block.view(arrays[block.name])
        factor = _of_rows(block, c) / _of_cols(block, c)
        with np.errstate(over="ignore"):
            new = np.multiply(w, factor[..., None, None, None], dtype=np.float64).astype(w.dtype)
        if not np.isfinite(new).all() or (new == 0).sum() > (w == 0).sum():
            raise ValueError(f"scales: parameter {block.name!r} would overflow or underflow")
        rescaled.append(new)
    for block, new in zip(net.blocks, rescaled, strict=True):
        block.view(arrays[block.name])[...] = new


def balance(params: Mapping[str, Any], net: Network, norm: Literal[2, "max"] = 2) -> None:
    """Rescale in place so that the weights into and out of every unit have equal norms: the function stays the same.

    Units that no path of non-zero weights passes are left as they are.

    Parameters
    ----------
    params : mapping of str to array
        Weights, changed in place.
    net : Network
    norm : {2, "max"}
        2: the rescaling of least sum of squares, which is unique (METHOD.md, section 4). "max": the largest magnitudes
        in and out are equal, to one part in 10^5: cross-layer equalization, before weights are quantized (Nagel et al.,
        2019).

    Raises
    ------
    ValueError, TypeError
        `norm` is unknown; otherwise as in `rescale`. Nothing has changed.
    """
    if norm not in (2, "max"):
        raise ValueError(f"norm: expected 2 or 'max', got {norm!r}")
    require_symmetry(net)
    scale = Skeleton(net, params, balanced=True).c
    if norm == "max":
        scale = equalized_scale(net, check_parameters(params, net), scale)
    rescale(params, net, scale)


def _path_sums(net: Network, powers: Mapping[str, Floats]) -> tuple[dict[int, tuple[Floats, Floats]], float]:
    """Per block (P_in of its columns, P_out of its rows); and the total over all paths.

    `powers` are |w|^q. P_in sums over paths from pinned sources, P_out over paths to pinned destinations.
    """
    unit = net.unit_of_node
    operations = net.operations
    blocks = [op for op in operations if isinstance(op, Block)]
    views = {id(b): over_taps(np.ascontiguousarray(b.view(powers[b.name]))) for b in blocks}
    p_in = np.where(unit < 0, 1.0, 0.0)
    sources: dict[int, Floats] = {}
    for op in operations:
        if isinstance(op, Sum):
            p_in[op.out] = np.where(unit[op.out] < 0, 1.0, sum(p_in[term] for term in op.terms))
            continue
        groups = op.extents[0]
        sources[id(op)] = p_in[op.col_nodes].reshape(groups, 1, -1)
        reached = (views[id(op)] * sources[id(op)]).sum(axis=2).reshape(-1)
        np.add.at(p_in, op.row_nodes, np.where(op.rows < 0, 0.0, reached))
    p_out = np.where(unit < 0, 1.0, 0.0)
    total = 0.0
    sums: dict[int, tuple[Floats, Floats]] = {}
    for op in reversed(operations):
        if isinstance(op, Sum):
            for term in op.terms:
                p_out[term] += np.where(unit[term] < 0, 0.0, p_out[op.out])
            continue
        ahead = p_out[op.row_nodes].reshape(op.extents[0], -1, 1)
        sums[id(op)] = sources[id(op)], ahead
        weighted = views[id(op)] * ahead
        total += float(
            (weighted * sources[id(op)])[(op.cols < 0).reshape(op.extents[0], 1, -1).repeat(ahead.shape[1], 1)].sum()
        )
        np.add.at(p_out, op.col_nodes, np.where(op.cols < 0, 0.0, weighted.sum(axis=1).reshape(-1)))
    return sums, total


def path_norm(params: Mapping[str, Any], net: Network, power: float = 2) -> float:
    """The sum over all paths of the product of ``|w| ** power`` (METHOD.md, section 8): no rescaling changes it.

    Paths run from pinned sources, such as inputs and biases, to pinned destinations.

    Parameters
    ----------
    params : mapping of str to array
        Weights, only read.
    net : Network
    power : float

    Raises
    ------
    ValueError, TypeError
        The parameters are not those of `net`.
    """
    arrays = check_parameters(params, net, writable=False)
    return _path_sums(net, {n: np.abs(a.astype(np.float64)) ** power for n, a in arrays.items()})[1]


def symmetry_residual(params: Mapping[str, Any], grads: Mapping[str, Any], net: Network) -> Floats:
    """How far gradients are from the symmetry: |sum_in w g - sum_out w g| of every unit, relative.

    The sums over in-edges and out-edges of a unit are equal when `net` describes the model (METHOD.md, section 2):
    then the residual is rounding.

    Parameters
    ----------
    params, grads : mapping of str to array
        Weights and their gradients, only read.
    net : Network

    Returns
    -------
    array, shape (H,)
        Relative to the root of the sum of (w g)^2 over the unit's edges.

    Raises
    ------
    ValueError, TypeError
        The parameters are not those of `net`, the gradients are not those of the parameters, or the network is an
        approximation of batch normalization.
    """
    require_symmetry(net)
    arrays = check_parameters(params, net, writable=False, others=True)
    gradients = check_gradients(grads, arrays)
    difference, squares = np.zeros(net.num_units + 1), np.zeros(net.num_units + 1)
    for block in net.blocks:
        w, g = block.view(arrays[block.name]), block.view(gradients[block.name])
        products = np.multiply(w, g, dtype=np.float64, order="C")
        sums, sizes = over_taps(products), over_taps(np.square(products))
        for ids, axis, sign in ((block.rows, 2, 1.0), (block.cols, 1, -1.0)):
            np.add.at(difference, ids, sign * sums.sum(axis=axis).reshape(-1))
            np.add.at(squares, ids, sizes.sum(axis=axis).reshape(-1))
    size = np.sqrt(squares[:-1])
    return np.abs(difference[:-1]) / np.where(size > 0, size, 1.0)


def path_kappa(params: Mapping[str, Any], net: Network) -> dict[str, Floats]:
    """kappa of every weight: the sum over all paths through it of the squares of the other weights (section 8)."""
    arrays = check_parameters(params, net, writable=False)
    sums, _ = _path_sums(net, {name: np.square(a.astype(np.float64)) for name, a in arrays.items()})
    kappa = {name: np.empty(a.shape) for name, a in arrays.items()}
    for block in net.blocks:
        p_in, p_out = sums[id(block)]
        block.view(kappa[block.name])[...] = (p_in * p_out)[..., None, None, None]
    return kappa


class PathSGD:
    """Path-SGD (Neyshabur et al., 2015): ``w <- w - lr g / kappa``, the paper's baseline in section 5.3.

    kappa of an edge u -> v is P_in(u) P_out(v), the sum over all paths through it of the squares of the other
    weights (METHOD.md, section 8). A weight through which no path of non-zero weights leads stays.

    Parameters
    ----------
    params : mapping of str to array
        Writable float32 or float64 weights, updated in place by `step`.
    net : Network
    lr : float
        Learning rate, >= 0.

    Raises
    ------
    ValueError, TypeError
        The parameters are not those of `net`, or overlap in memory; `lr` is not a finite number >= 0; or the network is
        an approximation of batch normalization.
    """

    def __init__(self, params: Mapping[str, Any], net: Network, lr: float = 0.1) -> None:
        require_symmetry(net)
        self.lr = lr
        self._net = net
        self._arrays = check_parameters(params, net, others=True)

    @property
    def lr(self) -> float:
        """The learning rate of the next step; assign to it for a schedule.

        Raises
        ------
        ValueError, TypeError
            What is assigned is not a finite number >= 0.
        """
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = non_negative("lr", value)

    def step(self, grads: Mapping[str, Any]) -> None:
        """Update the weights; parameters that the network does not mention take a plain step.

        Parameters
        ----------
        grads : mapping of str to array
            The gradient of every parameter, of its shape and dtype.

        Raises
        ------
        ValueError, TypeError
            A gradient is missing, or of another shape or dtype than its parameter.
        FloatingPointError
            A gradient or a step is not finite. Nothing has changed after any error.
        """
        gradients = check_gradients(grads, self._arrays)
        for name, g in gradients.items():
            if not np.isfinite(g).all():
                raise FloatingPointError(f"gradient of {name!r} is not finite")
        kappa = path_kappa(self._arrays, self._net)
        new = {}
        for name, w in self._arrays.items():
            g = self.lr * gradients[name]
            if name in kappa:
                g = np.divide(g, kappa[name], out=np.zeros(w.shape), where=kappa[name] > 0)
            new[name] = w - g.astype(w.dtype)
            if not np.isfinite(new[name]).all():
                raise FloatingPointError(f"the step of {name!r} is not finite")
        for name, w in self._arrays.items():
            w[...] = new[name]
