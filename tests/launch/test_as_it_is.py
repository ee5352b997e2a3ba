"""What users name and what is written to them is shown as it is, also where rich would take it for markup or emoji."""

import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from prelude.data import arrays, shapes
from prelude.data.decode import BadImage
from prelude.launch import bank, encoder_report, prelude, pretrain
from prelude.launch.combinations import combinations_of
from prelude.launch.sweeping import Row, print_rows

ODD = "a[new] of [/] :x:"  # a tag that is left out, one that closes nothing, and an emoji


@pytest.fixture(autouse=True)
def wide(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("PRELUDE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    """One image in a class folder."""
    folder = tmp_path / "photos" / ODD.replace("/", "")
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "0.png")
    return tmp_path / "photos"


def test_what_packing_says(photos, tmp_path, monkeypatch, capsys):
    def missing():
        raise BadImage("needs prelude-ssl[tiff]")

    monkeypatch.setattr(arrays, "_tifffile", missing)
    (inside,) = photos.iterdir()
    tifffile.imwrite(inside / "1.tif", np.zeros((8, 8, 3), np.float32), photometric="rgb")
    to = tmp_path / "to" / ODD.replace("/", "")
    prelude.main(["shards", "pack", str(photos), "--to", str(to)])
    told = capsys.readouterr().out
    assert "1 x packed, but it needs prelude-ssl[tiff]" in told and f"1, in {to}/classes.txt" in told


def test_what_a_look_at_shards_says(photos, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    (inside,) = photos.iterdir()
    prelude.main(["shards", "verify", str(photos)])
    assert "pip install 'prelude-ssl[duplicates]'" in capsys.readouterr().out


def test_where_a_bank_is(tmp_path, capsys):
    assert bank.main([str(tmp_path / ODD)]) == 0
    assert f"{tmp_path / ODD}: 0 entries" in capsys.readouterr().out


def test_why_an_encoder_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setattr(encoder_report, "_refusal", lambda *_: ODD)
    assert encoder_report.main("resnet18", ["encoder.image_size=32"]) == 1  # none can use it
    assert ODD in capsys.readouterr().out


def test_what_a_sweep_went_through(recipe, capsys):
    (combination,) = combinations_of(str(recipe), ["seed=[1]"], None)
    combination.values["seed"] = ODD
    print_rows([Row(combination, 0, None, {}, False)])
    assert ODD in capsys.readouterr().out


def test_where_quickstart_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "write_shards", lambda *_, **__: None)
    monkeypatch.setattr(pretrain, "main", lambda _: 3)
    assert prelude.main(["quickstart", "--run-dir", str(tmp_path / ODD)]) == 3
    assert f"images of shapes in {tmp_path / ODD}/shapes" in capsys.readouterr().err
