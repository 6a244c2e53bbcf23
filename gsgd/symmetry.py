"""Does a network describe a model? The model itself answers, on rescaled weights and by its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsgd.network import Network
from gsgd.paths import require_symmetry, rescale, symmetry_residual

Arrays = dict[str, NDArray[np.float64]]

_TOLERANCE = 1e-6  # relative: rounding in float64 is far below, the effect of a wrong edge far above
_ROUNDING = 1e-11  # of gradients, relative to the largest in the model


class SymmetryError(ValueError):
    """The model does not have the symmetry that the network claims."""


@dataclass(frozen=True)
class Probe:
    """A model as a function of the described parameters, in one of its modes.

    `outputs` are arrays, `gradients` those of a random linear functional of them.
    """

    mode: str
    outputs: Callable[[Arrays], list[NDArray[Any]]]
    gradients: Callable[[Arrays], Arrays]


def perturbed(net: Network, params: Mapping[str, Any], seed: int) -> Arrays:
    """The described parameters in float64, a tenth away: zeros would hide what is wrong.

    Raises
    ------
    ValueError
        `net` names parameters that are not there, or of another shape; or it is an approximation.
    """
    require_symmetry(net)
    random = np.random.default_rng(seed)
    weights: Arrays = {}
    for name, shape in net.shapes.items():
        have = tuple(params[name].shape) if name in params else "no such parameter"
        if have != shape:
            raise ValueError(f"{name}: the network describes shape {shape}, the model has {have}")
        w = np.asarray(params[name], dtype=np.float64)
        spread = np.sqrt(np.mean(w**2)) or 1.0
        weights[name] = w + 0.1 * spread * random.standard_normal(w.shape)
    return weights


def check(net: Network, weights: Arrays, probes: list[Probe], seed: int) -> None:
    """Raise `SymmetryError` unless a random rescaling of units leaves the outputs alone and gradients agree."""
    random = np.random.default_rng(seed)
    scales = np.exp(random.uniform(-np.log(2), np.log(2), net.num_units))
    groups = _layers(net)
    expected = [probe.outputs(weights) for probe in probes]
    if not all(np.isfinite(y).all() for outputs in expected for y in outputs):
        raise ValueError("the model's outputs on the example are not finite")
    for probe, outputs in zip(probes, expected, strict=True):
        if _change(net, weights, probe, outputs, scales) > _TOLERANCE:
            alone = {}
            for layer, members in groups.items():
                change = _change(net, weights, probe, outputs, np.where(members, scales, 1.0))
                if change > _TOLERANCE:
                    alone[layer] = change
            raise SymmetryError(f"{probe.mode}rescaling changes the outputs: " + _list(net, groups, alone))
        residual = _residual(net, weights, probe.gradients(weights))
        if residual.max(initial=0.0) > _TOLERANCE:
            worst = {layer: residual[members].max() for layer, members in groups.items()}
            worst = {layer: r for layer, r in worst.items() if r > _TOLERANCE}
            raise SymmetryError("the gradients lack the symmetry: " + _list(net, groups, worst))


def _layers(net: Network) -> dict[str, NDArray[np.bool_]]:
    """The units that each layer is the first to write, as masks."""
    owners = np.array([label.rpartition("[")[0] for label in net.units], dtype=object)
    return {owner: owners == owner for owner in dict.fromkeys(owners)}


def _list(net: Network, groups: Mapping[str, NDArray[np.bool_]], broken: Mapping[str, float]) -> str:
    """The broken layers with those that read their units, the worst first."""
    parts = []
    for layer, amount in sorted(broken.items(), key=lambda item: -item[1]):
        ids = np.flatnonzero(groups[layer])
        readers = dict.fromkeys(block.name for block in net.blocks if np.isin(block.cols, ids).any())
        parts.append(f"units written by {layer!r} and read by {', '.join(map(repr, readers))} (relative {amount:.1e})")
    return "; ".join(parts) or "only all layers together"


def _change(
    net: Network, weights: Arrays, probe: Probe, expected: list[NDArray[Any]], scales: NDArray[np.float64]
) -> float:
    """How much the rescaling changes the outputs, relative to the largest."""
    moved = copy.deepcopy(weights)
    rescale(moved, net, scales)
    pairs = zip(probe.outputs(moved), expected, strict=True)
    differences = [float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300)) for a, b in pairs if a.size]
    return max((d if d == d else float("inf") for d in differences), default=0.0)


def _residual(net: Network, weights: Arrays, gradients: Arrays) -> NDArray[np.float64]:
    """`symmetry_residual` of every unit; 0 where the gradients vanish but for rounding."""
    size = np.zeros(net.num_units + 1)
    for block in net.blocks:
        squares = np.square(block.view(weights[block.name]) * block.view(gradients[block.name]))
        np.add.at(size, block.rows, squares.sum(axis=(2, 3, 4, 5)).reshape(-1))
        np.add.at(size, block.cols, squares.sum(axis=(1, 3, 4, 5)).reshape(-1))
    alive = size[:-1] > _ROUNDING**2 * size[:-1].max(initial=0.0)
    return np.where(alive, symmetry_residual(weights, gradients, net), 0.0)
