"""Images that use a part of their 16 bits."""

import io

import numpy as np
import pytest
import tifffile
import timm
from PIL import Image

from prelude.data import decode as decoding
from prelude.data import stored
from prelude.data.batch import View, ViewPlan
from prelude.data.data_sets import DataSet, index_of
from prelude.data.decode import BadImage, decode
from prelude.data.errors import UserError
from prelude.data.loader import Loader, build_loader, one_pass
from prelude.data.shards import ShardIndex
from prelude.data.value_range import may_be_found
from prelude.evaluators.embedding.embed import index_as_seen
from prelude.evaluators.judging import labelled_shards
from prelude.evaluators.labelled import Labelled

FIVE = ViewPlan((View((8, 8), crop="center", flip=0.0),), (0.5,) * 5, (0.25,) * 5)
PLAN = ViewPlan((View((8, 8), crop="center", flip=0.0),))


def encoded(values: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, format)
    return file.getvalue()


@pytest.fixture
def deep(tmp_path, write_tar):
    """deep(highest) -> path of ten 16-bit images that grow from 0 to that value."""

    def write(highest, name="x.tar"):
        values = np.linspace(0, highest, 64).round().astype(np.uint16).reshape(8, 8)
        return str(write_tar(tmp_path / name, [(f"{n}.png", encoded(np.roll(values, n, 0))) for n in range(10)]))

    return write


@pytest.fixture
def stains(tmp_path, write_tar):
    """stains(*highest) -> path of four TIFFs, each of as many 16-bit pages, which grow from 0 to these values."""

    def write(*highest, name="stains.tar"):
        file = io.BytesIO()
        pages = np.linspace(0, highest, 64).round().astype(np.uint16).T.reshape(-1, 8, 8)
        tifffile.imwrite(file, pages, photometric="minisblack")
        kinds = (("tif", file.getvalue()), ("cls", b"0"))
        return str(write_tar(tmp_path / name, [(f"{n}.{kind}", content) for n in range(4) for kind, content in kinds]))

    return write


@pytest.fixture
def small_limit(monkeypatch):
    """As if images of more than 100 pixels were refused by all who are not told otherwise."""
    for function in [*vars(stored).values(), *vars(decoding).values()]:
        if stored.MAX_PIXELS in (usual := getattr(function, "__defaults__", None) or ()):
            limited = tuple(100 if value == stored.MAX_PIXELS else value for value in usual)
            monkeypatch.setattr(function, "__defaults__", limited)


def brightest(index) -> int:
    (batch,) = one_pass(index, PLAN, batch_size=10)
    return round(float(batch.views[0].max()))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_a_range_is_linear_and_clipped(format):
    values = np.array([[0, 1000, 1500, 2000, 4000]], np.uint16)
    pixels = decode(encoded(values, format), value_range=(1000, 2000))
    assert pixels.dtype == np.float32 and pixels.tolist() == [[[v] * 3 for v in (0, 0, 127.5, 255, 255)]]


def test_both_byte_orders_of_a_tiff_are_the_same_image():
    """ImageJ writes the big end first."""
    values = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    files = {order: io.BytesIO() for order in "<>"}
    for order, file in files.items():
        tifffile.imwrite(file, values, byteorder=order)
    little, big = (file.getvalue() for file in files.values())
    assert little[:2] == b"II" and big[:2] == b"MM"
    assert (decode(big) == decode(little)).all() and (decode(big)[..., 0] == values >> 8).all()
    assert (decode(big, value_range=(0, 63000)) == decode(little, value_range=(0, 63000))).all()


def test_floats_have_pixels_where_a_range_is_given():
    values = np.array([[-1, 0, 0.5, np.nan]], np.float32)
    assert decode(encoded(values, "TIFF"), value_range=(-1, 1))[0, :, 0].tolist() == [0, 127.5, 191.25, 0]
    with pytest.raises(BadImage, match="float32 values, no data.range"):
        decode(encoded(values, "TIFF"))


def test_images_of_8_bits_are_as_they_were():
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert (decode(encoded(values), value_range=(0, 4095)) == decode(encoded(values))).all()


@pytest.mark.parametrize("highest, bits", [(4095, 12), (3000, 12), (1023, 10), (16383, 14), (60000, 16)])
def test_auto_is_a_number_of_whole_bits(deep, highest, bits):
    index = ShardIndex(deep(highest), value_range="auto")
    assert index.value_range == (0, 2**bits - 1)
    assert brightest(index) == round(255 * highest / (2**bits - 1))


