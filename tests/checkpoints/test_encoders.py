"""Opening encoders from every kind of source, and exporting them to plain timm."""

import json
import os
import pickle
import shutil
import signal
import stat

import pytest
import timm
import torch
from forked import is_killed

from prelude.checkpoints import sources
from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.exporting import publish, timm_folder
from prelude.checkpoints.sources import open_encoder, open_weights
from prelude.checkpoints.starting import start_of
from prelude.checkpoints.store import Store
from prelude.data.errors import RunStopped, UserError
from prelude.evaluators.comparing.gathering import Named, line_up
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.recipes import load_config

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
ARCHITECTURES = {
    "class token": EncoderConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=4, kwargs=SMALL),
    "registers, no class token": EncoderConfig(
        name="vit_base_patch16_reg4_gap_256", image_size=(32, 64), patch_size=8, kwargs=SMALL | {"drop_path_rate": 0.1}
    ),
    "resnet": EncoderConfig(name="resnet18", image_size=32, kwargs={"channels": [8, 16, 32, 64]}),
    "densenet": EncoderConfig(
        name="densenet121", image_size=32, kwargs={"growth_rate": 4, "block_config": [1, 1, 1, 1]}
    ),
    "convnext": EncoderConfig(
        name="convnext_atto", image_size=64, kwargs={"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}
    ),
    "hidden layer after the pooling": EncoderConfig(name="mobilenetv3_small_050", image_size=64),
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def make_run(tmp_path, save):
    """A run folder with one checkpoint of `config`'s encoder, its teacher being what is exported."""

    def make_run(config, steps=(7,)):
        for step in steps:
            teacher = build_encoder(config, seed=step)
            generator = torch.Generator().manual_seed(step)
            for name, buffer in teacher.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.uniform_(0.5, 1.5, generator=generator)
            student = build_encoder(config, seed=100 + step)
            tensors = {f"encoder.{name}": t for name, t in student.state_dict().items()}
            tensors |= {f"teacher.encoder.{name}": t for name, t in teacher.state_dict().items()}
            meta = {
                "step": step,
                "encoder": config.model_dump(mode="json"),
                "exported": "teacher.encoder.",
                "mean": list(MEAN),
                "std": list(STD),
                "loader": {"fingerprint": "0123abcd"},
                "config": {"objective": {"name": "mae"}},
            }
            save(Store(tmp_path / "run" / "checkpoints"), step, meta=meta, encoder=tensors)
        return tmp_path / "run", teacher.eval()

    return make_run


def pixels(config):
    return torch.randn(2, 3, *config.size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_plain_timm_computes_the_same_features_from_an_export(make_run, tmp_path, config):
    run, teacher = make_run(config)
    report = export_encoder(str(run), tmp_path / "export")
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = pixels(config)
    with torch.no_grad():
        assert (model(images) - teacher(images)).abs().max() <= 1e-6
        assert (model.forward_features(images) - teacher.forward_features(images)).abs().max() <= 1e-6
    assert report.max_difference <= 1e-6 and report.architecture == config.name
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == (list(MEAN), list(STD))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "run"]
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"to (B, {model(images).shape[1]})" in card
    assert all(fact in card for fact in ("mae", "| 7 |", "0123abcd", 'local-dir:export"', config.name))
    assert timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True, num_classes=5)(images).shape == (2, 5)


def test_every_source_of_the_same_weights_opens_the_same_encoder(make_run, tmp_path):
    run, teacher = make_run(ARCHITECTURES["resnet"], steps=(5, 7))
    export_encoder(str(run), tmp_path / "export")
    export_encoder(str(run), tmp_path / "to-transformers", format="transformers")
    paths = [run, run / "checkpoints", run / "checkpoints" / "step-00000007"]
    paths += [tmp_path / "export", tmp_path / "to-transformers"]
    opened = [open_encoder(str(path)) for path in paths]
    for encoder in opened:
        assert encoder.fingerprint == sources.fingerprint(teacher)
        assert encoder.config == ARCHITECTURES["resnet"] and (encoder.mean, encoder.std) == (MEAN, STD)
        assert encoder.origin == {"objective": "mae", "step": 7, "data": "0123abcd"} and encoder.objective == "mae"
        assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    assert [encoder.name for encoder in opened] == ["run/step-00000007"] * 3 + ["export", "to-transformers"]
    drawn = open_encoder(f"random:{run}")
    assert (drawn.origin, drawn.objective) == ({}, "mae")  # no training is told of, and it is judged like the run
    older = open_encoder(str(run / "checkpoints" / "step-00000005"))
    assert older.fingerprint != opened[0].fingerprint


