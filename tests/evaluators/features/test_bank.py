import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from extracting import extract
from PIL import Image

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.errors import UserError
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators.features import bank as module
from prelude.evaluators.features.bank import Bank
from prelude.evaluators.features.extraction import Extractor
from prelude.evaluators.features.pixels import open_pixels
from prelude.launch.bank import main
from prelude.pretrain import distributed, run_lock
from prelude.pretrain.config import EncoderConfig


@pytest.fixture
def index(tmp_path):
    write_shards(tmp_path / "shapes", "train", 50, image_size=16, samples_per_shard=20)
    return ShardIndex(f"{tmp_path}/shapes/train-*.tar", "cls")


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **settings).eval()
    return OpenedEncoder(model, EncoderConfig(name="a", image_size=16), (0.5,) * 3, (0.2,) * 3, "vit", "weights")


@pytest.fixture
def computed(monkeypatch):
    """The kinds that each batch was encoded for."""
    calls, original = [], Extractor.__call__

    def counted(self, batch):
        calls.append(self.kinds)
        return original(self, batch)

    monkeypatch.setattr(Extractor, "__call__", counted)
    return calls


def damage(index, sample_ids):
    """Overwrites images without changing a size, after the index was made."""
    for sample in sample_ids:
        offset, size = index.images[sample].tolist()
        with open(index.shard_of(sample), "r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)


def contents_of(index) -> dict[Path, bytes]:
    return {Path(path): Path(path).read_bytes() for path in index.paths}


def put_back(contents) -> None:
    for path, content in contents.items():
        path.write_bytes(content)


def test_features_from_the_bank_are_those_without_it_first_and_later(index, encoder, tmp_path, computed):
    bank = Bank(tmp_path / "bank")
    plain = extract(encoder, index, batch_size=16)
    computed.clear()
    first = bank.rows(encoder, index, batch_size=16)
    assert len(computed) == 4
    again = bank.rows(encoder, index, batch_size=7)
    assert len(computed) == 4  # nothing was computed again
    for kind, features in plain.items():
        for rows in (first[kind], again[kind]):
            assert rows.values.equal(features.values) and rows.sample_ids.equal(features.sample_ids)
            assert rows.recipe == features.recipe


def test_ranks_gather_before_the_first_collective_as_one_may_have_had_its_shards_to_index(index, tmp_path, monkeypatch):
    """Who gathers waits for it however long its data keep coming; a collective has a limit."""
    met, from_main = [], distributed.from_main
    monkeypatch.setattr(distributed, "gather", lambda: met.append("gather"))
    monkeypatch.setattr(distributed, "from_main", lambda value: (met.append("from_main"), from_main(value))[1])
    Bank(tmp_path / "bank").rows(open_pixels("pixels:4"), index)
    assert met[:2] == ["gather", "from_main"]


def test_an_entry_is_read_by_numpy_alone_as_the_documentation_says(index, encoder, tmp_path):
    """By the lines that stand there, in a process without our packages."""
    bank = Bank(tmp_path / "bank")
    rows = bank.rows(encoder, index, ["cls"])["cls"]
    text = (Path(__file__).parents[3] / "docs" / "evaluators.md").read_text()
    (lines,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sample_ids.i64" in part]
    (entry,) = bank.entries()
    known = f"import json, numpy, zlib\nentry = {str(entry.folder)!r}\n"
    told = "numpy.savez('read.npz', values=values, places=places)\n"
    told += (
        "crc = zlib.crc32(open(f'{entry}/values.f32', 'rb').read())\nassert about['checksums']['values.f32'] == crc\n"
    )
    subprocess.run([sys.executable, "-I", "-c", known + lines + told], cwd=tmp_path, check=True)
    read = np.load(tmp_path / "read.npz")
    assert np.array_equal(read["values"], rows.values.numpy()) and read["places"].tolist() == list(range(50))


def test_only_missing_kinds_are_computed(index, encoder, tmp_path, computed):
    bank = Bank(tmp_path)
    bank.rows(encoder, index, ["cls"])
    bank.rows(encoder, index, ["cls", "mean"])
    assert computed == [("cls",), ("mean",)]


def test_other_weights_views_kinds_and_data_are_other_entries(index, encoder, tmp_path, computed):
    bank = Bank(tmp_path / "bank")
    bank.rows(encoder, index, ["cls"])
    write_shards(tmp_path / "others", "train", 20, image_size=16, seed=1)
    others = ShardIndex(f"{tmp_path}/others/train-*.tar", "cls")
    fields = {"model": encoder.model, "config": encoder.config, "name": "vit"}
    for changed in (
        OpenedEncoder(**fields, mean=(0.5,) * 3, std=(0.2,) * 3, fingerprint="other weights"),
        OpenedEncoder(**fields, mean=(0.4,) * 3, std=(0.2,) * 3, fingerprint="weights"),
    ):
        bank.rows(changed, index, ["cls"])
    bank.rows(encoder, others, ["cls"])
    bank.rows(open_pixels("pixels:4"), index)
    bank.rows(open_pixels("pixels:8"), index)
    assert len(bank.entries()) == 6 and len(computed) == 6
    assert bank.rows(open_pixels("pixels:4"), index)["pixels"].values.shape == (50, 48)


def test_the_same_weights_in_another_computation_are_another_entry(index, encoder, tmp_path, monkeypatch):
    """Heads, ε, strides and code of one's own are in no tensor."""
    bank, found = Bank(tmp_path / "bank"), {}
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_classes": 0}
    for heads in (2, 4):
        model = timm.create_model("vit_tiny_patch16_224", num_heads=heads, **settings).eval()
        model.load_state_dict(encoder.model.state_dict())
        found[heads] = bank.rows(replace(encoder, model=model), index, ["cls"])["cls"].values
    assert found[2].equal(extract(encoder, index, kinds=["cls"])["cls"].values) and not found[2].equal(found[4])
    model.norm.eps = 0.1
    assert not bank.rows(replace(encoder, model=model), index, ["cls"])["cls"].values.equal(found[4])
    assert len(bank.entries()) == 3
    before = replace(encoder, model=model).computation
    model.patch_embed.proj.stride = (4, 4)
    assert replace(encoder, model=model).computation != before
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("def net(): pass")
    mine = replace(encoder, config=EncoderConfig(name="mine:net", image_size=16))
    before = mine.computation
    (tmp_path / "mine.py").write_text("def net(): return")
    assert mine.computation != before != encoder.computation


def test_images_that_cannot_be_read_leave_no_gap(index, tmp_path):
    encoder = open_pixels("pixels:4")
    whole = extract(encoder, index)["pixels"].values
    damage(index, [0, 7, 49])
    rows = Bank(tmp_path / "bank").rows(encoder, index, batch_size=8)["pixels"]
    kept = [i for i in range(50) if i not in (0, 7, 49)]
    assert rows.sample_ids.tolist() == kept
    assert rows.values.equal(whole[kept])


def test_images_that_can_be_read_again_are_taken_into_the_entry_that_lacks_them(index, tmp_path, computed):
    bank, encoder = Bank(tmp_path / "bank"), open_pixels("pixels:4")
    whole, contents = extract(encoder, index)["pixels"].values, contents_of(index)
    damage(index, [0, 7, 49])
    bank.rows(encoder, index)
    computed.clear()
    assert len(bank.rows(encoder, index)["pixels"].values) == 47 and not computed  # as they cannot be read yet
    put_back(contents)
    damage(index, [9])
    rows = bank.rows(encoder, index)["pixels"]
    kept = [i for i in range(50) if i != 9]
    assert rows.sample_ids.tolist() == kept and rows.values.equal(whole[kept])
    put_back(contents)
    damage(index, [3])  # as many as before, and others
    kept = [i for i in range(50) if i != 3]
    assert bank.rows(encoder, index)["pixels"].sample_ids.tolist() == kept
    put_back(contents)
    assert bank.rows(encoder, index)["pixels"].values.equal(whole) and len(bank.entries()) == 1


def test_kinds_that_lack_different_images_are_given_without_these(index, encoder, tmp_path):
    bank, kinds = Bank(tmp_path / "bank"), ["cls", "mean"]
    plain, contents = extract(encoder, index, kinds=kinds), contents_of(index)
    bank.rows(encoder, index, ["cls"])
    damage(index, [4, 9])
    found = bank.rows(encoder, index, kinds)
    kept = [i for i in range(50) if i not in (4, 9)]
    for kind in kinds:
        assert found[kind].sample_ids.tolist() == kept
        assert torch.allclose(found[kind].values, plain[kind].values[kept], atol=1e-5)
    put_back(contents)
    assert [rows.sample_ids.tolist() for rows in bank.rows(encoder, index, kinds).values()] == [list(range(50))] * 2


def test_parts_of_ranks_are_closed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COPY_BYTES", 8)  # several pieces a part
    starts, counts = [0, 4, 8, 8], [3, 2, 0, 4]
    rows = np.full((12, 3), -1.0, np.float32)
    for start, count in zip(starts, counts, strict=True):
        rows[start : start + count] = np.arange(start, start + count)[:, None]
    rows.tofile(tmp_path / "values")
    module._close_gaps(tmp_path / "values", starts, counts, 12)
    found = np.fromfile(tmp_path / "values", np.float32).reshape(-1, 3)
    assert found[:, 0].tolist() == [0, 1, 2, 4, 5, 8, 9, 10, 11]


def test_a_crash_while_writing_leaves_nothing(index, encoder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    bank = Bank(tmp_path / "bank")
    monkeypatch.setattr(module, "_write_at", full)
    with pytest.raises(UserError, match="No space left"):
        bank.rows(encoder, index)
    assert bank.entries() == [] and list((tmp_path / "bank").iterdir()) == []


HOLDS = """
import sys
from pathlib import Path
from prelude.evaluators.features.unfinished import unfinished_folder
with unfinished_folder(Path(sys.argv[1])) as folder:
    (folder / "pixels").mkdir()
    (folder / "pixels" / "values.f32").write_bytes(b"1234")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_evaluation_left_is_removed_by_the_next_and_nothing_of_one_that_lives(index, tmp_path):
    folder, pipes = tmp_path / "bank", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], **pipes, text=True)
    held = folder / process.stdout.readline().strip()
    young, old = (folder / f".unfinished-{name}" for name in ("0123", "4567"))  # of an earlier version, which held none
    try:
        young.mkdir()
        old.mkdir()
        os.utime(old, (1e9, 1e9))
        Bank(folder).rows(open_pixels("pixels:4"), index)
        assert (held / "pixels" / "values.f32").exists() and young.exists() and not old.exists()
    finally:
        process.kill()
        process.communicate()
    assert held.exists()
    Bank(folder).rows(open_pixels("pixels:5"), index)
    assert not held.exists() and len([entry for entry in Bank(folder).entries() if entry.about]) == 2


@pytest.mark.parametrize("hours, stays", [(1, True), (30, False)])
def test_a_folder_that_another_host_holds_is_removed_after_a_day_of_silence_by_whatever_clock(
    index, tmp_path, hours, stays
):
    folder = tmp_path / "bank" / ".unfinished-0123"
    folder.mkdir(parents=True)
    lock = folder / "run.lock"
    lock.write_text(json.dumps({"host": "node7", "process": 1, "boot": "another", "started": "1"}))
    for path in (lock, folder):
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    Bank(tmp_path / "bank").rows(open_pixels("pixels:4"), index)
    assert folder.exists() is stays


def test_a_folder_that_another_host_removes_while_it_is_looked_at_stops_nobody(index, tmp_path, monkeypatch):
    read, stale = run_lock._read, [OSError(errno.ESTALE, os.strerror(errno.ESTALE))]

    def read_once_gone(*of):
        if stale:
            raise stale.pop()
        return read(*of)

    folder = tmp_path / "bank" / ".unfinished-0123"
    folder.mkdir(parents=True)
    (folder / "run.lock").write_text("{")
    monkeypatch.setattr(run_lock, "_read", read_once_gone)
    Bank(tmp_path / "bank").rows(open_pixels("pixels:4"), index)
    assert folder.exists() and not stale


@pytest.mark.parametrize("name, content", [("values.f32", b"1234"), ("about.json", b"{"), ("sample_ids.i64", b"")])
def test_a_damaged_entry_is_made_again(index, tmp_path, name, content):
    bank, encoder = Bank(tmp_path / "bank"), open_pixels("pixels:4")
    expected = bank.rows(encoder, index)["pixels"].values.clone()
    (entry,) = bank.entries()
    (entry.folder / name).write_bytes(content)
    assert bank.rows(encoder, index)["pixels"].values.equal(expected)
    assert len(bank.entries()) == 1


def test_the_faster_of_two_processes_wins(index, tmp_path, monkeypatch):
    bank, encoder = Bank(tmp_path / "bank"), open_pixels("pixels:4")
    original = module._Part.write

    def and_another_finishes_first(part, *args):
        monkeypatch.setattr(module._Part, "write", original)
        Bank(tmp_path / "bank").rows(encoder, index)
        return original(part, *args)

    monkeypatch.setattr(module._Part, "write", and_another_finishes_first)
    assert len(bank.rows(encoder, index)["pixels"].values) == 50
    assert len(bank.entries()) == 1


def test_nothing_that_is_done_to_features_reaches_the_file(index, tmp_path):
    bank, encoder = Bank(tmp_path / "bank"), open_pixels("pixels:4")
    before = bank.rows(encoder, index)["pixels"].values.clone()
    bank.rows(encoder, index)["pixels"].values.zero_()
    assert bank.rows(encoder, index)["pixels"].values.equal(before)


def test_a_bank_can_be_looked_at_and_cleared(index, tmp_path):
    bank = Bank(tmp_path / "bank")
    bank.rows(open_pixels("pixels:4"), index)
    (tmp_path / "bank" / ".unfinished-0000").mkdir()
    finished = [entry.about for entry in bank.entries() if entry.about]
    assert [(a["name"], a["kind"], a["num_samples"], a["width"]) for a in finished] == [
        ("pixels 4x4", "pixels", 50, 48)
    ]
    assert sum(entry.num_bytes for entry in bank.entries()) == 50 * (48 * 4 + 8) + len(
        json.dumps(finished[0], indent=1)
    )
    bank.clear()
    assert bank.entries() == []


def test_a_place_that_cannot_be_written_is_told(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--bank"):
        Bank(tmp_path / "file" / "bank").rows(open_pixels("pixels:4"), index)


def test_without_a_readable_image_there_is_no_entry(index, tmp_path):
    damage(index, range(50))
    bank = Bank(tmp_path / "bank")
    with pytest.raises(UserError, match="None of the images in .* can be read"):
        bank.rows(open_pixels("pixels:4"), index)
    assert bank.entries() == []


def rewrite(index, sample_ids) -> None:
    """Inverts images in place, at their sizes, and puts the time of change back."""
    for sample in sample_ids:
        offset, size = index.images[sample].tolist()
        path = index.shard_of(sample)
        before = os.stat(path)
        with open(path, "r+b") as file:
            file.seek(offset)
            image = Image.open(io.BytesIO(file.read(size)))
            inverted = io.BytesIO()
            Image.fromarray(255 - np.asarray(image)).save(inverted, "JPEG", quality=50)
            assert len(inverted.getvalue()) <= size
            file.seek(offset)
            file.write(inverted.getvalue() + bytes(size - len(inverted.getvalue())))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_images_written_again_in_place_have_features_of_their_own(index, tmp_path):
    bank, encoder, shards = Bank(tmp_path / "bank"), open_pixels("pixels:16"), list(index.paths)
    before = bank.rows(encoder, index)["pixels"].values.clone()
    time.sleep(0.02)  # longer than the clock of some file systems takes to move on
    rewrite(index, [3, 40])
    after = bank.rows(encoder, ShardIndex(shards, "cls"))["pixels"].values
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert changed == [3, 40]


def test_a_copy_of_the_data_is_not_encoded_again(index, encoder, tmp_path, computed):
    bank = Bank(tmp_path / "bank")
    bank.rows(encoder, index)
    calls = len(computed)
    shutil.copytree(tmp_path / "shapes", tmp_path / "copy")
    bank.rows(encoder, ShardIndex(f"{tmp_path}/copy/train-*.tar"))
    assert len(computed) == calls


def zeroed(rows):
    rows[7] = 0


def permuted(rows):
    rows[[1, 2]] = rows[[2, 1]]


def one_bit(rows):
    rows.view(np.uint8)[11, 3] ^= 1


@pytest.mark.parametrize("name, kind", [("values.f32", "<f4"), ("sample_ids.i64", "<i8")])
@pytest.mark.parametrize("spoil", [zeroed, permuted, one_bit])
def test_values_that_are_not_those_that_were_written_are_made_again(index, tmp_path, name, kind, spoil):
    bank, encoder = Bank(tmp_path / "bank"), open_pixels("pixels:4")
    expected = bank.rows(encoder, index)["pixels"]
    values, ids = expected.values.clone(), expected.sample_ids.clone()
    (entry,) = bank.entries()
    content = np.fromfile(entry.folder / name, kind).reshape(50, -1)
    spoil(content)
    content.tofile(entry.folder / name)
    again = bank.rows(encoder, index)["pixels"]
    assert again.values.equal(values) and again.sample_ids.equal(ids)


NONSENSE = [b"[]", b"null", b"7", b"\xff\xfe", b"{}", b"[" * 100_000]


@pytest.mark.parametrize("about", NONSENSE + [{"num_samples": "50"}, {"width": None}, {"checksums": 3}, {"data": "0"}])
def test_nonsense_in_the_place_of_what_an_entry_says_of_itself_is_no_traceback(index, tmp_path, about):
    bank, encoder = Bank(tmp_path / "bank"), open_pixels("pixels:4")
    expected = bank.rows(encoder, index)["pixels"].values.clone()
    (entry,) = bank.entries()
    content = about if isinstance(about, bytes) else json.dumps(entry.about | about).encode()
    (entry.folder / "about.json").write_bytes(content)
    main([str(tmp_path / "bank")])  # can be looked at
    assert bank.rows(encoder, index)["pixels"].values.equal(expected)


def test_clearing_leaves_what_is_not_the_banks(index, tmp_path):
    bank = Bank(tmp_path / "bank")
    bank.rows(open_pixels("pixels:4"), index)
    (tmp_path / "bank" / "photographs").mkdir()
    (tmp_path / "bank" / "fits").mkdir()
    for name in ("0" * 32 + ".json", "." + "0" * 32 + ".json.7", "m31.fits"):
        (tmp_path / "bank" / "fits" / name).write_text("")
    bank.clear()
    assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == ["fits", "photographs"]
    assert [path.name for path in (tmp_path / "bank" / "fits").iterdir()] == ["m31.fits"]
    (tmp_path / "bank" / "fits" / "m31.fits").unlink()
    bank.clear()
    assert [path.name for path in (tmp_path / "bank").iterdir()] == ["photographs"]


def test_a_folder_that_cannot_be_cleared_is_told(index, tmp_path, monkeypatch):
    bank = Bank(tmp_path / "bank")
    bank.rows(open_pixels("pixels:4"), index)

    def refused(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(UserError, match="bank cannot be cleared .Permission denied: .*; ask its owner"):
        bank.clear()
