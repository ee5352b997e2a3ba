import io
import math
from dataclasses import replace

import pytest
import timm
import torch
from extracting import extract
from PIL import Image
from webdataset import TarWriter

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.batch import Batch
from prelude.data.errors import UserError
from prelude.data.loader import one_pass
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.extraction import (
    check_kinds,
    crops_plan,
    encode,
    evaluation_plan,
    pool,
    suited_kinds,
)
from prelude.evaluators.features.pixels import Pixels, open_pixels
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.images import images, normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def opened(model, size=32) -> OpenedEncoder:
    return OpenedEncoder(model.eval(), EncoderConfig(name="a", image_size=size), MEAN, STD, "encoder", "weights")


def vit(**kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **settings | kwargs).eval()


def batches_of(pixels, labels, size=7):
    for start in range(0, len(pixels), size):
        count = len(pixels[start : start + size])
        ids = torch.arange(start, start + count)
        boxes = torch.tensor([0, 0, *pixels.shape[2:]], dtype=torch.int32).expand(count, 1, 4)
        flips = torch.zeros(count, 1, dtype=torch.bool)
        yield Batch((pixels[start : start + size],), boxes, flips, ids, ids, ids, labels[start : start + size])


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoded(model, pixels, **kwargs):
    batches = batches_of(pixels, torch.arange(len(pixels)))
    return encode(opened(model), batches, len(pixels), "fingerprint", "cls", **kwargs)


def test_cls_and_mean_are_timms_own_features(pixels):
    model = vit(reg_tokens=3)
    found = encoded(model, pixels)
    tokens = model.forward_features(normalise(pixels, evaluation_plan(opened(model))))  # (B, 1 + 3 + 16, D)
    assert set(found) == {"cls", "mean"}
    assert torch.allclose(found["cls"].values, tokens[:, 0], atol=1e-5)
    assert torch.allclose(found["mean"].values, tokens[:, 4:].mean(1), atol=1e-5)
    assert found["cls"].labels.tolist() == found["cls"].sample_ids.tolist() == list(range(16))


def test_last4_is_the_normed_mean_of_each_of_the_last_blocks_in_order(pixels):
    model = vit(class_token=False, global_pool="avg", fc_norm=False)
    found = encoded(model, pixels, kinds=["last4", "last2"])
    kept = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    final = model.forward_features(normalise(pixels, evaluation_plan(opened(model))))
    expected = torch.cat([model.norm(tokens).mean(1) for tokens in kept[1:]], 1)
    assert torch.allclose(found["last4"].values, expected, atol=1e-5)
    assert torch.allclose(found["last2"].values, expected[:, 48:], atol=1e-5)
    assert torch.allclose(expected[:, -24:], final.mean(1), atol=1e-5)


def test_last2x2_is_the_same_of_each_quarter_of_an_image(pixels):
    model = vit(reg_tokens=3)
    found = encoded(model, pixels, kinds=["last2x2", "last2"])
    tokens = encoded(model, pixels, kinds=["tokens2"])["tokens2"].values.view(16, 4, 4, 2, 24)
    quarters = [
        tokens[:, rows, columns].mean((1, 2)) for rows in (slice(2), slice(2, 4)) for columns in (slice(2), slice(2, 4))
    ]
    expected = torch.stack(quarters, 2).flatten(1)  # (B, 2 blocks, 4 quarters, 24)
    assert torch.allclose(found["last2x2"].values, expected, atol=1e-5)
    whole = found["last2x2"].values.view(16, 2, 4, 24).mean(2).flatten(1)
    assert torch.allclose(whole, found["last2"].values, atol=1e-5)
    assert torch.equal(found["last2"].values, encoded(model, pixels, kinds=["last2"])["last2"].values)


def test_cells_of_a_transformer_that_takes_any_size(pixels):
    model = timm.create_model("naflexvit_base_patch16_gap", num_classes=0, depth=2, embed_dim=48, num_heads=2).eval()
    found = encoded(model, pixels, kinds=["last2x2", "last2"])
    seen = normalise(pixels, evaluation_plan(opened(model)))
    blocks = model.forward_intermediates(seen, norm=True, output_fmt="NLC", intermediates_only=True)
    cells = torch.cat([model.fc_norm(tokens).flatten(1) for tokens in blocks], 1)  # a patch is a quarter
    assert torch.allclose(found["last2x2"].values, cells, atol=1e-5)


@pytest.mark.parametrize("kind", ["last9x2", "last2x0", "lastx2"])
def test_blocks_and_cells_that_are_not_there_are_refused(kind, pixels):
    with pytest.raises(UserError, match="5 blocks|write one or more of"):
        encoded(vit(), pixels, kinds=[kind])


