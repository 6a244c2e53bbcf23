"""One suite over both implementations, the C core and the reference."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "gsgd", deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile("gsgd")
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["c", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Which implementation of the three stages a test runs on."""
    return str(request.param)
