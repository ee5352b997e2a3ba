"""Encoders from wherever they are: a run, a checkpoint, an export, a file or folder in a published format, timm's and
the Hugging Face hub's weights, what a run started from, or chance.

- Whatever the source, what comes back is a timm model in eval mode whose weights want no gradient.
- Every tensor of the model comes from the source, and every tensor of the source has its place or is left out by
  name; or the source is refused.
- Files are read as safetensors, JSON and plain tensors; nothing in them can run code.
- `fingerprint` is the same for the same weights, wherever they lie. `computation` tells apart what is done with them.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from prelude.checkpoints import manifest, saved, store
from prelude.checkpoints.convert import weights as convert
from prelude.checkpoints.convert.fit import facts, fit, grid_of, prefix_rows_of
from prelude.checkpoints.convert.round_trip import as_it_was
from prelude.checkpoints.convert.weights import Weights
from prelude.checkpoints.description import Description
from prelude.checkpoints.exporting.formats import VOLUMES
from prelude.checkpoints.from_files import describe_file, is_transformers, read_weights
from prelude.checkpoints.from_timm import FOLDER, describe_timm
from prelude.checkpoints.shelf import is_name
from prelude.checkpoints.source_names import RANDOM, START, expanded, has_folder, split
from prelude.checkpoints.tensor_files import TensorFiles
from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, lay_out_encoder
from prelude.pretrain.named_code import digests

EXPORT_SECTION = "prelude"  # of an export's config.json; timm reads past it
OWN = "own parts of the objective"
_VOLUMES = "volume_embed."  # names of an objective's own parts that embed volumes
_STUDENT = "encoder."  # what is trained by gradient, beside its teacher where there is one
_KINDS = (
    "a run folder, a checkpoint folder, an exported folder, a file or folder of published weights, timm:NAME, "
    "hf-hub:ID, local-dir:FOLDER, start: before a run, or random: before any of these"
)
# How the code of a method resamples its table of positions; others take timm's way.
_RESAMPLING = {"mae": "plain", "uni4eye": "plain", "ijepa": "sincos", "dseqjepa": "sincos"}


@dataclass(frozen=True)
class OpenedEncoder:
    """A network with what it has to be shown, and where it comes from."""

    model: nn.Module  # images (B, C, H, W), normalised by mean and std, to pooled features (B, D)
    config: EncoderConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str  # for a table or a plot: the source, short
    fingerprint: str  # of the weights
    origin: dict = field(default_factory=dict)  # what is known of how it was trained: objective, step, data
    loaded: str = ""  # how many tensors, and by which rules, in a sentence
    resampling: str = "timm"  # how its table of positions is brought to another grid; see convert/resample.py
    # Of a run that learned from volumes too, what projects their patches: `weight` (D, C, p_h, p_w, p_d), `bias` (D,).
    volume_embed: dict[str, Tensor] = field(default_factory=dict)
    objective: str | None = None  # of the run, where it is one's or is drawn like one's
    shown: tuple[int, ...] = ()  # channels that pictures show, see `ViewPlan`

    @property
    def computation(self) -> str:
        """A hash of what no weight says and features depend on: each layer's kind and its plain settings (heads, ε,
        pooling), and the source of code of the user's own."""
        settings = [(name, type(layer).__qualname__, _settings(layer)) for name, layer in self.model.named_modules()]
        code = digests(self.config.name, layers={type(layer) for layer in self.model.modules()})
        said = json.dumps([settings, code], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def open_encoder(source: str, *, seed: int = 0) -> OpenedEncoder:
    """Opens `source`: a folder of a run (its newest complete checkpoint), of a checkpoint or of an export; a file or
    folder of published weights (see `from_files`); `timm:NAME`, `hf-hub:ID`, `local-dir:FOLDER`, opened by timm;
    `start:RUN`, the encoder that a run started from, as it was before the run's first step; `random:SOURCE`, the same
    architecture with weights drawn from `seed`.

    Raises UserError when there is no such source, when it is damaged, or when it does not fit its architecture.
    """
    source = str(source)
    described = describe(source.removeprefix(RANDOM))
    model = build_encoder(described.config, seed=seed)
    name, origin, loaded, rule, beside = described.name, described.origin, "", "timm", {}
    if source.startswith(RANDOM):
        name, origin = f"{RANDOM}{described.name}", {}
    else:
        weights = described.read()
        loaded, rule = fit(model, weights, described.config.name).sentence(weights), weights.resampling
        own = {key: tensor for parts in weights.own.values() for key, tensor in parts.items()}
        beside = {key.removeprefix(_VOLUMES): own[key] for key in own if key.startswith(_VOLUMES)}
    model.eval().requires_grad_(False)
    config, mean, std = described.config, described.mean, described.std
    known = origin, loaded, rule, beside, described.origin.get("objective"), described.shown
    return OpenedEncoder(model, config, mean, std, name, fingerprint(model), *known)


def open_weights(source: str) -> Weights:
    """The weights of any source but `random:`, whatever encoder they are to go into. Raises UserError.

    Its `~` is the home folder of who opens it: a config keeps what was written, so that a run is the same elsewhere.
    """
    source = expanded(source)
    if source.startswith(RANDOM):
        raise UserError(f"{source} holds no weights; leave it out, and the encoder starts at random.")
    if _is_published(source):
        return read_weights(source)
    described = describe(source)
    weights = described.read()
    return replace(weights, pixels=(described.mean, described.std), config=described.config)


def weights_of(opened: OpenedEncoder) -> Weights:
    """The weights of an encoder that is open, to be put into another of the same kind."""
    model = opened.model
    tensors = dict(model.state_dict())
    table = {"grid": grid_of(model), "prefix_rows": prefix_rows_of(model), "resampling": opened.resampling}
    return Weights(opened.name, opened.config.name, tensors, config=opened.config, **table, **facts(model))


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and bytes of a model's parameters and persistent buffers."""
    return convert.fingerprint(model.state_dict())


def _settings(layer: nn.Module) -> dict[str, str]:
    plain = {name: value for name, value in vars(layer).items() if _is_plain(value)}
    return {name: repr(value) for name, value in plain.items() if name != "training"}


def _is_plain(value: object) -> bool:
    """Or a tuple of such, as a convolution's stride is."""
    return isinstance(value, bool | int | float | str) or (isinstance(value, tuple) and all(map(_is_plain, value)))


# ---- what each kind of source says


def describe(source: str) -> Description:
    """Raises UserError for a source that is none, or is damaged."""
    if source.startswith(START):
        return _describe_start(source.removeprefix(START))
    if not has_folder(source) or source.startswith(FOLDER):
        return describe_timm(source)
    if _is_published(source):
        return describe_file(source)
    folder, network = split(source)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; write {_KINDS}.")
    if checkpoint := checkpoint_of(folder):
        return _describe_checkpoint(checkpoint, network)
    if (folder / "config.json").exists():
        if network:
            raise UserError(f"{folder} is an export, which has one network; leave #{network} out.")
        return _describe_export(folder)
    raise UserError(f"{folder} holds no complete checkpoint and no export; write {_KINDS}.")


def checkpoint_of(folder: Path) -> Path | None:
    """The checkpoint that a folder is, or the newest complete one of the run; None for an export, for a file, and where
    none is."""
    if not folder.is_dir():
        return None
    if (folder / manifest.MANIFEST).exists():
        return folder
    if (folder / "config.json").exists():
        return None
    if is_name(folder.name) and not (folder / "checkpoints").is_dir():
        return folder  # what is missing there is told, and no other checkpoint taken
    return store.Store(folder / "checkpoints").newest() or store.Store(folder).newest()


def _is_published(source: str) -> bool:
    if not has_folder(source) or source.startswith((FOLDER, START)):
        return False
    path, words = split(source)
    if not words and is_export(path):
        return False  # one of ours says more than a folder in a published format
    return path.is_file() or is_transformers(path)


def is_export(folder: Path) -> bool:
    """Whether an export of ours lies in a folder, in whatever format."""
    return export_section(folder) is not None


def export_section(folder: Path) -> dict | None:
    """What an export says of itself; None where there is none."""
    try:
        found = json.loads((folder / "config.json").read_text())
        return found[EXPORT_SECTION] if isinstance(found[EXPORT_SECTION], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _describe_checkpoint(folder: Path, network: str = "") -> Description:
    """network: "teacher" or "student", or nothing for what the objective's paper evaluates."""
    if why := manifest.problem(folder, (manifest.MODEL, manifest.STATE)):
        raise UserError(f"{folder} is no complete checkpoint: {why}; write the run's folder to take its newest one.")
    state = json.loads((folder / manifest.STATE).read_text())
    meta = state["meta"]
    objective = meta.get("config", {}).get("objective", {}).get("name")
    data = meta.get("loader", {}).get("fingerprint")
    exported = _chosen(network, meta["exported"], folder)
    trained = EncoderConfig.model_validate(meta["encoder"])
    started = (
        {"weights": trained.weights, "weights_fingerprint": trained.weights_fingerprint} if trained.weights else {}
    )
    config, name = trained.architecture, f"{folder.absolute().parent.parent.name}/{folder.name}"
    return Description(
        config=config,
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        name=name,
        read=lambda: _read_ours(folder, config, objective, exported, meta["exported"]),
        origin={"objective": objective, "step": state["step"], "data": data} | started,
        shown=tuple(meta.get("config", {}).get("data", {}).get("shown_channels", ())),
    )


def _chosen(network: str, exported: str, folder: Path) -> str:
    """What the names of the chosen network's tensors begin with."""
    taught = exported != _STUDENT
    if network not in ("", "teacher", "student") or (network == "teacher" and not taught):
        named = "#student, or nothing for the teacher" if taught else "nothing: it has one network"
        raise UserError(f"{folder} has no network {network}; write after it {named}.")
    return _STUDENT if network == "student" else exported


def _describe_start(source: str) -> Description:
    """The run's own architecture, image size and normalisation, with the weights that its record names."""
    run = describe(source)
    origin = {key: run.origin[key] for key in ("weights", "weights_fingerprint") if key in run.origin}
    if not origin:
        raise UserError(
            f"{source} did not start from weights, or does not record it; write {RANDOM}{source} for the same "
            "architecture untrained."
        )

    def read() -> Weights:
        try:
            weights = open_weights(origin["weights"])
        except UserError as error:
            raise UserError(f"What {source} started from cannot be opened any more: {error}") from None
        if weights.fingerprint != origin.get("weights_fingerprint", weights.fingerprint):
            raise UserError(
                f"{source} started from {origin['weights']}, which holds other weights by now (fingerprint "
                f"{weights.fingerprint} instead of {origin['weights_fingerprint']}); name what still holds them, such "
                "as a checkpoint, in its place."
            )
        return replace(weights, layers={})  # the run has computed with them as its own encoder does

    return replace(run, name=f"{START}{run.name}", read=read, origin=origin)


def _describe_export(folder: Path) -> Description:
    """One of ours says more than timm's config.json does; any other is opened as timm would."""
    try:
        ours = json.loads((folder / "config.json").read_text()).get(EXPORT_SECTION)
        if ours is None:
            return describe_timm(f"{FOLDER}{folder}")
        if (program := ours.get("format", "timm")) in ("onnx", "torch"):
            raise UserError(
                f"{folder} is an export to {program}, whose weights are not read back; write one of --format timm."
            )
        config, objective = EncoderConfig.model_validate(ours["encoder"]), ours["origin"].get("objective")
        read = _read_converted if is_transformers(folder) else _read_ours
        return Description(
            config=config,
            mean=tuple(ours["mean"]),
            std=tuple(ours["std"]),
            name=folder.absolute().name,
            read=lambda: _with_volumes(read(folder / "model.safetensors", config, objective), folder, objective),
            origin=ours["origin"],
            shown=tuple(ours.get("shown_channels", ())),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / 'config.json'} is not one that an export writes; write a folder that was exported from a run."
        ) from None


# ---- the weights


def _read_converted(path: Path, config: EncoderConfig, objective: str | None) -> Weights:
    """An export to an architecture of transformers, under the names of the encoder that it was."""
    model = lay_out_encoder(config)
    weights = read_weights(str(path.parent))
    prefix = prefix_rows_of(model)
    tensors = as_it_was(weights, model.state_dict(), prefix)
    rule = _RESAMPLING.get(objective, "timm")
    return replace(weights, tensors=tensors, prefix_rows=prefix, resampling=rule, layers=facts(model)["layers"])


def _with_volumes(weights: Weights, folder: Path, objective: str | None) -> Weights:
    """With what projects patches of volumes, where the export has it."""
    path = folder / VOLUMES
    if not path.exists():
        return weights
    try:
        found = TensorFiles.of_file(path)
        own = {f"{_VOLUMES}{name}": found[name].float() for name in found}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); export again.") from None
    return replace(weights, left_out=weights.left_out | {OWN: len(own)}, own={objective or "": own})


def _read_ours(
    path: Path, config: EncoderConfig, objective: str | None, chosen: str = "", exported: str = ""
) -> Weights:
    """The tensors below `chosen`, under their names without it; those of the objective's own parts besides.

    Of student and teacher (`exported`) the other one is left out. path: a checkpoint's folder, or an export's file.
    """
    tensors, own, left_out = {}, {}, Counter()
    try:
        found = saved.open_tensors(path) if path.is_dir() else TensorFiles.of_file(path)
        for name in found:
            if name.startswith(chosen):
                tensors[name.removeprefix(chosen)] = found[name]
            elif name.startswith(_STUDENT):
                left_out["student"] += 1
            elif exported and name.startswith(exported):
                left_out["teacher"] += 1
            else:
                own[name] = found[name]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); export or save it again.") from None
    model = lay_out_encoder(config)
    return Weights(
        where=str(path if path.is_dir() else path.parent),
        format=config.name,
        tensors=tensors,
        resampling=_RESAMPLING.get(objective, "timm"),
        grid=grid_of(model),
        prefix_rows=prefix_rows_of(model),
        left_out=({OWN: len(own)} if own else {}) | left_out,
        own={objective: own} if own and objective else {},
        **facts(model),
    )
