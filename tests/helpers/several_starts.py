"""Several starts of doors, one after another in one process, or in the ranks of one launch: their imports take longer
than what they do.

`several_starts.py FILE` reads a JSON list of starts, {"name", "argv"} and, where it is no pretraining, {"door": "knn"}.
What rank R tells is written to NAME.R.out beside it as it comes, its exit code to NAME.R.code.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from runs import LAUNCHED, free_port

from prelude.launch.exit_codes import door


def command(folder: Path, starts: list[dict]) -> list[str]:
    """What a launcher is told, to make these starts. Ranks meet on another port for each: a port is free again only
    once all have left it."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps([{"port": free_port()} | start for start in starts]))
    return [__file__, str(plan)]


def made(launcher: list[str], folder: Path, starts: list[dict]) -> dict[str, tuple[list, str]]:
    """{name: (exit code of each rank, what they told together)}, once all have ended."""
    env = os.environ | LAUNCHED
    done = subprocess.run([*launcher, *command(folder, starts)], env=env, capture_output=True, text=True, timeout=600)
    answers = {start["name"]: answer(folder, start["name"]) for start in starts}
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + str(answers)[-3000:]
    return answers


def answer(folder: Path, name: str) -> tuple[list, str]:
    """(exit code of each rank, what they told together)"""
    codes = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.*.code"))]
    return codes, "".join(path.read_text() for path in sorted(folder.glob(f"{name}.*.out")))


def main(plan: Path) -> None:
    launched = dict(os.environ)
    for start in json.loads(plan.read_text()):
        os.environ.clear()
        os.environ |= launched | ({"MASTER_PORT": str(start["port"])} if "RANK" in launched else {})
        place = plan.with_name(f"{start['name']}.{launched.get('RANK', 0)}")
        module = importlib.import_module(f"prelude.launch.{start.get('door', 'pretrain')}")
        os.umask(start.get("umask", 0o022))
        with open(f"{place}.out", "w") as told:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(told.fileno(), stream.fileno())
            try:
                code = door(lambda argv=start["argv"], module=module: module.main(argv))
            except Exception as error:  # what the tests are there to see
                code = repr(error)
            sys.stdout.flush()
        Path(f"{place}.code").write_text(json.dumps(code))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
    # As every launched rank ends; what torch destroys at the end of a process now and then aborts it.
    from prelude.pretrain import distributed

    distributed.leave(0)
