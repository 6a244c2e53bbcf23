"""Methods as data: their rows, their bias corrections, and their defaults in every signature."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsgd
import gsgd.torch
from gsgd.methods import METHODS, SGD, Adam, Method, RMSprop

OF = {"GSGD": SGD, "GAdam": Adam, "GRMSprop": RMSprop}
sizes, fractions = st.floats(0, 1e3), st.floats(0, 1, exclude_max=True)


@given(
    st.one_of(
        st.builds(SGD, sizes, st.floats(1e-3, 1), st.booleans(), sizes),
        st.builds(Adam, sizes, st.tuples(fractions, fractions), sizes, sizes, st.booleans()),
        st.builds(RMSprop, sizes, fractions, sizes, sizes, sizes),
    ),
    st.integers(1, 100),
)
def test_a_row_and_back(method: Method, step: int) -> None:
    at = method.at(step)
    back = METHODS[at.row.method].of_row(at.row)
    assert (type(back), back.hyperparameters, back.row) == (type(method), method.hyperparameters, at.row)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("step", [1, 2, 10, 100_000])
def test_corrections_of_a_count_that_is_an_array(beta: float, step: int) -> None:
    """In float32 too, where 1 - beta ** step would cancel."""
    expected = 1 / -np.expm1(step * np.log(np.longdouble(beta))) if beta else 1.0
    for dtype, rtol in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        found = Adam(betas=(beta, beta)).at(torch.tensor(step, dtype=dtype)).correct
        assert {x.dtype for x in found} == {dtype}
        np.testing.assert_allclose([float(x) for x in found], float(expected), rtol=rtol)
    np.testing.assert_allclose(Adam(betas=(beta, beta)).at(step).correct, float(expected), rtol=1e-9)


@pytest.mark.parametrize("name", OF)
def test_defaults_of_signatures(name: str) -> None:
    for module in (gsgd, gsgd.torch):
        parameters = inspect.signature(getattr(module, name)).parameters
        for field in OF[name].names():
            assert parameters[field].default == getattr(OF[name], field), (module, field)


class Unknown:
    """A number that is not known, as on a device or in a trace."""

    shape = ()

    def __float__(self) -> float:
        raise AssertionError("waits for a device")


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_not_known_is_not_read(kind: Any) -> None:
    x = Unknown()
    given = {n: (x, x) if n == "betas" else x for n in kind.names() if n not in ("nesterov", "decoupled")}
    method = kind(**given)
    assert (method.lr, method.has_m) == (x, True)
    assert x in method.row
    with pytest.raises(AssertionError, match="waits"):
        method.known()
    for name in given:
        bad, unread = ((2.0, 0.5), (torch.tensor(2.0), 0.5)) if name == "betas" else (-1.0, torch.tensor(-1.0))
        with pytest.raises(ValueError, match=name):
            kind(**{**given, name: bad})
        with pytest.raises(ValueError, match=name):
            kind(**{name: unread}).known()
