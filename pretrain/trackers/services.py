"""What is said to each service, in its own words. Runs in a process beside the run, see `worker`.

A service is called with a dictionary `about` of the run: its id and name, its folder, its config and that as YAML.
"""

import base64
import io
import os
import time
from pathlib import Path

from PIL import Image

ONLINE, HELD_OUT = "online/", "held_out/"  # what is measured beside training. Online: told when later steps are logged
MAX_PARAMS = 100  # MLflow takes no more in one call
LONGEST_PARAM = 500  # characters, of the oldest MLflow that is supported


class Wandb:
    """A run is known by the id that its folder keeps, so that a later start goes on with it."""

    def __init__(self, settings: dict, about: dict):
        import wandb

        self.image = wandb.Image
        self.run = wandb.init(
            **{key: settings[key] for key in ("project", "entity", "group", "tags", "mode")},
            name=settings["name"] or about["name"],
            id=about["id"],
            resume="allow",
            dir=about["folder"],
            config=about["config"],
            settings=wandb.Settings(console="off"),
        )
        self.step = self.run.step
        # Out of turn an evaluation would be dropped: a run's own steps only grow.
        self.run.define_metric(f"{ONLINE}step", hidden=True)
        self.run.define_metric(f"{ONLINE}*", step_metric=f"{ONLINE}step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if any(name.startswith(ONLINE) for name in values):
            values = values | {f"{ONLINE}step": step}
        self._log(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        self.run.summary[name] = f"step {step}: {text}"

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._log(step, {f"pictures/{name}": self.image(picture)})

    def finish(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)

    def _log(self, step: int, values: dict) -> None:
        self.step = max(self.step, step)
        self.run.log(values, step=self.step)


class Mlflow:
    """A run is known by a tag with the id that its folder keeps."""

    TAG = "prelude.run"

    def __init__(self, settings: dict, about: dict):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of its seven, each waits longer than the last
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric, self.param = Metric, Param
        self.client = MlflowClient(tracking_uri=settings["tracking_uri"])
        found = self.client.get_experiment_by_name(settings["experiment"])
        experiment = found.experiment_id if found else self.client.create_experiment(settings["experiment"])
        runs = self.client.search_runs([experiment], f"tags.`{self.TAG}` = '{about['id']}'", max_results=1)
        name = settings["name"] or about["name"]
        run = runs[0] if runs else self.client.create_run(experiment, run_name=name, tags={self.TAG: about["id"]})
        self.id = run.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        self._params(about["config"], known=run.data.params)
        self.client.log_text(self.id, about["yaml"], "config.yaml")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self.metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def text(self, step: int, name: str, text: str) -> None:
        self.client.set_tag(self.id, name, f"step {step}: {text}")

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.client.log_image(self.id, picture, key=name, step=step)

    def finish(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")

    def _params(self, config: dict, known: dict) -> None:
        """Those of the first start stay: a parameter cannot change there, and what may change in a run is in the
        config.yaml beside them."""
        flat = [self.param(key, str(value)[:LONGEST_PARAM]) for key, value in _flat(config) if key not in known]
        for first in range(0, len(flat), MAX_PARAMS):
            self.client.log_batch(self.id, params=flat[first : first + MAX_PARAMS])


SERVICES = {"wandb": Wandb, "mlflow": Mlflow}


def picture_of(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png)))


def text_of(picture: Image.Image) -> str:
    png = io.BytesIO()
    picture.save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


def name_of(run_dir: str) -> str:
    return Path(run_dir).absolute().name


def _flat(config: dict, above: str = ""):
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
