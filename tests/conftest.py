"""What several test files share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("gudlib", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("gudlib")
torch.set_num_threads(1)  # tests are small and run side by side


@pytest.fixture(scope="session")
def golden():
    """The authors' numbers (see README.md beside this file), as tensors."""
    with np.load(Path(__file__).parent / "golden.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture
def generator():
    """A fresh, seeded source of randomness."""
    return torch.Generator().manual_seed(0)
