"""Encoders whose weights timm itself fetches and opens: `timm:NAME`, `hf-hub:ID`, `local-dir:FOLDER`.

timm loads leniently as soon as the classifier is left out. So the whole model is loaded, classifier included, where
timm is strict, and its encoder taken from it.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.models.eva import Eva
from torch import nn

from prelude.checkpoints.convert.fit import facts, grid_of, prefix_rows_of
from prelude.checkpoints.convert.weights import Weights
from prelude.checkpoints.description import Description
from prelude.checkpoints.source_names import FOLDER, HUB, TIMM
from prelude.data.batch import IMAGENET_MEAN, IMAGENET_STD
from prelude.data.counting import counted
from prelude.data.errors import UserError, in_one_line
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import of_timm, seeded


def describe_timm(source: str) -> Description:
    """Raises UserError for a model that timm does not have, and a folder or an id that holds none, or values of other
    types than timm's."""
    if source.startswith(TIMM):
        return _named(source.removeprefix(TIMM))
    cfg = _config_of_folder(Path(source.removeprefix(FOLDER))) if source.startswith(FOLDER) else _config_of_hub(source)
    architecture, arguments, pretrained = cfg
    _refuse_other_types(source, arguments, pretrained)
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    channels = arguments.pop("in_chans", None) or 3
    size = arguments.pop("img_size", None) or (pretrained.get("input_size") or (3, 224, 224))[1:]
    size = tuple(size) if isinstance(size, list | tuple) else (size, size)
    patch = arguments.pop("patch_size", None)
    if pretrained.get("global_pool"):
        arguments.setdefault("global_pool", pretrained["global_pool"])
    if not timm.is_model(architecture):
        raise UserError(f"{source} is a {architecture}, which timm {timm.__version__} has not; install a newer timm.")
    mean, std = tuple(pretrained.get("mean") or IMAGENET_MEAN), tuple(pretrained.get("std") or IMAGENET_STD)
    if not len(mean) == len(std) == channels:
        raise UserError(
            f"{source} reads {counted(channels, 'channel')}, and its config.json has mean and std of {len(mean)} and "
            f"{len(std)}; "
            f"correct pretrained_cfg there."
        )
    return Description(
        config=EncoderConfig(
            name=architecture,
            image_size=size[0] if size[0] == size[1] else size,
            patch_size=patch,
            in_chans=channels,
            kwargs=arguments,
            **_learned(architecture, arguments),
        ),
        mean=mean,
        std=std,
        name=Path(source.removeprefix(FOLDER)).absolute().name if source.startswith(FOLDER) else source,
        read=lambda: _read(source, source, channels),
    )


def _named(name: str) -> Description:
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        raise UserError(f"timm {timm.__version__} has no model {name}; timm.list_models(pretrained=True) names them.")
    return Description(
        config=EncoderConfig(name=name, image_size=tuple(cfg.input_size[1:]), **_learned(name, {})),
        mean=tuple(cfg.mean or IMAGENET_MEAN),
        std=tuple(cfg.std or IMAGENET_STD),
        name=TIMM + name,
        read=lambda: _read(name, TIMM + name),
    )


def _learned(name: str, arguments: dict) -> dict:
    """The table of positions is part of the weights; where there is none, the key keeps its default."""
    with torch.device("meta"):
        try:
            model = of_timm(name, num_classes=0, **arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError, KeyError):
            return {}  # building it for real says why
    return {"pos_embed": "learned"} if isinstance(getattr(model, "pos_embed", None), nn.Parameter) else {}


def _config_of_folder(folder: Path) -> tuple[str, dict, dict]:
    try:
        cfg = json.loads((folder / "config.json").read_text())
        architecture, pretrained = cfg["architecture"], cfg.get("pretrained_cfg", cfg)
        if isinstance(architecture, str) and isinstance(pretrained, dict):
            return architecture, dict(cfg.get("model_args") or {}), pretrained
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{folder} holds no config.json of timm's; write a folder that timm saved.")


