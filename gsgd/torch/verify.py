"""Does a network describe a PyTorch module? See `gsgd.symmetry`."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gsgd.network import Network
from gsgd.symmetry import Arrays, Probe, check, perturbed
from gsgd.torch.trace import arguments, copy_model, kept_random_states, output_tensors, unwrap


def verify(
    model: nn.Module, net: Network, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any], seed: int = 0
) -> None:
    """Check in float64, on a copy on the CPU, that `net` describes `model`.

    Every unit is rescaled by a random factor, log-uniform in [1/2, 2]: the outputs must stay the same in evaluation
    and in training mode. And for every unit the sums of weight times gradient over its in-edges and over its
    out-edges must be equal (METHOD.md, section 2), for a random linear functional of the outputs. Both are tried at
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
        Of the factors, the functional, and the random numbers of the model (torch's and Python's).

    Raises
    ------
    SymmetryError
        It names the layers whose units break the symmetry, and how much.
    ValueError
        `net` names parameters that the model lacks, or of another shape; it is an approximation ("paper",
        "released"); the model does not run in float64 on the CPU; or its outputs are not finite.
    """
    if not isinstance(net, Network):
        raise TypeError(f"net: expected a gsgd.Network, got {type(net).__name__}")
    copied = _Copy(model, example_inputs, seed)
    parameters = dict(copied.model.named_parameters())
    weights = perturbed(net, {outer: parameters[name].detach() for outer, name in copied.inner.items()}, seed)
    modes = (("in evaluation, ", False), ("in training, ", True))
    check(net, weights, [Probe(m, partial(copied.values, on), partial(copied.gradients, on)) for m, on in modes], seed)


class _Copy:
    """A float64 copy of a model as a function of the described parameters."""

    def __init__(self, model: nn.Module, example_inputs: Any, seed: int) -> None:
        inner, names = unwrap(model)
        self.seed = seed
        self.model = copy_model(inner, _double)
        self.inner = {outer: name for name, outer in names.items()}
        self.inputs = arguments(example_inputs)

    def run(self, weights: Arrays, training: bool) -> tuple[nn.Module, list[Tensor]]:
        """A copy with `weights`, and what it returns; random numbers are the same in every call, buffers keep values.

        A copy, since backward may run a part of the module again (activation checkpointing).
        """
        model = copy.deepcopy(self.model).train(training)
        model.load_state_dict({self.inner[n]: torch.as_tensor(w) for n, w in weights.items()}, strict=False)
        with kept_random_states(), torch.compiler.set_stance("force_eager"), _in_double():
            torch.manual_seed(self.seed)
            random.seed(self.seed)
            try:
                args, kwargs = tree_map_only(Tensor, _double, self.inputs)
                out = model(*args, **kwargs)
            except Exception as error:
                mode = "training" if training else "evaluation"
                raise ValueError(
                    f"a copy of the model does not run in float64 on the CPU, in {mode} ({type(error).__name__}: "
                    f"{error}): give inputs that fit, and let it take dtypes and devices from these or its parameters"
                ) from error
        return model, output_tensors(out)

    def values(self, training: bool, weights: Arrays) -> list[NDArray[Any]]:
        """The outputs as NumPy arrays."""
        return [y.detach().numpy() for y in self.run(weights, training)[1]]

    def gradients(self, training: bool, weights: Arrays) -> Arrays:
        """Of a random linear functional of the outputs; 0 if they have none."""
        model, returned = self.run(weights, training)
        generator = torch.Generator().manual_seed(self.seed)
        outputs = [y for y in returned if y.requires_grad]
        functional = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
        with _in_double():  # checkpointed parts run again
            torch.autograd.backward(outputs, functional)
        parameters = dict(model.named_parameters())
        found = {n: parameters[self.inner[n]].grad for n in weights}
        return {n: np.zeros_like(weights[n]) if g is None else g.numpy() for n, g in found.items()}


class _Widen(TorchFunctionMode):
    """Whatever type of real numbers a model asks for, it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args, kwargs = tree_map_only(torch.dtype, _wide, (args, kwargs or {}))
        return func(*args, **kwargs)


@contextmanager
def _in_double() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(default)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype


def _double(t: Tensor) -> Tensor:
    return t.detach().cpu().to(torch.float64 if t.is_floating_point() else t.dtype, copy=True)
