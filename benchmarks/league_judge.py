"""The judge of the league: the same for every arm.

The encoder, as a timm network, is frozen and looks at all labelled pictures once; a linear probe and k-NN do what
`prelude probe` and `prelude knn` do by themselves. The untrained twin is the same network with timm's initial weights.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from league_arms import Training, recipe

from prelude.checkpoints.sources import OpenedEncoder, fingerprint, open_encoder
from prelude.evaluators.features.extraction import kinds_among
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.judging import Judging
from prelude.evaluators.labelled import Labelled
from prelude.pretrain.config import Config
from prelude.pretrain.encoders import build_encoder

EVALUATORS = {"linear": linear_probe, "knn": knn}


def trained(training: Training) -> OpenedEncoder:
    """The encoder that a finished run left."""
    if training.arm == "prelude":
        return open_encoder(str(training.folder / "run"))
    config = recipe(training.method, training.changes)
    result = json.loads((training.folder / "result.json").read_text())
    model = build_encoder(config.encoder, seed=0)
    model.load_state_dict(torch.load(training.folder / "encoder.pt", weights_only=True))
    return opened(model, config, tuple(result["mean"]), tuple(result["std"]), training.arm)


def untrained(method: str, seed: int, changes: list[str]) -> OpenedEncoder:
    config = recipe(method, changes)
    return opened(build_encoder(config.encoder, seed=seed), config, config.data.mean, config.data.std, "untrained")


def opened(model, config: Config, mean, std, name: str) -> OpenedEncoder:
    model.eval().requires_grad_(False)
    return OpenedEncoder(model, config.encoder.architecture, tuple(mean), tuple(std), name, fingerprint(model))


def judged(encoder: OpenedEncoder, train: str, test: str, *, kinds: Sequence[str], seed: int) -> dict[str, dict]:
    """By evaluator: top1 in percent, its standard error from the test sample, and what was chosen.

    kinds: of feature, those that the encoder has; none: what suits it.
    """
    found, kinds = {}, kinds_among(encoder.model, kinds, encoder.name) if kinds else None
    with tempfile.TemporaryDirectory() as bank:
        judging = Judging([], Labelled(train, test, "cls"), kinds=kinds, bank=Path(bank))
        parts = judging.features(encoder.name, [], encoder)
        for name, evaluator in EVALUATORS.items():
            outcome = evaluator(*parts, seed=seed)
            top1 = outcome.numbers["top1"]
            found[name] = {"top1": round(top1.value, 2), "se": round(top1.se, 3), "chosen": outcome.chosen}
    return found