def _config_of_hub(source: str) -> tuple[str, dict, dict]:
    try:
        pretrained, architecture, arguments = timm.models.load_model_config_from_hf(source.removeprefix(HUB))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_fetched(source, error) from error
    return architecture, dict(arguments or {}), pretrained


def _refuse_other_types(source: str, arguments: dict, pretrained: dict) -> None:
    """Of what is read here; what else an architecture is given is refused when it is built."""
    for section, key, fits, wanted in (
        (pretrained, "input_size", lambda value: _are(value, _is_whole, 3), "[channels, height, width]"),
        (pretrained, "mean", lambda value: _are(value, _is_number), "a list of numbers"),
        (pretrained, "std", lambda value: _are(value, _is_number), "a list of numbers"),
        (pretrained, "global_pool", lambda value: isinstance(value, str), "a name"),
        (arguments, "in_chans", _is_whole, "a whole number above 0"),
        (arguments, "img_size", _is_size, "a whole number above 0, or two in a list,"),
        (arguments, "patch_size", _is_size, "a whole number above 0, or two in a list,"),
    ):
        if section.get(key) and not fits(section[key]):
            raise UserError(f"{source} has {key}={section[key]!r:.60} in its config.json; write {wanted} there.")


def _is_number(value) -> bool:
    return isinstance(value, int | float)


def _is_whole(value) -> bool:
    return isinstance(value, int) and value > 0


def _is_size(value) -> bool:
    return _is_whole(value) or _are(value, _is_whole, 2)


def _are(values, fits: Callable[..., bool], count: int | None = None) -> bool:
    """Whether it is a list of values that fit, and of `count` of them where that is given."""
    return isinstance(values, list | tuple) and len(values) == (count or len(values)) and all(map(fits, values))


def _read(name: str, where: str, channels: int = 3) -> Weights:
    # timm takes a first layer of other channels for one of three, cannot adapt it, and leaves it at random.
    as_it_is = {} if channels == 3 else {"pretrained_cfg_overlay": {"first_conv": None}}
    try:
        with seeded(0):
            model = timm.create_model(name, pretrained=True, **as_it_is)
    except (SafetensorError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise _damaged(where, error) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _not_fetched(where, error) from error
    model.reset_classifier(0)
    return Weights(
        where=where,
        format=f"timm {type(model).__name__}",
        tensors={key: tensor.detach().float() if tensor.is_floating_point() else tensor
                 for key, tensor in model.state_dict().items()},
        resampling="timm",
        grid=grid_of(model),
        prefix_rows=prefix_rows_of(model),
        moved_norm=_moved_norm(model, where),
        **facts(model),
    )  # fmt: skip


def _moved_norm(model: nn.Module, where: str) -> bool:
    """timm gives EVA-02's masked pretraining a norm after the mean, with the weights of the one before it.

    Known of what timm publishes alone: the tag stays in a folder whose weights were trained on.
    """
    tag = getattr(model, "pretrained_cfg", {}).get("tag") or ""
    published = where.startswith((TIMM, f"{HUB}timm/")) and tag.startswith("mim")
    return published and isinstance(model, Eva) and not isinstance(model.fc_norm, nn.Identity)


def _damaged(where: str, error: Exception) -> UserError:
    again = "save it again" if where.startswith(FOLDER) else "remove it from the Hugging Face cache, and fetch it again"
    return UserError(f"{where} has a file of weights that cannot be read ({in_one_line(error, 300)}); {again}.")


def _not_fetched(where: str, error: Exception) -> UserError:
    reason = in_one_line(error, 300)
    if where.startswith(FOLDER):
        return UserError(f"{where} does not hold the whole of its model ({reason}); save it again.")
    return UserError(
        f"The pretrained weights of {where.removeprefix(TIMM)} could not be fetched ({reason}); connect to the "
        "network, or copy them into the Hugging Face cache of this machine."
    )
