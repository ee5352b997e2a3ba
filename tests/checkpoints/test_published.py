"""Files in published formats: recognised, loaded whole, with the features that their own code computes; or refused."""

import json
import os
import pickle
import shutil

import pytest
import timm
import torch
from published import METHODS, SIDE
from published_rotary import ROTARY, eva02_angles, periods
from safetensors.torch import load_file, save_file

from prelude.checkpoints.convert.fit import fit
from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.from_files import describe_file
from prelude.checkpoints.sources import open_encoder, open_weights
from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder

METHODS = METHODS | ROTARY
BATCH = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CONVNET_BATCH = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def saved(published, path):
    torch.save(published.tree, path)
    return f"{path}{published.words}"


@pytest.mark.parametrize("method", METHODS)
def test_features_are_those_of_the_methods_own_code(method, tmp_path):
    published = METHODS[method]()
    opened = open_encoder(saved(published, tmp_path / "weights.pth"))
    images = BATCH if hasattr(opened.model, "patch_embed") else CONVNET_BATCH
    with torch.no_grad():
        model = opened.model.double()
        found = model.forward_features(images) if published.maps else model(images)
        expected = published.features(images)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())
    assert (
        f": {published.format}, {published.loaded} of {len(opened.model.state_dict())} tensors loaded" in opened.loaded
    )
    assert opened.origin["format"] == published.format


@pytest.mark.parametrize("method", METHODS)
def test_damaged_files_are_refused_with_what_is_wrong(method, tmp_path):
    published = METHODS[method]()
    network, (name,) = published.network, published.needs
    tensor = network.pop(name)
    with pytest.raises(UserError, match="does not hold the weights of .*: [a-z0-9_.]*bias is missing; write"):
        open_encoder(saved(published, tmp_path / "missing.pth"))
    network[name] = tensor
    extra = name.replace("bias", "scale")
    network[extra] = tensor
    with pytest.raises(
        UserError, match=f"does not hold the weights of .*: [a-z0-9_.]*{extra.split('.')[-1]} has no place"
    ):
        open_encoder(saved(published, tmp_path / "left_over.pth"))
    del network[extra]
    network[name] = torch.cat([tensor, tensor])
    with pytest.raises(UserError, match=rf"bias is \({2 * len(tensor)},\) instead of \({len(tensor)},\)"):
        open_encoder(saved(published, tmp_path / "misshapen.pth"))
    network[name] = torch.full_like(tensor, float("nan"))
    with pytest.raises(UserError, match="numbers that are not finite in .*bias"):
        open_encoder(saved(published, tmp_path / "nan.pth"))


@pytest.mark.parametrize(
    ("method", "name", "damage", "why"),
    [
        ("DINOv3", "blocks.1.attn.qkv.bias_mask", lambda t: t * torch.nan, "not finite in blocks.1.attn.qkv.bias_mask"),
        ("DINOv3", "blocks.0.attn.qkv.bias_mask", lambda t: t + 1, "a bias of keys in blocks.0.attn.qkv.bias"),
        ("DINOv3", "rope_embed.periods", lambda t: t**2, r"periods that are not DINOv3's, 100 \*\* \(m / 3\)"),
        ("DINOv3", "cls_norm.weight", None, r"last norm of its own for the class token \(cls_norm\)"),
        (
            "EVA-02",
            "rope.freqs_cos",
            lambda t: eva02_angles((4, 4), 4).cos(),
            "rotations in rope.freqs_cos that are not",
        ),
        ("EVA-02", "blocks.0.attn.rope.freqs_cos", lambda t: t[:-4], "rotations in blocks.0.attn.rope.freqs_cos that"),
        ("EVA-02", "pos_embed", lambda t: t[:, 1:], "no square of patches; write .*[#,]grid=ROWSxCOLUMNS"),
    ],
)
def test_rotations_and_biases_that_timm_would_compute_otherwise_are_refused(method, name, damage, why, tmp_path):
    published = METHODS[method]()
    network = published.network
    network[name] = damage(network[name]) if damage else torch.ones(24)
    with pytest.raises(UserError, match=why):
        open_encoder(saved(published, tmp_path / "weights.pth"))


