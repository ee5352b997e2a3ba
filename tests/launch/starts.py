"""Run by test_run_folder.py: several starts of the pretraining door, one after another in one process.

`starts.py FILE` reads a JSON list of starts, {"name", "argv"}, and writes each one's exit code and what it told to
NAME.json beside it.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from prelude.launch import pretrain
from prelude.launch.exit_codes import door

if __name__ == "__main__":
    plan = Path(sys.argv[1])
    for start in json.loads(plan.read_text()):
        told = io.StringIO()
        os.umask(start.get("umask", 0o022))
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            try:
                code = door(lambda argv=start["argv"]: pretrain.main(argv))
            except Exception as error:  # what the tests are there to see
                code = repr(error)
        answer = {"code": code, "told": told.getvalue()}
        plan.with_name(f"{start['name']}.json").write_text(json.dumps(answer))
