"""What a data set's fingerprint notices, and what it does not."""

import io
import os
import random
import shutil
import tarfile
import time

import numpy as np
import pytest

from prelude.data.batch import View, ViewPlan
from prelude.data.data_sets import DataSet
from prelude.data.errors import UserError
from prelude.data.loader import Loader, build_loader
from prelude.data.select import Selection, selected
from prelude.data.shards import ShardIndex

PLAN = ViewPlan((View((6, 6)),))


def loader_of(paths, **changes):
    label = changes.pop("label", "")
    return Loader(ShardIndex(paths, label), PLAN, seed=1, micro_batch=2, label=label, **changes)


def rewritten(path, change) -> None:
    """Writes a tar again in place, each content changed by change(name, content) at its old size, times put back."""
    before = os.stat(path)
    with tarfile.open(path) as tar:
        members = [(member, change(member.name, tar.extractfile(member).read())) for member in tar]
    time.sleep(0.02)  # longer than the clock of some file systems takes to move on
    with open(path, "r+b") as file:
        for member, content in members:
            assert len(content) == member.size
            file.seek(member.offset_data)
            file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size and os.stat(path).st_mtime_ns == before.st_mtime_ns


def other_image(number):
    """Noise in place of noise; the header stays."""

    def change(name, content):
        if name != f"{number:06}.ppm":
            return content
        return content[:15] + random.Random(number).randbytes(len(content) - 15)

    return change


def other_label(name, content):
    return b"9" * len(content) if name.endswith(".cls") else content


