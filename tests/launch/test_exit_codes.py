"""How a door ends where neither its user nor its code is to blame."""

import json
import os
import subprocess
import sys

import pytest
import torch
from packed_shards import grey, write_tar
from runs import LAUNCHED

from prelude.launch import pretrain
from prelude.launch.exit_codes import UNREAD, door
from prelude.pretrain import distributed


def used_up_by(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 23 GiB"),
            "CUDA out of memory",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
            "[enforce fail at alloc_cpu.cpp:124] ",
        ),
        (MemoryError("Unable to allocate 9.09 TiB for an array"), "Unable to allocate 9.09 TiB for an array"),
        (MemoryError(), "no more was to be had"),
    ],
)
def test_memory_that_is_used_up_is_a_sentence(error, reason, capsys):
    assert door(used_up_by(error)) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"error: Memory is used up ({reason}") and "write a smaller train.micro_batch" in said


def test_another_fault_is_shown_whole():
    with pytest.raises(RuntimeError, match="memory of elephants"):
        door(used_up_by(RuntimeError("memory of elephants")))
    with pytest.raises(BrokenPipeError):  # of another pipe
        door(used_up_by(BrokenPipeError()))


def test_a_run_whose_images_cannot_be_read_stops_itself_and_says_which(recipe, tmp_path, capsys):
    shards = write_tar(tmp_path / "x.tar", {f"{n:02}.ppm": b"garbage" if n % 2 else grey(16) for n in range(40)})
    run_dir, data = tmp_path / "run", [f"data.shards={shards}", "data.num_workers=0", "data.max_bad_share=0.3"]
    assert door(lambda: pretrain.main(["--config", str(recipe), f"run_dir={run_dir}", *data])) == 3
    distributed.stop()
    listed = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
    assert len(listed) > 16 and all(int(line["key"]) % 2 and line["reason"] == "not an image" for line in listed)
    said = capsys.readouterr().err
    assert f"could not be read, more than data.max_bad_share=0.3; see {run_dir}/bad_samples.jsonl" in said


def test_what_nobody_reads_ends_without_a_word():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "prelude.launch.prelude", "recipes"], env=os.environ | LAUNCHED, stdout=write,
        stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (UNREAD, "")
