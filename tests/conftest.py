"""Settings every test shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Networks here are tiny: threads would cost more than they win, and tests may run side by side.
torch.set_num_threads(1)

SLOW = [HealthCheck.too_slow]
settings.register_profile("adcert", deadline=None, suppress_health_check=SLOW, derandomize=True)
settings.register_profile("fuzz", deadline=None, suppress_health_check=SLOW, max_examples=2000)
settings.load_profile("adcert")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves the number of threads alone."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
