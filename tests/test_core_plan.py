"""The binding checks everything: each misuse of the C core's plan is an error, and nothing is written."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gsgd import _core

EXTENTS, AXES, STEPS = (1, 3, 3, 1, 1, 1), (0, 0, 1, 0, 0, 0), (0, 1, 1, 0, 0, 0)
UNITS, PINNED = np.arange(3), np.full(3, -1)
SPECS = [("a", (3, 3), "d"), ("b", (3, 3), "d")]
BLOCKS: list[Any] = [
    (0, EXTENTS, AXES, STEPS, 0, 0, UNITS, PINNED),
    (1, EXTENTS, AXES, STEPS, 0, 0, PINNED, UNITS),
]
NONE = [None, None]
# in-edges and out-edges that are elsewhere, their other ends, the array of in-edges, whether these are free
SHARD: list[Any] = [np.full((3, 2), -1), np.full((3, 2), -1), PINNED, PINNED, 0 * UNITS, np.zeros(3, bool)]


def arrays(value: float = 1.0) -> list[Any]:
    return [np.full((3, 3), value) for _ in range(2)]


def rates(method: float = 0.0, **entries: float) -> np.ndarray:
    """One row per array, as csrc/gsgd.h lists them."""
    names = [
        "method",
        "lr",
        "momentum",
        "weight_decay",
        "second",
        "eps",
        "correct_m",
        "correct_v",
        "nesterov",
        "decoupled",
    ]
    row = {"method": method, "lr": 0.01, "correct_m": 1.0, "correct_v": 1.0, **entries}
    return np.array([[row.get(name, 0.0) for name in names]] * 2)


class Ready:
    """A plan of three units with its trees and its scale, and a step in which any argument can be replaced."""

    def __init__(self, stage: int = 2) -> None:
        self.plan = _core.Plan(3, SPECS, BLOCKS)
        self.weights = arrays()
        if stage:
            self.plan.set_trees(*self.plan.choose_trees(self.weights, False, None))
        if stage > 1:
            self.plan.set_reference(*np.ones((3, 3)))

    def step(self, **changed: Any) -> int:
        arguments = {
            "weights": self.weights,
            "gradients": arrays(0.1),
            "sums": None,
            "norm": None,
            "m": NONE,
            "v": NONE,
            "rates": rates(),
            "max_ratio": 10.0,
            "clip_norm": np.inf,
            "threads": 1,
        }
        return self.plan.step(*{**arguments, **changed}.values())


STEPS_REFUSED: dict[str, Callable[[Ready], dict[str, Any]]] = {
    "adam without moments": lambda r: {"rates": rates(1)},
    "adam without a second moment": lambda r: {"rates": rates(1), "m": arrays(0.0)},
    "rmsprop without a moment": lambda r: {"rates": rates(2)},
    "max_ratio 1": lambda r: {"max_ratio": 1.0},
    "clip_norm 0": lambda r: {"clip_norm": 0.0},
    "norms of two units": lambda r: {"norm": np.ones(2)},
    "method 7": lambda r: {"rates": rates(7)},
    "half a method": lambda r: {"rates": rates(0.5)},
    "lr nan": lambda r: {"rates": rates(lr=np.nan)},
    "rates of float32": lambda r: {"rates": rates().astype(np.float32)},
    "rates of one array": lambda r: {"rates": rates()[:1]},
    "no rates": lambda r: {"rates": None},
    "a weight is None": lambda r: {"weights": [r.weights[0], None]},
    "weights in a tuple": lambda r: {"weights": tuple(r.weights)},
    "too few weights": lambda r: {"weights": r.weights[:1]},
    "a gradient is an integer": lambda r: {"gradients": [12344, 12344]},
    "a gradient is a list": lambda r: {"gradients": [[[1.0] * 3] * 3] * 2},
    "addresses": lambda r: {"gradients": np.array([x.ctypes.data for x in r.weights], np.uintp)},
    "a gradient without its sums": lambda r: {"sums": NONE},
    "sums without their gradient": lambda r: {"gradients": NONE, "sums": arrays()},
    "a moment is read-only": lambda r: {"m": [np.broadcast_to(0.0, (3, 3))] * 2},
    "threads 0": lambda r: {"threads": 0},
    "threads -5": lambda r: {"threads": -5},
    "a gradient is another parameter": lambda r: {"gradients": [r.weights[1].T, arrays()[0]]},
    "a gradient is the next parameter as it is": lambda r: {"gradients": [r.weights[1], arrays()[0]]},
    "the last gradient is the first parameter": lambda r: {"gradients": [arrays()[0], r.weights[0]]},
    "sums are another parameter": lambda r: {"sums": [r.weights[1], arrays()[0]]},
    "a gradient is its parameter transposed": lambda r: {"gradients": [r.weights[0].T, arrays()[0]]},
}


@pytest.mark.parametrize("case", STEPS_REFUSED)
def test_a_step_that_is_refused(case: str) -> None:
    ready = Ready()
    changed = STEPS_REFUSED[case](ready)
    with pytest.raises((TypeError, ValueError)):
        ready.step(**changed)
    assert all((w == 1).all() for w in ready.weights)
    assert ready.step() == 0


@pytest.mark.parametrize("kind", ["m", "v"])
@pytest.mark.parametrize("gradient", [lambda x: x, lambda x: x.T, lambda x: x[::-1]])
def test_a_gradient_that_is_a_moment(kind: str, gradient: Callable[[Any], Any]) -> None:
    ready, moments = Ready(), {"m": arrays(0.5), "v": arrays(0.5)}
    with pytest.raises(ValueError, match="gradient of 'a' overlaps the moments of 'b'"):
        ready.step(**moments, rates=rates(1, eps=1.0), gradients=[gradient(moments[kind][1]), arrays()[0]])
    assert all((x == 0.5).all() for x in (*moments["m"], *moments["v"]))


def test_overlaps_are_seen_wherever_arrays_have_moved_to() -> None:
    """Views of one memory, of which weights and gradients change places between steps."""
    ready = Ready()
    memory = np.ones((6, 3, 3))
    for _ in range(2):
        for first, second in ((0, 1), (3, 2), (5, 0)):
            weights = [memory[first], memory[second]]
            for g in range(6):
                gradients = [memory[g], memory[(g + 1) % 6]]
                if g != second and (g + 1) % 6 != first:
                    ready.step(weights=weights, gradients=gradients, rates=rates(lr=0.0))
                else:
                    with pytest.raises(ValueError, match="overlaps"):
                        ready.step(weights=weights, gradients=gradients, rates=rates(lr=0.0))


@pytest.mark.parametrize(
    ("stage", "call"),
    [
        (0, lambda r: r.step()),
        (1, lambda r: r.step()),
        (0, lambda r: r.plan.set_reference(*np.ones((3, 3)))),
        (1, lambda r: r.plan.gather(r.weights, arrays(), None, NONE, NONE, np.inf, None, 1)),
        (1, lambda r: r.plan.solve(np.ones((6, 4)), None, rates(), np.inf, np.inf)),
        (1, lambda r: r.plan.apply(r.weights, arrays(), NONE, NONE, rates(), np.ones((9, 4)), 1)),
        (0, lambda r: r.plan.path_values(r.weights, arrays(), None)),
        (0, lambda r: r.plan.path_gradients(r.weights, arrays(), arrays(), None, arrays())),
        (0, lambda r: r.plan.allocate(r.weights, arrays(), arrays())),
    ],
)
def test_calls_come_in_order(stage: int, call: Callable[[Ready], Any]) -> None:
    expected = "set_reference" if stage else "set_trees"
    with pytest.raises(ValueError, match=f"expected {expected} to be called first"):
        call(Ready(stage))
    ready = Ready()
    if stage == 0:  # choosing trees undoes those that were set, and so does a failure to set others
        ready.plan.choose_trees(ready.weights, False, None)
        with pytest.raises(ValueError, match="first"):
            call(ready)
        ready = Ready()
        with pytest.raises(ValueError, match="tree"):
            ready.plan.set_trees(np.zeros((3, 2), np.int64), np.zeros((3, 2), np.int64))
        with pytest.raises(ValueError, match="first"):
            call(ready)


@pytest.mark.parametrize(
    "call",
    [
        lambda p, w: p.path_values(w, NONE, None),
        lambda p, w: p.path_values(w, arrays(), NONE),
        lambda p, w: p.path_values(w, [4096, 4096], None),
        lambda p, w: p.path_values(w, [x.astype(np.float32) for x in w], None),
        lambda p, w: p.path_gradients(w, NONE, arrays(), None, arrays()),
        lambda p, w: p.path_gradients(w, arrays(), NONE, None, arrays()),
        lambda p, w: p.path_gradients(w, arrays(), arrays(), None, NONE),
        lambda p, w: p.path_gradients(w, np.zeros(2, np.uintp), arrays(), None, arrays()),
        lambda p, w: p.allocate(w, NONE, arrays()),
        lambda p, w: p.allocate(w, arrays(), NONE),
        lambda p, w: p.choose_trees(NONE, False, None),
        lambda p, w: p.choose_trees(w, False, np.zeros(3)),
        lambda p, w: p.choose_trees(w, False, np.ones(2)),
        lambda p, w: p.gather(w, arrays(), None, NONE, NONE, np.inf, None, 0),
        lambda p, w: p.gather(w, arrays(), None, NONE, NONE, 0.0, None, 1),
        lambda p, w: p.gather(w, arrays(), NONE, NONE, NONE, np.inf, None, 1),
        lambda p, w: p.gather(w, arrays(), None, NONE, NONE, 1.0, np.ones((2, 3)), 1),
        lambda p, w: p.gather(w, arrays(), None, NONE, NONE, 1.0, np.ones((1, 4)), 1),
        lambda p, w: p.gather(w, arrays(), None, NONE, NONE, 1.0, np.ones((2, 4), np.float32), 1),
        lambda p, w: p.solve(np.ones((5, 4)), None, rates(), np.inf, np.inf),
        lambda p, w: p.solve(np.ones((6, 3)), None, rates(), np.inf, np.inf),
        lambda p, w: p.solve(np.ones((4, 6)).T, None, rates(), np.inf, np.inf),
        lambda p, w: p.solve(None, None, rates(), np.inf, np.inf),
        lambda p, w: p.solve(np.ones((6, 4)), None, rates(7), np.inf, np.inf),
        lambda p, w: p.solve(np.ones((6, 4)), np.ones(4), rates(), np.inf, np.inf),
        lambda p, w: p.solve(np.ones((6, 4)), None, rates(), 1.0, np.inf),
        lambda p, w: p.apply(w, arrays(), NONE, NONE, rates(), np.ones((8, 4)), 1),
        lambda p, w: p.apply(w, arrays(), NONE, NONE, rates(1), np.ones((9, 4)), 1),
        lambda p, w: p.apply(w, arrays(), NONE, NONE, rates(), np.ones((9, 4)), 0),
        lambda p, w: p.apply(w, [w[1], arrays()[0]], NONE, NONE, rates(), np.ones((9, 4)), 1),
        lambda p, w: p.apply([np.broadcast_to(1.0, (3, 3))] * 2, arrays(), NONE, NONE, rates(), np.ones((9, 4)), 1),
        lambda p, w: p.set_shard(*SHARD[:5], np.zeros(3, np.int64), None),
        lambda p, w: p.set_shard(*SHARD[:6], np.ones(3, bool)),
        lambda p, w: p.set_shard(*SHARD[:2], UNITS[:2], *SHARD[3:], None),
        lambda p, w: p.set_shard(*SHARD[:2], UNITS + 1, *SHARD[3:], None),
        lambda p, w: p.set_shard(*SHARD[:3], PINNED - 1, *SHARD[4:], None),
        lambda p, w: p.set_shard(*SHARD[:4], UNITS, SHARD[5], None),
        lambda p, w: p.set_shard(*SHARD[:5], np.ones(3, bool), None),
        lambda p, w: p.set_shard(np.full((3, 2), 9), *SHARD[1:], None),
        lambda p, w: p.set_shard(SHARD[0], np.zeros((3, 2), np.int64), *SHARD[2:], None),
        lambda p, w: p.set_trees(None, None),
        lambda p, w: p.set_trees(np.zeros((2, 2), np.int64), np.zeros((3, 2), np.int64)),
        lambda p, w: p.set_reference(np.ones(3), np.ones(3), np.array([1, 1, np.inf])),
        lambda p, w: p.set_reference(np.ones(3), np.zeros(3), np.ones(3)),
    ],
)
def test_a_call_that_is_refused(call: Callable[[Any, list[Any]], Any]) -> None:
    ready = Ready()
    with pytest.raises((TypeError, ValueError)):
        call(ready.plan, ready.weights)


def block(**changed: Any) -> Any:
    names = ["array", "extents", "axes", "steps", "start_axis", "start", "rows", "cols"]
    return tuple({**dict(zip(names, BLOCKS[0], strict=True)), **changed}.values())


HUGE = 2**32
NO_UNITS = np.zeros(0, np.int64)


@pytest.mark.parametrize(
    ("units", "specs", "blocks"),
    [
        (-1, [], []),
        (2**62, [], []),
        (None, [], []),
        (3, SPECS, (BLOCKS[0],)),
        (3, SPECS, [7]),
        (3, [7, 7], BLOCKS),
        (3, [("a", [3, 3], "d")], []),
        (3, [("a", (3, 3), "g")], []),
        (3, [("a", (3, 3), "dd")], []),
        (3, [(b"a", (3, 3), "d")], []),
        (0, [("a", (-3,), "d")], []),
        (0, [("a", (HUGE, HUGE), "d")], []),
        (0, [("a", ("3",), "d")], []),
        (0, [("a", (1,) * 9, "d")], []),
        (3, SPECS, [block(array=2)]),
        (3, SPECS, [block(array=-1)]),
        (2, SPECS, [block()]),
        (3, SPECS, [block(rows=UNITS - 2)]),
        (3, SPECS, [block(rows=UNITS[:2])]),
        (3, SPECS, [block(rows=UNITS.tolist())]),
        (3, SPECS, [block(rows=UNITS.astype(np.int32))]),
        (3, SPECS, [block(rows=UNITS.astype(">i8"))]),
        (3, SPECS, [block(rows=np.repeat(UNITS, 2)[::2])]),
        (3, SPECS, [block(rows=np.zeros(25, np.uint8)[1:].view(np.int64))]),
        (3, SPECS, [block(axes=(0, 0, 2, 0, 0, 0))]),
        (3, SPECS, [block(axes=(0, 0, -1, 0, 0, 0))]),
        (3, SPECS, [block(steps=(0, 1, -1, 0, 0, 0))]),
        (3, SPECS, [block(steps=(0, 1, 2**62, 0, 0, 0))]),
        (3, SPECS, [block(start=1)]),
        (3, SPECS, [block(start=-1)]),
        (3, SPECS, [block(start_axis=2)]),
        (3, SPECS, [block(extents=(1, 3, 3, 2, 1, 1))]),
        (3, SPECS, [block(extents=(1, 3, 3, -1, 1, 1))]),
        (3, SPECS, [block(extents=(1, 3, 3))]),
        (1, [("a", (1,), "d")], [block(extents=(HUGE, HUGE, 1, 1, 1, 1), rows=NO_UNITS, cols=NO_UNITS)]),
        (1, [("a", (1,), "d")], [block(extents=(HUGE, HUGE, HUGE, 1, 1, 1), rows=NO_UNITS, cols=NO_UNITS)]),
        (0, [("a", (0,), "d")], [block(extents=(0, 1, 1, 1, 1, 1), axes=(0, 10**8, 0, 0, 0, 0), rows=NO_UNITS)]),
    ],
)
def test_a_description_that_is_refused(units: Any, specs: Any, blocks: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        _core.Plan(units, specs, blocks)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 31, 32, 33, 100])
def test_a_checksum_sees_every_bit(n: int) -> None:
    """And how many bytes there are, and their order."""
    x = np.arange(n, dtype=np.uint8)
    others = [x[:-1].copy(), np.append(x, np.uint8(0)), x[::-1].copy()] if n > 1 else []
    for bit in range(8 * n):
        others.append(x.copy())
        others[-1][bit // 8] ^= 1 << bit % 8
    assert _core.checksum(x) == _core.checksum(x.copy())
    assert len({_core.checksum(y) for y in (x, *others)}) == 1 + len(others)
    with pytest.raises(ValueError, match="contiguous"):
        _core.checksum(np.zeros((2, 2)).T[:1])
