"""Rescaling, balance and equivalence of models: as `gsgd.rescale` and others, on a model's own tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import gsgd
from gsgd.network import Network
from gsgd.torch.trace import trace

Arrays = dict[str, NDArray[Any]]


def rescale(model: nn.Module, net: Network, scales: Any) -> None:
    """Apply a positive scaling operator in place, on any device; see `gsgd.rescale`. Computed on the CPU.

    Parameters
    ----------
    model : nn.Module
    net : Network
        Of the names of ``model.named_parameters()``, as `trace` has them.
    scales : array, shape (net.num_units,)
        Positive and finite, in the order of ``net.units``.

    Raises
    ------
    ValueError, TypeError
        `scales` are of another shape, not positive or not finite; the model's parameters are not those of `net`; a
        weight would overflow or underflow; or the network is an approximation of batch normalization. Nothing has
        changed.
    """
    _write(model, net, lambda arrays: gsgd.rescale(arrays, net, scales))


def balance(model: nn.Module, net: Network | None = None, norm: Literal[2, "max"] = 2) -> None:
    """Rescale in place so that the weights into and out of every unit have equal norms; see `gsgd.balance`.

    Parameters
    ----------
    model : nn.Module
        On any device; computed on the CPU.
    net : Network, optional
        ``trace(model)`` by default.
    norm : {2, "max"}
        2: the rescaling of least sum of squares. "max": the largest magnitudes in and out are equal.

    Raises
    ------
    ValueError, TypeError
        `norm` is unknown, or `model` can't be traced; otherwise as in `rescale`. Nothing has changed.
    """
    network = trace(model) if net is None else net
    _write(model, network, lambda arrays: gsgd.balance(arrays, network, norm))


def equivalence(a: nn.Module, b: nn.Module, net: Network, rtol: float = 1e-5) -> NDArray[np.float64]:
    """The scale per unit that takes the weights of `a` to those of `b`; see `gsgd.equivalence`.

    Parameters
    ----------
    a, b : nn.Module
        On any device; compared on the CPU.
    net : Network
        Of the names of both models' parameters, as `trace` has them.
    rtol : float
        How far weights may part, relative to the largest among the in-edges of the same unit and layer.

    Returns
    -------
    array, shape (H,)
        Positive numbers, in the order of ``net.units``.

    Raises
    ------
    gsgd.NotEquivalent
        They are not rescalings of each other; the error names the first unit where they part.
    ValueError, TypeError
        The parameters are not those of `net`, `rtol` is negative, or the network is an approximation of batch
        normalization.
    """
    return gsgd.equivalence(_on_host(a), _on_host(b), net, rtol)


def _on_host(model: nn.Module) -> Arrays:
    """Copies of the real parameters, in float32 or float64."""
    return {
        name: p.detach().to("cpu", torch.promote_types(p.dtype, torch.float32), copy=True).numpy()
        for name, p in model.named_parameters()
        if p.is_floating_point()
    }


def _write(model: nn.Module, net: Network, change: Callable[[Arrays], None]) -> None:
    """Write what `change` makes of the parameters that `net` names."""
    arrays = _on_host(model)
    change(arrays)
    parameters, new = dict(model.named_parameters()), {}
    for name in net.shapes:
        new[name] = torch.from_numpy(arrays[name]).to(parameters[name].dtype)
        if not new[name].isfinite().all() or (new[name] == 0).sum() > np.count_nonzero(arrays[name] == 0):
            raise ValueError(f"parameter {name!r} would overflow or underflow in {parameters[name].dtype}")
    with torch.no_grad():
        for name, w in new.items():
            parameters[name].copy_(w)
