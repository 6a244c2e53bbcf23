"""Views of parameters, and the edges of a product, against enumeration of every entry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gsgd.trace.nodes import Algebra, NotUnderstood
from gsgd.trace.weights import Weight, layer, weight_view

Index = NDArray[np.int64]


def viewed(whole: Index, view: Index) -> Weight | None:
    strides = ([s // 8 for s in a.strides] for a in (whole, view))
    return weight_view("w", whole.shape, next(strides), view.shape, next(strides))


def entries(w: Weight) -> Index:
    """The parameter's flat index of every element of the view, from the description."""
    where = [np.zeros([1] * len(w.dims), dtype=np.int64) for _ in w.shape]
    for d, parts in enumerate(w.dims):
        place = np.arange(math.prod(part.extent for part in parts))
        index = np.unravel_index(place, [part.extent for part in parts]) if parts else ()
        for part, i in zip(parts, index, strict=True):
            view = [1] * len(w.dims)
            view[d] = -1
            where[part.axis] = where[part.axis] + part.step * i.reshape(view)
    return np.ravel_multi_index(np.broadcast_arrays(*where), w.shape) if w.shape else np.zeros((), np.int64)


@st.composite
def views(draw: st.DrawFn) -> tuple[Index, Index]:
    """A parameter whose entries are their own numbers, and a view of it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    whole = np.arange(math.prod(shape)).reshape(shape)
    view = whole
    for _ in range(draw(st.integers(0, 4))):
        possible = {
            "transpose": [0],
            "split": [d for d, n in enumerate(view.shape) if n % 2 == 0],
            "join": range(view.ndim - 1),
            "new": range(view.ndim + 1),
            "drop": [d for d, n in enumerate(view.shape) if n == 1],
            "cut": [d for d, n in enumerate(view.shape) if n > 1],
        }
        what = draw(st.sampled_from([name for name, dims in possible.items() if dims]))
        d = draw(st.sampled_from(possible[what]))
        if what == "transpose":
            view = view.transpose(draw(st.permutations(range(view.ndim))))
        elif what == "split":
            view = view.reshape(*view.shape[:d], 2, -1, *view.shape[d + 1 :])
        elif what == "join":
            view = view.reshape(*view.shape[:d], -1, *view.shape[d + 2 :])
        elif what == "new":
            view = np.expand_dims(view, d)
        elif what == "drop":
            view = view.squeeze(d)
        else:
            view = view[(slice(None),) * d + (draw(st.sampled_from([slice(1, None), slice(None, None, -1)])),)]
    assume(np.may_share_memory(view, whole))  # no copy was made
    return whole, view


@given(views())
def test_views_are_described_entry_by_entry(pair: tuple[Index, Index]) -> None:
    whole, view = pair
    w = viewed(whole, view)
    everything_in_order = view.size == whole.size and all(
        s > 0 for s, n in zip(view.strides, view.shape, strict=True) if n > 1
    )
    assert (w is not None) == everything_in_order
    if w is not None:
        assert (np.broadcast_to(entries(w), view.shape) == view).all()


@given(views(), st.data())
def test_every_entry_is_an_edge_of_the_product(pair: tuple[Index, Index], data: Any) -> None:
    """Rows, columns, groups and taps by what einsum would do, with one node per channel of the value."""
    whole, view = pair
    w = viewed(whole, view)
    assume(w is not None)
    assert w is not None
    roles = [data.draw(st.sampled_from(["row", "column", "group", "tap"])) for _ in view.shape]
    in_value = [d for d, role in enumerate(roles) if role in ("column", "group")]
    in_result = data.draw(st.permutations([d for d, role in enumerate(roles) if role in ("row", "group")]))
    in_value = data.draw(st.permutations([*in_value, 9]))  # 9: the batch
    extent = dict(enumerate(view.shape)) | {9: 2}
    on = Algebra("tie")
    shape = [extent[d] for d in in_value if d != 9]
    batch = in_value.index(9)
    nodes = np.expand_dims(on.net.nodes.new(math.prod(shape), "value").reshape(shape), batch)
    value = np.broadcast_to(nodes, [extent[d] for d in in_value])
    labels = [9, *in_result]
    try:
        made = layer(on, w, range(view.ndim), value, in_value, labels, [extent[d] for d in labels])
    except NotUnderstood:  # more parts than a block has places for
        return
    edges = {}
    for block in (part for described in on.net.layers.values() for part in described.parts):
        g, r, c, *taps = (d.extent for d in block.dims)
        for index in np.ndindex(g, r, c, *taps):
            where = [0] * whole.ndim
            where[block.start[0]] += block.start[1]
            for dim, i in zip(block.dims, index, strict=True):
                where[dim.axis] += dim.step * i
            entry = int(whole[tuple(where)])
            assert entry not in edges
            edges[entry] = int(block.rows[index[0] * r + index[1]]), int(block.cols[index[0] * c + index[2]])
    for index in np.ndindex(view.shape):
        at = dict(enumerate(index)) | {9: 0}
        expected = int(made[tuple(at[d] for d in labels)]), int(value[tuple(at[d] for d in in_value)])
        assert edges.pop(int(view[index])) == expected
    assert not edges


@pytest.mark.parametrize("strides", [(1, 3), (4, 1), (1, 4)])
def test_parameters_of_any_memory_layout(strides: tuple[int, int]) -> None:
    """PyTorch's parameters need not be contiguous: channels last, or part of a larger buffer."""
    shape = (3, 4)
    same = weight_view("w", shape, strides, shape, strides)
    turned = weight_view("w", shape, strides, shape[::-1], strides[::-1])
    assert same is not None
    assert turned is not None
    assert (same.axes, turned.axes) == ((0, 1), (1, 0))
    assert weight_view("w", shape, strides, (2, 4), strides) is None
