import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from findings import NAMES
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from tuned import MEAN, VIT, opened

from prelude.data.errors import UserError
from prelude.data.loader import one_pass
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.labels import class_numbers
from prelude.evaluators.finetuning import finetune
from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.evaluators.finetuning.testing import Found, TestCurve, Testing
from prelude.evaluators.results import percent
from prelude.pretrain.monitors import StepRecord
from prelude.pretrain.resume import changed_settings
from prelude.pretrain.schedules import Progress

RECIPES = sorted((Path(__file__).parents[3] / "configs").glob("finetune_*.yaml"))


def test_every_weight_that_has_a_place_is_the_sources(prepared):
    task = prepared("objective.drop_path=0.2")
    encoder, source = finetune.build(task).encoder, task.opened.model.state_dict()
    ours = encoder.state_dict()
    assert set(ours) - set(source) == {"fc_norm.weight", "fc_norm.bias"}
    assert set(source) - set(ours) == {"norm.weight", "norm.bias"}
    assert all(torch.equal(ours[name], source[name]) for name in set(ours) & set(source))
    assert isinstance(encoder.pos_embed, torch.nn.Parameter) and encoder.pos_embed.requires_grad
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]
    assert rates == pytest.approx([0.0, 0.2])


def test_pooling_is_the_mean_of_patches_before_a_new_norm_or_the_encoders_own(prepared):
    images = torch.randn(2, 3, 16, 16)
    task = prepared()
    encoder, source = finetune.build(task).encoder.eval(), task.opened.model
    tokens = source.blocks(source._pos_embed(source.patch_embed(images)))
    expected = torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)
    task = prepared("objective.pooling=own")
    own = finetune.build(task).encoder.eval()
    torch.testing.assert_close(own(images), task.opened.model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["dinov3", "eva02", "beit", "siglip", "gap", "intern"])
def test_other_transformers_are_pooled_alike(prepared, source):
    task, images = prepared(source=source), torch.randn(2, 3, 16, 16)
    encoder, own = finetune.build(task).encoder.eval(), task.opened.model.eval()
    (patches,) = own.forward_intermediates(images, indices=1, norm=False, output_fmt="NLC", intermediates_only=True)
    eps = own.blocks[0].norm1.eps
    expected = torch.nn.functional.layer_norm(patches.mean(1), (32,), eps=eps)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)
    assert not [name for name in encoder.state_dict() if name.startswith(("norm.", "attn_pool."))]


def test_a_larger_image_resamples_the_table_of_positions(prepared):
    encoder = finetune.build(prepared("objective.image_size=32")).encoder
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, 32)
    expected = timm.layers.resample_abs_pos_embed(opened(VIT).model.pos_embed, (8, 8), (4, 4), num_prefix_tokens=1)
    torch.testing.assert_close(encoder.pos_embed.detach(), expected)


def test_a_convnet_is_taken_as_it_is(prepared):
    task = prepared("objective.drop_path=0.1", source="resnet")
    ours, source = finetune.build(task).encoder.state_dict(), task.opened.model.state_dict()
    assert ours.keys() == source.keys() and all(torch.equal(ours[name], source[name]) for name in source)


@pytest.mark.parametrize("asked", [0.0, 0.2])
def test_paths_are_dropped_as_the_recipe_says_whatever_timm_and_pretraining_do(prepared, asked):
    task = prepared(f"objective.drop_path={asked}", source="swin")
    encoder, images = finetune.build(task).encoder.train(), torch.randn(16, 3, 16, 16)
    assert max(getattr(part, "drop_prob", 0.0) for part in encoder.modules()) == pytest.approx(asked)
    assert torch.equal(encoder(images), encoder(images)) == (asked == 0)


def test_a_function_that_takes_no_drop_path_is_taken_as_it_is(prepared):
    assert prepared(source="own_swin").config.encoder.kwargs == {}


def test_from_scratch_is_the_same_recipe_elsewhere(prepared):
    tuned, scratch = prepared(), prepared(from_scratch=True)
    assert scratch.source == scratch.opened.name == "random:somewhere"
    assert scratch.config.run_dir == "tuned_from_scratch"
    then, now = (task.config.model_dump(exclude={"run_dir"}) for task in (tuned, scratch))
    assert then == now