@pytest.mark.parametrize("method", ["DINOv3", "EVA-02"])
def test_rotary_positions_follow_another_size_of_image(method, tmp_path):
    """Of EVA-02 the rotations alone: its table of positions is resampled, as MAE's is."""
    published = METHODS[method]()
    if method == "EVA-02":
        published.network["pos_embed"] = published.network["pos_embed"][:, :1].repeat(1, 17, 1)
    source = saved(published, tmp_path / "weights.pth")
    config = open_encoder(source).config.model_copy(update={"image_size": (24, 32)})
    model = build_encoder(config, seed=0)
    said = fit(model, open_weights(source), "an encoder").changes
    assert any("position table resampled from 4 x 4 to 6 x 8 (bicubic)" in change for change in said) == (
        method == "EVA-02"
    )
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    if method == "EVA-02":
        published.network["pos_embed"] = published.network["pos_embed"][:, :1].repeat(1, 49, 1)
    with torch.no_grad():
        found, expected = model.double().eval()(images), published.features(images)
    assert (found - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())


def test_what_timm_cannot_tell_of_a_dinov3_is_asked_for(tmp_path):
    """Large models were trained on two kinds of images, with other means; and their heads are in the file."""
    wide = {"cls_token": torch.zeros(1, 1, 1024), "storage_tokens": torch.zeros(1, 4, 1024)}
    wide |= {"patch_embed.proj.weight": torch.zeros(1024, 3, 4, 4), "patch_embed.proj.bias": torch.zeros(1024)}
    torch.save(wide | {"rope_embed.periods": periods(64)}, tmp_path / "wide.pth")
    with pytest.raises(UserError, match="does not tell how its pixels were normalised; write .*pixels=imagenet"):
        describe_file(str(tmp_path / "wide.pth"))


@pytest.mark.parametrize("method", ["DINOv3", "DINOv3, gated, with biases", "EVA-02", "EVA-02, packed"])
def test_rotary_encoders_go_out_to_timm(method, tmp_path):
    source = saved(METHODS[method](), tmp_path / "weights.pth")
    report = export_encoder(source, tmp_path / "out")
    assert report.max_difference <= 1e-6 and open_encoder(str(tmp_path / "out")).fingerprint == report.fingerprint
    assert open_encoder(f"local-dir:{tmp_path}/out").fingerprint == report.fingerprint


def test_safetensors_hold_the_same(tmp_path):
    published = METHODS["timm ViT"]()
    save_file(published.tree, tmp_path / "weights.safetensors")
    torch.save(published.tree, tmp_path / "weights.pth")
    opened = [open_encoder(f"{tmp_path}/weights{end}{published.words}") for end in (".safetensors", ".pth")]
    assert opened[0].fingerprint == opened[1].fingerprint
    assert opened[0].mean == (0.5, 0.5, 0.5)


def test_what_a_file_does_not_tell_is_asked_for(tmp_path):
    published = METHODS["timm ViT"]()
    path = tmp_path / "weights.pth"
    torch.save(published.tree, path)
    for words, why in [
        ("#pixels=half", "number of its attention heads, and no model of width 24 is known; write .*half,num_heads=N"),
        ("#num_heads=2", "does not tell how its pixels were normalised; write .*,pixels=imagenet"),
        ("#num_heads=two", "num_heads=two cannot be read; write num_heads=12"),
        ("#num_head=2", "num_head is no word .*; did you mean num_heads"),
        ("#encoder", "has no encoder; leave #encoder out"),
    ]:
        with pytest.raises(UserError, match=why):
            open_encoder(f"{path}{words}")
    jepa = METHODS["I-JEPA"]()
    torch.save(jepa.tree, path)
    with pytest.raises(UserError, match="has no teacher; write one of #target_encoder, #encoder"):
        open_encoder(f"{path}#teacher")


def test_a_file_of_no_known_layout_is_refused_with_its_keys(tmp_path):
    for tree, why in [
        (
            {"a.weight": torch.ones(2), "b.bias": torch.ones(2)},
            "no layout that is known: it has 2 tensors, such as a.w",
        ),
        ({"epoch": 3}, "holds no tensors by name: its keys are epoch"),
        ([torch.ones(2)], "holds a list and no weights by name"),
        (
            {"_feature_blocks.0.Block1_ConvB1.layers.Conv.weight": torch.ones(2)},
            "RotNet.*timm has no such architecture",
        ),
        ({"blocks.0.gamma_1": torch.ones(8)}, "EVA, timm layout. does not tell its rotations; write timm:NAME"),
        (
            {"blocks.0.attn.relative_position_bias_table": torch.ones(8, 2)},
            "BEiT. does not tell its attention heads .*encoder.name beside encoder.weights",
        ),
    ]:
        torch.save(tree, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=why):
            open_encoder(str(tmp_path / "weights.pth"))


