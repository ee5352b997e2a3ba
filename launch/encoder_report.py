"""`prelude check-encoder`: what an encoder gives, and which objectives that is enough for."""

from rich.console import Console
from rich.text import Text

from prelude.data.errors import UserError
from prelude.evaluators.table_text import PlainTable
from prelude.objectives import OURS, check_objective, objective_class, options_for
from prelude.pretrain import overrides as setting
from prelude.pretrain.config import Config, EncoderConfig
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.encoders import EncoderSummary, check_encoder, lay_out_encoder
from prelude.pretrain.own_encoder import gives
from prelude.pretrain.recipes import validate_config


def main(name: str, overrides: list[str]) -> int:
    """Exit code 1 where no objective can use it. Raises UserError for what is no encoder, or has other settings."""
    for override in overrides:
        if not override.startswith("encoder."):
            raise UserError(f"{override} says nothing about the encoder; write encoder.image_size=64 and the like.")
    encoder = _config(name, overrides, "rotation").encoder
    summary = check_encoder(encoder, tokens=False)
    _refuse_changing(encoder)
    verdicts = {objective: _refusal(name, overrides, objective) for objective in sorted(OURS)}
    table = PlainTable(title=Text(f"{name}, {encoder.size[0]} x {encoder.size[1]} pixels"), show_header=False)
    for row in _given(encoder, summary):
        table.add_row(*row)
    table.add_section()
    for objective, refusal in verdicts.items():
        table.add_row(objective, refusal or "can use it")
    Console().print(table)
    return 0 if None in verdicts.values() else 1


def _refuse_changing(encoder: EncoderConfig) -> None:
    """Ranks and later starts build it again, and have to get the same tensors."""
    one, other = ({n: tuple(t.shape) for n, t in lay_out_encoder(encoder).state_dict().items()} for _ in range(2))
    if odd := [n for n in {**one, **other} if one.get(n) != other.get(n)]:
        raise UserError(
            f"{encoder.name} gives another encoder each time: {odd[0]} is first {one.get(odd[0], 'absent')}, then "
            f"{other.get(odd[0], 'absent')}; let encoder.kwargs alone decide its shape."
        )


def _refusal(name: str, overrides: list[str], objective: str) -> str | None:
    """Why this objective, as it is set by default, cannot use the encoder."""
    try:
        check_objective(_config(name, overrides, objective))
    except UserError as error:
        return str(error)
    return None


def _config(name: str, overrides: list[str], objective: str) -> Config:
    volumes = {"volumes": {"shards": "none"}} if objective_class(objective).takes_volumes else {}
    values = {
        "run_dir": "none",
        "data": {"shards": "none"} | volumes,
        "encoder": {"name": name, "image_size": 224},
        "objective": {"name": objective},
        "train": {"epochs": 1, "global_batch": 2},
        "optimizer": {"lr": 1e-3},
    }  # beside the encoder and the objective, nothing of it decides here
    for override in overrides:
        setting.apply(values, override, Keys(None))
    return validate_config(values, " ".join([f"encoder.name={name}", *overrides]), options_for)


def _given(encoder: EncoderConfig, summary: EncoderSummary) -> list[tuple[str, str]]:
    model = lay_out_encoder(encoder)
    rows = [("parameters", f"{summary.num_parameters:,}"), ("pooled features", f"{summary.width} wide")]
    if found := gives(model):
        maps = ", ".join(f"{channels} x {height} x {width}" for channels, height, width in found.maps)
        rows.append(("maps of stages", maps or "none: it has no forward_maps(images)"))
        layout = found.tokens
        tokens = layout and (
            f"{layout.grid[0]} x {layout.grid[1]} patches and {layout.num_prefix} more, {layout.width} wide"
        )
        rows.append(("tokens of kept patches", tokens or "none: it has no forward_tokens(images, keep)"))
    return rows
