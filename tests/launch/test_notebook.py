"""Runs from Python: what is asked reaches the doors, an interrupt leaves a checkpoint, a refusal is one sentence."""

import io
import json
import os
import queue
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
from jupyter_client import KernelManager
from runs import ROOT, RunDir

import prelude
from prelude.data.errors import UserError
from prelude.launch import export, knn, notebook
from prelude.launch.children import Preempted
from prelude.launch.progress_line import ProgressLine
from prelude.launch.python_settings import option_words, overrides_of
from prelude.objectives import options_for
from prelude.pretrain.recipes import load_config


def overrides(settings: dict, recipe: str = "mae_cifar10") -> list[str]:
    told, followed = overrides_of(recipe, settings)
    assert not followed
    return told


def test_settings_are_named_in_full_or_by_their_last_part():
    told = overrides({"shards": Path("a.tar"), "epochs": 50, "optimizer.lr": 1e-3, "seed": 3})
    assert told == ["data.shards=a.tar", "train.epochs=50", "optimizer.lr=0.001", "seed=3"]
    told = overrides({"optimizer": {"lr": 1e-3, "betas": (0.9, 0.99)}, "mask_ratio": np.float64(0.6)})
    assert told == ["optimizer.lr=0.001", "optimizer.betas=[0.9, 0.99]", "objective.mask_ratio=0.6"]
    assert overrides({"kwargs": {"depth": 2}}) == ['encoder.kwargs={"depth": 2}']
    assert overrides({"compile": True, "weights": None}) == ["train.compile=true", "encoder.weights=null"]
    assert overrides({"shards": [Path("a.tar"), "b.tar"]}) == ['data.shards=["a.tar", "b.tar"]']


def test_lists_of_paths_with_any_letter_arrive_as_they_are():
    shards = ["data/😀/a.tar", "data/ü/b.tar", os.fsdecode(b"caf\xe9/c.tar"), "line\u2028end.tar", "a\x85.tar"]
    assert load_config("mae_cifar10", overrides({"shards": shards}), options_for).data.shards == shards


def test_a_section_that_names_another_kind_begins_anew_as_in_a_recipe():
    told = overrides({"objective": {"name": "vicreg"}, "encoder": {"image_size": 64}})
    assert told == ['objective={"name": "vicreg"}', "encoder.image_size=64"]
    assert load_config("mae_cifar10", told, options_for).objective["name"] == "vicreg"


@pytest.mark.parametrize("text", ["null", " a ", "[a", "'a'", '"', "{x", "a: b # c", "~", "7", "[7, 8]"])
def test_text_arrives_as_it_is_whatever_a_command_line_would_make_of_it(text):
    assert load_config("mae_cifar10", overrides({"shards": text}), options_for).data.shards == text


def test_a_short_name_of_several_keys_is_refused_with_all_of_them():
    with pytest.raises(UserError, match=r"momentum may be objective\.momentum or optimizer\.momentum; write the one"):
        overrides({"momentum": 0.9}, "ijepa_cifar10")


WARMUP, MILESTONES = "warmup_epochs: 10", "warmup_epochs: 1, milestones: [20, 30]"


