"""What an optimizer takes from a state dict: the skeleton, and its own parameters in their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gsgd.coordinates import NAMES, Coordinates
from gsgd.optimizer import Stats


def held_moments(state_dict: Mapping[str, Any]) -> set[str]:
    """Names of the moments in a state dict."""
    return {n for s in state_dict["state"].values() for n, x in s.items() if isinstance(x, Tensor)} - {"step"}


def saved_skeleton(state_dict: Mapping[str, Any], num_units: int) -> tuple[Coordinates, Stats] | None:
    """Coordinates and counts of a state dict; None of another optimizer's.

    Raises
    ------
    ValueError
        It is incomplete or of another network.
    """
    saved = [group["gsgd"] for group in state_dict["param_groups"] if "gsgd" in group]
    saved += [state_dict["gsgd"]] if "gsgd" in state_dict else []  # of version 0.1
    if not saved:
        return None
    given = saved[0]
    if not isinstance(given, Mapping) or not given.keys() >= {*NAMES, "steps", "clamped"}:
        raise ValueError('state_dict: "gsgd" does not hold the skeleton and the reference scale')
    coordinates = Coordinates.load({name: given[name].numpy(force=True) for name in NAMES}, num_units)
    return coordinates, Stats(given["steps"], given["clamped"], given.get("skipped", 0))  # version 0.1 has none


def matched(state_dict: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """The state dict as torch's, each group's parameters in the order of its `names`."""
    groups = [{k: v for k, v in group.items() if k != "gsgd"} for group in state_dict["param_groups"]]
    rest = {k: v for k, v in state_dict.items() if k != "gsgd"}
    return {**rest, "param_groups": list(map(_in_order_of, groups, names))}


def _in_order_of(group: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A group of a state dict with its parameters in the order of `names`; those of wrapped models are the same."""
    saved = [_unwrapped(name) for name in group.get("param_names", ())]
    own = [_unwrapped(name) for name in names]
    if not saved or saved == own or len(saved) != len(own):  # torch itself tells of another number
        return group
    if sorted(saved) != sorted(own):
        name = next(iter({*saved} ^ {*own}))
        raise ValueError(
            f"state_dict: expected the parameters of this group, {own[:3]}..., and {name!r} is in one only"
        )
    return {**group, "params": [group["params"][saved.index(name)] for name in own], "param_names": names}


def _unwrapped(name: str) -> str:
    """The name without what DistributedDataParallel and torch.compile put before it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
