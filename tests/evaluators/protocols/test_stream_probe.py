import dataclasses
import io
import tarfile

import pytest
import torch
from extracting import extract

from prelude.data.errors import UserError
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.extraction import Extractor
from prelude.evaluators.features.pixels import open_pixels
from prelude.evaluators.labelled import Labelled
from prelude.evaluators.protocols import stream_probe as module
from prelude.evaluators.protocols.papers import protocol_of
from prelude.evaluators.protocols.stream_probe import evaluate_protocol, stream_probe


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "train", 200, image_size=16, samples_per_shard=100)
    write_shards(folder, "test", 100, image_size=16)
    return Labelled(f"{folder}/train-*.tar", f"{folder}/test-*.tar", "cls")


@pytest.fixture
def parts(shapes):
    encoder = open_pixels("pixels:8")
    indexes = [ShardIndex(shards, "cls") for shards in (shapes.train, shapes.test)]
    return encoder, indexes[0], *(extract(encoder, index, "cls") for index in indexes)


@pytest.fixture
def seen(monkeypatch):
    """Views that the encoder was shown, as (sample ids, pixels) of each batch."""
    batches, original = [], Extractor.__call__

    def recorded(self, batch):
        batches.append((batch.sample_ids.clone(), batch.views[0].clone()))
        return original(self, batch)

    monkeypatch.setattr(Extractor, "__call__", recorded)
    return batches


def short(**changes):
    return protocol_of("vissl", **({"epochs": 4.0, "global_batch": 40, "learning_rates": (0.1,)} | changes))


def test_images_are_augmented_anew_in_each_epoch_and_held_out_ones_never_trained_on(parts, seen):
    seen.clear()
    stream_probe(*parts, short(), batch_size=16)
    ids = torch.cat([ids for ids, _ in seen])
    views = torch.cat([views for _, views in seen])
    assert all(len(ids) <= 16 for ids, _ in seen)
    assert len(ids) == 18 * 40 and ids.unique().numel() == 180  # nine tenths of 200, four times
    of_first = views[ids == ids[0]]
    assert len(of_first) == 4 and not any(of_first[0].equal(other) for other in of_first[1:])


def test_one_head_alone_is_trained_on_all_of_train(parts, seen):
    seen.clear()
    outcome = stream_probe(*parts, dataclasses.replace(short(), norms=("none",)))
    assert torch.cat([ids for ids, _ in seen]).unique().numel() == 200
    assert outcome.recipe["held_out"] == 0 and len(outcome.details["grid"]) == 1


def colours(path, num_samples, seed):
    """Four classes, each a colour under noise, which crops and flips leave as it is."""
    generator = torch.Generator().manual_seed(seed)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(num_samples):
            colour = 128 + 60 * torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])[i % 4]
            noise = 30 * torch.randn(12, 12, 3, generator=generator)
            pixels = (colour + noise).clamp(0, 255).to(torch.uint8).numpy().tobytes()
            for name, content in ((f"{i:04}.ppm", b"P6 12 12 255\n" + pixels), (f"{i:04}.cls", str(i % 4).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return ShardIndex(str(path), "cls")


def test_it_learns_and_the_better_rate_is_chosen_on_held_out_images(tmp_path):
    encoder = open_pixels("pixels:8")
    indexes = [colours(tmp_path / f"{seed}.tar", 160, seed) for seed in (1, 2)]
    train, test = (extract(encoder, index, "cls") for index in indexes)
    # 40 steps at a peak of 0.3 * 16 / 256; the other rate leaves heads where they began.
    protocol = short(epochs=4.0, learning_rates=(1e-9, 0.3), global_batch=16)
    outcome = stream_probe(encoder, indexes[0], train, test, protocol)
    assert outcome.chosen["learning_rate"] == 0.3 and outcome.numbers["top1"].value > 90
    best = max(outcome.details["grid"], key=lambda row: (row["held_out_top1"], -row["held_out_loss"]))
    assert outcome.chosen == {key: best[key] for key in outcome.chosen}
    mixed = {kind: dataclasses.replace(f, labels=f.labels.roll(1)) for kind, f in test.items()}
    blind = stream_probe(encoder, indexes[0], train, mixed, protocol)
    assert blind.chosen == outcome.chosen and blind.details == outcome.details
    assert blind.numbers["top1"].value < 20


def test_the_seed_decides_everything_and_the_batch_size_nothing(parts):
    def grid(seed=1, batch_size=7):
        return stream_probe(*parts, short(), seed=seed, batch_size=batch_size).details["grid"]

    first, same, sizes, other = grid(), grid(), grid(batch_size=64), grid(seed=2)
    assert first == same and other != first
    losses = [[row["held_out_loss"] for row in rows] for rows in (first, sizes)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_too_few_steps_and_a_rate_at_the_edge_are_told(parts):
    warnings = stream_probe(*parts, short(learning_rates=(0.01, 0.1))).warnings
    assert "gives 18 steps" in warnings[0] and "edge of the grid" in warnings[1]


def test_a_batch_that_ranks_cannot_share_is_refused(parts, monkeypatch):
    monkeypatch.setattr(module.distributed, "world_size", lambda: 3)
    with pytest.raises(UserError, match="--global-batch 39"):
        stream_probe(*parts, short())


def test_every_source_gets_a_result_and_seeds_a_spread(shapes, tmp_path):
    results = evaluate_protocol(
        ["pixels:4", "pixels:8"], short(epochs=1.0), shapes, num_seeds=2, out=tmp_path / "out", bank=tmp_path / "bank"
    )
    assert [result.source for result in results] == ["pixels:4", "pixels:8"]
    assert all(result.outcome.evaluator == "linear_probe_vissl" for result in results)
    assert results[0].outcome.numbers["top1"].spread is not None and results[0].outcome.recipe["epochs"] == 1.0
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
