from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from prelude.data.batch import Batch
from prelude.objectives.mae import MAE, MAEOptions
from prelude.objectives.masking import mask_noise
from prelude.objectives.patches import patchify, unpatchify
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, forward_tokens, seeded
from prelude.pretrain.images import images as device_images
from prelude.pretrain.kept_patches import gather_patches
from prelude.pretrain.optimizers import parameter_groups
from prelude.pretrain.schedules import Progress, warmup_cosine

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
START = Progress(0, 100, 10.0)


def tiny_mae(size=(32, 32), patch=8, encoder=None, **options):
    kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 4, **(encoder or {})}
    config = EncoderConfig(name="vit_base_patch16_224", image_size=size, patch_size=patch, kwargs=kwargs)
    options = MAEOptions(**{"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, **options})
    MAE.check(options, config)
    with seeded(1):
        return MAE(build_encoder(config, seed=0), options, image_size=size, mean=MEAN, std=STD)


def a_batch(count=4, size=(32, 32), first=0):
    """Samples first .. first + count - 1 of an endless made-up data set."""
    pixels = [
        torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        for i in range(first, first + count)
    ]
    ids = torch.arange(first, first + count)
    boxes = torch.tensor([0, 0, *size], dtype=torch.int32).expand(count, 1, 4)
    return Batch((torch.stack(pixels),), boxes, (ids[:, None] % 2).bool(), ids * 1000, ids, ids)


def some_images(count=2, size=(32, 32), seed=0):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_noise(count=2, num_patches=16):
    return mask_noise(torch.arange(count), num_patches)


def pixels_of(images, ids, patch=8):
    """A (B, 1, H, W) mask of the pixels of some patches."""
    chosen = torch.zeros(len(images), (images.shape[2] // patch) * (images.shape[3] // patch))
    chosen.scatter_(1, ids, 1.0)
    grid = chosen.view(len(images), 1, images.shape[2] // patch, images.shape[3] // patch)
    return F.interpolate(grid, scale_factor=patch).bool()


# What is computed


def test_changing_hidden_pixels_never_changes_the_prediction():
    mae, images, noise = tiny_mae().double(), some_images(), some_noise()
    before = mae.reconstruct(images, noise)
    hidden = pixels_of(images, before.mask.removed)
    after = mae.reconstruct(torch.where(hidden, some_images(seed=9), images), noise)
    assert torch.equal(after.predicted, before.predicted)
    assert not torch.equal(after.pixels, before.pixels)
    assert not torch.equal(mae.loss(after).total, mae.loss(before).total)  # through the target alone


def test_changing_visible_pixels_never_changes_the_target():
    mae, images, noise = tiny_mae().double(), some_images(), some_noise()
    before = mae.reconstruct(images, noise)
    visible = pixels_of(images, before.mask.keep)
    after = mae.reconstruct(torch.where(visible, some_images(seed=9), images), noise)
    assert torch.equal(after.pixels, before.pixels)
    assert not torch.equal(after.predicted, before.predicted)


def test_only_hidden_patches_are_predicted_and_scored():
    mae, images = tiny_mae().double(), some_images()
    result = mae.reconstruct(images, some_noise())
    assert result.predicted.shape == result.pixels.shape == (2, 12, 192)
    everything = patchify(images, (8, 8))
    expected = everything.gather(1, result.mask.removed[..., None].expand(-1, -1, 192))
    assert torch.equal(result.pixels, expected)


def test_the_loss_is_the_papers_sum_over_a_mask_of_all_patches():
    for norm_pix_loss in (True, False):
        mae, images = tiny_mae(norm_pix_loss=norm_pix_loss).double(), some_images()
        result = mae.reconstruct(images, some_noise())
        target = patchify(images, (8, 8)).numpy()  # everything below in numpy, in raster order
        if norm_pix_loss:
            centred = target - target.mean(-1, keepdims=True)
            target = centred / np.sqrt(target.var(-1, keepdims=True, ddof=1) + 1e-6)
        predicted = np.zeros_like(target)
        np.put_along_axis(predicted, result.mask.removed[..., None].numpy(), result.predicted.detach().numpy(), 1)
        mask = result.mask.hidden.numpy()
        expected = (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()
        assert mae.loss(result).total.item() == pytest.approx(expected, rel=1e-13)


def test_the_decoder_equals_one_that_puts_all_tokens_back_in_raster_order():
    mae, images = tiny_mae(encoder={"reg_tokens": 2}).double(), some_images()
    result = mae.reconstruct(images, some_noise())
    latent = forward_tokens(mae.encoder, images, result.mask.keep)
    tokens = mae.decoder_embed(latent)
    patches = torch.cat([tokens[:, 3:], mae.mask_token.expand(2, 12, -1)], dim=1)
    patches = patches.gather(1, result.mask.restore[..., None].expand(-1, -1, 16)) + mae.decoder_pos_embed
    tokens = torch.cat([tokens[:, :3], patches], dim=1)
    for block in mae.decoder_blocks:
        tokens = block(tokens)
    raster = mae.decoder_pred(mae.decoder_norm(tokens))[:, 3:]  # (B, L, P)
    expected = raster.gather(1, result.mask.removed[..., None].expand_as(result.predicted))
    torch.testing.assert_close(result.predicted, expected, rtol=0, atol=1e-13)


def test_moving_patches_with_their_noise_and_their_positions_changes_nothing():
    mae, images, noise = tiny_mae().double(), some_images(), some_noise()
    before = mae.loss(mae.reconstruct(images, noise)).total
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    moved = unpatchify(patchify(images, (8, 8))[:, order], (8, 8), (4, 4))
    mae.encoder.pos_embed[:, 1:] = mae.encoder.pos_embed[:, 1:][:, order]
    mae.decoder_pos_embed.copy_(mae.decoder_pos_embed[order])
    after = mae.loss(mae.reconstruct(moved, noise[:, order])).total
    assert after.item() == pytest.approx(before.item(), rel=1e-13)


def test_positions_reach_the_encoder_and_the_decoder():
    mae, images, noise = tiny_mae().double(), some_images(), some_noise()
    before = mae.reconstruct(images, noise).predicted
    for table in (mae.encoder.pos_embed, mae.decoder_pos_embed):
        kept = table.clone()
        table.zero_()
        assert not torch.allclose(mae.reconstruct(images, noise).predicted, before)
        table.copy_(kept)


def test_features_without_a_mask_are_timms_in_raster_order():
    mae = tiny_mae()
    plain = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0
    )
    plain.load_state_dict(mae.exported_encoder().state_dict())
    images = some_images().float()
    assert torch.equal(mae.exported_encoder().forward_features(images), plain.forward_features(images))


# Patches and targets


def test_the_channel_is_the_fastest_within_a_patch():
    image = torch.arange(3 * 32 * 32.0).view(1, 3, 32, 32)
    assert patchify(image, (8, 8))[0, 0, :6].tolist() == [0, 1024, 2048, 1, 1025, 2049]


def test_patches_equal_those_of_a_plain_loop():
    images, expected = some_images(size=(16, 24)).numpy(), []
    for image in images:
        for top in range(0, 16, 8):
            for left in range(0, 24, 4):
                expected.append(image[:, top : top + 8, left : left + 4].transpose(1, 2, 0).reshape(-1))
    expected = np.stack(expected).reshape(2, 12, 96)
    assert np.array_equal(patchify(torch.from_numpy(images), (8, 4)).numpy(), expected)


def test_patches_equal_unfold_up_to_the_order_of_channels():
    images = some_images()
    unfolded = F.unfold(images, 8, stride=8).transpose(1, 2)  # (B, L, 3 * 64), the channel slowest
    ours = patchify(images, (8, 8)).view(2, 16, 64, 3).transpose(2, 3).reshape(2, 16, 192)
    assert torch.equal(ours, unfolded)
    every = torch.arange(16).expand(2, -1)
    assert torch.equal(gather_patches(images, (8, 8), every).flatten(2), unfolded)


def test_unpatchify_inverts_patchify():
    images = some_images(size=(16, 24))
    assert torch.equal(unpatchify(patchify(images, (8, 4)), (8, 4), (2, 6)), images)


def test_a_flat_patch_has_target_zero():
    mae = tiny_mae().double()
    result = mae.reconstruct(torch.full((2, 3, 32, 32), 0.7, dtype=torch.float64), some_noise())
    loss = mae.loss(result).total.item()
    assert loss == pytest.approx(result.predicted.square().mean().item(), rel=1e-12)
    assert np.isfinite(loss)


def test_predicting_zero_scores_the_variance_of_the_target():
    mae = tiny_mae().double()
    for parameter in mae.decoder_pred.parameters():
        parameter.data.zero_()
    images = some_images()  # patches of variance about 1, so that the epsilon of 1e-6 hardly shows
    loss = mae.loss(mae.reconstruct(images, some_noise())).total.item()
    assert loss == pytest.approx(191 / 192, rel=3e-6)  # the unbiased variance has n - 1 below


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pixel_mse_is_the_error_of_the_restored_pixels(norm_pix_loss):
    mae = tiny_mae(norm_pix_loss=norm_pix_loss).double()
    result = mae.reconstruct(some_images(), some_noise())
    restored = result.predicted
    if norm_pix_loss:
        variance, mean = torch.var_mean(result.pixels, dim=-1, keepdim=True)
        restored = restored * (variance + 1e-6).sqrt() + mean
    part = mae.loss(result).parts["pixel_mse"]
    assert not part.requires_grad
    assert part.item() == pytest.approx((restored - result.pixels).square().mean().item(), rel=1e-12)


# Initial weights, sizes, optimisation


@pytest.mark.parametrize(
    ("name", "total", "decoder"),
    [
        ("vit_base_patch16_224", 111.91, 26.01),
        ("vit_large_patch16_224", 329.54, 26.14),
        ("vit_huge_patch14_224", 657.07, 26.18),
    ],
)
def test_the_sizes_are_the_published_ones(name, total, decoder):
    with torch.device("meta"):
        mae = MAE(timm.create_model(name, num_classes=0), MAEOptions(), image_size=(224, 224), mean=MEAN, std=STD)
    encoder = sum(parameter.numel() for parameter in mae.encoder.parameters())  # timm's table included
    rest = sum(parameter.numel() for parameter in mae.parameters()) - encoder
    assert round(rest / 1e6, 2) == decoder
    tables = (1 + mae.num_patches) * 512  # the paper counts the decoder's fixed table, with a row of zeros
    assert round((encoder + rest + tables) / 1e6, 2) == total


def test_initial_weights_are_the_official_ones():
    config = EncoderConfig(name="vit_base_patch16_224", image_size=32, kwargs={"depth": 1})
    with seeded(0):
        options = MAEOptions(decoder_depth=1)
        mae = MAE(build_encoder(config, seed=0), options, image_size=(32, 32), mean=MEAN, std=STD)
    encoder = mae.encoder

    def reaches(tensor, bound):  # uniform over (-bound, bound)
        assert bound * 0.99 < tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)

    reaches(encoder.patch_embed.proj.weight, (6 / (768 + 768)) ** 0.5)
    reaches(encoder.patch_embed.proj.bias, 768**-0.5)
    reaches(encoder.blocks[0].attn.qkv.weight, (6 / (4 * 768)) ** 0.5)
    reaches(encoder.blocks[0].mlp.fc1.weight, (6 / (5 * 768)) ** 0.5)
    reaches(mae.decoder_pred.weight, (6 / (512 + 768)) ** 0.5)
    for token in (encoder.cls_token, mae.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.15)
    for name, parameter in mae.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name


def test_the_first_loss_is_that_of_the_official_initial_weights():
    config = EncoderConfig(name="vit_tiny_patch16_224", image_size=64, kwargs={"depth": 2})
    with seeded(0):
        mae = MAE(build_encoder(config, seed=0), MAEOptions(), image_size=(64, 64), mean=MEAN, std=STD)
    with torch.no_grad():
        loss = mae(a_batch(8, (64, 64)), START).total.item()
    assert loss == pytest.approx(1.78, abs=0.06)  # 767 / 768 of the target, 0.78 of the decoder's output


def test_decay_falls_on_matrices_and_tokens_as_in_the_official_code():
    mae = tiny_mae()
    groups = {group["name"]: group["params"] for group in parameter_groups(mae, decay_tokens=True)}
    decayed = {id(parameter) for parameter in groups["decayed"]}
    for name, parameter in mae.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and not name.endswith("bias")), name
    assert id(mae.mask_token) in decayed and id(mae.encoder.cls_token) in decayed


def test_the_position_tables_are_never_trained():
    mae = tiny_mae()
    assert not [name for name, _ in mae.named_parameters() if "pos_embed" in name]
    mae(a_batch(), START).total.backward()
    assert mae.encoder.pos_embed.grad is None and mae.decoder_pos_embed.grad is None
    assert "decoder_pos_embed" not in mae.state_dict()  # it is recomputed
    assert all(parameter.grad is not None for parameter in mae.parameters())  # and everything else is


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0), (0.5, 3.0e-5), (20, 1.2e-3), (40, 2.4e-3), (420, 1.2e-3), (799.9, 1.03e-10)]
)
def test_the_learning_rate_is_the_official_one(epoch, lr):
    peak = 1.5e-4 * 4096 / 256
    value = warmup_cosine(epoch, warmup=40, total=800, start=0.0, peak=peak, end=0.0)
    assert value == pytest.approx(lr, rel=5e-3)


