import pytest
import torch

from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped, UserError
from prelude.data.loader import build_loader
from prelude.data.order import sample_seed
from prelude.data.streaming import StreamingLoader

PLAN = ViewPlan((View((6, 6)),))


@pytest.fixture
def pipe(write_shards):
    """A pattern of pipes over three shards; sample 3 is spoilt."""
    folder = write_shards([10, 5, 20], bad={3})[0].rpartition("/")[0]
    return f"pipe:cat {folder}/{{000..002}}.tar"


def build(shards, **changes):
    settings = dict(seed=5, micro_batch=4, num_samples=35, allow_commands=True) | changes
    return build_loader(shards, PLAN, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pipe_gives_the_same_kind_of_batches(pipe, num_workers):
    loader = build(pipe, num_workers=num_workers, rank=1, world_size=2)
    assert isinstance(loader, StreamingLoader) and loader.num_samples == 35 and loader.num_shards == 3
    for step in range(12):
        batch = next(loader)
        assert batch.views[0].shape == (4, 3, 6, 6) and batch.views[0].dtype == torch.uint8
        assert batch.positions.tolist() == [step * 8 + slot * 2 + 1 for slot in range(4)]
        assert batch.seeds.tolist() == [sample_seed(5, position) for position in batch.positions.tolist()]
        assert batch.labels is None
    assert loader.state_dict()["samples"] == 96
    loader.close()


def test_a_sample_keeps_its_id_and_most_samples_come(pipe):
    loader = build(pipe)
    ids = {i for _ in range(100) for i in next(loader).sample_ids.tolist()}
    assert len(ids) == 34  # all but the spoilt one, whichever worker or epoch they come in
    assert loader.bad.num_bad > 0 and {reason for _, reason in loader.bad.counts} == {"not an image"}


def test_ranks_and_resumed_runs_draw_differently(pipe):
    loaders = [build(pipe, rank=rank, world_size=2) for rank in (0, 1)]
    resumed = build(pipe, rank=0, world_size=2)
    resumed.load_state_dict(loaders[0].state_dict() | {"samples": 80})
    ids = [[i for _ in range(5) for i in next(loader).sample_ids.tolist()] for loader in [*loaders, resumed]]
    assert ids[0] != ids[1] and ids[0] != ids[2]
    assert resumed.samples == 120


def test_it_says_that_resume_is_not_exact(pipe, caplog):
    assert build(pipe).state_dict()["exact"] is False
    assert [r.message for r in caplog.records if "an exact resume is not available" in r.message]


def test_a_state_of_an_exact_loader_is_refused(pipe, write_shards):
    exact = build(write_shards([35], folder="local"), num_samples=None)
    with pytest.raises(UserError, match="exact True -> False"):
        build(pipe).load_state_dict(exact.state_dict())


@pytest.mark.parametrize(
    "shards, changes, sentence",
    [
        ("pipe:cat x.tar", dict(num_samples=None), r"write data.num_samples=..., or copy"),
        ("pipe:cat x.tar", dict(label="cls"), "Labels cannot be read from pipe:cat x.tar"),
        ("swift://bucket/x.tar", {}, r"the scheme swift is not known; write .*pipe:aws s3 cp"),
    ],
)
def test_what_cannot_work_is_refused(shards, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        build(shards, **changes)


def test_a_folder_of_images_beside_a_stream_is_refused(tmp_path, image):
    (tmp_path / "7.png").write_bytes(image(0))
    with pytest.raises(UserError, match="is a folder of images, which needs an index, and pipe:cat x.tar is a stream"):
        build([str(tmp_path), "pipe:cat x.tar"])


@pytest.mark.parametrize("command", ["pipe:false", "pipe:echo no tar", "pipe:cat /nowhere/x.tar 2> /dev/null"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pipe_that_never_works_stops_the_run(command, num_workers):
    loader = build(command, num_workers=num_workers)
    with pytest.raises(RunStopped, match="cannot be read.* in pipe:"):
        next(loader)
    loader.close()


def test_a_pipe_that_fails_now_and_then_is_noted_and_passed(pipe, write_shards):
    loader = build([pipe, "pipe:false"])
    for _ in range(30):
        assert len(next(loader)) == 4
    assert any(shard == "pipe:false" for shard, _ in loader.bad.counts)
