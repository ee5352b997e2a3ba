"""What a data set is like, against numpy on the decoded images and pictures made to be alike."""

import io

import numpy as np
import pytest
from PIL import Image

from prelude.data.shards import ShardIndex
from prelude.data.survey import near_pairs, spread, survey


def smooth(number: int, height: int = 64, width: int = 80) -> np.ndarray:
    """A picture of low frequencies, as photographs are, that only this number has."""
    small = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def saved(pixels: np.ndarray, format: str, **settings) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **settings)
    return out.getvalue()


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    plain = [saved(smooth(n), "PNG") for n in range(12)]
    return [
        *plain,
        plain[3],  # 12: the same bytes
        saved(smooth(5), "JPEG", quality=80),  # 13: the same picture, coded otherwise
        saved(np.asarray(Image.fromarray(smooth(7)).resize((60, 48))), "PNG"),  # 14: and smaller
        saved(smooth(20)[:, :, 0], "PNG"),  # 15: grey
        saved((smooth(21)[:, :, 0].astype(np.uint16) << 8) + 7, "PNG"),  # 16: 16 bits
        b"garbage",  # 17
        plain[1][:400],  # 18
    ]


@pytest.fixture
def index(tmp_path, write_tar, contents) -> ShardIndex:
    members = [(f"{n:03}.{e}", c) for n, i in enumerate(contents) for e, c in (("png", i), ("cls", b"%d" % (n % 3)))]
    return ShardIndex(str(write_tar(tmp_path / "0.tar", members)), "cls")


@pytest.mark.parametrize("threads", [1, 3])
def test_colours_sizes_forms_and_classes(index, contents, threads):
    found = survey(index, spread(index.num_samples, 10**6), threads=threads)
    assert [sample for sample, _ in found.undecodable] == [17, 18] and found.num_images == 17
    pixels = [smooth(n).reshape(-1, 3) / 255 for n in [*range(12), 3]]
    pixels += [
        np.asarray(Image.open(io.BytesIO(contents[n])).convert("RGB")).reshape(-1, 3) / 255 for n in (13, 14, 15)
    ]
    pixels.append(np.repeat(smooth(21)[:, :, :1], 3, 2).reshape(-1, 3) / 255)
    mean = np.mean([p.mean(0) for p in pixels], 0)
    std = np.sqrt(np.mean([(p**2).mean(0) for p in pixels], 0) - mean**2)
    assert np.allclose(found.mean, mean, atol=2e-3) and np.allclose(found.std, std, atol=2e-3)
    assert found.forms == {("PNG", 3, 8, 1): 14, ("JPEG", 3, 8, 1): 1, ("PNG", 1, 8, 1): 1, ("PNG", 1, 16, 1): 1}
    assert sorted(set(found.sizes)) == [(48, 60), (64, 80)]
    assert found.classes == {str(c): len([n for n in range(17) if n % 3 == c]) for c in range(3)}
    assert not found.identical and not found.near


def test_duplicates_by_bytes_and_by_looks(index):
    found = survey(index, spread(index.num_samples, 10**6), duplicates=True)
    assert found.identical == [[3, 12]]
    assert found.near == [(5, 13), (7, 14)]


def test_near_pairs_are_all_pairs_that_differ_in_three_bits():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 400, np.uint64)
    for n in range(100, 400):  # near an earlier one, by up to six bits
        flips = generator.choice(64, generator.integers(1, 7), replace=False)
        hashes[n] = int(hashes[n - 100]) ^ sum(1 << int(bit) for bit in flips)
    expected = [
        (a + 1000, b + 1000)
        for a in range(400)
        for b in range(a + 1, 400)
        if (int(hashes[a]) ^ int(hashes[b])).bit_count() <= 3
    ]
    assert near_pairs(range(1000, 1400), hashes) == expected and len(expected) > 100


def test_of_many_that_look_the_same_the_first_stands_for_all():
    hashes = np.array([5, 7, 5, 5, 2**40 - 1], np.uint64)
    assert near_pairs(range(5), hashes) == [(0, 1), (0, 2), (0, 3)]


def test_a_spread_covers_the_whole():
    assert spread(5, 100).tolist() == [0, 1, 2, 3, 4]
    assert spread(1001, 3).tolist() == [0, 500, 1000]
