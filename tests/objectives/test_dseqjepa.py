"""DSeq-JEPA: what each step may depend on, what the curriculum decides, and that nothing degenerate can happen."""

import pytest
import torch
from jepa_models import a_batch, encoder_config, gradients, pixels_of, predictions_of, some_images, tiny

from prelude.data.batch import Batch
from prelude.data.errors import UserError
from prelude.objectives.dseqjepa import DSeqJEPA, _buckets, _num_steps
from prelude.objectives.regions import Regions, normalised_saliency
from prelude.pretrain.encoders import forward_tokens
from prelude.pretrain.schedules import Progress

GRID = (8, 8)
END = Progress(100, 100, 10.0)  # lambda is 1
START = Progress(0, 100, 10.0)  # lambda is 0


def dseq(**options):
    return tiny(DSeqJEPA, **options)


def regions_of(rows) -> Regions:
    """rows: for each image, the patches of R_1 .. R_n; the others are background."""
    rid = torch.stack([torch.full((64,), len(row) + 1) for row in rows])
    for image, row in enumerate(rows):
        for k, patches in enumerate(row, start=1):
            rid[image, torch.as_tensor(list(patches))] = k
    return Regions(rid, torch.tensor([len(row) for row in rows]))


THREE = regions_of([[range(9, 15), range(24, 28), range(40, 45)], [range(50, 60), range(3, 6), [20, 21, 29]]])
ONE = regions_of([[range(9, 15)], [range(20, 40)]])


def predict(model, images, regions):
    """{step: (ids of the target of image 0, prediction of all images at step k)} as a list over images and steps."""
    target = model.normalised(model.look(images)[0])
    predictions = model.predict_regions(images, target, regions, regions.sizes(4).tolist())
    return predictions, by_step(predictions, len(images))


def by_step(predictions, num_images):
    """[image][k - 1] -> (T, D) prediction of the patches of R_(k+1), from one or several Predictions."""
    found = [{} for _ in range(num_images)]
    for p in predictions:
        for k in range(1, 5):
            for row in range(len(p.step)):
                if (p.step[row] == k).any() and p.weight[row][p.step[row] == k].sum() > 0:
                    # `reencode` drops images without this step; all images of these tests have the same number
                    found[row][k] = p.predicted[row][p.step[row] == k]
    return found


# What a prediction may depend on


@pytest.mark.parametrize("context", ["causal", "reencode"])
def test_pixels_outside_the_context_of_a_step_never_reach_its_prediction(context):
    model, images = dseq(context=context).double(), some_images()
    _, before = predict(model, images, THREE)
    for k in (1, 2, 3):
        hidden = pixels_of(THREE.rid > k, GRID)
        changed = torch.where(hidden, some_images(seed=9), images)
        _, after = predict(model, changed, THREE)
        for image in range(2):
            for step in range(1, k + 1):
                assert torch.equal(after[image][step], before[image][step])
            for step in range(k + 1, 4):
                assert not torch.equal(after[image][step], before[image][step])


@pytest.mark.parametrize("context", ["causal", "reencode"])
def test_pixels_of_the_first_region_reach_every_prediction(context):
    model, images = dseq(context=context).double(), some_images()
    changed = torch.where(pixels_of(THREE.rid == 1, GRID), some_images(seed=9), images)
    _, before = predict(model, images, THREE)
    _, after = predict(model, changed, THREE)
    for image in range(2):
        for step in (1, 2, 3):
            assert (after[image][step] - before[image][step]).abs().amax(-1).min() > 1e-7


def test_contexts_grow_by_one_region_and_the_last_step_covers_the_image():
    """The released code predicts R_2 and R_3 from R_1 alone: it takes the union before it appends."""
    ten = torch.tensor([[1, 1, 2, 2, 3, 3, 4, 4, 5, 5]])
    contexts = [set(torch.nonzero(ten[0] <= k).flatten().tolist()) for k in range(1, 5)]
    assert contexts == [{0, 1}, {0, 1, 2, 3}, set(range(6)), set(range(8))]
    model, images = dseq().double(), some_images()
    predictions, _ = predict(model, images, THREE)
    (p,) = predictions
    for image in range(2):
        for k in range(1, 4):
            assert (p.step[image] == k).sum() == (THREE.rid[image] == k + 1).sum()
        assert (p.weight[image] > 0).sum() == 64 - (THREE.rid[image] == 1).sum()
        assert torch.equal(p.background[image], (p.step[image] == 3))


