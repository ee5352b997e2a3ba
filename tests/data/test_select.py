"""A part of a data set, by a list, a label or a share; what is named and is not there is refused."""

import errno
import fcntl
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest

from prelude.data import select
from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped, Stopped, UserError
from prelude.data.loader import build_loader
from prelude.data.order import Shuffle
from prelude.data.select import Selection, selected
from prelude.data.shards import ShardIndex

PLAN = ViewPlan((View((6, 6)),))


@pytest.fixture
def index(write_shards):
    return ShardIndex(write_shards([7, 0, 12, 5]))


@pytest.fixture
def write_keys(tmp_path):
    def write(*lines: str) -> Selection:
        (tmp_path / "keys.txt").write_bytes("\n".join(lines).encode())
        return Selection(keys=str(tmp_path / "keys.txt"))

    return write


@pytest.fixture
def kinds(tmp_path, write_tar, image):
    """Samples whose label is in a text, and in a field of a JSON member; the last two have no kind."""
    members = []
    for n, kind in enumerate(["cat", "dog", "cat", "7", "emu", "cat", None, ""]):
        members.append((f"{n}.ppm", image(n)))
        if kind is not None:
            about = {"about": {"kind": kind or None, "age": n % 3}}
            members += [(f"{n}.txt", f"{kind}\n".encode()), (f"{n}.json", json.dumps(about).encode())]
    return str(write_tar(tmp_path / "kinds.tar", members))


def keys_of(index) -> list[str]:
    return [index.key(sample) for sample in range(index.num_samples)]


def test_a_list_of_keys_takes_these_in_the_order_of_the_shards(index, write_keys):
    chosen = selected(index, write_keys("000020", " 000003\r", "", "002.tar:000011", "000003"), "data.select")
    assert keys_of(chosen) == ["000003", "000011", "000020"]
    assert chosen.fingerprint == index.subset(np.array([3, 11, 20])).fingerprint


def test_a_key_of_several_shards_needs_the_shard(tmp_path, write_tar, image, write_keys):
    shards = [
        str(write_tar(tmp_path / name, [("a.ppm", image(1)), ("b.ppm", image(2))])) for name in ("x.tar", "y.tar")
    ]
    index = ShardIndex(shards)
    with pytest.raises(UserError, match="The key 'a' .* is that of 2 samples; write SHARD:KEY, such as x.tar:a"):
        selected(index, write_keys("a"), "data.select")
    assert selected(index, write_keys("y.tar:a"), "data.select").shard_of(0) == shards[1]