def test_what_auto_can_come_to_is_told_from_other_ranges():
    assert all(map(may_be_found, [None, (0.0, 1.0), [0, 255], [0.0, 4095.0], [0, 2**32 - 1]]))
    assert not any(map(may_be_found, [[0, 1000], [1, 4095], [0.0, 0.5], [-1024, 3071]]))


def test_auto_without_deep_images_changes_nothing(write_shards):
    paths = write_shards([5])
    index = ShardIndex(paths, value_range="auto")
    assert index.value_range is None and index.fingerprint == ShardIndex(paths).fingerprint


def test_loaders_and_fingerprints_honour_it(deep):
    path = deep(4095)
    settings = dict(seed=0, micro_batch=10)
    plain, given, found = (build_loader(path, PLAN, **settings, value_range=r) for r in (None, (0, 4095), "auto"))
    assert [int(next(loader).views[0].max()) for loader in (plain, given, found)] == [15, 255, 255]
    assert plain.fingerprint != given.fingerprint == found.fingerprint
    with pytest.raises(UserError, match="fingerprint"):
        given.load_state_dict(plain.state_dict())
    assert ShardIndex(path).with_range((0, 4095)).fingerprint == given.fingerprint
    assert ShardIndex(path, value_range=(0, 4095)).with_label("cls").value_range == (0, 4095)


def test_streams_honour_it(deep):
    settings = dict(seed=0, micro_batch=10, num_samples=10, allow_commands=True)
    loader = build_loader(f"pipe:cat {deep(4095)}", PLAN, **settings, value_range=(0, 4095))
    assert int(next(loader).views[0].max()) == 255 and loader.state_dict()["range"] == [0, 4095]
    with pytest.raises(UserError, match="range=auto"):
        build_loader("pipe:cat x.tar", PLAN, **settings, value_range="auto")


@pytest.mark.parametrize("highest, told", [(4095, True), (16000, True), (17000, False), (65535, False)])
def test_images_that_stay_dark_are_told_once_with_the_setting(deep, caplog, highest, told):
    index = ShardIndex(deep(highest))
    for rank in (0, 1):
        Loader(index, PLAN, seed=0, micro_batch=1, rank=rank, world_size=2)
    said = [record.message for record in caplog.records if "dark" in record.message]
    assert len(said) == told
    if told:
        assert f"data.range=[0,{2 ** highest.bit_length() - 1}]" in said[0] and f"at most {highest // 256} " in said[0]


def test_where_the_range_is_given_or_8_bits_are_all_nothing_is_told(deep, write_shards, caplog):
    for index in (ShardIndex(deep(4095), value_range=(0, 65535)), ShardIndex(write_shards([4]))):
        Loader(index, PLAN, seed=0, micro_batch=1)
    assert not caplog.records


# ---- several data sets


def told_dark(caplog, mix, **settings) -> list[str]:
    """What a start says of these sets."""
    caplog.clear()
    build_loader({name: DataSet(path) for name, path in mix.items()}, PLAN, seed=0, micro_batch=1, **settings)
    return [record.message for record in caplog.records if "dark" in record.message]


def test_a_dark_set_is_named_whatever_lies_beside_it(deep, write_shards, caplog):
    many = write_shards([900])
    (said,) = told_dark(caplog, {"a": many, "b": deep(4095), "c": many})
    assert said.startswith("images in data.mix.b have") and said.endswith("data.range=[0,4095], or data.range=auto")
    both = told_dark(caplog, {"a": deep(4095), "b": deep(1000, "b.tar")})
    assert [line.split()[2] for line in both] == ["data.mix.a", "data.mix.b"]
    assert all("data.range=[0,4095]" in line for line in both)  # one for both


def test_a_set_that_no_shared_range_helps_is_named_with_what_does(deep, caplog):
    mix = {"bright": deep(65000), "dark": deep(4095, "dark.tar")}
    for value_range in (None, "auto"):
        (said,) = told_dark(caplog, mix, value_range=value_range)
        assert "data.mix.dark" in said and "up to 4095 only" in said and "at most 15 of 255" in said
        assert "one for all of data.mix" in said and "up to 65535" in said and "data.range=[" not in said
    assert not told_dark(caplog, {"bright": deep(65000), "other": deep(30000, "other.tar")})


def test_auto_sees_a_small_set_among_large_ones(deep, write_shards):
    many = DataSet(write_shards([900]))
    mix = {"a": many, "b": DataSet(deep(4095)), "c": many}
    assert index_of(mix, value_range="auto").value_range == (0, 4095)


