"""Volumes in shards: read, resampled, refused; and in turn with images at any number of ranks and workers."""

import io
import json
import re
import time
from collections import Counter
from fractions import Fraction
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from servers import Server, serving

from prelude.data import remote_shards, shape_volumes
from prelude.data.alternating import BLOCK, AlternatingLoader
from prelude.data.batch import View, ViewPlan, VolumePlan
from prelude.data.data_sets import DataSet, index_of_volumes
from prelude.data.decode import BadImage
from prelude.data.errors import RunStopped, UserError
from prelude.data.loader import Loader, alternating_loader, build_loader, one_pass
from prelude.data.order import Shuffle, sample_seed
from prelude.data.volumes import decode_volume, resample
from prelude.launch import shards

PLAN = VolumePlan((6, 5, 4))
IMAGES = ViewPlan((View((6, 6)),), volumes=PLAN)
SHUFFLE = Shuffle(streams=3, span=4, window=8)


def npy(values) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def voxels(number: int, shape=(6, 5, 4), dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 200, shape).astype(dtype)


@pytest.fixture
def write_volumes(tmp_path, write_tar):
    """write_volumes(counts, bad=numbers) -> pattern. Volume n is `voxels(n)`, its label n."""

    def write(counts=(7, 4), bad=(), make=voxels, folder="volumes") -> str:
        number = 0
        for shard, count in enumerate(counts):
            members = []
            for n in range(number, number + count):
                content = b"garbage" if n in bad else npy(make(n))
                members += [(f"{n:06}.npy", content), (f"{n:06}.cls", str(n).encode())]
            number += count
            write_tar(tmp_path / folder / f"{shard:03}.tar", members)
        return f"{tmp_path}/{folder}/*.tar"

    return write


# ---- from bytes to voxels


def test_arrays_with_and_without_channels_in_either_place_are_read():
    plain = voxels(0)
    assert np.array_equal(decode_volume(npy(plain))[..., 0], plain)
    assert np.array_equal(decode_volume(npy(np.asfortranarray(plain)))[..., 0], plain)
    coloured = voxels(1, (6, 5, 4, 2))
    assert np.array_equal(decode_volume(npy(coloured), 2), coloured)
    assert np.array_equal(decode_volume(npy(coloured.transpose(3, 0, 1, 2)), 2), coloured)
    assert np.array_equal(decode_volume(npy(coloured[..., :1]), 1), coloured[..., :1])
    assert decode_volume(npy(plain > 99)).max() == 255


def test_a_range_says_which_values_are_black_and_white_and_keeps_all_bits():
    stored = np.array([-1500, -1000, -300, 399, 400, 900], np.int16).reshape(1, 1, 6)
    found = decode_volume(npy(stored), 1, (-1000.0, 400.0)).ravel()
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx([0, 0, 127.5, 255 * 1399 / 1400, 255, 255])
    assert decode_volume(npy(voxels(0)), 1, (0.0, 1.0)).dtype == np.float32  # 8 bits have their own scale
    assert np.array_equal(decode_volume(npy(voxels(0)), 1, (0.0, 1.0))[..., 0], voxels(0))


REFUSED = [
    (npy(voxels(0, (6, 5))), "no array of a volume"),
    (npy(np.array(["a"])), "no array"),
    (b"garbage", "undecodable"),
    (npy(voxels(0))[:-1], "truncated"),
    (npy(voxels(0, (0, 5, 4))), "no pixels"),
    (npy(voxels(0, dtype=np.uint16)), "uint16 values, no data.volumes.range"),
    (npy(voxels(0, dtype=np.float32)), "float32 values, no data.volumes.range"),
    (npy(voxels(0, (6, 5, 4, 3))), "3 channels and not 1"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), REFUSED)
def test_what_is_no_volume_is_told_in_a_few_words(content, reason):
    with pytest.raises(BadImage, match=reason):
        decode_volume(content)


