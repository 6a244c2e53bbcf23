"""How weights lie in arrays: tables of the order of units, lines and positions, against the blocks that they are of."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from networks import Model, models

import gsgd
from gsgd import layout
from gsgd.layout import IN, OUT, lines


def of(model: Model) -> tuple[layout.Layout, gsgd.Skeleton]:
    skeleton = gsgd.Skeleton(model.net, model.params)
    number = {name: i for i, name in enumerate(model.params)}
    blocks = [(number[b.name], b) for b in model.net.blocks]
    shapes = [w.shape for w in model.params.values()]
    return layout.layout(model.net.num_units, shapes, blocks, *skeleton.edge_arrays), skeleton


@given(model=models())
def test_every_entry_knows_its_units_and_every_unit_its_edges(model: Model) -> None:
    t, skeleton = of(model)
    net, units = model.net, model.net.num_units
    pinned = np.append(skeleton.edge_arrays[0][:, 0] < 0, True)
    for i, (name, w) in enumerate(model.params.items()):
        a = t.arrays[i]
        for span, table, side in ((a.rows, t.rows, "rows"), (a.cols, t.cols, "cols")):
            ids = np.full(w.shape, units)
            for b in net.blocks:
                if b.name == name:
                    g, r, c = b.extents[:3]
                    own = getattr(b, side).reshape((g, r, 1, 1, 1, 1) if side == "rows" else (g, 1, c, 1, 1, 1))
                    b.view(ids)[...] = np.where(pinned[own], units, own)
            found = np.full(a.shape, units) if span is None else np.broadcast_to(span.of(np, table), a.shape)
            np.testing.assert_array_equal(found.reshape(w.shape), ids)
            assert span is not None or (ids == units).all()
        owners = a.edges.of(np, t.owner).tolist()
        for owner, *index in zip(owners, *a.index, strict=True):
            v, tree = (owner, skeleton.in_edges) if owner <= units else (owner - units - 1, skeleton.out_edges)
            assert tree[v] == (name, tuple(index))
    for tree, edges in ((IN, skeleton.in_edges), (OUT, skeleton.out_edges)):
        for v, edge in enumerate(edges):
            if edge is None:
                assert t.edge[tree, v] == len(t.owner)
                continue
            at = t.edge[tree, v]
            (i,) = (i for i, a in enumerate(t.arrays) if a.edges.start <= at < a.edges.stop)
            assert (
                list(model.params)[i],
                tuple(int(x[at - t.arrays[i].edges.start]) for x in t.arrays[i].index),
            ) == edge


@given(model=models(), data=st.data())
def test_a_part_of_the_arrays_has_the_units_and_edges_of_the_whole(model: Model, data: st.DataObject) -> None:
    t, _ = of(model)
    units = model.net.num_units
    held = []
    for name, w in model.params.items():
        some = [data.draw(st.sets(st.integers(0, n - 1)), label=name) for n in w.shape]
        held.append(tuple(np.array(sorted(x), dtype=np.int64) for x in some))
    here = layout.part(t, held)
    for w, own, a, b in zip(model.params.values(), held, t.arrays, here.arrays, strict=True):
        of_units = []
        for whole, part, tables in ((a.rows, b.rows, (t.rows, here.rows)), (a.cols, b.cols, (t.cols, here.cols))):
            ids = np.full(a.shape, units) if whole is None else np.broadcast_to(whole.of(np, tables[0]), a.shape)
            found = np.full(b.shape, units) if part is None else np.broadcast_to(part.of(np, tables[1]), b.shape)
            of_units.append(ids.reshape(w.shape)[np.ix_(*own)] if own else ids)
            np.testing.assert_array_equal(found, of_units[-1])
        edges = [
            {
                (owner, *index)
                for owner, *index in zip(x.edges.of(np, y.owner).tolist(), *map(list, x.index), strict=True)
            }
            for x, y in ((a, t), (b, here))
        ]
        inside = {(v, *index) for v, *index in edges[0] if all(i in k for i, k in zip(index, own, strict=True))}
        assert inside == {(v, *(int(k[i]) for i, k in zip(index, own, strict=True))) for v, *index in edges[1]}
        owners = b.edges.of(np, here.owner)
        for places, span, expected in ((b.chain, b.rows, owners <= units), (b.free, b.cols, owners > units)):
            numbers = [] if places is None else sorted(places.edge[places.edge >= 0])
            assert numbers == (np.flatnonzero(expected).tolist() if span is not None else [])


@given(model=models(), data=st.data())
def test_lines_are_the_array_as_it_lies_in_memory(model: Model, data: st.DataObject) -> None:
    t, _ = of(model)
    for i, (name, w) in enumerate(model.params.items()):
        axes = data.draw(st.permutations(range(w.ndim)), label=name)
        gap = data.draw(st.integers(0, 2))
        whole = np.zeros([w.shape[axis] + (gap if k == len(axes) - 1 else 0) for k, axis in enumerate(axes)])
        strides = [whole.strides[axes.index(axis)] // 8 for axis in range(w.ndim)]
        place = np.zeros(w.shape, int)
        for axis, n in enumerate(w.shape):
            place += strides[axis] * np.arange(n).reshape([-1 if k == axis else 1 for k in range(w.ndim)])
        found = lines(t, i, strides)
        if found is None:
            assert axes != sorted(axes) or gap
            continue
        a, seen = t.arrays[i], 0 * place - 1
        flat = {int(p): k for k, p in enumerate(place.reshape(-1))}
        units = len(t.root) - 1
        own = [
            np.full(w.shape, units) if x is None else np.broadcast_to(x.of(np, ids), a.shape).reshape(w.shape)
            for x, ids in ((a.rows, t.rows), (a.cols, t.cols))
        ]
        edges = []
        for part in found:
            at = np.add.outer(part.strides[0] * np.arange(part.shape[0]), part.strides[1] * np.arange(part.shape[1]))
            entries = np.vectorize(flat.__getitem__)(part.start + at)
            seen.reshape(-1)[entries] = 0
            for ids, axis, expected in zip((part.rows, part.cols), (part.row_axis, part.col_axis), own, strict=True):
                table = np.broadcast_to(ids[:, None] if axis == 0 else ids[None, :], part.shape)
                np.testing.assert_array_equal(table, expected.reshape(-1)[entries])
            edges += [(k, entries[line, position]) for k, line, position in part.edges.T]
        assert (seen == 0).all()
        index = np.ravel_multi_index(a.index, w.shape) if w.ndim else []
        assert sorted(edges) == list(enumerate(index, a.edges.start))
        assert sum(len(part.rows) + len(part.cols) for part in found) <= 2 * sum(sum(part.shape) for part in found)
