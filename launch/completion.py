"""What a shell completes behind `prelude`, made from the parsers of the doors themselves."""

import argparse
import importlib
from collections.abc import Mapping

import shtab

from prelude.data.errors import UserError
from prelude.launch import arguments
from prelude.pretrain.recipes import is_of_fine_tuning, read_recipe, shipped_recipes

SHELLS = ("bash", "zsh")
_FILES = (arguments.path, arguments.source)  # types of arguments that may be a file or a folder
PRETRAINING, FINE_TUNING, EVERY = "pretraining", "fine_tuning", "every"  # kinds of recipe
_OF_DOORS = {"finetune": FINE_TUNING, "recipes": EVERY}  # which a door takes; of any other: pretraining
_OF_OPTIONS = {"finetune": FINE_TUNING}  # of `prelude compare`


def script(shell: str, commands: Mapping[str, tuple[str, str]]) -> str:
    """To be evaluated by `shell`. commands: the module and the line of help of each. Raises UserError."""
    if shell not in SHELLS:
        raise UserError(f"--completion knows no shell {shell!r}; after it write {' or '.join(SHELLS)}.")
    whole = argparse.ArgumentParser(prog="prelude")
    whole.add_argument("--version", action="store_true", help="tell it")
    whole.add_argument("--completion", choices=SHELLS, help="print what a shell completes")
    doors = whole.add_subparsers()
    for name, (module, text) in commands.items():
        parser = importlib.import_module(f"prelude.launch.{module}").parser()
        completed = _completed(parser, _OF_DOORS.get(name, PRETRAINING))
        doors.add_parser(name, help=text, parents=[completed], add_help=False)
    return shtab.complete(whole, shell, preamble=_preamble())


def _completed(parser: argparse.ArgumentParser, recipes: str) -> argparse.ArgumentParser:
    """recipes: the kind that the door takes."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _completed(below, recipes)
        elif action.dest in ("config", "recipe", *_OF_OPTIONS):
            action.complete = _function(_OF_OPTIONS.get(action.dest, recipes))
        elif offered := getattr(action, "offered", None):
            action.choices = offered
        elif action.type in _FILES or isinstance(action, arguments.Shards) or action.metavar == "SHARDS":
            action.complete = shtab.FILE
    return parser


def _function(recipes: str) -> dict[str, str]:
    return dict.fromkeys(SHELLS, f"_prelude_recipe_{recipes}")


def _preamble() -> dict[str, str]:
    """Of `--config`: a recipe of the kind that is wanted, or a file."""
    names: dict[str, list[str]] = {EVERY: shipped_recipes(), PRETRAINING: [], FINE_TUNING: []}
    for name in names[EVERY]:
        names[FINE_TUNING if is_of_fine_tuning(read_recipe(name)) else PRETRAINING].append(name)
    bash = '{name}() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}'
    texts = {"bash": bash, "zsh": "{name}() {{ compadd {names}; _files }}"}
    return {
        shell: "\n".join(
            text.format(name=_function(kind)[shell], names=" ".join(of_kind)) for kind, of_kind in names.items()
        )
        for shell, text in texts.items()
    }
