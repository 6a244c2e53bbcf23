"""One suite over both implementations, the C core and the reference."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from gsgd.torch.engines import Engine, choose

settings.register_profile("random", deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
settings.register_profile("fixed", settings.get_profile("random"), derandomize=True, max_examples=60)
settings.load_profile("fixed")
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["c", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Which implementation of the three stages a test runs on."""
    return str(request.param)


@pytest.fixture(params=["core", "array"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which engine takes the steps of PyTorch's optimizers where a test asks for none."""

    def chosen(option: Any, *rest: Any) -> Engine:
        return choose(request.param if option == "auto" else option, *rest)

    monkeypatch.setattr("gsgd.torch.path_optimizer.choose", chosen)
    return str(request.param)
