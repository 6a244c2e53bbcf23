"""Hooks of the user's run on copies of what they refer to: the user's lists hold nothing of a trace or a check."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from gsgd.torch import GSGD, SymmetryError, trace, verify

SEEN: list[Tensor] = []
COUNTS = {"calls": 0}
total = 0


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def keep_globally(module: nn.Module, given: Any, out: Tensor) -> None:
    global total
    total += 1
    SEEN.append(out)
    COUNTS["calls"] += 1


class Monitor:
    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def __call__(self, module: nn.Module, given: Any, out: Tensor) -> None:
        self.kept["out"] = out

    def method(self, module: nn.Module, given: Any, out: Tensor) -> None:
        self.kept["out"] = out.detach()


def into(kept: list[Tensor], module: nn.Module, given: Any, out: Tensor) -> None:
    kept.append(out)


def closing_over(kept: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, given: Any, out: Tensor) -> None:
        kept.append(out)

    return hook


def averaging(kept: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, given: Any, out: Tensor, kept: list[Tensor] = kept) -> None:
        kept[0].add_(out.detach().mean(0))

    return hook


def hooks() -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """A name, a hook, and what it has kept."""
    lists: list[list[Any]] = [[], [], [torch.zeros(6)]]
    monitors = Monitor(), Monitor()
    yield "globals", keep_globally, lambda: (SEEN, COUNTS["calls"], total)
    yield "closure", closing_over(lists[0]), lambda: lists[0]
    yield "partial", partial(into, lists[1]), lambda: lists[1]
    yield "object", monitors[0], lambda: monitors[0].kept
    yield "method", monitors[1].method, lambda: monitors[1].kept
    yield "default", averaging(lists[2]), lambda: lists[2][0].sum()


@pytest.mark.parametrize("name", ["globals", "closure", "partial", "object", "method", "default"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_a_hook_keeps_stays_as_it_was(name: str, everywhere: bool) -> None:
    hook, kept = next((hook, kept) for own, hook, kept in hooks() if own == name)
    if everywhere and name == "default":
        pytest.skip("the outputs have other shapes")
    model, x = mlp(), torch.randn(4, 5)
    if everywhere:
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = model[1].register_forward_hook(hook)
    before = str(kept())
    try:
        net = trace(model, x)
        verify(model, net, x)
        assert str(kept()) == before
        assert net.num_units == 12
        model(x)
        assert str(kept()) != before  # the hook is the user's own again
    finally:
        handle.remove()


def test_a_monitor_that_looks_at_values() -> None:
    model = mlp()
    model[1].register_forward_hook(lambda module, given, out: print(end=" "[: out.mean().item() > 1e9]))
    with pytest.warns(UserWarning, match=r"asks for real values, at .*test_torch_hooks\.py:\d+: they were those of"):
        assert GSGD(model, lr=0.1).network.num_units == 12


def test_hooks_that_change_values_are_part_of_the_model() -> None:
    model, x, plain = mlp(), torch.randn(4, 5), trace(mlp())
    model[1].register_forward_hook(lambda module, given, out: out + 1)
    model[4].register_forward_pre_hook(lambda module, given: (torch.tanh(given[0]),))
    net = trace(model, x)
    assert net.num_units == 0
    verify(model, net, x)
    with pytest.raises(SymmetryError):
        verify(model, plain, x)


def test_hooks_that_compute_weights() -> None:
    model, x = mlp(), torch.randn(4, 5)
    prune.random_unstructured(model[2], "weight", amount=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[4])
    net = trace(model, x)
    assert "4.weight_v" not in net.shapes
    verify(model, net, x)


def test_gradients_that_a_hook_changes_lack_the_symmetry() -> None:
    model, x, lists = mlp(), torch.randn(4, 5), []
    net = trace(model, x)
    model[2].register_full_backward_hook(lambda module, given, out: lists.append(given))
    verify(model, net, x)
    assert not lists
    model[2].register_full_backward_hook(lambda module, given, out: (2 * given[0],))
    assert trace(model, x).units == net.units
    with pytest.raises(SymmetryError, match="gradients"):
        verify(model, net, x)
