"""Exports are opened by what others open them with, and compute what plain timm computes."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from forked import is_killed
from PIL import Image
from safetensors.torch import load_file, save_file

from prelude.checkpoints import export
from prelude.checkpoints.convert.fit import fit
from prelude.checkpoints.export import export_encoder, export_formats
from prelude.checkpoints.exporting import timm_folder, transformers_folder
from prelude.checkpoints.sources import is_export, open_encoder, open_weights
from prelude.checkpoints.store import Store
from prelude.data.errors import RunStopped, UserError
from prelude.launch import export as door
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder

SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}
ARCHITECTURES = {
    "ViT": ("vit_tiny_patch16_224", SMALL, "Dinov2Model"),
    "registers": ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 2}, "Dinov2WithRegistersModel"),
    "EVA": ("eva02_tiny_patch14_224", SMALL, "TimmWrapperModel"),
    "ResNet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}, "ResNetModel"),
    "ConvNeXt": ("convnext_atto", {"depths": [1, 1, 0, 0], "dims": [8, 16, 24, 32]}, "TimmWrapperModel"),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]},
        "TimmWrapperModel",
    ),
    "CaiT": ("cait_xxs24_224", SMALL, "TimmWrapperModel"),
}
ALL, FOLDERS = ("timm", "transformers", "torch", "onnx"), ("timm", "transformers")
EXPORTS = {  # name -> (kind, formats, dtype)
    "vit": ("ViT", ALL, "float32"),
    "eva": ("EVA", ALL, "float32"),
    "resnet": ("ResNet", ALL, "float32"),
    "convnext": ("ConvNeXt", ALL, "float32"),
    "swin": ("Swin", ALL, "float32"),
    "registers": ("registers", FOLDERS, "float32"),
    "cait": ("CaiT", FOLDERS, "float32"),
    "vit-bfloat16": ("ViT", ("torch", "transformers"), "bfloat16"),
    "resnet-float16": ("ResNet", FOLDERS, "float16"),
    "swin-float16": ("Swin", ("transformers",), "float16"),
    "vit-float16": ("ViT", ("onnx",), "float16"),
}
CASES = [(name, format) for name, (_, formats, _) in EXPORTS.items() for format in formats]
TOLERANCES = {"float32": 1e-5, "float16": 3e-2, "bfloat16": 1e-1}  # of the largest feature
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.35]

# What each README.md says, run where nothing of ours can be imported.
OPENER = """
import json, re, sys
from pathlib import Path
sys.modules["prelude"] = None
import torch
found = {}
for readme in [*Path().glob("*/README.md"), *Path().glob("*/*/README.md")]:
    name, section = readme.parts[0], json.loads((readme.parent / "config.json").read_text())["prelude"]
    (code,) = re.findall(r"```python\\n(.*?)```", readme.read_text(), re.DOTALL)
    images = torch.load(f"{name}.images", weights_only=True)
    if section["format"] in ("torch", "onnx"):
        images = images.to(getattr(torch, section["dtype"]))
    scope = {"images": images}
    with torch.no_grad():
        exec(code, scope)
    found[str(readme.parent)] = torch.as_tensor(scope["features"]).float()
