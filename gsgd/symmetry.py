"""Does a network describe a model? The model itself answers, on rescaled weights and by its gradients."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsgd.network import Network
from gsgd.paths import require_symmetry, rescale, symmetry_residual

Arrays = dict[str, NDArray[Any]]  # float64 or complex128

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


@contextmanager
def kept_states() -> Iterator[None]:
    """Python's and NumPy's random numbers go on afterwards as if nothing were drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same, and inside they start from `seed`."""
    with kept_states():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield


def random_states() -> tuple[object, ...]:
    """Python's and NumPy's, to be compared."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tobytes(), numpy[2:]


def perturbed(net: Network, params: Mapping[str, Any], seed: int) -> Arrays:
    """The parameters in double precision, a tenth further from zero: zeros would hide what is wrong.

    Parameters
    ----------
    params : mapping of arrays
        All that are real or complex, described or not: the network may omit a bias that is zero.

    Raises
    ------
    ValueError
        `net` names parameters that are not there, or of another shape; or it is an approximation.
    """
    require_symmetry(net)
    for name, shape in net.shapes.items():
        have = tuple(params[name].shape) if name in params else "no such parameter"
        if have != shape:
            raise ValueError(f"{name}: the network describes shape {shape}, the model has {have}")
    generator = np.random.default_rng(seed)
    weights: Arrays = {}
    for name, w in params.items():
        if np.iscomplexobj(w):
            weights[name] = _further(np.real(w), generator) + 1j * _further(np.imag(w), generator)
        else:
            weights[name] = _further(w, generator)
    return weights


def _further(w: Any, generator: np.random.Generator) -> NDArray[np.float64]:
    """Signs are kept, since a model may take logarithms or roots of what must be positive."""
    w = np.asarray(w).astype(np.float64)
    spread = np.sqrt(np.mean(w**2)) if w.any() else 1.0
    noise = 0.1 * spread * generator.standard_normal(w.shape)
    moved: NDArray[np.float64] = w + np.where(w == 0, noise, np.copysign(noise, w))
    return moved


def check(net: Network, weights: Arrays, probes: list[Probe], seed: int) -> None:
    """Raise `SymmetryError` unless a random rescaling of units leaves the outputs alone and gradients agree.

    A model whose outputs differ between two runs on the same weights is no function of them: a `ValueError` says so.
    """
    generator = np.random.default_rng(seed)
    scales = np.exp(generator.uniform(-np.log(2), np.log(2), net.num_units))
    groups = _layers(net)
    expected = [probe.outputs(weights) for probe in probes]
    if not all(np.isfinite(y).all() for outputs in expected for y in outputs):
        raise ValueError("the model's outputs on the example are not finite")
    for probe, outputs in zip(probes, expected, strict=True):
        if _difference(probe.outputs(weights), outputs) > _TOLERANCE:
            raise ValueError(
                f"{probe.mode}two runs on the same weights give different outputs: the model draws random numbers that "
                "can't be seeded (by a generator of its own, say), or counts its runs, and no network of it can be "
                "verified. Switch that off while verifying"
            )
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
    moved = {name: weights[name].copy() for name in net.shapes}
    rescale(moved, net, scales)
    return _difference(probe.outputs({**weights, **moved}), expected)


def _difference(outputs: list[NDArray[Any]], expected: list[NDArray[Any]]) -> float:
    """The largest relative difference; infinite where shapes differ."""
    if [a.shape for a in outputs] != [b.shape for b in expected]:
        return float("inf")
    pairs = zip(outputs, expected, strict=True)
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
    w, g = ({name: arrays[name] for name in net.shapes} for arrays in (weights, gradients))
    return np.where(alive, symmetry_residual(w, g, net), 0.0)
