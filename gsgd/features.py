"""What flows between layers: channels, each seen at one or several positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gsgd.blocks import Ids

if TYPE_CHECKING:
    from gsgd.network import Network


@dataclass(frozen=True, eq=False)
class Features:
    """What a layer of a network returns, to be given to the next.

    Attributes
    ----------
    network : Network
    segments : tuple of (nodes, positions, order)
        One after the other: an int64 array of a node per channel, the number of places at which each is seen, and
        whether these are next to each other ("channels_first") or all channels of a place are ("channels_last").
    """

    network: Network = field(repr=False)
    segments: tuple[tuple[Ids, int, str], ...]

    @property
    def count(self) -> int:
        """Number of features: channels times positions, over all segments."""
        return sum(len(nodes) * positions for nodes, positions, _ in self.segments)

    @property
    def per_feature(self) -> Ids:
        """The node of every feature, in order: an int64 array of shape ``(count,)``."""
        return np.concatenate(
            [
                np.repeat(nodes, positions) if order == "channels_first" else np.tile(nodes, positions)
                for nodes, positions, order in self.segments
            ]
        )


def segment(nodes: Ids) -> tuple[Ids, int, str]:
    """Channels, positions and order, if these are flattened maps; otherwise as many channels of one position."""
    n, same = len(nodes), nodes == nodes[0]
    run = n if same.all() else int(np.argmin(same))
    if 1 < run < n and n % run == 0 and (nodes == np.repeat(nodes[::run], run)).all():
        return nodes[::run], run, "channels_first"
    period = 1 + int(np.argmax(same[1:])) if same[1:].any() else n
    if 1 < period < n and n % period == 0 and (nodes == np.tile(nodes[:period], n // period)).all():
        return nodes[:period], n // period, "channels_last"
    return nodes, 1, "channels_first"