def test_a_norm_after_pooling_is_the_final_norm(pixels):
    model = vit(global_pool="avg", fc_norm=True)
    torch.nn.init.normal_(model.fc_norm.weight)
    normalised = normalise(pixels, evaluation_plan(opened(model)))
    expected = model.forward_head(model.forward_features(normalised), pre_logits=True)
    assert torch.allclose(encoded(model, pixels)["mean"].values, expected, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto", "mobilenetv3_small_050", "efficientvim_m1"]
)
def test_others_are_pooled_as_they_pool_themselves(name, pixels):
    torch.manual_seed(0)
    size = {"img_size": 32, "window_size": 2} if name.startswith("swin") else {}
    model = timm.create_model(name, num_classes=0, **size).eval()
    for part, parameter in model.named_parameters():
        if "norm" in part:  # a trained norm says what one that was never trained leaves out
            torch.nn.init.normal_(parameter)
    found = encoded(model, pixels[:2])
    assert set(found) == {"pool"}
    expected = model(normalise(pixels[:2], evaluation_plan(opened(model))))
    torch.testing.assert_close(found["pool"].values, expected, rtol=1e-4, atol=1e-4)
    beside = encoded(model, pixels[:2], kinds=["stages", "pool"])["pool"].values
    torch.testing.assert_close(beside, expected, rtol=1e-4, atol=1e-4)


def test_what_pools_nothing_is_averaged_over_places(pixels):
    model = timm.create_model("convnext_atto", num_classes=0, depths=(1, 1, 1, 1), global_pool="").eval()
    expected = model(normalise(pixels[:2], evaluation_plan(opened(model))))  # (B, D, h, w)
    torch.testing.assert_close(encoded(model, pixels[:2])["pool"].values, expected.mean((2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "objective", "kind"),
    [
        ("mobilenetv3_small_050", "spark", "stages"),
        ("mobilenetv3_small_050", "fcmae", "stages"),
        ("mobilenetv3_small_050", "rotation", "pool"),
        ("resnet18", "spark", "pool"),
        ("convnext_atto", "fcmae", "pool"),
    ],
)
def test_an_encoder_whose_last_layers_were_not_trained_is_judged_by_its_stages(name, objective, kind):
    encoder = opened(timm.create_model(name, num_classes=0))
    assert suited_kinds(replace(encoder, objective=objective)) == (kind,)


def test_stages_are_pooled_maps_of_what_the_blocks_give(pixels):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0).eval()
    maps = {}
    for number, layer in enumerate([model.act1, model.layer1, model.layer2, model.layer3, model.layer4]):
        layer.register_forward_hook(lambda module, inputs, output, number=number: maps.update({number: output}))
    found = encoded(model, pixels[:4], kinds=["pool", "stages", "stage2", "stage1x2", "stagesx2"])
    assert torch.allclose(found["stage2"].values, maps[2].mean((2, 3)), atol=1e-4)
    assert torch.allclose(found["pool"].values, maps[4].mean((2, 3)), atol=1e-4)
    assert torch.allclose(found["stages"].values, torch.cat([maps[k].mean((2, 3)) for k in range(5)], 1), atol=1e-4)
    quarter = maps[1][:, :, :4, 4:].mean((2, 3))  # of an 8 x 8 map, top right
    assert torch.allclose(found["stage1x2"].values.view(4, 64, 2, 2)[:, :, 0, 1], quarter, atol=1e-4)
    everywhere = found["stagesx2"].values.split([64 * 4, 64 * 4, 128 * 4, 256 * 4, 512 * 4], 1)
    assert torch.equal(everywhere[1], found["stage1x2"].values)
    assert torch.allclose(everywhere[0].view(4, 64, 2, 2)[:, :, 1, 0], maps[0][:, :, 8:, :8].mean((2, 3)), atol=1e-4)


@pytest.mark.parametrize(
    "kind, most",
    [
        ("stagesx17", "stagesx16"),
        ("stage2x5", "stage2x4"),
        ("stagesx99999999999999999999", "stagesx16"),
        ("last2x9", "last2x4"),
    ],
)
def test_more_cells_than_places_are_refused_with_how_many_there_can_be(pixels, kind, most):
    model = vit() if kind.startswith("last") else timm.create_model("resnet18", num_classes=0).eval()
    with pytest.raises(UserError, match=rf"features={kind} asks for more cells than .* places; write {most} at most"):
        encoded(model, pixels[:2], kinds=[kind])


def test_pixels_are_the_normalised_view(pixels):
    encoder = open_pixels("pixels", beside=opened(vit()))
    (found,) = encode(encoder, batches_of(pixels, torch.zeros(16, dtype=torch.long)), 16, "f", "cls").values()
    expected = (pixels[3, 1, 5, 7].item() / 255 - MEAN[1]) / STD[1]
    assert found.values[3].view(3, 32, 32)[1, 5, 7].item() == pytest.approx(expected, abs=1e-5)


