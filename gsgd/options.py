"""What all optimizers can be told besides a method's hyperparameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

from gsgd.coordinates import ScaleName, check_scale
from gsgd.methods import Number, is_unknown, number
from gsgd.skeleton import Rule, check_rule
from gsgd.threads import check_threads

MaxRatio = Number | None | Literal["auto"]

DEFAULT_MAX_RATIO = 4.0  # measured: experiments/README.md


class OptionArguments(TypedDict, total=False):
    """The fields of `Options` as keyword arguments."""

    scale: ScaleName
    rule: Rule
    threads: int | None
    max_ratio: MaxRatio
    clip_norm: float | None


@dataclass(frozen=True)
class Options:
    """What path values are measured on, what limits a step, and how many threads take it; `gsgd.GSGD` says more.

    Raises
    ------
    ValueError, TypeError
        One is not as it should be. Arrays whose values are not known are not checked.
    """

    scale: ScaleName = "balanced"
    rule: Rule = "modulo"
    threads: int | None = None
    max_ratio: MaxRatio = "auto"
    clip_norm: Number | None = None

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_rule(self.rule)
        if self.threads is not None:
            check_threads(self.threads)
        object.__setattr__(self, "max_ratio", _max_ratio(self.max_ratio, self.scale))
        object.__setattr__(self, "clip_norm", _clip_norm(self.clip_norm))


def limit(x: Number | None) -> Number:
    """A limit as the plans take it: infinity for None."""
    return math.inf if x is None else x


def _max_ratio(max_ratio: MaxRatio, scale: ScaleName) -> Number | None:
    """A number > 1, or None for no limit; "auto": none for scale "ones", else the default."""
    if isinstance(max_ratio, str) and max_ratio == "auto":
        return None if scale == "ones" else DEFAULT_MAX_RATIO
    if max_ratio is None or is_unknown(max_ratio):
        return max_ratio
    value = number("max_ratio", max_ratio)
    if not (math.isfinite(value) and value > 1):
        raise ValueError(f"max_ratio: expected a finite number > 1, None for no limit, or 'auto', got {max_ratio!r}")
    return value


def _clip_norm(clip_norm: Number | None) -> Number | None:
    if clip_norm is None or is_unknown(clip_norm):
        return clip_norm
    value = number("clip_norm", clip_norm)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"clip_norm: expected a finite number > 0, or None, got {clip_norm!r}")
    return value