def test_a_stem_that_no_file_tells_is_told_from_damage(tmp_path):
    path = str(tmp_path / "weights.pth")
    stems = {"stem_type": "deep", "avg_down": True}
    config = EncoderConfig(name="resnet18", image_size=32, kwargs=stems | {"layers": [1, 1, 1, 1]})
    whole = build_encoder(config, seed=1).state_dict()
    torch.save(whole, path)
    with pytest.raises(UserError, match="a stem of several layers, .*write timm:NAME, .*encoder.name beside encoder.w"):
        open_encoder(path)
    assert fit(build_encoder(config, seed=2), open_weights(path), "an encoder").loaded == len(whole)
    torch.save({name: tensor for name, tensor in whole.items() if not name.startswith("conv1.")}, path)
    with pytest.raises(UserError, match="lacks its first layer, .*fetch it again"):
        open_encoder(path)


OF_CONFIGS = {  # timm's encoders whose files do not tell them: name, keyword arguments, format
    "EVA-02": ("eva02_tiny_patch14_224", {}, "EVA, timm layout"),
    "EVA-02, gated": ("eva02_base_patch14_224", {}, "EVA, timm layout"),
    "DINOv3": ("vit_small_patch16_dinov3", {}, "EVA, timm layout"),
    "RoPE-ViT, learned rotations": ("vit_small_patch16_rope_mixed_224", {}, "EVA, timm layout"),
    "BEiT": ("beit_base_patch16_224", {}, "BEiT"),
    "BEiT, one table for all": (
        "beit_base_patch16_224",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        "BEiT",
    ),
}