@pytest.mark.parametrize(
    ("schedule", "settings", "expected"),
    [
        (WARMUP, {"epochs": 2}, ["optimizer.warmup_epochs=0.5"]),
        (WARMUP, {"train": {"epochs": 2}}, ["optimizer.warmup_epochs=0.5"]),
        (WARMUP, {"epochs": 2, "optimizer": {"lr": 1}}, ["optimizer.warmup_epochs=0.5"]),
        (WARMUP, {"epochs": 2, "warmup_epochs": 1}, []),
        (WARMUP, {"epochs": 2, "warmup_epochs": 0}, []),
        (WARMUP, {"epochs": 2, "optimizer": {"name": "adamw", "lr": 1}}, []),  # which begins anew
        (WARMUP, {"epochs": 10}, []),
        (WARMUP, {"epochs": 50}, []),
        (WARMUP, {"epochs": "many"}, []),
        (MILESTONES, {"epochs": 15}, ["optimizer.milestones=[7.5, 11.2]"]),
        (MILESTONES, {"epochs": 0.4}, ["optimizer.warmup_epochs=0.01", "optimizer.milestones=[0.2, 0.3]"]),
        (MILESTONES, {"epochs": 15, "milestones": [1]}, []),
        (MILESTONES, {"epochs": 35}, []),
    ],
)
def test_a_shorter_run_takes_its_share_of_a_schedule_that_would_not_end(schedule, settings, expected, tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(f"base: mae_cifar10\ntrain: {{epochs: 40}}\noptimizer: {{name: sgd, lr: 0.1, {schedule}}}\n")
    assert overrides_of(recipe, settings)[1] == expected


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"epochs": 10}, ["75"]),
        ({"epochs": 10, "optimizer": {"name": "sgd", "lr": 1}}, ["75"]),
        ({"epochs": 10, "global_batch": 2048}, ["37"]),
        ({"epochs": 10, "freeze_encoder_steps": 5}, []),
        ({"epochs": 80}, []),
        ({"seed": 1}, []),
    ],
)
def test_a_shorter_run_holds_its_encoder_still_for_its_share(settings, steps, tmp_path):
    recipe = tmp_path / "a.yaml"
    train = "epochs: 40, global_batch: 1024, freeze_encoder_steps: 300"
    recipe.write_text(f"base: mae_cifar10\ntrain: {{{train}}}\noptimizer: {{name: adamw, warmup_epochs: 0}}\n")
    assert overrides_of(recipe, settings)[1] == [f"train.freeze_encoder_steps={number}" for number in steps]


