"""Judging an encoder while it trains: the same numbers as afterwards, and nothing that happens there hurts the run."""

import io
import os
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from extracting import extract

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.errors import UserError
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.online import monitor as online
from prelude.evaluators.online.monitor import OnlineProbe
from prelude.evaluators.online.worker import Judge
from prelude.pretrain import stopping
from prelude.pretrain.config import Config
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.feature_health import feature_health
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress


def config_of(folder, **evaluate) -> Config:
    shards = {"train_shards": f"{folder}/shapes/train-*.tar", "test_shards": f"{folder}/shapes/test-*.tar"}
    kwargs = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    return validate_config(
        {
            "run_dir": str(folder),
            "seed": 3,
            "data": {"shards": "none"},
            "encoder": {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8, "kwargs": kwargs},
            "objective": {"name": "mae"},
            "train": {"epochs": 1, "global_batch": 8},
            "optimizer": {"lr": 1e-3},
            "evaluate": shards | {"every_steps": 10, "device": "cpu"} | evaluate,
        },
        "a test",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_shards(folder / "shapes", "train", 100, image_size=16, samples_per_shard=60)
    write_shards(folder / "shapes", "test", 40, image_size=16)
    return folder


def weights_of(config: Config, seed: int) -> dict:
    return build_encoder(config.encoder, seed=seed).state_dict()


def test_the_numbers_are_those_of_the_offline_evaluators(folder):
    config = config_of(folder)  # a subset that takes all
    model = build_encoder(config.encoder, seed=5).eval()
    encoder = OpenedEncoder(model, config.encoder, config.data.mean, config.data.std, "offline", "")
    section = config.evaluate
    train, test = (extract(encoder, ShardIndex(s, "cls")) for s in (section.train_shards, section.test_shards))
    found = Judge(config, torch.device("cpu"))(weights_of(config, 5))
    for name, evaluator in (("knn", knn), ("linear", linear_probe)):
        top1 = evaluator(train, test, seed=3).numbers["top1"]
        assert (found[name], found[f"{name}_se"]) == (top1.value, top1.se)
    for name, value in feature_health(train["mean"].values).items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5)


def test_a_subset_is_as_large_as_asked_for_and_new_weights_give_new_numbers(folder):
    config = config_of(folder, num_train=50, num_test=20)
    judge = Judge(config, torch.device("cpu"))
    assert [sum(map(len, batches)) for batches, *_ in judge.parts] == [50, 20]
    first, second, again = (judge(weights_of(config, seed)) for seed in (0, 1, 0))
    assert first["feature_std"] != second["feature_std"]
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_test_images_that_are_train_images_too_are_told(folder):
    config = config_of(folder, test_shards=f"{folder}/shapes/*-000000.tar")  # 60 of train, 40 of test
    judge = Judge(config, torch.device("cpu"))
    assert judge.leaks == ["60 of 100 test images are train images too, and nothing new."]
    assert Judge(config_of(folder), torch.device("cpu")).leaks == []


def test_labels_that_cannot_judge_are_refused_before_the_run(folder, tmp_path):
    online.check(config_of(folder))
    with pytest.raises(UserError, match="has no image with a .json member; write evaluate.label"):
        online.check(config_of(folder, label="json"))
    members = {"a": [("0.jpg", b"x"), ("0.json", b"[0.5, 1]")], "pairs": [("0.a.jpg", b"x"), ("0.b.jpg", b"x")]}
    for shard, inside in members.items():
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for name, content in inside:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    one, several = ({f"{side}_shards": f"{tmp_path}/{shard}.tar" for side in ("train", "test")} for shard in members)
    with pytest.raises(UserError, match="evaluate.label=json is no class number in evaluate.train_shards="):
        online.check(config_of(folder, **one, label="json"))
    with pytest.raises(UserError, match="evaluate.test_shards=.* extension, as evaluate.image=left.jpg.$"):
        online.check(config_of(folder, **several))


def test_images_that_the_run_would_not_read_are_refused_before_it(folder):
    config = config_of(folder)
    data = config.data.model_copy(update={"channels": 6})
    with pytest.raises(UserError, match="train-.* have 3 channels, and 6 are asked for"):
        online.check(config.model_copy(update={"data": data}))


def test_stage_3_is_refused_with_what_to_write(folder):
    values = config_of(folder).model_dump(mode="json")
    values["train"]["zero_stage"] = 3
    with pytest.raises(UserError, match="train.zero_stage=2, or evaluate.every_steps=0"):
        validate_config(values, "a test")


