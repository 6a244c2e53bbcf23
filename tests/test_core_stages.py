"""The three stages of the C core as calls of their own: composed, they are the step, and so they are over shards."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import Array, Model, Params, models

import gsgd
from gsgd import _core
from gsgd.blocks import PINNED

Ids = np.ndarray[Any, np.dtype[np.int64]]

# rows of csrc/gsgd.h: method, lr, momentum, weight_decay, beta2, eps, correct_m, correct_v, nesterov, decoupled
METHODS: dict[str, tuple[list[float], bool, bool]] = {
    "sgd": ([0, 0.01, 0, 0, 0, 0, 1, 1, 0, 0], False, False),
    "momentum": ([0, 0.01, 0.9, 1e-2, 0, 0, 1, 1, 1, 0], True, False),
    "adam": ([1, 0.001, 0.9, 1e-2, 0.99, 1e-4, 1.3, 1.2, 0, 1], True, True),
    "rmsprop": ([2, 0.001, 0, 0, 0.9, 1e-3, 1, 1, 0, 0], False, True),
}
LIMITS = [(np.inf, np.inf), (1.5, 0.1)]  # max_ratio, clip_norm


@dataclass
class Whole:
    """A network's plan with its skeleton and scale, and a copy of everything that a step writes."""

    model: Model
    method: str
    dtype: type = np.float64

    def __post_init__(self) -> None:
        self.params: Params = {name: value.astype(self.dtype) for name, value in self.model.params.items()}
        self.weights = list(self.params.values())
        self.skeleton = gsgd.Skeleton(self.model.net, self.params, balanced=True)
        self.scale = (*self.skeleton.tree_weights(self.params), self.skeleton.c)
        self.plan = self.skeleton.plan
        self.plan.set_reference(*self.scale)
        row, has_m, has_v = METHODS[self.method]
        self.rates = np.array([row] * len(self.weights))
        self.m, self.v = ([np.zeros_like(w) if has else None for w in self.weights] for has in (has_m, has_v))

    def gradients(self, seed: int) -> list[Array]:
        rng = np.random.default_rng(seed)
        return [(0.1 * rng.standard_normal(w.shape)).astype(self.dtype) for w in self.weights]

    def written(self) -> list[Array]:
        return [x for x in (*self.weights, *self.m, *self.v) if x is not None]

    def step(self, gradients: list[Any], max_ratio: float, clip_norm: float) -> int:
        moments = self.m, self.v
        return int(self.plan.step(self.weights, gradients, None, None, *moments, self.rates, max_ratio, clip_norm, 1))

    def stages(self, gradients: list[Any], max_ratio: float, clip_norm: float) -> int:
        gathered = self.plan.gather(self.weights, gradients, None, self.m, self.v, clip_norm, None, 1)
        solved, clamped = self.plan.solve(gathered, None, self.rates, max_ratio, clip_norm)
        self.plan.apply(self.weights, gradients, self.m, self.v, self.rates, solved, 1)
        return int(clamped)


@given(models(), st.sampled_from([np.float32, np.float64]), st.sampled_from(list(METHODS)), st.sampled_from(LIMITS))
def test_a_step_is_its_three_stages(model: Model, dtype: type, method: str, limits: tuple[float, float]) -> None:
    """Bit for bit, for weights, moments, and the number of ratios that were limited."""
    one, other = Whole(model, method, dtype), Whole(model, method, dtype)
    for seed in range(3):
        gradients = one.gradients(seed)
        if seed == 1:
            gradients[-1] = None  # type: ignore[call-overload]
        raised: list[FloatingPointError] = []
        results: list[int] = []
        for run in (one.step, other.stages):
            try:
                results.append(run(gradients, *limits))
            except FloatingPointError as error:
                raised.append(error)
        assert len(raised) in (0, 2)
        assert results[:1] == results[1:]
        assert [e.args for e in raised[:1]] == [e.args for e in raised[1:]]
        for x, y in zip(one.written(), other.written(), strict=True):
            np.testing.assert_array_equal(x, y)


# shards


def split(array: Array, axis: int, ranks: int) -> list[slice]:
    """Where the ranks' parts lie along an axis: uneven, some of them empty."""
    ends = np.linspace(0, array.shape[axis], ranks + 1).astype(int)
    return [slice(a, b) for a, b in pairwise(ends)]


