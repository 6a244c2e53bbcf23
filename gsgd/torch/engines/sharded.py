"""The engines of parameters that are cut between processes: local stages, and one all-reduce of O(units)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from gsgd import stages
from gsgd.coordinates import Coordinates
from gsgd.core_shard import shard_plan
from gsgd.layout import Layout, convert, network_layout, part
from gsgd.methods import Method
from gsgd.network import Network
from gsgd.optimizer import Stats
from gsgd.torch.engines.base import Engine, Tensors, to_device
from gsgd.torch.shards import Shards, local


@dataclass(frozen=True)
class Step:
    """What a step is told, by parameter; of tensors what is here."""

    gradients: Tensors
    moments: tuple[Tensors, Tensors]
    methods: list[Method]
    max_ratio: float
    clip_norm: float
    threads: int

    @property
    def has_moments(self) -> tuple[bool, bool]:
        """Whether any parameter has a first moment, and a second."""
        first, second = (any(x is not None for x in kind) for kind in self.moments)
        return first, second

    @property
    def rows(self) -> int:
        """How many numbers per unit are summed."""
        has_m, has_v = self.has_moments
        return 6 if has_v else 5 if has_m else 4


class ShardedEngine(Engine):
    """Gather on what is here, sum over processes, solve everywhere alike, apply to what is here.

    The sums are of S per unit, weights, gradients and moments of tree edges, and of something that is not finite where
    a gradient is not: then the step is left out on all.
    """

    name = "sharded"

    def __init__(self, net: Network, coordinates: Coordinates, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(net, tensors)
        if any(b.batch_norm for b in net.blocks):
            raise ValueError("batch_norm: expected 'exact' for sharded parameters")
        self.shards = Shards(tensors)
        self.aliases = [local(p) for p in self.params]
        shapes = {name: tuple(p.shape) for name, p in tensors.items()}
        self.take(network_layout(net, shapes, *coordinates.edges), coordinates)

    def is_current(self) -> bool:
        """Whether what is here of every parameter still lies where it did."""
        return all(local(p).is_set_to(old) for p, old in zip(self.params, self.aliases, strict=True))

    def local_gradients(self, gradients: Tensors) -> Tensors:
        """What is here of gradients, cut as their parameters are."""
        found: Tensors = []
        for p, g in zip(self.params, gradients, strict=True):
            if isinstance(p, DTensor) and isinstance(g, DTensor) and g.placements != p.placements:
                g = g.redistribute(placements=p.placements)
            found.append(None if g is None else local(g))
        return self.checked(found)

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
        first, second = ([None if x is None else local(x) for x in kind] for kind in moments)
        step = Step(
            self.local_gradients(gradients), (first, second), [methods[i] for i in which], *limits, threads=threads
        )
        self.finish(step, self.shards.total(self.gather(step)), stats)

    def take(self, whole: Layout, coordinates: Coordinates) -> None:
        """Make the tables of what is here, from those of the whole."""
        raise NotImplementedError

    def gather(self, step: Step) -> Tensor:
        """What is to be summed over processes, (rows, H + 1): the first rows of gsgd_gather in csrc/gsgd.h."""
        raise NotImplementedError

    def finish(self, step: Step, total: Tensor, stats: Stats) -> None:
        """Solve with the sum, and apply."""
        raise NotImplementedError


class ShardedCoreEngine(ShardedEngine):
    """By the C core, on CPU tensors of float32 and float64."""

    why = "by the C core"

    def take(self, whole: Layout, coordinates: Coordinates) -> None:
        self.weights = [w.numpy() for w in self.aliases]
        arrays = dict(zip(self.names, self.weights, strict=True))
        self.plan = shard_plan(part(whole, self.shards.index), arrays, self.shards.counts)
        self.plan.set_reference(*coordinates.scale)
        has_edges = coordinates.in_edges[:, 0] >= 0
        self.trees = np.stack([np.append(0.0, np.where(has_edges, w, 0.0)) for w in coordinates.scale[:2]])

    def gather(self, step: Step) -> Tensor:
        g, m, v = map(_arrays, (step.gradients, *step.moments))
        gathered = self.plan.gather(self.weights, g, None, m, v, step.clip_norm, self.trees, step.threads)
        return torch.from_numpy(gathered)[: step.rows]

    def finish(self, step: Step, total: Tensor, stats: Stats) -> None:
        if math.isfinite(step.clip_norm) and not np.array_equal(total[:2, 1:], self.trees[:, 1:]):
            self.trees = total[:2].numpy()  # something else has written weights, and squares are relative to these
            total = self.shards.total(self.gather(step))
        gathered = np.zeros((6, total.shape[1]))
        gathered[: len(total)] = total
        g, m, v = map(_arrays, (step.gradients, *step.moments))
        rates = np.array([tuple(map(float, o.row)) for o in step.methods])
        stats.steps += 1
        try:
            solved, clamped = self.plan.solve(gathered, None, rates, step.max_ratio, step.clip_norm)
        except FloatingPointError:
            stats.skipped += 1
            return
        self.plan.apply(self.weights, g, m, v, rates, solved, step.threads)
        self.tell_autograd(step.gradients)
        self.trees = solved[:2]
        stats.clamped += clamped


class ShardedArrayEngine(ShardedEngine):
    """By array operations, on every device, without waiting for it. `clip_norm` costs a second sum, of one number."""

    why = "in array operations"

    def take(self, whole: Layout, coordinates: Coordinates) -> None:
        asarray = to_device(self.aliases[0].device)  # parts share what is per unit with the whole
        self.whole = convert(whole, asarray)
        self.here = self.counted = convert(part(whole, self.shards.index), asarray)
        if not all(self.shards.counts):
            self.counted = convert(part(whole, self.shards.counted), asarray)
        self.scale = stages.Scale.of(asarray, *coordinates.scale)

    def gather(self, step: Step) -> Tensor:
        found = stages.gather(self.counted, self.aliases, step.gradients, list(zip(*step.moments, strict=True)))
        found.s[-1] = 0 * found.largest.max()  # of pinned ends: NaN where a gradient is not finite
        moments = [torch.zeros_like(found.s) if x is None else x for x in (found.m, found.v)]
        return torch.stack([*found.weights, found.s, found.g, *moments])[: step.rows]

    def finish(self, step: Step, total: Tensor, stats: Stats) -> None:
        has_m, has_v = step.has_moments
        m, v = total[4] if has_m else None, total[5] if has_v else None
        found = stages.Gathered(total[2], total[:2], total[3], m, v, largest=total[2, -1:])
        a, b = stages.relative(self.whole, self.scale, found.weights)
        squares = None
        if math.isfinite(step.clip_norm):
            counted = [g if counts else None for g, counts in zip(step.gradients, self.shards.counts, strict=True)]
            squares = self.shards.total(stages.sum_of_squares(self.counted, a, b, counted))
        taken = [None if g is None else o for g, o in zip(step.gradients, step.methods, strict=True)]
        types = [w.dtype for w in self.aliases]
        solution = stages.solve(self.whole, a, b, found, None, squares, taken, types, step.max_ratio, step.clip_norm)
        pairs = list(zip(*step.moments, strict=True))
        factors = stages.spread(self.here, solution, self.aliases)
        each = zip(self.here.arrays, factors, self.aliases, step.gradients, pairs, step.methods, strict=True)
        self.write(pairs, (stages.apply(*own) for own in each), solution, stats)


def _arrays(tensors: Tensors) -> list[NDArray[Any] | None]:
    return [None if x is None else x.resolve_neg().numpy() for x in tensors]
