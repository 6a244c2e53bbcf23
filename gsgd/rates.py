"""Hyperparameters of SGD, Adam and RMSProp in the form that the C core and the reference take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Method = Literal["sgd", "adam", "rmsprop"]
METHODS: tuple[Method, ...] = ("sgd", "adam", "rmsprop")

Array = Any
Moments = tuple[Array | None, Array | None]


@dataclass(frozen=True, eq=False)
class Rates:
    """Hyperparameters of one or several arrays; `direction` says what they do."""

    lr: Any
    momentum: Any = 0.0
    weight_decay: Any = 0.0
    second: Any = 0.0
    eps: Any = 0.0
    correct_m: Any = 1.0
    correct_v: Any = 1.0
    nesterov: bool = False
    decoupled: bool = False
    method: Method = "sgd"

    @property
    def has_m(self) -> bool:
        """Whether there is a first moment."""
        return self.method == "adam" or self.momentum != 0

    @property
    def has_v(self) -> bool:
        """Whether there is a second moment."""
        return self.method != "sgd"

    @property
    def row(self) -> tuple[float, ...]:
        """As `gsgd._core.Plan.step` takes it."""
        return (
            METHODS.index(self.method),
            self.lr,
            self.momentum,
            self.weight_decay,
            self.second,
            self.eps,
            self.correct_m,
            self.correct_v,
            self.nesterov,
            self.decoupled,
        )

    @classmethod
    def of_row(cls, row: tuple[float, ...]) -> Rates:
        """The inverse of `row`."""
        method, lr, momentum, weight_decay, second, eps, correct_m, correct_v, nesterov, decoupled = row
        flags = bool(nesterov), bool(decoupled), METHODS[int(method)]
        return cls(lr, momentum, weight_decay, second, eps, correct_m, correct_v, *flags)


def direction(xp: Any, o: Rates, d: Array, m: Array | None, v: Array | None) -> tuple[Array, Moments]:
    """The direction in which coordinates move, from their gradients d and moments; and the new moments."""
    if o.method == "sgd":
        if m is None:
            return d, (None, v)
        m = o.momentum * m + d
        return (d + o.momentum * m if o.nesterov else m), (m, v)
    v = o.second * v + (1 - o.second) * (d * d)
    if o.method == "adam":
        m = o.momentum * m + (1 - o.momentum) * d
        return o.correct_m * m / (xp.sqrt(o.correct_v * v) + o.eps), (m, v)
    d = d / (xp.sqrt(v) + o.eps)
    if m is not None:
        m = d = o.momentum * m + d
    return d, (m, v)


def number(name: str, x: Any) -> float:
    """`x` as a float; a TypeError names it."""
    try:
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {x!r}") from None


def non_negative(name: str, x: Any) -> float:
    """`x` as a float, finite and not negative."""
    value = number(name, x)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {x!r}")
    return value


def _fraction(name: str, x: Any) -> float:
    value = number(name, x)
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {x!r}")
    return value


def sgd(lr: Any, momentum: Any, nesterov: bool, weight_decay: Any, step: int = 1) -> Rates:
    """SGD, the same at every step."""
    rates = Rates(
        non_negative("lr", lr),
        non_negative("momentum", momentum),
        non_negative("weight_decay", weight_decay),
        nesterov=bool(nesterov),
    )
    if nesterov and not rates.momentum:
        raise ValueError("nesterov: expected a momentum > 0")
    return rates


def adam(lr: Any, betas: tuple[Any, Any], eps: Any, weight_decay: Any, decoupled: bool, step: int = 1) -> Rates:
    """Adam (Kingma and Ba, 2015) at its `step`-th step; AdamW (Loshchilov and Hutter, 2019) when decoupled."""
    first, second = _fraction("betas[0]", betas[0]), _fraction("betas[1]", betas[1])
    return Rates(
        non_negative("lr", lr),
        first,
        non_negative("weight_decay", weight_decay),
        second,
        non_negative("eps", eps),
        1 / (1 - first**step),
        1 / (1 - second**step),
        decoupled=bool(decoupled),
        method="adam",
    )


def rmsprop(lr: Any, alpha: Any, eps: Any, weight_decay: Any, momentum: Any, step: int = 1) -> Rates:
    """RMSProp (Tieleman and Hinton, 2012), the same at every step."""
    return Rates(
        non_negative("lr", lr),
        non_negative("momentum", momentum),
        non_negative("weight_decay", weight_decay),
        _fraction("alpha", alpha),
        non_negative("eps", eps),
        method="rmsprop",
    )
