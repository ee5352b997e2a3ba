import pytest
import timm
import torch

from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, check_encoder, forward_tokens
from prelude.pretrain.kept_patches import gather_patches
from prelude.pretrain.position import sincos_table

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
VARIANTS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "registers": {"reg_tokens": 3},
    "prefix without positions": {"reg_tokens": 2, "no_embed_class": True},
    "norm before the blocks, projection without bias": {"pre_norm": True},
    "norm of embedded patches": {"embed_norm_layer": "layernorm"},
    "images of any size": {"dynamic_img_size": True},
    "layer scale and query-key norm": {"init_values": 0.1, "qk_norm": True},
}


def config(name="vit_base_patch16_224", image_size=(16, 24), patch_size=8, pos_embed="sincos", **kwargs):
    given = {**TINY, **kwargs} if name.startswith(("vit", "deit")) else kwargs
    return EncoderConfig(name=name, image_size=image_size, patch_size=patch_size, pos_embed=pos_embed, kwargs=given)


def randomised(model):
    """Weights far from their initial zeros and ones, so that no part of the model is silent."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double().eval()


def some_images(batch=3, size=(16, 24)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def at(tokens, keep):
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
def test_keeping_every_patch_in_any_order_gives_timms_own_features(kwargs, pos_embed):
    vit = randomised(build_encoder(config(pos_embed=pos_embed, **kwargs), seed=0))
    images = some_images()
    theirs = vit.forward_features(images)  # (B, prefix + L, D), the oracle
    keep = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    ours = forward_tokens(vit, images, keep)
    prefix = vit.num_prefix_tokens
    torch.testing.assert_close(ours[:, :prefix], theirs[:, :prefix], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[:, prefix:], at(theirs[:, prefix:], keep), rtol=0, atol=1e-12)


def test_without_a_choice_of_patches_the_features_are_timms_bit_for_bit():
    vit = randomised(build_encoder(config(reg_tokens=1), seed=0))
    assert torch.equal(forward_tokens(vit, some_images()), vit.forward_features(some_images()))


def test_a_part_of_the_patches_equals_timms_blocks_run_on_those_tokens():
    vit = randomised(build_encoder(config(reg_tokens=2), seed=0))
    images, keep = some_images(), torch.tensor([[4, 1], [0, 5], [2, 3]])
    tokens = vit._pos_embed(vit.patch_embed(images))  # embed everything, then choose: the slow way round
    chosen = torch.cat([tokens[:, :3], at(tokens[:, 3:], keep)], dim=1)
    expected = vit.norm(vit.blocks(vit.norm_pre(chosen)))
    torch.testing.assert_close(forward_tokens(vit, images, keep), expected, rtol=0, atol=1e-12)


def test_pixels_of_patches_that_are_not_kept_are_never_read():
    vit = randomised(build_encoder(config(), seed=0))
    images, keep = some_images(1), torch.tensor([[1, 5]])
    before = forward_tokens(vit, images, keep)
    images[:, :, :, :8] = float("nan")  # patches 0 and 3
    images[:, :, 8:, 8:16] = float("nan")  # patch 4
    assert torch.equal(forward_tokens(vit, images, keep), before)


def test_patches_are_read_in_raster_order():
    image = torch.arange(3 * 4 * 6.0).view(1, 3, 4, 6)
    patches = gather_patches(image, (2, 3), torch.tensor([[1, 2]]))  # (1, 2, 3, 2, 3)
    assert torch.equal(patches[0, 0], image[0, :, :2, 3:])
    assert torch.equal(patches[0, 1], image[0, :, 2:, :3])


def test_gradient_checkpointing_changes_no_gradient():
    images, keep, gradients = some_images(), torch.tensor([[4, 1], [0, 5], [2, 3]]), []
    for enable in (False, True):
        vit = randomised(build_encoder(config(), seed=0))
        vit.set_grad_checkpointing(enable)
        forward_tokens(vit, images, keep).square().sum().backward()
        gradients.append([p.grad for p in vit.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_gradient_checkpointing_keeps_fewer_activations():
    def saved_numbers(enable):
        vit = randomised(build_encoder(config(depth=4), seed=0))
        vit.set_grad_checkpointing(enable)
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward_tokens(vit, some_images(), torch.tensor([[4, 1], [0, 5], [2, 3]]))
        return count

    assert saved_numbers(True) < saved_numbers(False) / 3


def test_the_position_table_is_the_published_one():
    table = sincos_table(32, (4, 4))  # values of the official code for the patch in row 1, column 2
    expected = torch.tensor([0.909297, 0.591127, 0.198669, 0.063203])  # sines of column 2 first
    torch.testing.assert_close(table[1 * 4 + 2, :4], expected, rtol=0, atol=1e-6)
    expected = torch.tensor([0.841471, 0.310984, 0.099833, 0.031618])  # then row 1
    torch.testing.assert_close(table[1 * 4 + 2, 16:20], expected, rtol=0, atol=1e-6)


def test_the_position_table_of_an_oblong_grid_follows_rows_and_columns():
    table = sincos_table(8, (2, 3)).view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])  # the column half does not see the row
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert table.dtype == torch.float32


def test_a_fixed_table_is_a_buffer_with_zero_rows_for_prefix_tokens():
    vit = build_encoder(config(reg_tokens=2), seed=0)
    assert "pos_embed" in dict(vit.named_buffers()) and "pos_embed" not in dict(vit.named_parameters())
    assert vit.pos_embed.shape == (1, 3 + 6, 32)
    assert not vit.pos_embed[0, :3].any()
    assert torch.equal(vit.pos_embed[0, 3:], sincos_table(32, (2, 3)))
    plain = build_encoder(config(reg_tokens=2, no_embed_class=True), seed=0)
    assert torch.equal(plain.pos_embed[0], sincos_table(32, (2, 3)))


def test_a_learned_table_stays_timms_parameter():
    assert "pos_embed" in dict(build_encoder(config(pos_embed="learned"), seed=0).named_parameters())


def test_weights_load_in_plain_timm_with_the_same_features():
    vit = build_encoder(config(), seed=3)
    plain = timm.create_model("vit_base_patch16_224", img_size=(16, 24), patch_size=8, num_classes=0, **TINY)
    plain.load_state_dict(vit.state_dict(), strict=True)
    images = some_images().float()
    assert torch.equal(vit.eval()(images), plain.eval()(images))


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    one = build_encoder(config(), seed=1).state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    two = build_encoder(config(), seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # and the global generator has not moved
    other = build_encoder(config(), seed=2).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_a_convnet_is_built_without_an_image_size():
    net = build_encoder(config("resnet18", image_size=64, patch_size=None), seed=0)
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 512)


@pytest.mark.parametrize(
    ("name", "width", "grid", "millions"),
    [
        ("vit_base_patch16_224", 768, (14, 14), 85.65),
        ("vit_large_patch16_224", 1024, (14, 14), 303.10),
        ("vit_huge_patch14_224", 1280, (16, 16), 630.44),
    ],
)
def test_a_summary_is_right_without_building_weights(name, width, grid, millions):
    summary = check_encoder(EncoderConfig(name=name, image_size=224), tokens=True)
    assert (summary.width, summary.grid) == (width, grid)
    assert round(summary.num_parameters / 1e6, 2) == millions


def test_a_setting_that_is_null_turns_off_what_the_architecture_has():
    kwargs = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    scaled, plain = (
        build_encoder(EncoderConfig(name="vit_small_patch16_dinov3", image_size=32, kwargs=kwargs | more), seed=0)
        for more in ({}, {"init_values": None})
    )
    assert "blocks.0.gamma_1" in scaled.state_dict() and "blocks.0.gamma_1" not in plain.state_dict()


REFUSED = [
    (config("vit_bse_patch16_224"), r"not an architecture of timm .*did you mean vit_base_patch16_224"),
    (config(image_size=225, patch_size=16), r"image_size=225 is not a whole number.*image_size=224 or 240\."),
    (config(image_size=(30, 47)), r"image_size=30x47 .*patches of 8 pixels.*\[24, 40\] or \[32, 48\]"),
    (config(image_size=4), r"write encoder.image_size=8\."),
    (config(img_size=32), r"kwargs.img_size has its own key; write encoder.image_size"),
    (config(num_classes=10), r"kwargs.num_classes is the same for every encoder"),
    (config(dpeth=None), r"encoder.kwargs.dpeth is no setting of .*leave it out"),
    (config(**{"depth:3": None}), r"write a space after each colon, as in encoder.kwargs=\{depth: 3\}"),
    (config(num_heads=5), r"timm cannot build .*divisible by num_heads"),
    (config(dpeth=3), r"encoder.kwargs.dpeth is no setting of .*leave it out"),
    (config("resnet18", image_size=64), r"encoder.patch_size is no setting of encoder.name=resnet18"),
    (config("resnet18", 64, None, "learned"), r"pos_embed=learned has no effect on resnet18"),
    (config("volo_d1_224", 224, None), r"sincos does not fit the table .*write encoder.pos_embed=learned"),
]


@pytest.mark.parametrize(("refused", "message"), REFUSED)
def test_what_cannot_be_built_is_refused_with_what_to_write(refused, message):
    with pytest.raises(UserError, match=message):
        check_encoder(refused, tokens=False)
    with pytest.raises(UserError, match=message):
        build_encoder(refused, seed=0)


NO_TOKENS = [
    (config("resnet18", 64, None), r"builds a ResNet, .*write a timm VisionTransformer"),
    (config("swin_tiny_patch4_window7_224", 224, None), "builds a SwinTransformer"),
    (config("deit_tiny_distilled_patch16_224"), "builds a VisionTransformerDistilled, which has a second class token"),
    (config("eva02_tiny_patch14_224", 224, None), "norms only what it pools"),
    (
        config("vit_relpos_small_patch16_224", 224, 16, embed_dim=32),
        "builds a VisionTransformerRelPos, which computes biases",
    ),
    (config("vit_tiny_r_s16_p8_224", 224, None), "cuts patches with a HybridEmbed"),
    (config(pos_embed="sincos", **{"global_pool": "avg"}), r"encoder.kwargs=\{fc_norm: false, final_norm: true\}"),
    (config(global_pool="map"), r"global_pool: token"),
    (config(patch_drop_rate=0.5), "patch_drop_rate drops patches a second time"),
]


@pytest.mark.parametrize(("refused", "message"), NO_TOKENS)
def test_what_cannot_run_on_a_part_of_its_patches_is_refused_for_token_objectives_only(refused, message):
    with pytest.raises(UserError, match=message):
        check_encoder(refused, tokens=True)
    check_encoder(refused, tokens=False)


def test_a_vit_without_positions_is_refused_for_token_objectives():
    blind = EncoderConfig(
        name="vit_base_patch16_224", image_size=16, patch_size=8, kwargs={**TINY, "pos_embed": "none"}
    )
    with pytest.raises(UserError, match="has no table of positions; write"):
        check_encoder(blind, tokens=True)


def test_images_that_are_padded_to_whole_patches_cannot_be_seen_in_part():
    padded = {"image_size": (18, 24), "pos_embed": "learned", "dynamic_img_pad": True}
    vit = build_encoder(config(**padded, dynamic_img_size=True), seed=0)
    assert vit(some_images(size=(18, 24)).float()).shape == (3, 32)
    check_encoder(config(**padded, dynamic_img_size=True), tokens=False)
    for tokens, whole in ((True, {"dynamic_img_size": True}), (False, {})):  # timm pads no table of positions
        with pytest.raises(UserError, match=r"18x24 is not a whole number .* write .*\[16, 24\] or \[24, 24\]"):
            check_encoder(config(**padded, **whole), tokens=tokens)
