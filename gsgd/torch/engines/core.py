"""The engine of CPU tensors: the C core."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gsgd.arrays import check_parameters
from gsgd.coordinates import Coordinates
from gsgd.network import Network
from gsgd.skeleton import batch_norm_gradients, explain, make_plan
from gsgd.torch.engines.base import Engine, Step, Tensors

SHAPE, DTYPE = attrgetter("shape"), attrgetter("dtype")


class CoreEngine(Engine):
    """Steps by the C core, on NumPy views of CPU tensors that are made once."""

    name = "core"

    def __init__(self, net: Network, coordinates: Coordinates, tensors: Mapping[str, Tensor], plan: Any = None) -> None:
        super().__init__(net, tensors)
        views = {name: alias.numpy() for name, alias in zip(tensors, self.aliases, strict=True)}
        self.arrays = check_parameters(views, net, others=True)
        self.weights = list(self.arrays.values())
        self.strides = [p.stride() for p in self.aliases]
        self.shapes, self.dtypes = [*map(SHAPE, self.aliases)], [*map(DTYPE, self.aliases)]
        self.trees = coordinates.edges
        if plan is None:
            plan, _ = make_plan(net, self.arrays, "c")
            plan.set_trees(*self.trees)
        self.plan = plan
        self.plan.set_reference(*coordinates.scale)
        self.approximates = any(b.batch_norm for b in net.blocks)
        self.addresses: list[list[int | None]] = []
        self.views: list[list[NDArray[Any] | None]] = []
        self.rows: list[tuple[float, ...]] = []
        self.which: list[int] = []
        self.rates = np.zeros((0, 0))

    def step(self, step: Step) -> None:
        gradients, which = step.gradients, step.which
        sums = norm = None
        if self.approximates:
            found, sums, norm = batch_norm_gradients(self.net, self.arrays, self.as_arrays(gradients), self.trees[0])
        else:
            try:
                found = self.addresses_of(gradients)
            except (RuntimeError, TypeError):  # a sparse tensor has no strides, NumPy no bfloat16
                found = self.as_arrays(gradients)
        addresses = [[None if x is None else x.data_ptr() for x in kind] for kind in step.moments]
        if addresses != self.addresses:  # a view keeps its memory, so that no other tensor can have its address
            self.addresses = addresses
            self.views = [[None if x is None else x.detach().numpy() for x in kind] for kind in step.moments]
        rows = [tuple(map(float, o.row)) for o in step.methods]
        if rows != self.rows or which != self.which:
            self.rows, self.which = rows, which
            self.rates = np.array(rows, dtype=np.float64)[which]
        try:
            clamped = self.plan.step(
                self.weights, found, sums, norm, *self.views, self.rates, step.max_ratio, step.clip_norm, step.threads
            )
        except FloatingPointError as error:
            seen = self.as_arrays(gradients)
            raise FloatingPointError(explain(self.net, self.trees, self.arrays, seen, error.args[0])) from None
        self.tell_autograd(gradients)
        step.stats.steps += 1
        step.stats.clamped += clamped

    def addresses_of(self, gradients: Tensors) -> Any:
        """Addresses will do where all gradients are laid out as their parameters. There may be thousands: no loops."""
        given = [p if g is None else g for g, p in zip(gradients, self.aliases, strict=True)]
        if (
            [*map(Tensor.stride, given)] == self.strides
            and [*map(SHAPE, given)] == self.shapes
            and [*map(DTYPE, given)] == self.dtypes
            and not any(map(Tensor.is_neg, given))
        ):
            addresses = np.array([*map(Tensor.data_ptr, given)], dtype=np.uintp)
            addresses[[g is None for g in gradients]] = 0
            return addresses
        return [None if g is None else g.resolve_neg().numpy() for g in gradients]

    def as_arrays(self, gradients: Tensors) -> list[NDArray[Any] | None]:
        """NumPy views of gradients."""
        return [None if g is None else g.resolve_neg().numpy() for g in self.checked(gradients)]
