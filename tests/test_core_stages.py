"""The three stages of the C core as calls of their own: composed, they are the step, and so they are over shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import Array, Model, Params, models

import gsgd
from gsgd import core_shard
from gsgd.core_shard import shard_plan
from gsgd.layout import network_layout, part

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
            gradients[-1] = None
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


class Shard:
    """The part of a network that one of several ranks holds: arrays cut along an axis, or whole.

    Parts are uneven, some of them empty, and every second entry is on another rank where they are `mixed`. Whole are
    arrays without that axis and every `uncut`-th; they are on all ranks, and the first counts them.
    """

    def __init__(self, whole: Whole, axis: int, rank: int, ranks: int, uncut: int = 100, mixed: bool = False) -> None:
        self.parts: list[tuple[Ids, ...]] = []
        counts = []
        for i, w in enumerate(whole.weights):
            index = [np.arange(n) for n in w.shape]
            cut = axis < w.ndim and (i + 1) % uncut != 0
            if cut:
                ends = np.linspace(0, w.shape[axis], ranks + 1).astype(int)
                index[axis] = index[axis][rank::ranks] if mixed else index[axis][ends[rank] : ends[rank + 1]]
            counts.append(cut or rank == 0)
            self.parts.append(tuple(index))
        self.weights = self.take(whole.weights)
        self.m, self.v = self.take(whole.m), self.take(whole.v)
        shapes = {name: w.shape for name, w in whole.params.items()}
        t = part(network_layout(whole.model.net, shapes, *whole.skeleton.edge_arrays), self.parts)
        self.plan = shard_plan(t, dict(zip(shapes, self.weights, strict=True)), counts)
        self.plan.set_reference(*whole.scale)

    def take(self, arrays: list[Any]) -> list[Any]:
        return [None if a is None else a[np.ix_(*own)] for a, own in zip(arrays, self.parts, strict=True)]


def total(shards: list[Shard], gradients: list[Array], clip_norm: float, trees: Any) -> Array:
    """The all-reduce of a step."""
    parts = [s.plan.gather(s.weights, s.take(gradients), None, s.m, s.v, clip_norm, trees, 1) for s in shards]
    return np.asarray(np.sum(parts, axis=0))


def steps_alike(whole: Whole, shards: list[Shard], limits: tuple[float, float]) -> None:
    """One sum of what all gather, the same solution everywhere; in clip_norm the tree weights of the step before."""
    trees: Any = np.stack([np.append(0, x) for x in whole.scale[:2]])
    for seed in range(3):
        gradients = whole.gradients(seed)
        clamped = whole.step(gradients, *limits)
        gathered = total(shards, gradients, limits[1], trees)
        has_edges = gathered[:2, 1:] != 0
        np.testing.assert_array_equal(gathered[:2, 1:][has_edges], trees[:2, 1:][has_edges])
        found = [s.plan.solve(gathered, None, whole.rates, *limits) for s in shards]
        for s, (solved, count) in zip(shards, found, strict=True):
            np.testing.assert_array_equal(solved, found[0][0])
            assert count == clamped
            s.plan.apply(s.weights, s.take(gradients), s.m, s.v, whole.rates, solved, 1)
            for kind in ("weights", "m", "v"):
                for mine, right in zip(getattr(s, kind), s.take(getattr(whole, kind)), strict=True):
                    if mine is not None:
                        np.testing.assert_allclose(mine, right, rtol=1e-11, atol=1e-13)
        trees = found[0][0]


@given(
    models(),
    st.sampled_from(list(METHODS)),
    st.sampled_from(LIMITS),
    st.integers(0, 3),
    st.integers(2, 4),
    st.sampled_from([2, 3, 100]),
    st.booleans(),
)
def test_shards_step_as_the_whole(
    model: Model, method: str, limits: tuple[float, float], axis: int, ranks: int, uncut: int, mixed: bool
) -> None:
    """Groups, taps, flattened images, fused rows: cut along any axis."""
    whole = Whole(model, method)
    steps_alike(whole, [Shard(whole, axis, rank, ranks, uncut, mixed) for rank in range(ranks)], limits)


def dense_and_conv() -> Model:
    """Layers of both layouts, biases, a convolution that is read flattened, tied and free in-edges."""
    model = Model(0, 2, (2, 3))
    x = model.activation(model.conv(model.x, 4, (3, 3)), "relu")
    x = model.activation(model.add(x, model.conv(x, 4, (3, 1), layout="hwio"), "tie"), "relu")
    x = model.activation(model.dense(model.flatten(x, "channels_first"), 7), "relu")
    x = model.activation(model.dense(x, 2, layout="io"), "relu")
    x = model.activation(model.dense(x, 5, bias=False), "abs")
    return model.output(model.dense(x, 3))


@pytest.mark.parametrize(("ranks", "uncut"), [(3, 2), (9, 100)])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("method", METHODS)
def test_shards_of_every_method(method: str, limits: tuple[float, float], ranks: int, uncut: int) -> None:
    for axis in (0, 1):
        whole = Whole(dense_and_conv(), method)
        steps_alike(whole, [Shard(whole, axis, rank, ranks, uncut) for rank in range(ranks)], limits)


def test_a_dense_layer_is_rows_and_columns_whatever_it_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan holds a sum for every column and tap: were pinned rows taps, that would be one for every weight."""
    model = Model(0, 4)
    whole = Whole(model.output(model.dense(model.activation(model.dense(model.x, 7), "relu"), 3)), "sgd")
    blocks: list[Any] = []
    plan = core_shard._core.Plan
    monkeypatch.setattr(core_shard._core, "Plan", lambda *args: blocks.extend(args[2]) or plan(*args))
    Shard(whole, 0, 0, 1)
    assert [extents for number, extents, *_ in blocks if number == 2] == [(1, 3, 7, 1, 1, 1)]


def test_solved_tree_weights_are_those_that_will_be_read() -> None:
    """Also where weights are float32: with clip_norm, the next gather relies on them."""
    whole = Whole(dense_and_conv(), "momentum", np.float32)
    gradients = whole.gradients(0)
    given = (whole.weights, gradients, None, whole.m, whole.v, np.inf, None, 1)
    solved, _ = whole.plan.solve(whole.plan.gather(*given), None, whole.rates, np.inf, np.inf)
    whole.plan.apply(whole.weights, gradients, whole.m, whole.v, whole.rates, solved, 1)
    np.testing.assert_array_equal(whole.plan.gather(*given)[:2, 1:], solved[:2, 1:])


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
