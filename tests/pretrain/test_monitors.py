import errno
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prelude.pretrain.monitors import (
    ConsoleMonitor,
    CurvesMonitor,
    JsonlMonitor,
    Report,
    ReportsMonitor,
    StepRecord,
)
from prelude.pretrain.schedules import Progress

RECORD = StepRecord(
    step=5,
    num_steps=100,
    epoch=0.5,
    loss=0.75,
    parts={"pixel_mse": 0.25},
    lr=1e-3,
    weight_decay=0.05,
    grad_norm=2.0,
    images_per_second=321.0,
    data_wait=0.03,
    eta_seconds=3725.0,
    skipped_steps=0,
    bad_samples=2,
    peak_memory=2**30,
    step_seconds=0.25,
    mfu=0.31,
)

EVALUATION = Report(5, "evaluation", "k-NN 41.3 %, linear 52.7 %", {"knn": 41.25, "linear": 52.71})
COLLAPSE = Report(9, "collapse", "features [all] alike", {"loss": 0.1}, cause="same_features")


def test_metrics_after_the_checkpoint_are_dropped_on_resume_even_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlMonitor(path)
    first.start(Progress(0, 100, 10.0))
    for step in (1, 2, 3):
        first.record(replace(RECORD, step=step))
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')
    second = JsonlMonitor(path)
    second.start(Progress(2, 100, 10.0))
    second.record(replace(RECORD, step=3, loss=0.5))
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.75), (2, 0.75), (3, 0.5)]
    assert lines[0]["parts"] == {"pixel_mse": 0.25}


@pytest.mark.parametrize(("batch_now", "step", "kept"), [(32, 2, [0, 1, 1, 2]), (8, 8, [2, 4, 6, 8])])
def test_a_run_that_goes_on_with_another_batch_keeps_its_lines_and_counts_them_anew(tmp_path, batch_now, step, kept):
    path = tmp_path / "metrics.jsonl"
    first = JsonlMonitor(path)
    first.start(Progress(0, 100, 10.0))
    for number in range(1, 7):  # of 16 images; the checkpoint is that of step 4
        first.record(replace(RECORD, step=number))
    first.close()
    as_it_was = path.read_text()
    for _ in range(2):  # a start that is killed before its first checkpoint, and the next
        again = JsonlMonitor(path)
        again.recount(4, 16, batch_now)
        again.start(Progress(step, 100, 10.0))
        again.record(replace(RECORD, step=step + 1))
        again.close()
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, step + 1]
    (aside,) = tmp_path.glob("metrics-before-*.jsonl")
    assert aside.name == "metrics-before-00000004-of-16.jsonl" and aside.read_text() == as_it_was
    back = JsonlMonitor(path)  # from memory that did not suffice, say
    back.recount(4, 16, 16)
    back.start(Progress(4, 100, 10.0))
    back.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_lines_that_a_later_start_is_the_first_to_write_are_not_counted_anew(tmp_path):
    for _ in range(2):
        reports = ReportsMonitor(tmp_path / "online.jsonl")
        reports.recount(4, 16, 32)
        reports.start(Progress(2, 100, 10.0))
        assert reports.lines.read() == []
        reports.report(replace(EVALUATION, step=3))
        reports.close()


def test_tensorboard_has_the_scalars_and_the_pictures(tmp_path):
    monitor = CurvesMonitor(tmp_path)
    monitor.start(Progress(0, 100, 10.0))
    monitor.record(RECORD)
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    monitor.pictures(5, {"reconstruction": picture})
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 0.75
    assert events.Scalars("parts/pixel_mse")[0].step == 5
    speed = {"images_per_second": 321.0, "step_seconds": 0.25, "data_wait": 0.03, "mfu": 0.31, "peak_memory": 2.0**30}
    for name, value in speed.items():
        assert events.Scalars(f"train/{name}")[0].value == pytest.approx(value)
    assert events.Images("reconstruction")[0].width == 480
    drawn = np.asarray(Image.open(tmp_path / "pictures" / "reconstruction-00000005.png"))
    assert np.array_equal(drawn[::120, ::120], np.asarray(picture))  # enlarged by a whole factor


def printed(is_terminal: bool, records: list[StepRecord]) -> str:
    monitor = ConsoleMonitor()
    monitor.console = Console(record=True, force_terminal=is_terminal, width=160, file=open("/dev/null", "w"))
    monitor.start(Progress(0, 100, 10.0))
    for record in records:
        monitor.record(record)
    monitor.close()
    return monitor.console.export_text()


def test_the_console_says_how_the_run_is_doing():
    for terminal in (True, False):
        text = printed(terminal, [RECORD])
        for expected in ("loss 0.7500", "321 images/s", "250 ms a step", "data wait 3%", "MFU 31%", "memory 1.0 GiB"):
            assert expected in text
        for expected in ("ETA 1:02:05", "bad samples 2", "5/100"):
            assert expected in text
    assert "MFU" not in printed(False, [replace(RECORD, mfu=None)])


