"""Files of features and nearest images, through their doors, against timm's forward and numpy's brute force."""

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

from prelude.data.decode import decode
from prelude.data.errors import UserError
from prelude.data.select import Selection, selected
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators.embedding import embed as module
from prelude.evaluators.embedding.neighbours import queries_among
from prelude.evaluators.embedding.reading import Embedded, read
from prelude.evaluators.embedding.samples import pixels_of
from prelude.evaluators.embedding.writing import write
from prelude.evaluators.features.extraction import Extractor
from prelude.launch import prelude
from prelude.launch.exit_codes import door
from prelude.launch.neighbours import show
from prelude.pretrain import distributed

FORMATS = ["parquet", "npz", "npy", "safetensors"]
BAD = [3, 7, 41]


def damaged_shards(folder: Path) -> str:
    """50 images in three shards, three of them damaged after the shards were written."""
    write_shards(folder, "train", 50, image_size=16, samples_per_shard=20)
    pattern = f"{folder}/train-*.tar"
    index = ShardIndex(pattern, "cls")
    for sample in BAD:
        offset, size = index.images[sample].tolist()
        with open(index.shard_of(sample), "r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)
    return pattern


@pytest.fixture
def shards(tmp_path):
    return damaged_shards(tmp_path / "shapes")


@pytest.fixture
def encoder(tmp_path):
    """A folder as timm writes it, and the model in it."""
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **settings).eval()
    folder = tmp_path / "encoder"
    model.pretrained_cfg = model.pretrained_cfg | {"std": (0.25, 0.25, 0.25)}
    timm.models.save_for_hf(model, folder, model_args=settings, safe_serialization=True)
    return f"local-dir:{folder}", model


def run(capsys, *argv) -> tuple[int, str]:
    code = door(lambda: prelude.main([str(word) for word in argv]))
    return code, capsys.readouterr().err


def embedded(capsys, *argv, code: int = 0) -> str:
    found, told = run(capsys, "embed", *argv, "--num-workers", "0", "--batch-size", "16")
    assert found == code, told
    return told


def by_timm(model, pattern: str) -> np.ndarray:
    """The class tokens of the sound images, from their pixels on by timm alone."""
    index = ShardIndex(pattern, "cls")
    sound = [sample for sample in range(50) if sample not in BAD]
    pixels = torch.from_numpy(np.stack(list(pixels_of(index, sound)))).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        return model.forward_features((pixels - 0.5) / 0.25)[:, 0].numpy()