@pytest.mark.parametrize("reduction", ["patch", "step"])
@pytest.mark.parametrize("context", ["causal", "reencode"])
def test_targets_are_the_teachers_features_of_the_steps_patches(context, reduction):
    model, images = dseq(context=context, loss_reduction=reduction).double(), some_images()
    target = model.normalised(model.look(images)[0])
    predictions, _ = predict(model, images, THREE)
    seen = torch.zeros(2, 64, dtype=torch.float64)
    for p in predictions:
        for image in range(2):
            for t in torch.nonzero(p.weight[image]).flatten().tolist():
                distance = (target[image] - p.target[image, t]).abs().amax(-1)
                patch = distance.argmin()
                assert distance[patch] == 0 and THREE.rid[image, patch] == p.step[image, t] + 1
                seen[image, patch] += p.weight[image, t]
    for image in range(2):
        weights = [seen[image][THREE.rid[image] == k] for k in range(1, 5)]
        assert weights[0].sum() == 0 and seen[image].sum().item() == pytest.approx(1)
        if reduction == "patch":
            assert torch.cat(weights[1:]).std() < 1e-12
        else:
            assert [w.sum().item() for w in weights[1:]] == pytest.approx([1 / 3] * 3)


def test_the_packed_causal_pass_equals_a_pass_for_each_step():
    """A separate pass with the tokens of C_k and T_k alone, under the same rules of who sees whom."""
    model, images = dseq().double(), some_images()
    _, found = predict(model, images, THREE)
    for image in range(2):
        rid, pixels = THREE.rid[image], images[image : image + 1]
        for k in (1, 2, 3):
            context_ids = torch.nonzero(rid <= k).T  # (1, K)
            target_ids = torch.nonzero(rid == k + 1).T
            known = torch.cat([torch.ones(1, 1, dtype=torch.long), rid[context_ids]], dim=1)
            context = forward_tokens(model.encoder, pixels, context_ids, known[:, None, :] <= known[:, :, None])[:, 1:]
            known, length = known[:, 1:], target_ids.shape[1]
            visible = torch.zeros(known.shape[1] + length, known.shape[1] + length, dtype=torch.bool)
            visible[: known.shape[1], : known.shape[1]] = known[0][None, :] <= known[0][:, None]
            visible[known.shape[1] :] = True
            alone = model.predictor(context, context_ids, target_ids[:, None], visible[None, None])[0, 0]
            torch.testing.assert_close(found[image][k], alone, rtol=0, atol=1e-12)


def test_reencode_is_the_plain_computation_of_each_step():
    model, images = dseq(context="reencode").double(), some_images()
    _, found = predict(model, images, THREE)
    for image in range(2):
        rid, pixels = THREE.rid[image], images[image : image + 1]
        for k in (1, 2, 3):
            context_ids, target_ids = torch.nonzero(rid <= k).T, torch.nonzero(rid == k + 1).T
            context = forward_tokens(model.encoder, pixels, context_ids)[:, 1:]
            alone = model.predictor(context, context_ids, target_ids[:, None])[0, 0]
            torch.testing.assert_close(found[image][k], alone, rtol=0, atol=1e-12)