@pytest.mark.parametrize("width", [80, 40])
def test_a_narrow_terminal_has_the_bar_and_every_number_whole(width):
    monitor, screen = ConsoleMonitor(), io.StringIO()
    monitor.console = Console(force_terminal=True, width=width, file=screen, color_system=None)
    monitor.start(Progress(0, 100, 10.0))
    monitor.report(EVALUATION)
    monitor.record(replace(RECORD, skipped_steps=3))
    monitor.close()
    lines = screen.getvalue().rpartition("\x1b[2K")[2].splitlines()
    expected = ["epoch 0.50", "loss 0.7500", "lr 1.00e-03", "321 images/s", "250 ms a step",
                "data wait 3%", "MFU 31%", "memory 1.0 GiB", "ETA 1:02:05", "skipped 3",
                "bad samples 2", "k-NN 41.2 %", "linear 52.7 %"]  # fmt: skip
    assert all(any(part in line for line in lines) for part in expected)
    assert any("━" in line and line.rstrip().endswith("5/100") for line in lines)
    assert max(map(len, lines)) <= width and "…" not in screen.getvalue()


def test_a_log_file_gets_a_line_for_every_twentieth_of_the_run():
    text = printed(False, [replace(RECORD, step=step) for step in range(1, 101)])
    assert len(text.strip().splitlines()) == 20


def test_reports_are_kept_one_a_line_and_those_after_the_checkpoint_dropped(tmp_path):
    path = tmp_path / "online.jsonl"
    monitor = ReportsMonitor(path)
    monitor.start(Progress(0, 100, 10.0))
    assert not path.exists()
    for report in (EVALUATION, COLLAPSE):
        monitor.report(report)
    ReportsMonitor(path).start(Progress(7, 100, 10.0))
    (line,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (line["step"], line["kind"], line["numbers"]["knn"]) == (5, "evaluation", 41.25)


def test_the_console_tells_reports_and_repeats_the_newest_evaluation():
    monitor = ConsoleMonitor()
    monitor.console = Console(record=True, width=160, file=open("/dev/null", "w"))
    monitor.start(Progress(0, 100, 10.0))
    for report in (EVALUATION, COLLAPSE):
        monitor.report(report)
    monitor.record(replace(RECORD, step=10))
    text = monitor.console.export_text()
    assert "step 5  k-NN 41.3 %" in text and "step 9  warning features [all] alike" in text
    assert "data wait 3%" in text and text.rstrip().endswith("k-NN 41.2 %  linear 52.7 %")


def test_tensorboard_has_online_numbers_and_warnings(tmp_path):
    monitor = CurvesMonitor(tmp_path)
    monitor.start(Progress(0, 100, 10.0))
    for report in (EVALUATION, COLLAPSE):
        monitor.report(report)
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("online/knn")[0].value == 41.25
    assert b"alike" in events.Tensors("collapse/text_summary")[0].tensor_proto.string_val[0]


def test_no_log_ends_a_run_on_a_full_disk_and_none_loses_a_number(tmp_path, monkeypatch, caplog):
    monitors = [JsonlMonitor(tmp_path / "metrics.jsonl"), ReportsMonitor(tmp_path / "online.jsonl")]
    monitors.append(CurvesMonitor(tmp_path))
    for monitor in monitors:
        monitor.start(Progress(0, 100, 10.0))

    def watch(step):
        for monitor in monitors:
            monitor.record(replace(RECORD, step=step))
            monitor.report(replace(EVALUATION, step=step))
            monitor.pictures(step, {"views": Image.new("RGB", (8, 8))})
            monitor.saving(step)

    watch(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        watch(2)
        watch(3)
    assert len(caplog.messages) == 4  # metrics, reports, events, pictures: each once
    watch(4)
    for monitor in monitors:
        monitor.close()
    for name in ("metrics.jsonl", "online.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [each.step for each in events.Images("views")] == [1, 4]


def test_metrics_are_on_the_disk_before_the_checkpoint_that_they_lead_to(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    monitor = JsonlMonitor(tmp_path / "metrics.jsonl")
    monitor.start(Progress(0, 100, 10.0))
    monitor.record(RECORD)
    monitor.saving(5)
    assert (tmp_path / "metrics.jsonl").stat().st_ino in synced and tmp_path.stat().st_ino in synced


def test_a_console_that_nobody_reads_ends_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    monitor = ConsoleMonitor()
    monitor.console.file = os.fdopen(writer, "w", buffering=1)
    monitor.start(Progress(2, 100, 10.0))
    monitor.record(replace(RECORD, step=100))
    monitor.close()
    with pytest.raises(BrokenPipeError):  # so it was a console that nobody reads
        monitor.console.file.close()


def test_tensorboard_events_are_those_of_torch(tmp_path):
    """Its own writer on one side: the same tags, steps and values on the other."""
    from torch.utils.tensorboard import SummaryWriter

    theirs = SummaryWriter(tmp_path / "theirs", purge_step=3)
    theirs.add_scalar("train/loss", 0.75, 5)
    theirs.close()
    monitor = CurvesMonitor(tmp_path)
    monitor.start(Progress(2, 100, 10.0))
    monitor.record(RECORD)
    monitor.close()
    found = []
    for folder in ("theirs", "tensorboard"):
        events = EventAccumulator(str(tmp_path / folder), purge_orphaned_data=True)
        events.Reload()
        found.append([(each.step, each.value) for each in events.Scalars("train/loss")])
    assert found[0] == found[1] == [(5, 0.75)]
