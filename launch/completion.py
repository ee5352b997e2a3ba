"""What a shell completes behind `prelude`, made from the parsers of the doors themselves."""

import argparse
import importlib
from collections.abc import Mapping

import shtab

from prelude.data.errors import UserError
from prelude.launch import arguments
from prelude.pretrain.recipes import shipped_recipes

SHELLS = ("bash", "zsh")
_FILES = (arguments.path, arguments.source)  # types of arguments that may be a file or a folder
_RECIPES = {shell: "_prelude_recipe" for shell in SHELLS}


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
        doors.add_parser(name, help=text, parents=[_with_files(parser)], add_help=False)
    return shtab.complete(whole, shell, preamble=_preamble())


def _with_files(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _with_files(below)
        elif action.dest in ("config", "recipe"):
            action.complete = _RECIPES
        elif action.type in _FILES or isinstance(action, arguments.Shards) or action.metavar == "SHARDS":
            action.complete = shtab.FILE
    return parser


def _preamble() -> dict[str, str]:
    """Of `--config`: a recipe that ships, or a file."""
    names = " ".join(shipped_recipes())
    return {
        "bash": f'{_RECIPES["bash"]}() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"{_RECIPES['zsh']}() {{ compadd {names}; _files }}",
    }
