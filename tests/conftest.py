"""For all tests."""

import os
import random

import numpy as np
import pytest
import torch

from prelude.data.remote_shards import keep_remote_shards


def pytest_collection_modifyitems(items):
    """The files that launch come first: they take longest, and whichever file comes last leaves other cores idle."""
    items.sort(key=lambda item: item.path.parent.name != "launch")


@pytest.fixture(autouse=True)
def seeded_generators():
    """What a test draws from a global generator is the same alone, after any other test, and at each run."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def nobody_is_a_rank():
    """A door that a test runs in this process says in the environment that it is one; what later tests start is not."""
    _forget_ranks()
    yield
    _forget_ranks()


@pytest.fixture(autouse=True)
def remote_shards_are_kept_where_they_usually_are():
    """Whatever folder of its own a test names for its process."""
    yield
    keep_remote_shards(None, None)


def _forget_ranks() -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