def test_pixels_take_the_size_of_what_stands_beside_up_to_a_thumbnail():
    assert open_pixels("pixels", opened(vit(), size=24)).config.size == (24, 24)
    assert open_pixels("pixels", opened(vit(), size=(224, 112))).config.size == (32, 16)
    assert open_pixels("pixels:48").config.size == (48, 48)
    for source in ("pixels", "pixels:x"):
        with pytest.raises(UserError, match="pixels:32"):
            open_pixels(source)


def test_every_image_is_seen_whole_when_small_and_as_the_papers_do_when_large():
    assert evaluation_plan(opened(vit(), size=32)).views[0].crop_share == 1.0
    view = evaluation_plan(opened(vit(), size=224)).views[0]
    assert (view.crop, view.crop_share, view.flip) == ("center", 0.875, 0.0)


def test_kinds_that_an_encoder_lacks_are_refused():
    with pytest.raises(UserError, match="stage0 to stage4"):
        check_kinds(timm.create_model("resnet18", num_classes=0), ["stage5"], "encoder")
    with pytest.raises(UserError, match="no features=stage1;"):
        check_kinds(vit(), ["stage1"], "encoder")
    with pytest.raises(UserError, match="no features=cls"):
        check_kinds(vit(class_token=False, global_pool="avg"), ["cls"], "encoder")
    with pytest.raises(UserError, match="5 blocks"):
        check_kinds(vit(), ["last6"], "encoder")
    with pytest.raises(UserError, match="write one or more of pixels"):
        check_kinds(Pixels(), ["mean"], "pixels")


def test_labels_that_are_no_class_numbers_are_refused(pixels):
    encoder = opened(Pixels())
    for labels in (torch.rand(16), torch.zeros(16, 3, dtype=torch.long)):
        with pytest.raises(UserError, match="class number"):
            encode(encoder, batches_of(pixels, labels), 16, "f", "cls")


def write_shard(path, images, labels):
    with TarWriter(str(path)) as tar:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "png")
            tar.write({"__key__": f"{i:04d}", "png": file.getvalue(), "cls": str(label).encode()})


def test_shards_give_each_sample_once_in_order_at_any_number_of_workers_and_ranks(tmp_path, pixels):
    write_shard(tmp_path / "a.tar", pixels[:9], range(9))
    write_shard(tmp_path / "b.tar", pixels[9:], range(9, 16))
    index, encoder = ShardIndex(str(tmp_path / "*.tar"), "cls"), opened(vit())
    whole = extract(encoder, index, "cls", batch_size=5)["mean"]
    assert whole.labels.tolist() == whole.sample_ids.tolist() == list(range(16))
    assert whole.data_fingerprint == index.fingerprint
    expected = pool(encoder.model, normalise(pixels, evaluation_plan(encoder)), ["mean"])["mean"]
    assert torch.allclose(whole.values, expected, atol=1e-5)
    workers = extract(encoder, index, "cls", batch_size=3, num_workers=2)["mean"]
    assert torch.allclose(workers.values, whole.values, atol=1e-5) and workers.labels.equal(whole.labels)
    parts = [extract(encoder, index, "cls", rank=rank, world_size=3)["mean"] for rank in range(3)]
    assert torch.cat([part.labels for part in parts]).equal(whole.labels)
    assert sum(map(len, parts)) == 16 and all(math.isclose(len(part), 16 / 3, abs_tol=1) for part in parts)


def test_images_that_cannot_be_read_are_left_out(tmp_path, pixels):
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(4):
            file = io.BytesIO()
            Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(file, "png")
            content = b"no image" if i == 2 else file.getvalue()
            tar.write({"__key__": str(i), "png": content, "cls": str(i).encode()})
    found = extract(opened(Pixels()), ShardIndex(str(tmp_path / "a.tar"), "cls"))["pixels"]
    assert found.labels.tolist() == [0, 1, 3]
    assert found.values.shape == (3, 3 * 32 * 32)


def test_no_crop_of_an_image_is_mirrored(tmp_path):
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(3, 32, 32)  # brighter to the right, and so is each crop
    write_shard(tmp_path / "a.tar", [ramp] * 4, range(4))
    plan = crops_plan(opened(Pixels()), 8)
    (batch,) = one_pass(ShardIndex(str(tmp_path / "a.tar"), "cls"), plan, batch_size=4)
    views = images(batch, plan)
    assert len(views) == 8 and not torch.equal(views[1], views[2])
    assert all((view[..., 16:].mean((1, 2, 3)) > view[..., :16].mean((1, 2, 3))).all() for view in views)
