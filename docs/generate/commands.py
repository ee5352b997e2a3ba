"""The page of the commands: the help of each, as the parsers of the doors print it."""

import argparse
import importlib
import os

from prelude.launch.prelude import COMMANDS

_WIDTH = "88"


def page() -> str:
    parts = ["# Commands", "What `prelude COMMAND --help` prints, of every command."]
    for name, (module, text) in COMMANDS.items():
        parser = importlib.import_module(f"prelude.launch.{module}").parser()
        parts += [f"## `prelude {name}`", f"{text[0].upper()}{text[1:]}.", _help(parser, f"prelude {name}")]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for below, inner in action.choices.items():
                    whole = f"prelude {name} {below}"
                    parts += [f"### `{whole}`", _help(inner, whole)]
    return "\n\n".join(parts)


def _help(parser: argparse.ArgumentParser, name: str) -> str:
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), _WIDTH
    try:
        parser.prog = name
        return f"```\n{parser.format_help().rstrip()}\n```"
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
