"""The objective of a config, with weights."""

from dataclasses import replace

from prelude.objectives import chosen
from prelude.pretrain.config import Config
from prelude.pretrain.encoders import build_encoder, seeded
from prelude.pretrain.objective import Objective
from prelude.pretrain.warm_start import WarmStart


def build_objective(config: Config, warm: WarmStart | None = None) -> Objective:
    """The objective around a fresh encoder, whose weights depend on `config.seed` alone, or around one that `warm`
    fills. Raises UserError.
    """
    cls, options = chosen(config)
    encoder = build_encoder(config.encoder, seed=config.seed)
    filled = warm.begin(encoder) if warm else {}
    with seeded(config.seed + 2**31):  # seeds are below 2**31: no run's encoder starts from these draws
        objective = cls(encoder, options, image_size=config.encoder.size, mean=config.data.mean, std=config.data.std)
    if config.data.shown_channels:
        objective.views = replace(objective.views, shown=tuple(config.data.shown_channels))
    if warm:
        warm.finish(objective, filled, config.objective["name"])
    return objective
