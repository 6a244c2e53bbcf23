"""The mathematics by brute force: enumeration of basis paths, automatic differentiation in path coordinates.

Weights are flat vectors of all m entries, in the order of the description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from networks import Model
from numpy.typing import NDArray
from torch import Tensor

import gsgd

Array = NDArray[Any]
Tree = Sequence[tuple[str, tuple[int, ...]] | None]


class Structure:
    """Every weight's basis path, by following the trees.

    Attributes
    ----------
    src, dst : (m,) int
        Each weight's units, -1 where pinned.
    into, out : (H,) int
        Each unit's tree weights, -1 where the skeleton pinned the unit.
    free, chain : (m,) bool
        Free weights, and in-edges that are not free.
    counts : (m, m - H) int
        The structure matrix: how often weight e lies on the basis path of the p-th weight that is not free.
    """

    def __init__(self, net: gsgd.Network, in_edges: Tree, out_edges: Tree) -> None:
        self.shapes = net.shapes
        ends = np.cumsum([_size(shape) for shape in self.shapes.values()])
        self.offset = {n: int(end) - _size(s) for (n, s), end in zip(self.shapes.items(), ends, strict=True)}
        self.size = net.num_weights
        self.src, self.dst = edges(net)
        self.into, self.out = (
            np.array([-1 if e is None else self.flat(*e) for e in tree], dtype=int) for tree in (in_edges, out_edges)
        )
        assert ((self.into < 0) == (self.out < 0)).all()
        for ends in (self.src, self.dst):
            ends[np.append(self.into < 0, True)[ends]] = -1
        units = np.flatnonzero(self.into >= 0)
        assert (self.dst[self.into[units]] == units).all()
        assert (self.src[self.out[units]] == units).all()
        self.free = np.zeros(self.size, dtype=bool)
        self.free[self.out[units]] = True
        self.chain = np.zeros(self.size, dtype=bool)
        self.chain[self.into[units]] = True
        self.chain &= ~self.free
        self.ordinary = ~self.free & ~self.chain
        self.moving = np.flatnonzero(~self.free)
        self.counts = np.zeros((self.size, len(self.moving)), dtype=int)
        for p, e in enumerate(self.moving):
            for f in (*self.walk_in(self.src[e]), e, *self.walk_out(self.dst[e])):
                self.counts[f, p] += 1

    def flat(self, name: str, index: tuple[int, ...]) -> int:
        return self.offset[name] + int(np.ravel_multi_index(index, self.shapes[name]))

    def walk_in(self, unit: int) -> Iterator[int]:
        """The tree weights from `unit` back to a pinned source."""
        for _ in range(len(self.into) + 1):
            if unit < 0:
                return
            yield self.into[unit]
            unit = self.src[self.into[unit]]
        raise AssertionError("the in-tree has a cycle")

    def walk_out(self, unit: int) -> Iterator[int]:
        """The tree weights from `unit` on to a pinned destination."""
        for _ in range(len(self.out) + 1):
            if unit < 0:
                return
            yield self.out[unit]
            unit = self.dst[self.out[unit]]
        raise AssertionError("the out-tree has a cycle")

    def pack(self, params: Mapping[str, Any]) -> Array:
        return np.concatenate([np.ravel(params[name]) for name in self.shapes])

    def unpack(self, flat: Array) -> dict[str, Array]:
        return {n: flat[self.offset[n] : self.offset[n] + _size(s)].reshape(s) for n, s in self.shapes.items()}

    def path_values(self, w: Array) -> Array:
        """The values of all basis paths, shape (m - H,)."""
        return np.prod(w[:, None] ** self.counts, axis=0)

    def jacobian(self, w: Array) -> Array:
        """dv_p / dw_e, shape (m, m - H), right where weights are zero too."""
        zero = w == 0
        others = np.prod(np.where(zero, 1.0, w)[:, None] ** self.counts, axis=0) / np.where(zero, 1.0, w)[:, None]
        zeros = zero.astype(int) @ self.counts  # on every path; a slope is left where they are 0, or 1 and the weight's
        return np.where(zeros == zero[:, None], self.counts * others, 0.0)

    def path_gradients(self, w: Array, g: Array) -> Array:
        """Inverse chain rule: dl/dv of the linear system dl/dw_e = sum over p of dl/dv_p dv_p/dw_e."""
        jacobian = self.jacobian(w)
        dv = np.linalg.lstsq(jacobian, g, rcond=None)[0]
        np.testing.assert_allclose(jacobian @ dv, g, rtol=1e-8, atol=1e-10 * (1e-30 + np.abs(g).max()))
        return dv

    def allocate(self, w: Array, v: Array) -> Array:
        """Weight allocation: the weights of path values `v` that leave the free ones, a linear system of logarithms."""
        zero = v == 0
        moving, counts = self.moving, self.counts
        rhs = np.log(np.abs(np.where(zero, 1.0, v))) - counts[self.free].T @ np.log(np.abs(w[self.free]))
        new = w.copy()
        negative = (v < 0).astype(int) + counts[self.free].T @ (w[self.free] < 0)
        signs = np.rint(np.linalg.inv(counts[moving].T)).astype(int) @ negative  # the same system, modulo 2
        new[moving] = np.where(zero, 0.0, np.exp(np.linalg.solve(counts[moving].T, rhs))) * (-1.0) ** (signs % 2)
        return new

    def reference_scale(self, w: Array, c: Array) -> Array:
        """The constants k of the coordinates x_p = k_p v_p (method, section 4), from the weights at construction."""
        c = np.append(c, 1.0)
        k = np.empty(self.size)
        for e in self.moving:
            u, v = self.src[e], self.dst[e]
            if self.chain[e]:
                k[e] = 1 / np.prod(w[[*self.walk_in(v), *self.walk_out(v)]])
            else:
                k[e] = c[v] / c[u] / np.prod(w[[*self.walk_in(u), *self.walk_out(v)]])
        return k[self.moving]

    def rebuild(self, w: Array, v: Tensor) -> Tensor:
        """The weights of path values `v`, differentiably: a walk over the trees instead of a linear system."""
        value = dict(zip(self.moving.tolist(), v, strict=True))
        new = {e: torch.tensor(w[e]) for e in np.flatnonzero(self.free)}
        product = {-1: torch.ones((), dtype=torch.float64)}

        def onward(unit: int) -> float:
            return float(np.prod(w[list(self.walk_out(unit))]))

        def a(unit: int) -> Tensor:
            if unit not in product:
                e = int(self.into[unit])
                before = a(int(self.src[e]))
                product[unit] = before * new[e] if self.free[e] else value[e] / onward(unit)
                if not self.free[e]:
                    new[e] = product[unit] / before
            return product[unit]

        for unit in np.flatnonzero(self.into >= 0):
            a(int(unit))
        for e in np.flatnonzero(self.ordinary):
            new[e] = value[e] / (a(int(self.src[e])) * onward(int(self.dst[e])))
        return torch.stack([new[e] for e in range(self.size)])


class Descent:
    """Stochastic gradient descent in the path coordinates x = k v, by brute force.

    Parameters
    ----------
    loss : callable or None
        From flat weights to a scalar: dl/dx is by autograd through `Structure.rebuild`. None: by enumeration.
    max_ratio, clip_norm : float
        Limits on the magnitudes of chain ratios and on the norm of dl/dx; infinity is none.
    """

    def __init__(
        self,
        structure: Structure,
        k: Array,
        loss: Callable[[Tensor], Tensor] | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        max_ratio: float = np.inf,
        clip_norm: float = np.inf,
    ) -> None:
        self.structure, self.k, self.loss = structure, k, loss
        self.max_ratio, self.clip_norm = max_ratio, clip_norm
        self.ratios = np.ones(0)
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.moment = np.zeros(len(k))
        self.clamped = 0

    def step(self, w: Array, g: Array, lr: float) -> Array:
        structure, k = self.structure, self.k
        x = k * structure.path_values(w)
        if self.loss is None:
            slope = structure.path_gradients(w, g) / k
        else:
            leaf = torch.tensor(x, requires_grad=True)
            loss = self.loss(structure.rebuild(w, leaf / torch.tensor(k)))
            slope = torch.autograd.grad(loss, leaf)[0].numpy()
        slope = slope * min(1.0, self.clip_norm / (np.linalg.norm(slope) + 1e-6))
        ordinary, chain = structure.ordinary[structure.moving], structure.chain[structure.moving]
        slope = slope + self.weight_decay * np.where(ordinary, x, 0.0)
        self.moment = self.momentum * self.moment + slope
        new = x - lr * (slope + self.momentum * self.moment if self.nesterov else self.moment)
        self.ratios = ratio = new[chain] / x[chain]
        limited = np.where(ratio < 0, -1, 1) * np.clip(np.abs(ratio), 1 / self.max_ratio, self.max_ratio)
        self.clamped += int((ratio != limited).sum())
        new[chain] = x[chain] * limited
        if self.loss is None:
            return structure.allocate(w, new / k)
        return structure.rebuild(w, torch.tensor(new / k)).numpy()


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def edges(net: gsgd.Network, nodes: bool = False) -> tuple[Array, Array]:
    """Source and destination unit (or node) of every weight."""
    ends: dict[str, tuple[Array, Array]] = {n: (np.empty(s, int), np.empty(s, int)) for n, s in net.shapes.items()}
    for block in net.blocks:
        groups, rows, cols = block.extents[:3]
        src, dst = (block.col_nodes, block.row_nodes) if nodes else (block.cols, block.rows)
        at = block.view(np.arange(_size(net.shapes[block.name])).reshape(net.shapes[block.name]))
        ends[block.name][0].reshape(-1)[at] = src.reshape(groups, 1, cols, 1, 1, 1)
        ends[block.name][1].reshape(-1)[at] = dst.reshape(groups, rows, 1, 1, 1, 1)
    return tuple(np.concatenate([ends[n][i].ravel() for n in net.shapes]) for i in (0, 1))


def modulo_trees(net: gsgd.Network) -> tuple[Tree, Tree]:
    """The paper's skeleton of weights that are all non-zero: first writer, last reader, diagonals, centre taps."""

    def pick(unit: int, blocks: Sequence[gsgd.network.Block], writes: bool) -> tuple[str, tuple[int, ...]]:
        for block in blocks:
            _, rows, cols = block.extents[:3]
            ids, mine, others = (block.rows, rows, cols) if writes else (block.cols, cols, rows)
            if unit in ids:
                group, i = divmod(int(np.flatnonzero(ids == unit)[0]), mine)
                r, c = (i, i % others) if writes else (i % others, i)
                taps = (t // 2 for t in block.extents[3:])
                return block.name, block.index(int(np.ravel_multi_index((group, r, c, *taps), block.extents)))
        raise AssertionError("no such unit")

    units = range(net.num_units)
    return [pick(u, net.blocks, True) for u in units], [pick(u, net.blocks[::-1], False) for u in units]


def balanced_scale(structure: Structure, w: Array) -> Array:
    """c of the least sum of squares: Newton's method on sum of w_e^2 exp(2 (t_v - t_u)), t = log c."""
    n = len(structure.into)
    incidence = np.zeros((structure.size, n + 1))
    at = np.arange(structure.size)
    np.add.at(incidence, (at, structure.dst), 1.0)
    np.add.at(incidence, (at, structure.src), -1.0)
    active = np.flatnonzero(structure.into >= 0)
    incidence = incidence[:, active]
    t = np.zeros(len(active))

    def energy(t: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(w**2 * np.exp(2 * incidence @ t))

    for _ in range(200):
        e = energy(t)
        gradient = 2 * incidence.T @ e
        if np.abs(gradient).max(initial=0.0) < 1e-13 * e.sum():
            break
        step = np.linalg.solve(4 * incidence.T @ (e[:, None] * incidence), gradient)
        size = 1.0
        while energy(t - size * step).sum() > e.sum() * (1 + 1e-12):  # near the minimum all differences are rounding
            size /= 2
        t = t - size * step
    c = np.ones(n)
    c[active] = np.exp(t)
    return c


def rescaled(net: gsgd.Network, params: Mapping[str, Array], c: Array) -> dict[str, Array]:
    """`params` with unit v's in-edges times c_v and its out-edges divided by c_v."""
    src, dst = edges(net)
    c = np.append(c, 1.0)
    factor, out, at = c[dst] / c[src], {}, 0
    for name, shape in net.shapes.items():
        out[name] = (params[name] * factor[at : at + _size(shape)].reshape(shape)).astype(params[name].dtype)
        at += _size(shape)
    return out


def all_paths(net: gsgd.Network) -> list[tuple[int, ...]]:
    """Every path of weights (flat) from a pinned node to a pinned node through the computation."""
    src, dst = edges(net, nodes=True)
    unit = net.unit_of_node
    alias: dict[int, list[int]] = {}
    for op in net.operations:
        if isinstance(op, gsgd.network.Sum):
            for term in op.terms:
                for a, b in zip(term.tolist(), op.out.tolist(), strict=True):
                    alias.setdefault(a, []).append(b)
    leaving: dict[int, list[int]] = {}
    for e, node in enumerate(src.tolist()):
        leaving.setdefault(node, []).append(e)
    paths: list[tuple[int, ...]] = []

    def walk(node: int, path: tuple[int, ...]) -> None:
        if unit[node] < 0:
            paths.append(path)
            return
        for e in leaving.get(node, []):
            walk(int(dst[e]), (*path, e))
        for other in alias.get(node, []):
            walk(other, path)

    for node in np.flatnonzero(unit < 0).tolist():
        for e in leaving.get(node, []):
            walk(int(dst[e]), (e,))
    return paths


def flat_loss(model: Model, structure: Structure) -> Callable[[Tensor], Tensor]:
    """The model's loss as a function of flat weights."""
    sizes = [_size(shape) for shape in structure.shapes.values()]

    def loss(w: Tensor) -> Tensor:
        parts = torch.split(w, sizes)
        return model.loss({n: p.reshape(s) for (n, s), p in zip(structure.shapes.items(), parts, strict=True)})

    return loss


def consistent_gradients(structure: Structure, w: Array, rng: np.random.Generator) -> Array:
    """Flat gradients such as a loss could have, with no entry zero: dl/dw of random dl/dv."""
    return structure.jacobian(w) @ rng.standard_normal(structure.counts.shape[1])
