import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import threading

import pytest
import safetensors.torch
import torch
import xxhash
from forked import is_killed

from prelude.checkpoints import manifest as manifests
from prelude.checkpoints import saving as savings
from prelude.checkpoints import shelf as shelves
from prelude.checkpoints import store as stores
from prelude.checkpoints.saved import open_checkpoint
from prelude.checkpoints.store import Store
from prelude.checkpoints.tensor_files import TensorFiles, write_tensors
from prelude.data.errors import RunStopped, UserError


def value_of(path) -> float:
    """What was saved, having passed every checksum, and the same in all files."""
    state = open_checkpoint(path)
    (value,) = state.tensors["encoder.weight"].unique().tolist()
    assert torch.equal(state.moments["encoder.weight/exp_avg"], torch.full((3, 2), -value))
    assert state.scalars["encoder.weight"]["step"]["value"] == value
    return value


def names(store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_what_was_saved_is_read_back(tmp_path, save):
    store = Store(tmp_path / "checkpoints")
    path = save(store, 1000, 5.5, meta={"step": 1000, "mean": [0.1, 0.2, 0.3], "name": "é"})
    assert path == store.newest() == tmp_path / "checkpoints" / "step-00001000"
    state = open_checkpoint(path)
    assert state.meta == {"step": 1000, "mean": [0.1, 0.2, 0.3], "name": "é"}
    assert value_of(path) == 5.5 and state.optimizer == "AdamW" and state.loss_scaler is None
    assert state.tensors["center"].dtype == torch.int64 and state.tensors["center"].shape == ()
    assert names(store) == ["latest", "step-00001000"]


def test_a_save_lets_training_go_on_and_the_next_one_waits_for_it(tmp_path, make_state, monkeypatch):
    weight, may_write, begun = torch.zeros(3), threading.Event(), []

    def copied(engine):
        begun.append(weight[0].item())
        return make_state(weight[0].item())

    def held_up(path, tensors):
        assert may_write.wait(60)
        return write_tensors(path, tensors)

    monkeypatch.setattr(stores, "gather_state", copied)
    monkeypatch.setattr(savings, "write_tensors", held_up)
    store = Store(tmp_path)
    store.save(1, None, {"step": 1})
    weight += 7  # training goes on
    assert not store.has_ended() and store.newest() is None
    another = threading.Thread(target=store.save, args=(2, None, {"step": 2}))
    another.start()
    another.join(0.2)
    assert another.is_alive() and begun == [0.0], "the second is copied when the first is written"
    may_write.set()
    another.join(60)
    assert store.finish() == tmp_path / "step-00000002" and store.finish() is None
    assert value_of(tmp_path / "step-00000001") == 0 and value_of(tmp_path / "step-00000002") == 7


def test_what_ends_a_run_by_an_error_waits_for_the_checkpoint_under_way(tmp_path, save, monkeypatch, caplog):
    store = Store(tmp_path)
    save(store, 1)
    store.save(2, None, {"step": 2})
    store.wait()
    assert value_of(tmp_path / "step-00000002") == 1
    monkeypatch.setattr(stores.os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    store.save(3, None, {"step": 3})
    with caplog.at_level(logging.WARNING):
        store.wait()
    assert "step-00000003 could not be saved" in caplog.text


@pytest.mark.parametrize("kind", ["xxh3_128", "blake2b"])
def test_checkpoints_of_before_are_read_and_their_damage_is_seen(tmp_path, make_state, kind):
    """Written as earlier versions wrote them, by the libraries alone."""
    path, state = tmp_path / "step-00000001", make_state(1.0)
    path.mkdir()
    safetensors.torch.save_file(state.tensors, path / "model.safetensors")
    safetensors.torch.save_file(state.moments, path / "optimizer.safetensors")
    rest = {"format": 2 if kind == "xxh3_128" else 1, "step": 1, "meta": {"step": 1}, "optimizer": "AdamW"}
    (path / "state.json").write_text(json.dumps(rest | {"scalars": state.scalars, "loss_scaler": None}))
    digest = {"xxh3_128": xxhash.xxh3_128, "blake2b": hashlib.blake2b}[kind]
    listed = {file.name: {"bytes": file.stat().st_size, kind: digest(file.read_bytes()).hexdigest()}
              for file in path.iterdir()}  # fmt: skip
    manifest = {"format": rest["format"], "serial": 1, "files": listed}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    assert Store(tmp_path).newest() == path and value_of(path) == 1
    flip_a_byte(path / manifests.MODEL)
    with pytest.raises(UserError, match="model.safetensors does not match its checksum"):
        Store(tmp_path).newest()


def test_a_resume_reads_every_byte_once_to_check_it(tmp_path, save, monkeypatch):
    store, digested = Store(tmp_path), []
    path = save(store, 1)
    monkeypatch.setattr(stores, "restore_state", lambda *_: None)
    real = manifests._digest
    monkeypatch.setattr(manifests, "_digest", lambda file, kind: digested.append(file.name) or real(file, kind))
    assert store.load(store.newest(), None) == {"step": 1}
    assert sorted(digested) == sorted(str(path / name) for name in manifests.FILES)
    Store(tmp_path).load(path, None)
    assert len(digested) == 6


def test_the_newest_are_kept(tmp_path, save):
    store = Store(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert names(store) == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def test_an_empty_or_missing_folder_has_no_newest(tmp_path):
    assert Store(tmp_path).newest() is None
    assert Store(tmp_path / "nowhere").newest() is None


@pytest.mark.parametrize("key", ["scalars", "optimizer", "meta"])
def test_a_state_with_a_sound_checksum_that_lacks_something_is_refused_in_a_sentence(tmp_path, save, key):
    path = save(Store(tmp_path), 1)
    state, manifest = (json.loads((path / name).read_text()) for name in (manifests.STATE, manifests.MANIFEST))
    del state[key]
    (path / manifests.STATE).write_text(json.dumps(state))
    content = (path / manifests.STATE).read_bytes()
    manifest["files"][manifests.STATE] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    (path / manifests.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"state.json is not what this version writes .*{key}"):
        open_checkpoint(path)


@pytest.mark.parametrize("latest", [None, "", "step-00000099\n", "../../etc\n", "\x00\xff"])
def test_a_wrong_latest_changes_nothing(tmp_path, save, latest):
    store = Store(tmp_path)
    for step in (1, 2):
        save(store, step)
    (tmp_path / "latest").unlink()
    if latest is not None:
        (tmp_path / "latest").write_text(latest)
    assert store.newest().name == "step-00000002"


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[0 if path.suffix == ".json" else len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def of_another_run(path):
    """Whole and readable, and not what was saved here."""
    if path.suffix == ".safetensors":
        tensors = {name: tensor + 1 for name, tensor in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path)
    else:
        path.write_text(path.read_text().replace("1", "3").replace("2", "1"))


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, empty, remove, of_another_run])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, saving, caplog, damage):
    save, files = saving
    for file in files:
        caplog.clear()
        store = Store(tmp_path / file)
        for step in (1, 2):
            save(store, step)
        spoilt = tmp_path / file / "step-00000002"
        damage(spoilt / file)
        with caplog.at_level(logging.WARNING):
            assert store.newest().name == "step-00000001"
        (warning,) = caplog.messages
        assert "step-00000002" in warning and file in warning
        with pytest.raises(UserError, match=f"step-00000002 is no complete checkpoint: {file}"):
            open_checkpoint(spoilt)


def test_every_part_that_is_wrong_is_named(tmp_path, save_parts):
    path = save_parts(Store(tmp_path), 1)
    first, second = (f"{name}-00001-of-00002.safetensors" for name in ("model", "optimizer"))
    flip_a_byte(path / first)
    remove(path / second)
    with pytest.raises(UserError, match=f"{first} does not match its checksum; {second} cannot be read"):
        Store(tmp_path).newest()


def test_parts_say_what_one_file_says(tmp_path, save_whole, save_parts):
    """Tensors of no dimension, of integers, in one piece and in two; any stretch of them."""
    encoder = {
        "encoder.weight": torch.arange(12.0).view(3, 2, 2), "center": torch.tensor(7), "none": torch.zeros(0, 3),
        "half": torch.arange(5).bfloat16(),
    }  # fmt: skip
    whole, parts = (
        open_checkpoint(save(Store(tmp_path / name), 1, 2.0, encoder=encoder))
        for name, save in (("whole", save_whole), ("parts", save_parts))
    )
    for ours, theirs in ((parts.tensors, whole.tensors), (parts.moments, whole.moments)):
        assert ours.keys() == theirs.keys() and len(ours) == len(theirs)
        for name in ours:
            assert ours.spec(name) == theirs.spec(name) and torch.equal(ours[name], theirs[name])
            size = ours[name].numel()
            for start in range(size):
                for stop in range(start, size + 1):
                    expected = theirs[name].reshape(-1)[start:stop]
                    assert torch.equal(ours.stretch(name, start, stop), expected)
                    assert torch.equal(theirs.stretch(name, start, stop), expected)
    assert parts.inventory() == whole.inventory() and whole.tensors.keys() == encoder.keys()


def test_our_files_are_those_of_safetensors(tmp_path):
    tensors = {
        "b": torch.randn(3, 5), "a": torch.arange(4), "ü/m": torch.tensor(1.5), "empty": torch.zeros(0),
        "bits": torch.tensor([True, False, True]), "half": torch.randn(7).bfloat16(),
    }  # fmt: skip
    entry = write_tensors(tmp_path / "ours", tensors)
    content = (tmp_path / "ours").read_bytes()
    assert entry == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    found = safetensors.torch.load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    theirs = TensorFiles.of_file(tmp_path / "theirs")
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors) and len(theirs) == len(tensors)
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "ours", tensors)