# ---- pages that are channels, and large images


def test_auto_looks_at_every_page_that_is_a_channel(stains):
    loader = build_loader(stains(900, 30000, 0, 5, 20000), FIVE, seed=0, micro_batch=4, value_range="auto")
    assert loader.index.value_range == (0, 32767)
    seen = next(loader).views[0].amax((0, 2, 3)).tolist()
    assert seen == pytest.approx([255 * highest / 32767 for highest in (900, 30000, 0, 5, 20000)])


def test_evaluations_and_recorded_ranges_look_at_every_page_too(stains):
    paths = stains(900, 30000, name="train.tar"), stains(900, 60000, name="test.tar")
    judged = Labelled(*paths, "cls", value_range="auto", channels=2)
    assert [index.value_range for index in judged.opened()] == 2 * [(0, 32767)]
    mixed = {name: DataSet(path) for name, path in zip("ab", paths, strict=True)}
    assert index_of(mixed, value_range="auto", channels=2).value_range == (0, 65535)
    assert ShardIndex(paths[0]).with_range("auto", channels=2).value_range == (0, 32767)
    # Of what is no channel nothing is learned.
    assert ShardIndex(paths[0], value_range="auto", channels=1).value_range == (0, 1023)


def test_without_a_run_the_encoder_says_which_pages_are_channels(stains, tmp_path):
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "in_chans": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **settings)
    timm.models.save_for_hf(model, tmp_path / "two", model_args=settings, safe_serialization=True)
    paths, sources = (stains(900, 30000), stains(900, 60000, name="test.tar")), [f"local-dir:{tmp_path / 'two'}"]
    for of in (sources, ["pixels:4", f"random:{sources[0]}"]):
        judged = labelled_shards(of, *paths, value_range="auto")
        assert [index.value_range for index in judged.opened()] == 2 * [(0, 32767)]
    assert index_as_seen(sources, paths[1], value_range="auto").value_range == (0, 65535)
    three = stains(900, 30000, 70, name="three.tar")
    assert index_as_seen(["pixels:4"], three, value_range="auto").value_range == (0, 32767)  # as RGB


def test_images_are_dark_where_every_channel_is(stains, caplog):
    for path in (stains(900, 30000, 0, 5, 20000), stains(0, 0, 0, 0, 20000, name="last.tar")):
        Loader(ShardIndex(path), FIVE, seed=0, micro_batch=1)
        assert not caplog.records
    Loader(ShardIndex(stains(900, 3000, 0, 5, 200, name="dark.tar")), FIVE, seed=0, micro_batch=1)
    assert "values up to 3000 only" in caplog.text and "data.range=[0,4095]" in caplog.text


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_a_range_is_found_among_images_as_large_as_are_allowed(tmp_path, write_tar, small_limit, caplog, format):
    values = np.linspace(0, 3000, 256).round().astype(np.uint16).reshape(16, 16)
    path = str(write_tar(tmp_path / "x.tar", [(f"{n}.{format.lower()}", encoded(values, format)) for n in range(3)]))
    loader = build_loader(path, PLAN, seed=0, micro_batch=3, value_range="auto", max_pixels=256)
    assert loader.index.value_range == (0, 4095) and next(loader).views[0].max() > 128
    assert not caplog.records
    Loader(ShardIndex(path, max_pixels=256), PLAN, seed=0, micro_batch=1)
    assert "data.range=[0,4095]" in caplog.text


def test_large_images_without_a_natural_range_are_refused_with_the_setting(tmp_path, write_tar, small_limit):
    values = np.linspace(-5, 5, 256, dtype=np.float32).reshape(16, 16)
    path = str(write_tar(tmp_path / "x.tar", [("0.tif", encoded(values, "TIFF"))]))
    with pytest.raises(UserError, match=r"float32 values \(one from -5 to 5\).*write data.range=\[LOW,HIGH\]"):
        Loader(ShardIndex(path, max_pixels=256), PLAN, seed=0, micro_batch=1)


def test_opacity_of_large_images_says_nothing_of_black_and_white(tmp_path, write_tar, small_limit):
    values = np.full((16, 16, 4), 3000, np.uint16)
    values[:, :, 3] = 65535
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", extrasamples=["unassalpha"])
    path = str(write_tar(tmp_path / "x.tar", [("0.tif", file.getvalue())]))
    assert ShardIndex(path, value_range="auto", max_pixels=256).value_range == (0, 4095)
