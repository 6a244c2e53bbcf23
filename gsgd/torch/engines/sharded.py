"""The engine of parameters that are cut between processes: local stages, and one all-reduce of O(units)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from array_api_compat import array_namespace
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from gsgd import stages
from gsgd.coordinates import Coordinates
from gsgd.entries import real_type
from gsgd.layout import convert, layout, part
from gsgd.methods import Method
from gsgd.network import Network
from gsgd.optimizer import Stats
from gsgd.torch.engines.base import Engine, Tensors
from gsgd.torch.shards import Shards, local


class ShardedEngine(Engine):
    """Gather on what is here, sum over processes, solve everywhere alike, apply to what is here.

    The sums are of S per unit, weights, gradients and moments of tree edges, and a count of processes that have seen
    something that is not finite: then the step is left out on all. With `clip_norm` a second, single number is summed.
    """

    name = "sharded"

    def __init__(self, net: Network, coordinates: Coordinates, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(net, tensors)
        if any(b.batch_norm for b in net.blocks):
            raise ValueError("batch_norm: expected 'exact' for sharded parameters")
        self.shards = Shards(tensors)
        self.aliases = [local(p) for p in self.params]
        device = self.aliases[0].device
        real = real_type(array_namespace(*self.aliases), device)

        def asarray(x: NDArray[Any]) -> Tensor:
            t = torch.from_numpy(np.ascontiguousarray(x))
            return (t.to(real) if t.is_floating_point() else t if t.dtype == torch.bool else t.long()).to(device)

        number = {name: i for i, name in enumerate(tensors)}
        blocks = [(number[b.name], b) for b in net.blocks]
        whole = layout(net.num_units, [tuple(p.shape) for p in self.params], blocks, *coordinates.edges)
        self.whole = convert(whole, asarray)
        self.here = convert(part(whole, self.shards.index), asarray)
        counted = [own if counts else None for own, counts in zip(self.shards.index, self.shards.counts, strict=True)]
        self.counted = convert(part(whole, counted), asarray)
        self.scale = stages.Scale.of(asarray, *coordinates.scale)

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
        weights, own = self.aliases, self.local_gradients(gradients)
        m, v = ([None if x is None else local(x) for x in kind] for kind in moments)
        pairs = list(zip(m, v, strict=True))
        found = stages.gather(self.counted, weights, own, pairs)
        vectors = [x for x in (found.s, found.weights, found.g, found.m, found.v) if x is not None]
        unfit = (~found.largest.isfinite().all()).to(found.s).reshape(1)
        total = self.shards.total(torch.cat([*(x.reshape(-1) for x in vectors), unfit]))
        sums = iter(torch.split(total, [x.numel() for x in (*vectors, unfit)]))
        s, tree_weights, g = (next(sums).reshape(x.shape) for x in (found.s, found.weights, found.g))
        tree_m, tree_v = (None if x is None else next(sums).reshape(x.shape) for x in (found.m, found.v))
        found = stages.Gathered(s, tree_weights, g, tree_m, tree_v, found.largest)

        a, b = stages.relative(self.whole, self.scale, found.weights)
        max_ratio, clip_norm = limits
        squares = None
        if math.isfinite(clip_norm):
            counted = [g if counts else None for g, counts in zip(own, self.shards.counts, strict=True)]
            squares = self.shards.total(stages.sum_of_squares(self.counted, a, b, counted))
        taken = [None if g is None else methods[i] for g, i in zip(gradients, which, strict=True)]
        types = [w.dtype for w in weights]
        solution = stages.solve(self.whole, a, b, found, None, squares, taken, types, max_ratio, clip_norm)

        finite = solution.finite & (total[-1] == 0)
        factors = stages.spread(self.here, solution, weights)
        each = zip(self.here.arrays, factors, weights, own, pairs, (methods[i] for i in which), strict=True)
        for layout_, f, w, g, pair, method in each:
            new, new_pair = stages.apply(layout_, f, w, g, pair, method)
            for old, x in zip((w, *pair), (new, *new_pair), strict=True):
                if old is not None and x is not old:
                    torch.where(finite, x, old, out=old)
        stats.steps += 1
        stats.clamped = stats.clamped + torch.where(finite, solution.clamped, 0)  # type: ignore[assignment]
        stats.skipped = stats.skipped + ~finite