@pytest.mark.parametrize("name", ["mae_cifar10", "rotation_cifar10_paper", "quickstart", "barlow_resnet50"])
def test_a_tenth_of_an_epoch_can_be_trained_with_that_said_alone(name, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(notebook, "run_door", lambda door, words, **_: asked.append(words))
    prelude.pretrain(name, epochs=0.1)
    assert load_config(asked[0][1], asked[0][2:], options_for).train.epochs == 0.1
    told = capsys.readouterr().out
    assert told.startswith("The recipe is for a longer run; in this one its schedule keeps its share: ")
    assert ("warmup_epochs=" in told or "milestones=[" in told) and "optimizer." not in told


def words(**options) -> list[str]:
    return option_words(options, knn.parser())


def test_options_are_those_of_the_command():
    assert words(features=["cls", "mean"], num_workers=0, bank=None) == [
        "--features",
        "cls",
        "mean",
        "--num-workers",
        "0",
    ]
    assert words(train=["a.tar", Path("b.tar")]) == ["--train", "a.tar", "--train", "b.tar"]
    assert words(train_select={"share": 0.1, "seed": 3}) == ["--train-select", "share=0.1", "--train-select", "seed=3"]
    assert words(range=(0, 4095)) == ["--range", "0,4095"] and words(range="auto") == ["--range", "auto"]
    assert option_words({"check_hub": True}, export.parser()) == ["--check-hub"]
    assert option_words({"check_hub": False}, export.parser()) == []


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: prelude.pretrain("mae_cifar10", epoch=5), "epoch does not exist; did you mean epochs?"),
        (lambda: prelude.pretrain("mea_cifar10"), "No config at mea_cifar10; did you mean mae_cifar10?"),
        (lambda: prelude.pretrain(3), "recipe=3 cannot be; write the name of a recipe"),
        (lambda: prelude.pretrain("finetune_vit_base"), "finetune_vit_base is a recipe of fine-tuning"),
        (lambda: prelude.pretrain("mae_cifar10", ranks="2"), "ranks='2' cannot be; write a whole number of 1 or more"),
        (lambda: prelude.pretrain("mae_cifar10", ranks=True), "ranks=True cannot be"),
        (lambda: prelude.pretrain("mae_cifar10", shards=3), "shards=3 is refused: write a path or pattern, or a list"),
        (lambda: prelude.pretrain("mae_cifar10", shards=[]), "shards=[] is refused: write a path or pattern"),
        (lambda: prelude.pretrain("mae_cifar10", shards=["a", 3]), "shards=['a', 3] is refused: write a path"),
        (lambda: prelude.pretrain("mae_cifar10", shards=True), "shards=True is refused: write a path"),
        (lambda: prelude.pretrain("mae_cifar10", shards=None), "shards is missing; write shards=PATTERN"),
        (lambda: prelude.pretrain("mae_cifar10", shards={"a"}), "shards cannot be a set; write list(...) of it"),
        (lambda: prelude.pretrain("mae_cifar10", shards=object()), "shards cannot be a object; write a number, text"),
        (lambda: prelude.pretrain("mae_cifar10", run_dir=3), "run_dir=3 is refused: write a path"),
        (lambda: prelude.pretrain("mae_cifar10", objective="vicreg"), 'write **{"objective.name": "vicreg"}, or'),
        (lambda: prelude.pretrain("mae_cifar10", **{"a b": 1}), "'a b' is no key of a config"),
        (
            lambda: prelude.pretrain("mae_cifar10", epochs=2, warmup_epochs=5),
            "warmup_epochs=5 is longer than the run of epochs=2, whose learning rate would not reach its peak; write "
            "warmup_epochs=0.2, or more epochs.",
        ),
        (lambda: prelude.open_run("nowhere"), "nowhere holds no run; write the folder"),
        (lambda: prelude.open_run(None), "folder=None cannot be; write the folder"),
        (lambda: prelude.Run(Path("x")).config, "x/config.yaml is not there"),
        (lambda: prelude.Run(Path("x")).knn(kk=3), "kk is no option of `prelude knn`; did you mean k?"),
        (lambda: prelude.Run(Path("x")).knn(k="x"), "k: 'x' cannot be; write a whole number of 1 or more"),
        (lambda: prelude.Run(Path("x")).knn(batch_size=0), "batch_size: '0' cannot be; write a whole number"),
        (lambda: prelude.Run(Path("x")).knn(train=3), "train=3 cannot be; write a path or pattern."),
        (lambda: prelude.Run(Path("x")).knn(train=[]), "train=[] names nothing"),
        (lambda: prelude.Run(Path("x")).knn(label=3), "label=3 cannot be; write text."),
        (lambda: prelude.Run(Path("x")).knn(k=True), "k=True cannot be; write a value."),
        (lambda: prelude.Run(Path("x")).knn(classes=["a", "b"]), "classes=['a', 'b'] cannot be; write one value."),
        (lambda: prelude.Run(Path("x")).knn(None), "a source=None cannot be; write text, or a run."),
        (lambda: prelude.Run(Path("x")).probe(protocol="moco"), "protocol: invalid choice: 'moco'"),
        (lambda: prelude.Run(Path("x")).probe(ranks=0), "ranks=0 cannot be"),
        (lambda: prelude.Run(Path("x")).export(3), "to=3 cannot be; write a path."),
        (lambda: prelude.Run(Path("x")).export(), "x is no run that an export could lie in; write to=DIR."),
        (lambda: prelude.Run(Path("x")).export("y", format="onx"), "format onx is none; write one or more of timm"),
        (lambda: prelude.Run(Path("x")).export("y", check_hub="x"), "check_hub='x' cannot be; write True or False."),
    ],
)
def test_a_mistake_is_a_run_error_before_any_process_is_started(call, sentence, monkeypatch):
    monkeypatch.setattr(notebook, "run_door", None)
    with pytest.raises(prelude.RunError) as refused:
        call()
    assert sentence in str(refused.value) and refused.value.__cause__ is None


