"""MAE with masks in squares (Pixio) and with CrossMAE's decoder."""

import pytest
import torch
import torch.nn.functional as F

from prelude.data.errors import UserError
from prelude.objectives import check_objective, options_for
from prelude.objectives.building import build_objective
from prelude.objectives.masking import in_squares, random_mask
from prelude.pretrain.encoders import block_maps, forward_tokens
from prelude.pretrain.images import images as device_images
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 4}
VIT["kwargs"] = {"depth": 2, "embed_dim": 16, "num_heads": 2}
CROSS = {"decoder": "cross"}


def config(encoder=VIT, **objective):
    small = {"name": "mae", "decoder_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": encoder,
            "objective": small | objective,
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )


def batch_of(objective):
    batch = blank_batch(objective.views, 4)
    batch.views[0].copy_(torch.randint(0, 256, batch.views[0].shape, generator=torch.Generator().manual_seed(0)))
    return batch


def built(**options):
    settings = config(**options)
    check_objective(settings)
    objective = build_objective(settings)
    return objective, batch_of(objective)


# ---- squares


@pytest.mark.parametrize(("rows", "columns", "side"), [(8, 8, 4), (6, 4, 2), (4, 12, 4), (3, 5, 1)])
def test_squares_are_hidden_whole_and_every_patch_is_somewhere_once(rows, columns, side):
    noise = torch.rand(5, rows * columns // side**2, generator=torch.Generator().manual_seed(0))
    squares = random_mask(noise, 1)
    mask = in_squares(squares, side, columns)
    assert mask.keep.shape == (5, side**2)
    whole = torch.cat([mask.keep, mask.removed], 1)
    assert torch.equal(whole.sort(1).values, torch.arange(rows * columns).expand(5, -1))
    assert torch.equal(whole.gather(1, mask.restore), torch.arange(rows * columns).expand(5, -1))
    hidden = mask.hidden.unflatten(1, (rows // side, side, columns // side, side)).transpose(2, 3).flatten(3)
    assert (hidden.all(3) | ~hidden.any(3)).all()
    assert torch.equal(hidden.any(3).flatten(1), squares.hidden)


def test_the_loss_is_that_of_the_same_mask_of_patches():
    objective, batch = built(mask_block=4)
    plain, _ = built()
    (images,) = device_images(batch, objective.views)
    mask = objective.mask(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)))
    assert mask.keep.shape == (4, 16)
    losses = [
        each.loss(each.decode(images, each.encode(images, mask), mask, mask.removed)).total
        for each in (objective, plain)
    ]
    assert torch.equal(*losses)
    assert objective(batch, Progress(0, 10, 1.0)).total.isfinite() and objective.pictures(batch)


def test_noise_of_patches_hides_them_one_by_one_though_training_hides_squares():
    objective, plain = built(mask_block=4)[0], built()[0]
    noise = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(objective.mask(noise).restore, plain.mask(noise).restore)


def test_squares_that_do_not_fit_are_refused_with_one_that_does():
    with pytest.raises(UserError, match="mask_block=3 does not cut 8 x 8 patches .*write objective.mask_block=[24]"):
        check_objective(config(mask_block=3))
    with pytest.raises(UserError, match="leaves none to see"):
        check_objective(config(mask_block=4, mask_ratio=0.9))


# ---- the decoder that crosses


def test_the_maps_are_what_enters_the_blocks_and_what_leaves_them():
    objective, batch = built(**CROSS)
    (images,) = device_images(batch, objective.views)
    keep = torch.tensor([[3, 1, 60]] * 4)
    maps = block_maps(objective.encoder, images, keep)
    assert len(maps) == 3 and {m.shape for m in maps} == {(4, 4, 16)}
    assert torch.equal(objective.encoder.norm(maps[-1]), forward_tokens(objective.encoder, images, keep))
    assert torch.equal(objective.encoder.blocks[0](maps[0]), maps[1])


def by_hand(objective, images, mask, ids):
    """The decoder's equations, head by head."""
    maps = block_maps(objective.encoder, images, mask.keep)
    decoder, x = objective.decoder_blocks, objective.mask_token + objective.decoder_pos_embed[ids]
    for weights, norm, block in zip(decoder.mix, decoder.norms, decoder.blocks, strict=True):
        read = F.layer_norm(sum(w * m for w, m in zip(weights, maps, strict=True)), (16,), norm.weight, norm.bias, 1e-6)
        query, (key, value) = block.query(block.norm1(x)), block.key_value(read).chunk(2, -1)
        heads = []
        for q, k, v in zip(*(part.split(8, -1) for part in (query, key, value)), strict=True):
            heads.append((q @ k.mT / 8**0.5).softmax(-1) @ v)
        x = x + block.proj(torch.cat(heads, -1))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return objective.decoder_pred(objective.decoder_norm(x))


def test_the_prediction_is_its_equations():
    objective, batch = built(**CROSS)
    (images,) = device_images(batch, objective.views)
    mask = objective.mask(torch.rand(4, 64, generator=torch.Generator().manual_seed(0)))
    ids = mask.removed[:, :7]
    ours = objective.decode(images, objective.encode(images, mask), mask, ids).predicted
    torch.testing.assert_close(ours, by_hand(objective, images, mask, ids), rtol=1e-4, atol=1e-5)


def test_what_is_predicted_of_a_patch_does_not_depend_on_the_others():
    objective, batch = built(**CROSS)
    (images,) = device_images(batch, objective.views)
    mask = objective.mask(torch.rand(4, 64, generator=torch.Generator().manual_seed(0)))
    latent = objective.encode(images, mask)
    whole, part = (objective.decode(images, latent, mask, ids) for ids in (mask.removed, mask.removed[:, 5:9]))
    torch.testing.assert_close(whole.predicted[:, 5:9], part.predicted)
    assert torch.equal(whole.pixels[:, 5:9], part.pixels)


@pytest.mark.parametrize(("ratio", "share", "predicted"), [(0.75, 0.25, 16), (0.75, None, 48), (0.5, 0.4, 26)])
def test_so_many_patches_are_predicted(ratio, share, predicted):
    objective, batch = built(**CROSS, mask_ratio=ratio, predicted_share=share)
    seen = []
    objective.loss = lambda result: seen.append(result) or type(objective).loss(objective, result)
    objective(batch, Progress(0, 10, 1.0)).total.backward()
    assert seen[0].predicted.shape == (4, predicted, 48)
    unreached = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == [] and not objective.encoder.norm.weight.requires_grad
    assert objective.pictures(batch)["reconstruction"].size == (3 * 34 - 2, 4 * 34 - 2)


@pytest.mark.parametrize(
    "encoder",
    [
        {"name": "vit_small_patch16_dinov3", "image_size": 32, "patch_size": 4, "kwargs": VIT["kwargs"]},
        {
            "name": "beit_base_patch16_224",
            "image_size": 32,
            "patch_size": 4,
            "kwargs": VIT["kwargs"] | {"global_pool": "token"},
        },
    ],
    ids=["eva", "beit"],
)
def test_other_transformers_give_their_maps_too(encoder):
    objective, batch = built(encoder=encoder, **CROSS, predicted_share=0.25)
    objective(batch, Progress(0, 10, 1.0)).total.backward()
    reached = [p.grad.abs().sum() > 0 for p in objective.encoder.blocks.parameters() if p.requires_grad]
    assert sum(reached) > 0.8 * len(reached)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predicted_share": 0.25}, "write decoder=cross"),
        ({"decoder": "cross", "predicted_share": 0.8}, "more than the mask_ratio=0.75"),
    ],
)
def test_a_share_that_nothing_can_use_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        config(**options)


def test_a_network_that_shows_no_blocks_is_refused():
    own = {"name": "own_networks:small_transformer", "image_size": 32}
    with pytest.raises(UserError, match="decoder=cross reads what leaves each of the encoder's blocks"):
        check_objective(config(encoder=own, **CROSS))
