"""Exports are opened by what others open them with, and compute what plain timm computes."""

import importlib.util
import json
import re
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.exporting import transformers_folder
from prelude.checkpoints.sources import open_encoder
from prelude.checkpoints.store import Store
from prelude.data.errors import RunStopped, UserError
from prelude.launch import export as door
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32, "patch_size": 8}
ARCHITECTURES = {
    "ViT": ("vit_tiny_patch16_224", SMALL, "Dinov2Model"),
    "registers": ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 2}, "Dinov2WithRegistersModel"),
    "EVA": ("eva02_tiny_patch14_224", SMALL, "TimmWrapperModel"),
    "ResNet": ("resnet18", {"channels": [8, 16, 32, 64]}, "ResNetModel"),
    "ConvNeXt": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}, "TimmWrapperModel"),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
        "TimmWrapperModel",
    ),
}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of plain timm's of one of ARCHITECTURES, images for it, and timm's features of them."""
    monkeypatch.chdir(tmp_path)

    def source(kind):
        name, arguments, _ = ARCHITECTURES[kind]
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, **arguments).eval()
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
        size = arguments.get("img_size", 64)
        folder = tmp_path / "source"
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        fed = {"num_classes": 0, "input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3}
        settings = {"architecture": name, "num_classes": 0, "model_args": arguments, "pretrained_cfg": fed}
        (folder / "config.json").write_text(json.dumps(settings))
        images = torch.randn(3, 3, size, size)
        with torch.no_grad():
            return f"local-dir:{folder}", images, model(images)

    return source


def as_its_card_says(folder, images):
    """Features by the code in the export's README.md."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "prelude" not in code
    scope = {"images": images}
    with torch.no_grad():
        exec(code, scope)
    return torch.as_tensor(scope["features"]).float().flatten(1)


def contents_of(folder):
    """Of all files, unpacked."""
    for path in folder.iterdir():
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from map(archive.read, archive.namelist())
        else:
            yield path.read_bytes()


CASES = [
    *((kind, "timm", "float32", 1e-5) for kind in ARCHITECTURES),
    *((kind, "transformers", "float32", 1e-4) for kind in ARCHITECTURES),
    *((kind, "torch", "float32", 1e-4) for kind in ARCHITECTURES),
    ("ViT", "onnx", "float32", 1e-4),
    ("ConvNeXt", "onnx", "float16", 3e-2),
    ("ViT", "torch", "bfloat16", 1e-1),
    ("ResNet", "timm", "float16", 1e-2),
    ("ViT", "transformers", "bfloat16", 1e-1),
]


