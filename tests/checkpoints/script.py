"""What the tests of this folder start with the real `deepspeed` command: `script.py JSON`, a list of jobs.

A job is {"stage", "optimizer", "steps", "load", "save", "dump"} or {"look", "answers"}; jobs run one after another in
one launch, and what rank 0 has to say is written to `dump` as safetensors and JSON. `places` gets how many each rank
passed of the places by which the one is told that others wait for.
"""

import json
import os
import sys
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[2] / "src")] + sys.path[1:]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.optim import Lamb, Lars, Lion  # noqa: E402
from torch import nn  # noqa: E402

from prelude.checkpoints import checking, manifest  # noqa: E402
from prelude.checkpoints import store as stores  # noqa: E402
from prelude.checkpoints.state.portable import gather_state  # noqa: E402
from prelude.data.errors import RunStopped, UserError  # noqa: E402
from prelude.pretrain import attendance, distributed  # noqa: E402

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "lion": lambda groups: Lion(groups, lr=0.001),
    "lars": lambda groups: Lars(groups, lr=0.1, momentum=0.9),
    "lamb": lambda groups: Lamb(groups, lr=0.01),
}


class Student(nn.Module):
    """Odd sizes, a tensor of one element, batch norm with its integer buffer, and a table that is not saved."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5 * 36, width)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("table", torch.linspace(-1, 1, width), persistent=False)

    def forward(self, x):  # (B, 3, 8, 8)
        return self.head(F.gelu(self.norm(self.conv(x))).flatten(1)) * self.scale + self.table


class SelfTaught(nn.Module):
    """A student that predicts its own frozen moving average."""

    def __init__(self, width: int = 7):
        super().__init__()
        self.encoder = Student(width)
        self.teacher = Student(width).requires_grad_(False)
        self.register_buffer("center", torch.zeros(width))

    def forward(self, x):
        target = self.teacher(x).detach()
        return F.mse_loss(self.encoder(x), target - 0.1 * self.center + 0.3)

    @torch.no_grad()
    def after_step(self):
        for teacher, student in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            if hasattr(teacher, "ds_id"):
                teacher.ds_tensor.lerp_(student.ds_tensor, 0.1)
                if teacher.ds_persist:
                    teacher.data.lerp_(student.data, 0.1)
            else:
                teacher.lerp_(student, 0.1)
        self.center.add_(0.25)


def build(job: dict):
    import deepspeed

    torch.manual_seed(job.get("seed", 0))
    model = SelfTaught(job.get("width", 7))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == matrices]} for matrices in (True, False)]
    precision = job.get("precision")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": job["stage"],
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 1000,
            "stage3_param_persistence_threshold": job.get("persistence", 100),
        },
        "zero_allow_untested_optimizer": True,
    }
    if precision == "bf16.enabled":
        config["bf16"] = {"enabled": True}
    elif precision:
        config["torch_autocast"] = {"enabled": True, "dtype": precision, "lower_precision_safe_modules": []}
    optimizer = OPTIMIZERS[job.get("optimizer", "adamw")](groups)
    with distributed.nothing_printed():
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * step + distributed.rank())
        loss = engine(torch.randn(4, 3, 8, 8, generator=generator).to(engine.device))
        engine.backward(loss)
        engine.step()
        engine.module.after_step()


def dump(engine, to: Path, facts: dict) -> None:
    """The state by name, and each rank's own buffers, which have to be equal."""
    state = gather_state(engine)
    buffers = [{k: v.tolist() for k, v in engine.module.named_buffers()}]
    if distributed.world_size() > 1:
        buffers = [None] * distributed.world_size()
        mine = {k: v.tolist() for k, v in engine.module.named_buffers()}
        torch.distributed.all_gather_object(buffers, mine)
    if distributed.is_main():
        to.mkdir(parents=True)
        save_file(state.tensors, to / "tensors")
        save_file(state.moments, to / "moments")
        facts |= {"scalars": state.scalars, "loss_scaler": state.loss_scaler, "buffers": buffers}
        (to / "facts.json").write_text(json.dumps(facts))


def fail_to_sync(*_):
    raise OSError(28, "No space left on device")


def run(job: dict) -> None:
    facts: dict = {"rank_errors": None}
    error, step, full, apart, place = None, 0, False, False, attendance._Here.place
    engine = build(job)
    store = stores.Store(job["folder"], keep=job.get("keep", 3)) if "folder" in job else None
    try:
        if job.get("load"):
            meta = store.load(store.folder / job["load"], engine)
            step, facts["meta"] = meta["step"], meta
        if job.get("dump_loaded"):
            dump(engine, Path(job["dump_loaded"]), dict(facts))
        train(engine, step, job.get("steps", 0))
        step += job.get("steps", 0)
        if full := job.get("disk_full") == distributed.rank():
            stores.os.fsync, sync = fail_to_sync, os.fsync
        if apart := job.get("apart") == distributed.rank():
            stores.os.access, access = lambda *_: False, os.access
        if job.get("dump_saved"):
            dump(engine, Path(job["dump_saved"]), {})
        if job.get("save"):
            store.save(step, engine, {"step": step, "note": job.get("note")})
            if not job.get("more_steps"):
                store.finish()
        if job.get("more_steps"):
            train(engine, step, job["more_steps"])  # while the checkpoint is written
            store.finish()
        if job.get("dump"):
            dump(engine, Path(job["dump"]), facts)
    except (UserError, RunStopped) as caught:
        error = f"{type(caught).__name__}: {caught}"
    if full:
        stores.os.fsync = sync
    if apart:
        stores.os.access = access
    if job.get("places"):
        passed = distributed.of_all(attendance._Here.place - place)
        if distributed.is_main():
            Path(job["places"]).write_text(json.dumps(passed))
    if job.get("errors"):
        errors = [error]
        if distributed.world_size() > 1:
            errors = [None] * distributed.world_size()
            torch.distributed.all_gather_object(errors, error)
        if distributed.is_main():
            Path(job["errors"]).write_text(json.dumps(errors))
    elif error:
        raise RuntimeError(error)
    engine.destroy()


def look(job: dict) -> None:
    """What all ranks find to be newest, twice, and which files each rank read for it. job["blind"]: sees no folder."""
    read, digest, obvious = [], manifest._digest, checking.obvious_fault
    manifest._digest = lambda file, kind: read.append("/".join(Path(file.name).parts[-2:])) or digest(file, kind)
    if distributed.rank() == job.get("blind"):
        checking.obvious_fault = lambda _: manifest.Fault("not seen here", lost=False)
    store = stores.Store(job["look"])
    try:
        found = [store.newest_for_all().name, store.newest_for_all().name]
    except UserError as error:
        found = str(error)
    manifest._digest, checking.obvious_fault = digest, obvious
    answers = distributed.of_all((found, read))
    if distributed.is_main():
        Path(job["answers"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    distributed.start()
    for each in json.loads(Path(sys.argv[-1]).read_text()):
        look(each) if "look" in each else run(each)
    distributed.stop()
    distributed.leave(0)
