"""Pairs that are no augmentations: who is whose partner is computed here a second time, from the members alone."""

import hashlib
import json
import os
import pickle
import random
import struct
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from servers import Server, serving

from prelude.data import partners
from prelude.data.batch import View, ViewPlan
from prelude.data.data_sets import DataSet
from prelude.data.errors import UserError
from prelude.data.loader import Loader, build_loader, one_pass
from prelude.data.order import Order, Shuffle
from prelude.data.partners import Partners
from prelude.data.remote_shards import keep_remote_shards
from prelude.data.shards import ShardIndex

SHUFFLE = Shuffle(streams=3, span=4, window=8)
WHOLE = View((10, 12), crop="center", flip=0.0)  # the whole image, pixel for pixel
PLAN = ViewPlan((WHOLE, replace(WHOLE, partner=True), replace(WHOLE, size=(6, 6))), group="json:who.patient")
SEED = 5
# Of 30 samples in four shards; groups of 1 to 6 lie across shards. A name, a number, text that is a number; no field.
PATIENTS = [*"ababcabdee", 7, "7", "07", 3.5, *"abfgfhhhii", None, "", "a ", {}, True, "z"]


@pytest.fixture
def shards(tmp_path, write_tar, image):
    def write(patients=PATIENTS, counts=(9, 0, 12, 9), bad=(), folder="groups") -> list[str]:
        paths, number = [], 0
        for shard, count in enumerate(counts):
            members = []
            for n in range(number, number + count):
                members += [
                    (f"{n:06}.ppm", b"garbage" if n in bad else image(n)),
                    (f"{n:06}.json", json.dumps({"who": {"patient": patients[n]}}).encode()),
                ]
            number += count
            paths.append(str(write_tar(tmp_path / folder / f"{shard:03}.tar", members)))
        return paths

    return write


def groups_of(patients) -> list[list[int]]:
    """Of each sample, its whole group. What is no text or number, or is empty, is a group of its own."""
    found = defaultdict(list)
    for n, patient in enumerate(patients):
        named = isinstance(patient, str | int | float) and not isinstance(patient, bool) and str(patient).strip()
        found[str(patient).strip() if named else (n,)].append(n)
    return [next(group for group in found.values() if n in group) for n in range(len(patients))]


def expected(position: int, sample: int, groups) -> int:
    others = [n for n in groups[sample] if n != sample]
    digest = hashlib.blake2b(struct.pack("<2q", SEED, position), digest_size=8, person=b"partner").digest()
    return others[int.from_bytes(digest, "little") % len(others)] if others else sample


def loader_of(paths, micro_batch=4, plan=PLAN, **changes):
    return Loader(ShardIndex(paths), plan, **dict(seed=SEED, micro_batch=micro_batch, shuffle=SHUFFLE) | changes)


def rows_of(batches):
    """(position, sample, partner) of all samples, and nothing left to chance of their pixels."""
    found = []
    for batch in batches:
        for row in range(len(batch)):
            pixels = [view[row].numpy().tobytes() for view in batch.views]
            columns = batch.positions, batch.sample_ids, batch.partner_ids, batch.seeds
            found.append((*[int(column[row]) for column in columns], str(batch.boxes[row].tolist()), *pixels))
    return sorted(found)


def take(loader, count):
    return [next(loader) for _ in range(count)]


@pytest.fixture
def reference(shards):
    """The first 120 samples of the order: four epochs."""
    return rows_of(take(loader_of(shards(), micro_batch=8), 15))


# ---- who is whose partner


def test_partners_are_another_of_the_group_that_seed_and_position_draw(reference):
    groups = groups_of(PATIENTS)
    for position, sample, partner, *_ in reference:
        assert partner == expected(position, sample, groups), (position, sample)
        assert partner in groups[sample] and (partner != sample or len(groups[sample]) == 1)
    drawn = {(sample, partner) for _, sample, partner, *_ in reference}
    assert len({partner for sample, partner in drawn if sample == 0}) > 1  # another one in each epoch