@pytest.mark.parametrize(("kind", "format", "dtype", "tolerance"), CASES)
def test_the_code_in_the_card_computes_the_features_of_plain_timm(source, tmp_path, kind, format, dtype, tolerance):
    encoder, images, expected = source(kind)
    report = export_encoder(encoder, tmp_path / "out", format=format, dtype=dtype)
    if format == "transformers":
        assert report.note == ARCHITECTURES[kind][2]
    program = format in ("onnx", "torch")
    found = as_its_card_says(tmp_path / "out", images.to(getattr(torch, dtype)) if program else images)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max())
    if program:
        assert not any(b"site-packages" in content for content in contents_of(tmp_path / "out"))
        with pytest.raises(UserError, match=f"an export to {format}, whose weights are not read back"):
            open_encoder(str(tmp_path / "out"))
    elif (kind, format) == ("ResNet", "transformers"):
        with pytest.raises(UserError, match="in no layout that is known"):
            open_encoder(str(tmp_path / "out"))
    else:
        with torch.no_grad():
            again = open_encoder(str(tmp_path / "out")).model.float()(images)
        assert (again - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def test_a_convnet_takes_other_sizes(source, tmp_path):
    encoder, images, _ = source("ResNet")
    assert export_encoder(encoder, tmp_path / "out", format="torch").note.endswith("any size from there on")
    larger = torch.randn(5, 3, 96, 160)
    expected = timm.create_model(encoder, pretrained=True).eval()(larger)
    torch.testing.assert_close(as_its_card_says(tmp_path / "out", larger), expected.detach(), atol=1e-4, rtol=1e-4)


def test_what_computes_something_else_is_not_published(source, tmp_path, monkeypatch):
    encoder, *_ = source("ViT")
    whole = transformers_folder.convert

    def damaged(model, size):
        config, tensors = whole(model, size)
        return config, {name: t * 1.5 if name.endswith("query.weight") else t for name, t in tensors.items()}

    monkeypatch.setattr(transformers_folder, "convert", damaged)
    with pytest.raises(RunStopped, match="differ from ours by .*, so nothing was exported"):
        export_encoder(encoder, tmp_path / "out", format="transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_onnx_needs_is_said(source, tmp_path, monkeypatch):
    encoder, *_ = source("ViT")
    with pytest.raises(UserError, match="no bfloat16 .*--dtype float16"):
        export_encoder(encoder, tmp_path / "out", format="onnx", dtype="bfloat16")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "onnxscript" else find(n, *a))
    with pytest.raises(UserError, match=r"needs onnxscript; write pip install 'prelude-ssl\[onnx\]'"):
        export_encoder(encoder, tmp_path / "out", format="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_hub_wants_a_licence(source, tmp_path, capsys):
    encoder, *_ = source("ResNet")
    with pytest.raises(UserError, match="--license ID"):
        door.main([encoder, "--to", str(tmp_path / "out"), "--check-hub"])
    assert not (tmp_path / "out").exists()
    assert door.main([encoder, "--to", str(tmp_path / "out"), "--check-hub", "--license", "mit"]) == 0
    assert "as the Hugging Face hub takes it" in capsys.readouterr().out


def test_a_source_that_is_no_folder_needs_a_place(tmp_path):
    for source in ("timm:resnet18", str(tmp_path / "weights.pth")):
        with pytest.raises(UserError, match="write --to DIR"):
            door.main([source])


def make_run(folder, save):
    config = EncoderConfig(name="resnet18", image_size=32, kwargs={"channels": [8, 16, 32, 64]})
    teacher, student = build_encoder(config, seed=1), build_encoder(config, seed=2)
    tensors = {f"encoder.{name}": t for name, t in student.state_dict().items()}
    tensors |= {f"teacher.encoder.{name}": t for name, t in teacher.state_dict().items()}
    meta = {
        "step": 3,
        "encoder": config.model_dump(mode="json"),
        "exported": "teacher.encoder.",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "loader": {"fingerprint": "0123abcd"},
        "config": {"objective": {"name": "ijepa"}},
    }
    save(Store(folder / "checkpoints"), 3, meta=meta, encoder=tensors)
    return teacher.eval(), student.eval()


def test_teacher_and_student_go_out_by_name(tmp_path, save):
    images, run = torch.randn(2, 3, 32, 32), tmp_path / "run"
    teacher, student = make_run(run, save)
    for words, expected in {"": teacher, "#teacher": teacher, "#student": student}.items():
        export_encoder(f"{run}{words}", tmp_path / "out")
        found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        torch.testing.assert_close(found(images), expected(images), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="no network sudent"):
        export_encoder(f"{run}#sudent", tmp_path / "out")


def test_the_card_has_the_metrics_of_these_weights_only(tmp_path, save):
    from huggingface_hub import ModelCard

    run = tmp_path / "run"
    make_run(run, save)
    (run / "evaluations").mkdir()
    for name, fingerprint, value in [("a", open_encoder(str(run)).fingerprint, 61.25), ("b", "another", 99.0)]:
        result = {
            "evaluator": "linear_probe",
            "encoder": {"fingerprint": fingerprint},
            "data": {"test": {"num_samples": 10, "fingerprint": "77aa"}},
            "numbers": {"top1": {"value": value}, "loss": {"value": 1.0}},
        }
        (run / "evaluations" / f"{name}.json").write_text(json.dumps(result))
    (run / "evaluations" / "half.json").write_text('{"encoder"')
    for of in (run, run / "checkpoints" / "step-00000003"):
        export_encoder(str(of), tmp_path / "out", license="mit")
        data = ModelCard.load(tmp_path / "out" / "README.md").data
        assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 61.25)]
    assert data.license == "mit" and data.library_name == "timm" and "ijepa" in data.tags
    assert "`0123abcd`" in (tmp_path / "out" / "README.md").read_text()