def test_with_one_region_both_contexts_are_encoded_alike():
    """The class token counts as part of R_1, so that the first context is encoded as it is on its own."""
    model, images = dseq().double(), some_images()
    features = []

    def keep(module, inputs, output):
        features.append(inputs[0])

    hook = model.predictor.embed.register_forward_hook(keep)
    predict(model, images, ONE)
    hook.remove()
    for image, row in enumerate([torch.arange(9, 15), torch.arange(20, 40)]):
        alone = forward_tokens(model.encoder, images[image : image + 1], row[None])[0, 1:]
        torch.testing.assert_close(features[0][image, : len(row)], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("context", ["causal", "reencode"])
def test_one_region_trains_the_encoder_and_the_mask_token(context):
    """In the released code this, its usual case, gives the encoder a gradient of exactly zero."""
    model = dseq(context=context)
    images = some_images().float()
    predictions, _ = predict(model, images, ONE)
    sum((model.error(p.predicted, p.target) * p.weight).sum() for p in predictions).backward()
    found = gradients(model)
    assert found["predictor.mask_token"].norm() > 0
    assert found["encoder.patch_embed.proj.weight"].norm() > 0
    assert found["encoder.blocks.2.attn.qkv.weight"].norm() > 0
    assert not any(name.startswith("teacher.") for name in found)


def test_each_image_is_predicted_as_if_it_were_alone():
    """Masks of several images never mix: the released code's reshape gives every row bits of all samples."""
    model, images = dseq().double(), some_images(4)
    rows = [[[b, b + 1], [b + 10]] for b in range(3)] + [[range(40), [50], [51], [60, 63]]]
    regions = regions_of(rows)
    target = model.normalised(model.look(images)[0])
    (together,) = model.predict_regions(images, target, regions, regions.sizes(4).tolist())
    for b in range(4):
        alone = Regions(regions.rid[b : b + 1], regions.count[b : b + 1])
        sizes = alone.sizes(4).tolist()
        (single,) = model.predict_regions(images[b : b + 1], target[b : b + 1], alone, sizes)
        wanted, got = single.weight[0] > 0, together.weight[b] > 0
        torch.testing.assert_close(together.predicted[b][got], single.predicted[0][wanted], rtol=0, atol=1e-12)
        assert torch.equal(together.step[b][got], single.step[0][wanted])


def test_with_two_regions_allowed_the_background_is_predicted_from_the_foreground():
    model, images = dseq(num_regions=2).double(), some_images()
    _, found = predict(model, images, ONE)
    assert [set(steps) for steps in found] == [{1}, {1}]
    assert [len(found[image][1]) for image in range(2)] == [58, 44]


# The whole objective


@pytest.mark.parametrize("context", ["causal", "reencode"])
@pytest.mark.parametrize("granularity", ["step", "sample", "region"])
def test_the_loss_of_a_batch_is_the_mean_over_its_images(granularity, context):
    """So that neither ranks nor micro-batches change it; 36 images make two buckets of padded lengths."""
    model = dseq(lambda_granularity=granularity, context=context)
    progress = Progress(70, 100, 10.0)
    whole = a_batch(36)
    total = model(whole, progress).total
    parts = [whole._map(lambda t, s=s: t[s::3]) for s in range(3)]
    torch.testing.assert_close(sum(model(part, progress).total for part in parts) / 3, total, rtol=1e-6, atol=0)


def test_images_of_similar_context_share_a_bucket_and_none_is_lost():
    sizes = [[r, 0, 0, 0, 64 - r] for r in range(1, 40)] + [[64, 0, 0, 0, 0]] * 3
    sizes = [sorted(size, key=lambda s: s == 0) for size in sizes]
    buckets = list(_buckets(sizes))
    assert sorted(sum(buckets, [])) == list(range(39))
    assert len(buckets) == 2 and max(sizes[row][0] for row in buckets[0]) < min(sizes[row][0] for row in buckets[1])
    assert [_num_steps(size) for size in ([64, 0, 0], [3, 61, 0], [3, 1, 60])] == [0, 1, 2]


def flat_batch(count=2, size=32) -> Batch:
    batch = a_batch(count, (size, size))
    return batch._map(lambda t: torch.full_like(t, 90) if t.ndim == 4 else t)


@pytest.mark.parametrize("options", [{}, {"region_min_area": 1.0}, {"region_min_area": 0.0}, {"num_regions": 2}])
@pytest.mark.parametrize("granularity", ["step", "sample", "region"])
def test_the_loss_is_finite_in_every_corner(options, granularity):
    model = dseq(lambda_granularity=granularity, **options)
    for batch in (a_batch(4), flat_batch(), a_batch(1)):
        loss = model(batch, END)
        loss.total.backward()
        assert loss.total.isfinite() and all(g.isfinite().all() for g in gradients(model).values())
        assert all(torch.as_tensor(value).isfinite() for value in loss.parts.values())


def test_four_patches_are_enough():
    model = dseq(size=8, num_targets=1, target_scale=(0.25, 0.3), num_regions=3)
    assert model(a_batch(4, (8, 8)), END).total.isfinite()


def test_images_without_a_region_are_predicted_in_blocks(monkeypatch):
    model = dseq(region_min_area=1.0)
    monkeypatch.setattr(DSeqJEPA, "predict_regions", lambda *_: pytest.fail("an image without a region came here"))
    parts = model(a_batch(4), END).parts
    assert parts["images_in_order"] == 0 and parts["images_with_0_regions"] == 1


def test_images_with_a_region_are_predicted_in_order_alone(monkeypatch):
    monkeypatch.setattr(DSeqJEPA, "_in_blocks", lambda *_: pytest.fail("an image with regions came here"))
    parts = dseq()(a_batch(4), END).parts
    assert parts["images_in_order"] == 1 and parts["images_with_0_regions"] == 0


def test_random_blocks_are_those_of_ijepa_with_a_class_token():
    model, batch = dseq().double(), a_batch(4)
    target = model.normalised(model.look(some_images(4))[0])
    branch = model._in_blocks(some_images(4), target, batch.seeds, START)
    masks = model.blocks.draw(batch.seeds, 0)
    assert torch.equal(branch.predicted, predictions_of(model, some_images(4), masks).flatten(1, 2))
    assert (branch.weight.sum(1) - 1).abs().max() < 1e-12
    # The class token is seen by the context, and nothing is predicted for it.
    model.encoder.cls_token.data.add_(1.0)
    assert not torch.equal(predictions_of(model, some_images(4), masks).flatten(1, 2), branch.predicted)


# Saliency


def test_saliency_is_the_class_tokens_similarity_at_the_last_but_one_block():
    model, images = dseq().double(), some_images()
    assert model.saliency_block == 1  # of three blocks
    assert tiny(DSeqJEPA, saliency_block=2).saliency_block == 2
    teacher = model.teacher
    tokens = teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(images)))
    tokens = teacher.norm(teacher.blocks[1](teacher.blocks[0](tokens)))
    similarity = torch.einsum("bd,bnd->bn", tokens[:, 0], tokens[:, 1:]) / 32**0.5
    low, high = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
    features, saliency = model.look(images)
    torch.testing.assert_close(saliency, (similarity - low) / (high - low + 1e-6), rtol=0, atol=1e-12)
    torch.testing.assert_close(features, teacher.forward_features(images)[:, 1:], rtol=0, atol=1e-12)