def test_shards_of_one_name_are_told_apart_by_their_paths(tmp_path, write_tar, image, write_keys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    shards = [str(write_tar(tmp_path / name, [("a.ppm", image(1))])) for name in ("one/x.tar", "two/x.tar")]
    index = ShardIndex(shards)
    for line in ("a", "x.tar:a"):
        with pytest.raises(UserError, match=f"write SHARD:KEY, such as {re.escape(shards[0])}:a.$"):
            selected(index, write_keys(line), "data.select")
    assert selected(index, write_keys(f"{shards[1]}:a"), "data.select").shard_of(0) == shards[1]


def test_keys_of_a_folder_are_its_files(tmp_path, image, write_keys):
    for name in ("cat/1.ppm", "dog/1.ppm", "dog/2.ppm"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(image(1))
    index = ShardIndex(str(tmp_path / "photos"))
    assert keys_of(selected(index, write_keys("dog/2.ppm", "cat/1.ppm"), "x")) == ["cat/1.ppm", "dog/2.ppm"]
    assert keys_of(selected(index, Selection(label="cls", values=("dog",)), "x")) == ["dog/1.ppm", "dog/2.ppm"]


def test_a_share_is_exact_and_lies_within_a_larger_one(index):
    def ids(share, seed=0):
        return set(keys_of(selected(index, Selection(share=share, seed=seed), "data.select")))

    small, large = ids(0.25), ids(0.5)
    assert len(small) == 6 and len(large) == 12 and small < large
    assert ids(0.25) == small and ids(0.5, seed=1) != large
    assert sorted(small) == GOLDEN


@pytest.mark.parametrize(
    "label, values, taken",
    [
        ("txt", ("cat",), [0, 2, 5]),
        ("txt", (7, "emu"), [3, 4]),
        ("json:about.kind", ("dog", "cat"), [0, 1, 2, 5]),
        ("json:about.age", (1,), [1, 4, 7]),
        ("json:about.age", ("1", 2), [1, 2, 4, 5, 7]),
    ],
)
def test_a_label_takes_the_samples_that_have_it(kinds, label, values, taken):
    chosen = selected(ShardIndex(kinds), Selection(label=label, values=values), "data.select")
    assert keys_of(chosen) == [str(n) for n in taken]


def test_a_list_a_label_and_a_share_hold_together(kinds, write_keys):
    keys = write_keys(*"0124567").keys
    chosen = selected(ShardIndex(kinds), Selection(keys, "txt", ("cat", "dog"), 0.5), "data.select")
    assert len(keys_of(chosen)) == 2 and set(keys_of(chosen)) < set("0125")


def test_a_part_has_the_labels_of_its_own_samples(write_shards):
    part = selected(ShardIndex(write_shards([7, 12])), Selection(share=0.4), "data.select")
    labelled = part.with_label("cls")
    assert np.array_equal(labelled.images, part.images) and labelled.num_samples == 8
    loader = build_loader([*part.paths], PLAN, seed=0, micro_batch=8, label="cls", select=Selection(share=0.4))
    batch = next(loader)
    assert sorted(batch.labels.tolist()) == [int(key) for key in keys_of(part)]


def test_a_run_goes_on_with_the_same_part_alone(write_shards):
    shards = write_shards([7, 12])
    build = lambda **how: build_loader(shards, PLAN, seed=0, micro_batch=4, **how)  # noqa: E731
    state = build(select=Selection(share=0.5)).state_dict()
    build(select=Selection(share=0.5)).load_state_dict(state)
    for other in ({}, {"select": Selection(share=0.5, seed=1)}):
        with pytest.raises(UserError, match="The data are not those .*fingerprint"):
            build(**other).load_state_dict(state)


@pytest.mark.parametrize(
    "selection, said",
    [
        (Selection(keys="nowhere.txt"), "data.select.keys=nowhere.txt cannot be read"),
        (Selection(share=0.01), "data.select.share=0.01 of 24 samples is none"),
        (Selection(label="txt", values=("cat",)), "has a .txt member"),
        (Selection(label="cls", values=(3, 24, "x")), "No sample .* has the label 24, x of data.select.values"),
        (Selection(label="pkl", values=(3,)), "has a .pkl member"),
    ],
)
def test_what_is_not_there_is_refused(index, selection, said):
    with pytest.raises(UserError, match=said):
        selected(index, selection, "data.select")


def test_keys_that_are_not_there_are_refused(index, write_keys, tmp_path):
    with pytest.raises(UserError, match=r"2 keys of data.select.keys=.*keys.txt not found in .*\(the first: '24'\)"):
        selected(index, write_keys("000001", "24", "003.tar:000001"), "data.select")
    with pytest.raises(UserError, match="names no key"):
        selected(index, write_keys("", "  "), "data.select")
    (tmp_path / "keys.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text"):
        selected(index, Selection(keys=str(tmp_path / "keys.txt")), "data.select")


@pytest.mark.parametrize(
    "error, told",
    [(OSError("the mount is gone"), "the mount is gone"), (OSError(), "OSError"), (OSError(errno.EIO, None), "Input/")],
)
def test_keys_that_cannot_be_read_are_told_why_whatever_the_error_says(index, write_keys, monkeypatch, error, told):
    selection = write_keys("000001")
    monkeypatch.setattr(select, "called", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=rf"cannot be read \({told}.*\); write a file that can"):
        selected(index, selection, "data.select")


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """What is read of the shards for a selection."""
    found = []
    for name in ("keys_in", "label_members"):
        read = getattr(select, name)
        monkeypatch.setattr(select, name, lambda *of, name=name, read=read: found.append(name) or read(*of))
    return found


def test_keys_and_labels_are_read_once_on_a_node(kinds, write_keys, reads, monkeypatch):
    keys = write_keys(*"0124567").keys
    selection = Selection(keys, "txt", ("cat", "dog"), 0.5)
    first = selected(ShardIndex(kinds), selection, "data.select")
    assert reads == ["keys_in", "label_members"]
    again = selected(ShardIndex(kinds), selection, "data.select")
    assert len(reads) == 2 and again.fingerprint == first.fingerprint and keys_of(again) == keys_of(first)
    assert np.array_equal(again.with_label("txt").labels[:], first.with_label("txt").labels[:])
    sent = pickle.loads(pickle.dumps(again))
    assert np.array_equal(sent.images[:], first.images[:]) and sent.counts.tolist() == first.counts.tolist()
    part = again.subset(np.array([1]))
    assert keys_of(part) == keys_of(first)[1:2] and part.with_label("txt").num_samples == 1


def test_another_list_selection_or_shard_is_read_anew(tmp_path, kinds, write_keys, write_tar, image, reads):
    assert keys_of(selected(ShardIndex(kinds), write_keys("0", "1"), "data.select")) == ["0", "1"]
    assert keys_of(selected(ShardIndex(kinds), write_keys("0", "2"), "data.select")) == ["0", "2"]
    assert keys_of(selected(ShardIndex(kinds), replace(write_keys("0", "2"), share=0.5), "data.select")) != ["0", "2"]
    for values, taken in (("dog",), ["1"]), (("emu",), ["4"]):
        assert keys_of(selected(ShardIndex(kinds), Selection(label="txt", values=values), "data.select")) == taken
    assert len(reads) == 5
    write_tar(tmp_path / "kinds.tar", [("2.ppm", image(1)), ("0.ppm", image(2)), ("1.ppm", image(3))])
    assert keys_of(selected(ShardIndex(kinds), write_keys("0", "2"), "data.select")) == ["2", "0"] and len(reads) == 6
    (tmp_path / "keys.txt").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        selected(ShardIndex(kinds), Selection(keys=str(tmp_path / "keys.txt")), "data.select")


def test_a_list_that_names_a_shard_by_its_path_is_not_that_of_other_spellings(kinds, write_keys, monkeypatch, tmp_path):
    selection = write_keys(f"{kinds}:1")
    assert selected(ShardIndex(kinds), selection, "data.select").num_samples == 1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not found"):
        selected(ShardIndex("kinds.tar"), selection, "data.select")


def test_a_list_that_changes_while_it_is_read_is_not_kept(index, write_keys, monkeypatch):
    selection, read = write_keys("000001"), select.keys_in
    monkeypatch.setattr(select, "keys_in", lambda path: write_keys("000002") and read(path))
    with pytest.raises(RunStopped, match="was changed while it was read"):
        selected(index, selection, "data.select")


def test_a_stream_has_no_order_to_set(caplog):
    how = {"seed": 0, "micro_batch": 1, "num_samples": 3, "allow_commands": True}
    build_loader("pipe:cat x.tar", PLAN, **how).close()
    assert "data.shuffle" not in caplog.text
    build_loader("pipe:cat x.tar", PLAN, shuffle=Shuffle(window=3), **how).close()
    assert "data.shuffle has no effect on streams" in caplog.text


def test_a_stream_has_no_part():
    for how in ({"select": Selection(share=0.5)}, {"image": "left.jpg"}):
        with pytest.raises(UserError, match=f"data.{next(iter(how))} needs an index, and pipe:cat x.tar is a stream"):
            build_loader("pipe:cat x.tar", PLAN, seed=0, micro_batch=1, num_samples=3, allow_commands=True, **how)


GOLDEN = ["000003", "000006", "000008", "000009", "000012", "000016"]


def test_a_read_that_fails_once_leaves_out_samples_of_this_start_alone(kinds, failing_reads, caplog):
    cats = Selection(label="txt", values=("cat",))
    failing_reads(1)
    assert keys_of(selected(ShardIndex(kinds), cats, "data.select")) == ["2", "5"]
    assert "1 label of" in caplog.text and "cannot be read: data.select leaves out their samples" in caplog.text
    assert keys_of(selected(ShardIndex(kinds), cats, "data.select")) == ["0", "2", "5"]


def test_who_waits_for_another_process_selection_says_so_and_obeys_a_stop(
    index, write_keys, cache, patience, monkeypatch, caplog
):
    selected(index, write_keys("000003"), "data.select")
    (kept,) = (cache / "index").glob("*.numbers")
    kept.unlink()
    patience.timeout_seconds = 0.6
    with open(f"{kept}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunStopped, match="waiting for the samples of data.select"):
            selected(index, write_keys("000003"), "data.select")
        assert "waiting for the samples of data.select" in caplog.text
        monkeypatch.setattr(patience, "should_stop", lambda: True)
        with pytest.raises(Stopped, match="waiting for the samples of data.select"):
            selected(index, write_keys("000003"), "data.select")