def columns(path: Path, kind: str) -> dict:
    """By the tools that a user has, and not by ours."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        found = {name: table.column(name).to_pylist() for name in ("key", "shard", "sample_id", "label")}
        return found | {kind: np.array(table.column(kind).to_pylist())}
    if path.suffix == ".npy":
        rows = list(csv.DictReader(open(path.with_name(f"{path.stem}.keys.csv"))))
        found = {name: [row[name] for row in rows] for name in ("key", "shard")}
        found |= {name: [int(row[name]) for row in rows] for name in ("sample_id", "label")}
        return found | {kind: np.load(path)}
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        shards = arrays["shards"].tolist()
    else:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        for name in ("key", "shards"):
            arrays[name] = np.array(arrays[name].tobytes().decode().split("\0")[:-1])
        shards = arrays["shards"].tolist()
    found = {name: arrays[name].tolist() for name in ("key", "sample_id", "label")}
    return found | {"shard": [shards[number] for number in arrays["shard"]], kind: arrays[kind]}


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_holds_the_features_of_timm_with_keys_and_labels(ending, shards, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 17)  # several pieces, whose ends are in the middle of shards
    source, model = encoder
    to = tmp_path / f"features.{ending}"
    embedded(capsys, source, shards, "--to", to, "--kind", "cls", code=4)
    found, sound = columns(to, "cls"), [sample for sample in range(50) if sample not in BAD]
    index = ShardIndex(shards, "cls")
    assert found["sample_id"] == sound
    assert found["key"] == [index.key(sample) for sample in sound]
    assert found["shard"] == [index.shard_of(sample) for sample in sound]
    assert found["label"] == [sample % 10 for sample in sound]
    assert np.abs(found["cls"] - by_timm(model, shards)).max() < 1e-5
    ours = read(to)
    assert np.array_equal(ours.values.numpy(), found["cls"]) and ours.keys == found["key"]
    assert [ours.shards[number] for number in ours.shard] == found["shard"]
    assert ours.sample_ids.tolist() == sound and ours.labels.tolist() == found["label"]
    lines = list(map(json.loads, (tmp_path / "features.left_out.jsonl").open()))
    assert [line["key"] for line in lines] == [index.key(sample) for sample in BAD]
    assert all(line["reason"] for line in lines)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_list_of_what_was_left_out_stays_that_of_its_file(shards, tmp_path, capsys):
    embedded(capsys, "pixels:4", shards, "--to", tmp_path / "f.npz", code=4)
    listed = (tmp_path / "f.left_out.jsonl").read_bytes()
    code, told = run(capsys, "embed", "pixels:4", shards, "--to", tmp_path / "f.safetensors")
    assert (
        code == 2 and "f.left_out.jsonl belongs to" in told and (tmp_path / "f.left_out.jsonl").read_bytes() == listed
    )
    (tmp_path / "f.npz").unlink()
    embedded(capsys, "pixels:4", shards, "--to", tmp_path / "f.npz", code=4)  # of the same file, written again
    packed = tmp_path / "train.left_out.jsonl"
    for content in ('{"source": "a.png", "reason": "no image", "lost": true}\n', ""):
        packed.write_text(content)
        code, told = run(capsys, "embed", "pixels:4", shards, "--to", tmp_path / "train.npz")
        assert code == 2 and "train.left_out.jsonl is there already" in told and packed.read_text() == content


def test_a_photo_is_looked_for_in_a_set_of_one_of_several_images(tmp_path, capsys):
    tar = tmp_path / "pairs.tar"
    with tarfile.open(tar, "w") as to:
        for number in range(6):
            for eye, shift in (("left", 0), ("right", 100)):
                content = io.BytesIO()
                pixels = np.random.default_rng(number + shift).integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(content, "png")
                member = tarfile.TarInfo(f"{number}.{eye}.png")
                member.size = content.tell()
                to.addfile(member, io.BytesIO(content.getvalue()))
                if (number, eye) == (3, "left"):
                    (tmp_path / "photo.png").write_bytes(content.getvalue())
    embedded(capsys, "pixels:4", tar, "--to", tmp_path / "f.npz", "--image", "left.png")
    out = tmp_path / "near.csv"
    code, told = run(capsys, "neighbours", tmp_path / "f.npz", "--of", tmp_path / "photo.png", "--k", 1, "--out", out)
    assert code == 0, told
    (row,) = csv.DictReader(open(out))
    assert row["key"] == "3" and float(row["cosine"]) == pytest.approx(1)
    of_source = [
        "neighbours",
        "pixels:4",
        "--shards",
        tar,
        "--of",
        "3",
        "--bank",
        tmp_path / "bank",
        "--num-workers",
        0,
    ]
    assert run(capsys, *of_source)[0] == 2
    code, told = run(capsys, *of_source, "--image", "left.png")
    assert code == 0, told
    code, told = run(capsys, "neighbours", tmp_path / "f.npz", "--of", "3", "--image", "left.png")
    assert code == 2 and "--image has no effect beside a file" in told


def test_keys_are_told_whole_to_another_program(capsys):
    keys = [f"{name}_site-4_camera-12_frame-000123_of-the-eleventh-of-may" for name in ("a", "b")]
    show([(keys[0], 1, 0.9, keys[1], "", "there/shard.tar")], "nearest")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if keys[0] in line] == [[keys[0], "1", "0.9", keys[1], "shard.tar"]]


def test_float16_is_the_rounded_float32(shards, tmp_path, capsys):
    wide, narrow = tmp_path / "wide.npz", tmp_path / "narrow.safetensors"
    embedded(capsys, "pixels:4", shards, "--to", wide, code=4)
    embedded(capsys, "pixels:4", shards, "--to", narrow, "--dtype", "float16", code=4)
    full, half = read(wide).values, read(narrow).values
    assert half.dtype == torch.float16 and half.equal(full.half())


def test_ranks_gather_before_the_first_collective_as_one_may_have_had_its_shards_to_index(
    shards, tmp_path, capsys, monkeypatch
):
    met, from_main = [], distributed.from_main
    monkeypatch.setattr(distributed, "gather", lambda: met.append("gather"))
    monkeypatch.setattr(distributed, "from_main", lambda value: (met.append("from_main"), from_main(value))[1])
    embedded(capsys, "pixels:4", shards, "--to", tmp_path / "pixels.npz", code=4)
    assert met[:2] == ["gather", "from_main"]


def test_a_killed_start_goes_on_where_it_was(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 16)
    to, whole, calls, original = tmp_path / "two.npz", tmp_path / "one.npz", [], Extractor.__call__

    class Killed(BaseException):
        pass

    def counted(self, batch):
        calls.append(batch.sample_ids.tolist())
        if len(calls) == 3:
            raise Killed
        return original(self, batch)

    monkeypatch.setattr(Extractor, "__call__", counted)
    with pytest.raises(Killed):
        embedded(capsys, "pixels:4", shards, "--to", to)
    assert not to.exists()
    monkeypatch.setattr(module, "PIECE", 1000)  # what a start at another number of ranks would choose
    embedded(capsys, "pixels:4", shards, "--to", to, code=4)
    assert len(calls) == 5  # three pieces of four, the third twice
    embedded(capsys, "pixels:4", shards, "--to", whole, code=4)
    assert read(to).values.equal(read(whole).values) and read(to).keys == read(whole).keys
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_disk_that_refuses_leaves_no_file_and_what_was_computed(shards, tmp_path, capsys, monkeypatch):
    def full(table, to):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write", full)
    to = tmp_path / "features.npz"
    told = embedded(capsys, "pixels:4", shards, "--to", to, code=2)
    assert "No space left" in told and "what was computed is kept" in told and not to.exists()
    monkeypatch.setattr(module, "write", write)
    monkeypatch.setattr(Extractor, "__call__", None)  # nothing is computed again
    embedded(capsys, "pixels:4", shards, "--to", to, code=4)
    assert len(read(to)) == 47


def test_a_value_that_float16_cannot_hold_is_refused(shards, encoder, tmp_path, capsys, monkeypatch):
    original = Extractor.__call__
    monkeypatch.setattr(
        Extractor, "__call__", lambda self, batch: {k: v * 1e6 for k, v in original(self, batch).items()}
    )
    argv = [shards, "--to", tmp_path / "x.npz", "--dtype", "float16"]
    assert "write --dtype float32" in embedded(capsys, "pixels:4", *argv, code=2)
    assert not (tmp_path / "x.npz").exists()


def test_a_folder_of_images_has_its_class_folders_as_labels(tmp_path, capsys):
    for number, name in enumerate(("b/x.png", "a/y.png", "a/z.png")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (40 * number, 90, 30)).save(tmp_path / "photos" / name)
    embedded(capsys, "pixels:2", tmp_path / "photos", "--to", tmp_path / "f.parquet")
    found = read(tmp_path / "f.parquet")
    assert found.keys == ["a/y.png", "a/z.png", "b/x.png"] and found.labels.tolist() == [0, 0, 1]


MISTAKES = {
    "a kind that there is not": (["--kind", "stages"], "has no features=stages"),
    "an ending": (["--to", "x.csv"], ".parquet, .npz"),
    "no folder": (["--to", "/nowhere/x.npz"], "/nowhere"),
    "a label that there is not": (["--label", "json"], "json"),
    "two kinds in one array": (["--to", "x.npy", "--kind", "cls", "mean"], "room for one kind"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(mistake, shards, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir(tmp_path))
    argv, expected = MISTAKES[mistake]
    to = [] if "--to" in argv else ["--to", "x.npz"]
    told = embedded(capsys, encoder[0], shards, *to, *argv, code=2)
    assert expected in told and "Traceback" not in told and len(told.strip().splitlines()) == 1
    assert {*os.listdir(tmp_path)} - {"cache"} == before - {"cache"}


def test_what_is_there_already_is_not_written_over(shards, tmp_path, capsys):
    (tmp_path / "x.npz").write_text("mine")
    assert "exists" in embedded(capsys, "pixels:4", shards, "--to", tmp_path / "x.npz", code=2)
    assert (tmp_path / "x.npz").read_text() == "mine"


@pytest.mark.parametrize("ending", ["parquet", "safetensors"])
def test_neighbours_are_those_of_brute_force(ending, shards, encoder, tmp_path, capsys):
    to, out, sheet = tmp_path / f"features.{ending}", tmp_path / "near.csv", tmp_path / "near.png"
    embedded(capsys, encoder[0], shards, "--to", to, code=4)
    index, found = ShardIndex(shards, "cls"), columns(to, "mean")
    photo = tmp_path / "photo.png"  # the pixels of an image of the set, in a file
    Image.fromarray(next(pixels_of(index, [found["sample_id"][20]]))).save(photo)
    queries = [found["key"][5], str(photo)]
    code, told = run(
        capsys, "neighbours", to, "--of", *queries, "--k", "4", "--kind", "mean", "--out", out, "--sheet", sheet
    )
    assert code == 0, told
    unit = found["mean"] / np.linalg.norm(found["mean"], axis=1, keepdims=True)
    cosines = unit[[5, 20]] @ unit.T
    cosines[0, 5] = -2  # no neighbour of itself; a file is one of its copy in the set
    rows = list(csv.DictReader(open(out)))
    for line in range(2):
        order = np.argsort(-cosines[line])[:4]
        here = rows[4 * line : 4 * line + 4]
        assert [row["key"] for row in here] == [found["key"][place] for place in order]
        assert [int(row["label"]) for row in here] == [found["label"][place] for place in order]
        assert np.allclose([float(row["cosine"]) for row in here], cosines[line, order], atol=1e-5)
    page = np.array(Image.open(sheet))
    assert page.shape[0] > 2 * 112 and page.shape[1] > 5 * 112
    first = decode((tmp_path / "photo.png").read_bytes())
    tile = page[8 + 148 : 8 + 148 + 112, 8 : 8 + 112]
    assert np.array_equal(tile[3::7, 3::7], first)  # each pixel as a square of seven


def test_neighbours_out_of_a_bank_are_those_out_of_a_file(shards, tmp_path, capsys):
    embedded(capsys, "pixels:4", shards, "--to", tmp_path / "f.npz", code=4)
    key = read(tmp_path / "f.npz").keys[0]
    told = []
    for words in (["pixels:4", "--shards", shards, "--bank", tmp_path / "bank"], [tmp_path / "f.npz"]):
        out = tmp_path / f"{len(told)}.csv"
        code, message = run(capsys, "neighbours", *words, "--of", key, "--out", out, "--num-workers", "0")
        assert code == 0, message
        told.append([[row[name] for name in ("rank", "cosine", "key")] for row in csv.DictReader(open(out))])
    assert told[0] == told[1] and len(told[0]) == 8


def test_mistakes_about_neighbours_are_sentences(shards, encoder, tmp_path, capsys):
    file = tmp_path / "f.safetensors"
    embedded(capsys, "pixels:4", shards, "--to", file, code=4)
    (tmp_path / "words.jpg").write_text("no image")
    shutil.copy(file, tmp_path / "cut.npz")
    wrong = {
        "no key": ([file, "--of", "nothing"], "no key 'nothing'"),
        "a kind": ([file, "--of", "x", "--kind", "cls"], "write --kind pixels"),
        "no image": ([file, "--of", tmp_path / "words.jpg"], "is no image"),
        "another encoder": ([file, "--of", tmp_path / "words.jpg", "--encoder", encoder[0]], "other weights"),
        "a damaged file": ([tmp_path / "cut.npz", "--of", "x"], "is no file of features"),
        "a source alone": (["pixels:4", "--of", "x"], "--shards"),
        "no neighbour": ([file, "--of", "x", "--k", "0"], "--k"),
        "no picture": ([file, "--of", "x", "--sheet", "near.jpg"], "near.png"),
        "a range of a file": ([file, "--of", "x", "--range", "0,10"], "--range has no effect beside a file"),
        "a bank of a file": ([file, "--of", "x", "--bank", tmp_path], "--bank has no effect beside a file"),
        "a seed of a file": ([file, "--of", "x", "--seed", "0"], "--seed has no effect beside a file"),
    }
    for name, (argv, expected) in wrong.items():
        try:
            code, told = run(capsys, "neighbours", *argv)
        except SystemExit as stop:  # of argparse
            code, told = stop.code, capsys.readouterr().err
        assert code == 2 and expected in told and "Traceback" not in told, (name, told)


def test_a_part_of_the_shards_is_taken_by_every_door_alike(shards, tmp_path, capsys):
    """embed, neighbours, maps and shape, as evaluations do by --test-select."""
    three = ["--select", "label=cls", "--select", "values=[2]", "--select", "share=0.5"]
    taken = selected(ShardIndex(shards), Selection(label="cls", values=(2,), share=0.5), "x")
    argv = ["pixels:4", shards, "--num-workers", "0", "--to", str(tmp_path / "a.npz")]
    assert prelude.main(["embed", *argv, *three]) in (0, 4)
    whole = np.load(tmp_path / "a.npz")
    assert set(whole["label"].tolist()) == {2} and 0 < len(whole["key"]) <= taken.num_samples < 10
    assert json.loads(str(whole["about"]))["data"]["select"] == {"label": "cls", "values": [2], "share": 0.5}
    known = whole["key"].tolist()
    assert set(known) <= {taken.key(i) for i in range(taken.num_samples)}
    sheet = ["--of", known[0], "--k", "2", "--sheet", str(tmp_path / "near.png")]
    assert prelude.main(["neighbours", str(tmp_path / "a.npz"), *sheet]) == 0
    of_source = [
        "pixels:4",
        "--shards",
        shards,
        "--num-workers",
        "0",
        "--bank",
        str(tmp_path / "bank"),
        "--of",
        known[0],
    ]
    capsys.readouterr()
    assert prelude.main(["neighbours", *of_source, "--k", "50", *three]) == 0
    told = capsys.readouterr().out
    assert f"nearest of {len(known)} images" in told
    encoder = "random:timm:test_vit.r160_in1k"
    to = str(tmp_path / "maps.png")
    assert prelude.main(["maps", encoder, "--images", shards, "--count", "24", "--to", to, *three]) == 0
    assert f"images: {', '.join(known)}" in capsys.readouterr().out
    part = [word.replace("--select", "--test-select") for word in three]
    out = tmp_path / "out"
    assert prelude.main(["shape", "pixels:16", "--test", shards, "--tiles", "2", "--out", str(out), *part]) == 0
    (found,) = (json.loads(path.read_text()) for path in out.glob("*.json"))
    assert found["data"]["test"]["num_samples"] == len(known)
    assert found["data"]["test"]["fingerprint"] == taken.fingerprint
    for mistake, words in (
        (["embed", *argv[:-1], str(tmp_path / "b.npz"), "--select", "share=2"], "--select.share=2 is refused"),
        (
            ["shape", "pixels:16", "--test", shards, "--test-select", "keys=none"],
            "--test-select.keys=none cannot be read",
        ),
        (["neighbours", str(tmp_path / "a.npz"), "--of", known[0], *three], "--select has no effect beside a file"),
    ):
        assert door(lambda mistake=mistake: prelude.main(mistake)) == 2
        assert words in capsys.readouterr().err


def test_shards_of_one_name_are_told_apart_by_their_paths():
    shards, numbers = ["one/a.tar", "two/a.tar", "b.tar"], np.array([0, 1, 2])
    found = Embedded("f.npz", "mean", torch.eye(3), ["1", "1", "1"], shards, numbers, np.arange(3), None, {})
    for name in ("1", "a.tar:1"):
        with pytest.raises(UserError, match="images of f.npz have the key .*; write one as one/a.tar:1.$"):
            queries_among(found, [name])
    rows = [query.row for query in queries_among(found, ["two/a.tar:1", "b.tar:1"])]
    assert rows == [1, 2]
