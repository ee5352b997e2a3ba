import threading

import pytest
import torch

from prelude.checkpoints import store as stores
from prelude.checkpoints.saving import write_parts
from prelude.checkpoints.state.inventory import Spec
from prelude.checkpoints.state.parts import Part, Source
from prelude.checkpoints.state.portable import PortableState


def state_of(value: float = 0.0, encoder: dict | None = None) -> PortableState:
    """A small state; `value` tells one from another."""
    tensors = encoder or {"encoder.weight": torch.full((3, 2), value), "center": torch.zeros((), dtype=torch.int64)}
    return PortableState(
        tensors=tensors,
        optimizer="AdamW",
        moments={"encoder.weight/exp_avg": torch.full((3, 2), -value)},
        scalars={"encoder.weight": {"step": {"value": value, "dtype": "float32"}}},
    )


@pytest.fixture
def make_state():
    return state_of


@pytest.fixture
def save_whole(monkeypatch):
    """`save(store, step, value)`: what an engine in state `value` would have saved, without an engine."""

    def save(store, step, value=None, meta=None, encoder=None):
        state = state_of(float(step if value is None else value), encoder)
        monkeypatch.setattr(stores, "gather_state", lambda engine: state)
        store.save(step, None, meta or {"step": step})
        return store.finish()

    return save


@pytest.fixture
def save(save_whole):
    return save_whole


class OneOfTwo:
    """A rank, and what the other one says."""

    world_size = 2

    def __init__(self, rank: int, other=None):
        self.rank, self.other, self.told = rank, other, None

    def told_to_first(self, value):
        self.told = value
        return None if self.rank else [value, self.other]


def parts_of(state: PortableState) -> list[Part]:
    """Of two ranks: each tensor is cut after its fourth element, what has fewer is rank 0's."""

    def spans(size):
        return lambda rank: ((0, min(4, size), 0), (min(4, size), size, 4))[rank]

    contents = {"model": state.tensors, "optimizer": state.moments}
    sources = [
        Source(content, name, Spec(tensor.shape, tensor.dtype), None, spans(tensor.numel()))
        for content, tensors in contents.items()
        for name, tensor in tensors.items()
    ]
    cuts = (slice(0, 4), slice(4, None))
    return [
        Part(
            {
                content: {name: t.reshape(-1)[cut] for name, t in tensors.items() if t.reshape(-1)[cut].numel()}
                for content, tensors in contents.items()
            },
            sources, state.optimizer, state.scalars,
        )
        for cut in cuts
    ]  # fmt: skip


@pytest.fixture
def save_parts():
    """As `save`, by two ranks that write one after the other in this process."""

    def save(store, step, value=None, meta=None, encoder=None):
        first, second = parts_of(state_of(float(step if value is None else value), encoder))
        draft, other = store.shelf.draft_of(step, "-mark"), OneOfTwo(1)
        store.folder.mkdir(exist_ok=True)
        store.shelf.clean()
        draft.mkdir()
        write_parts(draft, second, other, threading.Event())
        ranks, done = OneOfTwo(0, other.told), threading.Event()
        failure = store._try_to_write_part(draft, step, first, meta or {"step": step}, ranks, done)
        assert not failure, failure
        return store.folder / f"step-{step:08d}"

    return save


@pytest.fixture(params=["whole", "parts"])
def saving(request, save_whole, save_parts):
    """`save` in both layouts, and the files of that layout."""
    if request.param == "whole":
        return save_whole, ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    parts = [f"{name}-0000{rank}-of-00002.safetensors" for name in ("model", "optimizer") for rank in (0, 1)]
    return save_parts, (*parts, "pieces.json", "state.json", "manifest.json")
