"""The engine of parameters that are cut between processes: local stages, and one all-reduce of O(units)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch.distributed.tensor import DTensor

from gsgd import stages
from gsgd.coordinates import Coordinates
from gsgd.layout import convert, network_layout, part
from gsgd.methods import Method
from gsgd.network import Network
from gsgd.optimizer import Stats
from gsgd.torch.engines.base import CountingEngine, Tensors, to_device
from gsgd.torch.shards import Shards, local


class ShardedEngine(CountingEngine):
    """Gather on what is here, sum over processes, solve everywhere alike, apply to what is here.

    The sums are of S per unit, weights, gradients and moments of tree edges, and a count of processes that have seen
    something that is not finite: then the step is left out on all. With `clip_norm` a second, single number is summed.
    """

    name = "sharded"

    def __init__(self, net: Network, coordinates: Coordinates, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(net, tensors)
        if any(b.batch_norm for b in net.blocks):
            raise ValueError("batch_norm: expected 'exact' for sharded parameters")
        self.shards = Shards(tensors)
        self.aliases = [local(p) for p in self.params]
        asarray = to_device(self.aliases[0].device)  # parts share what is per unit with the whole
        shapes = {name: tuple(p.shape) for name, p in tensors.items()}
        whole = network_layout(net, shapes, *coordinates.edges)
        self.whole = convert(whole, asarray)
        self.here = self.counted = convert(part(whole, self.shards.index), asarray)
        if not all(self.shards.counts):
            self.counted = convert(part(whole, self.shards.counted), asarray)
        self.scale = stages.Scale.of(asarray, *coordinates.scale)
        self.absent = self.whole.edge == len(self.whole.owner)
        self.bounds = stages.bounds_of(self.scale.c, [p.dtype for p in self.aliases], 1)

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

    def total(self, found: stages.Gathered) -> stages.Gathered:
        """What all processes have gathered, by one all-reduce."""
        per_unit = {f.name: getattr(found, f.name) for f in fields(found) if f.name != "largest"}
        per_unit = {name: x for name, x in per_unit.items() if x is not None}
        unfit = sum((~x.isfinite() for x in found.largest), start=torch.zeros_like(found.q[:1]))
        total = self.shards.total(torch.cat([*(x.reshape(-1) for x in per_unit.values()), unfit]))
        parts = torch.split(total[:-1], [x.numel() for x in per_unit.values()])
        sums = {name: part.reshape(x.shape) for (name, x), part in zip(per_unit.items(), parts, strict=True)}
        sums["weights"] = sums["weights"] + self.absent
        return replace(found, **sums, largest=[torch.where(total[-1] == 0, 0.0, torch.inf)])

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
        weights, own = self.aliases, self.local_gradients(gradients)
        m, v = ([None if x is None else local(x) for x in kind] for kind in moments)
        pairs = list(zip(m, v, strict=True))
        found = self.total(stages.gather(self.counted, weights, own, pairs))
        ab = stages.relative(self.whole, self.scale, found.weights)
        max_ratio, clip_norm = limits
        squares = None
        if math.isfinite(clip_norm):
            counted = [g if counts else None for g, counts in zip(own, self.shards.counts, strict=True)]
            squares = self.shards.total(stages.sum_of_squares(self.counted, ab, counted))
        taken = [None if g is None else methods[i] for g, i in zip(gradients, which, strict=True)]
        solution = stages.solve(self.whole, ab, found, None, squares, taken, self.bounds, max_ratio, clip_norm)

        each_method = [methods[i] for i in which]
        factors = stages.spread(self.here, solution, weights, each_method)
        each = zip(self.here.arrays, factors, weights, own, pairs, each_method, strict=True)
        for a, f, *others in each:
            stages.apply(a, f, solution.finite, *others)
        self.count(solution, gradients, stats)
