"""SparK: what is hidden, what is predicted, what the loss reads, and what cannot work."""

import pytest
import timm
import torch
import torch.nn.functional as F

from prelude.data.batch import Batch
from prelude.data.errors import UserError
from prelude.objectives import check_objective, options_for
from prelude.objectives.building import build_objective
from prelude.objectives.masked_cells import Reconstruction
from prelude.objectives.masking import mask_noise, random_mask
from prelude.pretrain.images import images as device_images
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress

RESNET = {
    "name": "resnet10t",
    "image_size": 64,
    "kwargs": {"channels": [8, 12, 16, 20], "stem_width": 8, "output_stride": 16},
}
CONVNEXT = {
    "name": "convnext_atto",
    "image_size": 64,
    "patch_size": 2,
    "kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]},
}
AT_FULL_SIZE = CONVNEXT | {"image_size": 32, "patch_size": 1}  # its first stage is as large as the image
START = Progress(0, 100, 10.0)


def a_config(encoder=RESNET, **objective):
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": encoder,
            "objective": {"name": "spark", "decoder_dim": 32} | objective,
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )


def a_model(encoder=RESNET, **objective):
    return build_objective(a_config(encoder, **objective))


def a_batch(count=4, size=(64, 64), first_seed=0):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 3, 3, generator=generator)  # smooth, so that a neighbour says something
    pixels = (255 * F.interpolate(coarse, size=size, mode="bilinear")).to(torch.uint8)
    ids = torch.arange(count)
    return Batch(
        (pixels,),
        boxes=torch.zeros(count, 1, 4, dtype=torch.int32),
        flips=torch.zeros(count, 1, dtype=torch.bool),
        seeds=ids * 7 + first_seed,
        sample_ids=ids,
        positions=ids,
    )


# ---- the loss


def some_reconstruction(predicted, pixels):
    return Reconstruction(predicted, pixels, mask=None)


def test_predicting_nothing_scores_one_less_a_value():
    """3071/3072 for cells of 32 pixels: the variance is the unbiased one."""
    pixels = torch.randn(4, 5, 32 * 32 * 3)
    loss = a_model().loss(some_reconstruction(torch.zeros_like(pixels), pixels)).total
    assert loss.item() == pytest.approx(3071 / 3072, abs=1e-5)


def test_predicting_the_standardised_cell_scores_nothing():
    pixels = 3 + 2 * torch.randn(2, 3, 12, dtype=torch.float64)
    target = (pixels - pixels.mean(-1, keepdim=True)) / pixels.std(-1, keepdim=True)
    loss = a_model().loss(some_reconstruction(target, pixels))
    assert loss.total.item() < 1e-10 and loss.parts["pixel_mse"].item() < 1e-10


def test_a_flat_cell_has_target_zero():
    pixels = torch.full((1, 1, 12), 0.7)
    assert a_model().loss(some_reconstruction(torch.zeros_like(pixels), pixels)).total.item() < 1e-6


def test_the_loss_is_that_of_the_definition_written_as_loops():
    model, batch = a_model(mask_ratio=0.5), a_batch(2)
    (images,) = device_images(batch, model.views)
    noise = mask_noise(batch.seeds, 16)
    maps = []
    model.decoder.register_forward_hook(lambda layer, args, output: maps.append(output))
    loss = model.loss(model.reconstruct(images, noise)).total
    hidden = random_mask(noise, 8).hidden
    errors = []
    for b in range(2):
        for cell in range(16):
            if hidden[b, cell]:
                rows, columns = (slice(16 * k, 16 * k + 16) for k in divmod(cell, 4))
                pixels = images[b, :, rows, columns]
                target = (pixels - pixels.mean()) / (pixels.var(correction=1) + 1e-6).sqrt()
                errors.append((maps[0][b, :, rows, columns] - target).square().mean())
    assert len(errors) == 16
    torch.testing.assert_close(loss, torch.stack(errors).mean())


@pytest.mark.parametrize("encoder", [RESNET, CONVNEXT], ids=["resnet", "convnext"])
def test_an_untrained_model_predicts_next_to_nothing(encoder):
    assert 0.99 < a_model(encoder)(a_batch(), START).total.item() < 1.1


# ---- what is hidden