# Batches


def test_the_loss_of_a_batch_is_the_mean_over_its_samples():
    mae = tiny_mae()
    together = mae(a_batch(4), START).total.item()
    alone = [mae(a_batch(1, first=i), START).total.item() for i in range(4)]
    assert together == pytest.approx(sum(alone) / 4, rel=1e-6)
    assert MAE.accumulates


def test_forward_is_a_function_of_the_batch_alone():
    mae = tiny_mae()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = mae(a_batch(), START).total
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(mae(a_batch(), Progress(50, 100, 10.0)).total, one)


def test_forward_reads_flipped_and_normalised_views():
    mae, batch = tiny_mae(), a_batch()
    (images,) = device_images(batch, mae.views)
    expected = mae.loss(mae.reconstruct(images, mask_noise(batch.seeds, 16))).total
    assert torch.equal(mae(batch, START).total, expected)


@pytest.mark.parametrize(
    "encoder",
    [
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"reg_tokens": 4},
        {"reg_tokens": 4, "no_embed_class": True},
        {"pre_norm": True},
    ],
    ids=str,
)
def test_any_prefix_and_an_oblong_image_train(encoder):
    mae = tiny_mae((32, 48), encoder=encoder)
    mae(a_batch(2, (32, 48)), START).total.backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in mae.named_parameters() if "k_norm" not in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_targets_and_loss_stay_single_precision_under_autocast(dtype):
    mae, batch = tiny_mae(), a_batch()
    with torch.no_grad():
        plain = mae(batch, START)
        with torch.autocast("cpu", dtype=dtype):
            cast = mae(batch, START)
        assert cast.total.dtype == cast.parts["pixel_mse"].dtype == torch.float32
        assert cast.total.item() == pytest.approx(plain.total.item(), rel=0.01)
        for parameter in mae.decoder_pred.parameters():
            parameter.zero_()
        with torch.autocast("cpu", dtype=dtype):  # with the prediction out of the way, nothing is rounded
            zero = mae(batch, START).total
        assert torch.equal(zero, mae(batch, START).total)


