"""Where a run's encoder starts from: `encoder.weights`, opened once, at the run's first start and never again.

- Every rank reads the source, and all must have read the same: the fingerprint of what was loaded decides.
- A run that goes on from a checkpoint reads it from there, and the source may be gone.
- The configuration is completed by the fingerprint, so that the run's record says what it started from; one that is
  given there is checked. So is the range of its images, where `data.range: auto` has found one.
"""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from torch import nn

from prelude.checkpoints import store
from prelude.checkpoints.convert.fit import Fitted, fit
from prelude.checkpoints.convert.weights import Weights
from prelude.checkpoints.sources import OWN, open_weights
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.pretrain import distributed
from prelude.pretrain.config import Config
from prelude.pretrain.resume import starting_point, with_found_range
from prelude.pretrain.warm_start import WarmStart

# As they are named among what is left out, where they are not taken along.
_OWN_PARTS = ("decoder", "predictor", "projector", "dense_decoder", "densify_norms", "densify_projs", "mask_tokens")
_OWN_PARTS += (OWN,)


_SAME_PIXELS = 0.002  # data sets' statistics are published with three digits


@dataclass
class Start:
    config: Config  # completed by the fingerprint of the weights
    warm: WarmStart | None = None  # None: the encoder is drawn from the seed, or comes from a checkpoint
    weights: Weights | None = None
    fitted: Fitted | None = None  # once the encoder is built

    @property
    def sentence(self) -> str:
        """How much was loaded, and by which rules; empty where nothing was."""
        if self.fitted is None:
            return ""
        return self._loaded() + _other_pixels(self.config, self.weights)

    def _loaded(self) -> str:
        if not self.warm.own:
            return self.fitted.sentence(self.weights)
        left_out = {kind: n for kind, n in self.weights.left_out.items() if kind not in _OWN_PARTS}
        loaded = self.fitted.sentence(replace(self.weights, left_out=left_out))
        return f"{loaded}, and {counted(len(self.warm.own), 'tensor')} of the objective's own parts"


def start_of(config: Config, checkpoints: store.Store | None = None) -> Start:
    """Opens `encoder.weights`, unless there is a checkpoint to go on from. Collective where ranks are joined.

    Raises UserError on every rank, when any of them cannot read the source, or reads another one.
    """
    if config.encoder.weights is None and config.data.range != "auto":
        return Start(config)
    checkpoint = starting_point(checkpoints, config) if checkpoints else None
    if checkpoint is not None:
        return Start(as_recorded(config, _meta(checkpoint)))
    if config.encoder.weights is None:
        return Start(config)
    weights, refusal = None, None
    try:
        weights = open_weights(config.encoder.weights)
    except UserError as error:
        refusal = str(error)
    refusals, found = zip(*distributed.of_all((refusal, weights and weights.fingerprint)), strict=True)
    if any(refusals):
        raise UserError(next(filter(None, refusals)))
    _refuse_others(config, found)
    start = Start(_with_fingerprint(config, weights.fingerprint), weights=weights)
    start.warm = WarmStart(weights.where, lambda encoder: _fill(start, encoder), _own_parts(config, weights))
    return start


def as_recorded(config: Config, meta: dict) -> Config:
    """`config` with what a checkpoint's run has found: the fingerprint of the weights that it started from, where
    `config` names some and says nothing of their content, and the range of its images, unless these may be others.
    meta: the checkpoint's."""
    if config.encoder.weights and not config.encoder.weights_fingerprint:
        config = _with_fingerprint(config, meta.get("encoder", {}).get("weights_fingerprint"))
    found = meta.get("config", {}).get("data", {}).get("range")
    if config.data.range != "auto" or config.resume.allow_changed_data or found in (None, "auto"):
        return config
    return with_found_range(config, tuple(found))


def _fill(start: Start, encoder: nn.Module) -> None:
    start.fitted = fit(encoder, start.weights, f"encoder.name={start.config.encoder.name}")


def _own_parts(config: Config, weights: Weights) -> dict | None:
    if not config.encoder.own_parts:
        return None
    name = config.objective["name"]
    if name not in weights.own:
        holds = f"those of {', '.join(weights.own)}" if weights.own else "none"
        raise UserError(
            f"{weights.where} ({weights.format}) has no own parts of objective.name={name}: it has {holds}; write "
            "encoder.own_parts=false."
        )
    return weights.own[name]


def _meta(checkpoint: Path) -> dict:
    """Rank 0's, whose disk has the checkpoint."""
    return distributed.from_main(store.read_meta(checkpoint) if distributed.is_main() else {})


def _other_pixels(config: Config, weights: Weights) -> str:
    """A word where this run normalises pixels otherwise than the weights are used to; nobody but the user knows why."""
    here = (config.data.mean, config.data.std)
    if weights.pixels is None:
        return f"; how its pixels were normalised is not known, here by data.mean={list(here[0])}, {list(here[1])}"
    pairs = list(zip(chain(*here), chain(*weights.pixels), strict=False))
    if len(here[0]) == len(weights.pixels[0]) and all(abs(ours - theirs) <= _SAME_PIXELS for ours, theirs in pairs):
        return ""
    return (
        f"; its pixels were normalised by data.mean={list(weights.pixels[0])} and data.std={list(weights.pixels[1])}, "
        f"which here are {list(here[0])} and {list(here[1])}"
    )


def _with_fingerprint(config: Config, found: str | None) -> Config:
    encoder = config.encoder.model_copy(update={"weights_fingerprint": found})
    return config.model_copy(update={"encoder": encoder})


def _refuse_others(config: Config, found: tuple[str, ...]) -> None:
    if len(set(found)) > 1:
        raise UserError(
            f"encoder.weights={config.encoder.weights} holds other weights on other nodes ({', '.join(set(found))}); "
            "copy one file to all."
        )
    wanted = config.encoder.weights_fingerprint
    if wanted and wanted != found[0]:
        raise UserError(
            f"encoder.weights={config.encoder.weights} has the fingerprint {found[0]} and not "
            f"encoder.weights_fingerprint={wanted}; write the weights that are meant, or leave the fingerprint out."
        )
