"""The engine of every device: array operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gsgd import stages
from gsgd.coordinates import Coordinates
from gsgd.layout import convert, join, network_layout
from gsgd.network import Network
from gsgd.skeleton import batch_norm_gradients
from gsgd.torch.engines.base import CountingEngine, Step, to_device

Group = tuple[int, ...]


class ArrayEngine(CountingEngine):
    """Steps by the three stages of gsgd.stages on the tensors' own device, without waiting for it.

    Where something is not finite nothing is written: telling the caller would mean waiting for the device.

    Tensors of one dtype and one set of hyperparameters take a step together, as one vector: at their sizes an operation
    costs its launch. Their moments lie in vectors from then on, of which those in the optimizer's state are views.
    """

    name = "array"
    most = 2**22  # entries of a vector; larger tensors are not copied

    def __init__(self, net: Network, coordinates: Coordinates, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(net, tensors)
        self.arrays = dict(zip(tensors, self.aliases, strict=True))
        self.edges = coordinates.edges
        self.asarray = to_device(self.aliases[0].device)
        self.scale = stages.Scale.of(self.asarray, *coordinates.scale)
        self.key: tuple[list[int], list[bool]] | None = None
        self.groups: list[Group] = []
        self.weights: list[Any] = []
        self.vectors: dict[tuple[int, Group], tuple[list[Any], Tensor]] = {}
        self._arrange([0] * len(self.aliases), [True] * len(self.aliases))  # refuses what are no trees

    def step(self, step: Step) -> None:
        gradients, methods, which = self.checked(step.gradients), step.methods, step.which
        found, sums, norm = batch_norm_gradients(self.net, self.arrays, gradients, self.edges[0])
        norm = None if norm is None else torch.cat((norm, torch.ones_like(norm[:1])))
        self._arrange(which, [g is not None for g in gradients])
        new, solution = stages.step(
            self.layout,
            self.scale,
            self.weights,
            [self._of(found, group) for group in self.groups],
            [self._of(sums, group) for group in self.groups],
            norm,
            [(self._moment(0, group, step), self._moment(1, group, step)) for group in self.groups],
            [methods[which[group[0]]] for group in self.groups],
            step.max_ratio,
            None if math.isinf(step.clip_norm) else step.clip_norm,
            self.bounds,
        )
        for own, (value, _) in zip(self.weights, new, strict=True):
            if isinstance(own, list):
                torch._foreach_copy_(own, torch.split(value, [x.numel() for x in own]))
        self.count(solution.finite, solution.clamped, step)

    def _arrange(self, which: list[int], given: list[bool]) -> None:
        """Join the arrays that take a step alike, vectors first: several of these are like one."""
        if (which, given) == self.key:
            return
        self.key = list(which), list(given)
        self.vectors.clear()
        open_groups: dict[tuple[torch.dtype, int], list[int]] = {}
        groups = []
        for i in sorted(range(len(self.aliases)), key=lambda i: self.aliases[i].dim() != 1):
            p = self.aliases[i]
            if not given[i] or not 0 < p.numel() <= self.most or self.params[i].is_complex() or not _is_dense(p):
                groups.append([i])
                continue
            group = open_groups.get((p.dtype, which[i]))
            if group is None or sum(self.aliases[k].numel() for k in group) + p.numel() > self.most:
                group = open_groups[p.dtype, which[i]] = []
                groups.append(group)
            group.append(i)
        self.groups = list(map(tuple, groups))
        order = [i for group in groups for i in group]
        shapes = {self.names[i]: tuple(self.aliases[i].shape) for i in order}
        place = {i: k for k, i in enumerate(order)}
        t = join(
            network_layout(self.net, shapes, *self.edges),
            [tuple(place[i] for i in group) for group in groups],
            [self.aliases[i].stride() for i in order],
        )
        self.layout = convert(t, self.asarray)
        self.weights = [self._of(self.aliases, group) for group in self.groups]
        checked = [i for group in stages.unsummed(t, self.groups) for i in group]
        count = sum(given[i] and self.aliases[i].numel() > 0 for i in checked)
        self.bounds = stages.bounds_of(self.scale.c, [p.dtype for p in self.aliases], count)

    def _of(self, tensors: Sequence[Any], group: Group) -> Any:
        """A tensor, or those that are joined, as vectors."""
        if len(group) == 1:
            return tensors[group[0]]
        return [self._flat(tensors[i], i) for i in group]

    def _flat(self, x: Tensor, i: int) -> Tensor:
        """A tensor's entries in the order in which those of parameter i lie in memory."""
        return x.permute(_in_memory(self.aliases[i])).reshape(-1)

    def _moment(self, kind: int, group: Group, step: Step) -> Tensor | None:
        """The moments of a group; those that are joined become views of a vector."""
        moments = step.moments[kind]
        own: list[Any] = [moments[i] for i in group]
        if len(own) == 1 or own[0] is None:
            return moments[group[0]]
        known = self.vectors.get((kind, group))
        if known is not None and all(x is y for x, y in zip(known[0], own, strict=True)):
            return known[1]
        vector = torch.cat(self._of(moments, group))
        parts = torch.split(vector, [x.numel() for x in own])
        for i, x, part in zip(group, own, parts, strict=True):
            order = _in_memory(self.aliases[i])
            shape = [x.shape[axis] for axis in order]
            x.set_(part.view(shape).permute([order.index(axis) for axis in range(x.dim())]))
        self.vectors[kind, group] = own, vector
        return vector


def _in_memory(p: Tensor) -> list[int]:
    """The axes as they lie in memory, outermost first."""
    strides = p.stride()
    return sorted(range(p.dim()), key=lambda axis: -strides[axis])


def _is_dense(p: Tensor) -> bool:
    return p.permute(_in_memory(p)).is_contiguous()
