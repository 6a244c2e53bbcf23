"""The C core: the three stages on NumPy buffers. csrc/gsgd.h is the manual."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Spec = tuple[str, tuple[int, ...], str]
BlockTuple = tuple[
    int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int, NDArray[np.int64], NDArray[np.int64]
]

def checksum(array: NDArray[Any], /) -> int: ...
def takes(type: type, /) -> bool: ...  # whether tensors of a type may stand in lists of arrays
def lie_at(tensors: list[Any], arrays: list[Any], /) -> bool: ...  # whether these have the same memory

class Plan:
    def __new__(cls, units: int, specs: list[Spec], blocks: list[BlockTuple], /) -> Plan: ...
    def choose_trees(
        self, weights: list[Any], largest: bool, scale: NDArray[np.float64] | None, /
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
    def set_trees(self, in_edges: NDArray[np.int64], out_edges: NDArray[np.int64], /) -> NDArray[np.bool_]: ...
    def set_shard(
        self,
        in_edges: NDArray[np.int64],
        out_edges: NDArray[np.int64],
        source: NDArray[np.int64],
        destination: NDArray[np.int64],
        in_array: NDArray[np.int64],
        free_in: NDArray[np.bool_],
        counts: NDArray[np.bool_] | None,
        /,
    ) -> None: ...
    def set_reference(
        self, in_weights: NDArray[np.float64], out_weights: NDArray[np.float64], c: NDArray[np.float64], /
    ) -> None: ...
    def balance(self, weights: list[Any], /) -> tuple[NDArray[np.float64], float]: ...
    def step(
        self,
        weights: list[Any],
        gradients: list[Any],
        sums: list[Any] | None,
        norm: NDArray[np.float64] | None,
        m: list[Any],
        v: list[Any],
        rates: NDArray[np.float64],
        max_ratio: float,
        clip_norm: float,
        threads: int,
        /,
    ) -> int: ...
    def gather(  # an empty shard has a gradient, too: an array of size 0
        self,
        weights: list[Any],
        gradients: list[Any],
        sums: list[Any] | None,
        m: list[Any],
        v: list[Any],
        clip_norm: float,
        trees: NDArray[np.float64] | None,
        threads: int,
        /,
    ) -> NDArray[np.float64]: ...
    def solve(
        self,
        gathered: NDArray[np.float64],
        norm: NDArray[np.float64] | None,
        rates: NDArray[np.float64],
        max_ratio: float,
        clip_norm: float,
        /,
    ) -> tuple[NDArray[np.float64], int]: ...
    def apply(
        self,
        weights: list[Any],
        gradients: list[Any],
        m: list[Any],
        v: list[Any],
        rates: NDArray[np.float64],
        solved: NDArray[np.float64],
        threads: int,
        /,
    ) -> None: ...
    def path_values(self, weights: list[Any], values: list[Any], logs: list[Any] | None, /) -> None: ...
    def path_gradients(
        self,
        weights: list[Any],
        gradients: list[Any],
        sums: list[Any],
        norm: NDArray[np.float64] | None,
        out: list[Any],
        /,
    ) -> None: ...
    def allocate(self, weights: list[Any], ratios: list[Any], out: list[Any], /) -> None: ...
