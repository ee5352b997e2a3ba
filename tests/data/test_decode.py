import io
import random
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, features

from prelude.data import decode as decode_module
from prelude.data.decode import BadImage, decode

REAL_SHARD = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-sample" / "train-000000.tar"


def photograph(height: int = 120, width: int = 160) -> np.ndarray:
    """Smooth colours, edges and a little noise: what a JPEG sees in a photograph."""
    y, x = np.mgrid[:height, :width]
    red = 128 + 100 * np.sin(x / 17 + y / 31)
    green = 255 * ((x // 20 + y // 15) % 2)
    blue = 255 * y / height
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return (np.stack([red, green, blue], axis=-1) + noise).clip(0, 255).astype(np.uint8)


def encode(image, format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def by_pil(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b).mean()


JPEG = encode(photograph(), quality=90)


@pytest.fixture(scope="module")
def real_images() -> list[bytes]:
    if not REAL_SHARD.exists():
        pytest.skip(f"{REAL_SHARD} is not here")
    with tarfile.open(REAL_SHARD) as shard:
        return [shard.extractfile(member).read() for member in shard if member.name.endswith(".jpg")]


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_gives_the_pixels_of_pil(subsampling, progressive):
    encoded = encode(photograph(101, 67), quality=85, subsampling=subsampling, progressive=progressive)
    pixels = decode(encoded)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    assert mean_difference(pixels, by_pil(encoded)) <= 0.1


def test_photographs_give_the_pixels_of_pil(real_images):
    for encoded in real_images:
        assert mean_difference(decode(encoded), by_pil(encoded)) <= 0.1


def test_a_plain_jpeg_is_not_read_by_pil(monkeypatch):
    monkeypatch.setattr(decode_module, "stored_values", lambda *_, **__: pytest.fail("PIL decoded a plain JPEG"))
    decode(JPEG)


def test_grey_is_repeated():
    encoded = encode(photograph()[:, :, 0])
    pixels = decode(encoded)
    assert pixels.shape == (120, 160, 3)
    assert (pixels == pixels[:, :, :1]).all()
    assert mean_difference(pixels, by_pil(encoded)) <= 0.1


def test_cmyk_is_converted_by_pil():
    encoded = encode(Image.fromarray(photograph()).convert("CMYK"), quality=95)
    assert mean_difference(decode(encoded), by_pil(encoded)) == 0
    assert mean_difference(decode(encoded), photograph()) < 8


def test_alpha_is_dropped_not_composited():
    transparent = np.dstack([photograph(), np.zeros((120, 160), np.uint8)])
    np.testing.assert_array_equal(decode(encode(transparent, "PNG")), photograph())


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("transparency", [0, bytes(range(256))])
def test_a_palette_with_transparency_gives_its_colours(transparency):
    palette = Image.fromarray(photograph()).quantize(256)
    encoded = encode(palette, "PNG", transparency=transparency)
    np.testing.assert_array_equal(decode(encoded), np.asarray(palette.convert("RGB")))


def test_16_bit_grey_keeps_its_upper_half():
    values = np.linspace(0, 65535, 120 * 160).astype(np.uint16).reshape(120, 160)
    pixels = decode(encode(values, "PNG"))
    np.testing.assert_array_equal(pixels, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_come_back_exactly(format):
    np.testing.assert_array_equal(decode(encode(photograph(), format)), photograph())


@pytest.mark.skipif(not features.check("webp"), reason="this PIL has no WebP")
@pytest.mark.parametrize("alpha", [False, True])
def test_webp(alpha):
    image = Image.fromarray(photograph()).convert("RGBA" if alpha else "RGB")
    np.testing.assert_array_equal(decode(encode(image, "WEBP", lossless=True)), photograph())


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    encoded = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(encoded) == [255, 0, 0]).all()


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode(encode(photograph(), exif=exif)).shape == (120, 160, 3)


def with_size(jpeg: bytes, height: int, width: int) -> bytes:
    """The same file with another size in its frame header."""
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[start + 4 :]


def without_interval(jpeg: bytes) -> bytes:
    return jpeg[: jpeg.index(b"\xff\xd1")] + jpeg[jpeg.index(b"\xff\xd2") :]


def with_scans(jpeg: bytes, count: int) -> bytes:
    """The same file with its last scan `count` times more."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * count + jpeg[-2:]


BOMB_PNG = encode(Image.new("1", (16_000, 16_000)), "PNG")

DAMAGE = {
    "empty": (b"", "empty"),
    "text": (b"not found\n" * 50, "not an image"),
    "zeros": (bytes(len(JPEG)), "not an image"),
    "only the first bytes": (JPEG[:3], "not an image"),
    "cut in the header": (JPEG[:200], None),
    "cut after the header": (JPEG[: JPEG.index(b"\xff\xda") + 20], "truncated"),
    "cut in the middle": (JPEG[: len(JPEG) // 2], "truncated"),
    "last byte missing": (JPEG[:-1], "truncated"),
    "end marker missing": (JPEG[:-2], "truncated"),
    "second half zeros": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) - len(JPEG) // 2), "truncated"),
    "progressive, cut": (encode(photograph(), progressive=True)[:-400], "truncated"),
    "cmyk, cut": (encode(Image.fromarray(photograph()).convert("CMYK"))[:-400], "truncated"),
    "png, cut": (encode(photograph(), "PNG")[:2000], "truncated"),
    "png, wrong checksum": (encode(photograph(), "PNG").replace(b"IDAT", b"IDAX", 1), None),
    "jpeg bomb": (with_size(JPEG, 65_000, 65_000), "too many pixels"),
    "png bomb": (BOMB_PNG, "too many pixels"),
    "claims more pixels than its bytes can hold": (with_size(JPEG, 8_000, 8_000)[:666] + b"\xff\xd9", "too few bytes"),
    "a png that does": (encode(Image.new("1", (8_000, 8_000)), "PNG")[:700], "too few bytes"),
    "many scans": (with_scans(encode(photograph(), progressive=True), 200), "too many scans"),
    "no height": (with_size(JPEG, 0, 160), None),
    "float": (encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "float32 values, no data.range"),
    "postscript": (encode(photograph(), "EPS"), "not an image"),
}


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    """The same file with something before all else."""
    return jpeg[:2] + segment + jpeg[2:]


SMALL_FRAME = bytes.fromhex("ffc0 0011 08 0008 0008 03 012200 021101 031101".replace(" ", ""))
BEFORE_THE_FRAME = {
    "a frame in a comment": b"\xff\xfe" + (2 + len(SMALL_FRAME)).to_bytes(2, "big") + SMALL_FRAME,
    "fill bytes": b"\xff\xff\xff\xfe\x00\x02",
    "a marker without a length": b"\xff\x01" + SMALL_FRAME[2:],
    "an empty segment": b"\xff\xfe\x00\x02",
    "another frame": SMALL_FRAME,
    "a segment that is too short": b"\xff\xfe\x00\x00" + SMALL_FRAME,
}


READ_OVER = ("a frame in a comment", "fill bytes", "an empty segment")


@pytest.mark.parametrize("before", BEFORE_THE_FRAME)
@pytest.mark.parametrize("size", [(120, 160), (65_000, 65_000)])
def test_no_other_size_is_believed_than_that_of_the_frame(before, size):
    """What libjpeg takes for the frame decides, whatever looks like one before it."""
    jpeg, read = with_segment(with_size(JPEG, *size), BEFORE_THE_FRAME[before]), before in READ_OVER
    if read and size == (120, 160):
        assert np.array_equal(decode(jpeg), decode(JPEG))
    else:
        with pytest.raises(BadImage, match="too many pixels" if read else None):
            decode(jpeg)


BELIEVED_BY_PIL = {
    "cut, with an end marker": (JPEG[: len(JPEG) // 2] + b"\xff\xd9", "truncated"),
    "cmyk, cut likewise": (encode(Image.fromarray(photograph()).convert("CMYK"))[:-400] + b"\xff\xd9", "truncated"),
    "a hole": (JPEG[: len(JPEG) // 2] + JPEG[len(JPEG) // 2 + 500 :], "truncated"),
    "a restart interval is missing": (without_interval(encode(photograph(), restart_marker_blocks=10)), "undecodable"),
}


@pytest.mark.parametrize("damage", BELIEVED_BY_PIL)
def test_what_the_strict_decoder_finds_damaged_is_not_taken_from_pil(damage):
    encoded, reason = BELIEVED_BY_PIL[damage]
    by_pil(encoded)
    with pytest.raises(BadImage, match=reason):
        decode(encoded)


def test_stray_bytes_between_a_jpegs_headers_are_no_damage():
    np.testing.assert_array_equal(decode(JPEG[:20] + bytes(3) + JPEG[20:]), by_pil(JPEG))


@pytest.mark.parametrize("format, side", [("JPEG", 2500), ("PNG", 2500), ("PNG", 300), ("WEBP", 300)])
def test_one_colour_all_over_is_an_image(format, side):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("this PIL has no WebP")
    assert (decode(encode(Image.new("RGB", (side, side), (200,) * 3), format)) == 200).all()


def test_a_whole_jpeg_padded_with_zeros_is_read():
    np.testing.assert_array_equal(decode(JPEG + bytes(4096)), decode(JPEG))


@pytest.mark.filterwarnings("ignore")  # pytest replaces the filter that data.stored sets
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_with_its_reason(damage):
    encoded, reason = DAMAGE[damage]
    with pytest.raises(BadImage) as caught:
        decode(encoded)
    assert str(caught.value) == reason or (reason is None and len(str(caught.value)) < 30)


BOMBS = {
    "jpeg": with_size(JPEG, 9_000, 9_000),
    "cmyk": with_size(encode(Image.fromarray(photograph()).convert("CMYK")), 9_000, 9_000),
    "png": BOMB_PNG,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(bomb, monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "convert", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="too many pixels"):
        decode(BOMBS[bomb])


@pytest.mark.filterwarnings("ignore")  # pytest replaces the filter that data.stored sets
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_random_damage_gives_pixels_or_bad_image_and_nothing_else(format):
    """Any other exception would stop a run."""
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("this PIL has no WebP")
    encoded = encode(photograph(32, 48), format)
    generator = random.Random(0)
    for _ in range(200):
        damaged = bytearray(encoded)
        for _ in range(generator.randrange(1, 20)):
            damaged[generator.randrange(len(damaged) if generator.random() < 0.5 else 60)] = generator.randrange(256)
        try:
            pixels = decode(bytes(damaged[: generator.randrange(len(damaged)) if generator.random() < 0.3 else None]))
        except BadImage as error:
            assert len(str(error)) < 30
        else:
            assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8


def test_threads_do_not_disturb_each_other():
    files = [encode(photograph(60 + i, 80), format) for i in range(8) for format in ("JPEG", "PNG")]
    expected = [decode(file) for file in files]
    with ThreadPoolExecutor(4) as pool:
        for pixels, wanted in zip(pool.map(decode, files * 4), expected * 4, strict=True):
            np.testing.assert_array_equal(pixels, wanted)


def test_nothing_reaches_the_console(tmp_path):
    """In a process of its own, because pytest catches warnings; under `-W always` every filtered one would show."""
    names = ("cut in the middle", "jpeg bomb", "png bomb", "png, cut", "text", "second half zeros")
    (tmp_path / "palette").write_bytes(
        encode(Image.fromarray(photograph()).quantize(256), "PNG", transparency=bytes(range(256)))
    )
    (tmp_path / "bomb between PIL's limits and ours").write_bytes(with_size(JPEG, 10_000, 12_000))
    for name in names:
        (tmp_path / name).write_bytes(DAMAGE[name][0])
    program = (
        "import pathlib, sys\n"
        "from prelude.data.decode import BadImage, decode\n"
        "for file in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: decode(file.read_bytes())\n"
        "    except BadImage: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, str(tmp_path)],
        capture_output=True, text=True, cwd=Path(decode_module.__file__).parents[1],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
