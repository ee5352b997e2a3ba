"""Models that timm opens: strictly, whatever pooling and classifier they have, and at another size by timm's way."""

import json

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prelude.checkpoints.convert.fit import fit
from prelude.checkpoints.sources import describe, open_encoder, open_weights
from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 16, "patch_size": 4}
MODELS = {
    "classifier": ("vit_tiny_patch16_224", SMALL | {"num_classes": 7}),
    "mean and a norm after it": ("vit_tiny_patch16_224", SMALL | {"num_classes": 7, "global_pool": "avg"}),
    "registers": ("vit_base_patch16_reg4_gap_256", SMALL | {"num_classes": 0}),
    "rotary": ("vit_small_patch16_dinov3", SMALL | {"num_classes": 0}),
    "biases of pairs": ("beit_base_patch16_224", SMALL | {"num_classes": 7}),
    "pooled by attention": ("vit_base_patch16_siglip_224", SMALL | {"num_classes": 0}),
    "convnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "num_classes": 7}),
    "growing": ("resnet18", {"layers": [1, 1, 2, 2], "channels": [8, 16, 24, 32], "num_classes": 7}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "num_classes": 7}),
}


def saved(name, arguments, folder):
    torch.manual_seed(3)
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    timm.models.save_for_hf(
        model, folder, model_args={k: v for k, v in arguments.items() if k != "num_classes"}, safe_serialization=True
    )
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_of_timms_has_timms_features(kind, tmp_path):
    model = saved(*MODELS[kind], tmp_path / "folder")
    model.reset_classifier(0)
    images = torch.randn(2, 3, 16, 16) if "patch_size" in MODELS[kind][1] else torch.randn(2, 3, 64, 64)
    for source in (f"local-dir:{tmp_path}/folder", str(tmp_path / "folder")):
        opened = open_encoder(source)
        with torch.no_grad():
            assert (opened.model(images) - model(images)).abs().max() <= 1e-6
        total = len(model.state_dict())
        assert f"{total} of {total} tensors loaded" in opened.loaded


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kind", ["classifier", "convnet"])
def test_a_folder_of_other_channels_keeps_its_first_layer(kind, channels, tmp_path):
    name, arguments = MODELS[kind]
    model = saved(name, arguments | {"in_chans": channels}, tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    config = json.loads(path.read_text())
    for length in (3, channels):
        config["pretrained_cfg"] |= {"mean": [0.5] * length, "std": [0.2] * length}
        path.write_text(json.dumps(config))
        if length == 3:
            with pytest.raises(UserError, match=f"reads {channels} channel.*, and its config.json has mean and std of"):
                describe(f"local-dir:{tmp_path}/folder")
    opened = open_encoder(f"local-dir:{tmp_path}/folder")
    images = torch.randn(2, channels, *opened.config.size)
    model.reset_classifier(0)
    with torch.no_grad():
        assert opened.config.in_chans == channels and (opened.model(images) - model(images)).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["classifier", "convnet"])
def test_what_timm_would_leave_at_random_is_refused(kind, tmp_path):
    saved(*MODELS[kind], tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    whole = load_file(path)
    lost = next(name for name in whole if name.endswith("bias") and "head" not in name and "fc" not in name)
    for change in (
        lambda t: t.pop(lost),
        lambda t: t.update({f"{lost}.more": torch.ones(2)}),
        lambda t: t.update({lost: torch.ones(2)}),
    ):
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, path)
        with pytest.raises(UserError, match=f"does not hold the whole of its model .*{lost}"):
            open_encoder(f"local-dir:{tmp_path}/folder")


def test_a_file_that_is_cut_is_said_in_one_sentence(tmp_path):
    folder = tmp_path / "folder"
    saved(*MODELS["convnet"], folder)
    whole = (folder / "model.safetensors").read_bytes()
    refused = lambda: pytest.raises(UserError, match=r"local-dir:.*cannot be read \(.+\); save it again")  # noqa: E731
    for length in (len(whole) - 8, 100, 0):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with refused():
            open_encoder(f"local-dir:{folder}")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with refused():
        open_encoder(f"local-dir:{folder}")
    torch.save([1, 2], folder / "pytorch_model.bin")
    with refused():
        open_encoder(str(folder))


def test_a_cut_file_in_the_hubs_cache_is_to_be_fetched_again(monkeypatch):
    create = timm.create_model

    def cut(*given, pretrained, **more):
        if pretrained:
            raise SafetensorError("incomplete metadata")
        return create(*given, **more)

    monkeypatch.setattr(timm, "create_model", cut)
    with pytest.raises(UserError, match="timm:resnet18 has a file .*remove it from the Hugging Face cache, and fetch"):
        open_weights("timm:resnet18")