def test_order_and_seeds_are_those_of_a_loader_without_pairs(reference, shards):
    plain = ViewPlan(tuple(replace(view, partner=False) for view in PLAN.views))
    batches = take(loader_of(shards(folder="again"), plan=plain), 30)
    ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
    assert ids == [row[1] for row in reference]
    assert torch.cat([batch.seeds for batch in batches]).tolist() == [row[3] for row in reference]
    assert all(batch.partner_ids is None for batch in batches)
    assert ids == Order([9, 0, 12, 9], SEED, SHUFFLE).samples_at(np.arange(120)).tolist()


def test_partner_views_are_of_the_partner_and_others_of_the_sample(reference, image):
    def stored(number):
        return np.frombuffer(image(number)[-360:], np.uint8).reshape(10, 12, 3).transpose(2, 0, 1).tobytes()

    for _, sample, partner, _, _, own, of_partner, _ in reference:
        assert (own, of_partner) == (stored(sample), stored(partner))


def test_all_others_of_a_group_are_equally_likely(shards):
    index = ShardIndex(shards(["x"] * 6 + ["y"] * 24))
    first = Partners(index, "json:who.patient", SEED).first(np.full(6000, 2), range(6000))
    counts = Counter(first.tolist())
    assert set(counts) == {0, 1, 3, 4, 5} and all(abs(count - 1200) < 150 for count in counts.values())


# ---- ranks, workers, interruptions


