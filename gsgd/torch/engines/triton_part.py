"""The stages of Triton's step on parts of arrays, for sums over all parts between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

from gsgd.coordinates import Coordinates
from gsgd.layout import Layout
from gsgd.network import Network
from gsgd.torch.engines import triton_kernels as kernels
from gsgd.torch.engines.base import Step
from gsgd.torch.engines.triton import Begun, Gathered, TritonEngine, Upload


class TritonPart(TritonEngine):
    """Gather what is here, solve alike everywhere, apply to what is here.

    On every process, within ``on_device()`` (`sum_up` adds a tensor up over all processes, in place)::

        begun = part.begin(step)
        sum_up(part.gather(begun))
        if begun.clips:
            sum_up(part.squares(begun))
        part.solve(begun)
        part.apply(begun)

    Whether a gradient is None is the same on all processes, though its part may be empty.

    Parameters
    ----------
    whole : Layout
        Of the whole arrays.
    here : Layout
        Of their parts, which the tensors are; see `gsgd.layout.part`.
    counts : sequence of bool
        Which of the tensors enter sums: of processes that hold the same part, one's does.
    """

    def __init__(
        self,
        net: Network,
        coordinates: Coordinates,
        tensors: Mapping[str, Tensor],
        whole: Layout,
        here: Layout,
        counts: Sequence[bool],
    ) -> None:
        super().__init__(net, coordinates, tensors, here, counts)
        n, count = net.num_units + 1, len(self.params)
        device = self.device
        self.sums = torch.zeros(6 * n + 1, dtype=torch.float64, device=device)
        rows = dict(zip(("s", "in", "out", "g", "m", "v"), self.sums[:-1].view(6, n), strict=True))
        self.vectors = [rows[name].data_ptr() for name in ("g", "m", "v")]
        # of sums, every unit is one part, and its tree edges lie in the rows of weights
        unit = torch.arange(n, device=device)
        chain, edge = torch.from_numpy(whole.array).clone(), torch.from_numpy(whole.edge < len(whole.owner))
        chain[~torch.from_numpy(whole.chain)] = -1
        links = torch.zeros(7, n, dtype=torch.int32, device=device)
        links[: kernels.CHAIN_ARRAY.value] = self.gathered.links[: 3 * n].view(3, n)
        links[kernels.CHAIN_ARRAY.value] = chain.to(device)
        links[kernels.IN_KIND.value :] = (edge.int() - 1).to(device)
        places = torch.stack([unit, unit, *(rows[side].data_ptr() + 8 * unit for side in ("in", "out"))])
        part_first = torch.arange(n + 1, device=device)
        part_first[-1] = n - 1  # nothing is summed of pinned ends
        self.solved_from = Gathered(
            links=links,
            places=places,
            part_first=part_first.int(),
            part_of=unit.int(),
            partial=rows["s"],
            wrong=self.sums[-1:],
            tiles=1,
            squares=torch.zeros(1 + self.programs, dtype=torch.float64, device=device),
            types=(tl.float64,),
        )
        self.of_units = Upload(7 * count, torch.int64, device)

    def begin(self, step: Step) -> Begun:
        begun = super().begin(step)
        none, kinds = [0] * len(step.which), (step.gradients, *step.moments)
        given = [[0 if x is None else at for x in kind] for kind, at in zip(kinds, self.vectors, strict=True)]
        return replace(begun, of_units=self._write(self.of_units, none, *given, step.which, none, [8] * len(none)))

    def gather(self, begun: Begun) -> Tensor:
        """What has to be added up over all parts: six numbers per unit and one more, float64, (6 (H + 1) + 1,)."""
        self.gather_sums(begun, clips=False)
        own, tiling = self.gathered, self.tiling
        self.launch(
            kernels.collect, self.programs, 4, begun.arrays, len(self.params), own.links, own.places,
            self.net.num_units, own.part_first, own.part_of, own.partial, own.wrong, own.tiles, self.sums,
            TYPES=own.types, UNITS=tiling.units, PARTS=tiling.parts,
        )  # fmt: skip
        return self.sums

    def squares(self, begun: Begun) -> Tensor:
        """With `clip_norm`, what has to be added up over all parts next: the sum of (dl/dx)^2, float64, (1,)."""
        self.solve_for(begun, products=True, sums=True)
        self.gather_sums(begun, clips=True)
        total = self.solved_from.squares[:1]
        return torch.sum(self.gathered.squares[: self.gathered.tiles], 0, keepdim=True, out=total)

    def solve(self, begun: Begun) -> None:
        """Path ratios, from the sums of all parts."""
        self.solve_for(begun, products=not begun.clips, sums=not begun.clips, ratios=True)
