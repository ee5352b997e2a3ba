"""The `log` section of a config: how often, and where to beside the run folder."""

from typing import Literal

from pydantic import Field

from prelude.pretrain.options import Section, Text, Texts

EVERY_STEP = "PRELUDE_EVERY_STEP"  # in the environment: the console tells every logged step, to one who draws a bar


class WandbConfig(Section):
    """Weights & Biases, by its own package. What is null is as its environment variables say."""

    project: Text  # project in which the run appears
    entity: Text | None = None  # team or user
    name: Text | None = None  # name of the run there; null: that of the run folder
    group: Text | None = None  # group of runs that belong together
    tags: Texts | None = None  # tags of the run
    mode: Literal["online", "offline"] | None = None  # offline: kept in RUN/wandb, for `wandb sync`


class MlflowConfig(Section):
    """MLflow, by its own package. What is null is as its environment variables say."""

    experiment: Text  # experiment in which the run appears
    tracking_uri: Text | None = None  # a server, sqlite:///FILE, or file:FOLDER
    name: Text | None = None  # name of the run there; null: that of the run folder


class LogConfig(Section):
    every_steps: int = Field(10, ge=1)  # steps between two lines of metrics
    pictures_every_steps: int = Field(500, ge=0)  # steps between two pictures; 0: none, as at train.zero_stage=3
    wandb: WandbConfig | None = None  # curves in Weights & Biases too
    mlflow: MlflowConfig | None = None  # curves in MLflow too