def test_a_damaged_checkpoint_is_never_counted_among_the_kept(tmp_path, save):
    store = Store(tmp_path, keep=2)
    for step in (1, 2):
        save(store, step)
    truncate(tmp_path / "step-00000002" / "manifest.json")
    save(store, 3)
    assert names(store) == ["latest", "step-00000001", "step-00000003"]


def test_a_run_that_went_back_goes_on_from_what_it_saved_last(tmp_path, save):
    store = Store(tmp_path, keep=2)
    for step in (10, 20, 30):
        save(store, step)
    save(store, 25, 7.0)
    assert value_of(store.newest()) == 7.0
    assert names(store) == ["latest", "step-00000025", "step-00000030"]


def test_saving_a_step_again_replaces_it(tmp_path, save):
    store = Store(tmp_path)
    save(store, 10, 1.0)
    save(store, 10, 2.0)
    assert value_of(store.newest()) == 2.0
    assert names(store) == ["latest", "step-00000010"]


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, save):
    with pytest.raises(TypeError):
        save(Store(tmp_path), 1, meta={"step": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_a_full_disk_stops_the_run_and_costs_no_checkpoint(tmp_path, save, monkeypatch, operation):
    store = Store(tmp_path)
    save(store, 1)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if operation == "write":
        monkeypatch.setattr(savings, "write_tensors", fail)
    else:
        monkeypatch.setattr(stores.os, operation, fail)
    with pytest.raises(RunStopped, match="step-00000002 could not be saved .*goes on from step-00000001"):
        save(store, 2)
    assert names(store) == ["latest", "step-00000001"] and value_of(store.newest()) == 1
    monkeypatch.undo()


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_kill_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(tmp_path, saving, caplog, again):
    """A child is killed before and in the middle of every operation that changes the disk, one child for each."""
    found, (save, _) = [], saving
    for moment in range(100):
        folder = tmp_path / str(moment)
        store = Store(folder, keep=1)
        save(store, 1, 1.0)
        killed = killed_at(moment, lambda s=store: save(s, 1 if again else 2, 2.0))
        found.append(value_of(store.newest()))
        save(store, 3, 3.0)
        assert names(store) == ["latest", "step-00000003"] and value_of(store.newest()) == 3.0
        if not killed:
            break
    assert not caplog.messages, "nothing incomplete ever has a checkpoint's name"
    assert moment > 20, "a save has fewer operations than this test was written for"
    assert found == sorted(found) and found[0] == 1.0 and found[-1] == 2.0


def test_a_power_cut_at_any_moment_leaves_a_whole_checkpoint(tmp_path, saving, monkeypatch):
    """All files are on the disk before the manifest that vouches for them, their names before the checkpoint has its
    own, and that one before the earlier checkpoint goes."""
    save, files = saving
    store, done = Store(tmp_path, keep=1), []
    save(store, 1)
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def note(what, path):
        done.append((what, os.path.basename(path)))

    def synced(descriptor):
        note("on the disk", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda path, to: (note("named", to), rename(path, to)))
    monkeypatch.setattr(shutil, "rmtree", lambda path: (note("removed", path), rmtree(path)))
    save(store, 2)
    count = len(files)
    assert set(done[:count]) == {("on the disk", name) for name in files}
    assert done[count - 1] == ("on the disk", manifests.MANIFEST)
    assert done[count][0] == "on the disk" and done[count][1].startswith(".tmp-step-00000002")
    assert done[count + 1 : count + 3] == [("named", "step-00000002"), ("on the disk", tmp_path.name)]
    assert done[-2:] == [("named", ".tmp-step-00000001"), ("removed", ".tmp-step-00000001")]
    assert names(store) == ["latest", "step-00000002"]


def killed_at(moment: int, action) -> bool:
    """Runs `action` in a child that kills itself at its n-th chance; False when it came to an end before."""
    return is_killed(lambda: (kill_at(moment), action()))


def kill_at(moment: int) -> None:
    """Two chances an operation: before it, and half-way through where it has a half."""
    left = [moment]

    def chance():
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def guarded(function, half):
        def call(*args, **kwargs):
            chance()
            if left[0] == 0:
                half(*args)
            chance()
            return function(*args, **kwargs)

        return call

    def half_a_file(path, tensors):
        path.write_bytes(b"\x10\x00")

    def half_a_folder(path):
        next(p for p in path.iterdir() if p.is_file()).unlink()

    def written_anew(path, tensors):
        path.unlink(missing_ok=True)
        return write_tensors(path, tensors)

    savings.write_tensors = guarded(written_anew, half_a_file)
    shutil.rmtree = guarded(shutil.rmtree, half_a_folder)
    for name in ("fsync", "rename", "replace"):
        setattr(os, name, guarded(getattr(os, name), lambda *_: None))


def test_the_folder_of_a_checkpoint_holds_no_pickle(tmp_path, save):
    path = save(Store(tmp_path), 1)
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]
    for file in path.glob("*.json"):
        json.loads(file.read_text())


def test_a_held_checkpoint_outlives_retention_and_a_new_start(tmp_path, save):
    store = Store(tmp_path, keep=1)
    save(store, 10)
    assert store.hold(5) is None  # none is that old
    assert store.hold(15) == tmp_path / "step-00000010"
    for step in (20, 30):
        save(store, step)
    assert names(store) == ["held", "latest", "step-00000010", "step-00000030"]
    again = Store(tmp_path, keep=1)
    save(again, 40)
    assert value_of(tmp_path / "step-00000010") == 10 and again.newest() == tmp_path / "step-00000040"
    again.release()
    save(again, 50)
    assert names(again) == ["latest", "step-00000050"]


def test_one_checkpoint_is_held_at_a_time_and_no_damaged_one(tmp_path, save):
    store = Store(tmp_path, keep=3)
    for step in (10, 20, 30):
        save(store, step)
    assert store.hold(30).name == "step-00000030"
    (tmp_path / "step-00000020" / manifests.MODEL).unlink()
    assert store.hold(25).name == "step-00000010"
    assert (tmp_path / "held").read_text() == "step-00000010\n"


# ---- what exists and cannot be used


def refuse_to_open(monkeypatch, number: int, *names: str) -> None:
    """Opening these files fails as the disk or its server would have it; whoever runs the tests may read anything."""
    real, pathlibs = open, io.open

    def guarded(opener):
        def guarded_open(file, *args, **kwargs):
            if not isinstance(file, int) and os.path.basename(file) in names:
                raise OSError(number, os.strerror(number), str(file))
            return opener(file, *args, **kwargs)

        return guarded_open

    monkeypatch.setattr("builtins.open", guarded(real))
    monkeypatch.setattr(io, "open", guarded(pathlibs))


def of_a_newer_format(path):
    (path / manifests.MANIFEST).write_text(json.dumps({"format": 4, "serial": 7, "parts": ["elsewhere"]}))


def a_folder_in_place_of(name):
    def spoil(path):
        (path / name).unlink()
        (path / name).mkdir()

    return spoil


UNREADABLE = {
    "a newer format": (of_a_newer_format, "it is of format 4, and this version reads formats up to 3"),
    "no format that is known": (lambda path: (path / manifests.MANIFEST).write_text("{}"), "it is of format unknown"),
    "no manifest": (lambda path: (path / manifests.MANIFEST).unlink(), "manifest.json cannot be read"),
    "a folder as manifest": (a_folder_in_place_of(manifests.MANIFEST), "manifest.json cannot be read"),
    "a folder as model": (a_folder_in_place_of(manifests.MODEL), "model.safetensors cannot be read"),
    "a folder as state": (a_folder_in_place_of(manifests.STATE), "state.json cannot be read"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_where_none_can_be_used_each_is_named_and_nothing_is_begun(tmp_path, save, kind):
    spoil, why = UNREADABLE[kind]
    for step in (1, 2):
        spoil(save(Store(tmp_path), step))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"step-00000001: {why}") as refused:
        Store(tmp_path).newest()
    assert f"step-00000002: {why}" in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_disk_that_does_not_answer_is_no_empty_run(tmp_path, save, monkeypatch, number):
    save(Store(tmp_path), 1)
    with monkeypatch.context() as patch:
        refuse_to_open(patch, number, manifests.OPTIMIZER)
        with pytest.raises(UserError, match=re.escape(os.strerror(number))):
            Store(tmp_path).newest()
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        with pytest.raises(UserError, match="cannot be read .*nobody knows which checkpoints are there"):
            Store(tmp_path).newest()
    assert value_of(Store(tmp_path).newest()) == 1


def test_damaged_ones_alone_are_no_empty_run_either(tmp_path, save):
    for path in [save(Store(tmp_path), step) for step in (1, 2)]:
        truncate(path / manifests.MODEL)
    with pytest.raises(UserError, match="step-00000002: model.safetensors has .*step-00000001: model.safetensors has"):
        Store(tmp_path).newest()


def test_checkpoints_that_are_gone_are_missed(tmp_path, save):
    shutil.rmtree(save(Store(tmp_path), 5))
    with pytest.raises(UserError, match="step-00000005: it is gone"):
        Store(tmp_path).newest()


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_never_removed(tmp_path, save, kind):
    """Neither by retention, nor where the run comes by the same step again, and again."""
    store = Store(tmp_path, keep=1)
    save(store, 1)
    UNREADABLE[kind][0](save(store, 2))
    (tmp_path / "step-00000002" / "mark").touch()
    for step in (2, 3, 2, 4):
        save(store, step)
    assert [path.parent.name for path in tmp_path.glob("*/mark")] == ["step-00000002.replaced"]
    assert store.newest().name == "step-00000004"


def test_one_that_can_be_read_again_is_older_than_what_was_saved_meanwhile(tmp_path, save, monkeypatch):
    store = Store(tmp_path)
    for step in (1, 2):
        save(store, step)
    aside = (tmp_path / "step-00000002" / manifests.MANIFEST).rename(tmp_path / "aside")
    assert store.newest().name == "step-00000001"
    save(store, 3)
    aside.rename(tmp_path / "step-00000002" / manifests.MANIFEST)
    assert store.newest().name == "step-00000003"


def test_a_full_disk_after_the_checkpoint_is_there_ends_nothing(tmp_path, save, monkeypatch, caplog):
    store = Store(tmp_path, keep=1)
    save(store, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shelves, "write_whole", full)
    save(store, 2)
    assert store.hold(2).name == "step-00000002"
    save(store, 3)
    monkeypatch.undo()
    assert names(store) == ["latest", "step-00000002", "step-00000003"]  # held, though nobody could write it down
    assert len([message for message in caplog.messages if "No space left" in message]) == 2
    store.release()


def test_links_among_the_checkpoints_lead_nobody_elsewhere(tmp_path, save):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for name in (".tmp-step-00000002", ".tmp-latest", "step-00000002"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "mine").touch()
    store = Store(folder, keep=1)
    save(store, 1)
    for name in (".tmp-step-00000002", ".tmp-latest", "step-00000002"):
        (folder / name).symlink_to(elsewhere / name)
    for step in (2, 3):
        save(store, step)
    assert len(list(elsewhere.glob("*/mine"))) == 3 == len(list(elsewhere.rglob("*"))) / 2
    assert names(store)[0] == "latest" and names(store)[-1] == "step-00000003"
