"""Images of other channels and depths than RGB of 8 bits: decoded as other libraries write and read them, cut and
resized without loss, and in the same order as all others."""

import io
import struct

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from prelude.data.batch import View, ViewPlan
from prelude.data.decode import MAX_PIXELS, BadImage, OtherChannels, decode, deep_values
from prelude.data.errors import UserError
from prelude.data.loader import Loader, build_loader, one_pass
from prelude.data.order import Shuffle
from prelude.data.shards import ShardIndex
from prelude.data.survey import survey
from prelude.data.value_range import channels_of
from prelude.data.views import read_views
from prelude.evaluators.dense.masks import read_mask

tifffile = pytest.importorskip("tifffile")
FULL = (0, 65535)


def noise(*shape, dtype=np.uint16, seed=0) -> np.ndarray:
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    drawn = np.random.default_rng(seed).random(shape) * top
    return drawn.astype(dtype)


def npy(values) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def tiff(values, **how) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, values, **how)
    return out.getvalue()


def jpeg(pixels, **how) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **how)
    return out.getvalue()


def scaled(values, value_range=FULL) -> np.ndarray:
    low, high = value_range
    return np.clip((values.astype(np.float64) - low) / (high - low) * 255, 0, 255)


def same(pixels, values, value_range=FULL):
    assert pixels.dtype == np.float32 and pixels.flags.c_contiguous and pixels.flags.writeable
    np.testing.assert_allclose(pixels, scaled(values, value_range), atol=1e-4)


# ---- decoding


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64, ">u2", "<f2"])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_an_array_is_read_whatever_its_type_and_the_place_of_its_channels(dtype, channels):
    values = np.random.default_rng(0).integers(0, 200, (6, 7, channels)).astype(dtype)
    layouts = [values, values.transpose(2, 0, 1), np.asfortranarray(values)]
    for layout in [*layouts, *([values[:, :, 0]] if channels == 1 else [])]:
        pixels = decode(npy(layout), value_range=(0, 250), channels=channels)
        same(pixels, values, (0, 255) if values.dtype == np.uint8 else (0, 250))


