"""Pictures of places: their numbers against scikit-learn and loops, their pixels against the numbers."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from prelude.data.shapes import write_shards
from prelude.evaluators import judging
from prelude.evaluators.dense import samples
from prelude.evaluators.dense.correspondence import principal_colours, similarity
from prelude.evaluators.dense.drawing import GAP, HEAT, TILE, cells, heat, mark, tile
from prelude.launch import prelude
from prelude.launch.exit_codes import door
from prelude.pretrain.config import EvaluateConfig


@pytest.fixture
def features():
    mixing = torch.diag(torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5]))
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) @ mixing + 7


def test_colours_are_the_principal_components_of_scikit_learn(features):
    found = principal_colours(features)
    rows = features.flatten(0, 2).double().numpy()
    oracle = PCA(3).fit(rows)
    values = oracle.transform(rows)
    signs = np.sign(oracle.components_[np.arange(3), np.abs(oracle.components_).argmax(1)])
    low, high = np.quantile(values * signs, (0.02, 0.98), axis=0)
    expected = (values * signs - low) / (high - low)
    assert found.shape == (4, 3, 5, 3)
    assert np.abs(found.flatten(0, 2).numpy() - 255 * expected.clip(0, 1)).max() <= 0.51


def test_components_that_there_are_not_are_grey(features):
    flat = features[..., :2].clone()
    flat[..., 1] = 3
    colours = principal_colours(flat)
    assert len(colours[..., 0].unique()) > 20
    assert (colours[..., 1] == 128).all() and (colours[..., 2] == 128).all()


def test_similarity_is_the_centred_cosine_with_one_place(features):
    found = similarity(features, (1, 4))
    centred = features.numpy() - features.flatten(0, 2).numpy().mean(0)
    own = centred[0, 1, 4]
    for image, row, column in np.ndindex(4, 3, 5):
        other = centred[image, row, column]
        expected = other @ own / np.linalg.norm(other) / np.linalg.norm(own)
        assert found[image, row, column].item() == pytest.approx(expected, abs=1e-5)
    assert found[0, 1, 4] == pytest.approx(1)


def test_what_is_said_of_a_place_lies_over_it():
    image = torch.full((3, 24, 48), 100, dtype=torch.uint8)  # a tile has paper above and below
    values = torch.zeros(2, 4)
    values[1, 3] = 1
    drawn = np.asarray(heat(image, values)).astype(int)
    top = TILE // 4
    assert (drawn[: top - 1] == 255).all() and (drawn[-top + 1 :] == 255).all()
    dark, bright = (np.array(colour) * 0.65 + 100 * 0.35 for colour in (HEAT[0], HEAT[-1]))
    assert np.abs(drawn[top + 3, 3] - dark).max() <= 1.5
    assert np.abs(drawn[TILE - top - 4, TILE - 4] - bright).max() <= 1.5
    assert np.abs(drawn[TILE - top - 4, TILE * 3 // 4 - 4] - dark).max() <= 1.5
    fixed = np.asarray(heat(image, values / 2, (0.0, 1.0))).astype(int)
    assert fixed[TILE - top - 4, TILE - 4].sum() < drawn[TILE - top - 4, TILE - 4].sum()
    colours = torch.arange(24, dtype=torch.uint8).view(2, 4, 3) * 10
    assert np.asarray(cells(colours, (24, 48)))[TILE - top - 4, TILE - 4].tolist() == colours[1, 3].tolist()
    framed = tile(image)
    mark(framed, (24, 48), (0, 1), (2, 4))
    changed = np.argwhere((np.asarray(framed) != np.asarray(tile(image))).any(-1))
    assert changed.min(0).tolist() == [top - 2, TILE // 4 - 2] and changed.max(0).tolist() == [
        TILE // 2 + 1,
        TILE // 2 + 1,
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "test", 12, image_size=32)
    return f"{folder}/test-000000.tar"


def test_the_door_draws_a_block_for_each_encoder(shards, tmp_path, capsys):
    sources = ["random:timm:test_vit.r160_in1k", "random:timm:test_resnet.r160_in1k"]
    to = str(tmp_path / "maps.png")
    assert prelude.main(["maps", *sources, "--images", shards, "--count", "4", "--to", to]) == 0
    page = Image.open(to)
    # images, and of each encoder its name, components, similarity, and attention or activations
    assert page.height == GAP + 7 * (TILE + GAP) + 2 * (15 + GAP) and page.width > 4 * (TILE + GAP)
    told = capsys.readouterr().out
    assert "tokens, 10 x 10 places; attention that the class token pays" in told
    assert "map, 10 x 10 places; norm of the activations" in told
    assert "test-000000, test-000004, test-000007, test-000011" in told
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    for path, point in ((one, "0.1,0.1"), (other, "0.9,0.5")):
        argv = ["--images", shards, "--of", "test-000007", "test-000001", "--point", point, "--to", str(path)]
        assert prelude.main(["maps", sources[0], *argv]) == 0
    assert "images: test-000007, test-000001" in capsys.readouterr().out
    assert one.read_bytes() != other.read_bytes()


def test_without_images_the_run_s_section_says_which_part_of_its_shards(shards, tmp_path, capsys, monkeypatch):
    part = {"label": "cls", "values": [1]}
    section = EvaluateConfig(train_shards=shards, test_shards=shards, test_select=part, image="png")
    monkeypatch.setattr(judging, "first_section", lambda sources: section)
    argv = ["maps", "random:timm:test_vit.r160_in1k", "--count", "12", "--to", str(tmp_path / "maps.png")]
    assert prelude.main(argv) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("images: ")]
    with tarfile.open(shards) as tar:
        labels = {name[:-4]: int(tar.extractfile(name).read()) for name in tar.getnames() if name.endswith(".cls")}
    assert {*line.removeprefix("images: ").split(", ")} == {key for key, label in labels.items() if label == 1}


def test_all_encoders_are_shown_the_images_that_the_first_has_chosen(shards, tmp_path, capsys, monkeypatch):
    """The second would choose another, as where it reads other channels."""
    chosen, keys = samples.chosen_samples, iter(["test-000001", "test-000002"])
    monkeypatch.setattr(samples, "chosen_samples", lambda index, *_: chosen(index, [next(keys)], 1))
    sources, to = [f"random:timm:test_{name}.r160_in1k" for name in ("vit", "resnet")], str(tmp_path / "maps.png")
    assert prelude.main(["maps", *sources, "--images", shards, "--to", to]) == 0
    assert "images: test-000001\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--of", "nobody"], "there is no key 'nobody'"),
        (["--features", "map"], "write tokens"),
        (["--to", "maps.jpg"], "write maps.png"),
        (["--images", "nowhere.tar"], "nowhere.tar"),
        (["--of", *("test-000001" for _ in range(25))], "room for 24"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, told, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["maps", "random:timm:test_vit.r160_in1k"]
    argv += [] if "--images" in words else ["--images", shards]
    argv += [] if "--to" in words else ["--to", "maps.png"]
    assert door(lambda: prelude.main([*argv, *words])) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error and not list(tmp_path.glob("*.png"))