@pytest.mark.parametrize("kind", OF_CONFIGS)
def test_files_that_do_not_tell_their_encoder_fill_the_one_that_a_config_names(kind, tmp_path):
    name, kwargs, format = OF_CONFIGS[kind]
    kwargs = kwargs | {"embed_dim": 24, "depth": 2, "num_heads": 2}
    theirs = timm.create_model(name, img_size=SIDE, patch_size=4, num_classes=5, **kwargs).eval()
    drawn = torch.Generator().manual_seed(3)
    state = {key: t + torch.randn(t.shape, generator=drawn) * 0.2 for key, t in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    file = state | {"blocks.0.attn.relative_position_index": torch.zeros(17, 17)} if "BEiT" in kind else state
    torch.save({"module": file, "epoch": 3}, tmp_path / "weights.pth")
    source = str(tmp_path / "weights.pth")
    table = {"pos_embed": "learned"} if "pos_embed" in state else {}
    config = EncoderConfig(name=name, image_size=SIDE, patch_size=4, kwargs=kwargs, **table)
    ours = build_encoder(config, seed=1).eval()
    said = fit(ours, open_weights(source), "an encoder").sentence(open_weights(source))
    total = len(state) - 2
    assert f": {format}, {total} of {total} tensors loaded" in said and "head (2)" in said
    theirs.reset_classifier(0)
    with torch.no_grad():
        assert torch.equal(ours(BATCH.float()), theirs(BATCH.float()))
    with pytest.raises(UserError, match=r"does not tell .*encoder.name beside encoder.weights"):
        open_encoder(source)
    for damage, why in [
        (lambda t: t.pop("norm1.bias"), "blocks.1.norm1.bias is missing"),
        (lambda t: t.update({"norm3.bias": t["norm1.bias"]}), "blocks.1.norm3.bias has no place"),
        (lambda t: t.update({"norm1.bias": torch.ones(2)}), r"blocks.1.norm1.bias is \(2,\) instead of \(24,\)"),
    ]:
        block = {key.removeprefix("blocks.1."): t for key, t in state.items() if key.startswith("blocks.1.")}
        damage(block)
        others = {key: t for key, t in state.items() if not key.startswith("blocks.1.")}
        torch.save(others | {f"blocks.1.{key}": t for key, t in block.items()}, source)
        with pytest.raises(UserError, match=f"does not hold the weights of an encoder: {why}"):
            fit(build_encoder(config, seed=1), open_weights(source), "an encoder")


def test_nothing_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04")
    for name in ("trap", "bare"):
        with pytest.raises(UserError, match="no plain file of weights .*safetensors"):
            open_encoder(f"{tmp_path}/{name}.pth")
    with pytest.raises(UserError, match="cannot be read"):
        open_encoder(f"{tmp_path}/torn.pth")
    assert not (tmp_path / "sprung").exists()


def test_half_precision_is_said(tmp_path):
    published = METHODS["timm ViT"]()
    torch.save({name: tensor.bfloat16() for name, tensor in published.tree.items()}, tmp_path / "weights.pth")
    opened = open_encoder(f"{tmp_path}/weights.pth{published.words}")
    assert "bfloat16 as float32" in opened.loaded
    assert opened.model.norm.weight.dtype == torch.float32


def test_counts_of_batches_that_old_files_lack_are_said(tmp_path):
    published = METHODS["torchvision ResNet"]()
    state = {name: t for name, t in published.tree.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    opened = open_encoder(f"{tmp_path}/old.pth")
    assert "counts of batches set to 0" in opened.loaded
    with torch.no_grad():
        assert (opened.model.double()(CONVNET_BATCH) - published.features(CONVNET_BATCH)).abs().max() <= 1e-6


# ---- transformers


def transformers_model(kind: str):
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16)
    small |= {"patch_size": 4, "attn_implementation": "eager"}
    if kind == "ViT":
        model = transformers.ViTModel(transformers.ViTConfig(**small))
    elif kind == "ViT with a classifier":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**small))
    elif kind == "I-JEPA":
        model = transformers.IJepaModel(transformers.IJepaConfig(**small, layer_norm_eps=1e-6))
    elif kind.startswith("DINOv2"):
        small.pop("intermediate_size")
        name = "Dinov2WithRegisters" if "registers" in kind else "Dinov2"
        config = getattr(transformers, f"{name}Config")(**small, mlp_ratio=2, use_swiglu_ffn="SwiGLU" in kind)
        model = getattr(transformers, f"{name}Model")(config)
    elif kind.startswith("DINOv3"):
        config = transformers.DINOv3ViTConfig(
            **small,
            num_register_tokens=4,
            use_gated_mlp="gated" in kind,
            hidden_act="silu" if "gated" in kind else "gelu",
        )
        model = transformers.DINOv3ViTModel(config)
    elif kind.startswith("ResNet"):
        layer = "bottleneck" if "bottlenecks" in kind else "basic"
        shape = dict(hidden_sizes=[32, 64, 96, 128], depths=[1, 2, 1, 1], layer_type=layer, num_labels=5)
        classes = "ForImageClassification" if "classifier" in kind else "Model"
        model = getattr(transformers, f"ResNet{classes}")(transformers.ResNetConfig(**shape))
    else:
        decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
        config = transformers.ViTMAEConfig(**small, **decoder, decoder_intermediate_size=64, mask_ratio=0.0)
        model = transformers.ViTMAEForPreTraining(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name and kind == "ViTMAE":
                continue
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.05 if "ResNet" in kind else 0.2))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def transformers_features(model, kind: str):
    if "ResNet" in kind:
        return getattr(model, "resnet", model)(BATCH.float()).pooler_output.flatten(1)
    base = getattr(model, "vit", model)
    if kind == "ViTMAE":  # it hides patches and shuffles; in this order attention sees the same set
        tokens = base(BATCH.float(), noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    else:
        tokens = base(BATCH.float()).last_hidden_state
    return tokens.mean(1) if kind == "I-JEPA" else tokens[:, 0]


KINDS = ["ViT", "ViT with a classifier", "ViTMAE", "I-JEPA", "DINOv2", "DINOv2 SwiGLU", "DINOv2 with registers"]
KINDS += ["DINOv3", "DINOv3 gated", "ResNet", "ResNet of bottlenecks with a classifier"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_has_the_features_of_transformers(kind, tmp_path):
    model = transformers_model(kind)
    model.save_pretrained(tmp_path / "folder")
    pixels = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    (tmp_path / "folder" / "preprocessor_config.json").write_text(pixels)
    opened = open_encoder(str(tmp_path / "folder"))
    with torch.no_grad():
        expected = transformers_features(model, kind)
        found = opened.model(BATCH.float())
    assert (found - expected).abs().max() <= 2e-6 * max(1, expected.abs().max())
    assert f"{len(opened.model.state_dict())} of {len(opened.model.state_dict())} tensors loaded" in opened.loaded
    assert opened.mean == (0.1, 0.2, 0.3) and opened.std == (0.4, 0.5, 0.6)
    assert "ResNet" in kind or opened.model.norm.eps == model.config.layer_norm_eps


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("ViT", "hidden_act", "quick_gelu"),
        ("DINOv3", "hidden_act", "relu"),
        ("ResNet", "hidden_act", "gelu"),
        ("ResNet", "downsample_in_first_stage", True),
        ("ResNet", "downsample_in_bottleneck", True),
    ],
)
def test_what_only_a_config_of_transformers_tells_is_not_read_past(kind, setting, value, tmp_path):
    transformers_model(kind).save_pretrained(tmp_path / "folder")
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {setting: value}))
    with pytest.raises(UserError, match=f"{setting}={value}.*timm's"):
        open_encoder(f"{tmp_path}/folder#pixels=half")


