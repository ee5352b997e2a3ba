"""`prelude --completion`: what real shells make of it when somebody presses Tab."""

import argparse
import importlib
import os
import pty
import select
import shutil
import subprocess
import time

import pytest

from prelude.data.errors import UserError
from prelude.launch import prelude
from prelude.pretrain.recipes import shipped_recipes

READY, DONE = "ready>", "typed:"


class Shell:
    """An interactive one, at a terminal."""

    def __init__(self, command: list[str], cwd):
        self.terminal, theirs = pty.openpty()
        env = {"PATH": os.environ["PATH"], "HOME": str(cwd), "TERM": "dumb", "PS1": READY, "ZDOTDIR": str(cwd)}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=env, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What came up to `text`, which is then forgotten."""
        ends = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < ends, self.seen
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.seen += os.read(self.terminal, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


EVALUATED = 'eval "$(cat completion)"; '
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], EVALUATED + "bind 'set enable-bracketed-paste off'"),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; " + EVALUATED + f"PS1='{READY}'"),
}
TYPED = {
    "prelude kn": "prelude knn",
    "prelude knn --tra": "prelude knn --train",
    "prelude shards ver": "prelude shards verify",
    "prelude shards pack --sho": "prelude shards pack --short-side",
    "prelude probe --protocol ma": "prelude probe --protocol mae",
    "prelude pretrain --config quicks": "prelude pretrain --config quickstart",
    "prelude pretrain --config finetune_vit_c": "prelude pretrain --config finetune_vit_c",
    "prelude finetune runs/x --config finetune_vit_c": "prelude finetune runs/x --config finetune_vit_cifar10",
    "prelude recipes finetune_vit_c": "prelude recipes finetune_vit_cifar10",
    "prelude recipes --objective simm": "prelude recipes --objective simmim",
    "prelude recipes --objective fine": "prelude recipes --objective fine-tuning",
    "prelude pretrain --device l40": "prelude pretrain --device l40s",
    "prelude export --format tran": "prelude export --format transformers",
    "prelude knn --features me": "prelude knn --features mean",
    "prelude shards info --range au": "prelude shards info --range auto",
    "prelude check-objective vicr": "prelude check-objective vicreg",
    "prelude export only_f": "prelude export only_file",
}


@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_completes_commands_options_choices_recipes_and_files(name, tmp_path, capsys):
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}")
    assert prelude.main(["--completion", name]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "only_file").write_text("")
    command, setup = SHELLS[name]
    # in the place of the program: it says what it was given
    setup += f"; prelude() {{ printf '%s ' {DONE}prelude \"$@\"; echo; }}; echo set'-'up\n"
    shell = Shell(command, tmp_path)
    try:
        shell.type(setup)
        shell.wait_for("set-up")
        for typed, completed in TYPED.items():
            shell.type(f"{typed}\t\n")
            shell.wait_for(DONE)
            assert shell.wait_for("\n").split() == completed.split()
    finally:
        shell.close()


def test_every_recipe_that_ships_is_offered_and_every_command(capsys):
    prelude.main(["--completion", "bash"])
    told = capsys.readouterr().out
    assert all(name in told for name in shipped_recipes())
    assert all(f"_shtab_prelude_{name.replace('-', '_')}_option_strings" in told for name in prelude.COMMANDS)


def options_of(parser: argparse.ArgumentParser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options_of(below)
        else:
            yield action


@pytest.mark.parametrize("name", prelude.COMMANDS)
def test_what_help_lists_a_shell_offers(name):
    """An option whose help has a list of values, or a name that stands for one of a few, is completed."""
    parser = importlib.import_module(f"prelude.launch.{prelude.COMMANDS[name][0]}").parser()
    for action in options_of(parser):
        if action.metavar in ("KIND", "FORMAT", "LOW,HIGH") or action.dest in ("device", "objective"):
            assert action.choices or action.offered, action.option_strings


@pytest.mark.parametrize("words", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_refused(words):
    with pytest.raises(UserError, match="write bash or zsh"):
        prelude.main(["--completion", *words])
