"""How long a save keeps training waiting, and what memory it takes: a vision transformer with AdamW's moments.

Arms: `background`, the time until `Store.save` returns, as a run feels it; `plain`, until the checkpoint is whole, as
a run would wait without a thread; `torch.save` of the same tensors; and torch's own asynchronous
`distributed.checkpoint` (the time until `async_save` returns, by its default process group and stager).

Several ranks, under a launcher, write their parts in `background`; there the other arm is `gathered`: rank 0 gathers
and writes the whole, as it does where the ranks share no folder.

- Arms take turns within a round; a round's ratio compares its own arms. The first round warms up.
- Between two saves the memory of the copy is given back to the process and taken again, as in a run.
- Memory is measured in rounds of its own: the peak of what is resident on rank 0, over what was before the save, the
  allocator having given back what was free (Linux).

python benchmarks/save.py --model base --rounds 5 --folder /a/disk
deepspeed --num_gpus 2 ./benchmarks/save.py --model base --zero 1 --rounds 5
"""

import argparse
import ctypes
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import timm  # noqa: E402
import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402

from prelude.checkpoints.store import Store  # noqa: E402
from prelude.pretrain import distributed  # noqa: E402

MODELS = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
}


def main() -> None:
    args = parse_arguments()
    distributed.start()
    engine = trained_once(MODELS[args.model], args.zero)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(prefix="save-", dir=args.folder) if distributed.is_main() else None
    folder = Path(distributed.from_main(made))
    try:
        arms = {"background": stalled, "plain": plain, "torch.save": torch_save, "torch async": torch_async}
        if distributed.world_size() > 1:
            arms = {"background": stalled, "gathered": gathered}
        seconds = {name: [] for name in arms}
        for nth in range(args.rounds + 1):
            for name in list(arms) if nth % 2 == 0 else list(reversed(arms)):
                taken = arms[name](engine, folder / name.replace(" ", "-"), nth)
                if nth:
                    seconds[name].append(taken)
        memory = {name: [peak(engine, folder / name, arms[name]) for _ in range(3)] for name in memory_arms(arms)}
    finally:
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(folder)
    if distributed.is_main():
        report(args, engine, seconds, memory)
    distributed.stop()
    distributed.leave(0)


def trained_once(name: str, stage: int):
    """An engine whose optimizer has its moments."""
    import deepspeed

    model = timm.create_model(name, num_classes=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": stage}
    with distributed.nothing_printed():
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    loss = engine(torch.randn(1, 3, 224, 224, device=engine.device)).square().mean()
    engine.backward(loss)
    engine.step()
    return engine


@cache
def store_in(folder: Path) -> Store:
    return Store(folder, keep=1)


def stalled(engine, folder: Path, nth: int) -> float:
    store = store_in(folder)
    start = time.perf_counter()
    store.save(nth, engine, {"step": nth})
    taken = time.perf_counter() - start
    store.finish()
    return taken


def gathered(engine, folder: Path, nth: int) -> float:
    store = store_in(folder)
    store._common_draft = lambda step: None
    start = time.perf_counter()
    store.save(nth, engine, {"step": nth})
    taken = time.perf_counter() - start
    store.finish()
    return taken


def plain(engine, folder: Path, nth: int) -> float:
    store = store_in(folder)
    start = time.perf_counter()
    store.save(nth, engine, {"step": nth})
    store.finish()
    return time.perf_counter() - start


def torch_save(engine, folder: Path, nth: int) -> float:
    folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    with open(folder / "state.pt", "wb") as file:
        torch.save(state_of(engine), file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def torch_async(engine, folder: Path, nth: int) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    writing = dcp.async_save(state_of(engine), checkpoint_id=str(folder))
    taken = time.perf_counter() - start
    writing.result()
    return taken


def memory_arms(arms: dict) -> list[str]:
    return (
        [name for name in arms if name in ("background", "gathered")] if Path("/proc/self/clear_refs").exists() else []
    )


def peak(engine, folder: Path, arm) -> int:
    """Bytes that became resident on this rank during a save, at most."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    arm(engine, folder, 1)
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def state_of(engine) -> dict:
    return {"model": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}


def report(args, engine, seconds: dict[str, list[float]], memory: dict[str, list[int]]) -> None:
    size = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    ranks = f"{distributed.world_size()} ranks, ZeRO {args.zero}, " if distributed.world_size() > 1 else ""
    print(
        f"{ranks}{MODELS[args.model]}, {size / 1e6:.1f} M parameters, {3 * 4 * size / 1e9:.2f} GB with AdamW's moments"
    )
    for name, taken in seconds.items():
        ratios = [one / ours for one, ours in zip(taken, seconds["background"], strict=True)]
        print(
            f"{name:12}{statistics.median(ratios):8.2f} times background ({min(ratios):.2f} to {max(ratios):.2f})"
            f"{statistics.median(taken):10.3f} s ({min(taken):.3f} to {max(taken):.3f})"
        )
    for name, taken in memory.items():
        print(f"{name:12}{max(taken) / (12 * size):8.2f} of the state in rank 0's memory ({max(taken) / 1e6:.0f} MB)")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "seconds": seconds, "memory": memory}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; left out: the temporary folder")
    parser.add_argument("--json", type=Path, help="where the figures are written too")
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1, 2, 3), help="stage")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