@pytest.mark.parametrize("world_size, num_workers", [(1, 2), (2, 0), (2, 2), (3, 1)])
def test_ranks_and_workers_change_nothing(reference, shards, world_size, num_workers):
    loaders = [
        loader_of(shards(), micro_batch=3, rank=rank, world_size=world_size, num_workers=num_workers)
        for rank in range(world_size)
    ]
    batches = [next(loader) for _ in range(36 // (3 * world_size)) for loader in loaders]
    assert rows_of(batches) == reference[:36]
    assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1
    for loader in loaders:
        loader.close()


def test_a_chain_of_interruptions_is_one_run(reference, shards):
    paths = shards()
    for seed in range(3):
        rng, rows, state = random.Random(seed), [], None
        while len(rows) < 100:
            world_size, micro_batch = rng.choice([1, 2, 3, 4, 8]), rng.randint(1, 5)
            loaders = [loader_of(paths, micro_batch, rank=rank, world_size=world_size) for rank in range(world_size)]
            for loader in loaders:
                if state:
                    loader.load_state_dict(state)
            for _ in range(rng.randint(1, 4)):
                rows += rows_of(next(loader) for loader in loaders)
            state = json.loads(json.dumps(loaders[-1].state_dict()))
        assert sorted(rows)[:120] == reference[: len(rows)]


def test_other_groups_are_refused_on_resume_and_can_be_accepted(shards):
    loader = loader_of(shards())
    take(loader, 2)
    # Of the same length, so that offsets and images are what they were
    other = loader_of(shards(["b" if patient == "a" else patient for patient in PATIENTS]))
    with pytest.raises(UserError, match=r"\(groups \w+ -> \w+\)"):
        other.load_state_dict(loader.state_dict())
    other.load_state_dict(loader.state_dict(), allow_changed_data=True)
    assert other.samples == 8


def test_a_plan_without_partners_is_the_plan_that_it_was_before_there_were_any():
    plans = [
        ViewPlan((View((224, 224)),) * 2),
        ViewPlan((View((6, 6)), View((4, 5), scale=(0.05, 0.3), flip=0.3)), (0.1, 0.2, 0.3)),
    ]
    assert [plan.fingerprint() for plan in plans] == ["a3dfac146fdf98a4", "ec126ff9446387f5"]
    assert len({PLAN.fingerprint(), replace(PLAN, group="json:track").fingerprint()}) == 2


# ---- damage


def test_a_partner_that_cannot_be_read_is_replaced_by_the_next_of_its_group(shards, image):
    loader = loader_of(shards(bad=[2, 8]), micro_batch=1)  # of a: 0, 2, 5, 14, 26; of e: 8, 9
    groups, seen, read = groups_of(PATIENTS), set(), 0
    for batch in take(loader, 120):
        sample, partner, position = (int(t) for t in (batch.sample_ids, batch.partner_ids, batch.positions))
        assert sample not in (2, 8) and partner not in (2, 8)
        read += 1 + (partner != sample)
        if sample in (0, 5, 14, 26):
            others = [n for n in groups[sample] if n != sample]
            wanted = expected(position, sample, groups)
            turn = others[(others.index(wanted) + 1) % len(others)] if wanted == 2 else wanted
            assert partner == turn
            seen.add(wanted == 2)
        elif sample == 9:
            assert partner == 9  # nobody else is left
    assert seen == {True, False}
    assert loader.bad.num_bad > 8 and loader.bad.num_read == read + loader.bad.num_bad


def test_a_sample_that_takes_anothers_place_has_its_own_partner(shards):
    bad = range(4, 14)
    groups = groups_of(PATIENTS)
    for batch in take(loader_of(shards(bad=bad), micro_batch=1), 60):
        sample, partner = int(batch.sample_ids), int(batch.partner_ids)
        if not {*groups[sample]} & {*bad}:
            assert partner == expected(int(batch.positions), sample, groups)
        assert sample not in bad and partner not in bad


def test_one_pass_leaves_out_samples_and_not_those_whose_partner_is_bad(shards):
    (batch,) = one_pass(ShardIndex(shards(bad=[8, 21])), PLAN, batch_size=64, seed=SEED)
    assert batch.sample_ids.tolist() == [n for n in range(30) if n not in (8, 21)]
    partner_of = dict(zip(batch.sample_ids.tolist(), batch.partner_ids.tolist(), strict=True))
    assert partner_of[9] == 9 and partner_of[19] in (20, 19) and partner_of[24] == 24


# ---- several data sets, parts, folders, streams


def test_groups_do_not_reach_across_data_sets_and_are_what_a_selection_leaves(shards, tmp_path):
    one, other = shards(folder="one"), shards(folder="other")
    (tmp_path / "keys.txt").write_text("\n".join(f"{n:06}" for n in range(0, 30, 2)))
    mix = {"one": DataSet(one, 1.0), "other": DataSet(other, 2.0)}
    loader = build_loader(mix, PLAN, seed=SEED, micro_batch=100, shuffle=SHUFFLE)
    batch, groups = next(loader), groups_of(PATIENTS)
    assert torch.equal(batch.sample_ids // 30, batch.partner_ids // 30)
    for sample, partner in zip(batch.sample_ids.tolist(), batch.partner_ids.tolist(), strict=True):
        assert partner % 30 in groups[sample % 30]

    index = ShardIndex(one).subset(np.arange(0, 30, 2))
    half = Partners(index, "json:who.patient", SEED)
    groups = groups_of(PATIENTS[::2])
    assert half.first(np.arange(15), range(15)).tolist() == [expected(n, n, groups) for n in range(15)]


def test_folders_of_a_folder_are_groups(tmp_path, image):
    for n in range(6):
        (tmp_path / "films" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "films" / "ab"[n % 2] / f"{n}.ppm").write_bytes(image(n))
    loader = build_loader(str(tmp_path / "films"), replace(PLAN, group="parent"), seed=0, micro_batch=6)
    batch = next(loader)
    assert ((batch.sample_ids < 3) == (batch.partner_ids < 3)).all() and (batch.sample_ids != batch.partner_ids).all()


def test_what_a_start_tells(shards):
    (told,) = loader_of(shards()).pairing()
    # a: 5 with "a ", b: 4, 7 and "7": 2, e, f and i: 2 each, h: 3
    assert told.startswith(
        "7 groups of 2 to 5 images by json:who.patient, 66.7 % of 30 images; 4 images with no field "
    )
    assert loader_of(shards(), plan=ViewPlan((WHOLE,))).pairing() == []


@pytest.mark.parametrize(
    ("group", "patients", "message"),
    [
        ("json:patient", PATIENTS, "no field 'patient' in a .json member with text or a number in it"),
        ("json:who", PATIENTS, "no field 'who' in a .json member with text"),
        ("txt", PATIENTS, "No sample in .* has a .txt member"),
        ("json:who.patient", range(30), "Of 30 images no two have the same field 'who.patient'"),
        ("npy", PATIENTS, "objective.pair_by=npy names no group; write json:FIELD"),
        ("txt:patient", PATIENTS, "objective.pair_by=txt:patient names no group"),
    ],
)
def test_fields_that_make_no_pairs_are_refused(group, patients, message, shards):
    with pytest.raises(UserError, match=message) as caught:
        loader_of(shards([*patients]), plan=replace(PLAN, group=group))
    assert "\n" not in str(caught.value)


def test_streams_and_caches_that_cannot_hold_all_are_refused(shards, tmp_path):
    paths = shards()
    with pytest.raises(UserError, match="objective.pair_by needs an index, and pipe:"):
        build_loader(
            [f"pipe:cat {path}" for path in paths], PLAN, seed=0, micro_batch=1, num_samples=30, allow_commands=True
        )
    files = {f"{n}.tar": open(path, "rb").read() for n, path in enumerate(paths)}
    with serving(Server(files=files)) as server:
        urls = [f"{server.url}/{name}" for name in files]
        keep_remote_shards(str(tmp_path / "kept"), 50_000 / 2**30)
        with pytest.raises(UserError, match="objective.pair_by reads images out of order, .*write data.cache_gib="):
            build_loader(urls, PLAN, seed=SEED, micro_batch=4, shuffle=Shuffle(2, 4, 4))
        keep_remote_shards(str(tmp_path / "kept"), 1.0)
        loader = build_loader(urls, PLAN, seed=SEED, micro_batch=4, shuffle=SHUFFLE)
        assert rows_of(take(loader, 5)) == rows_of(take(loader_of(paths), 5))
        loader.close()


# ---- what is kept


def test_groups_are_found_once_and_mapped(shards, cache, monkeypatch):
    paths = shards()
    first = Partners(ShardIndex(paths), "json:who.patient", SEED)
    reads = []
    monkeypatch.setattr(partners, "label_members", lambda *of: reads.append(of) or pytest.fail("read again"))
    os.utime(first.table.path, ns=(0, 10**18))
    again = Partners(ShardIndex(paths), "json:who.patient", SEED)
    assert again.table.path == first.table.path and again.told() == first.told()
    status = os.stat(first.table.path)  # in use, and not changed, so that who has it open need not read it again
    assert status.st_atime_ns > 10**18 and status.st_mtime_ns == 10**18
    assert again.fingerprint == first.fingerprint and not reads
    sent = pickle.loads(pickle.dumps(again))  # to a worker that is not forked
    assert sent.first(np.arange(30), range(30)).tolist() == first.first(np.arange(30), range(30)).tolist()


def test_groups_whose_file_is_spoilt_are_found_again(shards, cache):
    paths = shards()
    first = Partners(ShardIndex(paths), "json:who.patient", SEED)
    wanted = first.first(np.arange(30), range(30)).tolist()
    (kept,) = (cache / "index").glob("*.numbers")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x07")
    again = Partners(ShardIndex(paths), "json:who.patient", SEED)
    assert again.first(np.arange(30), range(30)).tolist() == wanted and again.fingerprint == first.fingerprint


def test_groups_of_a_start_whose_reads_failed_are_not_kept(shards, failing_reads, caplog):
    paths = shards()
    failing_reads(1)
    without = Partners(ShardIndex(paths), "json:who.patient", SEED).num_without
    assert "1 label of" in caplog.text and "each of these samples is its own partner" in caplog.text
    assert Partners(ShardIndex(paths), "json:who.patient", SEED).num_without == without - 1


def test_a_loader_with_pairs_reads_one_image_more_a_sample(shards, monkeypatch):
    loader, reads = loader_of(shards(["x", "y"] * 15)), []
    read = loader.reader.files.read
    monkeypatch.setattr(loader.reader.files, "read", lambda *place: reads.append(place) or read(*place))
    next(loader)
    assert len(reads) == 8
