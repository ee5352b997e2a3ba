"""The `collapse` section of a config: when features are taken for collapsed, and what is done about it."""

from pydantic import Field

from prelude.pretrain.options import Section


class CollapseConfig(Section):
    """When a run is taken for collapsed; `pretrain/collapse.py` says what each sign means."""

    stop: bool = False  # end the run, with exit code 3, rather than only tell
    grace: float = Field(0.1, ge=0, le=1)  # share of the run in which nothing is judged
    sustained: float = Field(0.05, ge=0, le=1)  # share of the run over whose last part a sign must stand
    max_cosine: float = Field(0.999, gt=0, le=1)  # above it: cosine of the features of two images, on average
    min_std: float = Field(1e-4, ge=0)  # below it: standard deviation of a feature, over images
    # Below it: effective rank of the features; 0: one line, 1: all that is attainable
    min_rank: float = Field(0.0025, ge=0, lt=1)
    min_embedding_rank: float = Field(0.0125, ge=0, lt=1)  # below it: the same of what views are compared by
    min_teacher_cosine: float = Field(0.2, ge=-1, lt=1)  # below it: cosine of encoder and teacher, on the same patches
    trivial_tolerance: float = Field(0.02, ge=0, lt=1)  # within it: the loss around its trivial value, as a share of it