def test_a_volume_of_too_many_voxels_is_refused_before_it_is_read():
    header = npy(np.zeros((4, 4, 4), np.uint8)).replace(b"(4, 4, 4)", b"(4000, 4000, 400)".ljust(9))
    with pytest.raises(BadImage, match="too many pixels|undecodable"):
        decode_volume(header)
    with pytest.raises(BadImage, match="too many pixels"):
        decode_volume(npy(voxels(0)), max_voxels=6 * 5 * 4 - 1)
    decode_volume(npy(voxels(0)), max_voxels=6 * 5 * 4)


def test_a_volume_of_the_plan_s_size_is_copied_and_a_smooth_one_keeps_its_course():
    out = np.empty((6, 5, 4, 1), np.uint8)
    resample(voxels(3)[..., None], out)
    assert np.array_equal(out[..., 0], voxels(3))
    y, x, z = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in (12, 10, 8)], indexing="ij")
    small = np.empty((6, 5, 4, 1), np.float32)
    resample((100 * y + 50 * x + 25 * z).astype(np.float32)[..., None], small)
    y, x, z = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in (6, 5, 4)], indexing="ij")
    inside = np.s_[1:-1, 1:-1, 1:-1]
    assert np.allclose(small[..., 0][inside], (100 * y + 50 * x + 25 * z)[inside], atol=1e-3)


@pytest.mark.parametrize("size", [(9, 7, 6), (6, 10, 3)])
def test_growing_is_trilinear_and_axes_are_not_mixed_up(size):
    source = voxels(5, (6, 5, 3, 2))
    out = np.empty((*size, 2), np.uint8)
    resample(source, out)
    tensor = torch.from_numpy(source).permute(3, 0, 1, 2)[None].double()
    expected = F.interpolate(tensor, size, mode="trilinear", align_corners=False)[0].permute(1, 2, 3, 0)
    assert np.abs(out - expected.numpy()).max() <= 0.51


# ---- a loader of volumes


def test_a_loader_hands_over_whole_volumes_by_the_same_rule_as_images(write_volumes):
    index = index_of_volumes(DataSet(write_volumes()))
    batches = [next(Loader(index, PLAN, seed=3, micro_batch=6, num_workers=n)) for n in (0, 1)]
    for batch in batches:
        assert batch.of_volumes and batch.views[0].shape == (6, 1, 6, 5, 4) and batch.views[0].dtype == torch.uint8
        for row, (sample, position) in enumerate(zip(batch.sample_ids.tolist(), batch.positions.tolist(), strict=True)):
            assert np.array_equal(batch.views[0][row, 0].numpy(), voxels(sample))
            assert batch.seeds[row].item() == sample_seed(3, position)
    labelled = list(one_pass(index, PLAN, batch_size=5, label="cls"))
    assert [label for batch in labelled for label in batch.labels.tolist()] == list(range(11))


def test_a_volume_that_cannot_be_read_is_replaced_and_told(write_volumes):
    index = index_of_volumes(DataSet(write_volumes((9,), bad=(4,))))
    loader = Loader(index, PLAN, seed=0, micro_batch=9)
    batch = next(loader)
    assert 4 not in batch.sample_ids.tolist() and loader.bad.num_bad >= 1
    for row, sample in enumerate(batch.sample_ids.tolist()):
        assert np.array_equal(batch.views[0][row, 0].numpy(), voxels(sample))


