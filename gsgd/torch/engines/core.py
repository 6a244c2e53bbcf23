"""The engine of CPU tensors: the C core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gsgd._core import lie_at, takes
from gsgd.arrays import check_parameters
from gsgd.coordinates import Coordinates
from gsgd.network import Network
from gsgd.skeleton import batch_norm_gradients, explain, make_plan
from gsgd.torch.engines.base import Engine, Step, Tensors

READS_TENSORS = takes(Tensor)  # from PyTorch 2.10 on


class CoreEngine(Engine):
    """Steps by the C core, which reads gradients and moments as they are, and NumPy views of weights."""

    name = "core"

    def __init__(self, net: Network, coordinates: Coordinates, tensors: Mapping[str, Tensor], plan: Any = None) -> None:
        super().__init__(net, tensors)
        views = {name: alias.numpy() for name, alias in zip(tensors, self.aliases, strict=True)}
        self.arrays = check_parameters(views, net, others=True)
        self.weights = list(self.arrays.values())
        self.trees = coordinates.edges
        if plan is None:
            plan, _ = make_plan(net, self.arrays, "c")
            plan.set_trees(*self.trees)
        self.plan = plan
        self.plan.set_reference(*coordinates.scale)
        self.approximates = any(b.batch_norm for b in net.blocks)
        self.rows: list[tuple[float, ...]] = []
        self.which: list[int] = []
        self.rates = np.zeros((0, 0))

    def is_current(self) -> bool:
        return lie_at(self.params, self.weights) if READS_TENSORS and not self.has_complex else super().is_current()

    def step(self, step: Step) -> None:
        gradients, which = step.gradients, step.which
        sums = norm = None
        if self.approximates:
            found, sums, norm = batch_norm_gradients(self.net, self.arrays, self.as_arrays(gradients), self.trees[0])
        else:
            found = gradients if can_read(gradients) else self.as_arrays(gradients)
        moments = (kind if can_read(kind) else views(kind) for kind in step.moments)
        rows = [tuple(map(float, o.row)) for o in step.methods]
        if rows != self.rows or which != self.which:
            self.rows, self.which = rows, which
            self.rates = np.array(rows, dtype=np.float64)[which]
        limits = (step.max_ratio, step.clip_norm)
        try:
            clamped = self.plan.step(self.weights, found, sums, norm, *moments, self.rates, *limits, step.threads)
        except FloatingPointError as error:
            seen = self.as_arrays(gradients)
            raise FloatingPointError(explain(self.net, self.trees, self.arrays, seen, error.args[0])) from None
        except (TypeError, ValueError, RuntimeError, BufferError):
            self.checked(gradients)  # says it in PyTorch's words
            raise
        self.tell_autograd(step)
        step.stats.steps += 1
        step.stats.clamped += clamped

    def as_arrays(self, gradients: Tensors) -> list[NDArray[Any] | None]:
        """NumPy views of gradients."""
        return views(resolved(self.checked(gradients)))


def views(tensors: Tensors) -> list[NDArray[Any] | None]:
    """What lies there, to be written to: NumPy takes no tensor whose values are to be read with the other sign."""
    return [None if x is None else x.detach().numpy() for x in tensors]


def resolved(gradients: Tensors) -> Tensors:
    """Gradients, or copies of those whose values are to be read with the other sign."""
    return [None if g is None else g.resolve_neg() for g in gradients]


def can_read(tensors: Tensors) -> bool:
    """Whether the C core reads these as they are; it does not see that values are to be read with the other sign."""
    return READS_TENSORS and not any(map(Tensor.is_neg, [x for x in tensors if x is not None]))
