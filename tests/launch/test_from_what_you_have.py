"""From a folder, a table or a Parquet file to a probed encoder, by the commands that docs/data.md names, as they stand
there; only the training is made small."""

import csv
import json
import os
import shlex
import subprocess

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from runs import BIN, LAUNCHED, ROOT
from servers import Server, serving

from prelude.data.shapes import paint
from prelude.launch import prelude

TINY = [
    "encoder.name=resnet18", "encoder.image_size=32", "encoder.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}",
    "objective.projector=[16, 16]", "train.global_batch=8", "train.epochs=1", "optimizer.warmup_epochs=0",
    "data.num_workers=0", "log.pictures_every_steps=0",
]  # fmt: skip


def commands() -> list[list[str]]:
    """Of the first section of the page, as a shell would hand them over."""
    section = (ROOT / "docs" / "data.md").read_text().partition("## From what you have")[2].partition("\n### ")[0]
    return [shlex.split(line)[1:] for line in section.splitlines() if line.startswith("prelude ")]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What somebody may have: photos/CLASS/N.png, photos.csv and photos.parquet, of the same 40 pictures."""
    here = tmp_path_factory.mktemp("here")
    pictures, numbers = paint("train", np.arange(40), image_size=32)
    rows = []
    for n, (picture, number) in enumerate(zip(pictures, numbers.tolist(), strict=True)):
        path = here / "photos" / f"kind {number % 2}" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        rows.append((str(path.relative_to(here)), path.parent.name, f"p{n // 2}"))
    with open(here / "photos.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "species", "patient"), *rows])
    content = {"image": [(here / path).read_bytes() for path, *_ in rows], "label": [species for _, species, _ in rows]}
    pyarrow.parquet.write_table(pyarrow.table(content), here / "photos.parquet")
    return here


def results(folder) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.glob("runs/mine/evaluations/*.json")]


def test_the_page_has_the_commands_that_are_tried_here():
    assert [command[:2] for command in commands()] == [
        ["shards", "pack"], ["pretrain", "--config"], ["probe", "runs/mine"],
        ["shards", "pack"], ["shards", "pack"], ["probe", "timm:resnet50"],
    ]  # fmt: skip


def test_from_a_folder_a_table_and_a_parquet_file_to_a_probed_encoder(here, monkeypatch, capfd, run_command):
    monkeypatch.chdir(here)
    pack, pretrain, probe, of_table, of_parquet, _ = commands()
    assert prelude.main(pack) == 0, capfd.readouterr()
    assert run_command([*pretrain, *TINY], here) == 0
    assert prelude.main([*probe, "--num-workers", "0"]) == 0
    assert {result["source"] for result in results(here)} == {"runs/mine", "random:runs/mine"}
    found = {result["data"]["train"]["num_samples"] for result in results(here)}
    for command in (of_table, of_parquet):
        to = here / f"of {command[2]}"
        command[command.index("--to") + 1] = str(to)
        assert prelude.main(command) == 0
        shards = {name: sorted(map(str, to.glob(f"{name}-*.tar"))) for name in ("train", "val")}
        words = ["knn", "runs/mine", "--num-workers", "0", "--out", str(to / "results")]
        assert prelude.main([*words, "--train", *shards["train"], "--test", *shards["val"]]) == 0
        (written,) = (to / "results").glob("*.json")
        found.add(json.loads(written.read_text())["data"]["train"]["num_samples"])
    assert found == {36}
    content = {path.name: path.read_bytes() for path in (here / "shards").iterdir()}
    with serving(Server(files=content)) as server:
        urls = [f"{server.url}/{name}-000000.tar" for name in ("train", "val")]
        words = ["knn", "runs/mine", "--num-workers", "0", "--out", "remote", "--cache-dir", str(here / "kept")]
        assert prelude.main([*words, "--train", urls[0], "--test", urls[1]]) == 0
    (written,) = (here / "remote").glob("*.json")
    remote = json.loads(written.read_text())["data"]["train"]
    assert remote["shards"] == urls[0] and remote["fingerprint"] == results(here)[0]["data"]["train"]["fingerprint"]


@pytest.fixture
def run_command(tmp_path):
    def run(words, cwd) -> int:
        env = os.environ | LAUNCHED
        done = subprocess.run([str(BIN / "prelude"), *words], cwd=cwd, env=env, capture_output=True, timeout=240)
        print(done.stderr.decode()[-2000:])
        return done.returncode

    return run
