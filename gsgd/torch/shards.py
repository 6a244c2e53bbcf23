"""Parameters of which every process holds a part: DTensors of FSDP2 and of tensor parallelism.

Whatever is per unit is replicated, whatever is per weight stays where it is: a step, and what is found at construction,
needs sums over processes of vectors of O(units) alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

Index = tuple[NDArray[np.int64], ...]


def is_sharded(t: Tensor) -> bool:
    """Whether processes hold parts of it, or DTensors of the whole."""
    return isinstance(t, DTensor)


def any_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there is a sharded one among them."""
    return any(map(is_sharded, tensors.values()))


def local(t: Tensor) -> Tensor:
    """What this process holds of it, sharing its memory."""
    return t.to_local().detach() if isinstance(t, DTensor) else t.detach()


class Shards:
    """Which part of every parameter this process holds, and sums over all processes.

    Attributes
    ----------
    index : list of tuples of int64 arrays
        Of every parameter, one per axis: which of the whole's indices are here. Parts are products of these.
    counts : list of bool
        Whether this process's part enters sums: of processes that hold the same part, one's does.

    Raises
    ------
    ValueError
        The parameters lie on more than one device mesh, some wait for a reduction, or are complex.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        sharded = {name: p for name, p in tensors.items() if isinstance(p, DTensor)}
        self.mesh: DeviceMesh = max((p.device_mesh for p in sharded.values()), key=lambda mesh: mesh.ndim)
        for name, p in tensors.items():
            if p.is_complex():
                raise ValueError(f"parameter {name!r}: complex parameters are not supported beside sharded ones")
        for name, p in sharded.items():
            if p.device_mesh != self.mesh and not {*_names(p.device_mesh)} <= {*_names(self.mesh)}:
                raise ValueError(
                    f"parameter {name!r} lies on {p.device_mesh}, no part of {self.mesh}: expected one device mesh for "
                    "all parameters, or parts of one by the names of its dimensions"
                )
            if any(q.is_partial() for q in p.placements):
                raise ValueError(f"parameter {name!r}: expected Shard or Replicate, got placements {p.placements}")
        # over the other dimensions of the mesh, processes do the same
        self.dims = [d for d in range(self.mesh.ndim) if any(self._is_cut(p, d) for p in sharded.values())]
        self.index = [self._index(p) for p in tensors.values()]
        self.counts = [self._counts(p) for p in tensors.values()]
        self.all_reduces = self.bytes_reduced = 0

    def _is_cut(self, p: Tensor, d: int) -> bool:
        """Whether a dimension of the mesh cuts the parameter, which may know a part of the mesh alone."""
        if not isinstance(p, DTensor):
            return False
        if p.device_mesh == self.mesh:
            return _axis(p.placements[d]) is not None
        names = _names(p.device_mesh)
        name = _names(self.mesh)[d]
        return name in names and _axis(p.placements[names.index(name)]) is not None

    def _index(self, p: Tensor) -> Index:
        if not isinstance(p, DTensor):
            return tuple(np.arange(n) for n in p.shape)
        found = []
        for axis, n in enumerate(p.shape):
            placements = [_along_first(q) if _axis(q) == axis else Replicate() for q in p.placements]
            whole = torch.arange(n, device=p.device_mesh.device_type)
            here = distribute_tensor(whole, p.device_mesh, placements, src_data_rank=None).to_local()
            found.append(here.cpu().numpy())
        if tuple(map(len, found)) != tuple(p.to_local().shape):
            raise ValueError(f"placements {p.placements} cut a parameter of shape {tuple(p.shape)} unevenly twice")
        return tuple(found)

    def _counts(self, p: Tensor) -> bool:
        at = self.mesh.get_coordinate()
        assert at is not None
        return all(at[d] == 0 for d in self.dims if not self._is_cut(p, d))

    @property
    def counted(self) -> list[Index | None]:
        """`index`; None where this process's part does not enter sums."""
        return [own if counts else None for own, counts in zip(self.index, self.counts, strict=True)]

    def place(self, i: int, index: Sequence[int]) -> tuple[int, ...] | None:
        """Where an entry of the `i`-th parameter lies in what is here, if it does."""
        found = [np.flatnonzero(own == at) for own, at in zip(self.index[i], index, strict=True)]
        return tuple(int(x[0]) for x in found) if all(map(len, found)) else None

    def total(self, x: Tensor) -> Tensor:
        """`x` summed over the processes that hold parts, in place: the same bits on all of them."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of every entry over these processes, in place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def any(self, x: bool) -> bool:
        """Whether it is so on one of these processes at least."""
        return bool(self.largest(torch.tensor([float(x)], device=self.mesh.device_type)))

    def _reduce(self, x: Tensor, how: Any) -> Tensor:
        for d in self.dims:
            dist.all_reduce(x, how, group=self.mesh.get_group(d))
            self.all_reduces += 1
            self.bytes_reduced += x.numel() * x.element_size()
        return x

    def check_agreement(self, what: Mapping[str, Sequence[Any]]) -> None:
        """Refuse what differs between processes; a ValueError names it on all of them.

        Parameters
        ----------
        what : mapping of str to sequence of arrays or str
            What must be the same everywhere, by the name that the message says.
        """
        sums = [0.0] * len(what)
        for i, parts in enumerate(what.values()):
            code = 0
            for part in parts:
                code = zlib.crc32(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).data, code)
            sums[i] = float(code)
        mine = torch.tensor([sums, [-x for x in sums]], dtype=torch.float64, device=self.mesh.device_type)
        highest, lowest = self.largest(mine).tolist()
        for name, high, low in zip(what, highest, lowest, strict=True):
            if high != -low:
                raise ValueError(f"{name} differs between processes: expected the same model and settings on all")


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or tuple(f"dimension {d}" for d in range(mesh.ndim))


def _axis(placement: Any) -> int | None:
    """Which axis it cuts, if any; for fully_shard after tensor parallelism it is no Shard."""
    return getattr(placement, "dim", None)


def _along_first(placement: Any) -> Any:
    """The placement of a vector that is cut as another tensor's axis is."""
    factor = getattr(placement, "split_factor", None)
    return Shard(0) if factor is None else type(placement)(0, split_factor=factor)
