"""What happens to an image's bytes: nothing, unless they are to be smaller and JPEG can hold them."""

import io

import cv2
import numpy as np
import pytest
from packed_shards import image_of, left_out, read_shards
from PIL import Image

from prelude.data.decode import BadImage, decode
from prelude.data.packing import images
from prelude.data.packing.images import extension_of, form_of
from prelude.data.shards import ShardIndex
from prelude.data.survey import survey


def saved(image: Image.Image, format: str, **settings) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **settings)
    return out.getvalue()


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    y, x, c = np.mgrid[:height, :width, :channels]
    return (127 + 120 * np.sin(x / 17 + c) * np.cos(y / 13)).astype(np.uint8)


RGB = Image.fromarray(smooth(90, 120))
GREY = Image.fromarray(smooth(90, 120, 1)[:, :, 0])
DEEP = (smooth(90, 120).astype(np.uint16) << 8) + 77
TURNED = Image.Exif()
TURNED[274] = 6  # orientation, which training ignores, too
UNFIT = {
    "16 bits grey": (cv2.imencode(".png", DEEP[:, :, 0])[1].tobytes(), "png", "16 bits a channel"),
    "16 bits colour": (cv2.imencode(".png", DEEP)[1].tobytes(), "png", "16 bits a channel"),
    "16 bits PPM": (b"P6\n# a remark\n120 90\n65535\n" + DEEP.astype(">u2").tobytes(), "ppm", "16 bits a channel"),
    "16 bits TIFF": (saved(Image.fromarray(DEEP[:, :, 0]), "TIFF"), "tif", "16 bits a channel"),
    "alpha": (saved(Image.fromarray(smooth(90, 120, 4)), "PNG"), "png", "an alpha channel"),
    "transparent palette": (saved(RGB.quantize(9), "PNG", transparency=3), "png", "an alpha channel"),
    "pages": (saved(RGB, "TIFF", save_all=True, append_images=[GREY]), "tif", "several frames"),
    "frames": (saved(RGB, "GIF", save_all=True, append_images=[GREY.convert("RGB")]), "gif", "several frames"),
    "unknown depth": (saved(RGB, "JPEG2000"), "jp2", "JPEG2000 may hold more than 8 bits"),
}
FIT = {
    "JPEG": (saved(RGB, "JPEG", quality=98), "RGB"),
    "grey JPEG": (saved(GREY, "JPEG"), "L"),
    "PNG": (saved(RGB, "PNG"), "RGB"),
    "one bit": (saved(GREY.convert("1"), "PNG"), "L"),
    "palette": (saved(RGB.quantize(64), "PNG"), "RGB"),
    "CMYK": (saved(RGB.convert("CMYK"), "JPEG"), "RGB"),
    "turned by EXIF": (saved(RGB, "JPEG", exif=TURNED), "RGB"),
    "turned by a TIFF's tag": (saved(RGB, "TIFF", tiffinfo={274: 6}), "RGB"),
}


@pytest.fixture
def folder_of(write_files, packed):
    """folder_of(content, extension, settings) -> the packed samples, what was left out."""

    def run(content: bytes, extension: str, **settings):
        folder, _ = packed(write_files("one", {f"1.{extension}": content}), **settings)
        return read_shards(folder), left_out(folder)

    return run


@pytest.mark.parametrize("name", UNFIT)
def test_what_jpeg_cannot_hold_stays_byte_for_byte_and_is_told(folder_of, name):
    content, extension, reason = UNFIT[name]
    (sample,), noted = folder_of(content, extension, short_side=32)
    assert sample[extension] == content
    assert noted == {f"1.{extension}": (f"not re-coded: {reason}", False)}


@pytest.mark.parametrize("name", FIT)
def test_larger_images_become_jpegs_of_the_short_side(folder_of, name):
    content, mode = FIT[name]
    (sample,), noted = folder_of(content, "jpg" if content[:2] == b"\xff\xd8" else "png", short_side=45, quality=95)
    image = Image.open(io.BytesIO(sample["jpg"]))
    assert (image.format, image.mode, image.size) == ("JPEG", mode, (60, 45))
    assert bool(noted) == (name == "turned by EXIF")
    exact = Image.fromarray(decode(content)).resize((60, 45), Image.Resampling.BOX)
    assert np.abs(np.asarray(exact, int) - np.asarray(image.convert("RGB"), int)).mean() < (
        25 if name == "one bit" else 4
    )


