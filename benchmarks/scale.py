"""What a step sends between ranks, counted, for every objective at every ZeRO stage; and what that is with many ranks.

Two ranks train a few steps of each case through the real engine and DeepSpeed on made-up images. Every collective that
reaches a process group is counted, in a step that is not logged and in one that is, with the bytes of its tensors and
the part of the code that asked for it. Bytes that a rank sends follow from these by what rings need (an all-reduce of M
bytes: 2 M (W - 1) / W; gathering or scattering M bytes in all: M (W - 1) / W), for --ranks.

    python benchmarks/scale.py                       (small models, for the number of messages)
    python benchmarks/scale.py --full --stages 0 1   (the recipes' own encoders, with two images a rank)
    python benchmarks/scale.py --rendezvous 1024     (how long that many ranks take to find each other)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ports import free_port

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # so that it runs as a script from anywhere

COMMON = ("train.epochs=1", "optimizer.warmup_epochs=0", "optimizer.warmup_lr=0", "train.precision=fp32")
SMALL = {
    "mae": ("mae_cifar10", ()),
    "ijepa": ("ijepa_cifar10", ()),
    "dseqjepa": ("dseqjepa_cifar10", ()),
    "barlow_twins": ("barlow_cifar10", ()),
    "spark": ("spark_resnet18_cifar10", ()),
    "rotation": ("rotation_cifar10", ("optimizer.milestones=[]",)),
}
FULL = {
    "mae": ("mae_vit_base", ()),
    "ijepa": ("ijepa_vit_base", ()),
    "barlow_twins": ("barlow_resnet50", ()),
    "spark": ("spark_resnet50", ()),
}
_OPS = ("allreduce", "allreduce_coalesced", "broadcast", "allgather", "_allgather_base", "allgather_coalesced",
        "allgather_into_tensor_coalesced", "reduce", "reduce_scatter", "_reduce_scatter_base",
        "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base", "gather", "scatter", "barrier",
        # as torch 2.14 calls them
        "all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced",
        "all_to_all_single", "gather_single")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the recipes' own encoders")
    parser.add_argument("--cases", nargs="+", choices=SMALL)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, default=1024, help="for which bytes are told")
    parser.add_argument("--counted-with", type=int, default=2, help="ranks that are started")
    parser.add_argument("--rendezvous", type=int, metavar="RANKS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = [
        (name, stage) for name in args.cases or (FULL if args.full else SMALL) for stage in args.stages
    ]  # fmt: skip
    if args.inside:
        count_all(cases, args.full, args.inside)
        return
    if args.rendezvous:
        print(rendezvous(args.rendezvous))
        return
    with tempfile.TemporaryDirectory() as folder:
        out = args.json or Path(folder) / "found.json"
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(args.counted_with)]
        command += ["--master_port", str(free_port()), __file__, *sys.argv[1:], "--inside", str(out)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(command, env=env | {"PATH": path}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        print(table(json.loads(out.read_text()), args.ranks))


# ---- counting


def count_all(cases: list[tuple[str, int]], full: bool, out: Path) -> None:
    """On every rank. What the first one finds is written after each case."""
    from prelude.objectives import objective_class
    from prelude.pretrain import distributed

    distributed.start()
    found = {}
    for name, stage in cases:
        if stage > objective_class(name).max_zero_stage:
            continue
        found[f"{name} {stage}"] = counted_case(name, stage, full)
        if distributed.is_main():
            out.write_text(json.dumps(found, indent=1))
    distributed.stop()


def counted_case(name: str, stage: int, full: bool) -> dict:
    from prelude.launch.made_up_data import MemoryLoader, made_up_batch
    from prelude.launch.planning import Nowhere
    from prelude.objectives import options_for
    from prelude.objectives.building import build_objective
    from prelude.pretrain import distributed
    from prelude.pretrain.engine import Engine
    from prelude.pretrain.meter import Meter
    from prelude.pretrain.recipes import load_config

    world = distributed.world_size()
    recipe, overrides = (FULL if full else SMALL)[name]
    unused = ["data.shards=unused", "run_dir=unused", "log.every_steps=2", "log.pictures_every_steps=0"]
    batch = [f"train.global_batch={2 * world}", f"train.zero_stage={stage}"]
    if stage:  # what an optimizer of norms cannot do
        batch += ["optimizer.name=adamw", "optimizer.lr=0.001"]
    config = load_config(recipe, [*unused, *COMMON, *batch, *overrides], options_for)
    objective = build_objective(config)
    num_parameters = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    num_samples = 8 * config.train.global_batch
    loader = MemoryLoader(2, num_samples, lambda at: made_up_batch(at, objective.views, num_samples))
    engine = Engine(config, objective, loader, Nowhere(), [])
    batches, meter = iter(loader), Meter(config.train.global_batch)
    engine._fetch_first(batches, meter)
    steps = []
    for _ in range(4):
        with counted() as messages:
            engine._watch(engine._step(batches, meter), meter)
        steps.append(messages)
    return {
        "parameters": num_parameters,
        "world": world,
        "step": summed(steps[2]),
        "logged": summed(steps[3] if len(steps[3]) > len(steps[2]) else steps[1]),
    }


@contextmanager
def counted() -> Iterator[list[tuple[str, str, int]]]:
    """(kind of message, who asked for it, bytes of its tensors on this rank)."""
    from torch._C._distributed_c10d import ProcessGroup

    # As they lie in the class: what getattr gives would not be bound to a group again.
    found, original = [], {name: vars(ProcessGroup)[name] for name in _OPS if name in vars(ProcessGroup)}

    def watching(name: str, call):
        def counts(group, *arguments, **named):
            found.append((name, asked_by(), max(map(bytes_of, [*arguments, *named.values()]), default=0)))
            return call(group, *arguments, **named)

        return counts

    for name in original:
        setattr(ProcessGroup, name, watching(name, getattr(ProcessGroup, name)))
    try:
        yield found
    finally:
        for name, call in original.items():
            setattr(ProcessGroup, name, call)


def bytes_of(argument) -> int:
    """Of the tensors in it: the larger of what goes in and comes out is the message."""
    import torch

    if torch.is_tensor(argument):
        return argument.nbytes
    return sum(map(bytes_of, argument)) if isinstance(argument, list | tuple) else 0


def asked_by() -> str:
    """The innermost function of this project or of DeepSpeed."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/deepspeed/runtime/" in file:
            return "DeepSpeed"
        for folder in ("pretrain", "objectives"):
            if file.startswith(f"{ROOT}/{folder}/") or f"/prelude/{folder}/" in file:
                return f"{folder}/{Path(file).stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def summed(messages: list[tuple[str, str, int]]) -> list[list]:
    count, size = Counter(), Counter()
    for name, who, nbytes in messages:
        count[name, who] += 1
        size[name, who] += nbytes
    return [[name, who, count[name, who], size[name, who]] for name, who in sorted(count)]