def test_hidden_pixels_change_the_target_and_nothing_else():
    model, batch = a_model(), a_batch()
    images, noise = inputs(model, batch)
    before = model.reconstruct(images, noise)
    hidden = before.mask.hidden.view(-1, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    after = model.reconstruct(torch.where(hidden, images.flip(0), images), noise)
    assert torch.equal(before.predicted, after.predicted)
    assert not torch.equal(model.loss(before).total, model.loss(after).total)
    seen = model.reconstruct(torch.where(hidden, images, images.flip(0)), noise)
    assert not torch.equal(before.predicted, seen.predicted)
    assert torch.equal(before.pixels, seen.pixels)


def test_a_sample_s_cells_follow_from_its_seed_alone():
    model, batch = a_model().eval(), a_batch()
    together = model.reconstruct(*inputs(model, batch))
    assert together.mask.keep.shape == (4, 6)  # round(16 * 0.4)
    for i in range(4):
        alone = Batch(*[v[i : i + 1] if torch.is_tensor(v) else v for v in vars(batch).values()])
        alone = Batch((batch.views[0][i : i + 1],), **{k: v for k, v in vars(alone).items() if k != "views"})
        single = model.reconstruct(*inputs(model, alone))
        assert torch.equal(single.mask.keep[0], together.mask.keep[i])
        torch.testing.assert_close(single.predicted[0], together.predicted[i], rtol=1e-4, atol=1e-5)
    assert len({tuple(keep.sort().values.tolist()) for keep in together.mask.keep}) > 1


def inputs(model, batch):
    (images,) = device_images(batch, model.views)
    return images, mask_noise(batch.seeds, model.num_cells)


# ---- what is built, trained and given away


@pytest.mark.parametrize(("name", "millions"), [("resnet50", 52.92), ("resnet18", 35.92), ("convnext_tiny", 52.75)])
def test_the_number_of_parameters_is_the_published_one(name, millions):
    with torch.device("meta"):
        model = a_model({"name": name, "image_size": 224}, decoder_dim=768)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert sum(p.numel() for p in model.decoder.parameters()) / 1e6 == pytest.approx(23.18, abs=0.006)


# Whose residual branches would else start at zero, and keep the gradient from all that is before
BRANCHES = RESNET | {"kwargs": RESNET["kwargs"] | {"zero_init_last": False}}


@pytest.mark.parametrize("encoder", [BRANCHES, CONVNEXT, AT_FULL_SIZE], ids=["resnet", "convnext", "at full size"])
def test_every_parameter_that_wants_a_gradient_gets_one(encoder):
    model = a_model(encoder)
    model(a_batch(size=(encoder["image_size"],) * 2), START).total.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    idle = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert idle == ([] if encoder is BRANCHES else ["encoder.head.norm.weight", "encoder.head.norm.bias"])


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet18", None), ("convnext_atto", None), ("efficientnet_b0", "conv_head"), ("vgg11", "pre_logits.fc1")],
)
def test_layers_that_stay_as_they_were_drawn_are_told_of(name, layers):
    with torch.device("meta"):
        notes = a_model({"name": name, "image_size": 64}).notes()
    if layers is None:
        assert notes == []
    else:
        assert len(notes) == 1 and f"in front of the features `pool`: {layers}" in notes[0]


def test_decayed_and_spared_parameters_are_told_apart_by_name():
    model = a_model()
    tokens = [name for name, _ in model.named_parameters() if name.endswith(".mask_token")]
    assert tokens == [f"densify.{i}.mask_token" for i in range(4)]
    assert all(p.abs().max() <= 0.02 and p.std() > 0.005 for name, p in model.named_parameters() if name in tokens)


@pytest.mark.parametrize("encoder", [RESNET, CONVNEXT], ids=["resnet", "convnext"])
def test_training_lowers_the_loss_and_the_encoder_goes_back_to_timm(encoder, tmp_path):
    model, batch = a_model(encoder), a_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(batch, START).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    torch.save(model.exported_encoder().state_dict(), tmp_path / "encoder.pt")
    kwargs = dict(encoder["kwargs"]) | {key: encoder[key] for key in ("patch_size",) if key in encoder}
    plain = timm.create_model(encoder["name"], num_classes=0, **kwargs)
    plain.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True), strict=True)
    images = torch.randn(2, 3, 64, 64)
    ours = model.exported_encoder().eval()
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), ours(images))
        for one, two in zip(plain.forward_intermediates(images)[1], ours.forward_intermediates(images)[1], strict=True):
            assert torch.equal(one, two)


def test_an_oblong_image_is_masked_in_square_cells():
    model = a_model(RESNET | {"image_size": [64, 96]}).eval()
    assert model.grid == (4, 6)
    batch = a_batch(2, size=(64, 96))
    assert model.reconstruct(*inputs(model, batch)).predicted.shape == (2, 14, 768)
    assert model.pictures(batch)["reconstruction"].size == (3 * 96 + 4, 2 * 64 + 2)


