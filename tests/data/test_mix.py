"""Several data sets by weight: which sample comes when is computed here a second time, one position after the other."""

import hashlib
import itertools
import json
import random
from fractions import Fraction

import numpy as np
import pytest
from servers import Server, serving

from prelude.data.batch import View, ViewPlan
from prelude.data.data_sets import DataSet
from prelude.data.errors import UserError
from prelude.data.loader import build_loader
from prelude.data.mixed_order import BLOCK, MixedOrder, passes, seed_of_part
from prelude.data.order import Order, Shuffle
from prelude.data.select import Selection
from prelude.data.shards import Part, ShardIndex

PLAN = ViewPlan((View((6, 6)),))
SHUFFLE = Shuffle(streams=3, span=4, window=8)


def parts_of(sizes: dict, weights: dict) -> tuple[list[Part], np.ndarray]:
    parts, begin = [], 0
    for name, counts in sizes.items():
        parts.append(Part(name, weights[name], begin, begin + sum(counts), len(counts), ""))
        begin += sum(counts)
    return parts, np.concatenate([np.array(counts, np.int64) for counts in sizes.values()])


def random_mixes(number: int):
    rng = random.Random(0)
    for _ in range(number):
        names = [f"part{i}" for i in range(rng.randint(2, 6))]
        sizes = {name: [rng.choice([0, 1, rng.randint(2, 90)]) for _ in range(3)] + [1] for name in names}
        yield sizes, {name: rng.choice([1, 3, 0.1, 1e-3, 7.25]) for name in names}