def test_a_random_encoder_is_not_held_still(prepared):
    still = "train.freeze_encoder_steps=2"
    assert prepared(still).config.train.freeze_encoder_steps == 2
    for how in ({"from_scratch": True}, {"source": "random:somewhere"}):
        with pytest.raises(UserError, match="freeze_encoder_steps=2 would hold an encoder that is still random"):
            prepared(still, **how)


def test_another_start_is_another_run(prepared, monkeypatch):
    before = prepared().config
    monkeypatch.setattr(finetune, "open_encoder", lambda source, *, seed=0: opened(VIT, seed=5))
    changes = changed_settings(before.model_dump(mode="json"), prepared().config, FineTuneOptions)
    assert len(changes) == 1 and changes[0].startswith("objective.weights: ")


def test_few_labels_are_those_of_the_seed(prepared):
    task = prepared("objective.per_class=3")
    numbers = class_numbers(task.samples.train).values.numpy()
    assert torch.bincount(torch.from_numpy(numbers)).tolist() == [3] * 10
    assert task.samples.classes.tolist() == list(range(10))
    assert prepared("objective.fraction=0.5").samples.train.num_samples == 50
    assert prepared("objective.per_class=3", "seed=1").samples.train.fingerprint != task.samples.train.fingerprint
    assert prepared().samples.train.num_samples == 100


