"""For all tests."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_generators():
    """What a test draws from a global generator is the same alone, after any other test, and at each run."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
