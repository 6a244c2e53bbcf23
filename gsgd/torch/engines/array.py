"""The engine of every device: array operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from array_api_compat import array_namespace
from numpy.typing import NDArray
from torch import Tensor

from gsgd import stages
from gsgd.coordinates import Coordinates
from gsgd.entries import real_type
from gsgd.layout import convert, layout
from gsgd.methods import Method
from gsgd.network import Network
from gsgd.optimizer import Stats
from gsgd.skeleton import batch_norm_gradients
from gsgd.torch.engines.base import Engine, Tensors


class ArrayEngine(Engine):
    """Steps by the three stages of gsgd.stages on the tensors' own device, without waiting for it.

    Where something is not finite nothing is written: telling the caller would mean waiting for the device.
    """

    name = "array"

    def __init__(self, net: Network, coordinates: Coordinates, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(net, tensors)
        self.arrays = dict(zip(tensors, self.aliases, strict=True))
        device = self.aliases[0].device
        real = real_type(array_namespace(*self.aliases), device)

        def asarray(x: NDArray[Any]) -> Tensor:
            t = torch.from_numpy(np.ascontiguousarray(x))
            return (t.to(real) if t.is_floating_point() else t if t.dtype == torch.bool else t.long()).to(device)

        number = {name: i for i, name in enumerate(tensors)}
        blocks = [(number[b.name], b) for b in net.blocks]
        shapes = [tuple(p.shape) for p in self.aliases]
        self.layout = convert(layout(net.num_units, shapes, blocks, *coordinates.edges), asarray)
        self.in_edges = coordinates.in_edges
        self.scale = stages.Scale.of(asarray, *coordinates.scale)

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
        found, sums, norm = batch_norm_gradients(self.net, self.arrays, self.checked(gradients), self.in_edges)
        norm = None if norm is None else torch.cat((norm, torch.ones_like(norm[:1])))
        max_ratio, clip_norm = limits
        pairs = list(zip(*moments, strict=True))
        new, solution = stages.step(
            self.layout,
            self.scale,
            self.aliases,
            found,
            sums,
            norm,
            pairs,
            [methods[i] for i in which],
            max_ratio,
            None if math.isinf(clip_norm) else clip_norm,
        )
        finite = solution.finite
        for p, pair, (value, new_pair) in zip(self.aliases, pairs, new, strict=True):
            for old, x in zip((p, *pair), (value, *new_pair), strict=True):
                if old is not None and x is not old:
                    torch.where(finite, x, old, out=old)
        stats.steps += 1
        stats.clamped = stats.clamped + torch.where(finite, solution.clamped, 0)  # type: ignore[assignment]
        stats.skipped = stats.skipped + torch.where(finite, 0, 1)  # type: ignore[assignment]
