"""A tracking service that a run tells its records to, without ever waiting for it.

- Everything is handed to a process of its own (`worker`), which alone knows the service's package: what that package
  raises, how long its network hangs and whether it ends its process is nothing to the run.
- What fails is told once, and again only when it had worked in between. Training goes on.
- What the service does not take in time waits in memory, up to `MOST` records; beyond that, records are left out until
  it has taken them all.
- From the end on the process is waited for, up to `LAST_WAIT` seconds, or `STOP_WAIT` where the run ends early, or is
  asked to end meanwhile. Several services have that time together.
"""

import importlib.util
import json
import logging
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from PIL import Image

import prelude
from prelude.data.errors import UserError
from prelude.data.signed_urls import shown, shown_in
from prelude.pretrain import stopping
from prelude.pretrain.config import Config
from prelude.pretrain.files import make_folder, reason
from prelude.pretrain.log_config import LogConfig
from prelude.pretrain.trackers.services import name_of, text_of
from prelude.pretrain.trackers.worker import LAST_WAIT

log = logging.getLogger(__name__)

MOST = 10_000  # records that wait for the service
STOP_WAIT = 15.0  # seconds; who asked the run to end may kill it soon
_LOOK_UP = 0.05  # seconds between two looks at the process, and at whether the run was asked to end meanwhile
NAMES = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
# The settings that say where a run lies; the others may change between two starts of it.
PLACE = {"wandb": ("project", "entity"), "mlflow": ("experiment", "tracking_uri")}
_PACKAGE_PATH = Path(prelude.__file__).resolve().parents[1]


def check(config: LogConfig) -> None:
    """Raises UserError, with the extra that brings it, where the package of a service is missing."""
    for name in NAMES:
        found = getattr(config, name) and importlib.util.find_spec(name)
        if getattr(config, name) and not (found and found.origin):  # a folder of that name is no package
            raise UserError(
                f"log.{name} needs the package {name}, which is missing; pip install 'prelude-ssl[{name}]', or write "
                f"log.{name}=null."
            )


def trackers_of(config: Config) -> list["Tracker"]:
    return [Tracker(name, config) for name in NAMES if getattr(config.log, name)]


class Tracker:
    """Takes what TensorBoard's event file takes. No method waits for the service, or raises for what it does."""

    def __init__(self, name: str, config: Config):
        self.name, self.config = name, config
        self.folder = Path(config.run_dir) / "trackers"
        self.waiting: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self.given = self.taken = 0  # records; each is counted by one thread alone
        self.process: subprocess.Popen | None = None
        self.crowded = self.given_up = False

    def start(self) -> None:
        path = f"{_PACKAGE_PATH}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
        try:
            make_folder(self.folder)
            with open(self.folder / f"{self.name}.log", "w") as output:
                self.process = subprocess.Popen(
                    # -P: W&B keeps a folder of its package's name where it works.
                    [sys.executable, "-P", "-m", "prelude.pretrain.trackers.worker"],
                    env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    text=True,
                    start_new_session=True,  # signals are for the run, which says when to end
                )
        except OSError as error:
            self._tell(reason(error))
            return
        self.waiting.put(self._about())
        threading.Thread(target=self._hand_over, args=(self.process,), daemon=True).start()
        self.listener = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self.listener.start()

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        self._add({"step": step, "scalars": values})

    def add_text(self, step: int, name: str, text: str) -> None:
        self._add({"step": step, "name": name, "text": text})

    def add_picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._add({"step": step, "name": name, "picture": text_of(picture)})

    def sync(self) -> None:
        """Nothing to do: what is on its way is noted in the run folder once it has arrived."""

    def end(self, finished: bool) -> None:
        """No more is coming. finished: whether the run has come to its own end."""
        self.finished, self.ended_at = finished, time.monotonic()
        self.waiting.put({"finished": finished})
        self.waiting.put(None)

    def close(self) -> None:
        """After `end`, waits for the service to have it all."""
        if self.process is None:
            return
        while self.process.poll() is None:
            in_haste = stopping.wanted() or not self.finished
            if time.monotonic() - self.ended_at > (STOP_WAIT if in_haste else LAST_WAIT):
                self.given_up = True
                self._tell("it does not answer, and what it has not taken yet is lost")
                self.process.kill()
                break
            time.sleep(_LOOK_UP)
        self.listener.join(LAST_WAIT)

    def _add(self, message: dict) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        behind = self.given - self.taken
        if behind >= MOST and not self.crowded:
            self._tell(f"it is {MOST} records behind, and further ones are left out until it has caught up")
        self.crowded = behind >= MOST or (self.crowded and behind > 0)
        if not self.crowded:
            self.given += 1
            self.waiting.put(message)

    def _about(self) -> dict:
        settings = getattr(self.config.log, self.name).model_dump(mode="json")
        return {
            "service": self.name,
            "settings": settings,
            # With another batch steps have other numbers, so that it is another run there too.
            "place": {key: settings[key] for key in PLACE[self.name]} | {"batch": self.config.train.global_batch},
            "records": str(self.folder.absolute()),
            "folder": str(self.folder.parent.absolute()),
            "name": name_of(self.config.run_dir),
            "id": secrets.token_hex(8),
            "config": shown_in(self.config.model_dump(mode="json")),
            "yaml": shown(self.config.to_yaml()),
        }

    def _tell(self, why: str) -> None:
        log.warning("%s has no records of this run (%s); the run goes on without", NAMES[self.name], why)

    # ---- in threads of their own

    def _hand_over(self, process: subprocess.Popen) -> None:
        try:
            while (message := self.waiting.get()) is not None:
                print(json.dumps(message), file=process.stdin, flush=True)
            process.stdin.close()
        except (BrokenPipeError, ValueError):
            return  # the process has ended, which `_listen` tells

    def _listen(self, process: subprocess.Popen) -> None:
        told = self._told(process.stdout)
        if process.wait() and not (told or self.given_up):
            self._tell(f"its process ended with code {process.returncode}; see {self.folder / f'{self.name}.log'}")

    def _told(self, answers: IO) -> bool:
        """Whether the last word on how it goes was of trouble."""
        trouble = False
        for line in answers:
            try:
                answer = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by the process's end
            self.taken += "taken" in answer
            trouble = "trouble" in answer or (trouble and "well" not in answer)
            if "trouble" in answer:
                self._tell(answer["trouble"])
        return trouble
