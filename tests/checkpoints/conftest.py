import pytest
import torch

from prelude.checkpoints import store as stores
from prelude.checkpoints.portable import PortableState


def state_of(value: float = 0.0, encoder: dict | None = None) -> PortableState:
    """A small state; `value` tells one from another."""
    tensors = encoder or {"encoder.weight": torch.full((3, 2), value), "center": torch.zeros((), dtype=torch.int64)}
    return PortableState(
        tensors=tensors,
        optimizer="AdamW",
        moments={"encoder.weight": {"exp_avg": torch.full((3, 2), -value)}},
        scalars={"encoder.weight": {"step": {"value": value, "dtype": "float32"}}},
    )


@pytest.fixture
def make_state():
    return state_of


@pytest.fixture
def save(monkeypatch):
    """`save(store, step, value)`: what an engine in state `value` would have saved, without an engine."""

    def save(store, step, value=None, meta=None, encoder=None):
        state = state_of(float(step if value is None else value), encoder)
        monkeypatch.setattr(stores, "gather_state", lambda engine: state)
        store.save(step, None, meta or {"step": step})
        return store.finish()

    return save
