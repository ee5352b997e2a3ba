"""Real engines under the real launcher: what one saved, another at any stage and world size goes on from.

All jobs of a world size run in one launch, because a launch costs seconds.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from forked import code_of
from runs import LAUNCHED, deepspeed
from safetensors.torch import load_file
from timm.optim import Lamb
from torch import nn

from prelude.checkpoints.saved import open_checkpoint
from prelude.checkpoints.state.holders import Holder
from prelude.checkpoints.state.scalars import restored_scalars

SCRIPT = Path(__file__).with_name("script.py")
# (stage, optimizer): every stage with Adam; the others where they may be used.
PAIRS = [(0, "adamw"), (1, "adamw"), (2, "adamw"), (3, "adamw"), (1, "lion"), (2, "sgd"), (0, "lars"), (0, "lamb")]
# (stage, world) that saved -> (stage, world) that loads
CROSSINGS = [
    ((0, 1), (1, 2)),
    ((0, 2), (1, 1)),
    ((1, 2), (2, 2)),
    ((2, 2), (0, 1)),
    ((3, 2), (2, 1)),
    ((0, 1), (3, 2)),
    ((3, 2), (1, 3)),
    ((1, 2), (3, 3)),
    ((0, 2), (0, 3)),
    ((3, 2), (2, 3)),
]


def launch(jobs: list[dict], folder: Path, world: int) -> None:
    plan = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    plan.write_text(json.dumps(jobs))
    if world == 1:
        assert code_of(lambda: alone(plan)) == 0
        return
    keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    command = [*deepspeed(world), str(SCRIPT), str(plan)]
    env = keep | LAUNCHED | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def alone(plan: Path) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    sys.argv = [str(SCRIPT), str(plan)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except BaseException:  # the copy ends without a word
        traceback.print_exc()
        os._exit(1)


def crossing(source: tuple[int, int], target: tuple[int, int]) -> str:
    return f"{source[0]}on{source[1]}-to-{target[0]}on{target[1]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Everything that was trained, saved, loaded and refused; the tests only compare."""
    folder = tmp_path_factory.mktemp("runs")

    def store(stage, world, optimizer="adamw"):
        return str(folder / f"store-{stage}on{world}-{optimizer}")

    def dump(name):
        return str(folder / name)

    def crossings(world):
        return [
            dict(stage=b[0], seed=9, folder=store(*a), load="step-00000003", dump_loaded=dump(crossing(a, b)))
            for a, b in CROSSINGS
            if b[1] == world
        ]

    def saved_and_resumed(stage, world, optimizer, **more):
        own = dict(stage=stage, optimizer=optimizer, folder=store(stage, world, optimizer), **more)
        name = f"{stage}on{world}-{optimizer}"
        ends = dict(dump_saved=dump(f"{name}-saved"), dump=dump(f"{name}-uninterrupted"))
        yield own | dict(steps=3, save=True, more_steps=2, note="ü", **ends)
        yield own | dict(
            seed=9, load="step-00000003", dump_loaded=dump(f"{name}-loaded"), steps=2, dump=dump(f"{name}-resumed")
        )

    fp16 = saved_and_resumed(0, 1, "sgd", precision="float16")
    launch([dict(stage=0, folder=store(0, 1), steps=3, save=True), *fp16], folder, world=1)

    saved = store(0, 1)

    def refused(name, **job):
        return dict(stage=0, folder=saved, errors=dump(name)) | job

    refusals = [
        refused("missing", load="step-00000007"),
        refused("model", load="step-00000003", width=8),
        refused("optimizer", load="step-00000003", optimizer="sgd", stage=2),
        refused("half", save=True, precision="bf16.enabled"),
        refused("loss-scale", save=True, precision="float16", stage=1),
        refused("full", load="step-00000003", steps=1, save=True, disk_full=0),
        refused("full-elsewhere", load="step-00000003", steps=1, save=True, disk_full=1),
    ]
    pairs = [job for stage, optimizer in PAIRS for job in saved_and_resumed(stage, 2, optimizer)]
    apart = dict(stage=2, steps=3, save=True, apart=1, folder=store(2, 2, "apart"), places=dump("places.json"))
    launch([*pairs, apart, *crossings(2), *refusals], folder, world=2)
    launch(crossings(1), folder, world=1)
    looks = [dict(look=str(damaged_copy(Path(store(1, 2)), folder / name)), answers=dump(f"{name}.json"))
             for name in ("some-damaged", "all-damaged")]  # fmt: skip
    looks.append(looks[0] | dict(blind=1, answers=dump("blind.json")))
    launch([*crossings(3), *looks], folder, world=3)
    return folder


