"""Bytes of shards by offset: an image and its label at once, wherever the label lies."""

import random

import pytest

from prelude.data.decode import BadImage
from prelude.data.open_files import OpenFiles

CONTENT = random.Random(0).randbytes(100_000)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "shard.tar").write_bytes(CONTENT)
    return OpenFiles((str(tmp_path / "shard.tar"),))


@pytest.mark.parametrize(
    "image, label",
    [
        ((512, 3000), (4608, 2)),  # behind it
        ((2048, 3000), (512, 7)),  # before it
        ((512, 3000), (512, 3000)),  # the image itself
        ((512, 3000), (600, 10)),  # within it
        ((512, 60_000), (61_440, 3)),  # too far apart to be read at once
        ((70_000, 20), (1024, 3)),
        ((512, 0), (1024, 3)),
    ],
)
def test_an_image_and_its_label(image, label, files):
    found = files.read_both((0, *image), (0, *label))
    assert found == tuple(CONTENT[offset : offset + size] for offset, size in (image, label))


@pytest.mark.parametrize("image, label", [((99_000, 500), (99_900, 200)), ((99_900, 200), (99_000, 500))])
def test_what_lies_beyond_the_end_is_bad(image, label, files):
    with pytest.raises(BadImage, match="the shard has become shorter"):
        files.read_both((0, *image), (0, *label))
