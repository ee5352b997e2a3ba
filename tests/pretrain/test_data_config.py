"""What a config may say of its data: shards or a mix, and what is taken of them."""

import io
import json

import numpy as np
import pytest
from packed_shards import grey, write_tar

from prelude.data.batch import View, ViewPlan, VolumePlan
from prelude.data.errors import UserError
from prelude.launch.training import data_of, loader_of, seen_as
from prelude.pretrain import overrides
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.objective import Options
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.resume import changed_settings

BASE = {
    "run_dir": "r",
    "encoder": {"name": "none", "image_size": 8},
    "objective": {"name": "toy"},
    "train": {"epochs": 1, "global_batch": 4},
    "optimizer": {"lr": 0.1},
}
MIX = ["data.mix.photos.shards=a.tar", "data.mix.photos.weight=2", "data.mix.x-ray.shards=[b.tar, c.tar]",
       "data.mix.x-ray.weight=0.5", "data.mix.x-ray.select.share=0.1"]  # fmt: skip


def config_of(*given: str):
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for one in given:
        overrides.apply(values, one, Keys())
    return validate_config(values, "a test")


def test_a_mix_is_written_below_names():
    data = data_of(config_of(*MIX).data)
    assert data["photos"].shards == "a.tar" and data["photos"].weight == 2 and data["photos"].select is None
    assert data["x-ray"].shards == ["b.tar", "c.tar"] and data["x-ray"].select.share == 0.1
    assert config_of("data.shards=a.tar").data.mix == {}


def test_a_selection_is_written_below_data():
    config = config_of("data.shards=a.tar", "data.select.label=json:kind", "data.select.values=[3, cat]",
                       "data.image=left.jpg")  # fmt: skip
    select = seen_as(config.data)["select"]
    assert (select.label, select.values, seen_as(config.data)["image"]) == ("json:kind", [3, "cat"], "left.jpg")


VIEWS = ViewPlan((View((8, 8)),), volumes=VolumePlan((4, 4, 4)))


@pytest.fixture
def of_both_kinds(tmp_path, monkeypatch):
    """of_both_kinds(images, volumes, *settings): a config of shards with these members."""
    monkeypatch.setenv("PRELUDE_CACHE", str(tmp_path / "cache"))

    def config(images: dict, volumes: dict, *given: str):
        shards = write_tar(tmp_path / "images.tar", images), write_tar(tmp_path / "volumes.tar", volumes)
        data = [f"data.shards={shards[0]}", f"data.volumes.shards={shards[1]}", "data.num_workers=0"]
        return config_of(f"run_dir={tmp_path}", *data, *given)

    return config


def dark_volume(side: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((side,) * 3, np.uint8))
    return file.getvalue()


def test_images_and_volumes_above_the_limit_of_pixels_are_bad_samples_and_are_listed(of_both_kinds, tmp_path):
    """Of 100 and 64 pixels, and of 400 and 512."""
    images, volumes = {"a.ppm": grey(10), "b.ppm": grey(20)}, {"c.npy": dark_volume(4), "d.npy": dark_volume(8)}
    config = of_both_kinds(images, volumes, "data.max_pixels=300")
    loader = loader_of(config, VIEWS)
    batches = [next(loader) for _ in range(8)]
    assert {(batch.of_volumes, sample) for batch in batches for sample in batch.sample_ids.tolist()} == {
        (False, 0),
        (True, 0),
    }
    listed = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in listed} == {("b", "too many pixels"), ("d", "too many pixels")}
    assert loader.bad.num_bad == len(listed) and loader.bad.num_read == 8 * 4 + len(listed)


