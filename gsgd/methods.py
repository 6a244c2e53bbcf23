"""SGD, Adam and RMSProp: how a coordinate moves, from its gradient and its moments.

A method is one class here, and one function of the C core. Its fields are its hyperparameters, with their defaults,
for NumPy, PyTorch and Optax alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import numpy as np
from array_api_compat import array_namespace

from gsgd.entries import average

Array: TypeAlias = Any
Number: TypeAlias = Any  # a float; or an array of no dimensions, whose value a device or a trace will know
Moments: TypeAlias = tuple[Array | None, Array | None]


def _new(old: Array, new: Array) -> Array:
    return new


class Row(NamedTuple):
    """The hyperparameters of an array as the C core takes them (`gsgd_rates` in gsgd.h)."""

    method: int
    lr: Number
    momentum: Number = 0.0
    weight_decay: Number = 0.0
    second: Number = 0.0
    eps: Number = 0.0
    correct_m: Number = 1.0
    correct_v: Number = 1.0
    nesterov: bool = False
    decoupled: bool = False


class Method:
    """What the methods have in common.

    Raises
    ------
    ValueError, TypeError
        At construction: a hyperparameter is not as it should be. Arrays whose values are not known are not checked.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    lr: Number
    weight_decay: Number
    decoupled: bool = False

    @property
    def has_m(self) -> bool:
        """Whether there is a first moment."""
        raise NotImplementedError

    @property
    def has_v(self) -> bool:
        """Whether there is a second moment."""
        raise NotImplementedError

    @property
    def row(self) -> Row:
        """As the C core takes them."""
        raise NotImplementedError

    @classmethod
    def of_row(cls, row: Row) -> Self:
        """The inverse of `row`."""
        raise NotImplementedError

    @property
    def decays(self) -> bool:
        """Whether there is weight decay."""
        return _may_differ_from_0(self.weight_decay)

    @property
    def is_plain(self) -> bool:
        """Whether a step is lr times the gradient."""
        return not (self.has_m or self.has_v or self.decays)

    def direction(
        self, d: Array, m: Array | None, v: Array | None, keep: Callable[[Array, Array], Array] = _new
    ) -> tuple[Array, Moments]:
        """The direction in which coordinates move, from their gradients d and moments; and the new moments.

        Moments are what `keep` makes of old and new ones. With a second moment, d is written over where arrays can be.
        """
        raise NotImplementedError

    def at(self, step: Number) -> Self:
        """The method at the `step`-th step, counted from 1; of an array, the corrections are arrays like it."""
        return self

    @classmethod
    def names(cls) -> list[str]:
        """The names of its hyperparameters."""
        return [name for name, f in cls.__dataclass_fields__.items() if f.repr]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What it was made from, by name."""
        return {name: getattr(self, name) for name in self.names()}

    def known(self) -> Self:
        """The same with all values read and checked, which may mean waiting for a device."""

        def read(x: Any) -> Any:
            return tuple(map(read, x)) if isinstance(x, tuple) else float(x) if is_unknown(x) else x

        return replace(self, **{name: read(x) for name, x in self.hyperparameters.items()})

    def _check(self, check: Callable[[str, Any], Any], *names: str) -> None:
        for name in names:
            x = getattr(self, name)
            if not is_unknown(x):
                object.__setattr__(self, name, check(name, x))


@dataclass(frozen=True, eq=False)
class SGD(Method):
    """Gradient descent with momentum, Polyak's or Nesterov's."""

    lr: Number = 0.1
    momentum: Number = 0.0
    nesterov: bool = False
    weight_decay: Number = 0.0

    def __post_init__(self) -> None:
        self._check(non_negative, "lr", "momentum", "weight_decay")
        if self.nesterov and not self.has_m:
            raise ValueError("nesterov: expected a momentum > 0")

    @property
    def has_m(self) -> bool:
        return _may_differ_from_0(self.momentum)

    @property
    def has_v(self) -> bool:
        return False

    @property
    def row(self) -> Row:
        return Row(0, self.lr, self.momentum, self.weight_decay, nesterov=bool(self.nesterov))

    @classmethod
    def of_row(cls, row: Row) -> Self:
        return cls(row.lr, row.momentum, bool(row.nesterov), row.weight_decay)

    def direction(
        self, d: Array, m: Array | None, v: Array | None, keep: Callable[[Array, Array], Array] = _new
    ) -> tuple[Array, Moments]:
        if m is None:
            return d, (None, v)
        new = self.momentum * m
        new += d
        m = keep(m, new)
        return (d + self.momentum * m if self.nesterov else m), (m, v)


@dataclass(frozen=True, eq=False)
class Adam(Method):
    """Adam (Kingma and Ba, 2015); with decoupled weight decay, AdamW (Loshchilov and Hutter, 2019)."""

    lr: Number = 1e-3
    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    decoupled: bool = True
    correct: tuple[Number, Number] = field(default=(1.0, 1.0), repr=False)  # no hyperparameter: see `at`

    def __post_init__(self) -> None:
        self._check(non_negative, "lr", "eps", "weight_decay")
        self._check(_fractions, "betas")

    has_m = has_v = property(lambda self: True)

    @property
    def row(self) -> Row:
        return Row(
            1,
            self.lr,
            self.betas[0],
            self.weight_decay,
            self.betas[1],
            self.eps,
            *self.correct,
            decoupled=bool(self.decoupled),
        )

    @classmethod
    def of_row(cls, row: Row) -> Self:
        betas, correct = (row.momentum, row.second), (row.correct_m, row.correct_v)
        return cls(row.lr, betas, row.eps, row.weight_decay, bool(row.decoupled), correct)

    def direction(
        self, d: Array, m: Array | None, v: Array | None, keep: Callable[[Array, Array], Array] = _new
    ) -> tuple[Array, Moments]:
        (first, second), (correct_m, correct_v) = self.betas, self.correct
        v = keep(v, average(v, d * d, second))
        m = keep(m, average(m, d, first))
        d = correct_v * v
        d = array_namespace(d).sqrt(d)
        d += self.eps
        e = correct_m * m
        e /= d
        return e, (m, v)

    def at(self, step: Number) -> Self:
        first, second = self.betas
        return replace(self, correct=(_correction(first, step), _correction(second, step)))


@dataclass(frozen=True, eq=False)
class RMSprop(Method):
    """RMSProp (Tieleman and Hinton, 2012), with momentum of its steps."""

    lr: Number = 1e-2
    alpha: Number = 0.99
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    momentum: Number = 0.0

    def __post_init__(self) -> None:
        self._check(non_negative, "lr", "eps", "weight_decay", "momentum")
        self._check(_fraction, "alpha")

    @property
    def has_m(self) -> bool:
        return _may_differ_from_0(self.momentum)

    @property
    def has_v(self) -> bool:
        return True

    @property
    def row(self) -> Row:
        return Row(2, self.lr, self.momentum, self.weight_decay, self.alpha, self.eps)

    @classmethod
    def of_row(cls, row: Row) -> Self:
        return cls(row.lr, row.second, row.eps, row.weight_decay, row.momentum)

    def direction(
        self, d: Array, m: Array | None, v: Array | None, keep: Callable[[Array, Array], Array] = _new
    ) -> tuple[Array, Moments]:
        v = keep(v, average(v, d * d, self.alpha))
        root = array_namespace(v).sqrt(v)
        root += self.eps
        d /= root
        del root  # it may be large
        if m is not None:
            new = self.momentum * m
            new += d
            m = d = keep(m, new)
        return d, (m, v)


METHODS: tuple[type[Method], ...] = (SGD, Adam, RMSprop)  # in the order of the C core


def number(name: str, x: Any) -> float:
    """`x` as a float; a TypeError names it, or a ValueError an array of several numbers."""
    try:
        return float(x)
    except (TypeError, ValueError, RuntimeError):
        if getattr(x, "shape", ()):
            raise ValueError(f"{name}: expected a number, got an array of shape {tuple(x.shape)}") from None
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


def _fractions(name: str, xs: Any) -> tuple[Number, ...]:
    if not isinstance(xs, Sequence) or len(xs) != 2:
        raise TypeError(f"{name}: expected two numbers, got {xs!r}")
    return tuple(x if is_unknown(x) else _fraction(f"{name}[{i}]", x) for i, x in enumerate(xs))


def is_unknown(x: Any) -> bool:
    """Whether to read a number would mean waiting for a device, or is impossible, as while JAX traces."""
    return not isinstance(x, (Real, np.ndarray)) and getattr(x, "shape", None) == ()


def _may_differ_from_0(x: Number) -> bool:
    return is_unknown(x) or bool(x != 0)


def _correction(beta: Number, step: Number) -> Number:
    """1 / (1 - beta ** step)."""
    if not is_unknown(beta) and not is_unknown(step):
        return 1 / (1 - beta**step)
    xp = array_namespace(beta, step)
    log = xp.log(beta) if is_unknown(beta) else math.log(beta) if beta else -math.inf
    return -1 / xp.expm1(step * log)  # the difference would cancel in float32