def test_the_query_can_be_the_learned_token_itself():
    model, images = dseq(saliency_query="parameter").double(), some_images()
    teacher = model.teacher
    _, [patches] = teacher.forward_intermediates(images, indices=[1], norm=True, output_fmt="NLC")
    similarity = patches @ teacher.cls_token[0, 0] / 32**0.5
    torch.testing.assert_close(model.look(images)[1], normalised_saliency(similarity), rtol=0, atol=1e-12)
    contextual = dseq().double()
    contextual.load_state_dict(model.state_dict())
    assert (contextual.look(images)[1] - model.look(images)[1]).abs().max() > 0.1


def test_saliency_is_float32_under_bf16_autocast():
    model = dseq()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, saliency = model.look(some_images().float())
        loss = model(a_batch(4), END)
    assert saliency.dtype == torch.float32 and loss.total.isfinite()


# The curriculum

STEPS = range(0, 1000, 10)


def chooses(model, step, num_steps=1000, seeds=range(4)):
    saliency = model.look(some_images(len(list(seeds))).float())[1]
    return model.choose(saliency, torch.tensor(list(seeds)), Progress(step, num_steps, 10.0))


def test_lambda_rises_from_zero_to_one_and_no_further():
    model = dseq()
    fractions = [model.curriculum(Progress(step, 200, 10.0)) for step in (0, 50, 100, 200, 300)]
    assert fractions == [0.0, 0.25, 0.5, 1.0, 1.0]
    half = dseq(lambda_start=0.5, lambda_end=0.6)
    assert half.curriculum(Progress(100, 200, 10.0)) == pytest.approx(0.55)


