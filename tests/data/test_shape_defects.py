"""Shapes with drawn defects: where they are, and on what they depend."""

import io

import numpy as np
import pytest
import webdataset
from PIL import Image

from prelude.data.errors import UserError
from prelude.data.shape_defects import paint_defects, write_defects
from prelude.data.shapes import paint


def test_pictures_differ_from_those_without_defects_where_masks_say_so():
    indices = np.arange(60)
    pictures, labels, masks = paint_defects("test", indices, image_size=64)
    plain, same = paint("test", indices, image_size=64)
    assert (labels == same).all() and set(np.unique(masks)) == {0, 1}
    has = masks.any((1, 2))
    assert (has == ((indices // 10) % 2 == 1)).all()
    assert (pictures[~has] == plain[~has]).all()
    changed = np.abs(pictures.astype(int) - plain).max(-1)
    near = np.lib.stride_tricks.sliding_window_view(np.pad(masks, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2)).any((3, 4))
    assert (changed[~near] == 0).all()
    shares = [(changed[i][masks[i] == 1] > 4).mean() for i in np.flatnonzero(has)]
    assert np.mean(shares) > 0.8 and 0.005 < masks[has].mean() < 0.1


def test_a_sample_depends_on_its_index_alone(tmp_path):
    pictures, _, masks = paint_defects("test", np.arange(20))
    alone, _, mask = paint_defects("test", np.array([15]))
    assert (alone[0] == pictures[15]).all() and (mask[0] == masks[15]).all()
    path = write_defects(tmp_path, "test", 20)
    assert path.read_bytes() == write_defects(tmp_path / "again", "test", 20).read_bytes()
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert len(samples) == 20 and ["defect.png" in sample for sample in samples] == [False] * 10 + [True] * 10
    assert (np.asarray(Image.open(io.BytesIO(samples[15]["defect.png"]))) == masks[15]).all()
    with pytest.raises(UserError, match="train, test"):
        write_defects(tmp_path, "val", 20)