def expected(sizes: dict, weights: dict, seed: int, positions: int) -> list[tuple[str, int]]:
    """(part, sample of it) at each position, without any of the arithmetic that finds one of them by itself."""
    heavy_first = sorted(sizes, key=lambda name: (-Fraction(repr(weights[name])), name))
    shares, left = {}, sum(Fraction(repr(weight)) for weight in weights.values())
    for name in heavy_first:
        shares[name] = Fraction(repr(weights[name])) / left
        left -= Fraction(repr(weights[name]))
    came, offered = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)

    def next_of() -> str:
        """Of those that are due, the heaviest: a part is due where its rounded share of what came to it grows."""
        for name in heavy_first:
            offered[name] += 1
            if int(offered[name] * shares[name] + Fraction(1, 2)) > came[name]:
                came[name] += 1
                return name
        raise AssertionError("nobody was due")

    def samples_of(name: str):
        order = Order(sizes[name], seed_of_part(seed, name), SHUFFLE)
        for position in itertools.count():
            yield int(order.samples_at(np.array([position]))[0])

    samples, found = {name: samples_of(name) for name in sizes}, []
    for block in range(-(-positions // BLOCK)):
        dealt = sorted((next_of() for _ in range(BLOCK)), key=list(sizes).index)
        key = hashlib.blake2b(np.array([seed, block], "<i8").tobytes(), digest_size=16, person=b"mix").digest()
        words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(BLOCK).tolist()
        for place in sorted(range(BLOCK), key=words.__getitem__):
            found.append((dealt[place], next(samples[dealt[place]])))
    return found[:positions]


def names_at(parts, ids) -> list[tuple[str, int]]:
    found = []
    for sample in ids.tolist():
        part = next(part for part in parts if part.begin <= sample < part.end)
        found.append((part.name, sample - part.begin))
    return found


# ---- the order


def test_the_order_is_that_of_one_position_after_the_other():
    for sizes, weights in itertools.islice(random_mixes(3), 3):
        parts, counts = parts_of(sizes, weights)
        ids = MixedOrder(parts, counts, 5, SHUFFLE).samples_at(np.arange(1500))
        assert names_at(parts, ids) == expected(sizes, weights, 5, 1500), (sizes, weights)


def test_each_part_gets_its_share_and_each_pass_of_it_has_every_sample_once():
    for sizes, weights in random_mixes(8):
        parts, counts = parts_of(sizes, weights)
        ids = MixedOrder(parts, counts, 3, SHUFFLE).samples_at(np.arange(6 * BLOCK))
        for part in parts:
            mine = ids[(ids >= part.begin) & (ids < part.end)] - part.begin
            share = 6 * BLOCK * part.weight / sum(weights.values())
            assert abs(len(mine) - share) <= 2, (sizes, weights, part.name)
            for begin in range(0, len(mine) - part.num_samples + 1, part.num_samples):
                assert sorted(mine[begin : begin + part.num_samples].tolist()) == list(range(part.num_samples))


def test_any_part_of_it_can_be_computed_by_itself_far_away_too():
    sizes, weights = {"a": [40, 0, 31], "b": [500]}, {"a": 0.3, "b": 1.7}
    parts, counts = parts_of(sizes, weights)
    for start in (0, 10**12):
        positions = start + np.arange(4 * BLOCK)
        whole = MixedOrder(parts, counts, 9, SHUFFLE).samples_at(positions)
        shuffled, again = np.random.default_rng(0).permutation(4 * BLOCK), MixedOrder(parts, counts, 9, SHUFFLE)
        for piece in np.array_split(shuffled, 7):
            assert again.samples_at(positions[piece]).tolist() == whole[piece].tolist()


def test_parts_are_mixed_within_a_batch_and_not_by_rank():
    parts, counts = parts_of({"a": [5000], "b": [5000]}, {"a": 1, "b": 1})
    is_b = MixedOrder(parts, counts, 0, Shuffle()).samples_at(np.arange(4096)) >= 5000
    assert all(0.4 < is_b[rank::8].mean() < 0.6 for rank in range(8))


def test_a_part_keeps_its_order_whatever_it_is_mixed_with():
    def of_a(weight, **others):
        parts, counts = parts_of({"a": [30, 20], **others}, {"a": weight} | dict.fromkeys(others, 1))
        ids = MixedOrder(parts, counts, 4, SHUFFLE).samples_at(np.arange(4 * BLOCK))
        return ids[ids < 50].tolist()[:150]

    assert of_a(1, b=[70]) == of_a(3, b=[10, 5], c=[80])


def test_the_mix_of_today_is_the_mix_of_every_version():
    """As of `Order`: a checkpoint must be resumed in the order in which it was begun."""
    parts, counts = parts_of({"few": [5], "many": [9, 0, 4]}, {"few": 1, "many": 2.5})
    assert MixedOrder(parts, counts, 42, SHUFFLE).samples_at(np.arange(1018, 1040)).tolist() == GOLDEN


# ---- the loader


@pytest.fixture
def photos(tmp_path, image):
    """A folder of images in place."""
    for n in range(9):
        (tmp_path / "photos" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "ab"[n % 2] / f"{n}.ppm").write_bytes(image(500 + n))
    return str(tmp_path / "photos")


@pytest.fixture
def mix(write_shards, photos, tmp_path):
    with open(write_shards([13], folder="far")[0], "rb") as file:
        content = file.read()
    with serving(Server(files={"000.tar": content})) as server:
        yield {
            "near": DataSet(write_shards([7, 0, 12], folder="near"), 2.0),
            "photos": DataSet(photos, 1.0),
            "far": DataSet(f"{server.url}/000.tar", 0.5, select=Selection(share=0.5)),
        }


def build(mix, micro_batch=6, **changes):
    return build_loader(mix, PLAN, **dict(seed=5, micro_batch=micro_batch, shuffle=SHUFFLE) | changes)


def rows(batches):
    found = []
    for batch in batches:
        columns = (batch.positions, batch.sample_ids, batch.seeds, batch.boxes, batch.flips, batch.views[0])
        found += [tuple(json.dumps(column[row].tolist()) for column in columns) for row in range(len(batch))]
    return sorted(found, key=lambda row: int(row[0]))


def test_remote_shards_a_folder_and_a_part_of_a_set_are_mixed_as_computed(mix):
    loader = build(mix)
    sizes, weights = {"far": [6], "near": [7, 0, 12], "photos": [9]}, {"far": 0.5, "near": 2.0, "photos": 1.0}
    assert loader.num_samples == 34 and [part.num_samples for part in loader.index.parts] == [6, 19, 9]
    wanted = expected(sizes, weights, 5, 90)
    ids = np.concatenate([next(loader).sample_ids.numpy() for _ in range(15)])
    assert names_at(loader.index.parts, ids) == wanted
    assert passes(loader.index.parts) == pytest.approx([34 / 7 / 6, 34 * 4 / 7 / 19, 34 * 2 / 7 / 9])


def test_a_chain_of_interruptions_at_other_sizes_is_one_run(mix):
    """Ranks, micro-batch and workers change at every interruption; samples, crops and pixels do not."""
    reference = rows(next(loader) for loader in [build(mix)] for _ in range(20))
    rng, found, state = random.Random(1), [], None
    while len(found) < 100:
        world_size, micro_batch = rng.choice([1, 2, 3]), rng.randint(1, 5)
        workers = 2 if world_size == 2 else 0
        ranks = [build(mix, micro_batch, rank=r, world_size=world_size, num_workers=workers) for r in range(world_size)]
        for loader in ranks:
            if state:
                loader.load_state_dict(state)
        for _ in range(rng.randint(1, 4)):
            found += rows(next(loader) for loader in ranks)
        assert len({json.dumps(loader.state_dict()) for loader in ranks}) == 1
        state = json.loads(json.dumps(ranks[-1].state_dict()))
        for loader in ranks:
            loader.close()
    assert found[:120] == reference[: len(found)]


def test_the_order_in_which_the_data_sets_are_written_changes_nothing(mix):
    turned = dict(reversed(mix.items()))
    assert build(turned).state_dict() == build(mix).state_dict()
    assert rows([next(build(turned))]) == rows([next(build(mix))])


def test_what_cannot_be_read_is_replaced_by_a_sample_of_the_same_part(write_shards):
    good, bad = write_shards([6], folder="good"), write_shards([8], bad={0, 1, 2, 3, 4}, folder="bad")
    loader = build({"bad": DataSet(bad, 1.0), "good": DataSet(good, 1.0)}, 64)
    of_bad = [sample for batch in (next(loader), next(loader)) for sample in batch.sample_ids.tolist() if sample < 8]
    assert set(of_bad) == {5, 6, 7} and abs(len(of_bad) - 64) < 20 and loader.bad.num_bad


def test_a_changed_part_is_refused_by_its_name(mix, write_shards):
    state = build(mix).state_dict()
    assert state["mix.far.num_samples"] == 6 and state["mix.near.weight"] == 2.0
    changes = {
        "mix.near.fingerprint": mix | {"near": DataSet(write_shards([7, 0, 12], bad={3}, folder="near"), 2.0)},
        "mix.photos.weight 1.0 -> 1.5": mix | {"photos": DataSet(mix["photos"].shards, 1.5)},
        "mix.far.num_samples 6 -> 13": mix | {"far": DataSet(mix["far"].shards, 0.5)},
        "mix.else.weight None -> 1": mix | {"else": DataSet(write_shards([3], folder="else"), 1.0)},
    }
    for said, changed in changes.items():
        loader = build(changed)
        with pytest.raises(UserError, match="The data are not those.*allow_changed_data") as refused:
            loader.load_state_dict(state)
        assert said in str(refused.value)
    loader.load_state_dict(state | {"samples": 50}, allow_changed_data=True)
    assert loader.samples == 2 * loader.num_samples  # the next epoch of the new order


def test_what_cannot_be_mixed_is_refused_by_its_name(mix, write_shards, write_tar, tmp_path):
    empty = str(write_tar(tmp_path / "empty.tar", [("1.txt", b"x")]))
    damaged = write_shards([1], folder="damaged") + [str(write_tar(tmp_path / "cut.tar", [("1.ppm", b"")] * 3))]
    pairs = str(write_tar(tmp_path / "pairs.tar", [("1.left.ppm", b"x"), ("1.right.ppm", b"x")]))
    for shards, said in (
        (empty, "data.mix.odd cannot be used: .*without a single image"),
        (str(tmp_path / "none.tar"), "data.mix.odd cannot be used: .*does not exist"),
        ("pipe:cat x.tar", "data.mix.odd cannot be used: pipe:cat x.tar is a stream, whose samples nobody can count"),
        (damaged, "data.mix.odd cannot be used: .* lost or damaged"),
        (pairs, "hold several images .* extension, as data.mix.odd.image=left.jpg.$"),
    ):
        with pytest.raises(UserError, match=said):
            build(mix | {"odd": DataSet(shards, 1.0)}, max_bad_share=0.5)
    with pytest.raises(UserError, match="without a single .up.ppm member .*; correct data.mix.odd.image, or leave it"):
        build(mix | {"odd": DataSet(pairs, 1.0, image="up.ppm")}, max_bad_share=0.5)
    with pytest.raises(UserError, match="data.num_samples=3 has no effect"):
        build(mix, num_samples=3)


def test_a_label_of_all_parts(write_shards):
    index = ShardIndex.joined(
        {"a": ShardIndex(write_shards([3], folder="a")), "b": ShardIndex(write_shards([5])).subset(np.array([1, 4]))},
        {"a": 1, "b": 1},
    )
    assert index.with_label("cls").labels[:, 0].min() >= 0
    assert np.array_equal(index.with_label("cls").images, index.images) and index.num_samples == 5


GOLDEN = [4, 13, 9, 8, 14, 12, 7, 0, 15, 10, 5, 17, 11, 13, 16, 9, 6, 3, 13, 1, 2, 16]
