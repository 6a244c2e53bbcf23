"""What the engines have in common: the parameters that they step on, and how they check gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from array_api_compat import torch as xp
from numpy.typing import NDArray
from torch import Tensor

from gsgd.entries import real_type
from gsgd.methods import Method, Number
from gsgd.network import Network
from gsgd.optimizer import Stats

Tensors: TypeAlias = list[Tensor | None]
EngineName = Literal["core", "array", "triton", "sharded"]


def as_real(t: Tensor) -> Tensor:
    """A view of a complex tensor's real and imaginary parts, (..., 2), as torch's optimizers step on; or `t`."""
    return torch.view_as_real(t) if t.is_complex() and t.layout is torch.strided else t


def to_device(device: torch.device) -> Callable[[NDArray[Any]], Tensor]:
    """For `layout.convert`: arrays as tensors there, integers as indices. The same array is converted once."""
    real = real_type(xp, device)
    made: dict[int, tuple[NDArray[Any], Tensor]] = {}  # by identity, with the array, which keeps it

    def asarray(x: NDArray[Any]) -> Tensor:
        if id(x) not in made:
            t = torch.from_numpy(np.ascontiguousarray(x))
            t = t.to(real) if t.is_floating_point() else t if t.dtype == torch.bool else t.long()
            made[id(x)] = x, t.to(device)
        return made[id(x)][1]

    return asarray


class Unsupported(ValueError):
    """Why an engine can't take these parameters."""


@dataclass(frozen=True, eq=False)
class Step:
    """What a step is taken with.

    Attributes
    ----------
    gradients : list of Tensor or None
        Of every parameter, real; None where it has none.
    moments : pair of such lists
        First and second moments, which are updated in place.
    methods : list of Method
        With their hyperparameters.
    which : list of int
        Of every parameter, which of `methods` is its own.
    max_ratio, clip_norm : float or Tensor
        The limits of path ratios and of the norm of dl/dx; infinity for none.
    threads : int
        How many the C core may use.
    stats : Stats
        Where the step is counted.
    """

    gradients: Tensors
    moments: tuple[Tensors, Tensors]
    methods: list[Method]
    which: list[int]
    max_ratio: Number
    clip_norm: Number
    threads: int
    stats: Stats

    @cached_property
    def is_partial(self) -> bool:
        """Whether a parameter has no gradient."""
        return any([g is None for g in self.gradients])


class Engine:
    """The parameters in the order of `tensors`, with real tensors that share their memory as it is now."""

    name: ClassVar[EngineName]
    why: str | None = None  # how it does that, or why it is not the faster one that was tried first
    steps_taken: list[Tensor] | None = None  # by every parameter, where the device counts them
    histories: list[int]  # of every parameter: those of one number have taken the same steps

    def __init__(self, net: Network, tensors: Mapping[str, Tensor]) -> None:
        self.net = net
        self.names = list(tensors)
        self.params = list(tensors.values())
        self.aliases = [as_real(p.detach()) for p in self.params]
        self.has_complex = any(p.is_complex() for p in self.params)
        # these follow a unit which is rescaled, even where they have no gradient
        follow = {b.name for b in net.blocks if (b.cols >= 0).any()}
        self.following = [name in follow for name in tensors]
        self.has_warned = False

    def is_current(self) -> bool:
        """Whether the parameters still have the same storage, offset, shape and strides."""
        now = map(as_real, self.params) if self.has_complex else self.params
        return all(map(Tensor.is_set_to, now, self.aliases))

    def as_reals(self, tensors: Tensors) -> Tensors:
        """Gradients or moments as the engine takes them."""
        return [None if t is None else as_real(t.resolve_conj()) for t in tensors] if self.has_complex else tensors

    def checked(self, gradients: Tensors) -> Tensors:
        """Gradients that are dense, and of their parameters' dtypes and shapes."""
        for name, p, g in zip(self.names, self.aliases, gradients, strict=True):
            if g is None:
                continue
            if g.layout is not torch.strided or g.dtype != p.dtype:
                got = g.dtype if g.layout is torch.strided else "a sparse one: make its layer with sparse=False"
                raise TypeError(f"gradient of {name!r}: expected a dense tensor of {p.dtype}, got {got}")
            if g.shape != p.shape:
                raise ValueError(f"gradient of {name!r}: expected shape {tuple(p.shape)}, got {tuple(g.shape)}")
        return gradients

    def tell_autograd(self, step: Step) -> None:
        """It did not see what was written by address."""
        written = self.params
        if step.is_partial:
            own = zip(self.params, step.gradients, self.following, strict=True)
            written = [p for p, g, follows in own if follows or g is not None]
        torch.autograd.graph.increment_version(written)

    def step(self, step: Step) -> None:
        """Update the parameters and their moments in place, and count."""
        raise NotImplementedError


class CountingEngine(Engine):
    """An engine that counts steps on the device, which alone knows whether one was left out."""

    def __init__(self, net: Network, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(net, tensors)
        count, device = len(self.params), self.params[0].device
        # steps taken, ratios limited, steps left out; then steps that each parameter has taken
        self.counts, self.taken = torch.zeros((2, 3 + count), dtype=torch.int64, device=device).unbind()
        self.left_out = torch.tensor([0, 0, 1, *[0] * count]).to(device)
        self.steps_taken: list[Tensor] = list(self.counts[3:].unbind())
        self.histories = [0] * count
        self.given: list[bool] = []
        self.stats: Stats | None = None
        self.one = torch.ones((), dtype=real_type(xp, device), device=device)

    def count(self, finite: Tensor, clamped: Tensor, step: Step) -> None:
        """Count a step, as taken where everything was finite, or as left out."""
        stats = step.stats
        if self.stats is not stats:
            counts = self.counts[:3]
            counts.copy_(torch.tensor([int(stats.steps), int(stats.clamped), int(stats.skipped)]))
            stats.steps, stats.clamped, stats.skipped = counts.unbind()  # type: ignore[assignment]
            self.stats = stats
        given = [g is not None for g in step.gradients]
        if given != self.given:
            self.taken.copy_(torch.tensor([1, 0, 0, *given]))
            self.given = given
        if not all(given):
            number: dict[tuple[int, bool], int] = {}
            own = zip(self.histories, given, strict=True)
            self.histories = [number.setdefault(x, len(number)) for x in own]
        self.taken[1].copy_(clamped)
        self.counts += torch.where(finite, self.taken, self.left_out)