OTHERS = {  # trained, to be filled, what differs, what to write
    "padding": ("tf_efficientnet_b0", "efficientnet_b0", {}, "a Conv2dSame as conv_stem, .* has a Conv2d;"),
    "stride": ("resnetblur18", "resnet18", {}, "a Sequential as maxpool, .* has a MaxPool2d;"),
    "activation": ("vit_base_patch32_clip_quickgelu_224", "vit_base_patch32_clip_224", SMALL, "a QuickGELU as .*act, "),
    "eps": ("convnext_atto", "convnext_atto", {"norm_eps": 1e-3}, "eps=1e-06 in stem.1, .* has eps=0.001; "),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_an_encoder_that_computes_otherwise_are_refused(kind, tmp_path):
    trained, filled, given, why = OTHERS[kind]
    arguments = given if given is SMALL else {}
    saved(trained, arguments | {"num_classes": 0}, tmp_path / "folder")
    kwargs = {key: value for key, value in arguments.items() if key not in ("img_size", "patch_size")}
    vit = {"image_size": 16, "patch_size": 4, "kwargs": kwargs, "pos_embed": "learned"}
    settings = vit if arguments else {"image_size": 64, **given}
    weights = open_weights(f"local-dir:{tmp_path}/folder")
    for name, refused in ((trained, trained == filled), (filled, True)):
        encoder = build_encoder(EncoderConfig(name=name, **settings), seed=0)
        before = encoder.state_dict()
        before = {key: tensor.clone() for key, tensor in before.items()}
        if refused:
            with pytest.raises(UserError, match=f"was trained with {why}.*write encoder.name={trained}"):
                fit(encoder, weights, f"encoder.name={name}")
            assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
        else:
            fit(encoder, weights, name)


FREE = {  # what a configuration chooses beside weights
    "drop paths, another size and pooling": ("classifier", {"drop_path_rate": 0.1, "global_pool": "avg"}),
    "drop rates of a convnet": ("convnet", {"drop_path_rate": 0.1, "drop_rate": 0.2, "global_pool": "max"}),
    "a finer map": ("growing", {"output_stride": 8}),
    "pooling of a convnext": ("convnext", {"drop_path_rate": 0.1, "drop_rate": 0.2}),
    "rotary, another size": ("rotary", {"drop_path_rate": 0.1, "proj_drop_rate": 0.1}),
}


@pytest.mark.parametrize("kind", FREE)
def test_what_a_configuration_chooses_beside_weights_is_not_held_against_them(kind, tmp_path):
    name, arguments = MODELS[FREE[kind][0]]
    saved(name, arguments, tmp_path / "folder")
    kwargs = {key: arguments[key] for key in arguments if key not in ("img_size", "patch_size", "num_classes")}
    sizes = {"image_size": 36, "patch_size": 6} if "patch_size" in arguments else {"image_size": 96}
    kwargs |= FREE[kind][1] | ({"fc_norm": False, "final_norm": True} if kind.startswith("drop paths") else {})
    table = {"pos_embed": "learned"} if name.startswith("vit_tiny") else {}
    encoder = build_encoder(EncoderConfig(name=name, kwargs=kwargs, **sizes, **table), seed=0)
    fitted = fit(encoder, open_weights(f"local-dir:{tmp_path}/folder"), "it")
    assert fitted.total - fitted.loaded <= 2  # the resampled ones are no longer the source's


STEMS = {
    "efficientnet_b0": ("conv_stem", {}),
    "resnet18d": ("conv1.0", {"layers": [1, 1, 1, 1]}),
    "regnety_002": ("stem.conv", {}),
    "convnext_atto": ("stem.0", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
    "resnet18": ("conv1.0", {"layers": [1, 1, 1, 1], "stem_type": "deep"}),  # not as in timm's table of first layers
}


@pytest.mark.parametrize("name", STEMS)
def test_another_number_of_channels_is_taken_to_the_first_layer_whatever_its_name(name, tmp_path):
    first, arguments = STEMS[name]
    model = saved(name, arguments | {"num_classes": 0}, tmp_path / "folder")
    weights = open_weights(f"local-dir:{tmp_path}/folder")
    encoder = build_encoder(EncoderConfig(name=name, image_size=64, in_chans=1, kwargs=arguments), seed=0)
    fitted = fit(encoder, weights, "it")
    assert fitted.changes == ("first layer brought from 3 to 1 channel (summed)",)
    grey = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        expected = model.get_submodule(first)(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(encoder.get_submodule(first)(grey), expected, rtol=1e-4, atol=1e-4)


def test_another_size_is_resampled_by_timms_way(tmp_path):
    model = saved(*MODELS["classifier"], tmp_path / "folder")
    kwargs = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    config = EncoderConfig(name="vit_tiny_patch16_224", image_size=24, patch_size=4, pos_embed="learned", kwargs=kwargs)
    encoder = build_encoder(config, seed=0)
    fitted = fit(encoder, open_weights(f"local-dir:{tmp_path}/folder"), "it")
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed, [6, 6], [4, 4])
    torch.testing.assert_close(encoder.pos_embed.detach(), expected.detach(), rtol=0, atol=1e-6)
    assert fitted.changes == ("position table resampled from 4 x 4 to 6 x 6 (bicubic, antialiased)",)


def test_folders_that_are_none_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for content, why in [
        ({"architecture": "resnet19"}, "is a resnet19, which timm .* has not"),
        ({"architecture": "resnet18"}, "does not hold the whole of its model .*No suitable checkpoints"),
        ({"model": 1}, "holds no config.json of timm's"),
        ({"architecture": 3}, "holds no config.json of timm's"),
        ({"architecture": "resnet18", "pretrained_cfg": 3}, "holds no config.json of timm's"),
        ({"architecture": "resnet18", "pretrained_cfg": {"input_size": "a"}}, "has input_size='a' in its config.json"),
        (
            {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3]}},
            r"write \[channels, height, width\] there",
        ),
        ({"architecture": "resnet18", "pretrained_cfg": {"mean": 3}}, "has mean=3 .*; write a list of numbers there"),
        (
            {"architecture": "resnet18", "model_args": {"in_chans": -1}},
            "has in_chans=-1 .*; write a whole number above 0",
        ),
        ({"architecture": "resnet18", "model_args": {"img_size": "a"}}, "has img_size='a' .*; write a whole number"),
    ]:
        (tmp_path / "folder" / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=why):
            open_encoder(f"local-dir:{tmp_path}/folder")


