"""What lies beside a `.npy` of features is replaced only where an earlier one of that name has left it."""

import pytest

from prelude.data.shapes import write_shards
from prelude.launch import prelude
from prelude.launch.exit_codes import door


@pytest.fixture(scope="module")
def embed(tmp_path_factory):
    """`embed()`: writes `folder/f.npy` of a few shapes anew; returns the exit code."""
    folder = tmp_path_factory.mktemp("beside")
    write_shards(folder / "shapes", "train", 12, image_size=16)

    def embed() -> int:
        (folder / "f.npy").unlink(missing_ok=True)
        command = ["embed", "pixels:4", f"{folder}/shapes/train-*.tar", "--to", f"{folder}/f.npy", "--num-workers", "0"]
        return door(lambda: prelude.main(command))

    embed.folder = folder
    return embed


def test_its_own_are_replaced(embed):
    assert embed() == 0 and embed() == 0
    assert (embed.folder / "f.keys.csv").is_file() and (embed.folder / "f.about.json").is_file()


@pytest.mark.parametrize("ending", [".keys.csv", ".about.json"])
@pytest.mark.parametrize("content", ["name,age\n", "[1]", None])
def test_a_folder_or_a_file_of_other_kind_is_refused_before_anything_is_encoded(embed, ending, content, capsys):
    there = embed.folder / f"f{ending}"
    there.unlink(missing_ok=True)
    there.mkdir() if content is None else there.write_text(content)
    assert embed() == 2
    assert f"f{ending} is there already and would be replaced; write another --to" in capsys.readouterr().err
    assert content is None or there.read_text() == content
    there.rmdir() if content is None else there.unlink()