def damaged_copy(source: Path, to: Path) -> Path:
    """With a later checkpoint, of which a byte in a part of each rank is another; `all`: in the earlier one too."""
    shutil.copytree(source, to)
    shutil.copytree(to / "step-00000003", to / "step-00000004")
    manifest = to / "step-00000004" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"serial": 9}))
    for step in ("3", "4") if "all" in to.name else ("4",):
        for part in (to / f"step-0000000{step}").glob("model-*"):
            data = bytearray(part.read_bytes())
            data[-3] ^= 1
            part.write_bytes(data)
    return to


def read(folder: Path) -> tuple[dict, dict]:
    """(every tensor by name, everything else)"""
    tensors = load_file(folder / "tensors") | load_file(folder / "moments")
    return tensors, json.loads((folder / "facts.json").read_text())


def saved_by(runs: Path, stage: int, world: int, optimizer: str = "adamw") -> tuple[dict, dict]:
    saved = open_checkpoint(runs / f"store-{stage}on{world}-{optimizer}" / "step-00000003")
    return dict(saved.tensors) | dict(saved.moments), {"scalars": saved.scalars}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("stage, optimizer", PAIRS)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(runs, stage, optimizer):
    straight, facts = read(runs / f"{stage}on2-{optimizer}-uninterrupted")
    resumed, resumed_facts = read(runs / f"{stage}on2-{optimizer}-resumed")
    assert_same(straight, resumed)
    assert facts["scalars"] == resumed_facts["scalars"]
    assert resumed_facts["meta"] == {"step": 3, "note": "ü"}


@pytest.mark.parametrize("source, target", CROSSINGS)
def test_any_stage_and_world_size_takes_up_the_same_state(runs, source, target):
    saved, saved_facts = saved_by(runs, *source)
    loaded, loaded_facts = read(runs / crossing(source, target))
    assert_same(saved, loaded)
    assert saved_facts["scalars"] == loaded_facts["scalars"]


@pytest.mark.parametrize("stage, optimizer", PAIRS)
def test_a_checkpoint_holds_weights_teacher_buffers_and_moments(runs, stage, optimizer):
    tensors, facts = saved_by(runs, stage, 2, optimizer)
    moments = {"adamw": ["exp_avg", "exp_avg_sq"], "lamb": ["exp_avg", "exp_avg_sq"], "lion": ["exp_avg"]}
    layers = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias", "scale"]
    norms = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    expected = {f"{network}.{name}" for network in ("encoder", "teacher") for name in layers + norms} | {"center"}
    expected |= {f"encoder.{name}/{key}" for name in layers for key in moments.get(optimizer, ["momentum_buffer"])}
    assert set(tensors) == expected
    assert not torch.equal(tensors["teacher.head.weight"], tensors["encoder.head.weight"])
    assert all(tensors[name].abs().sum() > 0 for name in tensors if name.endswith("exp_avg_sq"))
    assert torch.equal(tensors["center"], torch.full((7,), 0.75))
    if optimizer in ("adamw", "lamb"):
        key = "step" if optimizer == "adamw" else "group.step"
        assert {scalars[key]["value"] for scalars in facts["scalars"].values()} == {3.0}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_buffers_are_equal_on_all_ranks_after_a_load(runs, stage):
    _, trained = read(runs / f"{stage}on2-adamw-uninterrupted")
    _, loaded = read(runs / f"{stage}on2-adamw-loaded")
    mine, other = trained["buffers"]
    assert mine["encoder.norm.running_mean"] != other["encoder.norm.running_mean"], "nothing to make equal"
    mine, other = loaded["buffers"]
    assert mine == other


