"""The odd one out, against loops; and what disruption keeps."""

import json

import pytest
import torch

from prelude.data.errors import UserError
from prelude.data.shapes import write_shards
from prelude.evaluators.dense.global_shape import global_shape, odd_one_out
from prelude.evaluators.features.disrupted import blended, derangements, permuted, triplets
from prelude.launch import prelude
from prelude.launch.exit_codes import door


def test_the_odd_one_is_that_of_a_loop():
    parts = [torch.randn(60, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for row, found in enumerate(odd_one_out(parts).tolist()):
        three = [part[row] / part[row].norm() for part in parts]
        sums = [sum(float(three[i] @ three[j]) for j in range(3) if j != i) for i in range(3)]
        assert found == sums.index(min(sums))


def test_what_sees_no_difference_is_never_right():
    same = torch.ones(4, 3)
    assert (odd_one_out([same, same, same]) != 0).all()


def test_every_tile_moves_and_none_is_lost():
    images, seeds = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12), torch.tensor([3, 4])
    order, other = derangements(seeds, 16)
    assert all(sorted(row) == list(range(16)) for row in (*order.tolist(), *other.tolist()))
    assert (order != torch.arange(16)).all() and (other != torch.arange(16)).all() and (order != other).all()
    assert not torch.equal(order[0], order[1])
    moved = permuted(images, order, 4)
    for place in range(16):
        (row, column), (of_row, of_column) = divmod(place, 4), divmod(order[0, place].item(), 4)
        tile = images[0, :, 2 * of_row : 2 * of_row + 2, 3 * of_column : 3 * of_column + 3]
        assert torch.equal(moved[0, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3], tile)


def test_seams_are_blended_alike_in_all_three_and_the_middles_of_tiles_are_as_they_were():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    original, first, second = triplets(images, torch.tensor([1, 2]), 2)
    assert torch.equal(original, blended(images, 2)) and not torch.equal(first, second)
    assert torch.allclose(original[..., 4:24, 4:24], images[..., 4:24, 4:24], atol=1e-3)
    assert (original[..., 31:33, :] - images[..., 31:33, :]).abs().mean() > 0.1
    assert torch.allclose(original.mean((2, 3)), first.mean((2, 3)), atol=0.02)


def test_features_of_the_whole_are_right_and_features_of_texture_are_at_chance():
    generator = torch.Generator().manual_seed(0)
    template = torch.linspace(-1, 1, 16)[:, None].expand(16, 16)
    shaped = template + 0.1 * torch.randn(60, 1, 16, 16, generator=generator)
    noise = torch.randn(200, 1, 16, 16, generator=generator)

    def features(images):
        like = ((images[:, 0] * template).mean((1, 2)) > 0.3).float()
        return {
            "whole": torch.stack([like, 1 - like], 1),
            "texture": images.flatten(1).sort(1).values,
            "pixels": images.flatten(1),
        }

    batches = [(shaped[:40], torch.arange(40)), (shaped[40:], torch.arange(40, 60))]
    outcome = global_shape(batches, features, tiles=(2, 4))
    assert outcome.details["num_images"] == 60 and outcome.chosen == {"features": "whole"}
    assert {tiles: number.value for tiles, number in outcome.numbers.items()} == {"2 x 2": 100, "4 x 4": 100}
    outcome = global_shape([(noise, torch.arange(200))], features, tiles=(4,))
    for kind in ("texture", "pixels"):
        assert 22 < outcome.by_kind[kind]["4 x 4"].value < 45


@pytest.mark.parametrize("count", [3, 16])
def test_tiles_that_do_not_fit_are_refused(count):
    with pytest.raises(UserError, match="write --tiles 2 4 8"):
        global_shape([(torch.zeros(1, 3, 16, 16), torch.arange(1))], lambda images: {}, tiles=(count,))


def test_the_door(tmp_path, capsys):
    write_shards(tmp_path, "test", 12, image_size=32)
    argv = ["shape", "random:timm:test_vit.r160_in1k", "pixels:16", "--test", f"{tmp_path}/test-000000.tar"]
    assert prelude.main([*argv, "--out", str(tmp_path / "out"), "--num-images", "6", "--tiles", "2", "4"]) == 0
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert len(found) == 2 and all(one["details"]["num_images"] == 6 for one in found)
    assert "4 x 4" in capsys.readouterr().out
    assert door(lambda: prelude.main([*argv, "--tiles", "3"])) == 2
    assert "--tiles 3" in capsys.readouterr().err
