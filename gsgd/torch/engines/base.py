"""What the engines have in common: the parameters that they step on, and how they check gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from gsgd.methods import Method
from gsgd.network import Network
from gsgd.optimizer import Stats

Tensors: TypeAlias = list[Tensor | None]
EngineName = Literal["core", "array", "triton", "sharded"]


def as_real(t: Tensor) -> Tensor:
    """A view of a complex tensor's real and imaginary parts, (..., 2), as torch's optimizers step on; or `t`."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() and t.layout is torch.strided else t


class Unsupported(ValueError):
    """Why an engine can't take these parameters."""


class Engine:
    """The parameters in the order of `tensors`, with real tensors that share their memory as it is now."""

    name: ClassVar[EngineName]
    why: str | None = None  # why it is not the faster one that was tried first
    steps_taken: list[Tensor] | None = None  # by every parameter, where the device counts them

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
        return [None if t is None else as_real(t) for t in tensors] if self.has_complex else tensors

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

    def step(
        self,
        gradients: Tensors,
        moments: tuple[Tensors, Tensors],
        methods: list[Method],
        which: list[int],
        limits: tuple[float, float],
        threads: int,
        stats: Stats,
    ) -> None:
        """Update the parameters and their moments in place, and count.

        Parameters
        ----------
        gradients, moments
            Real, in the order of `params`; None where a parameter has none.
        methods, which
            Methods with their hyperparameters, and which of them is that of each parameter.
        limits
            `max_ratio` and `clip_norm`; infinity for none.
        """
        raise NotImplementedError
