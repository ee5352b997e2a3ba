"""`data.range: auto` is found once, by what a run learns from, and is what its evaluations read images by."""

import io
import tarfile

import numpy as np
import pytest
import yaml
from PIL import Image

from prelude.checkpoints.store import recorded_config
from prelude.data import shards
from prelude.data.errors import UserError
from prelude.evaluators.comparing.run_record import is_finished_as
from prelude.evaluators.judging import read_as
from prelude.evaluators.labelled import Labelled
from prelude.launch import prelude
from prelude.objectives import options_for
from prelude.pretrain import distributed
from prelude.pretrain.recipes import load_config


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Shards of 16-bit images whose brightest values need 12 and 14 bits."""
    folder = tmp_path_factory.mktemp("deep")

    def image(highest: int, n: int) -> bytes:
        values = np.linspace(0, highest, 256).round().astype(np.uint16).reshape(16, 16)
        file = io.BytesIO()
        Image.fromarray(np.roll(values, n, 0)).save(file, "PNG")
        return file.getvalue()

    for bits in (12, 14):
        with tarfile.open(folder / f"of-{bits}.tar", "w") as tar:
            for n in range(16):
                for kind, content in (("png", image(2**bits - 9, n)), ("cls", str(n % 2).encode())):
                    member = tarfile.TarInfo(f"{n}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def test_test_images_are_read_by_the_range_of_train(deep):
    sets = (str(deep / f"of-{bits}.tar") for bits in (12, 14))
    assert [index.value_range for index in Labelled(*sets, "cls", value_range="auto").opened()] == 2 * [(0, 4095)]
    alone = Labelled("", str(deep / "of-14.tar"), "cls", value_range="auto", one_set=True)
    assert [index.value_range for index in alone.opened()] == 2 * [(0, 2**14 - 1)]


def test_a_run_records_what_was_found_and_the_same_command_goes_on_by_it(deep, recipe, tmp_path, monkeypatch):
    values = yaml.safe_load(recipe.read_text())
    values["data"] |= {"shards": str(deep / "of-12.tar"), "range": "auto", "num_workers": 0, "shuffle": {}}
    values["run_dir"], values["train"]["epochs"] = str(tmp_path / "run"), 2
    (tmp_path / "auto.yaml").write_text(yaml.safe_dump(values))
    argv = ["pretrain", "--config", str(tmp_path / "auto.yaml")]
    assert prelude.main(argv) == 0
    assert recorded_config(tmp_path / "run")["data"]["range"] == [0, 4095]
    beside = [str(tmp_path / "auto.yaml"), str(tmp_path / "run")]  # as in `prelude compare`
    assert read_as(beside[1:], None)[0] == read_as(beside, None)[0] == [0, 4095]
    config = load_config(argv[-1], [], options_for)
    assert is_finished_as(config, options_for("mae"))  # a sweep does not train it again
    # As in a version that looks for it in another way
    monkeypatch.setattr(shards, "resolved", lambda _, wanted: (0.0, 255.0) if wanted == "auto" else tuple(wanted))
    assert prelude.main(argv) == 0  # the end of the run is there, and `auto` is no change
    assert recorded_config(tmp_path / "run")["data"]["range"] == [0, 4095]


def test_a_look_at_shards_says_that_they_stay_dark(deep, caplog):
    assert prelude.main(["shards", "info", str(deep / "of-12.tar")]) == 0
    assert "values up to 4087 only, so all stay dark" in caplog.text and "write data.range=[0,4095]" in caplog.text
    caplog.clear()
    assert prelude.main(["shards", "info", str(deep / "of-12.tar"), "--range", "auto"]) == 0
    assert "dark" not in caplog.text


def test_a_range_is_not_left_out_because_a_run_began_without(deep, recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    values["data"] |= {"shards": str(deep / "of-12.tar"), "num_workers": 0, "shuffle": {}}
    values["run_dir"], values["train"]["epochs"] = str(tmp_path / "run"), 2
    (tmp_path / "dark.yaml").write_text(yaml.safe_dump(values))
    argv = ["pretrain", "--config", str(tmp_path / "dark.yaml")]
    assert prelude.main(argv) == 0
    with pytest.raises(
        UserError, match=r"belongs to a run with other settings \(data.range: None -> \[0.0, 4095.0\]\)"
    ):
        prelude.main([*argv, "data.range=auto"])
    distributed.stop()
    elsewhere = [f"run_dir={tmp_path / 'other'}", f"resume.checkpoint={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="is no complete checkpoint"):
        prelude.main([*argv, "data.range=auto", *elsewhere])
    distributed.stop()
