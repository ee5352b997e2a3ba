"""`prelude embed` and `prelude neighbours`, against other readers of the formats and numpy's brute force."""

import errno
import json
import os

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
import timm
import torch
from PIL import Image

from prelude.checkpoints.sources import open_encoder
from prelude.data.errors import UserError
from prelude.data.shapes import paint, write_shards
from prelude.evaluators.features import embedding as module
from prelude.evaluators.features.extraction import Extractor
from prelude.launch import embed, neighbours

ENDINGS = [".parquet", ".npz", ".safetensors"]


@pytest.fixture
def photos(tmp_path):
    """24 images in two class folders; one of them is no image."""
    pixels, _ = paint("train", np.arange(24), image_size=16)
    for i, image in enumerate(pixels):
        folder = tmp_path / "photos" / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    (tmp_path / "photos/cats/05.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return tmp_path / "photos"


def written(source, shards, to, *more):
    argv = [source, str(shards), "--to", str(to), "--num-workers", "0", "--batch-size", "7"]
    assert embed.main([*argv, "--bank", str(to.parent / "bank"), *more]) == 0
    return to


def columns(path):
    """Read by each format's own library."""
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        assert "prelude" in {key.decode() for key in table.schema.metadata}
        read = {name: table[name].to_pylist() for name in table.column_names}
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            read = {name: arrays[name].tolist() for name in arrays.files if name != "about"}
    else:
        read = {name: found.tolist() for name, found in safetensors.numpy.load_file(path).items()}
        read |= {name: json.loads(bytes(read[name])) for name in ("key", "shard")}
    return read


def as_numpy_sees_them(photos):
    """16 x 16 images are shown whole, so raw pixels are ImageNet's normalisation of the file."""
    found = {}
    for path in sorted(photos.rglob("*.png")):
        if path.name != "05.png":
            values = np.asarray(Image.open(path)).transpose(2, 0, 1) / 255
            mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            found[str(path.relative_to(photos))] = ((values - mean) / std).ravel()
    return found


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_holds_every_readable_image_with_its_key_and_label(photos, tmp_path, ending, dtype, capsys, monkeypatch):
    monkeypatch.setattr(module, "PART", 10)  # three entries of the bank
    monkeypatch.setattr(module, "GROUP", 4)
    to = written("pixels:16", photos, tmp_path / f"out{ending}", "--dtype", dtype)
    read, wanted = columns(to), as_numpy_sees_them(photos)
    assert read["key"] == list(wanted) and len(wanted) == 23
    assert np.allclose(read["pixels"], list(wanted.values()), atol=1e-5 if dtype == "float32" else 2e-3)
    assert read["label"] == [0 if key.startswith("cats") else 1 for key in wanted]
    (line,) = map(json.loads, (tmp_path / f"out{ending}.left-out.jsonl").read_text().splitlines())
    assert line["key"] == "cats/05.png" and line["reason"] and "1 images are left out" in capsys.readouterr().err
    again = module.read_embedding(to)
    assert again.keys == read["key"] and np.allclose(again.values, read["pixels"]) and again.kind == "pixels"


def test_kinds_of_a_vit_are_those_of_its_own_forward(tmp_path):
    (shard,) = write_shards(tmp_path / "shapes", "train", 6, image_size=160)
    source = "random:timm:test_vit.r160_in1k"
    to = written(source, shard, tmp_path / "a.npz", "--kind", "cls", "mean", "--label", "cls")
    seen = columns(written("pixels:160", shard, tmp_path / "b.npz"))
    encoder = open_encoder(source)
    given, wanted = (
        torch.tensor(part).view(2, 1, 3, 1, 1)
        for part in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (encoder.mean, encoder.std))
    )
    images = torch.tensor(seen["pixels"]).view(6, 3, 160, 160) * given[1] + given[0]
    model = timm.create_model("test_vit.r160_in1k", num_classes=0).eval()
    model.load_state_dict(encoder.model.state_dict())
    with torch.no_grad():
        tokens = model.forward_features((images - wanted[0]) / wanted[1])
    norm = getattr(model, "fc_norm", torch.nn.Identity())
    read = columns(to)
    assert torch.allclose(torch.tensor(read["cls"]), norm(tokens[:, 0]), atol=1e-4)
    patches = tokens[:, model.num_prefix_tokens :].mean(1)
    assert torch.allclose(torch.tensor(read["mean"]), norm(patches), atol=1e-4)
    assert read["label"] == seen["label"] and len(set(read["label"])) > 1


