"""Settings all tests share."""

import os

# One thread per worker: the tests run on all cores at once. Must be set before torch starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("heed", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("heed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
