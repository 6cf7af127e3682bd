"""What several test files share."""

from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

slow = [HealthCheck.too_slow]  # a busy machine is no fault
settings.register_profile("gudlib", deadline=None, derandomize=True, max_examples=30, suppress_health_check=slow)
settings.load_profile("gudlib")
torch.set_num_threads(1)  # tests are small and run side by side


@pytest.fixture(scope="session")
def golden():
    """The authors' numbers (see README.md beside this file), as tensors."""
    with np.load(Path(__file__).parent / "golden.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture
def unchecked():
    """Annotations are not enforced, as for users: what is refused must be refused by the function itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def generator():
    """A fresh, seeded source of randomness."""
    return torch.Generator().manual_seed(0)