torch.save(found, "found.pt")
"""


def make_source(folder, kind, change=lambda name, tensor: None):
    """(source, images, timm's features of them): a folder of plain timm's of one of ARCHITECTURES."""
    name, arguments, _ = ARCHITECTURES[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
        change(key, tensor)
    size = arguments.get("img_size", 64)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    fed = {"num_classes": 0, "input_size": [3, size, size], "mean": MEAN, "std": STD}
    settings = {"architecture": name, "num_classes": 0, "model_args": arguments, "pretrained_cfg": fed}
    (folder / "config.json").write_text(json.dumps(settings))
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        return f"local-dir:{folder}", images, model(images)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda kind, *change: make_source(tmp_path / "source", kind, *change)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """EXPORTS as they were written, and as one fresh process opens them all."""
    folder = tmp_path_factory.mktemp("exported")
    sources = {kind: make_source(folder / f"{kind}-source", kind) for kind in ARCHITECTURES}
    places = folder / "places"
    places.mkdir()
    reports = {}
    for name, (kind, formats, dtype) in EXPORTS.items():
        source, images, _ = sources[kind]
        torch.save(images, places / f"{name}.images")
        written = export_formats(source, places / name, formats, dtype=dtype)
        reports |= {(name, format): report for format, report in zip(formats, written, strict=True)}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", OPENER], cwd=places, check=True, env=environment)
    return sources, reports, torch.load(places / "found.pt", weights_only=True)


def contents_of(folder):
    """Of all files, unpacked."""
    for path in folder.iterdir():
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from map(archive.read, archive.namelist())
        else:
            yield path.read_bytes()


@pytest.mark.parametrize(("name", "format"), CASES)
def test_the_code_in_the_card_computes_the_features_of_plain_timm_without_us(exported, name, format):
    sources, reports, found = exported
    kind, formats, dtype = EXPORTS[name]
    report, expected = reports[name, format], sources[kind][2]
    assert report.path.parts[-1] == (format if len(formats) > 1 else name)
    if format == "transformers":
        assert report.note == ARCHITECTURES[kind][2]
    features = found[f"{name}/{format}" if len(formats) > 1 else name]
    assert features.shape == expected.shape
    assert (features - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()
    assert not any(b"site-packages" in content for content in contents_of(report.path))


@pytest.mark.parametrize(("name", "format"), CASES)
def test_what_went_out_comes_in_again_or_says_that_it_does_not(exported, name, format):
    sources, reports, _ = exported
    kind, _, dtype = EXPORTS[name]
    place, (source, images, expected) = str(reports[name, format].path), sources[kind]
    if format in ("torch", "onnx"):
        with pytest.raises(UserError, match=f"an export to {format}, whose weights are not read back"):
            open_weights(place)
        return
    again, model = open_encoder(place), build_encoder(open_encoder(source).config, seed=3).eval()
    total = len(model.state_dict())
    assert again.config == open_encoder(source).config
    assert f"{total} of {total} tensors loaded" in again.loaded
    fitted = fit(model, open_weights(place), "an encoder")  # as encoder.weights does
    assert (fitted.loaded, fitted.total) == (total, total)
    with torch.no_grad():
        for found in (again.model(images), model(images)):
            assert (found - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()
    if dtype == "float32" and kind != "registers":  # whose rows of positions were added to them
        assert again.fingerprint == reports[name, format].fingerprint


@pytest.mark.parametrize(("name", "format"), CASES)
def test_an_export_says_how_pixels_are_normalised(exported, name, format):
    report = exported[1][name, format]
    config = json.loads((report.path / "config.json").read_text())
    if format == "transformers" and report.note != "TimmWrapperModel":
        told = json.loads((report.path / "preprocessor_config.json").read_text())
        assert (told["image_mean"], told["image_std"]) == (MEAN, STD)
    else:
        told = config.get("pretrained_cfg", config)
        assert (told["mean"], told["std"]) == (MEAN, STD)
    says = "| Pixels | in [0, 1], minus [0.5, 0.4, 0.3], divided by [0.2, 0.25, 0.35] |"
    assert says in (report.path / "README.md").read_text()


def test_transformers_feeds_its_folder_as_in_training_and_so_do_we_without_our_section(exported, tmp_path):
    from transformers import AutoImageProcessor

    folder = tmp_path / "vit"
    shutil.copytree(exported[1]["vit", "transformers"].path, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["prelude"]
    (folder / "config.json").write_text(json.dumps(config))
    opened = open_encoder(str(folder))
    assert (list(opened.mean), list(opened.std)) == (MEAN, STD)
    image = Image.new("RGB", (48, 40), (51, 102, 204))
    pixels = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"]
    expected = (torch.tensor([0.2, 0.4, 0.8]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert pixels.shape == (1, 3, *opened.config.size)
    torch.testing.assert_close(pixels, expected[:, None, None].expand_as(pixels))


def test_a_convnet_takes_other_sizes(exported):
    (source, *_), report = exported[0]["ResNet"], exported[1]["resnet", "torch"]
    assert report.note.endswith("any size from there on")
    larger = torch.randn(5, 3, 96, 160)
    with torch.no_grad():
        found, _ = torch.export.load(report.path / "encoder.pt2").module()(larger)
        expected = timm.create_model(source, pretrained=True).eval()(larger)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def shrunk(name, tensor):
    """Features of 1e-6 and below."""
    if name.startswith("norm."):
        tensor *= 1e-7


@pytest.mark.parametrize("room", [timm_folder, transformers_folder])
def test_small_features_are_compared_by_their_own_size(source, tmp_path, monkeypatch, room):
    encoder, _, features = source("ViT", shrunk)
    assert features.abs().max() < 1e-5
    format, cast = room.__name__.split(".")[-1].removesuffix("_folder"), room._cast
    export_encoder(encoder, tmp_path / "out", format=format)
    monkeypatch.setattr(room, "_cast", lambda tensor, dtype: cast(tensor, dtype) * (1 + 1e-3))
    with pytest.raises(RunStopped, match="so nothing was exported"):
        export_encoder(encoder, tmp_path / "wrong", format=format)
    assert not (tmp_path / "wrong").exists()


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


class Pixels(torch.nn.Module):
    """What `ARCHITECTURES["ViT"]` gives, by shape alone."""

    def forward(self, images):
        values = images.flatten(1)
        return values[:, :32], values[:, : 17 * 32].unflatten(1, (17, 32))


def test_a_program_that_computes_something_else_is_not_published(source, tmp_path, monkeypatch):
    encoder, *_ = source("ViT")
    any_number = {"images": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Pixels(), (torch.ones(2, 3, 32, 32),), dynamic_shapes=any_number)
    monkeypatch.setattr(export, "trace", lambda *_: (program, False))
    with pytest.raises(RunStopped, match="features that torch .* differ from ours by .*, so nothing was exported"):
        export_encoder(encoder, tmp_path / "out", format="torch")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_part_that_is_turned_off_and_that_transformers_would_turn_on_again_is_refused(tmp_path, save):
    kwargs = {"depth": 1, "embed_dim": 32, "num_heads": 2, "init_values": None}
    config = EncoderConfig(name="vit_small_patch16_dinov3", image_size=32, patch_size=8, kwargs=kwargs)
    tensors = {f"encoder.{name}": tensor for name, tensor in build_encoder(config, seed=1).state_dict().items()}
    run = tmp_path / "run"
    save(Store(run / "checkpoints"), 3, meta=meta_of(config, "encoder.", "mae"), encoder=tensors)
    for formats in (["transformers"], FOLDERS):
        with pytest.raises(UserError, match="has encoder.kwargs.init_values=null, which .*; write --format timm"):
            export_formats(str(run), tmp_path / "out", formats)
    assert export_encoder(str(run), tmp_path / "out").max_difference <= 1e-6


def test_several_formats_come_together_or_not_at_all(source, tmp_path, capsys):
    encoder, *_ = source("ViT")
    to, names = tmp_path / "out", lambda folder: sorted(path.name for path in folder.iterdir())
    assert door.main(["--to", str(to), "--format", "transformers", "timm", encoder]) == 0
    assert names(to) == ["timm", "transformers"] and str(to / "timm") in capsys.readouterr().out
    with pytest.raises(UserError, match="no bfloat16"):  # said by the last of them, when the first is written
        door.main([encoder, "--to", str(to), "--format", "timm", "onnx", "--dtype", "bfloat16"])
    assert names(to) == ["timm", "transformers"] and open_encoder(str(to / "timm")).config.name.startswith("vit")
    assert door.main([encoder, "--to", str(to)]) == 0
    assert "model.safetensors" in names(to) and names(tmp_path) == ["out", "source"]
    others = tmp_path / "others"  # of two encoders, each in a folder with the name of a format
    shutil.copytree(to, others / "timm")
    shutil.copytree(to, others / "torch")
    section = json.loads((others / "torch" / "config.json").read_text())
    section["prelude"]["fingerprint"] = "0" * 32
    (others / "torch" / "config.json").write_text(json.dumps(section))
    with pytest.raises(UserError, match="others exists and is no earlier export"):
        door.main([encoder, "--to", str(others)])
    shutil.rmtree(others)
    kept = [tmp_path / "kept" / name for name in ("mae", "timm")]
    for folder in kept:
        assert door.main([encoder, "--to", str(folder)]) == 0
    with pytest.raises(UserError, match="kept exists and is no earlier export"):
        door.main([encoder, "--to", str(tmp_path / "kept")])  # which holds others, of whatever runs
    assert all(is_export(folder) for folder in kept)
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(UserError, match="out would be replaced by programs, whose weights are not read back"):
        door.main([str(to), "--to", str(to), "--format", "torch"])
    (to / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{to / 'notes.txt'} is no file of an export, and would be lost"):
        door.main([encoder, "--to", str(to)])
    (to / "notes.txt").unlink()
    (to.parent / "mine" / "timm").mkdir(parents=True)
    with pytest.raises(UserError, match="mine exists and is no earlier export"):
        door.main([encoder, "--to", str(tmp_path / "mine")])
    for words, why in [
        (["--format", "tim", encoder], "--format tim is none; write one or more of timm, onnx"),
        (["--format", "onnx"], "There is no source"),
    ]:
        with pytest.raises(UserError, match=why):
            door.main([*words, "--to", str(to)])


def test_no_export_takes_the_place_of_the_only_weights(source, tmp_path):
    encoder, *_ = source("ViT")
    to, link = tmp_path / "encoders", tmp_path / "link"
    before, _ = export_formats(encoder, to, FOLDERS)
    link.symlink_to(to)
    kept = f"{to}/timm"
    spelled = [kept, f"local-dir:{kept}", f"{to}/transformers/../timm", f"{link}/timm", "encoders/timm"]
    for inside in (*spelled, f"{kept}/model.safetensors#pixels=imagenet"):
        with pytest.raises(UserError, match="would be replaced by programs, whose weights are not read back"):
            export_encoder(inside, to, format="torch")
    with pytest.raises(UserError, match="link/timm would be replaced by programs"):
        export_formats(kept, link / "timm", ("onnx", "torch"))
    for drawn in (f"random:{kept}", f"start:{kept}"):
        with pytest.raises(UserError, match=f"would be replaced by other weights than those of {kept}"):
            export_encoder(drawn, to)
    assert open_encoder(kept).fingerprint == before.fingerprint
    assert export_encoder(kept, to).fingerprint == before.fingerprint == open_encoder(str(to)).fingerprint


def test_what_projects_volumes_goes_out_again_or_the_export_is_refused(tmp_path, save):
    kwargs = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    config = EncoderConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=8, kwargs=kwargs)
    own = {"weight": torch.randn(32, 1, 8, 8, 4), "bias": torch.randn(32)}
    tensors = {f"encoder.{name}": tensor for name, tensor in build_encoder(config, seed=1).state_dict().items()}
    tensors |= {f"volume_embed.{name}": tensor for name, tensor in own.items()} | {"mask_token": torch.ones(32)}
    save(Store(tmp_path / "run" / "checkpoints"), 3, meta=meta_of(config, "encoder.", "uni4eye"), encoder=tensors)
    out, again, both = (tmp_path / name for name in ("out", "again", "both"))
    export_encoder(str(tmp_path / "run"), out)
    export_encoder(str(out), out)
    export_encoder(str(out), again)
    export_formats(str(again), both, FOLDERS)
    for folder in (out, again, both / "timm"):
        found = load_file(folder / "volume_embed.safetensors")
        assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
        assert "projects patches of 1 x 8 x 8 x 4 voxels" in (folder / "README.md").read_text()
    lost = {(str(out), out, "transformers"): out, (f"{both}/transformers", both, "timm"): both / "timm"}
    for (source, to, format), holds in lost.items():
        with pytest.raises(UserError, match=f"{holds}/volume_embed.safetensors would be lost, .*--format timm"):
            export_encoder(source, to, format=format)
        assert (holds / "volume_embed.safetensors").exists()
    export_encoder(str(out), tmp_path / "elsewhere", format="transformers")


@pytest.fixture
def small_disk():
    """`with small_disk():` no file grows beyond 16 KiB, in whatever language it is written."""

    @contextmanager
    def small_disk():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return small_disk


class Quick(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(99, 99)

    def forward(self, images):
        return self.layer(images), images + 1


@pytest.mark.parametrize("format", ALL)
def test_a_full_disk_leaves_the_earlier_export(source, tmp_path, small_disk, monkeypatch, format):
    """By the real writers, of programs that are quick to trace."""
    encoder, *_ = source("ViT")
    program = torch.export.export(Quick(), (torch.ones(1, 99),))
    monkeypatch.setattr(export, "trace", lambda *_: (program, False))
    before = export_encoder(encoder, tmp_path / "out").fingerprint
    with small_disk(), pytest.raises(UserError, match="cannot be written to .*out .*too large.*; make room"):
        export_encoder(encoder, tmp_path / "out", format=format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert open_encoder(str(tmp_path / "out")).fingerprint == before


WRITERS = {  # who writes the weights of a format, as (module, name, index of the file among its arguments)
    "timm": (timm_folder, "save_file", 1),
    "transformers": (transformers_folder, "save_file", 1),
    "torch": (Path, "write_bytes", 0),
    "onnx": (torch.onnx, "export", "f"),
}


@pytest.mark.parametrize("format", WRITERS)
def test_a_kill_in_the_middle_of_a_file_leaves_the_earlier_export(source, tmp_path, monkeypatch, format):
    encoder, *_ = source("ViT")
    before = export_encoder(encoder, tmp_path / "out").fingerprint
    module, name, index = WRITERS[format]

    def half_written(*args, **kwargs):
        with open(kwargs[index] if index in kwargs else args[index], "wb") as file:
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(export, "trace", lambda *_: (None, False))  # a forked process computes nothing
    monkeypatch.setattr(torch.export, "save", lambda program, file: file.write(b"program"))

    def export_half() -> None:
        setattr(module, name, half_written)
        export_encoder(encoder, tmp_path / "out", format=format)

    assert is_killed(export_half)
    assert len(list(tmp_path.iterdir())) == 3 and open_encoder(str(tmp_path / "out")).fingerprint == before
    export_encoder(encoder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


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


def test_only_in_a_run_an_export_has_a_place_of_its_own(tmp_path, save, source):
    encoder, *_ = source("ViT")
    run = tmp_path / "run"
    make_run(run, save)
    export_encoder(str(run), tmp_path / "out")
    checkpoint = run / "checkpoints" / "step-00000003"  # whose folder is removed with all that is in it
    for place in ("timm:resnet18", "weights.pth", encoder, f"random:{run}", tmp_path / "out", checkpoint):
        with pytest.raises(UserError, match="no run that an export could lie in; write --to DIR"):
            door.main([str(place)])
    assert door.main([f"{run}/#student"]) == 0 and (run / "export" / "config.json").exists()
    assert door.main([str(run), "--format", "timm", "transformers"]) == 0
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["timm", "transformers"]


def meta_of(config: EncoderConfig, exported: str, objective: str) -> dict:
    """Of a run's third step."""
    return {
        "step": 3,
        "encoder": config.model_dump(mode="json"),
        "exported": exported,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "loader": {"fingerprint": "0123abcd"},
        "config": {"objective": {"name": objective}},
    }


def make_run(folder, save):
    config = EncoderConfig(name="resnet18", image_size=32, kwargs={"channels": [8, 16, 32, 64]})
    teacher, student = build_encoder(config, seed=1), build_encoder(config, seed=2)
    tensors = {f"encoder.{name}": t for name, t in student.state_dict().items()}
    tensors |= {f"teacher.encoder.{name}": t for name, t in teacher.state_dict().items()}
    save(Store(folder / "checkpoints"), 3, meta=meta_of(config, "teacher.encoder.", "ijepa"), encoder=tensors)
    return teacher.eval(), student.eval()


def test_teacher_and_student_go_out_by_name(tmp_path, save):
    images, run = torch.randn(2, 3, 32, 32), tmp_path / "run"
    teacher, student = make_run(run, save)
    for words, expected in {"": teacher, "#teacher": teacher, "#student": student}.items():
        export_encoder(f"{run}{words}", tmp_path / "out")
        found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        torch.testing.assert_close(found(images), expected(images), atol=1e-6, rtol=0)
    other = {name: open_weights(f"{run}{words}").left_out for name, words in (("teacher", ""), ("student", "#student"))}
    assert set(other["teacher"]) == {"student"} and set(other["student"]) == {
        "teacher"
    }  # and no part of the objective's
    with pytest.raises(UserError, match="no network sudent"):
        export_encoder(f"{run}#sudent", tmp_path / "out")


def test_the_card_has_the_metrics_of_these_weights_only(tmp_path, save):
    from huggingface_hub import ModelCard

    run = tmp_path / "checkpoints" / "run"  # of a folder that is called as a run's own is
    make_run(run, save)
    (run / "evaluations").mkdir()
    ours = open_encoder(str(run)).fingerprint
    for name, fingerprint, value, test in [
        ("a", ours, 61.25, "77aa"),
        ("b", "another", 99.0, "77aa"),
        ("c", ours, 40, "88bb"),
    ]:
        result = {
            "evaluator": "linear_probe",
            "encoder": {"fingerprint": fingerprint},
            "data": {"test": {"num_samples": 10, "fingerprint": test}},
            "numbers": {"top1": {"value": value}, "loss": {"value": 1.0}},
        }
        (run / "evaluations" / f"{name}.json").write_text(json.dumps(result))
    (run / "evaluations" / "half.json").write_text('{"encoder"')
    for of in (run, run / "checkpoints" / "step-00000003"):
        export_encoder(str(of), tmp_path / "out", license="mit")
        data = ModelCard.load(tmp_path / "out" / "README.md").data
        found = [(r.metric_type, r.metric_value, r.dataset_name[-4:]) for r in data.eval_results]
        assert found == [("accuracy", 61.25, "77aa"), ("accuracy", 40, "88bb")]
    assert data.license == "mit" and data.library_name == "timm" and "ijepa" in data.tags
    assert "`0123abcd`" in (tmp_path / "out" / "README.md").read_text()
    export_encoder(str(run), tmp_path / "half", dtype="float16")
    card = (tmp_path / "half" / "README.md").read_text()
    assert not ModelCard(card).data.eval_results and f"| float16, rounded from those of fingerprint `{ours}` |" in card
