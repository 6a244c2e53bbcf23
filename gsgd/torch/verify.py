"""Does a network describe a model? The model itself answers, on rescaled weights and by its gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from gsgd.network import Network
from gsgd.paths import require_symmetry, rescale, symmetry_residual
from gsgd.torch.trace import arguments, copy_model, output_tensors, unwrap

Arrays = dict[str, NDArray[np.float64]]

_TOLERANCE = 1e-6  # relative: rounding in float64 is far below, the effect of a wrong edge far above
_ROUNDING = 1e-11  # of gradients, relative to the largest in the model


class SymmetryError(ValueError):
    """The model does not have the symmetry that the network claims."""


def verify(
    model: nn.Module, net: Network, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any], seed: int = 0
) -> None:
    """Check in float64, on a copy on the CPU, that `net` describes `model`.

    Every unit is rescaled by a random factor, log-uniform in [1/2, 2]: the outputs must stay the same in evaluation
    and in training mode. And for every unit the sums of weight times gradient over its in-edges and over its
    out-edges must be equal (method section 2), for a random linear functional of the outputs. Both are tried at
    weights a tenth away from the model's, for zeros (biases, zero-initialised gammas) would hide what is wrong.

    Parameters
    ----------
    model : nn.Module
        Neither it nor the random state changes.
    net : Network
        With batch normalization, if any, described as "exact".
    example_inputs : tensor, tuple of positional or dict of keyword arguments
        Inputs with values; a batch that batch normalization accepts.
    seed : int
        Of the factors and the functional.

    Raises
    ------
    SymmetryError
        It names the layers whose units break the symmetry, and how much.
    ValueError
        `net` names parameters that the model lacks, or of another shape; it is an approximation ("paper",
        "released"); or the model's outputs are not finite.
    """
    require_symmetry(net)
    check = _Check(model, net, example_inputs, seed)
    random = np.random.default_rng(seed)
    scales = np.exp(random.uniform(-np.log(2), np.log(2), net.num_units))
    groups = _layers(net)
    for training in (False, True):
        if check.change(scales, training) > _TOLERANCE:
            alone = {}
            for layer, members in groups.items():
                change = check.change(np.where(members, scales, 1.0), training)
                if change > _TOLERANCE:
                    alone[layer] = change
            mode = "training" if training else "evaluation"
            raise SymmetryError(f"in {mode}, rescaling changes the outputs: " + _list(net, groups, alone))
        residual = check.residual(training)
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


class _Check:
    """A float64 copy of a model as a function of the described parameters."""

    def __init__(self, model: nn.Module, net: Network, example_inputs: Any, seed: int) -> None:
        inner, names = unwrap(model)
        self.net, self.seed = net, seed
        self.model = copy_model(inner, _double)
        self.inner = {outer: name for name, outer in names.items()}
        parameters = dict(self.model.named_parameters())
        random = np.random.default_rng(seed)
        self.weights: Arrays = {}
        for name, shape in net.shapes.items():
            have = tuple(parameters[self.inner[name]].shape) if name in self.inner else "no such parameter"
            if have != shape:
                raise ValueError(f"{name}: the network describes shape {shape}, the model has {have}")
            w = parameters[self.inner[name]].detach().numpy()
            spread = np.sqrt(np.mean(w**2)) or 1.0
            self.weights[name] = w + 0.1 * spread * random.standard_normal(w.shape)
        self.inputs = arguments(example_inputs)
        with torch.no_grad():
            self.expected = {training: self.outputs(self.weights, training) for training in (False, True)}
        if not all(y.isfinite().all() for outputs in self.expected.values() for y in outputs):
            raise ValueError("the model's outputs on example_inputs are not finite")

    def outputs(self, weights: Mapping[str, Any], training: bool) -> list[Tensor]:
        """What the model returns with `weights`; dropout is the same in every call, and buffers keep their values."""
        tensors = {self.inner[n]: torch.as_tensor(w) for n, w in weights.items()}
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        args, kwargs = tree_map_only(Tensor, _double, self.inputs)
        self.model.train(training)
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(self.seed)
            return output_tensors(functional_call(self.model, {**tensors, **buffers}, args, kwargs))

    def change(self, scales: NDArray[np.float64], training: bool) -> float:
        """How much the rescaling changes the outputs, relative to the largest."""
        weights = copy.deepcopy(self.weights)
        rescale(weights, self.net, scales)
        with torch.no_grad():
            pairs = list(zip(self.outputs(weights, training), self.expected[training], strict=True))
        differences = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) for a, b in pairs if a.numel()]
        return max((d if d == d else float("inf") for d in differences), default=0.0)

    def residual(self, training: bool) -> NDArray[np.float64]:
        """`symmetry_residual` of every unit; 0 where the gradients vanish but for rounding."""
        weights = {n: torch.tensor(w, requires_grad=True) for n, w in self.weights.items()}
        random = torch.Generator().manual_seed(self.seed)
        outputs = [y for y in self.outputs(weights, training) if y.requires_grad]
        if not outputs:
            return np.zeros(self.net.num_units)
        functional = [torch.randn(y.shape, generator=random, dtype=y.dtype) for y in outputs]
        tensors = list(weights.values())
        found = torch.autograd.grad(outputs, tensors, functional, allow_unused=True, materialize_grads=True)
        gradients = {n: g.numpy() for n, g in zip(weights, found, strict=True)}
        size = np.zeros(self.net.num_units + 1)
        for block in self.net.blocks:
            squares = np.square(block.view(self.weights[block.name]) * block.view(gradients[block.name]))
            np.add.at(size, block.rows, squares.sum(axis=(2, 3, 4, 5)).reshape(-1))
            np.add.at(size, block.cols, squares.sum(axis=(1, 3, 4, 5)).reshape(-1))
        alive = size[:-1] > _ROUNDING**2 * size[:-1].max(initial=0.0)
        return np.where(alive, symmetry_residual(self.weights, gradients, self.net), 0.0)


def _double(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64 if t.is_floating_point() else t.dtype, copy=True)
