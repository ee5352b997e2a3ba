"""Pairs that are no augmentations, as objectives ask for them. Who is whose partner: tests/data/test_partners.py."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from rank_cases import Flat

from prelude.data.loader import build_loader
from prelude.objectives import objective_class
from prelude.objectives.options import OPTIONS, LeJEPAOptions, SeveralViewsOptions
from prelude.pretrain.images import images
from prelude.pretrain.schedules import Progress

SEVERAL = [name for name, options in sorted(OPTIONS.items()) if issubclass(options, SeveralViewsOptions)]


def objective_of(name: str, **options):
    cls = objective_class(name)
    torch.manual_seed(0)
    if issubclass(cls.Options, LeJEPAOptions):
        options |= {"num_local": 2, "local_size": 5, "num_directions": 8}
    return cls(Flat(), cls.Options(projector=[8, 6], **options), image_size=(5, 5), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Sixteen grey images, of eight patients: the even one of each is dark, the odd one bright."""
    path = tmp_path_factory.mktemp("pairs") / "train-000.tar"
    with tarfile.open(path, "w") as tar:
        for n in range(16):
            file = io.BytesIO()
            Image.fromarray(np.full((12, 12, 3), 40 + 160 * (n % 2), np.uint8)).save(file, "png")
            members = {"png": file.getvalue(), "json": json.dumps({"patient": n // 2}).encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{n:03}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("name", SEVERAL)
def test_every_second_view_is_of_the_partner(name, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("PRELUDE_CACHE", str(tmp_path))
    objective = objective_of(name, pair_by="json:patient")
    batch = next(build_loader(shards, objective.views, seed=0, micro_batch=16))
    bright = torch.stack([(view.float().mean((1, 2, 3)) > 120) for view in batch.views])  # (V, B)
    odd = batch.sample_ids % 2 == 1
    for number, of_view in enumerate(bright):
        assert torch.equal(of_view, odd if number % 2 == 0 else ~odd), number
    assert len(images(batch, objective.views)) == len(bright) >= 2
    loss = objective(batch, Progress(0, 10, 4.0))
    loss.total.backward()
    assert loss.total.isfinite()


@pytest.mark.parametrize("name", SEVERAL)
def test_without_a_field_all_views_are_of_one_image_and_the_plan_is_what_it_was(name):
    plan, paired = objective_of(name).views, objective_of(name, pair_by="json:patient").views
    assert plan.group == "" and not any(view.partner for view in plan.views)
    assert paired.group == "json:patient" and paired.fingerprint() != plan.fingerprint()