def test_weights_that_a_run_starts_from_may_lie_in_the_home_folder(make_run, tmp_path, monkeypatch):
    _, teacher = make_run(ARCHITECTURES["resnet"])
    export_encoder(str(tmp_path / "run"), tmp_path / "timms")
    monkeypatch.setenv("HOME", str(tmp_path))
    told = ["data.shards=x", f"run_dir={tmp_path}/new", "data.range=[0,4095]"]
    for spelled in ("~/run", "~/run#teacher", "local-dir:~/timms"):
        config = load_config("mae_cifar10", [*told, f"encoder.weights={spelled}"])
        start = start_of(config)
        assert start.weights.fingerprint == start.config.encoder.weights_fingerprint == sources.fingerprint(teacher)
        saved = start.config.model_dump(mode="json")
        assert saved["encoder"]["weights"] == spelled  # so that the run goes on where the home folder is another one
    with pytest.raises(UserError, match="did not start from weights"):
        open_weights("start:~/run")


def test_a_source_is_the_same_however_its_path_is_spelled(make_run, tmp_path, monkeypatch):
    run, teacher = make_run(ARCHITECTURES["resnet"])
    expected = sources.fingerprint(teacher)
    export_encoder(str(run), tmp_path / "out", format="transformers")
    export_encoder(str(run), tmp_path / "timms")
    monkeypatch.chdir(tmp_path)
    for spelled in ("run/", "./run", ".//run", "run/checkpoints/", "run/#teacher", "./run#teacher", "run//checkpoints"):
        opened = open_encoder(spelled)
        assert (opened.name, opened.fingerprint) == ("run/step-00000007", expected)
        assert open_weights(spelled).fingerprint == expected  # as encoder.weights does
        assert open_encoder(f"random:{spelled}", seed=3).fingerprint == open_encoder("random:run", seed=3).fingerprint
        (lined_up,) = line_up([Named(spelled)], floors=False)
        assert (lined_up.problem, lined_up.step) == (None, 7)
        with pytest.raises(UserError, match="did not start from weights"):
            sources.describe(f"start:{spelled}")
    student = open_encoder("run#student").fingerprint
    assert student != expected
    assert {open_encoder(f"{path}#student").fingerprint for path in ("run/", "./run", "run//checkpoints/")} == {student}
    assert export_encoder("./run/#student", tmp_path / "again").fingerprint == student
    for spelled in ("out", "out/", "./out", "timms/", "./timms"):
        opened = open_encoder(spelled)
        assert (opened.config, opened.fingerprint) == (ARCHITECTURES["resnet"], expected)
    for spelled in ("timms#student", "timms/#student"):
        with pytest.raises(UserError, match="timms is an export, which has one network; leave #student out"):
            open_encoder(spelled)


@pytest.mark.parametrize("name", ["step-lr0.1", "step-1", "step-00000003"])
def test_a_run_or_an_export_may_have_a_name_that_begins_like_a_checkpoints(name, make_run, tmp_path):
    run, teacher = make_run(ARCHITECTURES["resnet"])
    export_encoder(str(run), tmp_path / "exports" / name)
    named = run.rename(tmp_path / name)
    for source in (named, tmp_path / "exports" / name):
        assert open_encoder(str(source)).fingerprint == sources.fingerprint(teacher)
    (checkpoint,) = (named / "checkpoints").glob("step-*")
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match="step-00000007 is no complete checkpoint: manifest.json cannot be read"):
        open_encoder(str(checkpoint))