class Shard:
    """The part of a network that one of several ranks holds: arrays cut along an axis, or whole.

    Whole are those without that axis and every `uncut`-th; they are on all ranks, and the first counts them.
    """

    def __init__(self, whole: Whole, axis: int, rank: int, ranks: int, uncut: int = 100) -> None:
        net, (in_edges, out_edges) = whole.model.net, whole.skeleton.edge_arrays
        units, names = net.num_units, list(whole.params)
        self.parts: list[tuple[slice, ...]] = []
        counts = np.ones(len(names), dtype=bool)
        for i, w in enumerate(whole.weights):
            cut = axis < w.ndim and (i + 1) % uncut != 0
            counts[i] = cut or rank == 0
            self.parts.append((slice(None),) * axis + (split(w, axis, ranks)[rank],) if cut else ())
        self.specs: list[Any] = [
            (n, w[part].shape, w.dtype.char) for n, w, part in zip(names, whole.weights, self.parts, strict=True)
        ]
        ends = [self._ends(net, b, whole.params[b.name].shape) for b in net.blocks]
        self.blocks = [self._local(b, names.index(b.name), *ends[k]) for k, b in enumerate(net.blocks)]
        here = [np.full((units, 2), (-1, 0)) for _ in range(2)]
        source, destination, in_array = (np.full(units, x) for x in (PINNED, PINNED, -1))
        free_in = np.zeros(units, dtype=bool)
        for u in np.flatnonzero(in_edges[:, 0] >= 0):
            for tree, edges, other in ((0, in_edges, source), (1, out_edges, destination)):
                k, entry = edges[u]
                at = net.blocks[k].index(int(entry))
                other[u] = ends[k][1 - tree][at]
                here[tree][u] = k, self._entry(net.blocks[k], names.index(net.blocks[k].name), at)
                if here[tree][u, 1] < 0:
                    here[tree][u] = -1, 0
            in_array[u] = names.index(net.blocks[in_edges[u, 0]].name)
        for v in np.flatnonzero(source >= 0):
            free_in[v] = tuple(out_edges[source[v]]) == tuple(in_edges[v])
        self.plan = _core.Plan(units, self.specs, self.blocks)
        self.plan.set_shard(here[0], here[1], source, destination, in_array, free_in, counts)
        self.plan.set_reference(*whole.scale)
        self.weights = self.take(whole.weights)
        self.m, self.v = self.take(whole.m), self.take(whole.v)

    def take(self, arrays: list[Any]) -> list[Any]:
        return [None if a is None else a[part].copy() for a, part in zip(arrays, self.parts, strict=True)]

    @staticmethod
    def _ends(net: gsgd.Network, b: Any, shape: tuple[int, ...]) -> tuple[Ids, Ids]:
        """Unit ids of destination and source per entry of a parameter."""
        groups, rows, cols, *_ = b.extents
        assert groups == 1
        found = []
        for ids, at in ((b.rows.reshape(1, rows, 1, 1, 1, 1), 1), (b.cols.reshape(1, 1, cols, 1, 1, 1), 2)):
            assert ids.size == b.extents[at]
            of_entry = np.full(shape, PINNED)
            b.view(of_entry)[...] = ids
            found.append(of_entry)
        return found[0], found[1]

    def _axes(self, b: Any) -> tuple[int, list[int]]:
        """The axis of rows, and the others: the first of them has columns, possibly with taps."""
        row = b.dims[1].axis if b.dims[1].step else -1
        return row, [a for a in range(len(self.specs[self._number][1])) if a != row]

    def _local(self, b: Any, number: int, row_ids: Ids, col_ids: Ids) -> Any:
        self._number = number
        shape, part = self.specs[number][1], self.parts[number]
        row, others = self._axes(b)
        if b.dims[2].step:  # columns first
            others.sort(key=lambda a: a != b.dims[2].axis)
        axes = [0, max(row, 0), *others, *[0] * (4 - len(others))]
        steps = [0, int(row >= 0), *[1] * len(others), *[0] * (4 - len(others))]
        extents = [1, shape[row] if row >= 0 else 1, *(shape[a] for a in others), *[1] * (4 - len(others))]
        rows, cols = row_ids[part], col_ids[part]
        if rows.size:
            rows = np.moveaxis(rows, row, 0).reshape(extents[1], -1)[:, 0]
            cols = np.moveaxis(cols, others[0], 0).reshape(extents[2], -1)[:, 0] if others else cols.reshape(-1)[:1]
        else:
            rows, cols = np.full(extents[1], PINNED), np.full(extents[2], PINNED)
        return (number, tuple(extents), tuple(axes), tuple(steps), 0, 0, rows.copy(), cols.copy())

    def _entry(self, b: Any, number: int, at: tuple[int, ...]) -> int:
        """The entry of the local block at an index of the whole parameter, or -1."""
        local = list(at)
        for a, part in enumerate(self.parts[number]):
            if part.start is not None:
                if not part.start <= at[a] < part.stop:
                    return -1
                local[a] -= part.start
        _, extents, axes, steps, *_ = self.blocks[number]
        return int(np.ravel_multi_index([local[a] if s else 0 for a, s in zip(axes, steps, strict=True)], extents))


