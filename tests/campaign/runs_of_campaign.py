"""The small run that the campaign disturbs, and what is always asked of it."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import starts
import yaml
from starts import Start

VIT = {
    "name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4,
    "kwargs": {"depth": 1, "embed_dim": 32, "num_heads": 2},
}  # fmt: skip
WITH_CLASS_TOKEN = VIT | {"kwargs": VIT["kwargs"] | {"class_token": True, "global_pool": "avg", "fc_norm": False}}
RESNET = {
    "name": "resnet10t", "image_size": 32,
    "kwargs": {"channels": [4, 6, 8, 12], "stem_width": 8, "layers": [1, 1, 1, 1], "output_stride": 8},
}  # fmt: skip
CONVNEXT = {
    "name": "convnextv2_atto", "image_size": 32, "patch_size": 1,
    "kwargs": {"depths": [1, 1, 1, 1], "dims": [4, 6, 8, 12]},
}  # fmt: skip
SWIN = {
    "name": "swin_tiny_patch4_window7_224", "image_size": 16, "patch_size": 2,
    "kwargs": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
}  # fmt: skip
OBJECTIVES = {
    "mae": ({"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}, VIT),
    "lejepa": ({"projector": [24, 12], "num_directions": 16, "num_local": 2}, RESNET),
    "simmim": ({"mask_patch": 4, "target_window": 7}, SWIN),
    "fcmae": ({"decoder_dim": 16}, CONVNEXT),
    "vicreg": ({"projector": [24, 12]}, RESNET),
    "ijepa": ({"predictor_dim": 16, "predictor_depth": 1}, VIT),
    "dseqjepa": ({"predictor_dim": 16, "predictor_depth": 1, "lambda_start": 1.0}, WITH_CLASS_TOKEN),
    "barlow_twins": ({"projector": [24, 12]}, RESNET),
    "spark": ({"decoder_dim": 16}, CONVNEXT),
    "msbreg": ({"projector": [24, 12], "predictor": [16]}, RESNET),
    "rotation": ({}, RESNET),
    "uni4eye": (
        {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "volume_size": [8, 8, 8], "volume_patch": 4},
        VIT,
    ),
}
NUM_STEPS = 24
CRASHED_AT = 18  # steps, of the run whose checkpoints are damaged


class Wrong(Exception):
    """What the engine did is not what it promises."""


def require(fact: bool, otherwise: str, started: Start | None = None) -> None:
    if not fact:
        raise Wrong(otherwise + (f"; it told:\n{started.told[-1500:]}" if started else ""))


class Bench:
    """The data, the recipe of an objective, and the weights of its run that nobody disturbed, in `folder`.

    ranks: of each start.
    """

    def __init__(self, folder: Path, objective: str = "mae", ranks: int = 1):
        starts.import_everything()
        from prelude.data.shape_volumes import write_volumes
        from prelude.data.shapes import write_shards

        self.folder, self.ranks = folder, ranks
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # for those who are not root
        shards = write_shards(folder / "shapes", "train", num_samples=64, seed=0, image_size=16)
        write_volumes(folder / "shapes", "train", num_samples=64, seed=0, size=(16, 16, 8))
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(_recipe(folder, str(shards[0]), objective, ranks)))
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        shutil.rmtree(folder / "unbroken", ignore_errors=True)
        self.seconds = 10.0
        began = time.monotonic()
        unbroken = self.start(folder / "unbroken")
        if unbroken.wait() != 0:
            sys.exit(f"the run of {objective} that nobody disturbs fails:\n{unbroken.told}")
        self.seconds = time.monotonic() - began  # of a whole run

    def words(self, run: Path, *overrides: str) -> list[str]:
        return ["--config", str(self.recipe), f"run_dir={run}", *overrides]

    def start(self, run: Path, *overrides: str, **more) -> Start:
        run.parent.mkdir(parents=True, exist_ok=True)
        return starts.start(self.words(run, *overrides), self.folder / f"{run.name}.out", self.ranks, **more)

    def newest(self, run: Path) -> int:
        """The step of the newest complete checkpoint, 0 where none was ever saved. Wrong where all are lost."""
        from prelude.checkpoints.store import Store
        from prelude.data.errors import UserError

        try:
            newest = Store(run / "checkpoints").newest()
        except UserError as error:
            raise Wrong(str(error)) from None
        return int(newest.name.partition("-")[2]) if newest else 0

    def logged(self, run: Path) -> int:
        path = run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def finishes(self, run: Path, resumed_at: int) -> Start:
        """Starts the run and lets it end: from this step on, at the weights of the unbroken one, every step logged."""
        started = self.start(run)
        require(started.wait() == 0, f"it does not end well: exit code {started.code}", started)
        require("Traceback" not in started.told, "a traceback", started)
        said = f"resumed at step {resumed_at} of" if 0 < resumed_at < NUM_STEPS else ""
        require(said in started.told, f"it does not go on from step {resumed_at}", started)
        require(bool(resumed_at) or "resumed at" not in started.told, "it goes on from a step never saved", started)
        self.is_the_same(run)
        return started

    def is_the_same(self, run: Path) -> None:
        ours, theirs = (place / f"checkpoints/step-{NUM_STEPS:08d}" for place in (run, self.folder / "unbroken"))
        names = sorted(path.name for path in theirs.iterdir())
        require(names == sorted(path.name for path in ours.iterdir()), "its last checkpoint has other files")
        for name in names:
            if name not in ("state.json", "manifest.json"):  # which have the folder's name, and how often it was saved
                same = (ours / name).read_bytes() == (theirs / name).read_bytes()
                require(same, f"{name} differs from that of the unbroken run")
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        require(steps == list(range(1, NUM_STEPS + 1)), f"metrics.jsonl has the steps {steps}")

    def crashed(self) -> Path:
        """A run killed at `CRASHED_AT` steps or later, before its end, with two checkpoints."""
        import signal

        run = self.folder / "crashed"
        if not (run / "ready").exists():
            shutil.rmtree(run, ignore_errors=True)
            started = self.start(run)
            while self.logged(run) < CRASHED_AT and started.poll() is None:
                time.sleep(0.001)
            started.send(signal.SIGKILL)
            started.wait()
            require(0 < self.newest(run) < NUM_STEPS, "it could not be killed before its end")
            (run / "ready").touch()
        return run


def _recipe(folder: Path, shards: str, objective: str, ranks: int) -> dict:
    from prelude.objectives import objective_class

    options, encoder = OBJECTIVES[objective]
    parts = max(ranks, 2 if objective_class(objective).accumulates else 1)
    more = {"zero_stage": 1, "rank_timeout_seconds": 20} if ranks > 1 else {}
    volumes = {}
    if objective_class(objective).takes_volumes:
        volumes = {"volumes": {"shards": f"{folder}/shapes/volumes-train-*.tar"}}
    return {
        "run_dir": str(folder / "run"),
        "data": {"shards": shards, "num_workers": 0, "shuffle": {"window": 16}} | volumes,
        "encoder": encoder,
        "objective": {"name": objective, **options},
        "train": {
            "epochs": NUM_STEPS / (16 if volumes else 8),
            "global_batch": 8,
            "micro_batch": 8 // parts,
            "precision": "fp32",
        }
        | more,
        "optimizer": {"lr": 0.01, "warmup_epochs": 0.5},
        "checkpoint": {"every_steps": 4, "keep": 2},
        "log": {"every_steps": 1, "pictures_every_steps": 10},
    }
