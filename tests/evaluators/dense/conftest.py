import io

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from prelude.evaluators.dense.places import Places


def places_of(values, masks, grid, fingerprint="shards") -> Places:
    ids = torch.arange(len(values))
    return Places(values.flatten(1), masks, ids, fingerprint, "tokens", {}, None, grid)


def made(num_images, seed, num_classes=3, grid=(3, 4), width=6, size=(9, 16), noise=1.5):
    """Images whose masks are blocks of a class for each place, and features that say which, with noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    of_place = torch.randint(num_classes, (num_images, *grid), generator=generator)
    values = centres[of_place] + noise * torch.randn(num_images, *grid, width, generator=generator)
    rows = (torch.arange(size[0]) * grid[0]) // size[0]
    columns = (torch.arange(size[1]) * grid[1]) // size[1]
    masks = of_place[:, rows][:, :, columns].to(torch.uint8)
    moved = masks.roll(1, 2)  # so that places hold pixels of several classes
    return places_of(values, moved, grid)


@pytest.fixture
def places():
    return made


@pytest.fixture
def as_places():
    return places_of


def encoded(array, **options) -> bytes:
    content = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(content, "PNG", **options)
    return content.getvalue()


@pytest.fixture
def png():
    return encoded


@pytest.fixture
def masked_shard(tmp_path):
    """Writes images with their masks' bytes as a shard, and says where."""

    def write(name, masks, extension="png", size=(16, 16)):
        path = tmp_path / f"{name}.tar"
        generator = np.random.default_rng(len(masks))
        with TarWriter(str(path), encoder=False) as tar:
            for number, mask in enumerate(masks):
                image = io.BytesIO()
                Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(image, "JPEG")
                members = {"__key__": f"{number:04d}", "jpg": image.getvalue()}
                tar.write(members | ({} if mask is None else {extension: mask}))
        return str(path)

    return write