@pytest.mark.parametrize("format", ["timm", "transformers"])
@pytest.mark.parametrize(("dtype", "close"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_an_export_in_half_precision_comes_back_with_its_fixed_table(make_run, tmp_path, format, dtype, close):
    run, teacher = make_run(ARCHITECTURES["class token"])
    assert ARCHITECTURES["class token"].pos_embed == "sincos"
    export_encoder(str(run), tmp_path / "half", format=format, dtype=dtype)
    opened, images = open_encoder(str(tmp_path / "half")), pixels(ARCHITECTURES["class token"])
    assert opened.config.pos_embed == "sincos"
    with torch.no_grad():
        expected = teacher(images)
        assert (opened.model(images) - expected).abs().max() <= close * expected.abs().max()


def test_random_weights_have_the_same_architecture_and_depend_on_the_seed_alone(make_run):
    run, _ = make_run(ARCHITECTURES["class token"])
    trained = open_encoder(str(run))
    first, again, other = (open_encoder(f"random:{run}", seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert len({trained.fingerprint, first.fingerprint, other.fingerprint}) == 3
    assert {n: p.shape for n, p in first.model.state_dict().items()} == {
        n: p.shape for n, p in trained.model.state_dict().items()
    }
    assert (first.mean, first.name) == (MEAN, "random:run/step-00000007")


def test_timm_names_open_without_a_folder():
    random = open_encoder("random:timm:resnet18", seed=3)
    assert random.config.size == (224, 224) and random.name == "random:timm:resnet18"
    assert random.fingerprint == sources.fingerprint(build_encoder(random.config, seed=3))
    assert sources.describe("timm:vit_tiny_patch16_224").config.pos_embed == "learned"


def test_pretrained_weights_keep_timms_pixels_and_drop_the_classifier(monkeypatch):
    create = timm.create_model

    def offline_timm(name, pretrained, **kwargs):
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline_timm)
    opened = open_encoder("timm:vit_tiny_patch16_224.augreg_in21k")
    assert opened.mean == (0.5, 0.5, 0.5) and opened.model.num_classes == 0 and not opened.model.training


def test_no_network_is_said_in_one_sentence(monkeypatch):
    create = timm.create_model

    def no_network(name, pretrained, **kwargs):
        if pretrained:
            raise FileNotFoundError("cannot find the requested files")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match="weights of resnet18 could not be fetched .*connect to the network"):
        open_encoder("timm:resnet18")


def test_sources_that_are_none_are_refused_with_what_to_write(tmp_path, make_run):
    run, _ = make_run(ARCHITECTURES["resnet"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"architecture": "resnet18"}')
    for source, why in [
        (tmp_path / "nowhere", "There is no folder .*nowhere; write a run folder"),
        (tmp_path / "empty", "holds no complete checkpoint and no export"),
        (tmp_path / "foreign", "foreign does not hold the whole of its model"),
        (run / "checkpoints" / "step-00000009", "There is no folder"),
        ("timm:resnet19", "has no model resnet19"),
        ("random:timm:resnet19", "has no model resnet19"),
    ]:
        with pytest.raises(UserError, match=why):
            open_encoder(str(source))


def test_weights_that_do_not_fit_are_named(make_run, tmp_path):
    run, _ = make_run(ARCHITECTURES["resnet"])
    export_encoder(str(run), tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    config["prelude"]["encoder"]["name"] = "resnet26"
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="does not hold the weights of resnet26: .*12 tensors of layer1.0 to layer1.1 are missing"
    ):
        open_encoder(str(tmp_path / "export"))


def test_a_damaged_checkpoint_is_not_opened_but_the_one_before_is(make_run):
    run, _ = make_run(ARCHITECTURES["resnet"], steps=(5, 7))
    damaged = run / "checkpoints" / "step-00000007"
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f" * 2)
    with pytest.raises(UserError, match="model.safetensors does not match its checksum"):
        open_encoder(str(damaged))
    assert open_encoder(str(run)).name == "run/step-00000005"


def test_an_encoder_opens_without_the_optimizers_file(make_run):
    run, _ = make_run(ARCHITECTURES["resnet"])
    (run / "checkpoints" / "step-00000007" / "optimizer.safetensors").unlink()
    assert open_encoder(str(run / "checkpoints" / "step-00000007")).origin["step"] == 7


def test_a_pickle_in_an_export_is_never_run(make_run, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    run, _ = make_run(ARCHITECTURES["resnet"])
    export_encoder(str(run), tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        open_encoder(str(tmp_path / "export"))
    assert not (tmp_path / "sprung").exists()


def test_an_export_replaces_an_export_and_nothing_else(make_run, tmp_path):
    run, _ = make_run(ARCHITECTURES["resnet"], steps=(5, 7))
    to = tmp_path / "export"
    first = export_encoder(str(run / "checkpoints" / "step-00000005"), to)
    (to / "encoder.onnx").touch()  # left of another format
    second = export_encoder(str(run), to)
    assert open_encoder(str(to)).fingerprint == second.fingerprint != first.fingerprint
    assert not (to / "encoder.onnx").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(UserError, match="mine exists and is no earlier export"):
        export_encoder(str(run), mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert export_encoder(str(run), empty).fingerprint == second.fingerprint


def test_nothing_is_published_when_timm_computes_something_else(make_run, tmp_path, monkeypatch):
    run, _ = make_run(ARCHITECTURES["resnet"])
    features = timm_folder._features

    def slightly_off(model, images):
        off[0] += 1e-5
        return tuple(f + off[0] for f in features(model, images))

    off = [0.0]
    monkeypatch.setattr(timm_folder, "_features", slightly_off)
    with pytest.raises(RunStopped, match="nothing was exported"):
        export_encoder(str(run), tmp_path / "export")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "in two steps"])
def test_a_kill_at_any_rename_leaves_a_whole_export(make_run, tmp_path, monkeypatch, exchange):
    """Before and after each; where two folders cannot be exchanged, the next export finds what a kill left."""
    run, _ = make_run(ARCHITECTURES["resnet"], steps=(5, 7))
    old, to = str(run / "checkpoints" / "step-00000005"), tmp_path / "export"
    prints = {export_encoder(source, to).fingerprint for source in (str(run), old)}
    monkeypatch.setattr(timm_folder, "_feature_difference", lambda *_: 0.0)
    if not exchange:
        monkeypatch.setattr(publish, "_exchanged", lambda *_: False)
    moments = 0
    while killed_at_operation(moments, lambda: export_encoder(str(run), to)):
        moments += 1
        if exchange:
            assert open_encoder(str(to)).fingerprint in prints
        with pytest.raises(UserError, match="No space left"), monkeypatch.context() as patch:
            patch.setattr(timm_folder, "save_file", no_space)
            export_encoder(old, to)
        assert open_encoder(str(to)).fingerprint in prints
        export_encoder(old, to)
    assert moments >= (4 if exchange else 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def killed_at_operation(moment: int, action) -> bool:
    """Whether `action` was killed at its n-th chance: before or after what changes the names on the disk."""
    return is_killed(lambda: (kill_at_operation(moment), action()))


def kill_at_operation(moment: int) -> None:
    left = [moment]

    def guarded(function):
        def call(*args, **kwargs):
            chance()
            result = function(*args, **kwargs)
            chance()
            return result

        return call

    def chance():
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    os.rename, publish._exchanged = guarded(os.rename), guarded(publish._exchanged)
    shutil.rmtree = guarded(shutil.rmtree)


def test_colleagues_can_open_an_export(make_run, tmp_path):
    run, _ = make_run(ARCHITECTURES["resnet"])
    before = os.umask(0o027)
    try:
        export_encoder(str(run), tmp_path / "export")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "export").iterdir()} == {0o640}
    assert stat.S_IMODE((tmp_path / "export").stat().st_mode) == 0o750


def test_an_export_over_a_link_leaves_what_it_leads_to_alone(make_run, tmp_path):
    run, _ = make_run(ARCHITECTURES["resnet"], steps=(5, 7))
    first = export_encoder(str(run / "checkpoints" / "step-00000005"), tmp_path / "released")
    (tmp_path / "export").symlink_to(tmp_path / "released")
    second = export_encoder(str(run), tmp_path / "export")
    assert open_encoder(str(tmp_path / "released")).fingerprint == first.fingerprint
    assert open_encoder(str(tmp_path / "export")).fingerprint == second.fingerprint


def test_a_run_whose_checkpoints_cannot_be_used_is_told_which_and_why(make_run):
    run, _ = make_run(ARCHITECTURES["resnet"], steps=(5, 7))
    for path in run.glob("checkpoints/step-*/manifest.json"):
        path.write_text('{"format": 4}')
    with pytest.raises(UserError, match="step-00000007: it is of format 4.*step-00000005: it is of format 4"):
        open_encoder(str(run))
