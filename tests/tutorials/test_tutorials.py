"""Each tutorial is run as it stands, block by block, in an empty folder; and what it says it leaves is there.

A stage of its own, `make tutorials`: a page takes one to three minutes.
"""

import pytest
from pages import blocks_of, run_page
from PIL import Image
from runs import ROOT

PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
LEAVES = {
    "xrays": ("xrays.png", ["Nodule", "Effusion", "Cardiomegaly", "random:xrays"]),
    "wildlife": ("wildlife.png", ["mae_cifar10", "ijepa_cifar10", "vicreg_cifar10", "pixels"]),
    "satellite": ("satellite.png", ["tensors loaded", "start:satellite"]),
    "preempted": ("preempted.png", ["the first start left with 75", "resumed at step", "steps from three starts"]),
    "downstream": ("segmentation.png", ["classification: ", "segmentation: ", "retrieval: ", "features (4, 128)"]),
}
pytestmark = pytest.mark.tutorial


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_as_it_stands(page, tmp_path):
    told = run_page(page, tmp_path)
    picture, said = LEAVES[page.stem]
    assert min(Image.open(tmp_path / picture).size) > 90
    for words in said:
        assert words in told, f"{page.stem} does not say {words!r}:\n{told[-4000:]}"
    assert "Traceback" not in told


def test_the_page_on_notebooks_runs_as_one_script(tmp_path):
    told = run_page(ROOT / "docs" / "notebook.md", tmp_path)
    assert (tmp_path / "runs" / "first" / "checkpoints" / "step-00000019").is_dir()
    assert "nowhere/*.tar" in told and "Traceback" not in told and "linear probe " in told
    assert (tmp_path / "encoder" / "model.safetensors").is_file()


def test_a_block_that_fails_fails_its_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\nfalse | cat\n```\n\n```text\nnot run\n```\n")
    (tmp_path / "work").mkdir()
    with pytest.raises(AssertionError, match="page.md, line 1"):
        run_page(page, tmp_path / "work")
    assert [block.language for block in blocks_of(page)] == ["bash"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_shows_its_picture(page):
    named = [line.partition("](")[2].rstrip(")") for line in page.read_text().splitlines() if line.startswith("![")]
    assert named and all((page.parent / name).is_file() for name in named)