def total(shards: list[Shard], gradients: list[Array], clip_norm: float, trees: Any) -> Array:
    """The all-reduce of a step."""
    parts = [s.plan.gather(s.weights, s.take(gradients), None, s.m, s.v, clip_norm, trees, 1) for s in shards]
    return np.asarray(np.sum(parts, axis=0))


def dense_and_conv() -> Model:
    """Layers of both layouts, biases, a convolution that is read flattened, tied and free in-edges."""
    model = Model(0, 2, (2, 3))
    x = model.activation(model.conv(model.x, 4, (3, 3)), "relu")
    x = model.activation(model.add(x, model.conv(x, 4, (3, 1), layout="hwio"), "tie"), "relu")
    x = model.activation(model.dense(model.flatten(x, "channels_first"), 7), "relu")
    x = model.activation(model.dense(x, 2, layout="io"), "relu")
    x = model.activation(model.dense(x, 5, bias=False), "abs")
    return model.output(model.dense(x, 3))


@pytest.mark.parametrize(("ranks", "uncut"), [(2, 100), (3, 100), (3, 2), (2, 3), (9, 100)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("method", METHODS)
def test_shards_step_as_the_whole(method: str, limits: tuple[float, float], axis: int, ranks: int, uncut: int) -> None:
    """One sum of what all gather, the same solution everywhere; in clip_norm the tree weights of the step before."""
    whole = Whole(dense_and_conv(), method)
    shards = [Shard(whole, axis, rank, ranks, uncut) for rank in range(ranks)]
    trees: Any = np.stack([np.append(0, x) for x in whole.scale[:2]])
    for seed in range(5):
        gradients = whole.gradients(seed)
        clamped = whole.step(gradients, *limits)
        gathered = total(shards, gradients, limits[1], trees)
        np.testing.assert_array_equal(gathered[:2, 1:], trees[:2, 1:])
        found = [s.plan.solve(gathered, None, whole.rates, *limits) for s in shards]
        for s, (solved, count) in zip(shards, found, strict=True):
            np.testing.assert_array_equal(solved, found[0][0])
            assert count == clamped
            s.plan.apply(s.weights, s.take(gradients), s.m, s.v, whole.rates, solved, 1)
            for kind in ("weights", "m", "v"):
                for mine, right in zip(getattr(s, kind), s.take(getattr(whole, kind)), strict=True):
                    if mine is not None:
                        np.testing.assert_allclose(mine, right, rtol=1e-12, atol=1e-14)
        trees = found[0][0]


def test_what_is_not_finite_on_one_shard_is_known_to_all() -> None:
    whole = Whole(dense_and_conv(), "momentum")
    shards = [Shard(whole, 0, rank, 3) for rank in range(3)]
    for i in range(len(whole.weights)):
        gradients = whole.gradients(0)
        gradients[i].flat[-1] = np.nan
        gathered = total(shards, gradients, np.inf, None)
        for s in shards:
            with pytest.raises(FloatingPointError):
                s.plan.solve(gathered, None, whole.rates, np.inf, np.inf)