@pytest.mark.parametrize("damaged", ["images", "volumes"])
def test_shards_that_have_lost_more_than_the_share_of_bad_samples_are_refused(of_both_kinds, damaged):
    sound = {"images": {"a.ppm": grey(8)}, "volumes": {"a.npy": dark_volume(4)}}
    members = sound | {damaged: sound[damaged] | {"b.txt": b""}}
    assert loader_of(of_both_kinds(*members.values(), "data.max_bad_share=0.5"), VIEWS).num_samples == 2
    with pytest.raises(UserError, match="1 sample .* lost or damaged, beside 1 sound one.*raise data.max_bad_share"):
        loader_of(of_both_kinds(*members.values(), "data.max_bad_share=0.4"), VIEWS)


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "data is missing"),
        (["data.channels=3"], "data: shards is missing; write data.shards=PATTERN, or a mapping data.mix"),
        (
            [*MIX, "data.shards=a.tar"],
            "data: shards and mix both say .*; write data.shards=null or data.mix={}",
        ),
        (MIX[:2], "data: mix has one data set, and nothing to mix it with; write it as data.shards"),
        ([*MIX, "data.mix.photos.weight=0"], "data.mix.photos.weight=0 is refused: write a number above 0"),
        ([*MIX, "data.mix.photos.weight=-1"], "data.mix.photos.weight=-1 is refused: write a number above 0"),
        ([*MIX, "data.mix.photos.weight=.nan"], "data.mix.photos.weight=nan is refused: write a finite number above 0"),
        ([*MIX, "data.mix.photos.weight=.inf"], "data.mix.photos.weight=inf is refused: write a finite number above 0"),
        ([*MIX, "data.mix.photos.weight=true"], "data.mix.photos.weight=true is refused: write a number above 0"),
        (
            [*MIX, "data.mix.photos.wieght=2"],
            "photos.wieght does not exist; did you mean data.mix.photos.weight",
        ),
        ([*MIX, "data.mix.third.shards=c.tar"], "data.mix.third.weight is missing: write a number above 0"),
        ([*MIX, "data.mix.third.weight=1"], "data.mix.third.shards is missing: write a path or pattern, or a list"),
        ([*MIX, "data.mix.third=c.tar"], "data.mix.third='c.tar' is refused: write settings below it: shards, weight"),
        (
            [*MIX[2:], 'data.mix={"a b": {shards: a.tar, weight: 1}, c: {shards: c.tar, weight: 1}}'],
            "data set 'a b'",
        ),
        ([*MIX, "data.select.share=0.5"], "select has no effect beside mix; write data.mix.NAME.select"),
        ([*MIX, "data.image=left.jpg"], "image has no effect beside mix; write data.mix.NAME.image"),
        ([*MIX, "data.num_samples=7"], "num_samples has no effect beside mix"),
        ([*MIX, "data.mix.photos.select.share=1"], "data.mix.photos.select.share=1 is refused: write .* below 1"),
        (["data.shards=a", "data.select={}"], "data.select: write keys, label with values, or share"),
        (["data.shards=a", "data.select.label=cls"], "data.select: label says where to look and values for what"),
        (
            ["data.shards=a", "data.select.seed=3", "data.select.keys=k"],
            "data.select: seed has no effect",
        ),
        (["data.shards=a", "data.select.portion=3"], "data.select.portion does not exist"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(given, said):
    with pytest.raises(UserError, match=said):
        config_of(*given)


def test_a_resume_knows_the_data_by_their_content_and_the_mix_by_its_weights():
    then, moved = (
        config_of(*MIX),
        config_of(*MIX, "data.mix.photos.shards=elsewhere/a.tar", "data.mix.x-ray.select.seed=3"),
    )
    assert changed_settings(then.model_dump(mode="json"), moved, Options) == []
    heavier = config_of(*MIX, "data.mix.photos.weight=3")
    assert changed_settings(then.model_dump(mode="json"), heavier, Options) == ["data.mix.photos.weight: 2.0 -> 3.0"]
    before = config_of("data.shards=a").model_dump(mode="json")
    for key in ("mix", "select", "image"):
        del before["data"][key]
    assert changed_settings(before, config_of("data.shards=a"), Options) == []