def test_a_model_of_the_hub_is_described_by_its_config(monkeypatch):
    arguments = ({"input_size": (3, 32, 32), "mean": [0.1] * 3, "std": [0.2] * 3}, "resnet18", {"layers": [1, 1, 1, 1]})
    monkeypatch.setattr(timm.models, "load_model_config_from_hf", lambda name: arguments)
    described = describe("hf-hub:someone/small")
    assert described.config == EncoderConfig(name="resnet18", image_size=32, kwargs={"layers": [1, 1, 1, 1]})
    assert (described.mean, described.name) == ((0.1, 0.1, 0.1), "hf-hub:someone/small")


def test_no_hub_is_said_in_one_sentence(monkeypatch):
    def no_network(name):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(timm.models, "load_model_config_from_hf", no_network)
    with pytest.raises(UserError, match="weights of hf-hub:someone/small could not be fetched .cannot reach the hub"):
        open_encoder("hf-hub:someone/small")


def test_a_pooling_attention_is_left_behind_by_name(tmp_path):
    """As token objectives have a SigLIP, whose pooling nothing would train."""
    model = saved(*MODELS["pooled by attention"], tmp_path / "folder")
    arguments = {"depth": 2, "embed_dim": 24, "num_heads": 2, "global_pool": "avg", "fc_norm": False}
    name, learned = "vit_base_patch16_siglip_224", {"pos_embed": "learned"}
    config = EncoderConfig(name=name, image_size=16, patch_size=4, kwargs=arguments, **learned)
    encoder = build_encoder(config, seed=0)
    fitted = fit(encoder, open_weights(f"local-dir:{tmp_path}/folder"), "it")
    assert fitted.loaded == fitted.total and {name.split(".")[0] for name in fitted.unused} == {"attn_pool"}
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder.eval().forward_features(images), model.forward_features(images))


def test_the_norm_that_timm_moved_behind_the_mean_is_put_back_for_tokens(tmp_path, monkeypatch):
    name, arguments = "eva02_base_patch14_224", SMALL | {"num_classes": 0}
    model, create = saved(name, arguments, tmp_path / "folder"), timm.create_model
    normed = {"depth": 2, "embed_dim": 24, "num_heads": 2, "use_fc_norm": False, "use_post_transformer_norm": True}
    config = EncoderConfig(name=name, image_size=16, patch_size=4, pos_embed="learned", kwargs=normed)
    with pytest.raises(UserError, match="norm.weight is missing"):  # it may have been trained where it is
        fit(build_encoder(config, seed=0), open_weights(f"local-dir:{tmp_path}/folder"), "it")

    fetched = lambda *given, **more: create(*given, **more | {"pretrained": False} | arguments)  # noqa: E731
    choose = lambda *given, **more: (fetched if more["pretrained"] else create)(*given, **more)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", choose)
    weights = open_weights(f"timm:{name}.mim_in22k")
    weights.tensors.update({key: tensor.clone() for key, tensor in model.state_dict().items()})
    encoder = build_encoder(config, seed=0)
    fitted = fit(encoder, weights, "it")
    assert fitted.loaded == fitted.total
    assert "fc_norm taken as the norm of every token, as it was pretrained" in fitted.changes
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.fc_norm(model.forward_features(images))
        assert torch.equal(encoder.eval().forward_features(images), expected)