def test_pixels_are_normalised_as_in_pretraining_unless_the_recipe_says_otherwise(prepared):
    assert prepared().config.data.mean == MEAN
    assert prepared("data.std=[1, 1, 1]").config.data.std == (1, 1, 1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_sound_and_opens_with_four_lines(path, prepared, findings):
    recipe = yaml.safe_load(path.read_text())
    source = "somewhere" if any(word in path.stem for word in ("vit", "ijepa", "cxr")) else "resnet"
    few = {"fraction": None} if "1percent" in path.stem else {}  # of ten images a class
    recipe["objective"] |= few
    labels = {}
    if "evaluate" in recipe:
        recipe["evaluate"] |= {"label_names": NAMES, "label_field": "findings"}
        labels = findings
    task = prepared(source=source, recipe=recipe, **labels)
    assert task.config.run_dir == f"runs/{path.stem}"
    heads = [line.split(":")[0] for line in path.read_text().splitlines()[:4]]
    assert heads == ["# Trains", "# Takes", "# Reaches", "# Command"]
    assert f"--config configs/{path.name}" in path.read_text()


MISTAKES = {
    "the encoder is the source's": (["encoder.image_size=32"], {}, "leave the section encoder out"),
    "shards in the wrong place": (["data.shards=x.tar"], {}, "write evaluate.train_shards, or --train SHARDS"),
    "a wrong section key": (["evaluate.test_shard=x.tar"], {}, "did you mean evaluate.test_shards?"),
    "a length that is counted": (["data.num_samples=5"], {}, "leave it out"),
    "volumes beside images": (
        ["data.volumes.shards=x.tar"],
        {},
        "data.volumes has no effect on fine-tuning",
    ),
    "a probe of pretraining": (["evaluate.every_steps=5"], {}, "test_every_epochs"),
    "a watch of pretraining": (["collapse.stop=true"], {}, "leave it out"),
    "a wrong key": (["objective.mixupp=0.8"], {}, "did you mean objective.mixup?"),
    "two ways to take few": (["objective.per_class=1", "objective.fraction=0.1"], {}, "write one."),
    "an odd batch of pairs": (["objective.mixup=0.8", "train.global_batch=5"], {}, "write an even train.global_batch."),
    "too few of a class": (["objective.per_class=11"], {}, "has 10 training images, fewer than objective.per_class=11"),
    "no shards": ([], {"test": None}, "write --test SHARDS"),
    "no labels": ([], {"label": "json"}, "has a .json member; write another label"),
    "another objective": (["objective.name=mae"], {}, "write fine_tune, or leave it out."),
    "stage 3": (["train.zero_stage=3"], {}, "write train.zero_stage=2."),
    "a setting without effect": (["objective.augment={policy: trivial, num_ops: 3}"], {}, "trivial has no settings"),
    "a growing rate": (["objective.layer_decay=1.5"], {}, "objective.layer_decay=1.5 is refused"),
    "patches that do not fit": (["objective.image_size=18"], {}, "not a whole number of patches"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, prepared):
    overrides, arguments, expected = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        prepared(*overrides, **arguments)
    message = str(error.value)
    assert expected in message
    assert len(message.splitlines()) <= 2  # the sentence, below a line that counts the errors of a config


def scoring(task, classifier) -> Testing:
    samples = task.samples
    return Testing(classifier, samples.test, samples.label, samples.findings, batch_size=16, num_workers=0)


def test_every_test_image_is_scored_once_and_labels_unknown_to_train_are_missed(prepared, shards):
    task = prepared("objective.per_class=2", "objective.class_weights=balanced")
    classifier = finetune.build(task)
    with torch.no_grad():
        classifier.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    classifier.train()
    found = scoring(task, classifier)()
    assert classifier.training
    classifier.eval()
    truth, guessed, five = [], [], 0
    for batch in one_pass(ShardIndex(shards["test"], "cls"), classifier.test_views, batch_size=1, label="cls"):
        order = classifier.scores(batch)[0].argsort(descending=True)
        truth.append(int(batch.labels[0]))
        guessed.append(int(order[0]))
        five += int(batch.labels[0] in order[:5])
    assert found.values["top1"] == pytest.approx(100 * accuracy_score(truth, guessed))
    assert found.values["balanced"] == pytest.approx(100 * balanced_accuracy_score(truth, guessed))
    assert found.values["top5"] == pytest.approx(100 * five / 45) and (found.total, found.unreadable) == (45, 0)
    classifier.classes = classifier.classes + 100
    assert scoring(task, classifier)().values["top5"] == 0


def test_classes_that_train_lacks_are_missed_in_the_mean_of_classes_too(prepared, shards, tmp_path):
    write_shards(tmp_path, "train", 6, image_size=16)
    task = prepared("objective.class_weights=balanced", train=f"{tmp_path}/train-*.tar")
    classifier = finetune.build(task).eval()
    truth, guessed = [], []
    for batch in one_pass(ShardIndex(shards["test"], "cls"), classifier.test_views, batch_size=45, label="cls"):
        truth += batch.labels.tolist()
        guessed += classifier.classes[classifier.scores(batch).argmax(1)].tolist()
    expected = np.mean([np.mean([g == c for t, g in zip(truth, guessed, strict=True) if t == c]) for c in set(truth)])
    assert len(classifier.classes) < len(set(truth)) and expected > 0
    assert scoring(task, classifier)().values["balanced"] == pytest.approx(100 * expected)


def test_what_makes_a_number_doubtful_is_told_as_by_every_evaluator(prepared, shards, tmp_path):
    both = prepared(train=list(shards.values()))
    assert "45 of 45 test images are train images too, and nothing new." in both.samples.warnings
    lone = tmp_path / "one.tar"
    with tarfile.open(sorted(Path(shards["test"]).parent.glob("test-*.tar"))[0]) as tar, tarfile.open(lone, "w") as to:
        for member in tar.getmembers()[:30]:
            content = tar.extractfile(member).read()
            if member.name.endswith(".cls"):
                content = [b"77", b"", content][int(member.name[-5]) % 3]
            member.size = len(content)
            to.addfile(member, io.BytesIO(content))
    task = prepared(test=str(lone))
    num_unlabelled, samples = task.samples.test.num_unlabelled, task.samples
    assert num_unlabelled and "are of classes that train lacks (77), and count as missed" in samples.warnings[0]
    found = scoring(task, finetune.build(task))()
    assert found.unreadable == 0 and found.total == samples.test.index.num_samples - num_unlabelled
    result = finetune.result_of(task, finetune.build(task), found, {}, "prelude finetune", 1.0)
    assert f"{num_unlabelled} of 10 test images left out, without a label." in result.outcome.warnings
    assert any("test images are few" in told for told in result.outcome.warnings)


def test_test_images_that_cannot_be_taken_are_refused_before_the_training(prepared, tmp_path):
    with tarfile.open(tmp_path / "damaged.tar", "w") as tar:
        for number in range(5):
            for ending, content in (("png", b"no image"), ("cls", b"1")):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    task = prepared(test=str(tmp_path / "damaged.tar"))
    with pytest.raises(UserError, match="can be read; write other shards"):
        scoring(task, finetune.build(task))()
    pixels = np.zeros((16, 16, 5), np.float32)
    with tarfile.open(tmp_path / "deep.tar", "w") as tar:
        out = io.BytesIO()
        np.save(out, pixels)
        for ending, content in (("npy", out.getvalue()), ("cls", b"1")):
            member = tarfile.TarInfo(f"0.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match="have 5 channels, and 3 are asked for"):
        prepared(test=str(tmp_path / "deep.tar"))


def test_pixels_are_read_by_the_range_of_the_run_and_that_is_recorded(prepared, monkeypatch):
    from prelude.evaluators import judging

    monkeypatch.setattr(judging, "sections_of", lambda sources, name: [{"range": [0, 4095]}] if name == "data" else [])
    assert prepared().config.data.range == (0, 4095)
    assert prepared("data.range=[0,255]").config.data.range == (0, 255)


def test_the_result_has_what_is_needed_to_redo_it(prepared):
    task = prepared("objective.per_class=2")
    found = Found({"top1": percent(9, 45), "top5": percent(27, 45)}, total=45, unreadable=0)
    result = finetune.result_of(task, finetune.build(task), found, {"curve": []}, "prelude finetune", 1.0).to_json()
    assert result["numbers"]["top1"]["value"] == 20.0
    assert result["numbers"]["top1"]["se"] == pytest.approx(100 * math.sqrt(0.2 * 0.8 / 45))
    assert result["data"]["train"]["num_samples"] == 20 and result["data"]["test"]["num_samples"] == 45
    assert result["recipe"]["objective"]["per_class"] == 2 and result["encoder"]["name"] == "somewhere"


def test_the_curve_is_tested_once_an_epoch_and_forgets_what_a_checkpoint_does_not_know(tmp_path):
    calls = []

    def test(current):
        assert current  # a curve is of the weights as they are
        calls.append(1)
        return Found({"top1": percent(len(calls), 10)}, total=10, unreadable=0)

    def record(step):
        return StepRecord(step, 20, step / 4, 0, {}, 0, 0, 0, 0, 0, 0, 0, 0, 0)

    path = tmp_path / "test.jsonl"
    curve = TestCurve(test, 1.0, path)
    curve.start(Progress(0, 20, 4.0))
    for step in range(1, 11):
        curve.record(record(step))
    assert [line["step"] for line in curve.lines.read()] == [4, 8]
    curve = TestCurve(test, 1.0, path)
    curve.start(Progress(5, 20, 4.0))
    for step in range(6, 13):
        curve.record(record(step))
    assert [(line["step"], line["top1"]) for line in curve.lines.read()] == [(4, 10.0), (8, 30.0), (12, 40.0)]
    curve = TestCurve(test, 1.0, path)
    curve.start(Progress(17, 20, 4.0))  # killed between the end of epoch 4 and the next logged step
    curve.record(record(18))
    assert [line["step"] for line in curve.lines.read()] == [4, 8, 12, 18]


def test_the_curve_of_a_run_whose_end_is_a_whole_epoch_has_its_end(tmp_path):
    curve = TestCurve(lambda current: Found({}, total=10, unreadable=0), 1.0, tmp_path / "test.jsonl")
    an_epoch = 50_000 / 96  # 15,625 steps of it are 29.999999999999996 epochs
    curve.start(Progress(0, 15_625, an_epoch))
    for step in (15_620, 15_625):
        curve.record(StepRecord(step, 15_625, step / an_epoch, 0, {}, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    assert [line["step"] for line in curve.lines.read()] == [15_620, 15_625]
    curve.start(Progress(15_625, 15_625, an_epoch))
    assert curve.done == 30


def test_a_curve_that_cannot_be_read_is_not_known_and_ends_no_start(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "test.jsonl").write_text('{"step": 4, "epoch": 1.0}\n')
    curve = TestCurve(None, 1.0, tmp_path / "test.jsonl")
    curve.start(Progress(5, 20, 4.0))
    assert curve.done == 1
    monkeypatch.setattr(Path, "read_bytes", refused)
    curve.start(Progress(5, 20, 4.0))
    assert curve.done == 0
