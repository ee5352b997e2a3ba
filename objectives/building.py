"""The objective of a config, with weights."""

from prelude.objectives import chosen
from prelude.pretrain.config import Config
from prelude.pretrain.encoders import build_encoder, seeded
from prelude.pretrain.objective import Objective


def build_objective(config: Config) -> Objective:
    """The objective around a fresh encoder; its weights depend on `config.seed` alone. Raises UserError."""
    cls, options = chosen(config)
    encoder = build_encoder(config.encoder, seed=config.seed)
    with seeded(config.seed + 2**31):  # seeds are below 2**31: no run's encoder starts from these draws
        return cls(encoder, options, image_size=config.encoder.size, mean=config.data.mean, std=config.data.std)