def test_a_file_out_of_a_folder_of_transformers_is_opened_as_the_folder_is(tmp_path):
    """Heads, eps and pixels are in no tensor."""
    model = transformers_model("ViT")
    model.save_pretrained(tmp_path / "folder")
    pixels = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    (tmp_path / "folder" / "preprocessor_config.json").write_text(pixels)
    whole, file = (open_encoder(str(tmp_path / "folder" / name)) for name in ("", "model.safetensors"))
    assert (file.mean, file.std, file.computation) == (whole.mean, whole.std, whole.computation)
    assert file.fingerprint == whole.fingerprint and file.model.blocks[0].attn.num_heads == 2
    shutil.copy(tmp_path / "folder" / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="does not tell how its pixels were normalised"):
        open_encoder(str(tmp_path / "alone.safetensors"))
    with pytest.raises(UserError, match="does not tell the number of its attention heads"):
        open_encoder(f"{tmp_path / 'alone.safetensors'}#pixels=half")


@pytest.mark.parametrize(
    ("says", "mean", "std"),
    [
        ({"image_mean": 0.5, "image_std": 0.25}, (0.5,) * 3, (0.25,) * 3),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}, (0.0,) * 3, (1.0,) * 3),
        (
            {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "rescale_factor": 0.00392156862745098},
            (0.1,) * 3,
            (0.2,) * 3,
        ),
    ],
)
def test_pixels_are_those_that_a_folder_of_transformers_says(says, mean, std, tmp_path):
    transformers_model("ViT").save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "preprocessor_config.json").write_text(json.dumps(says))
    opened = open_encoder(str(tmp_path / "folder"))
    assert (opened.mean, opened.std) == (mean, std)
    (tmp_path / "folder" / "preprocessor_config.json").write_text(json.dumps(says | {"rescale_factor": 1 / 127.5}))
    with pytest.raises(UserError, match="has pixels that are not from 0 to 1"):
        open_encoder(str(tmp_path / "folder"))
    for odd in ([], "x", {"rescale_factor": "x"}, {"image_mean": "a"}, {"image_std": [0, 0, 0]}, {"image_mean": [[1]]}):
        odd = says | {"do_normalize": True} | odd if isinstance(odd, dict) else odd
        (tmp_path / "folder" / "preprocessor_config.json").write_text(json.dumps(odd))
        with pytest.raises(UserError, match="does not say mean and standard deviation of pixels in numbers"):
            open_encoder(str(tmp_path / "folder"))


def test_an_index_of_shards_that_says_nothing_is_refused(tmp_path):
    transformers_model("ViT").save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink()
    (tmp_path / "folder" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="does not say what lies where; fetch it again"):
        open_encoder(f"{tmp_path}/folder#pixels=half")


def test_a_folder_of_transformers_goes_out_to_timm_once_its_eps_is_timms(tmp_path):
    transformers_model("ViT").save_pretrained(tmp_path / "folder")
    with pytest.raises(
        UserError, match="LayerNorms of eps 1e-12, which timm's config.json cannot say; .*norm_eps=1e-6"
    ):
        export_encoder(f"{tmp_path}/folder#pixels=half", tmp_path / "out")
    report = export_encoder(f"{tmp_path}/folder#pixels=half,norm_eps=1e-6", tmp_path / "out")
    assert report.max_difference <= 1e-6 and open_encoder(str(tmp_path / "out")).fingerprint == report.fingerprint


def test_damaged_folders_of_transformers_are_refused(tmp_path):
    transformers_model("ViT").save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    path = tmp_path / "folder" / "model.safetensors"
    whole = load_file(path)
    query = next(name for name in whole if name.endswith("query.bias"))
    for change, why in [
        (lambda t: t.pop("layernorm.bias"), "norm.bias is missing"),
        (lambda t: t.pop(query), r"lacks blocks.\d.attn.query.bias, beside"),
        (lambda t: t.update({"layernorm.scale": torch.ones(2)}), "norm.scale has no place"),
        (lambda t: t.update({"layernorm.bias": torch.ones(2)}), r"norm.bias is \(2,\) instead of \(24,\)"),
    ]:
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, path)
        with pytest.raises(UserError, match=why):
            open_encoder(str(tmp_path / "folder"))