def test_pictures_show_what_is_seen_predicted_and_true_and_leave_the_model_as_it_was():
    model, batch = a_model(), a_batch(2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    picture = model.pictures(batch)["reconstruction"]
    assert picture.size == (3 * 64 + 4, 2 * 64 + 2)
    assert model.training and model.encoder.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    seen, predicted, original = (
        torch.tensor(list(picture.crop((66 * k, 0, 66 * k + 64, 64)).getdata())).view(64, 64, 3) for k in range(3)
    )
    assert (original.permute(2, 0, 1) - batch.views[0][0].int()).abs().max() <= 1
    noise = mask_noise(batch.seeds, 16)
    hidden = random_mask(noise, 6).hidden[0].view(4, 4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(seen[~hidden], original[~hidden]) and torch.equal(predicted[~hidden], original[~hidden])
    assert len(seen[hidden].unique(dim=0)) == 1 and not torch.equal(predicted[hidden], original[hidden])


@pytest.mark.parametrize("encoder", [RESNET, CONVNEXT], ids=["resnet", "convnext"])
def test_recomputing_activations_changes_no_gradient(encoder):
    def gradients(checkpointing):
        model = a_model(encoder)
        model.encoder.set_grad_checkpointing(checkpointing)
        model(a_batch(), START).total.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_under_autocast_targets_and_loss_stay_in_single_precision():
    model, batch = a_model(CONVNEXT), a_batch()
    exact = model(batch, START).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch, START).total
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_it_compiles_as_one_graph_with_the_same_gradients():
    def gradients(compiled):
        model = a_model()
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        run(a_batch(), START).total.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for plain, compiled in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, compiled)


# ---- settings


CHANGES = {
    "mask_ratio": 0.75,
    "mask_patch": 32,
    "decoder_dim": 64,
    "crop_scale": [0.2, 1.0],
    "flip": 0.0,
}


@pytest.mark.parametrize("key", CHANGES)
def test_each_option_changes_something(key):
    def outcome(**options):
        model = a_model(**options)
        return model.views, model(a_batch(), START).total.item()

    assert outcome() == outcome()
    assert outcome() != outcome(**{key: CHANGES[key]})


IMPOSSIBLE = [
    ({"name": "resnet18", "image_size": 32}, {}, "image_size=32x32 is not cut into two .* write encoder.image_size=64"),
    ({"name": "resnet18", "image_size": 100}, {}, "image_size=100x100 .*write encoder.image_size=96 or 128"),
    (
        RESNET,
        {"mask_patch": 24},
        "mask_patch=24 is no multiple of 16, the total stride .*write objective.mask_patch=16",
    ),
    (RESNET, {"mask_patch": 48}, "image_size=64x64 is not cut into two or more whole cells of 48 pixels"),
    (RESNET, {"mask_ratio": 0.99}, "mask_ratio=0.99 of 4 x 4 cells leaves none to see; write"),
    (RESNET, {"mask_ratio": 0.01}, "mask_ratio=0.01 of 4 x 4 cells leaves none to hide; write"),
    (RESNET, {"decoder_dim": 40}, "decoder_dim=40 cannot be halved .*write objective.decoder_dim=32"),
    ({"name": "resnetblur18", "image_size": 64}, {}, "resnetblur18 cannot be encoded sparsely .*BlurPool2d"),
    ({"name": "vit_tiny_patch16_224", "image_size": 64}, {}, "vit_tiny_patch16_224 .*PatchEmbed"),
]


@pytest.mark.parametrize(("encoder", "objective", "message"), IMPOSSIBLE)
def test_what_cannot_work_is_refused_with_what_can(encoder, objective, message):
    with pytest.raises(UserError, match=message):
        check_objective(a_config(encoder, **objective))


@pytest.mark.parametrize(
    ("encoder", "micro_batch", "world_size", "instead"),
    [
        (RESNET, 1, 1, "train.micro_batch=2, or a smaller objective.mask_ratio"),
        (RESNET, 1, 2, None),
        (RESNET, "auto", 1, None),
        (CONVNEXT, 1, 1, None),
    ],
)
def test_a_single_value_for_a_batch_norm_is_refused(encoder, micro_batch, world_size, instead):
    config = a_config(encoder, mask_ratio=0.94 if encoder is RESNET else 0.75)  # one cell is seen
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})
    if instead is None:
        return check_objective(config, world_size)
    with pytest.raises(UserError, match=f"spark sees one image at once.* write {instead}"):
        check_objective(config, world_size)
    check_objective(config.model_copy(update={"objective": config.objective | {"mask_ratio": 0.8}}), world_size)


@pytest.mark.parametrize("encoder", [RESNET, CONVNEXT, {"name": "resnet18", "image_size": 64}])
def test_small_images_work_where_the_stride_fits(encoder):
    check_objective(a_config(encoder))
