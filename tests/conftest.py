"""Settings every test shares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from emulation.device import Device

pytest.register_assert_rewrite("device_networks")

# Networks here are tiny: threads would cost more than they win, and tests may run side by side.
torch.set_num_threads(1)

SLOW = [HealthCheck.too_slow]
settings.register_profile("adcert", deadline=None, suppress_health_check=SLOW, derandomize=True)
settings.register_profile("fuzz", deadline=None, suppress_health_check=SLOW, max_examples=2000)
settings.load_profile("adcert")


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def place(request: pytest.FixtureRequest) -> Iterator[object]:
    """A device of each kind (:mod:`places`)."""
    from places import opened

    with opened(request.param) as found:
        yield found


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Iterator[object]:
    """A GPU, emulated and real."""
    from places import opened

    with opened(request.param) as found:
        yield found


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves the number of threads alone."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulated() -> Iterator[Device]:
    """An emulated CUDA device, ``cuda:0``, for the duration of the test: see ``emulation/device.py``."""
    from emulation.device import emulated_cuda

    with emulated_cuda() as device:
        yield device


def pytest_collection_finish(session: pytest.Session) -> None:
    """The emulation has to be there before the first backward pass, and costs a compiler run: only if it is used."""
    asked = any("emulated" in getattr(item, "fixturenames", ()) for item in session.items)
    if asked or "emulation.device" in sys.modules:
        from emulation import runtime

        runtime.load()