def test_the_loss_scale_of_fp16_goes_on_where_it_was(runs):
    straight, facts = read(runs / "0on1-sgd-uninterrupted")
    resumed, resumed_facts = read(runs / "0on1-sgd-resumed")
    assert_same(straight, resumed)
    assert facts["loss_scaler"] == resumed_facts["loss_scaler"] and facts["loss_scaler"]["_growth_tracker"] == 5


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("missing", "step-00000007 is no complete checkpoint: there is no such folder"),
        ("model", "another model: shapes differ .*encoder.head.weight .7, 180. against .8, 180."),
        ("optimizer", "state of AdamW, this run uses SGD"),
        ("half", "float32 weights, which deepspeed.bf16"),
        ("loss-scale", "each rank has its own fp16 loss scale"),
        ("full", "step-00000004 could not be saved .*rank 0 on .*No space left.*goes on from step-00000003"),
        ("full-elsewhere", "step-00000004 could not be saved .*rank 1 on .*No space left.*goes on from step-00000003"),
    ],
)
def test_every_rank_hears_the_same_refusal(runs, name, sentence):
    mine, other = json.loads((runs / name).read_text())
    assert mine == other
    assert re.search(sentence, mine), mine
    assert mine.startswith("RunStopped" if "full" in name else "UserError")


def test_a_checkpoint_that_one_rank_could_not_write_leaves_nothing(runs):
    assert sorted(path.name for path in (runs / "store-0on1-adamw").iterdir()) == ["latest", "step-00000003"]


@pytest.mark.parametrize("stage, optimizer", PAIRS)
def test_ranks_write_in_parts_what_rank_0_would_gather(runs, stage, optimizer):
    gathered, facts = read(runs / f"{stage}on2-{optimizer}-saved")
    saved, saved_facts = saved_by(runs, stage, 2, optimizer)
    assert_same(gathered, saved)
    assert facts["scalars"] == saved_facts["scalars"]
    folder = runs / f"store-{stage}on2-{optimizer}" / "step-00000003"
    sizes = [(folder / f"model-0000{rank}-of-00002.safetensors").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 0.7 * sum(sizes) and not (folder / "model.safetensors").exists()


def test_where_a_rank_does_not_see_the_folder_rank_0_writes_the_whole(runs):
    apart, together = (saved_by(runs, 2, 2, name)[0] for name in ("apart", "adamw"))
    assert_same(apart, together)
    files = sorted(path.name for path in (runs / "store-2on2-apart" / "step-00000003").iterdir())
    assert files == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert not list((runs / "store-2on2-apart").glob(".tmp-*"))


def test_where_rank_0_writes_the_whole_no_rank_seems_to_be_behind_the_others(runs):
    """Or the one with fewer places would be named as the one that all wait for."""
    first, second = json.loads((runs / "places.json").read_text())
    assert first == second > 0


@pytest.mark.parametrize("case, readers", [("some-damaged", {0, 1, 2}), ("blind", {0, 2})])
def test_ranks_read_each_byte_of_a_checkpoint_once_to_check_it(runs, case, readers):
    answers = json.loads((runs / f"{case}.json").read_text())
    assert [found for found, _ in answers] == [["step-00000003", "step-00000003"]] * 3
    assert {rank for rank, (_, read) in enumerate(answers) if read} == readers
    parts = [f"{content}-0000{rank}-of-00002.safetensors" for content in ("model", "optimizer") for rank in (0, 1)]
    steps = (3, 4, 4)  # what is damaged is looked at again, in case it has been mended
    files = [f"step-0000000{step}/{name}" for step in steps for name in (*parts, "pieces.json", "state.json")]
    assert sorted(name for _, read in answers for name in read) == sorted(files)


def test_what_any_rank_finds_damaged_is_refused_by_all(runs):
    refusals = {found for found, _ in json.loads((runs / "all-damaged.json").read_text())}
    (refusal,) = refusals
    for step in (3, 4):
        for rank in (0, 1):
            assert refusal.count(f"model-0000{rank}-of-00002.safetensors does not match its checksum") == 2
        assert f"step-0000000{step}: model-" in refusal


@pytest.mark.parametrize("saved", [3, {"value": 3.0, "dtype": "float32"}])
def test_lamb_counts_on_from_a_number_of_whatever_release_of_timm(saved):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = Lamb([parameter])
    holder = Holder(parameter, optimizer.param_groups[0], {"weight": parameter.shape}, lambda *_: (0, 3, 0), False)
    moments = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    optimizer.state[parameter] = restored_scalars({"group.step": saved}, holder) | moments
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.param_groups[0]["step"]) == 4
