"""The engines of parameters that are cut between processes: local stages, and one all-reduce of O(units)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


class ShardedEngine(Engine):
    """Gather on what is here, sum over processes, solve everywhere alike, apply to what is here.

    The sums are of S per unit, weights, gradients and moments of tree edges, and of something that tells where a
    gradient is not finite: then the step is left out on all.
    """

    name = "sharded"

    def __init__(self, net: Network, coordinates: Coordinates, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(net, tensors)
        if any(b.batch_norm for b in net.blocks):
            raise ValueError("batch_norm: expected 'exact' for sharded parameters")
        self.shards = Shards(tensors)
        self.aliases = [local(p) for p in self.params]
        shapes = {name: tuple(p.shape) for name, p in tensors.items()}
        whole = network_layout(net, shapes, *coordinates.edges)
        self.take(whole, part(whole, self.shards.index), coordinates)

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
        self.step_here(self.local_gradients(gradients), (first, second), methods, which, limits, threads, stats)
        self.tell_autograd(gradients)

    def take(self, whole: Layout, here: Layout, coordinates: Coordinates) -> None:
        """Make the tables of what is here."""
        raise NotImplementedError

    def step_here(
        self,
        gradients: Tensors,
        moments: tuple[Tensors, Tensors],
        methods: list[Method],
        which: list[int],
        limits: tuple[float, float],
        threads: int,
        stats: Stats,
    ) -> None:
        """The step, of what is here."""
        raise NotImplementedError


class ShardedCoreEngine(ShardedEngine):
    """By the C core, on CPU tensors of float32 and float64."""

    why = "by the C core"

    def take(self, whole: Layout, here: Layout, coordinates: Coordinates) -> None:
        self.weights = [w.numpy() for w in self.aliases]
        self.plan = shard_plan(here, dict(zip(self.names, self.weights, strict=True)), self.shards.counts)
        self.plan.set_reference(*coordinates.scale)
        has_edges = coordinates.in_edges[:, 0] >= 0
        self.trees = np.stack([np.append(0.0, np.where(has_edges, w, 0.0)) for w in coordinates.scale[:2]])

    def step_here(
        self,
        gradients: Tensors,
        moments: tuple[Tensors, Tensors],
        methods: list[Method],
        which: list[int],
        limits: tuple[float, float],
        threads: int,
        stats: Stats,
    ) -> None:
        g, m, v = ([None if x is None else x.resolve_neg().numpy() for x in kind] for kind in (gradients, *moments))
        clip_norm = limits[1]

        def total() -> NDArray[np.float64]:
            found = self.plan.gather(self.weights, g, None, m, v, clip_norm, self.trees, threads)
            self.shards.total(torch.from_numpy(found)[: _rows(m, v)])
            return found

        found = total()
        if math.isfinite(clip_norm) and not np.array_equal(found[:2, 1:], self.trees[:, 1:]):
            self.trees = found[:2]  # something else has written weights, and the norm was relative to those before
            found = total()
        rates = np.array([tuple(map(float, o.row)) for o in methods])[which]
        stats.steps += 1
        try:
            solved, clamped = self.plan.solve(found, None, rates, *limits)
        except FloatingPointError:
            stats.skipped += 1
            return
        self.plan.apply(self.weights, g, m, v, rates, solved, threads)
        self.trees = solved[:2]
        stats.clamped += clamped


class ShardedTritonEngine(ShardedEngine):
    """By Triton's kernels, without waiting for the device. `clip_norm` needs a second sum, of one number."""

    why = "by Triton's kernels"

    def take(self, whole: Layout, here: Layout, coordinates: Coordinates) -> None:
        from gsgd.torch.engines.triton_part import TritonPart

        tensors = dict(zip(self.names, self.aliases, strict=True))
        self.part = TritonPart(self.net, coordinates, tensors, whole, here, self.shards.counts)
        self.steps_taken = self.part.steps_taken

    def step_here(
        self,
        gradients: Tensors,
        moments: tuple[Tensors, Tensors],
        methods: list[Method],
        which: list[int],
        limits: tuple[float, float],
        threads: int,
        stats: Stats,
    ) -> None:
        with self.part.on_device():
            step = self.part.begin(gradients, moments, methods, which, limits, stats)
            self.shards.total(self.part.gather(step))
            if step.clips:
                self.shards.total(self.part.squares(step))
            self.part.solve(step)
            self.part.apply(step)


class ShardedArrayEngine(ShardedEngine):
    """By array operations, without waiting for the device. `clip_norm` needs a second sum, of one number."""

    why = "in array operations"

    def take(self, whole: Layout, here: Layout, coordinates: Coordinates) -> None:
        asarray = to_device(self.aliases[0].device)  # parts share what is per unit with the whole
        self.whole = convert(whole, asarray)
        self.here = self.counted = convert(here, asarray)
        if not all(self.shards.counts):
            self.counted = convert(part(whole, self.shards.counted), asarray)
        self.scale = stages.Scale.of(asarray, *coordinates.scale)

    def step_here(
        self,
        gradients: Tensors,
        moments: tuple[Tensors, Tensors],
        methods: list[Method],
        which: list[int],
        limits: tuple[float, float],
        threads: int,
        stats: Stats,
    ) -> None:
        weights, pairs = self.aliases, list(zip(*moments, strict=True))
        found = self.total(stages.gather(self.counted, weights, gradients, pairs), _rows(*moments))
        a, b = stages.relative(self.whole, self.scale, found.weights)
        max_ratio, clip_norm = limits
        squares = None
        if math.isfinite(clip_norm):
            counted = [g if counts else None for g, counts in zip(gradients, self.shards.counts, strict=True)]
            squares = self.shards.total(stages.sum_of_squares(self.counted, a, b, counted))
        taken = [None if g is None else methods[i] for g, i in zip(gradients, which, strict=True)]
        types = [w.dtype for w in weights]
        solution = stages.solve(self.whole, a, b, found, None, squares, taken, types, max_ratio, clip_norm)
        factors = stages.spread(self.here, solution, weights)
        each = zip(self.here.arrays, factors, weights, gradients, pairs, (methods[i] for i in which), strict=True)
        self.write(pairs, (stages.apply(*own) for own in each), solution, stats)

    def total(self, found: stages.Gathered, rows: int) -> stages.Gathered:
        """What all processes have gathered, by one all-reduce."""
        found.s[-1] = 0 * found.largest.max()  # of pinned ends: NaN where a gradient is not finite
        moments = [torch.zeros_like(found.s) if x is None else x for x in (found.m, found.v)]
        total = self.shards.total(torch.stack([*found.weights, found.s, found.g, *moments])[:rows])
        m, v = (None if x is None else total[i] for i, x in ((4, found.m), (5, found.v)))
        return stages.Gathered(total[2], total[:2], total[3], m, v, largest=total[2, -1:])


def _rows(m: Sequence[Any], v: Sequence[Any]) -> int:
    """How many numbers per unit are summed: moments come last, first ones before second ones."""
    return 6 if any(x is not None for x in v) else 5 if any(x is not None for x in m) else 4