@pytest.mark.parametrize("number", [0, 7, 19])
def test_one_image_written_again_in_place_is_noticed(write_shards, number):
    paths = write_shards([10, 10])
    before, state = ShardIndex(paths), loader_of(paths).state_dict()
    rewritten(paths[number // 10], other_image(number))
    after = ShardIndex(paths)
    assert after.fingerprint != before.fingerprint and np.array_equal(after.images, before.images)
    with pytest.raises(UserError, match="fingerprint"):
        loader_of(paths).load_state_dict(state)


def test_images_that_change_places_are_noticed(write_shards):
    paths = write_shards([10])
    before = ShardIndex(paths).fingerprint
    with tarfile.open(paths[0]) as tar:
        contents = [tar.extractfile(member).read() for member in tar if member.name.endswith(".ppm")]
    turned = iter(contents[::-1])
    rewritten(paths[0], lambda name, content: next(turned) if name.endswith(".ppm") else content)
    assert ShardIndex(paths).fingerprint != before


def test_large_images_are_sampled_at_their_end_and_in_the_middle(tmp_path, write_tar):
    path = str(write_tar(tmp_path / "x.tar", [(f"{n:06}.ppm", random.Random(n).randbytes(200_000)) for n in range(6)]))
    seen = {ShardIndex(path).fingerprint}
    for part in (slice(-100, None), slice(100_000, 100_100)):

        def change(name, content, part=part):
            changed = bytearray(content)
            changed[part] = bytes(100)
            return bytes(changed) if name == "000003.ppm" else content

        rewritten(path, change)
        seen.add(ShardIndex(path).fingerprint)
    assert len(seen) == 3


def test_a_copy_with_other_times_is_the_same(write_shards, tmp_path):
    paths = write_shards([10, 10])
    state = loader_of(paths).state_dict()
    shutil.copytree(tmp_path / "shards", tmp_path / "copy")
    copies = sorted(str(path) for path in (tmp_path / "copy").iterdir())
    for path in copies:
        os.utime(path, (1, 1))
    assert ShardIndex(copies).fingerprint == ShardIndex(paths).fingerprint
    loader_of(copies).load_state_dict(state)


def test_a_tar_packed_again_with_other_times_in_its_headers_is_the_same(tmp_path, write_tar):
    members = [(f"{n}.ppm", random.Random(n).randbytes(900)) for n in range(5)]
    path = write_tar(tmp_path / "x.tar", members)
    before = ShardIndex(str(path)).fingerprint
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid = len(content), 1_700_000_000, 1000
            tar.addfile(info, io.BytesIO(content))
    assert ShardIndex(str(path)).fingerprint == before


def test_labels_matter_to_those_who_read_them(write_shards):
    paths = write_shards([10])
    plain, labelled = loader_of(paths).state_dict(), loader_of(paths, label="cls").state_dict()
    rewritten(paths[0], other_label)
    loader_of(paths).load_state_dict(plain)
    with pytest.raises(UserError, match="fingerprint"):
        loader_of(paths, label="cls").load_state_dict(labelled)


@pytest.mark.parametrize("label", ["", "cls"])
def test_a_run_begun_when_only_names_and_sizes_counted_goes_on(write_shards, label):
    paths = write_shards([10, 4])
    loader = loader_of(paths, label=label)
    older = loader.state_dict() | {"fingerprint": loader.index.layout_fingerprint(), "samples": 6}
    loader.load_state_dict(older)
    assert loader.state_dict()["samples"] == 6
    assert loader.state_dict()["fingerprint"] == loader.fingerprint != older["fingerprint"]
    with pytest.raises(UserError, match="fingerprint"):
        loader_of(paths[:1], label=label).load_state_dict(older)


def test_the_fingerprint_of_0_1_is_what_it_was(tmp_path, write_tar):
    """Computed by that version."""
    path = write_tar(tmp_path / "x.tar", [(f"{n}.jpg", bytes([n]) * (n + 1)) for n in range(3)])
    assert ShardIndex([str(path)]).layout_fingerprint() == "f25c641099af86ed8cad1b2bba4b4c95"


def test_a_subset_knows_its_content_too(write_shards):
    paths, chosen = write_shards([10]), np.array([2, 5])
    before = ShardIndex(paths).subset(chosen).fingerprint
    rewritten(paths[0], other_image(5))
    assert ShardIndex(paths).subset(chosen).fingerprint != before


# ---- folders


@pytest.fixture
def photos(tmp_path, image, monkeypatch):
    """A folder of labelled images; its path from where the test is."""
    (tmp_path / "photos").mkdir()
    for n in range(5):
        (tmp_path / "photos" / f"{n}.ppm").write_bytes(image(n))
        (tmp_path / "photos" / f"{n}.cls").write_text(str(n))
    monkeypatch.chdir(tmp_path)
    return "photos"


WAYS = ["photos/", "./photos", "photos//", "photos/."]


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_is_one_data_set_however_its_path_is_written(photos, tmp_path, way, monkeypatch):
    loader = loader_of(photos, label="cls")
    loader_of(way, label="cls").load_state_dict(loader.state_dict())
    assert loader_of(way).preview(5) == loader.preview(5) and loader.preview(1)[0].startswith("photos:")
    (tmp_path / "keys.txt").write_text("photos:3.ppm\n")
    assert selected(ShardIndex(way), Selection(keys=str(tmp_path / "keys.txt")), "data.select").num_samples == 1
    monkeypatch.chdir(photos)
    assert ShardIndex(".").fingerprint == loader.index.fingerprint


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("label", ["", "cls"])
def test_a_run_begun_when_a_folder_was_named_as_its_path_ends_goes_on(photos, write_shards, monkeypatch, way, label):
    mix = {"a": DataSet(way), "b": DataSet(write_shards([3]))}
    settings = {"seed": 0, "micro_batch": 2, "label": label}
    for data in (way, mix):
        with monkeypatch.context() as then:
            then.setattr(ShardIndex, "_name_of", staticmethod(os.path.basename))
            older = build_loader(data, PLAN, **settings)
            state = older.state_dict() | {"samples": 6}
        loader = build_loader(data, PLAN, **settings)
        assert (loader.fingerprint == state["fingerprint"]) == (way == "./photos")
        loader.load_state_dict(state)
        assert loader.state_dict() == loader.identity() | {"version": 1, "samples": 6}
        other = state | {"fingerprint": "0" * 32}
        with pytest.raises(UserError, match="fingerprint"):
            build_loader(data, PLAN, **settings).load_state_dict(other)