# ---- telling


def sent(kind: str, nbytes: int, world: int) -> float:
    """Bytes that a rank sends for a message of so many bytes, by the algorithms of rings."""
    share = (world - 1) / world
    return nbytes * share * (2 if kind.startswith("allreduce") else 1)


def table(found: dict, world: int) -> str:
    lines = [
        f"| objective, ZeRO stage | parameters | messages a step | bytes of them | sent by each of {world} ranks "
        "| and in a logged step |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in found.items():
        step = of["step"]
        messages, nbytes = sum(row[2] for row in step), sum(row[3] for row in step)
        more = sum(row[2] for row in of["logged"]) - messages
        at_scale = sum(sent(row[0], row[3], world) for row in step)
        lines.append(
            f"| {name} | {of['parameters']:,} | {messages} | {nbytes:,} | {at_scale / of['parameters']:.2f} bytes a "
            f"parameter | {more} more |"
        )
    lines.append("")
    for name, of in found.items():
        kinds = [f"{count} {kind} of {nbytes:,} bytes by {who}" for kind, who, count, nbytes in of["step"]]
        lines.append(f"- {name}: {'; '.join(kinds)}")
    return "\n".join(lines)


# ---- the start


def rendezvous(ranks: int) -> str:
    """As many ranks as threads here, each with the connection and the messages by which a rank meets the others. One
    process does the work of all."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each connection warns that localhost has no name
    from prelude.pretrain.meeting import meet

    began, took, failed = time.monotonic(), {}, []

    def rank_of(number: int) -> None:
        try:
            meeting = meet(number, ranks, limit=600, warn_after=300)
            took[number] = time.monotonic() - began
            meetings.append(meeting)  # rank 0's has the store
        except BaseException as error:
            failed.append(error)

    meetings = []
    threads = [threading.Thread(target=rank_of, args=(number,), daemon=True) for number in range(ranks)]
    for thread in threads:
        thread.start()
    while len(took) < ranks and not failed:
        time.sleep(0.05)
    if failed:
        raise failed[0]
    return f"{ranks} ranks have met after {max(took.values()):.1f} s (the first after {min(took.values()):.1f} s)"


if __name__ == "__main__":
    main()