class Ready:
    """An OnlineProbe whose process is there, and everything that it reported."""

    def __init__(self, config: Config, first: int = 0):
        self.config, self.probe, self.reports = config, OnlineProbe(config), []
        self.probe.start(at(first))

    def offer(self, step: int, seed: int = 0) -> bool:
        wanted = self.probe.wants_encoder(at(step))
        if wanted:
            self.probe.encoder(step, weights_of(self.config, seed))
        return wanted

    def wait(self) -> list:
        self.probe.finish()
        return self.probe.found()


def at(step: int) -> Progress:
    return Progress(step, 35, 10.0)


def test_evaluations_that_cannot_be_read_again_are_not_known_and_end_no_start(folder, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "online.jsonl").write_text('{"step": 10, "kind": "evaluation"}\n')
    probe = OnlineProbe(config_of(folder).model_copy(update={"run_dir": str(tmp_path)}))
    with monkeypatch.context() as patch:
        patch.setattr(online.subprocess, "Popen", refused)  # it is of no use here
        probe.start(at(10))
        assert probe.known == {10}
        patch.setattr(Path, "read_bytes", refused)
        probe.start(at(10))
    assert probe.known == set()


def test_a_run_is_judged_beside_it_and_a_dead_process_is_told(folder):
    ready = Ready(config_of(folder))
    assert ready.offer(0)
    assert not ready.offer(5)  # not due
    assert not ready.offer(10)  # due, but step 0 is still being judged
    skipped, first = sorted(ready.wait(), key=lambda report: report.kind, reverse=True)
    assert (skipped.kind, skipped.step) == ("notice", 10) and "that of step 0 is still under way" in skipped.text
    assert (first.kind, first.step) == ("evaluation", 0)
    expected = Judge(ready.config, torch.device("cpu"))(weights_of(ready.config, 0))
    assert {**first.numbers, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=1e-5)
    assert "k-NN" in first.text and "linear" in first.text

    assert ready.offer(20, seed=1) and ready.offer(35, seed=2)  # the last step waits for its turn
    assert [(report.step, report.kind) for report in ready.wait()] == [(20, "evaluation"), (35, "evaluation")]

    ready.probe.process.kill()
    (told,) = waited_for(ready)
    assert told.kind == "notice" and "code -9" in told.text and "online.log" in told.text
    assert not ready.offer(30) and ready.probe.found() == []
    ready.probe.close()
    assert not ready.probe.weights_file.exists()


def test_a_subset_that_cannot_be_read_is_told_in_a_sentence(folder):
    ready = Ready(config_of(folder, label="json"))
    ready.offer(0)
    (told,) = ready.wait()
    assert told.kind == "notice" and "json" in told.text and "goes on without" in told.text
    assert not ready.offer(10)
    ready.probe.close()


def test_waiting_for_the_last_evaluation_has_an_end(folder, monkeypatch):
    monkeypatch.setattr(online, "LAST_WAIT", 0.01)
    config = config_of(folder)
    told_before = Path(config.run_dir) / "online.jsonl"
    told_before.write_text('{"step": 10, "kind": "evaluation"}\n{"step": 20, "kind": "notice"}\n')
    ready = Ready(config, first=20)
    assert ready.offer(20)  # resumed there, where a kill came before the answer
    ready.probe.close()
    told_before.write_text('{"step": 20, "kind": "evaluation"}\n')
    ready = Ready(config, first=20)
    assert not ready.offer(20)  # resumed there: it was judged before
    assert ready.offer(35)
    (told,) = ready.wait()
    assert "given up" in told.text
    told_before.unlink()
    process = ready.probe.process
    ready.probe.close()
    assert process.poll() is not None  # not left behind


def test_waiting_for_the_last_evaluation_ends_when_the_run_is_asked_to(folder):
    ready = Ready(config_of(folder), first=20)
    ready.probe.process.send_signal(signal.SIGSTOP)  # it will never answer
    assert ready.offer(35)
    with stopping.postponed():
        os.kill(os.getpid(), signal.SIGTERM)
        (told,) = ready.wait()
    with stopping.postponed(besides=lambda: True):  # by its STOP file
        (told_again,) = ready.wait()
    assert told_again.text == told.text and "step 35 was given up, as the run was asked to end" in told.text
    ready.probe.process.kill()
    ready.probe.close()


def waited_for(ready: Ready) -> list:
    ready.probe._take_answers(wait=60)
    return ready.probe.found()