MISTAKES = [
    (lambda n: voxels(n, dtype=np.int16), "hold int16 values, .* write data.volumes.range="),
    (lambda n: voxels(n, (6, 5, 4, 2)), "have 2 channels, and objective.volume_channels=1; write .*channels=2"),
    (lambda n: voxels(n, (6, 5)), "are no volumes, which are .npy files"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES)
def test_volumes_that_none_can_be_read_of_are_refused_at_the_start(write_volumes, make, message):
    with pytest.raises(UserError, match=message):
        Loader(index_of_volumes(DataSet(write_volumes(make=make))), PLAN, seed=0, micro_batch=2)


def test_what_is_not_there_is_told_by_its_key(tmp_path, write_tar):
    with pytest.raises(UserError, match="^data.volumes cannot be used: "):
        index_of_volumes(DataSet(f"{tmp_path}/none-*.tar"))
    with pytest.raises(UserError, match="data.volumes cannot be used: .* is a stream"):
        index_of_volumes(DataSet("pipe:cat x.tar"))
    pairs = str(write_tar(tmp_path / "pairs.tar", [("1.left.jpg", b"x"), ("1.right.jpg", b"x")]))
    with pytest.raises(UserError, match="hold several images .* extension, as data.volumes.image=left.jpg.$"):
        index_of_volumes(DataSet(pairs))


# ---- in turn with images


@pytest.fixture
def both(write_shards, write_volumes):
    """both(**settings) -> a loader of 13 images and 11 volumes."""
    images, of_volumes = write_shards([9, 4]), DataSet(write_volumes())

    def make(share=0.5, batch=4, seed=7, rank=0, world=1, micro=None, num_workers=0, plan=IMAGES) -> AlternatingLoader:
        common = dict(rank=rank, world_size=world, num_workers=num_workers, shuffle=SHUFFLE, seed=seed)
        common["micro_batch"] = micro or batch // world
        return alternating_loader(build_loader(images, plan, **common), of_volumes, PLAN, share, batch, **common)

    return make


def told(batch) -> list[tuple]:
    kind = "volumes" if batch.of_volumes else "images"
    columns = zip(batch.sample_ids.tolist(), batch.positions.tolist(), batch.seeds.tolist(), strict=True)
    return [(kind, *row, batch.views[0][n].numpy().tobytes()) for n, row in enumerate(columns)]


def steps(loader, count: int) -> list[list[tuple]]:
    found = [told(next(loader)) for _ in range(count)]
    loader.close()
    return found


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1, 0.8])
def test_each_kind_has_its_share_of_every_block_of_turns_in_an_order_that_is_drawn(both, share):
    loader, other = both(share), both(share, seed=8)
    kinds = [loader.kind_at(4 * turn) for turn in range(20 * BLOCK)]
    for end in range(BLOCK, 20 * BLOCK + 1, BLOCK):
        assert abs(Counter(kinds[:end])["volumes"] - Fraction(repr(share)) * end) <= 1
    blocks = {tuple(kinds[begin : begin + BLOCK]) for begin in range(0, 20 * BLOCK, BLOCK)}
    assert len(blocks) > 4
    assert kinds != [other.kind_at(4 * turn) for turn in range(20 * BLOCK)]
    assert all(loader.kind_at(4 * turn + 3) == kind for turn, kind in enumerate(kinds))


def test_the_turns_of_today_are_those_of_every_version(both):
    loader = both(seed=42)
    assert "".join(loader.kind_at(4 * turn)[0] for turn in range(16)) == GOLDEN


def test_each_kind_is_what_a_loader_of_its_own_gives(both):
    loader = both()
    alone = {name: Loader(one.index, one.plan, seed=one.seed, micro_batch=4, shuffle=SHUFFLE)
             for name, one in loader.loaders.items()}  # fmt: skip
    came = Counter()
    for step in steps(loader, 16):
        kind = step[0][0]
        assert step == told(next(alone[kind]))
        came[kind] += 1
    assert came == {"images": 8, "volumes": 8}
    assert loader.loaders["images"].state_dict()["views"] == ViewPlan((View((6, 6)),)).fingerprint()
    assert len({loader.loaders[name].seed for name in alone}) == 2  # a volume's draws are not an image's


