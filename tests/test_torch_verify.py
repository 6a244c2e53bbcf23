"""What `verify` finds, and what it does not blame on a network."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Call
from torch import Tensor, nn

from gsgd import Network
from gsgd.torch import GSGD, SymmetryError, trace, verify


def two_layers(function: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return Call(function, a=nn.Linear(4, 8), b=nn.Linear(8, 3))


def network(bias: str | None = "a.bias") -> Network:
    net = Network()
    net.output(net.dense("b.weight", net.dense("a.weight", net.input(4), 8, bias=bias), 3, bias="b.bias"))
    return net


X = torch.randn(6, 4)


def relu(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.relu(m.a(x)))


def test_an_omitted_bias_that_is_zero_is_found() -> None:
    model = two_layers(relu)
    nn.init.zeros_(model.a.bias)
    verify(model, network(), X)
    with pytest.raises(SymmetryError, match=r"'a.weight'"):
        verify(model, network(bias=None), X)


def test_random_numbers_of_numpy_are_seeded() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return relu(m, x * torch.from_numpy(np.random.rand(4)).to(x.dtype))  # noqa: NPY002

    model, state = two_layers(forward), np.random.get_state()[2]  # noqa: NPY002
    verify(model, network(), X)
    assert np.random.get_state()[2] == state  # noqa: NPY002
    with pytest.raises(SymmetryError):
        verify(model, network(bias=None), X)


def test_random_numbers_that_cannot_be_seeded_blame_no_layer() -> None:
    model = two_layers(lambda m, x: relu(m, x * np.random.default_rng().uniform(0.5, 1)))
    with pytest.raises(ValueError, match="two runs on the same weights give different outputs") as raised:
        verify(model, network(), X)
    assert not isinstance(raised.value, SymmetryError)


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: torch.rand(()).item(), lambda: np.random.rand()],  # noqa: NPY002
)
def test_every_branch_of_a_random_choice_is_tried(draw: Callable[[], float]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(m.a(x))
        return m.b(torch.sigmoid(h) if draw() < 0.4 else h)

    for seed in range(5):
        with pytest.raises(SymmetryError):
            verify(two_layers(forward), network(), X, seed=seed)


@pytest.mark.parametrize("probability", [0.0, 0.01])
def test_layers_that_are_skipped_at_random(probability: float) -> None:
    """A chain that skips a layer rarely: few seeds would find it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(m.a(x))
        skip = m.training and torch.rand([]) < probability
        return m.b(h if skip else torch.relu(m.c(h)))

    model = Call(forward, a=nn.Linear(4, 8), c=nn.Linear(8, 8), b=nn.Linear(8, 3))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        net = trace(model, X)
    if not probability:
        assert not found
        verify(model, net, X)
        return
    assert "branches on random numbers, at" in str(found[0].message)
    with pytest.raises(SymmetryError, match=r"in training.*'c.weight'"):
        verify(model, net, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verify(model, trace(model, X, pin_after=("a", "c")), X)


def test_modules_that_refuse_plain_state_dicts_are_set_in_place() -> None:
    class Versioned(nn.Linear):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("no version in the metadata")

    model = Call(relu, a=Versioned(4, 8), b=nn.Linear(8, 3))
    verify(model, network(), X)


def test_complex_parameters_are_widened() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return relu(m, torch.fft.irfft(torch.fft.rfft(x) * m.gain, n=4))

    model = two_layers(forward)
    model.gain = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    net = trace(model, X)
    assert net.num_units == 8
    assert "gain" not in net.shapes
    verify(model, net, X)


def test_a_forward_that_reads_the_original_is_refused() -> None:
    model = two_layers(relu).double()
    view = model.a.weight.t()
    model.function = lambda m, x: relu(m, x) + (x @ view).sum()
    with pytest.raises(ValueError, match="forward refers to the original model"):
        verify(model, network(), X)
    assert model.a.weight.grad is None


def test_parameters_that_the_pass_did_not_read_are_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(m.a(x))
        return m.b(torch.relu(m.c(h)) if len(x) > 100 else h)

    model = Call(forward, a=nn.Linear(4, 8), c=nn.Linear(8, 8), b=nn.Linear(8, 3))
    for call in (trace, GSGD):
        with pytest.warns(UserWarning, match=r"did not read c\.weight, c\.bias\. If other passes"):
            call(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(model, leave_out="c")
        trace(model, torch.randn(101, 4))
        model.c.requires_grad_(False)
        trace(model)


def test_a_guessed_size_that_takes_another_branch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(torch.relu(h) if x.shape[-1] > 64 else torch.tanh(h)).mean((2, 3))

    model = Call(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3))
    with pytest.warns(UserWarning, match=r"\(2, 3, 224, 224\), .* of \(2, 3, 32, 32\): pass example_inputs"):
        trace(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trace(model, torch.randn(2, 3, 32, 32)).num_units == 0