def test_what_a_door_says_is_told_in_the_spelling_of_python(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(notebook, "run_door", lambda *_, **__: said[-1])
    (tmp_path / "checkpoints").mkdir()
    run = prelude.open_run(tmp_path)
    for call, door, python in (
        (run.knn, "write --train SHARDS and --test SHARDS, or an evaluate section in the run's config.",
         "write train=SHARDS and test=SHARDS, or an evaluate section in the run's config."),
        (run.knn, "correct --test 'no-{4..5}.tar', or copy it; leave --bank out.",
         "correct test='no-{4..5}.tar', or copy it; leave bank out."),
        (run.knn, "--seeds 0 leaves nothing to do.", "seeds=0 leaves nothing to do."),
        (run.probe, "write --weight-decays 0.1 1, docker run --shm-size=8g.",
         "write weight_decays=[0.1, 1], docker run --shm-size=8g."),
        (run.probe, "leave out --protocol.", "leave out protocol."),
        (run.export, "write --dtype float16, or --check-hub.", 'write dtype="float16", or check_hub=True.'),
        (lambda: prelude.pretrain("mae_cifar10"),
         "write train.precision=fp32, train.gradient_checkpointing=true, data.shards='a b', log.every_steps=3, "
         "data.range=[0, 255] and data.num_workers=0.",
         'write precision="fp32", gradient_checkpointing=True, shards=\'a b\', **{"log.every_steps": 3}, '
         "range=[0, 255] and num_workers=0."),
    ):  # fmt: skip
        said.append(door)
        with pytest.raises(prelude.RunError) as refused:
            call()
        assert str(refused.value) == python


def test_sources_beside_a_run_may_be_runs_and_an_export_lies_where_the_command_would_put_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(notebook, "run_door", lambda door, words, **_: asked.append(words))
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    one, other = prelude.open_run(tmp_path / "a"), prelude.open_run(str(tmp_path / "b"))
    one.knn(other, "pixels")
    assert asked.pop() == [str(one.folder), str(other.folder), "pixels"]
    assert one.export() == one.folder / "export" and one.export(format="onnx") == one.folder / "export-onnx"
    assert one.export(format=["timm", "onnx"]) == one.folder / "exports"
    assert one.export(tmp_path / "c", format="onnx") == tmp_path / "c"
    assert [word[1:] for word in asked] == [
        [], ["--format", "onnx"], ["--format", "timm", "onnx"], ["--format", "onnx", "--to", str(tmp_path / "c")],
    ]  # fmt: skip


def test_a_run_is_found_from_another_folder(monkeypatch, tmp_path):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run = prelude.open_run("a")
    monkeypatch.chdir("/")
    assert run.folder == tmp_path / "a" and run.untrained == f"random:{tmp_path / 'a'}"


def test_a_damaged_line_of_a_log_is_left_out(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    lines = ['{"step": 1, "loss": 2.0}', '{"step": 2, "lo\x00', '{"step": 3, "loss": 1.0}', '{"step": 4, "l']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = prelude.open_run(tmp_path)
    assert [record["step"] for record in run.metrics()] == [1, 3] and "step 3, loss 1.0000" in repr(run)


def test_results_are_known_by_what_was_written_whatever_the_clock_says(monkeypatch, tmp_path):
    """With each source's run. A file server may be behind; and `~` is the home folder, as at the door."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "evaluations").mkdir()

    written = []

    def judge(door, words, **_):
        for source in words[1::-1]:
            name = "a" if source == str(tmp_path / "a") else "b"
            written.append(source)
            path = tmp_path / name / "evaluations" / f"{len(written)}.json"
            path.write_text(json.dumps({"source": source, "command": f"prelude {door} {shlex.join(words)}"}))
            os.utime(path, (1, 1))

    monkeypatch.setattr(notebook, "run_door", judge)
    (tmp_path / "a" / "evaluations" / "old.json").write_text(json.dumps({"source": "x", "command": "prelude knn"}))
    run = prelude.open_run(tmp_path / "a")
    assert [result["source"] for result in run.knn("~/b")] == [str(tmp_path / "a"), str(tmp_path / "b")]
    (tmp_path / "b" / "export").mkdir()
    for other in (f"local-dir:{tmp_path / 'b' / 'export'}", f"{tmp_path / 'b'}#student"):
        assert [result["source"] for result in run.knn(other)] == [str(tmp_path / "a"), other]


def test_a_run_that_somebody_else_ended_is_no_interrupt_of_ours(monkeypatch):
    def ended(*_, **__):
        raise Preempted(through_us=False)

    monkeypatch.setattr(notebook, "run_door", ended)
    with pytest.raises(prelude.RunError, match="asked to end by somebody else"):
        prelude.pretrain("mae_cifar10")


def test_a_step_is_one_line_on_a_terminal_however_narrow(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown, text = Terminal(), "step 2/4  loss 1.5000  lr 1.00e-03  321 images/s  250 ms a step"
    line = ProgressLine(shown, live=True)
    for columns in ("60", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        line(text)
    drawn = f"{'█' * 10}{'░' * 10} {text}"
    assert shown.getvalue().split("\r") == ["", drawn[:59], drawn[:39]]


def test_steps_are_one_line_that_moves_and_all_else_stays():
    shown = io.StringIO()
    line = ProgressLine(shown, live=True)
    for text in (
        "begins",
        "step 1/4  loss 2",
        "step 2/4  loss 1.5",
        "step 2  k-NN 40",
        "step 4/4  loss 1",
        "error: no",
    ):
        line(text)
    line.end()
    told = shown.getvalue()
    assert (
        told.startswith("begins\n")
        and told.split("\r")[-2].endswith("step 2/4  loss 1.5\nstep 2  k-NN 40\n")
        and "error" not in told
    )
    assert told.count("\r") == 3 and told.endswith("█ step 4/4  loss 1\n") and "█████░░" in told
    shown = io.StringIO()
    for text in ("step 1/4  loss 2", "step 2/4  loss 1"):
        ProgressLine(shown, live=False)(text)
    assert shown.getvalue() == "step 1/4  loss 2\nstep 2/4  loss 1\n"


class Kernel:
    """A real kernel, asked to run one cell after another."""

    def __init__(self, folder: Path):
        self.manager = KernelManager()
        env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        self.manager.start_kernel(env=env, cwd=str(folder))
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str, meanwhile=lambda: None) -> tuple[str, list[str]]:
        """What the cell printed, and the lines of its error."""
        self.client.execute(code)
        printed, error, until = "", [], time.monotonic() + 240
        while time.monotonic() < until:
            meanwhile()
            try:
                message = self.client.get_iopub_msg(timeout=0.05)
            except queue.Empty:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                printed += content["text"]
            elif message["msg_type"] == "error":
                error = content["traceback"]
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return printed, error
        raise AssertionError(f"the cell does not end: {printed[-2000:]}")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def test_a_kernel_is_interrupted_with_a_checkpoint_and_goes_on_at_two_ranks(recipe, tmp_path):
    kernel, run = Kernel(tmp_path), RunDir(tmp_path / "run")
    call = "run = prelude.pretrain(%r, run_dir='run', epochs=8, ranks=%d, **{'checkpoint.every_steps': 1000})"
    stopped = []

    def interrupt():
        if not stopped and len(run.metrics()) >= 3:
            stopped.append(True)
            kernel.manager.interrupt_kernel()

    try:
        assert kernel.run("import prelude, sys") == ("", [])
        printed, error = kernel.run(call % (str(recipe), 1), meanwhile=interrupt)
        assert error == ["Interrupted: pretrain was asked to end, and has; the same call goes on from there."]
        assert "\r░" in printed
        (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
        assert 3 <= int(saved.name.removeprefix("step-")) < 100

        printed, error = kernel.run(call % (str(recipe), 2))
        assert error == [] and f"resumed at step {int(saved.name.removeprefix('step-'))} of 100" in printed
        assert kernel.run("print(run.metrics()[-1]['step'], 'torch' in sys.modules)") == ("100 False\n", [])
        printed, error = kernel.run("run.knn(train='nowhere/*.tar', test='nowhere/*.tar')")
        assert len(error) == 1 and error[0].startswith("RunError: ") and "nowhere/*.tar" in error[0]
    finally:
        kernel.close()
