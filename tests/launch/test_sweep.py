"""A sweep over a tiny recipe: what it runs, what it repeats, what it tells; and its array of jobs."""

import json
import os
import subprocess

import pytest
import yaml

from prelude.data.errors import OTHER_FOLDER
from prelude.data.shapes import write_shards
from prelude.evaluators.comparing import run_record
from prelude.launch import prelude, sweeping
from prelude.launch.children import Preempted
from prelude.launch.combinations import combinations_of
from prelude.launch.exit_codes import INCOMPLETE, PREEMPTED, door
from prelude.launch.sweeping import Row, in_order
from prelude.objectives import options_for
from prelude.pretrain.recipes import load_config


@pytest.fixture(scope="module")
def small(recipe, tmp_path_factory):
    """A recipe of 4 steps, with online evaluation."""
    folder = tmp_path_factory.mktemp("sweep")
    write_shards(folder, "train", 60, seed=1, image_size=16)
    write_shards(folder, "test", 30, seed=1, image_size=16)
    values = yaml.safe_load(recipe.read_text())
    values["data"]["num_workers"] = 0
    values["train"]["epochs"], values["optimizer"]["warmup_epochs"] = 0.3, 0
    shards = {f"{part}_shards": f"{folder}/{part}-*.tar" for part in ("train", "test")}
    values["evaluate"] = shards | {"every_steps": 100, "num_train": 60, "num_test": 30}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def trained(monkeypatch):
    """The names of runs that the door of pretraining is asked for, which it then fakes: fails, stops or does."""
    asked, answers = [], {}

    def fake(door, arguments, *, num_ranks, name, environment):
        assert environment == {OTHER_FOLDER: "another --out"}
        asked.append(name)
        answer = answers.get(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(sweeping, "run_door", fake)
    return asked, answers


def test_a_sweep_trains_what_is_not_finished_and_tells_its_online_probe_and_loss(small, tmp_path, monkeypatch):
    argv = ["sweep", str(small / "tiny.yaml"), "objective.mask_ratio=[0.5]", "seed=3", "--out", str(tmp_path)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert prelude.main(argv) == 0
    (row,) = json.loads((tmp_path / "sweep.json").read_text())
    run = tmp_path / "mask_ratio=0.5"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["objective"]["mask_ratio"] == 0.5 and config["seed"] == 3
    reports = [json.loads(line) for line in (run / "online.jsonl").read_text().splitlines()]
    last = [report["numbers"] for report in reports if report["kind"] == "evaluation"][-1]
    assert row["online"]["linear"] == {"value": last["linear"], "se": last["linear_se"]} and row["finished"]
    last_loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert row["loss"] == last_loss and row["steps"] == 4
    table = (tmp_path / "sweep.md").read_text().splitlines()
    assert table[0] == "| objective.mask_ratio | online linear, top-1 % | online k-NN, top-1 % | loss | steps |"
    assert table[2].startswith(f"| 0.5 | {last['linear']:.1f} ± {last['linear_se']:.1f} | {last['knn']:.1f} ± ")

    asked = []
    monkeypatch.setattr(sweeping, "run_door", lambda *_, name, **__: asked.append(name))
    assert prelude.main(argv) == 0 and asked == []  # all is there
    argv[2] = "objective.mask_ratio=[0.5,0.6]"
    assert prelude.main(argv) == 0 and asked == ["mask_ratio=0.6"]  # a wider one keeps what it has
    assert (tmp_path / "sweep.md").read_text().splitlines()[3] == "| 0.6 | – | – | – | 0 not begun |"
    assert prelude.main([*argv, "data.image=jpg"]) == 0 and len(asked) == 3  # of other images none is
    assert prelude.main([*argv[:3], "seed=4", *argv[4:]]) == 0 and len(asked) == 5  # nor of another seed


def test_the_online_probe_decides_the_order_and_no_loss_does(small):
    combinations = combinations_of(str(small / "tiny.yaml"), ["seed=[0,1,2,3,4]"], None)
    found = [None, 40.0, None, 60.0, 50.0]
    rows = [
        Row(combination, 4, loss, {"linear": (value, 1.0)} if value else {}, True)
        for combination, loss, value in zip(combinations, (5, 4, 3, 2, 1), found, strict=True)
    ]
    assert [row.combination.values["seed"] for row in in_order(rows)] == [3, 4, 1, 0, 2]


def test_a_run_that_fails_ends_no_other_and_the_exit_code_says_so(small, tmp_path, trained, capsys):
    asked, answers = trained
    answers["lr=0.01,seed=2"] = "It ran out of luck."
    argv = ["sweep", str(small / "tiny.yaml"), "optimizer.lr=[0.01,0.02]", "seed=[1,2]", "--out", str(tmp_path)]
    assert prelude.main(argv) == INCOMPLETE
    assert asked == ["lr=0.01,seed=1", "lr=0.01,seed=2", "lr=0.02,seed=1", "lr=0.02,seed=2"]
    assert "lr=0.01,seed=2: It ran out of luck." in " ".join(capsys.readouterr().out.split())
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["problem"] for row in rows] == [None, "It ran out of luck.", None, None]
    assert "It ran out of luck." in (tmp_path / "sweep.md").read_text()


def test_a_run_whose_checkpoints_cannot_be_used_ends_no_other(small, tmp_path, trained):
    asked, _ = trained
    damaged = tmp_path / "lr=0.01" / "checkpoints" / "step-00000003"
    damaged.mkdir(parents=True)
    (damaged.parent / "latest").write_text(damaged.name)
    argv = ["sweep", str(small / "tiny.yaml"), "optimizer.lr=[0.01,0.02]", "--out", str(tmp_path)]
    for words in (argv, [*argv, "--table"]):
        assert prelude.main(words) == INCOMPLETE and asked == ["lr=0.02"]
        problems = [row["problem"] for row in json.loads((tmp_path / "sweep.json").read_text())]
        assert "has checkpoints and none can be used" in problems[0] and problems[1] is None


def test_runs_on_other_volumes_are_not_finished(tmp_path, monkeypatch):
    def config(**volumes):
        shards = [f"data.volumes.{key}={value}" for key, value in volumes.items()]
        return load_config("uni4eye_shapes", [f"run_dir={tmp_path}", "data.shards=a.tar", *shards], options_for)

    meta = {"config": config(shards="v.tar").model_dump(mode="json"), "num_steps": 7}
    monkeypatch.setattr(run_record, "_saved", lambda _: {"step": 7, "meta": meta})
    options = options_for("uni4eye")
    assert run_record.is_finished_as(config(shards="v.tar"), options)
    for other in ({"shards": "w.tar"}, {"image": "oct.npy"}, {"select.share": 0.5}):
        assert not run_record.is_finished_as(config(**{"shards": "v.tar"} | other), options)


def test_a_sweep_that_is_asked_to_end_ends_and_goes_on_later(small, tmp_path, trained):
    asked, answers = trained
    answers["lr=0.02"] = Preempted()
    argv = ["sweep", str(small / "tiny.yaml"), "optimizer.lr=[0.01,0.02,0.03]", "--out", str(tmp_path)]
    assert prelude.main(argv) == PREEMPTED and asked == ["lr=0.01", "lr=0.02"]
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 3
    assert prelude.main([*argv, "--table"]) == 0 and len(asked) == 2


def test_a_list_is_what_a_setting_goes_through_unless_the_setting_is_one(small):
    recipe = str(small / "tiny.yaml")

    def values(*overrides) -> list[dict]:
        return [combination.values for combination in combinations_of(recipe, overrides, None)]

    betas = "optimizer.betas=[[0.9, 0.95], [0.9, 0.999]]"
    assert values(betas) == [{"optimizer.betas": [0.9, 0.95]}, {"optimizer.betas": [0.9, 0.999]}]
    assert values("seed=[1]", "optimizer.betas=[0.8, 0.9]") == [{"seed": 1}]
    assert values("train.precision=[fp32, bf16]", "seed=[1, 2]") == [
        {"train.precision": one, "seed": seed} for one in ("fp32", "bf16") for seed in (1, 2)
    ]
    names = [each.name for each in combinations_of(recipe, ["train.epochs=[1, 2e-1]", "seed=[0]"], None)]
    assert names == ["epochs=1,seed=0", "epochs=0.2,seed=0"]
    assert values("encoder.image_size=[[16, 32]]") == [{"encoder.image_size": [16, 32]}]
    assert values("encoder.image_size=[16, [32, 32]]") == [{"encoder.image_size": one} for one in (16, [32, 32])]
    config = combinations_of(recipe, [betas], "there")[1].config
    assert config.optimizer.betas == (0.9, 0.999) and config.run_dir.startswith("there/betas=_0.9")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["optimizer.lrr=[1e-3]"], "optimizer.lrr does not exist; did you mean optimizer.lr?"),
        (["optimizer.lr=[]"], "optimizer.lr=[] has no value to go through"),
        (["optimizer.lr=[1e-3]", "optimizer.lr=[1e-2]"], "optimizer.lr is set 2 times"),
        (["optimizer.lr=[1e-3, 0.001]"], "optimizer.lr is to go through 0.001 twice"),
        (
            ["encoder.image_size=[16, 32]", "seed=[1]"],
            "write encoder.image_size=[[16, 16], [32, 32]] to go through these, and encoder.image_size=[[16, 32]] for",
        ),
        (["optimizer.lr=1e-3"], "There is nothing to go through"),
        ([], "There is nothing to go through"),
        (["optimizer.lr=[1e-3, -1]"], "optimizer.lr=-1 is refused: write a number above 0"),
        (["optimizer.lr=[1e-3]", "run_dir=x"], "run_dir is each run's own in a sweep; write --out DIR"),
        (["optimizer.lr=[1e-3]", "--ranks", "3"], "train.global_batch=16 cannot be shared equally by 3 ranks"),
        (["optimizer.lr=[1e-3]", "data.shards=/nowhere.tar"], "/nowhere.tar"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(wrong, told, small, tmp_path, trained, capsys):
    out = tmp_path / "out"
    assert door(lambda: prelude.main(["sweep", str(small / "tiny.yaml"), *wrong, "--out", str(out)])) == 2
    assert told in capsys.readouterr().err and trained[0] == [] and not out.exists()


def test_a_place_that_takes_no_table_is_refused_before_anything_runs(small, trained, capsys):
    argv = ["sweep", str(small / "tiny.yaml"), "optimizer.lr=[1e-3]", "--out", "/proc/nowhere"]
    assert door(lambda: prelude.main(argv)) == 2
    assert "--out /proc/nowhere is no folder that can be written; choose another" in capsys.readouterr().err
    assert trained[0] == []


def test_the_batch_script_gives_each_index_its_combination_and_requeues(small, tmp_path, capsys):
    out = tmp_path / "with space"
    argv = ["sweep", str(small / "tiny.yaml"), "optimizer.lr=[0.01,0.02]", "seed=[1,2]", "data.channels=3"]
    argv += ["data.shards=/only/on/nodes/{0..9}.tar"]
    assert prelude.main([*argv, "--out", str(out), "--slurm"]) == 0
    script = capsys.readouterr().out
    assert "--array=0-3" in script and not out.exists()
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (
        ("srun", f'printf "%s\\n" "$@" > {tmp_path}/given; exit 75'),
        ("scontrol", f'echo "$@" >> {tmp_path}/asked; echo host1'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7"}
    env |= {"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NODELIST": "host1"}
    done = subprocess.run(["bash", "-s"], input=script, env=env, text=True, capture_output=True)
    assert done.returncode == 75, done.stderr
    given = (tmp_path / "given").read_text().splitlines()
    assert given[2].endswith("launch/pretrain.py") and given[3:5] == ["--config", str(small / "tiny.yaml")]
    run_dir = f"run_dir={out}/lr=0.02,seed=1"
    there = "data.shards=/only/on/nodes/{0..9}.tar"
    assert given[5:] == [run_dir, "data.channels=3", there, "optimizer.lr=0.02", "seed=1"]
    assert "requeue 7_2" in (tmp_path / "asked").read_text()
