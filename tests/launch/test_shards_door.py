"""`prelude shards pack`, `info`, `verify` and `peek` as a user gives them."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import tifffile
from PIL import Image

from prelude.data import index_file, remote_index, stored
from prelude.data.packing.images import extension_of
from prelude.data.shards import ShardIndex
from prelude.launch import inspection, prelude
from prelude.launch.exit_codes import door


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRELUDE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    """Two classes of pictures, of which one is there twice."""
    for n in range(24):
        pixels = np.random.default_rng(n).integers(0, 256, (5, 5, 3), np.uint8)
        path = tmp_path / "photos" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC).save(path)
    shutil.copy(tmp_path / "photos" / "a" / "0.png", tmp_path / "photos" / "a" / "copy.png")
    return tmp_path / "photos"


def run(capsys, *argv) -> tuple[int, str, str]:
    code = door(lambda: prelude.main(["shards", *map(str, argv)]))
    told = capsys.readouterr()
    return code, told.out, told.err


def test_pack_tells_what_was_understood_and_what_to_write_next(photos, tmp_path, capsys):
    code, out, err = run(capsys, "pack", photos, "--to", tmp_path / "s", "--short-side", 16, "--val-share", 0.2)
    assert code == 0 and "classes from the names of 2 folders" in err
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    more = ["--to", tmp_path / "more", "--classes", tmp_path / "names.txt"]
    assert "classes from the names of 2 folders" in run(capsys, "pack", photos, *more)[2]
    written = [line.split("'")[1] for line in out.splitlines() if line.startswith("data.shards=")]
    assert [ShardIndex(shards).num_samples for shards in written] == [20, 5]


def test_an_image_that_is_left_out_is_exit_code_4(photos, tmp_path, capsys):
    (photos / "a" / "bad.png").write_bytes(b"garbage")
    code, out, _ = run(capsys, "pack", photos, "--to", tmp_path / "s")
    assert code == 4 and "1 x not an image" in out and "train.left_out.jsonl" in out
    assert run(capsys, "pack", photos, "--to", tmp_path / "s")[:2] == (4, out)  # told again, not packed again


def test_an_image_library_without_a_format_reads_the_others(photos, capsys, monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    monkeypatch.setattr(stored, "installed_formats", stored.installed_formats.__wrapped__)
    assert run(capsys, "info", photos)[0] == 0
    np.save(photos / "a" / "deep.npy", np.zeros((5, 5, 1), np.uint16))
    assert extension_of((photos / "a" / "deep.npy").read_bytes()) == "npy"


@pytest.fixture
def pairs(photos, tmp_path):
    """A shard whose samples hold two images."""
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for n, path in enumerate(sorted(photos.rglob("*.png"))[:4]):
            tar.add(path, f"{n}.left.png")
            tar.add(path, f"{n}.right.png")
    return tmp_path / "pairs.tar"


def test_one_of_several_images_of_a_sample_is_looked_at(pairs, recipe, tmp_path, capsys):
    for action in ("info", "verify"):
        code, out, _ = run(capsys, action, pairs, "--image", "left.png")
        assert code == 0 and "4 x PNG" in out and "data.mean=" in out
        code, _, err = run(capsys, action, pairs)
        assert code == 2 and "hold several images" in err and "--image left.jpg" in err
        code, _, err = run(capsys, action, pairs, "--image", "middle.png")
        assert code == 2 and "without a single .middle.png member" in err and "correct --image, or leave it out" in err
    sheet = ["--to", tmp_path / "sheet.png", "--count", 2]
    for seen_as in ([], ["--config", recipe]):
        code, out, _ = run(capsys, "peek", pairs, *sheet, *seen_as, "--image", "left.png")
        assert code == 0 and "2 images, 1 view each" in out
        code, _, err = run(capsys, "peek", pairs, *sheet, *seen_as)
        assert code == 2 and "hold several images" in err and "as --image left.jpg" in err


def test_shards_of_several_images_get_an_index_file_once_they_are_packed_by_one(pairs, tmp_path, capsys):
    code, _, err = run(capsys, "index", pairs, "--to", tmp_path / "s")
    assert code == 2 and "as in prelude shards pack SHARDS --to DIR --image left.jpg" in err
    assert run(capsys, "pack", pairs, "--to", tmp_path / "s", "--image", "left.png")[0] == 0
    assert run(capsys, "index", tmp_path / "s" / "train-*.tar", "--to", tmp_path / "s")[0] == 0


def test_an_index_of_one_shard_keeps_what_is_said_of_those_beside_it(photos, tmp_path, capsys, caplog):
    to = tmp_path / "s"
    run(capsys, "pack", photos, "--to", to, "--per-shard", 10)
    first, second, third = sorted(to.glob("train-*.tar"))
    written = to / "train.index.npz"
    whole = written.read_bytes()
    assert run(capsys, "index", third, "--to", to)[0] == 0
    assert written.read_bytes() == whole and "no longer" not in caplog.text
    first.unlink()
    with open(second, "ab") as file:
        file.write(bytes(512))
    assert run(capsys, "index", third, "--to", to)[0] == 0
    assert list(index_file.read(written.read_bytes())) == [third.name] and "2 other shards" in caplog.text
    other = tmp_path / "other" / third.name
    other.parent.mkdir()
    other.write_bytes(second.read_bytes())
    assert "is replaced" not in caplog.text and run(capsys, "index", other, "--to", to)[0] == 0
    assert f"told of another {third.name}" in caplog.text


def test_shards_of_one_name_do_not_share_an_index_file(photos, tmp_path, capsys):
    for folder in ("a", "b"):
        run(capsys, "pack", photos, "--to", tmp_path / folder)
    both = [tmp_path / folder / "train-*.tar" for folder in ("a", "b")]
    code, _, err = run(capsys, "index", *both, "--to", tmp_path / "index")
    assert code == 2 and "b/train-000000.tar have the same name" in err and not (tmp_path / "index").exists()


def test_what_has_no_index_file_is_told_by_its_own_name(photos, tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    code, _, err = run(capsys, "index", photos, "--to", tmp_path / "index")
    assert code == 2 and f"{photos} is a folder of images, which needs no index file" in err
    assert f"prelude shards pack {photos} --to DIR" in err
    run(capsys, "pack", photos, "--to", tmp_path / "s")
    monkeypatch.setattr(remote_index, "index_every_label", refuse)
    code, _, err = run(capsys, "index", tmp_path / "s" / "train-*.tar", "--to", tmp_path / "index")
    assert code == 2 and "train-000000.tar cannot be read on" in err and "leave it out of the shards" in err
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--quality", "90"], "--quality has no effect without --short-side"),
        (["--per-shard", "0"], "--per-shard 0 cannot be"),
        (["--val-share", "1.5"], "--val-share 1.5 cannot be"),
        (["--name", "a.b"], "--name 'a.b' cannot be"),
        (["--split", "test=0.2"], "--split 'test=0.2' cannot be"),
        (["--split", "val", "--val-share", "0.2"], "--split 'val' cannot be"),
        (["--split", ""], "--split is empty"),
        (["--name", ""], "--name '' cannot be"),
        (["--root", "x"], "--root has no effect on a folder"),
        (["--split", "test"], "--split test has no effect on"),
        (["--label", "species"], "write one of parent, top, none"),
        (["--classes", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(photos, tmp_path, capsys, arguments, sentence):
    code, _, err = run(capsys, "pack", photos, "--to", tmp_path / "s", *arguments)
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(told) == 1 and sentence in told[0] and "packing" not in err.replace(told[0], "")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("what", ["nowhere", "empty", "a.bin", "photos.tar.gz"])
def test_what_cannot_be_packed_is_told_with_what_can(tmp_path, capsys, what):
    if what == "empty":
        (tmp_path / what).mkdir()
    elif what != "nowhere":
        (tmp_path / what).write_bytes(b"x")
    code, _, err = run(capsys, "pack", tmp_path / what, "--to", tmp_path / "s")
    assert code == 2 and "write a folder of images, a .csv" in err and not (tmp_path / "s").exists()


def test_shards_do_not_go_into_their_own_source(photos, capsys):
    code, _, err = run(capsys, "pack", photos, "--to", photos / "shards")
    assert code == 2 and "lies in the source" in err


def test_info_and_verify_of_a_folder_and_of_its_shards_agree(photos, tmp_path, capsys):
    run(capsys, "pack", photos, "--to", tmp_path / "s", "--per-shard", 10)
    shards = tmp_path / "s" / "train-*.tar"
    ready = set()
    for source in (photos, shards):
        code, out, _ = run(capsys, "info", source)
        assert code == 0 and "30 x 40" in out and "25 x PNG, 3 channels, 8 bits" in out
        assert "2 different, 12 to 13 images each" in out
        ready.add(out.splitlines()[-1])
        code, out, _ = run(capsys, "verify", source, "--to", tmp_path / "found.jsonl")
        assert code == 0 and "2 images in 1 group" in out
        (line,) = map(json.loads, (tmp_path / "found.jsonl").open())
        assert line["kind"] == "byte-identical" and len(line["images"]) == 2
    (line,) = ready  # ready to be given to a run
    mean, std = (json.loads(part.partition("=")[2]) for part in line.split())
    pixels = [np.asarray(Image.open(path)) / 255 for path in photos.rglob("*.png")]
    assert np.allclose(mean, np.mean(pixels, (0, 1, 2)), atol=1e-4)
    assert np.allclose(std, np.std(np.stack(pixels), (0, 1, 2)), atol=1e-4)


@pytest.mark.parametrize("channels", [["--channels", "2"], []], ids=["as asked", "as many as there are"])
def test_info_finds_a_range_among_the_pages_that_are_channels(tmp_path, capsys, channels):
    pages = np.linspace(0, (900, 30000), 64).round().astype(np.uint16).T.reshape(2, 8, 8)
    (tmp_path / "cells").mkdir()
    written = pages if channels else pages[[0, 1, 0]]
    tifffile.imwrite(tmp_path / "cells" / "0.tif", written, photometric="minisblack")
    code, out, _ = run(capsys, "info", tmp_path / "cells", *channels, "--range", "auto")
    assert code == 0 and "data.range=[0,32767]" in out


def test_a_list_that_cannot_or_must_not_be_written_is_refused_before_the_decoding(
    photos, tmp_path, capsys, monkeypatch
):
    run(capsys, "pack", photos, "--to", tmp_path / "s", "--per-shard", 10)
    first, *others = sorted((tmp_path / "s").glob("train-*.tar"))
    before = first.read_bytes()
    monkeypatch.setattr(inspection, "survey", lambda *args, **kwargs: pytest.fail("decoded"))
    code, _, err = run(capsys, "verify", "--to", first, *others)  # a shell's list behind --to
    assert code == 2 and "is a shard, which a list would replace" in err and first.read_bytes() == before
    for name in ("classes.txt", "train.pack.json"):
        kept = (tmp_path / "s" / name).read_bytes()
        code, _, err = run(capsys, "verify", first, "--to", tmp_path / "s" / name)
        assert code == 2 and "is there already and is no list of findings" in err
        assert (tmp_path / "s" / name).read_bytes() == kept
    code, _, err = run(capsys, "verify", first, "--to", tmp_path / "nowhere" / "found.jsonl")
    assert code == 2 and "write a file in a folder that is there" in err


def test_damage_is_exit_code_1(photos, capsys):
    (photos / "a" / "bad.png").write_bytes(b"garbage")
    for action in ("info", "verify"):
        code, out, _ = run(capsys, action, photos)
        assert code == 1 and "not an image at a/bad.png" in out


def test_peek_draws_what_the_objective_sees(photos, recipe, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    code, out, err = run(capsys, "peek", photos, "--to", sheet, "--count", 3)
    assert code == 0 and "photos:" in err
    plain = Image.open(sheet).size
    code, out, _ = run(capsys, "peek", photos, "--config", recipe, "--to", sheet, "--count", 3)
    assert code == 0 and "3 images, 1 view each" in out
    drawn = np.asarray(Image.open(sheet))
    assert drawn.shape[:2] != plain[::-1] and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 100
    run(capsys, "peek", photos, "--config", recipe, "--to", sheet, "--count", 3, "--seed", 1)
    assert not np.array_equal(np.asarray(Image.open(sheet)), drawn)
    code, _, err = run(capsys, "peek", photos, "--to", tmp_path / "sheet.nothing")
    assert code == 2 and "write the name of a .png file" in err
    assert not (tmp_path / "sheet.nothing").exists()
    photo = tmp_path / "of-mine.png"
    Image.new("RGB", (8, 8)).save(photo)
    before = photo.read_bytes()
    code, _, err = run(capsys, "peek", photos, "--to", photo)
    assert code == 2 and "only a .png that peek drew is replaced" in err and photo.read_bytes() == before


def test_a_run_trains_and_is_probed_from_a_folder_in_place(photos, recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    small = ["train.epochs=1", "optimizer.warmup_epochs=0", "data.num_workers=0"]
    trained = prelude.main(["pretrain", "--config", str(recipe), f"run_dir={run_dir}", f"data.shards={photos}", *small])
    assert trained == 0
    labelled = ["--train", str(photos), "--test", str(photos), "--num-workers", "0"]
    assert prelude.main(["knn", str(run_dir), *labelled, "--k", "1"]) == 0
    (result,) = (run_dir / "evaluations").glob("*knn*.json")
    assert json.loads(result.read_text())["data"]["train"]["num_samples"] == 25


def test_an_error_without_a_number_is_told_by_what_it_says(photos, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError("the store is closed")

    run(capsys, "pack", photos, "--to", tmp_path / "s")
    monkeypatch.setattr(inspection, "write_for", refuse)
    code, _, err = run(capsys, "index", tmp_path / "s" / "train-*.tar", "--to", tmp_path / "index")
    assert code == 2 and "cannot be written (the store is closed); choose another folder." in err
