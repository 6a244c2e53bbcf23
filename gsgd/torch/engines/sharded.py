"""The engines of parameters that are cut between processes: local stages, and one all-reduce of O(units)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from gsgd import stages
from gsgd.coordinates import Coordinates
from gsgd.core_shard import shard_plan
from gsgd.layout import Layout, convert, network_layout, part
from gsgd.network import Network
from gsgd.torch.engines.base import CountingEngine, Engine, EngineName, Step, Tensors, to_device
from gsgd.torch.engines.core import resolved, views
from gsgd.torch.shards import Shards, local


class ShardedEngine(Engine):
    """Gather on what is here, sum over processes, solve everywhere alike, apply to what is here.

    The sums are of S per unit, weights, gradients and moments of tree edges, and of something that tells where a
    gradient is not finite, unless S does: then the step is left out on all.
    """

    name: ClassVar[EngineName] = "sharded"

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

    def step(self, step: Step) -> None:
        first, second = ([None if x is None else local(x) for x in kind] for kind in step.moments)
        self.step_here(replace(step, gradients=self.local_gradients(step.gradients), moments=(first, second)))
        self.tell_autograd(step)

    def take(self, whole: Layout, here: Layout, coordinates: Coordinates) -> None:
        """Make the tables of what is here."""
        raise NotImplementedError

    def step_here(self, step: Step) -> None:
        """The step, of what is here."""
        raise NotImplementedError


class ShardedCoreEngine(ShardedEngine, CountingEngine):
    """By the C core, on CPU tensors of float32 and float64."""

    why = "by the C core"

    def take(self, whole: Layout, here: Layout, coordinates: Coordinates) -> None:
        self.weights = [w.numpy() for w in self.aliases]
        self.plan = shard_plan(here, dict(zip(self.names, self.weights, strict=True)), self.shards.counts)
        self.plan.set_reference(*coordinates.scale)
        has_edges = coordinates.in_edges[:, 0] >= 0
        self.trees = np.stack([np.append(0.0, np.where(has_edges, w, 0.0)) for w in coordinates.scale[:2]])

    def step_here(self, step: Step) -> None:
        g, m, v = map(views, (resolved(step.gradients), *step.moments))

        def total() -> NDArray[np.float64]:
            found = self.plan.gather(self.weights, g, None, m, v, step.clip_norm, self.trees, step.threads)
            self.shards.total(torch.from_numpy(found)[: _rows(m, v)])
            return found

        found = total()
        if math.isfinite(step.clip_norm) and not np.array_equal(found[:2, 1:], self.trees[:, 1:]):
            self.trees = found[:2]  # something else has written weights, and the norm was relative to those before
            found = total()
        rates = np.array([tuple(map(float, o.row)) for o in step.methods])[step.which]
        try:
            solved, clamped = self.plan.solve(found, None, rates, step.max_ratio, step.clip_norm)
        except FloatingPointError:
            self.count(torch.tensor(False), torch.tensor(0), step)
            return
        self.plan.apply(self.weights, g, m, v, rates, solved, step.threads)
        self.trees = solved[:2]
        self.count(torch.tensor(True), torch.tensor(clamped), step)


class ShardedTritonEngine(ShardedEngine):
    """By Triton's kernels, without waiting for the device. `clip_norm` needs a second sum, of one number."""

    why = "by Triton's kernels"

    def take(self, whole: Layout, here: Layout, coordinates: Coordinates) -> None:
        from gsgd.torch.engines.triton_part import TritonPart

        tensors = dict(zip(self.names, self.aliases, strict=True))
        self.part = TritonPart(self.net, coordinates, tensors, whole, here, self.shards.counts)
        self.steps_taken = self.part.steps_taken

    def step_here(self, step: Step) -> None:
        with self.part.on_device():
            begun = self.part.begin(step)
            self.shards.total(self.part.gather(begun))
            if begun.clips:
                self.shards.total(self.part.squares(begun))
            self.part.solve(begun)
            self.part.apply(begun)


class ShardedArrayEngine(ShardedEngine, CountingEngine):
    """By array operations, without waiting for the device. `clip_norm` needs a second sum, of one number."""

    why = "in array operations"

    def take(self, whole: Layout, here: Layout, coordinates: Coordinates) -> None:
        asarray = to_device(self.aliases[0].device)  # parts share what is per unit with the whole
        self.whole = convert(whole, asarray)
        self.here = self.counted = convert(here, asarray)
        if not all(self.shards.counts):
            self.counted = convert(part(whole, self.shards.counted), asarray)
        self.scale = stages.Scale.of(asarray, *coordinates.scale)
        self.absent = asarray(whole.edge == len(whole.owner))
        self.bounds = stages.bounds_of(self.scale.c, [p.dtype for p in self.aliases], 1)

    def step_here(self, step: Step) -> None:
        weights, gradients, pairs = self.aliases, step.gradients, list(zip(*step.moments, strict=True))
        found = self.total(stages.gather(self.counted, weights, gradients, pairs))
        ab = stages.relative(self.whole, self.scale, found.weights)
        squares = None
        if math.isfinite(step.clip_norm):
            counted = [g if counts else None for g, counts in zip(gradients, self.shards.counts, strict=True)]
            squares = self.shards.total(stages.sum_of_squares(self.counted, ab, counted))
        own = [step.methods[i] for i in step.which]
        taken = [None if g is None else o for g, o in zip(gradients, own, strict=True)]
        limits = (step.max_ratio, step.clip_norm)
        solution = stages.solve(self.whole, ab, found, None, squares, taken, self.bounds, *limits)
        factors = stages.spread(self.here, solution, weights, own)
        for a, f, *rest in zip(self.here.arrays, factors, weights, gradients, pairs, own, strict=True):
            stages.apply(a, f, solution.finite, *rest)
        self.count(solution.finite, solution.clamped, step)

    def total(self, found: stages.Gathered) -> stages.Gathered:
        """What all processes have gathered, by one all-reduce."""
        per_unit = {name: x for name, x in vars(found).items() if name != "magnitudes" and x is not None}
        unfit = sum((~x.isfinite() for x in found.magnitudes), start=torch.zeros_like(found.q[:1]))
        total = self.shards.total(torch.cat([*(x.reshape(-1) for x in per_unit.values()), unfit]))
        parts = torch.split(total[:-1], [x.numel() for x in per_unit.values()])
        sums = {name: part.reshape(x.shape) for (name, x), part in zip(per_unit.items(), parts, strict=True)}
        sums["weights"] = sums["weights"] + self.absent
        return replace(found, **sums, magnitudes=[torch.where(total[-1] == 0, 0.0, torch.inf)])


def _rows(m: Sequence[Any], v: Sequence[Any]) -> int:
    """How many numbers per unit are summed: moments come last, first ones before second ones."""
    return 6 if any(x is not None for x in v) else 5 if any(x is not None for x in m) else 4
