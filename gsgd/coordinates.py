"""The coordinates of basis paths: a skeleton's trees and the reference scale (METHOD.md, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gsgd._core import checksum
from gsgd.network import Network
from gsgd.skeleton import Skeleton

ScaleName = Literal["balanced", "initial", "ones"]


def check_scale(scale: ScaleName) -> ScaleName:
    """`scale`, if it is one."""
    if scale not in ("balanced", "initial", "ones"):
        raise ValueError(f"scale: expected 'balanced', 'initial' or 'ones', got {scale!r}")
    return scale


@dataclass(frozen=True, eq=False)
class Coordinates:
    """What path values are measured on.

    Attributes
    ----------
    in_edges, out_edges : int64 arrays, shape (H, 2)
        The trees: a block of the network and an entry of it (in C order) per unit; block -1: none.
    in_weights, out_weights : float64 arrays, shape (H,)
        The weights of these edges, to which A and B are relative; 1 where there is none.
    c : float64 array, shape (H,)
        The positive number per unit; 1 for units without edges.
    """

    in_edges: NDArray[np.int64]
    out_edges: NDArray[np.int64]
    in_weights: NDArray[np.float64]
    out_weights: NDArray[np.float64]
    c: NDArray[np.float64]

    @classmethod
    def of(cls, skeleton: Skeleton, arrays: Mapping[str, NDArray[Any]], scale: ScaleName) -> Coordinates:
        """Those of the weights `arrays`, from a skeleton that was chosen for this scale."""
        if scale == "ones":
            w_in = w_out = np.ones(skeleton.net.num_units)
        else:
            w_in, w_out = skeleton.tree_weights(arrays)
        return cls(*skeleton.edge_arrays, w_in, w_out, skeleton.c)

    @classmethod
    def load(cls, state: Mapping[str, Any], units: int) -> Coordinates:
        """From the entries of a state dict; copies.

        Raises
        ------
        ValueError
            They are of another number of units, or not those of a scale.
        """
        edges = [np.array(state[name], dtype=np.int64, order="C") for name in ("in_edges", "out_edges")]
        scale = [np.array(state[name], dtype=np.float64) for name in ("in_weights", "out_weights", "c")]
        for name, x, shape in zip(NAMES, (*edges, *scale), [(units, 2)] * 2 + [(units,)] * 3, strict=True):
            if x.shape != shape:
                raise ValueError(
                    f"state_dict: {name!r} of shape {x.shape}, expected {shape}: of another network than this one's, "
                    f"which has {units} units"
                )
        if not all((np.isfinite(x) & (x != 0)).all() for x in scale) or (scale[2] < 0).any():
            raise ValueError("state_dict: the reference scale has entries that are 0 or not finite")
        return cls(edges[0], edges[1], scale[0], scale[1], scale[2])

    @property
    def edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The trees."""
        return self.in_edges, self.out_edges

    @property
    def scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The reference scale, as plans take it."""
        return self.in_weights, self.out_weights, self.c

    def places(self, net: Network, units: NDArray[np.int64]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Where the tree edges of these units lie: names of parameters, and indices of them."""
        for edges in self.edges:
            for k, entry in edges[units].tolist():
                yield net.blocks[k].name, net.blocks[k].index(entry)

    def save(self) -> dict[str, NDArray[Any]]:
        """The entries of a state dict: copies."""
        return {name: x.copy() for name, x in asdict(self).items()}


NAMES = tuple(Coordinates.__dataclass_fields__)


def set_to_one(skeleton: Skeleton, arrays: Mapping[str, Any]) -> None:
    """Set every skeleton weight to 1, in place: the paper's start (its section 11.2)."""
    for edge in {*skeleton.in_edges, *skeleton.out_edges}:
        if edge is not None:
            arrays[edge[0]][edge[1]] = 1


def fingerprint(arrays: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
    """A checksum of every array's entries: whether weights have changed, however they were written."""
    return tuple(checksum(np.ascontiguousarray(a)) for a in arrays.values())