@pytest.mark.parametrize("short_side", [None, 45, 500])
@pytest.mark.parametrize("format, extension", [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("orientation", [0, 1, 6, 9, None, b"damaged"])
def test_a_photograph_that_its_tag_would_have_turned_is_told_of(orientation, short_side, format, extension, folder_of):
    exif = Image.Exif()
    if isinstance(orientation, int):
        exif[274] = orientation
    tag = b"Exif\0\0" + orientation if isinstance(orientation, bytes) else exif
    (sample,), noted = folder_of(saved(RGB, format, exif=tag), extension, short_side=short_side)
    height, width, _ = decode(sample["jpg" if short_side == 45 else extension]).shape
    assert height < width  # as it is stored
    reasons = [reason for reason, is_image in noted.values()]
    told = ["packed as it is stored; its EXIF orientation would have it turned"]
    assert reasons == (told if orientation == 6 else [])


def test_jpegs_above_the_limit_of_pil_are_as_good_as_others(folder_of, write_files, monkeypatch):
    """Training reads them smaller, and needs no PIL."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = FIT["JPEG"][0]
    (sample,), noted = folder_of(content, "jpg", short_side=45)
    assert decode(sample["jpg"]).shape == (45, 60, 3) and not noted
    assert extension_of(content) == "jpg" and form_of(content)[:4] == ("JPEG", "RGB", 90, 120)
    index = ShardIndex(str(write_files("large", {"1.jpg": content})))
    assert not survey(index, np.arange(1)).undecodable


def test_an_image_whose_header_cannot_be_read_is_left_out(write_files, packed, monkeypatch):
    def refuse(content):
        raise BadImage("not an image")

    monkeypatch.setattr(images, "form_of", refuse)
    source = write_files("two", {"1.jpg": FIT["JPEG"][0], "2.png": saved(RGB.resize((40, 30)), "PNG")})
    folder, _ = packed(source, short_side=45)
    assert [sample["source"] for sample in read_shards(folder)] == ["2.png"]
    assert left_out(folder) == {"1.jpg": ("not an image", True)}


@pytest.mark.parametrize("short_side", [None, 90, 200])
def test_nothing_is_enlarged_or_touched_without_need(folder_of, short_side):
    (sample,), noted = folder_of(FIT["PNG"][0], "png", short_side=short_side)
    assert sample["png"] == FIT["PNG"][0] and not noted


def test_quality_is_what_was_asked_for(write_files, packed):
    source = write_files("one", {"1.png": FIT["PNG"][0]})
    for quality in (40, 95):
        folder, _ = packed(source, to=str(quality), short_side=45, quality=quality)
        (sample,) = read_shards(folder)
        wanted = Image.open(io.BytesIO(saved(RGB.resize((60, 45)), "JPEG", quality=quality))).quantization
        assert Image.open(io.BytesIO(sample["jpg"])).quantization == wanted


def test_many_channels_and_floats_are_kept_for_those_who_can_read_them(write_files, packed):
    five = cv2.imencodemulti(".tiff", [smooth(9, 9)])[1].tobytes()
    tags = {
        "1.tif": saved(Image.fromarray(np.float32(smooth(9, 9, 1)[:, :, 0])), "TIFF"),
        "2.tif": many_channels(),
        "3.tif": five,
    }
    folder, summary = packed(write_files("deep", tags))
    assert {s["source"]: image_of(s) for s in read_shards(folder)} == tags and not summary["lost"]
    assert set(left_out(folder)) == {"1.tif", "2.tif"}
    assert left_out(folder) == {
        "1.tif": ("packed; a data.range reads it", False),
        "2.tif": ("packed; data.channels=5 reads it", False),
    }


def many_channels() -> bytes:
    """A TIFF of five channels of 16 bits, written by its specification."""
    pixels = np.arange(5 * 6 * 5, dtype="<u2").tobytes()
    entries = [(256, 4, 1, 5), (257, 4, 1, 6), (258, 3, 5, 8 + len(pixels)), (259, 3, 1, 1), (262, 3, 1, 1),
               (273, 4, 1, 8), (277, 3, 1, 5), (278, 4, 1, 6), (279, 4, 1, len(pixels))]  # fmt: skip
    bits = np.full(5, 16, "<u2").tobytes()
    table = b"".join(
        np.array([tag, kind], "<u2").tobytes() + np.array([count, value], "<u4").tobytes()
        for tag, kind, count, value in entries
    )
    start = 8 + len(pixels) + len(bits)
    header = b"II*\0" + np.uint32(start).tobytes()
    return header + pixels + bits + np.uint16(len(entries)).tobytes() + table + bytes(4)


@pytest.mark.parametrize(
    "name, channels, bits",
    [("16 bits grey", 1, 16), ("16 bits colour", 3, 16), ("alpha", 4, 8), ("16 bits PPM", 3, 16)],
)
def test_channels_and_bits_are_what_the_header_says(name, channels, bits):
    form = form_of(UNFIT[name][0])
    assert (form.channels, form.bits, form.height, form.width) == (channels, bits, 90, 120)


def test_the_size_of_a_turned_tiff_is_that_of_its_pixels():
    assert form_of(FIT["turned by a TIFF's tag"][0])[2:4] == (90, 120)
