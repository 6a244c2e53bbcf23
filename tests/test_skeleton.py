"""Skeleton construction, inverse chain rule and weight allocation, each by itself, against enumeration."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import Model, mlp, models
from oracles import Structure, all_paths, consistent_gradients, modulo_trees

import gsgd

Rule = Literal["modulo", "largest"]
rules = st.sampled_from(["modulo", "largest"])


def skeleton(model: Model, rule: Rule, backend: str) -> tuple[gsgd.Skeleton, Structure]:
    sk = gsgd.Skeleton(model.net, model.params, rule=rule, backend=backend)
    return sk, Structure(model.net, sk.in_edges, sk.out_edges)


def close(actual: np.ndarray, desired: np.ndarray) -> None:
    np.testing.assert_allclose(actual, desired, rtol=1e-9, atol=1e-9 * np.abs(desired).max(initial=0))


@given(models(max_parts=2), rules)
def test_basis_paths(backend: str, model: Model, rule: Rule) -> None:
    """As many as the rank of the structure matrix of all paths, whose columns they span."""
    assume(gsgd.path_norm({name: np.ones(w.shape) for name, w in model.params.items()}, model.net, 1) <= 2000)  # paths
    sk, structure = skeleton(model, rule, backend)
    units = sum(edge is not None for edge in sk.in_edges)
    matrix = sk.enumerate_paths()
    rank = np.linalg.matrix_rank(matrix)
    assert rank == model.net.num_weights - units == structure.counts.shape[1]
    assert (
        rank == np.linalg.matrix_rank(structure.counts) == np.linalg.matrix_rank(np.hstack((matrix, structure.counts)))
    )
    if units == model.net.num_units:
        assert sorted(map(tuple, (np.flatnonzero(column) for column in matrix.T))) == sorted(all_paths(model.net))
    assert {name: mask.shape for name, mask in sk.free.items()} == model.net.shapes
    assert (structure.pack(sk.free) == structure.free).all()
    assert structure.free.sum() == units


@given(models(zeros=False))
def test_modulo_is_the_papers_diagonal(backend: str, model: Model) -> None:
    sk, _ = skeleton(model, "modulo", backend)
    in_edges, out_edges = modulo_trees(model.net)
    assert list(sk.in_edges) == in_edges
    assert list(sk.out_edges) == out_edges


def test_largest_takes_the_largest(backend: str) -> None:
    model = mlp(4, 5, 3, 2, bias=False)
    sk, _ = skeleton(model, "largest", backend)
    weights = list(model.params.items())
    for unit in range(8):
        layer, i = (0, unit) if unit < 5 else (1, unit - 5)
        (before, w_in), (after, w_out) = weights[layer], weights[layer + 1]
        assert sk.in_edges[unit] == (before, (i, np.abs(w_in[i]).argmax()))
        assert sk.out_edges[unit] == (after, (np.abs(w_out[:, i]).argmax(), i))


def test_edges_are_of_the_first_layer_that_writes_and_the_last_that_reads(backend: str) -> None:
    net = gsgd.Network()
    x = net.input(2)
    h = net.relu(net.add(net.dense("first", x, 3), net.dense("second", x, 3)))
    net.output(net.add(net.dense("last but one", h, 2), net.dense("last", h, 2)))
    sk = gsgd.Skeleton(net, {name: np.ones(shape) for name, shape in net.shapes.items()}, backend=backend)
    assert [edge and edge[0] for edge in sk.in_edges] == ["first"] * 3
    assert [edge and edge[0] for edge in sk.out_edges] == ["last"] * 3


@given(models(), rules)
def test_path_values_and_gradients(backend: str, model: Model, rule: Rule) -> None:
    sk, structure = skeleton(model, rule, backend)
    w = structure.pack(model.params)
    grads = model.gradients(model.params)
    for mine, desired in (
        (sk.path_values(model.params), structure.path_values(w)),
        (sk.path_gradients(model.params, grads), structure.path_gradients(w, structure.pack(grads))),
    ):
        assert {name: value.shape for name, value in mine.items()} == model.net.shapes
        flat = structure.pack(mine)
        assert np.isnan(flat[structure.free]).all()
        close(flat[structure.moving], desired)


@given(models(), rules, st.integers(0, 2**16))
def test_weight_allocation(backend: str, model: Model, rule: Rule, seed: int) -> None:
    sk, structure = skeleton(model, rule, backend)
    w = structure.pack(model.params)
    ratios = np.exp(np.random.default_rng(seed).uniform(-1, 1, structure.size))
    ratios[structure.free] = np.nan
    before = model.copy()
    new = structure.pack(sk.allocate(model.params, structure.unpack(ratios)))
    assert all((model.params[name] == value).all() for name, value in before.items())
    assert (new[structure.free] == w[structure.free]).all()
    v = structure.path_values(w) * ratios[structure.moving]
    close(new, structure.allocate(w, v))
    close(structure.path_values(new), v)


@given(models(), rules, st.integers(0, 2**16))
def test_as_many_weights_move_as_there_are_basis_paths(backend: str, model: Model, rule: Rule, seed: int) -> None:
    params = model.copy()
    sk, structure = skeleton(model, rule, backend)
    w = structure.pack(params)
    opt = gsgd.GSGD(params, model.net, lr=1e-3, rule=rule, scale="initial", backend=backend)
    opt.step(structure.unpack(consistent_gradients(structure, w, np.random.default_rng(seed))))
    moved = structure.pack(params) != w
    assert (moved == ~structure.free).all()
    assert moved.sum() == sk.num_basis_paths


def test_ragged_widths_have_26_degrees_of_freedom(backend: str) -> None:
    model = mlp(3, 4, 2, 4, 2, bias=False)
    sk, _ = skeleton(model, "modulo", backend)
    assert np.linalg.matrix_rank(sk.enumerate_paths()) == 26


def test_a_zero_weight_is_no_skeleton_weight(backend: str) -> None:
    model = mlp(3, 4, 4, 2, bias=False)
    first, second, _ = model.params
    model.params[first][1, 1] = 0  # the diagonal candidate of unit 1
    model.params[second][2, :] = 0  # all in-edges of unit 4 + 2
    for rule in ("modulo", "largest"):
        sk, _ = skeleton(model, rule, backend)
        name, at = sk.in_edges[1]
        assert name == first
        assert model.params[first][at] != 0
        assert sk.in_edges[6] is None
        assert sk.out_edges[6] is None
        assert sum(edge is None for edge in sk.in_edges) == 1


@given(models(zeros=False), rules)
def test_units_without_edges_are_forgotten_with_their_trees(backend: str, model: Model, rule: Rule) -> None:
    """A plan that had trees of weights with zeros chooses and takes those of others as a new one does."""
    params = model.copy()
    for w in params.values():
        w[model.rng.random(w.shape) < 0.4] = 0
    weights, largest = list(model.params.values()), rule == "largest"
    plan, fresh = (gsgd.Skeleton(model.net, p, backend=backend).plan for p in (params, model.params))
    edges, expected = (p.choose_trees(weights, largest, None) for p in (plan, fresh))
    np.testing.assert_array_equal(edges, expected)
    plan = gsgd.Skeleton(model.net, params, backend=backend).plan
    np.testing.assert_array_equal(plan.set_trees(*expected), fresh.set_trees(*expected))


def test_depth_where_products_underflow(backend: str) -> None:
    """36 layers whose tree weights are 0.05: products of 1e-47 in float32, that only logarithms can tell."""
    model = mlp(*[3] * 37, bias=False)
    for value in model.params.values():
        np.fill_diagonal(value, 0.05)
    params = {name: value.astype(np.float32) for name, value in model.params.items()}
    sk = gsgd.Skeleton(model.net, params, backend=backend)
    signs, logs = sk.log_path_values(params)
    first, last = next(iter(params)), list(params)[-1]
    assert logs[first][0, 0] == pytest.approx(36 * np.log(0.05), rel=1e-6)
    assert signs[first][0, 0] == 1
    assert np.isnan(logs[last][0, 0])
    assert logs[last][1, 0] == pytest.approx(35 * np.log(0.05) + np.log(abs(params[last][1, 0])), rel=1e-6)
    assert signs[last][1, 0] == np.sign(params[last][1, 0])
