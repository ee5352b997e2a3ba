"""Every key that a config may have: what it takes, its default and what it means.

    prelude keys
    prelude keys optimizer
    prelude keys train.micro_batch
    prelude keys mae
    prelude keys momentum

Without a word: the names of all. A section or a key is told with all below
it, an objective with its options (`finetune`: those of fine-tuning), and
any other word with every key that it is a part of, or of whose meaning;
what other tools call a key (`batch_size`) finds it, too. What a recipe sets:
`prelude recipes NAME`.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import difflib
import textwrap
from collections.abc import Sequence

from prelude.data.errors import UserError
from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import documented_parser, offering, parse
from prelude.launch.config_reference import FINE_TUNE, OF_OBJECTIVES, Key, all_keys
from prelude.launch.exit_codes import door
from prelude.launch.plain_tables import pairs
from prelude.pretrain import foreign_keys
from prelude.pretrain.config import Config
from prelude.pretrain.recipes import shipped_recipes

_OPTIONS_OF = {"finetune": FINE_TUNE} | {name: name for name in OF_OBJECTIVES}
_SECTIONS = [name for name, field in Config.model_fields.items() if field.annotation not in (str, int, dict)]
_OPEN = ("encoder.kwargs", "deepspeed")  # of which keys are not ours
_WIDTH = 88


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    refuse_ranks("keys")
    keys = all_keys()
    word = (args.word or "").strip()
    print("\n".join(map(_told, found(word, keys))) if word else _names(keys))
    return 0


def found(word: str, keys: Sequence[Key]) -> list[Key]:
    """Those that a word asks for. Raises UserError where there is none."""
    name = word.partition("=")[0].rstrip(" .*")
    objective = _OPTIONS_OF.get(name.removeprefix("objective."))
    if told := [key for key in keys if objective and key.objective == objective]:
        return told
    if told := [key for key in keys if f"{key.name}.".startswith(f"{name}.")]:
        return told
    lower, leaves = name.lower(), {key.name.rpartition(".")[2] for key in keys}
    plain = lower.replace("-", "_")
    if plain in foreign_keys.SENTENCES and plain not in leaves:
        raise UserError(f"{name} does not exist: {foreign_keys.SENTENCES[plain]}.")
    called = foreign_keys.NAMES.get(plain, name)
    called = next((open for open in _OPEN if called.startswith(f"{open}.")), called)
    told = [key for key in keys if key.name == ("objective" if called == "objective.name" else called)]
    told += [key for key in keys if key not in told and (plain in key.name or lower in key.meaning.lower())]
    if told and name:
        return told
    near = difflib.get_close_matches(plain, [*leaves, *_OPTIONS_OF], 3, 0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "`prelude keys` lists the names of all."
    if name in shipped_recipes():
        hint = f"it is a recipe: `prelude recipes {name}` says what it sets."
    raise UserError(f"No key has to do with {word!r}; {hint}")


def _told(key: Key) -> str:
    of = f" ({key.objective})" if key.objective else ""
    default = f"; default {key.default}" if key.default is not None else "; must be written" if key.is_required else ""
    lines = textwrap.wrap(f"{key.takes}{default}", _WIDTH) + textwrap.wrap(key.meaning, _WIDTH)
    return "\n".join([f"{key.name}{of}", *(f"    {line}" for line in lines)])


def _names(keys: Sequence[Key]) -> str:
    """Of each section and each objective, a paragraph."""
    told: dict[str, list[str]] = {}
    for key in keys:
        section, _, name = key.name.partition(".")
        if name and not key.section:
            told.setdefault(key.objective or section, []).append(name)
        elif not name and not key.section:
            told.setdefault("", []).append(section)
    rows = [(section, ", ".join(names)) for section, names in told.items()]
    below = "`prelude keys SECTION`, `prelude keys KEY` or `prelude keys OBJECTIVE` says what they take and mean."
    return f"{pairs('', rows)}\n\n{below}"


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    word = parser.add_argument(
        "word", nargs="?", metavar="WORD", help="a section, a key, an objective, or any other word"
    )
    offering(word, (*_SECTIONS, *_OPTIONS_OF))
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