@pytest.mark.parametrize("compression", [None, "deflate", "lzw", "zstd"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("shape, tile", [((19, 21, 4), None), ((40, 33, 5), (16, 16))])
def test_a_tiff_of_many_channels_is_what_was_written(compression, planes, shape, tile):
    values = noise(*shape)
    written = values if planes == "contig" else values.transpose(2, 0, 1)
    image = tiff(written, planarconfig=planes, compression=compression, tile=tile, photometric="minisblack")
    same(decode(image, value_range=FULL, channels=shape[2]), values)


def test_grey_pages_are_channels_where_there_are_as_many():
    values = noise(3, 9, 8)
    image = tiff(values, photometric="minisblack")
    same(decode(image, value_range=FULL, channels=3), values.transpose(1, 2, 0))
    same(decode(image, value_range=FULL, channels=1), values[0][:, :, None])
    with pytest.raises(BadImage, match="1 channel and not 2"):
        decode(image, value_range=FULL, channels=2)


@pytest.mark.parametrize("channels", [3, 4])
def test_colour_pngs_of_16_bits_keep_them_with_a_range_and_their_upper_half_without(channels):
    values = noise(9, 8, channels)
    order = [2, 1, 0, 3][:channels]  # OpenCV writes blue first
    image = cv2.imencode(".png", values[:, :, order])[1].tobytes()
    same(decode(image, value_range=FULL, channels=channels), values)
    assert np.array_equal(decode(image, channels=channels), values >> 8)
    same(decode(image, value_range=FULL), values[:, :, :3])


def test_colour_tiffs_of_16_bits_keep_them():
    values = noise(9, 8, 3)
    same(decode(tiff(values, photometric="rgb"), value_range=FULL), values)


@pytest.mark.parametrize("channels", [3, 4])
def test_colour_tiffs_of_16_bits_are_what_pngs_are_without_alpha_and_as_grey(channels):
    values = noise(9, 8, channels)
    image = tiff(values, photometric="rgb", extrasamples=["unassalpha"] if channels == 4 else None)
    same(decode(image, value_range=FULL), values[:, :, :3])
    luma = (values[:, :, :3] @ np.array([0.299, 0.587, 0.114])).round()[:, :, None]
    assert np.abs(decode(image, value_range=FULL, channels=1) - scaled(luma)).max() <= 255 / 65535 + 1e-4


@pytest.mark.parametrize("how", [{}, {"tile": (16, 16)}, {"compression": "zlib"}], ids=["plain", "tiles", "deflated"])
@pytest.mark.parametrize("channels", [3, 4])
def test_planes_of_16_bits_are_read_without_a_range_too(channels, how):
    values = noise(20, 24, channels)
    extra = ["unassalpha"] if channels == 4 else None
    planes = tiff(values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", extrasamples=extra, **how)
    assert np.array_equal(decode(planes), values[:, :, :3] >> 8)
    same(decode(planes, value_range=FULL), values[:, :, :3])


def test_planes_of_other_colours_are_refused():
    with pytest.raises(OtherChannels, match="4 channels and not 3"):
        decode(tiff(noise(4, 9, 8), photometric="separated", planarconfig="separate"))


TURNED_TIFFS = {
    "grey": noise(9, 8, dtype=np.uint8), "grey of 16 bits": noise(9, 8), "colour": noise(9, 8, 3, dtype=np.uint8),
    "colour of 16 bits": noise(9, 8, 3), "pages": noise(2, 9, 8), "floats": noise(9, 8, dtype=np.float32),
}  # fmt: skip


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("name", TURNED_TIFFS)
def test_the_orientation_of_a_tiff_is_ignored(name, orientation):
    values = TURNED_TIFFS[name]
    how = {"photometric": "rgb" if values.shape[-1] == 3 else "minisblack"}
    plain, turned = tiff(values, **how), tiff(values, extratags=[(274, 3, 1, orientation, True)], **how)
    xmp = b'<x tiff:Orientation="%d"/>' % orientation
    told = tiff(values, extratags=[(700, 1, len(xmp), xmp, True)], **how)
    for value_range in [(0, 1)] if name == "floats" else [None, FULL]:
        for image in (turned, told):
            assert np.array_equal(decode(image, value_range=value_range), decode(plain, value_range=value_range))
    if name in ("grey", "grey of 16 bits"):
        assert np.array_equal(read_mask(turned, 100), values)


def test_opacity_says_nothing_of_black_and_white():
    values = noise(9, 8, 4) >> 4
    values[:, :, 3] = 65535
    png = cv2.imencode(".png", values[:, :, [2, 1, 0, 3]])[1].tobytes()
    for image in (png, tiff(values, photometric="rgb", extrasamples=["unassalpha"])):
        assert np.array_equal(deep_values(image), values[:, :, :3])
    infrared = tiff(values, photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(OtherChannels):
        decode(infrared, value_range=FULL)
    assert np.array_equal(deep_values(infrared), values)
    stains = tiff(values, photometric="minisblack", planarconfig="contig")
    assert np.array_equal(deep_values(stains), values)  # a fourth channel like others


def test_one_channel_is_grey_and_colour_becomes_luma():
    photo = cv2.GaussianBlur(noise(64, 48, 3, dtype=np.uint8), (0, 0), 3)
    luma = photo @ np.array([0.299, 0.587, 0.114])
    for image in (jpeg(photo, quality=100, subsampling=0), cv2.imencode(".png", photo[:, :, ::-1])[1].tobytes()):
        pixels = decode(image, channels=1)
        assert pixels.shape == (64, 48, 1) and np.abs(pixels[:, :, 0] - luma).max() <= 2.5
    deep = noise(9, 8)
    png = cv2.imencode(".png", deep)[1].tobytes()
    same(decode(png, value_range=FULL, channels=1), deep[:, :, None])
    same(decode(cv2.imencode(".png", noise(9, 8, 3)[:, :, ::-1])[1].tobytes(), value_range=FULL, channels=1),
         (noise(9, 8, 3) @ np.array([0.299, 0.587, 0.114])).round()[:, :, None])  # fmt: skip


def test_alpha_is_a_channel_where_four_are_asked_for():
    values = noise(9, 8, 4, dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    assert np.array_equal(decode(out.getvalue(), channels=4), values)


FIVE = noise(9, 9, 5)


@pytest.mark.parametrize(
    "image, there",
    [
        (npy(FIVE), 5),
        (tiff(FIVE, photometric="minisblack", planarconfig="contig"), 5),
        (jpeg(noise(9, 9, 3, dtype=np.uint8)), 3),
    ],
)
@pytest.mark.parametrize("wanted", [2, 4])
def test_another_number_of_channels_is_a_bad_image_that_says_so(image, there, wanted):
    with pytest.raises(BadImage, match=f"{there} channels and not {wanted}"):
        decode(image, channels=wanted, value_range=FULL)


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float32])
def test_values_without_a_natural_range_need_one(dtype):
    with pytest.raises(BadImage, match="no data.range"):
        decode(npy(noise(6, 7, 4).astype(dtype)), channels=4)


def header(descr: str, shape: tuple) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


DAMAGED = {
    "cut npy": npy(noise(9, 9, 4))[:-1],
    "npy of objects": header("|O", (4, 4)),
    "npy bomb": header("<f8", (60000, 60000)),
    "npy of one axis": npy(noise(9)),
    "empty npy": npy(noise(9, 0, 4)),
    "npy of complex numbers": npy(np.zeros((4, 4), np.complex64)),
    "cut tiff": tiff(noise(40, 40, 4))[:-9],
    "cut deflated tiff": tiff(noise(40, 40, 4), compression="deflate")[:-9],
    "tiff without its end": tiff(noise(40, 40, 5), photometric="minisblack")[:200],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_refused(damage):
    with pytest.raises(BadImage) as caught:
        decode(DAMAGED[damage], channels=4, value_range=FULL)
    assert len(str(caught.value)) < 30


def test_a_tiff_that_claims_more_than_its_bytes_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *_, **__: pytest.fail("decoded"))
    image = bytearray(tiff(noise(40, 40, 4), compression="deflate", rowsperstrip=40))
    for tag, value in ((256, 30000), (257, 30000), (278, 30000)):  # width, height, rows of a strip
        at = image.index(struct.pack("<HH", tag, 3)) if struct.pack("<HH", tag, 3) in image else None
        at = image.index(struct.pack("<HH", tag, 4)) if at is None else at
        image[at + 2 : at + 12] = struct.pack("<HII", 4, 1, value)
    for limit in (MAX_PIXELS, 10**9):
        with pytest.raises(BadImage, match="too (many pixels|few bytes)"):
            decode(bytes(image), channels=4, value_range=FULL, max_pixels=limit)


# ---- large images


@pytest.mark.parametrize("size, limit, by", [((100, 80), 8000, 1), ((100, 80), 7999, 2), ((101, 83), 51 * 42, 2),
                                             ((101, 83), 51 * 42 - 1, 4), ((100, 80), 130, 8)])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_above_the_limit_is_halved_until_it_fits(size, limit, by, channels):
    photo = cv2.GaussianBlur(noise(*size, 3, dtype=np.uint8), (0, 0), 9)
    image = jpeg(photo, quality=95)
    pixels = decode(image, channels=channels, max_pixels=limit)
    assert pixels.shape == (-(-size[0] // by), -(-size[1] // by), channels)
    opened = Image.open(io.BytesIO(image))  # PIL's draft is libjpeg's scaled DCT, too
    opened.draft("RGB" if channels == 3 else "L", (size[1] // by, size[0] // by))
    expected = np.asarray(opened).reshape(pixels.shape).astype(int)
    assert np.abs(pixels - expected).mean() < 0.5
    assert np.array_equal(pixels, decode(image, channels=channels, max_pixels=limit))


def test_what_cannot_be_halved_is_refused_above_the_limit_and_read_below():
    photo = noise(40, 30, 3, dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(photo).save(out, "PNG")
    for image in (out.getvalue(), jpeg(photo, progressive=True), npy(photo), tiff(photo)):
        with pytest.raises(BadImage, match="too many pixels"):
            decode(image, max_pixels=1199)
        assert decode(image, max_pixels=1200).shape == (40, 30, 3)
    with pytest.raises(BadImage, match="too many pixels"):
        decode(jpeg(photo), max_pixels=19)


def test_the_limit_is_part_of_the_data_set(write_shards):
    paths = write_shards([5])
    plain, limited = ShardIndex(paths), ShardIndex(paths, max_pixels=100)
    assert plain.fingerprint == ShardIndex(paths, max_pixels=MAX_PIXELS).fingerprint != limited.fingerprint
    assert limited.with_label("cls").max_pixels == plain.with_range(None, 100).max_pixels == 100
    assert len(list(one_pass(plain, ViewPlan((View((8, 8)),)), batch_size=5))) == 1
    assert not list(one_pass(limited, ViewPlan((View((8, 8)),)), batch_size=5))  # of 120 pixels each


# ---- views


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_each_channel_is_resized_as_pil_would(channels, deep, name):
    method = Image.Resampling[name.upper()]
    values = noise(50, 41, channels, dtype=np.uint16 if deep else np.uint8)
    plan = ViewPlan((View((16, 12), crop="center", flip=0, interpolation=name),), (0.5,) * channels, (0.2,) * channels)
    out = np.empty((16, 12, channels), np.float32 if deep else np.uint8)
    boxes, _ = read_views(npy(values), plan, 0, [out], FULL if deep else None)
    top, left, height, width = boxes[0].tolist()
    for c in range(channels):
        crop = scaled(values[top : top + height, left : left + width, c]) if deep else values[:, :, c]
        crop = crop if deep else crop[top : top + height, left : left + width].astype(np.float64)
        expected = np.asarray(Image.fromarray(crop.astype(np.float32)).resize((12, 16), method))
        np.testing.assert_allclose(out[:, :, c], expected.clip(0, 255), atol=1e-3 if deep else 1.01)


def test_no_bit_of_twelve_is_lost_and_bicubic_never_leaves_the_range():
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64, 1)
    plan = ViewPlan((View((64, 64), crop="center", flip=0), View((23, 23), flip=0)), (0.5,), (0.2,))
    whole, crop = np.empty((64, 64, 1), np.float32), np.empty((23, 23, 1), np.float32)
    read_views(npy(values), plan, 3, [whole, crop], (0, 4095))
    assert np.array_equal((whole / 255 * 4095).round(), values)
    checks = np.indices((40, 40)).sum(0)[:, :, None].astype(np.uint16) // 4 % 2 * 4095
    read_views(npy(checks), plan, 3, [whole, crop], (0, 4095))
    assert crop.min() == 0 and crop.max() == 255


# ---- data sets


@pytest.fixture
def arrays(tmp_path, write_tar):
    """arrays(make, count=12) -> the path of a tar with an array a sample, and labels."""

    def write(make=lambda n: noise(12, 10, 4, seed=n), count=12):
        members = [(f"{n:03}.npy", npy(make(n))) for n in range(count)]
        return str(write_tar(tmp_path / "x.tar", [*members, *((f"{n:03}.cls", b"1") for n in range(count))]))

    return write


FOUR = ViewPlan((View((6, 6)), View((5, 4), flip=0.3)), (0.5,) * 4, (0.2,) * 4)


def rows(loader, count):
    found = {}
    for _ in range(count):
        batch = next(loader)
        for row, position in enumerate(batch.positions.tolist()):
            found[position] = [view[row] for view in batch.views] + [batch.flips[row], batch.sample_ids[row]]
    return found


def test_the_order_and_the_pixels_are_the_same_at_any_number_of_ranks_and_workers_and_after_a_resume(arrays):
    index = ShardIndex(arrays(), value_range=FULL)
    settings = dict(seed=5, shuffle=Shuffle(streams=2, span=2, window=4))
    expected = rows(Loader(index, FOUR, micro_batch=8, **settings), 6)
    assert expected[0][0].dtype == torch.float32 and expected[0][0].shape == (4, 6, 6)
    first = Loader(index, FOUR, micro_batch=4, num_workers=2, **settings)
    found = rows(first, 4)
    state = first.state_dict()
    first.close()
    for rank in (0, 1):
        loader = Loader(index, FOUR, micro_batch=4, rank=rank, world_size=2, **settings)
        loader.load_state_dict(state)
        found |= rows(loader, 4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(a, b) for n in found for a, b in zip(found[n], expected[n], strict=True))
    with pytest.raises(UserError, match="fingerprint"):
        Loader(ShardIndex(arrays()), FOUR, micro_batch=4, **settings).load_state_dict(state)


def test_without_a_range_views_have_8_bits(arrays):
    loader = build_loader(arrays(), FOUR, seed=0, micro_batch=4)
    assert next(loader).views[0].dtype == torch.uint8


@pytest.mark.parametrize(
    "make, channels, said",
    [
        (lambda n: noise(12, 10, 4), 3, "have 4 channels, and 3 are asked for; write data.channels=4"),
        (lambda n: noise(12, 10), 4, "have 1 channel, and 4 are asked for; write data.channels=1"),
        (lambda n: noise(12, 10, 4, dtype=np.float32), 4, "hold float32 values .* write data.range"),
    ],
)
def test_a_set_that_cannot_be_read_as_asked_for_is_refused_with_what_to_write(arrays, make, channels, said):
    plan = ViewPlan((View((6, 6)),), (0.5,) * channels, (0.2,) * channels)
    index = ShardIndex(arrays(make))
    with pytest.raises(UserError, match=said):
        Loader(index, plan, seed=0, micro_batch=4)
    with pytest.raises(UserError, match=said):
        one_pass(index, plan, batch_size=4)


@pytest.mark.parametrize(
    "make, found",
    [
        (lambda n: noise(9, 9, 4) >> 4, (0, 4095)),
        (lambda n: noise(9, 9, 4, dtype=np.float32), (0, 1)),
        (lambda n: noise(9, 9, 4, dtype=np.uint8), None),
    ],
)
def test_auto_knows_whole_bits_and_shares(arrays, make, found):
    assert ShardIndex(arrays(make), value_range="auto").value_range == found


@pytest.mark.parametrize("dtype, times", [(np.float32, 3), (np.int16, 1)])
def test_auto_refuses_what_it_cannot_know(arrays, dtype, times):
    with pytest.raises(UserError, match=r"values .* go from .* write data.range=\["):
        ShardIndex(arrays(lambda n: noise(9, 9, 4, dtype=dtype) * times), value_range="auto")


def test_deep_images_of_many_channels_that_stay_dark_are_told(arrays, caplog):
    Loader(ShardIndex(arrays(lambda n: noise(9, 9, 4) >> 4)), FOUR, seed=0, micro_batch=4)
    assert "data.range=[0,4095]" in caplog.text


def test_a_folder_of_dark_images_is_told_too(tmp_path, caplog):
    (tmp_path / "photos").mkdir()
    for n in range(3):
        (tmp_path / "photos" / f"{n}.png").write_bytes(cv2.imencode(".png", noise(9, 9, seed=n) >> 4)[1].tobytes())
    Loader(ShardIndex(str(tmp_path / "photos")), ViewPlan((View((6, 6)),)), seed=0, micro_batch=2)
    assert "data.range=[0,4095]" in caplog.text


def test_arrays_beside_images_are_none(tmp_path, write_tar, image):
    members = [("0.ppm", image(0)), ("0.npy", npy(noise(4, 4))), ("1.npy", npy(noise(4, 4)))]
    index = ShardIndex(str(write_tar(tmp_path / "x.tar", members)))
    assert index.num_samples == 1 and index.num_problems == 1
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, content in members:
        (folder / name).write_bytes(content)
    assert ShardIndex(str(folder)).num_samples == 1
    (folder / "0.ppm").unlink()
    assert ShardIndex(str(folder)).num_samples == 2


def test_arrays_that_are_labels_are_no_images(arrays):
    assert ShardIndex(arrays()).num_samples == 12
    with pytest.raises(UserError, match="without a single image"):
        ShardIndex(arrays(), "npy")


def test_a_survey_measures_every_channel(arrays):
    index = ShardIndex(arrays(), value_range=(0, 40000))
    assert channels_of(index) == 4
    found = survey(index, np.arange(12), channels=4)
    values = np.stack([noise(12, 10, 4, seed=n) for n in range(12)]).astype(np.float64).clip(0, 40000) / 40000
    np.testing.assert_allclose(found.mean, values.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.std, values.std((0, 1, 2)), atol=1e-5)
    assert dict(found.forms) == {("NPY", 4, 16, 1): 12}
