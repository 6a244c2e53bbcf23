"""The chain that a list or dict of weights describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gsgd.checks import shape_of
from gsgd.features import Features

if TYPE_CHECKING:
    from gsgd.network import Network


def describe_chain(net: Network, shapes_or_params: Mapping[str, Any] | Sequence[Any], layout: str) -> None:
    """Fill an empty network; see `Network.sequential`."""
    if layout not in ("oi", "io"):
        raise ValueError(f"layout {layout!r}: expected 'oi' or 'io'")
    if not isinstance(shapes_or_params, Mapping):
        shapes_or_params = {str(i): s for i, s in enumerate(shapes_or_params)}
    shapes = {name: shape_of(value, name) for name, value in shapes_or_params.items()}
    names, i = list(shapes), 0
    x: Features | None = None
    while i < len(names):
        name, shape = names[i], shapes[names[i]]
        if not 2 <= len(shape) <= 5 or min(shape) < 1:
            raise ValueError(f"{name}: shape {shape}: expected a weight of 2 to 5 dimensions, at least 1 each")
        out, read = (shape[0], shape[1]) if layout == "oi" else (shape[-1], shape[-2])
        bias = names[i + 1] if i + 1 < len(names) and shapes[names[i + 1]] == (out,) else None
        x = net.input(read) if x is None else net.relu(x)
        have = x.count
        if len(shape) == 2:
            if read % have:
                raise ValueError(f"{name}: reads {read} features, but the layer before writes {have}")
            if read != have:
                x = net.flatten(x, read // have, "channels_first" if layout == "oi" else "channels_last")
            x = net.dense(name, x, out, bias=bias, layout=layout)
        else:
            if have % read:
                raise ValueError(f"{name}: reads {read} channels a group, but the layer before writes {have}")
            kernel = shape[2:] if layout == "oi" else shape[:-2]
            layouts = {"oi": "oihw", "io": "hwio"}
            x = net.conv(name, x, out, kernel, groups=have // read, bias=bias, layout=layouts[layout])
        i += 1 if bias is None else 2
    if x is None:
        raise ValueError("expected at least one weight")
    net.output(x)