def test_a_killed_run_computes_only_the_parts_that_are_missing(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 8)
    seen, original = [], Extractor.__call__

    def counted(self, batch):
        if sum(seen) >= 14 and len(seen) < 100:
            seen.extend([0] * 100)
            raise KeyboardInterrupt
        seen.append(len(batch))
        return original(self, batch)

    monkeypatch.setattr(Extractor, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        written("pixels:16", photos, tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()
    before = sum(seen)
    written("pixels:16", photos, tmp_path / "a.npz")
    assert 0 < sum(seen) - before < 23
    assert columns(tmp_path / "a.npz")["key"] == list(as_numpy_sees_them(photos))


def brute_force(values, query, k):
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosines = unit @ (query / np.linalg.norm(query))
    order = np.argsort(-cosines, kind="stable")
    return order[:k], cosines


def shown(output):
    """(key, cosine) of each line of the table."""
    rows = [line.split() for line in output.splitlines() if ".png" in line and "." in line]
    return [(next(word for word in row[::-1] if word.endswith(".png")), row) for row in rows]


def test_neighbours_are_those_of_brute_force_and_the_sheet_shows_them(photos, tmp_path, capsys):
    to = written("pixels:16", photos, tmp_path / "a.parquet")
    wanted = as_numpy_sees_them(photos)
    values, keys = np.array(list(wanted.values())), list(wanted)
    other = tmp_path / "other.png"
    Image.fromarray(paint("test", np.arange(1), image_size=16)[0][0]).save(other)
    capsys.readouterr()
    sheet = tmp_path / "sheet.png"
    argv = [str(to), "--of", "cats/03.png", str(other), "--source", "pixels:16", "--k", "4", "--to", str(sheet)]
    assert neighbours.main(argv) == 0
    found = [key for key, _ in shown(capsys.readouterr().out) if key in keys]
    own = keys.index("cats/03.png")
    first = [i for i in brute_force(values, values[own], 5)[0] if i != own][:4]
    pixels = np.asarray(Image.open(other)).transpose(2, 0, 1) / 255
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    second = brute_force(values, ((pixels - mean) / std).ravel(), 4)[0]
    assert found == [keys[i] for i in [*first, *second]]
    drawn = np.asarray(Image.open(sheet))
    assert drawn.shape == (2 * 146 - 4, 5 * 132 - 4, 3)
    # the picture itself, each pixel eight times as large, beside its nearest
    for column, key in enumerate(["cats/03.png", keys[first[0]]]):
        left = column * 132
        assert (drawn[14 + 4 : 142 : 8, left + 4 : left + 128 : 8] == np.asarray(Image.open(photos / key))).all()


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--to", "a.csv"], "has no ending"),
        (["--to", "none/a.npz"], "cannot be written"),
        (["--to", "a.npz", "--kind", "cls"], None),
        (["--to", "a.npz", "--label", "json"], "json"),
        (["--to", "a.npz", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_mistakes_of_embed_are_one_sentence(photos, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    source = "random:timm:test_resnet" if sentence is None else "pixels:16"
    with pytest.raises(UserError, match=sentence or "no features=cls"):
        embed.main([source, str(photos), "--num-workers", "0", *argv])
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_leaves_the_old_file(photos, tmp_path, monkeypatch, ending):
    to = written("pixels:16", photos, tmp_path / f"a{ending}")
    before = to.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("prelude.pretrain.files.os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        written("pixels:16", photos, to, "--dtype", "float16")
    assert to.read_bytes() == before and not list(tmp_path.glob(".tmp-*"))


def test_mistakes_of_neighbours_are_one_sentence(photos, tmp_path):
    to = written("pixels:16", photos, tmp_path / "a.npz")
    image = str(photos / "cats/01.png")
    for argv, sentence in [
        ([str(to), "--of", "cats/0l.png"], "did you mean cats/"),
        ([str(to), "--of", image], "write --source pixels:16"),
        ([str(to), "--of", image, "--source", "pixels:8"], "other weights|features"),
        ([str(to), "--of", "cats/01.png", "--k", "0"], "--k 0"),
        ([str(to), "--of", "cats/01.png", "--kind", "cls"], "no features of kind cls"),
        ([str(to), "--of", "cats/01.png", "--to", "a.jpg"], "no PNG"),
        ([str(tmp_path / "b.npz"), "--of", "a"], "is not there"),
    ]:
        with pytest.raises(UserError, match=sentence):
            neighbours.main(argv)


@pytest.mark.parametrize("ending", ENDINGS)
def test_other_files_and_damaged_ones_are_refused(tmp_path, ending, photos):
    to = written("pixels:16", photos, tmp_path / f"a{ending}")
    for content in (b"", b"nothing of the kind", to.read_bytes()[:200]):
        to.write_bytes(content)
        with pytest.raises(UserError, match="no file of prelude embed, or a damaged one"):
            module.read_embedding(to)


def test_values_beyond_float16_are_refused(tmp_path):
    big = module.Embedding(
        {"a": [torch.full((1, 2), 1e6)]}, np.zeros(1, np.int64), ["k"], ["s"], None, {"kinds": ["a"]}
    )
    with pytest.raises(UserError, match="write --dtype float32"):
        module.write_embedding(big, tmp_path / "a.npz", "float16")
