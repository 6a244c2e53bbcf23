"""Does a network describe a PyTorch module? See `gsgd.symmetry`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gsgd.network import Network
from gsgd.symmetry import Arrays, Probe, check, perturbed, random_states, seeded
from gsgd.torch.follow import arguments, copy_model, kept_random_states, output_tensors, unwrap
from gsgd.torch.memory import copy_converted, isolated_global_hooks
from gsgd.torch.values import EXTREMES, is_continuous, tensors_in, with_uniform

_SEEDS = 8  # that are tried of a model that draws random numbers


def verify(
    model: nn.Module, net: Network, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any], seed: int = 0
) -> None:
    """Check in float64, on a copy on the CPU, that `net` describes `model`.

    Every unit is rescaled by a random factor, log-uniform in [1/2, 2]: the outputs must stay the same in evaluation
    and in training mode. And for every unit the sums of weight times gradient over its in-edges and over its
    out-edges must be equal (METHOD.md, section 2), for a random linear functional of the outputs. Both are tried at
    weights a tenth away from the model's, described or not, for zeros (biases, gammas at the start) would hide what
    is wrong.

    Parameters
    ----------
    model : nn.Module
        Neither it nor the random state changes.
    net : Network
        With batch normalization, if any, described as "exact".
    example_inputs : tensor, tuple of positional or dict of keyword arguments
        Inputs with values; a batch that batch normalization accepts.
    seed : int
        Of the factors, the functional, and the random numbers of the model (torch's, Python's and NumPy's). A model
        that branches on these is tried with several seeds, and with all of torch's uniform numbers near 0 or 1.

    Raises
    ------
    SymmetryError
        The network is wrong: the error names the layers whose units break the symmetry, and by how much.
    ValueError
        `net` names parameters that the model lacks, or of another shape; it is an approximation ("paper",
        "released"); the model does not run in float64 on the CPU; its outputs are not finite, or differ between two
        runs on the same weights; or its forward reads the original's parameters (by a closure).
    TypeError
        `net` is not a Network, or `model` not a module.
    """
    if not isinstance(net, Network):
        raise TypeError(f"net: expected a gsgd.Network, got {type(net).__name__}")
    copied = _Copy(model, example_inputs)
    parameters = dict(copied.model.named_parameters())
    inner = {outer: parameters[name].detach() for outer, name in copied.inner.items()}
    weights = perturbed(net, {name: p.numpy() for name, p in inner.items() if is_continuous(p)}, seed)
    probes = []
    for mode, training in (("in evaluation, ", False), ("in training, ", True)):
        for draws in copied.ways(training, weights, seed):
            run = (training, draws)
            probes.append(Probe(mode, partial(copied.values, *run), partial(copied.gradients, *run)))
    check(net, weights, probes, seed)


@dataclass(frozen=True)
class _Draws:
    """The random numbers of a run; `uniform` takes the place of all of torch's between 0 and 1."""

    seed: int
    uniform: float | None = None


@dataclass(frozen=True)
class _Run:
    """A copy of the model, what it returned, the torch functions it called, and whether it drew random numbers."""

    model: nn.Module
    outputs: list[Tensor]
    calls: list[str]
    drew: bool


class _Copy:
    """A copy of a model in double precision, as a function of its parameters."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        inner, names = unwrap(model)
        self.model = copy_model(inner, _double)
        self.originals = {t.untyped_storage().data_ptr() for t in inner.parameters()} - {0}
        self.inner = {outer: name for name, outer in names.items()}
        self.inputs = arguments(example_inputs)

    def run(self, training: bool, draws: _Draws, weights: Arrays) -> _Run:
        """Run with `weights`; random numbers are the same for the same draws, buffers keep their values.

        A copy, since backward may run a part of the module again (activation checkpointing).
        """
        model = copy_model(self.model, Tensor.clone).train(training)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, w in weights.items():
                parameters[self.inner[name]].copy_(torch.as_tensor(w))
        watch = _Widen(self.originals, draws.uniform)
        with (
            kept_random_states(),
            isolated_global_hooks(),
            seeded(draws.seed),
            torch.compiler.set_stance("force_eager"),
            _in_double(watch),
        ):
            torch.manual_seed(draws.seed)
            before = _states()
            try:
                args, kwargs = copy_converted(self.inputs, _double)
                out = model(*args, **kwargs)
            except _ReadsOriginal as error:
                raise ValueError(str(error)) from None
            except Exception as error:
                mode = "training" if training else "evaluation"
                raise ValueError(
                    f"a copy of the model does not run in float64 on the CPU, in {mode} ({type(error).__name__}: "
                    f"{error}): give inputs that fit, and let it take dtypes and devices from these or its parameters"
                ) from error
            return _Run(model, output_tensors(out), watch.calls, _states() != before)

    def ways(self, training: bool, weights: Arrays, seed: int) -> list[_Draws]:
        """One for every sequence of calls that some draws find in a model that draws random numbers."""
        found: dict[tuple[str, ...], _Draws] = {}
        for s in range(seed, seed + _SEEDS):
            run = self.run(training, _Draws(s), weights)
            found.setdefault(tuple(run.calls), _Draws(s))
            if not run.drew:
                return list(found.values())
        for x in EXTREMES:  # which seeds find rarely
            with suppress(ValueError):
                run = self.run(training, _Draws(seed, x), weights)
                if all(y.isfinite().all() for y in run.outputs):
                    found.setdefault(tuple(run.calls), _Draws(seed, x))
        return list(found.values())

    def values(self, training: bool, draws: _Draws, weights: Arrays) -> list[NDArray[Any]]:
        """The outputs as NumPy arrays."""
        return [y.detach().resolve_conj().resolve_neg().numpy() for y in self.run(training, draws, weights).outputs]

    def gradients(self, training: bool, draws: _Draws, weights: Arrays) -> Arrays:
        """Of a random linear functional of the outputs; 0 if they have none."""
        run = self.run(training, draws, weights)
        generator = torch.Generator().manual_seed(draws.seed)
        outputs = [y for y in run.outputs if y.requires_grad]
        functional = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
        with _in_double(_Widen(self.originals, draws.uniform)):  # checkpointed parts run again
            torch.autograd.backward(outputs, functional)
        parameters = dict(run.model.named_parameters())
        found = {n: parameters[self.inner[n]].grad for n in weights}
        return {n: np.zeros_like(weights[n]) if g is None else g.numpy() for n, g in found.items()}


class _ReadsOriginal(Exception):
    pass


class _Widen(TorchFunctionMode):
    """Whatever type of real numbers a model asks for, it gets float64. The calls that are seen are listed.

    `originals` are the addresses of memory that a copy must not read. `uniform` replaces random numbers.
    """

    def __init__(self, originals: set[int], uniform: float | None) -> None:
        super().__init__()
        self.originals, self.uniform = originals, uniform
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        self.calls.append(getattr(func, "__name__", repr(func)))
        if any(_place(t) in self.originals for t in tensors_in((args, kwargs or {}))):
            raise _ReadsOriginal(
                "forward refers to the original model, by a closure or a global name: it must read parameters, and "
                "views of them, through self"
            )
        args, kwargs = tree_map_only(torch.dtype, _wide, (args, kwargs or {}))
        return with_uniform(func(*args, **kwargs), self.calls[-1], self.uniform)


@contextmanager
def _in_double(mode: TorchFunctionMode) -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mode:
            yield
    finally:
        torch.set_default_dtype(default)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype


def _double(t: Tensor) -> Tensor:
    return t.detach().cpu().to(_wide(t.dtype), copy=True)


def _place(t: Tensor) -> int:
    """Where its memory begins; 0 for none."""
    return t.untyped_storage().data_ptr() if t.layout is torch.strided and not t.is_meta else 0


def _states() -> tuple[object, ...]:
    return *random_states(), torch.random.get_rng_state().numpy().tobytes()