def test_a_step_decides_alike_whatever_samples_a_rank_holds():
    model = dseq()
    decided = [chooses(model, step) is not None for step in STEPS]
    others = [chooses(model, step, seeds=(900, 17)) is not None for step in STEPS]
    assert decided == others
    assert not decided[0] and sum(decided[:30]) < 12 and sum(decided[-30:]) > 18
    expected = sum(step / 1000 for step in STEPS)
    spread = sum((step / 1000) * (1 - step / 1000) for step in STEPS) ** 0.5
    assert abs(sum(decided) - expected) < 4 * spread


def test_a_sample_decides_by_its_own_seed():
    model = dseq(lambda_granularity="sample")
    saliency = torch.rand(4000, 64, generator=torch.Generator().manual_seed(0))
    seeds, progress = torch.arange(4000), Progress(30, 100, 10.0)
    found, chosen = model.find(saliency), model.choose(saliency, seeds, progress)
    kept = chosen.count > 0
    rate = kept[found.count > 0].float().mean().item()
    assert rate == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5 + 1e-3)
    assert torch.equal(chosen.rid[kept], found.rid[kept]) and (chosen.rid[~kept] == 1).all()
    part = model.choose(saliency[100:200], seeds[100:200], progress)
    assert torch.equal(part.rid, chosen.rid[100:200])


def test_the_curriculum_ends_with_regions_and_begins_with_blocks():
    for granularity in ("step", "sample", "region"):
        model = dseq(lambda_granularity=granularity)
        regions = chooses(model, 1000)
        saliency = model.look(some_images(4).float())[1]
        assert torch.equal(regions.rid, model.find(saliency).rid)
    assert chooses(dseq(), 0) is None
    assert (chooses(dseq(lambda_granularity="sample"), 0).count == 0).all()


# Seeing what happens, and refusing what cannot work


def test_what_is_logged():
    model = dseq()
    parts = model(a_batch(8), END).parts
    having = [parts[f"images_with_{n}_regions"].item() for n in range(5)]
    assert sum(having) == pytest.approx(1) and parts["lambda"] == 1
    assert 0 < parts["region_1_share"] < 1 and parts["loss_step_1"] > 0
    assert 0 < parts["background_in_loss"] < 1
    assert not any(torch.as_tensor(value).requires_grad for value in parts.values())
    assert "images_with_0_regions" not in model(a_batch(8), START).parts


def test_pictures_show_saliency_regions_and_every_step():
    pictures = dseq().pictures(a_batch(3))
    assert set(pictures) == {"regions", "blocks"}
    assert pictures["regions"].height > 3 * 128 and pictures["regions"].width > 4 * 128


def test_encoders_and_options_that_cannot_work_are_refused():
    options = DSeqJEPA.Options(predictor_dim=16, predictor_num_heads=2)
    with pytest.raises(UserError, match="class token, which encoder.name=.* has not; write encoder.kwargs"):
        DSeqJEPA.check(options, encoder_config(class_token=False))
    with pytest.raises(UserError, match="saliency_block=7 is none of the 3 blocks"):
        DSeqJEPA.check(options.model_copy(update={"saliency_block": 7}), encoder_config(class_token=True))
    with pytest.raises(UserError, match="num_regions=65 is more than the 64 patches"):
        DSeqJEPA.check(options.model_copy(update={"num_regions": 65}), encoder_config(class_token=True))
