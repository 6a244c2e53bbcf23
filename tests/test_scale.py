"""The balanced scale where it is hard to find: units that feed each other, depth, strides, what does not converge."""

from itertools import pairwise

import numpy as np
import pytest
from networks import Params
from oracles import Structure, balanced_scale, modulo_trees
from test_arrays import LAYOUTS, medium

import gsgd


def feeding(depth: int, width: int, seed: int) -> tuple[gsgd.Network, Params]:
    """A residual stream whose layers lead from its units to themselves; the diagonals weigh little."""
    net = gsgd.Network()
    h = net.dense("first", net.input(2), width)
    for i in range(depth):
        h = net.add(h, net.dense(f"inner{i}", h, width))
    net.output(net.dense("last", h, 2))
    rng = np.random.default_rng(seed)
    params = {name: rng.standard_normal(shape) * 10 ** rng.uniform(-1, 1, shape) for name, shape in net.shapes.items()}
    for i in range(depth):
        inner = params[f"inner{i}"]
        inner[...] = np.roll(np.diag(10 ** rng.uniform(0, 1, width)), 1, axis=1) + 1e-3 * inner
    return net, params


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width", [2, 3, 6])
def test_units_that_feed_each_other(width: int) -> None:
    """Each at its own minimum, all at once, would go to and fro for ever."""
    net, params = feeding(3, width, width)
    structure = Structure(net, *modulo_trees(net))
    desired = balanced_scale(structure, structure.pack(params))
    found = gsgd.Skeleton(net, params).balanced_scale(params)
    np.testing.assert_allclose(found, desired, rtol=1e-7)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("widths", [[5] * 301, [3, 70, 150, 2]], ids=["depth", "width"])
def test_norms_in_and_out_of_every_unit_agree(widths: list[int]) -> None:
    """Of many layers, of layers of many units, all of very different sizes."""
    rng = np.random.default_rng(0)
    params = {
        f"w{i}": rng.standard_normal(shape) * 10 ** rng.uniform(-1, 1)
        for i, shape in enumerate(zip(widths[1:], widths, strict=False))
    }
    gsgd.balance(params, gsgd.Network.sequential(params))
    weights = list(params.values())
    for before, after in pairwise(weights):
        np.testing.assert_allclose(np.square(before).sum(axis=1), np.square(after).sum(axis=0), rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strides_do_not_change_a_bit(dtype: type) -> None:
    net = medium()
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in net.shapes.items()}
    desired = gsgd.Skeleton(net, params).balanced_scale(params)
    for lay_out in LAYOUTS:
        other = {name: lay_out(value) for name, value in params.items()}
        assert (gsgd.Skeleton(net, other).balanced_scale(other) == desired).all()


def test_what_does_not_converge_is_told() -> None:
    """Squares that underflow leave nothing to balance."""
    params = {"w1": np.full((2, 2), 1e-200), "w2": np.ones((2, 2))}
    net = gsgd.Network.sequential(params)
    with pytest.warns(RuntimeWarning, match="did not converge"):
        gsgd.Skeleton(net, params).balanced_scale(params)
