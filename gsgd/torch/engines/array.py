"""The engine of every device: array operations."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gsgd import stages
from gsgd.coordinates import Coordinates
from gsgd.layout import convert, network_layout
from gsgd.methods import Method
from gsgd.network import Network
from gsgd.optimizer import Stats
from gsgd.skeleton import batch_norm_gradients
from gsgd.torch.engines.base import Engine, Tensors, to_device


class ArrayEngine(Engine):
    """Steps by the three stages of gsgd.stages on the tensors' own device, without waiting for it.

    Where something is not finite nothing is written: telling the caller would mean waiting for the device.
    """

    name = "array"

    def __init__(self, net: Network, coordinates: Coordinates, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(net, tensors)
        self.arrays = dict(zip(tensors, self.aliases, strict=True))
        asarray = to_device(self.aliases[0].device)
        shapes = {name: tuple(p.shape) for name, p in self.arrays.items()}
        self.layout = convert(network_layout(net, shapes, *coordinates.edges), asarray)
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
        self.write(pairs, new, solution, stats)
