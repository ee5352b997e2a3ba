"""TransMix and MixPro against loops over single images, with attention computed by the block's own matrices."""

import math
from dataclasses import replace

import pytest
import torch
from tuned import VIT

from prelude.data.errors import UserError
from prelude.evaluators.finetuning import attention_labels
from prelude.evaluators.finetuning.classifier import Classifier
from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.pretrain.config import Config
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

CLASSES = torch.tensor([2, 3, 7, 11])
POOLED = VIT.model_copy(update={"kwargs": VIT.kwargs | {"global_pool": "avg"}})
GRID, PATCH, B = 4, 4, 8


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    blank = blank_batch(model().views, B)
    pixels = torch.randint(0, 256, blank.views[0].shape, dtype=torch.uint8, generator=generator)
    labels = CLASSES[torch.arange(B) % 4]
    return replace(blank, views=(pixels,), labels=labels, seeds=torch.arange(B) * 7919 + 5)


def model(**options) -> Classifier:
    torch.manual_seed(0)
    options = FineTuneOptions(**{"mixup": 0.8, "cutmix": 1.0, "head_std": 0.5} | options)
    built = Classifier(
        build_encoder(POOLED, seed=0), options, CLASSES, image_size=(16, 16), mean=(0.5,) * 3, std=(0.2,) * 3
    )
    with torch.no_grad():  # so that attention is not the same everywhere
        for block in built.encoder.blocks:
            block.attn.qkv.weight.mul_(30)
    return built.eval()


def paid_by_matrices(encoder, images):
    """(B, L): softmax of the class token's query with all keys, in the last block."""
    tokens = encoder._pos_embed(encoder.patch_embed(images))
    for block in encoder.blocks[:-1]:
        tokens = block(tokens)
    attn, normed = encoder.blocks[-1].attn, encoder.blocks[-1].norm1(tokens)
    count, width = normed.shape[1:]
    qkv = attn.qkv(normed).reshape(len(images), count, 3, attn.num_heads, width // attn.num_heads)
    queries, keys = qkv[:, 0, 0], qkv[:, :, 1]  # (B, heads, d), (B, N, heads, d)
    scores = torch.einsum("bhd,bnhd->bhn", queries, keys) / math.sqrt(queries.shape[-1])
    return scores.softmax(2).mean(1)[:, 1:]


def loss_by_loop(classifier, batch, how) -> float:
    from prelude.pretrain.images import images

    (pixels,) = images(batch, classifier.views)
    targets = classifier.targets(batch)
    mixed = classifier.mixing.mixed(pixels, targets, batch.seeds)
    logits = classifier.head(classifier.encoder(mixed.images))
    paid, total, moved = paid_by_matrices(classifier.encoder, mixed.images), 0.0, 0
    for i in range(B):
        j = i + 1 if i % 2 == 0 else i - 1
        share = mixed.share[i].item()
        if set(mixed.own[i].unique().tolist()) <= {0.0, 1.0}:  # pasted, and no blend
            kept = all_patches = 0.0
            for row in range(GRID):
                for column in range(GRID):
                    weight = paid[i, row * GRID + column].item()
                    all_patches += weight
                    # a patch is the own image's where its first pixel is
                    if torch.equal(mixed.images[i, :, row * PATCH, column * PATCH],
                                   pixels[i, :, row * PATCH, column * PATCH]):  # fmt: skip
                        kept += weight
            by_attention = kept / all_patches
            guess = logits[i].softmax(0)
            by_area = share * targets[i] + (1 - share) * targets[j]
            c = (by_area @ guess / by_area.norm() / guess.norm()).item()
            weight = 0.5 if how == "transmix" else c
            moved += abs(by_attention - share) > 1e-3
            share = weight * by_attention + (1 - weight) * share
        wanted = share * targets[i] + (1 - share) * targets[j]
        total -= (wanted * logits[i].log_softmax(0)).sum().item() / B
    assert moved >= 2  # or there would be nothing to see
    return total


@pytest.mark.parametrize("cell", [None, 8], ids=["boxes", "cells"])
@pytest.mark.parametrize("how", ["transmix", "mixpro"])
def test_labels_of_pasted_images_are_those_of_a_loop(how, cell, batch):
    classifier = model(attention_labels=how, cutmix_cell=cell)
    with torch.no_grad():
        found = classifier(batch, Progress(0, 10, 1.0)).total.item()
        by_area = model(cutmix_cell=cell)(batch, Progress(0, 10, 1.0)).total.item()
        assert found == pytest.approx(loss_by_loop(classifier, batch, how), rel=1e-5)
    assert abs(found - by_area) > 1e-4


def test_attention_gets_no_gradient_from_the_labels(batch):
    """The gradient is that of a cross-entropy with these targets as constants."""
    classifier = model(attention_labels="mixpro")
    targets = []
    whole = classifier.loss
    classifier.loss = lambda logits, wanted: (targets.append(wanted), whole(logits, wanted))[1]
    classifier(batch, Progress(0, 10, 1.0)).total.backward()
    assert not targets[0].requires_grad
    assert all(parameter.grad is not None for parameter in classifier.parameters())


WITHOUT_TOKEN = {"kwargs": POOLED.kwargs | {"class_token": False}}
WITH_LATENT = {"kwargs": VIT.kwargs | {"global_pool": "map"}}
MISTAKES = {
    "no class token": ({"attention_labels": "transmix"}, WITHOUT_TOKEN, {}, "does not tell; leave it out"),
    "pooled by an attention": (
        {"attention_labels": "transmix", "pooling": "own"}, WITH_LATENT, {}, "write objective.pooling=mean.",
    ),
    "compiled": ({"attention_labels": "transmix"}, {}, {"compile": True}, "write train.compile=false."),
    "cells that do not fit the image": ({"cutmix_cell": 5}, {}, {}, "does not divide an image of 16x16 pixels"),
    "cells that do not fit patches": (
        {"attention_labels": "mixpro", "cutmix_cell": 2}, {}, {}, "is no whole number of patches of 4x4",
    ),
}  # fmt: skip


def check(options: dict, encoder: dict, train: dict) -> None:
    config = Config.model_validate(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": POOLED.model_copy(update=encoder).model_dump(),
            "objective": {"name": "fine_tune"},
            "train": {"epochs": 1, "global_batch": 8} | train,
            "optimizer": {"lr": 1.0},
        }
    )
    options = FineTuneOptions(cutmix=1.0, **options)
    attention_labels.check(options, config, build_encoder(config.encoder, seed=0))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_asked_is_refused(mistake):
    options, encoder, train, expected = MISTAKES[mistake]
    with pytest.raises(UserError, match=expected):
        check(options, encoder, train)


def test_what_pools_with_attention_is_taken_where_the_mean_is_pooled():
    check({"attention_labels": "transmix"}, WITH_LATENT, {})


@pytest.mark.parametrize(
    "options",
    [
        {"attention_labels": "transmix"},
        {"cutmix_cell": 8},
        {"cutmix": 1.0, "attention_labels": "mixpro", "loss": "sigmoid"},
    ],
)
def test_a_setting_without_effect_is_refused(options):
    with pytest.raises(ValueError, match=r"objective\.(attention_labels|cutmix_cell)"):
        FineTuneOptions(**options)