@pytest.mark.parametrize(("world", "micro", "num_workers"), [(2, 2, 0), (4, 1, 0), (1, 2, 1), (2, 1, 2)])
def test_steps_are_the_same_at_any_number_of_ranks_micro_batches_and_workers(both, world, micro, num_workers):
    expected = [sorted(step) for step in steps(both(), 9)]
    ranks = [both(world=world, rank=rank, micro=micro, num_workers=num_workers) for rank in range(world)]
    for step in expected:
        found = [row for _ in range(4 // world // micro) for rank in ranks for row in told(next(rank))]
        assert sorted(found) == step
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("at", [1, 4, 7])
def test_it_goes_on_anywhere_at_other_ranks_and_workers(both, at):
    loader = both()
    whole = [told(next(loader)) for _ in range(at)]
    state = json.loads(json.dumps(loader.state_dict()))
    assert both().state_dict() | {"x": 0} != state  # it says where it is
    whole = steps(loader, 6)
    again = both(world=2, rank=1, num_workers=1)
    again.load_state_dict(state)
    for step in whole:
        assert told(next(again)) == step[1::2]
    again.close()


def test_a_resume_refuses_what_decides_the_turns(both, write_volumes, write_shards):
    loader = both()
    next(loader)
    state = loader.state_dict()
    for other, message in (
        (both(share=0.25), "volume_share 0.5 -> 0.25"),
        (both(batch=2), "turn 4 -> 2"),
        (both(plan=ViewPlan((View((8, 8)),), volumes=PLAN)), "^Of images: .*views"),
    ):
        with pytest.raises(UserError, match=message):
            other.load_state_dict(state)
        other.load_state_dict(state, allow_changed_data=True)
        next(other)
    alone = build_loader(write_shards([5], folder="alone"), IMAGES, seed=7, micro_batch=4)
    with pytest.raises(UserError, match="volumes none -> some.; restore them.$"):
        both().load_state_dict(alone.state_dict(), allow_changed_data=True)


def test_other_volumes_begin_their_next_pass_and_images_go_on(both, write_volumes):
    loader = both()
    for _ in range(6):
        next(loader)
    state = loader.state_dict()
    write_volumes((8, 3), make=lambda n: voxels(n + 50))
    other = both()
    with pytest.raises(UserError, match="^Of volumes: .*fingerprint"):
        other.load_state_dict(state)
    other.load_state_dict(state, allow_changed_data=True)
    assert other.loaders["images"].samples == loader.loaders["images"].samples
    assert other.loaders["volumes"].samples == 22  # 12 were used up, of passes of 11
    again = both()
    again.load_state_dict(other.state_dict())
    assert [told(next(other)) for _ in range(5)] == [told(next(again)) for _ in range(5)]


def test_it_says_what_there_is(both):
    loader = both(share=0.25)
    assert (loader.num_samples, loader.num_shards, loader.num_workers) == (24, 4, 0)
    assert loader.kinds() == [
        "images in 75 % of the steps (13 samples, 1.38 times an epoch)",
        "volumes in 25 % of the steps (11 samples, 0.545 times an epoch)",
    ]
    kind, count = loader.kind_at(0), 3
    assert loader.preview(count) == loader.loaders[kind].preview(count) and len(loader.preview(9)) == 4
    assert (loader.bad.num_bad, loader.bad.num_read) == (0, 0)
    next(loader)
    assert loader.bad.num_read == 4


def test_all_volumes_damaged_ends_the_run_in_a_sentence(write_shards, write_volumes):
    images = build_loader(write_shards([9]), IMAGES, seed=0, micro_batch=2)
    volumes = DataSet(write_volumes((2,), bad=(0, 1)))
    loader = alternating_loader(images, volumes, PLAN, 0.5, 2, seed=0, micro_batch=2)
    with pytest.raises(RunStopped, match="cannot be read, and nor can"):
        for _ in range(BLOCK):
            next(loader)


# ---- both from a store, through one cache


@pytest.fixture
def from_a_store(write_shards, write_volumes, monkeypatch):
    """from_a_store(room, **settings) -> a loader of images and volumes in eight shards each, all of one size, with a
    cache that has room for some of the sixteen; and the server."""
    monkeypatch.setattr(remote_shards, "_setting", remote_shards.CacheSetting())
    paths = [*write_shards([10] * 8, folder="images"), *sorted(glob(write_volumes([10] * 8)))]
    files = {"-".join(path.split("/")[-2:]): Path(path).read_bytes() for path in paths}
    assert len(set(map(len, files.values()))) == 1
    with serving(Server(files=files)) as server:

        def make(room: int, **settings) -> AlternatingLoader:
            remote_shards.keep_remote_shards(None, room * len(files["images-000.tar"]) / 2**30)
            common = dict(seed=7, micro_batch=4) | settings
            images = build_loader(f"{server.url}/images-{{000..007}}.tar", IMAGES, **common)
            volumes = DataSet(f"{server.url}/volumes-{{000..007}}.tar")
            return alternating_loader(images, volumes, PLAN, 0.5, 4, **common)

        yield make, server


def test_orders_of_both_kinds_that_the_cache_cannot_hold_together_are_refused_with_one_that_it_can(from_a_store):
    make, _ = from_a_store
    with pytest.raises(UserError, match="side by side, images and volumes together, and data.cache_gib=") as error:
        make(room=12)  # for all of either kind
    names = ("span", "window", "streams")
    order = {name: int(re.search(rf"data.shuffle.{name}=(\d+)", str(error.value))[1]) for name in names}
    assert make(room=12, shuffle=Shuffle(**order)).num_samples == 160
    assert make(room=16).num_samples == 160


def test_two_kinds_that_fill_the_cache_side_by_side_leave_each_other_room(from_a_store):
    """Either kind alone would be fetched as a whole; together the shards of one would push out those of the other."""
    make, server = from_a_store
    loader = make(room=12, shuffle=Shuffle(streams=1, span=10, window=10))
    kinds = set()
    while len(kinds) < 2:
        kinds.add(next(loader).of_volumes)
    fetched, until = -1, time.monotonic() + 60
    while fetched != (fetched := sum(server.asked.values())):
        assert time.monotonic() < until, "shards are fetched again and again"
        time.sleep(1.5)
    loader.close()


# ---- volumes made of shapes


def test_a_volume_of_shapes_is_a_function_of_its_index(tmp_path):
    volumes, labels = shape_volumes.make("train", np.arange(12), size=(16, 16, 8))
    assert volumes.shape == (12, 16, 16, 8) and labels.tolist() == [*range(6)] * 2
    some, _ = shape_volumes.make("train", np.array([7, 2]), size=(16, 16, 8))
    assert np.array_equal(some, volumes[[7, 2]])
    for split, seed in (("test", 0), ("train", 1)):
        other, _ = shape_volumes.make(split, np.arange(12), seed, (16, 16, 8))
        assert all(not np.array_equal(one, two) for one, two in zip(volumes, other, strict=True))
    (shard,) = shape_volumes.write_volumes(tmp_path, "train", 12, size=(16, 16, 8))
    index = index_of_volumes(DataSet(str(shard)), label="cls")
    (batch,) = one_pass(index, VolumePlan((16, 16, 8)), batch_size=12, label="cls")
    assert np.array_equal(batch.views[0][:, 0].numpy(), volumes) and batch.labels.tolist() == labels.tolist()
    written = shard.stat().st_mtime_ns
    assert shape_volumes.write_volumes(tmp_path, "train", 12, size=(16, 16, 8)) == [shard]
    assert shard.stat().st_mtime_ns == written
    shape_volumes.write_volumes(tmp_path, "train", 12, seed=1, size=(16, 16, 8))
    assert shard.stat().st_mtime_ns > written
    with pytest.raises(UserError, match="4 voxels along an axis"):
        shape_volumes.write_volumes(tmp_path, "train", 12, size=(16, 16, 4))


def test_the_door_writes_volumes_where_a_depth_is_asked_for(tmp_path, capsys):
    sizes = ["--num-train", "7", "--num-test", "3", "--image-size", "16", "--depth", "8", "--seed", "2"]
    assert shards.main(["shapes", "--to", str(tmp_path), *sizes]) == 0
    assert "7 train volumes in 1 shard" in capsys.readouterr().out
    (found,) = one_pass(
        index_of_volumes(DataSet(f"{tmp_path}/volumes-train-*.tar")), VolumePlan((16, 16, 8)), batch_size=9
    )
    assert np.array_equal(found.views[0][:, 0].numpy(), shape_volumes.make("train", np.arange(7), 2, (16, 16, 8))[0])


def test_brightness_says_nothing_about_a_volume_s_class():
    volumes, labels = shape_volumes.make("train", np.arange(240), size=(16, 16, 8))
    means = volumes.reshape(240, -1).mean(1)
    of_class = np.array([means[labels == label].mean() for label in range(6)])
    assert np.abs((of_class - means.mean()) / (means.std() / 40**0.5)).max() < 3


GOLDEN = "iviivivviviivviv"