def test_gradient_checkpointing_recomputes_every_block_and_changes_nothing():
    losses, gradients, calls = [], [], []
    for enable in (False, True):
        mae, count = tiny_mae(), [0]
        mae.encoder.set_grad_checkpointing(enable)
        for block in [*mae.encoder.blocks, *mae.decoder_blocks]:
            block.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        loss = mae(a_batch(), START).total
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in mae.parameters()])
        calls += count
    assert calls == [3, 6]
    assert torch.equal(*losses)
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_a_few_images_are_learned():
    mae, batch = tiny_mae(norm_pix_loss=False), a_batch(4)
    # Smooth images: random pixels could not be predicted from their neighbours.
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    smooth = torch.stack([rows * 7, columns * 7, (rows + columns) * 3]).to(torch.uint8)
    batch.views[0].copy_(smooth)
    optimizer = torch.optim.AdamW(mae.parameters(), lr=5e-3)
    first = mae(batch, START).total.item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = mae(batch, START).total
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 3


# Pictures


def test_pictures_show_visible_patches_a_perfect_prediction_and_the_original():
    mae, batch = tiny_mae(), a_batch(3)
    (images,) = device_images(batch, mae.views)
    honest = mae.reconstruct

    def perfect(images, noise):
        result = honest(images, noise)
        variance, mean = torch.var_mean(result.pixels, dim=-1, keepdim=True)
        return replace(result, predicted=(result.pixels - mean) / (variance + 1e-6).sqrt())

    mae.reconstruct = perfect
    sheet = np.asarray(mae.pictures(batch)["reconstruction"])
    assert sheet.shape == (3 * 34 - 2, 3 * 34 - 2, 3)
    hidden = mae.reconstruct(images, mask_noise(batch.seeds, 16)).mask.removed
    grey = pixels_of(images, hidden)[:, 0].numpy()  # (B, H, W)
    for row in range(3):
        original = batch.views[0][row].flip(-1) if batch.flips[row, 0] else batch.views[0][row]
        original = original.permute(1, 2, 0).numpy()
        seen, predicted, shown = (sheet[row * 34 : row * 34 + 32, i * 34 : i * 34 + 32] for i in range(3))
        assert np.array_equal(shown, original)
        assert np.array_equal(seen[~grey[row]], original[~grey[row]])
        assert (seen[grey[row]] == np.round(np.array(MEAN) * 255)).all()
        assert np.abs(predicted.astype(int) - original).max() <= 1


def test_pictures_show_a_few_images_of_a_large_batch():
    assert tiny_mae().pictures(a_batch(20))["reconstruction"].height == 8 * 34 - 2
