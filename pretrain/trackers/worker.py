"""The process beside a run that talks to a tracking service, see `tracker`.

    python -P -m prelude.pretrain.trackers.worker

The first line on its standard input says which service, and what the run is; each line that follows is something to be
recorded there. It answers by lines on its standard output: `{"trouble": WHY}` when a call failed, `{"well": true}` when
one works again, and `{"taken": true}` once it is done with a record, whatever became of it.

- What was recorded of a step is noted in the run folder when the service has it: a start that goes on from a checkpoint
  goes through some steps again, and they are not recorded again.
- Two starts of a run may overlap, where the first was killed and its process still hands over: the second waits.
- It ends when it is told that the run ends, or with its standard input; at most `LAST_WAIT` seconds later.
"""

import fcntl
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from prelude.data.errors import in_one_line
from prelude.data.whole_files import write_whole
from prelude.pretrain.trackers.services import HELD_OUT, ONLINE, SERVICES, picture_of

NICENESS = 10
LAST_WAIT = 60.0  # seconds
LONGEST = 300  # characters of a reason


class Records:
    """What a service has of a run: which id it goes by, and the last step of each kind of record."""

    def __init__(self, path: Path):
        self.path = path
        try:
            kept = json.loads(path.read_text())
            self.steps = {name: int(step) for name, step in kept["steps"].items()}
            self.id, self.place = str(kept["id"]), kept["place"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.id, self.place, self.steps = None, None, {}

    def of(self, place: dict, new_id: str) -> "Records":
        """Those of a project or experiment: another one gets a run of its own."""
        if self.id is None or self.place != place:
            self.id, self.place, self.steps = new_id, place, {}
            self.write()
        return self

    def has(self, kind: str, step: int) -> bool:
        return step <= self.steps.get(kind, -1)

    def note(self, kind: str, step: int) -> None:
        self.steps[kind] = step
        self.write()

    def write(self) -> None:
        write_whole(self.path, json.dumps({"id": self.id, "place": self.place, "steps": self.steps}))


def record(service, records: Records, message: dict) -> None:
    match message:
        case {"scalars": values, "step": step}:
            kind = next((of[:-1] for of in (ONLINE, HELD_OUT) if any(name.startswith(of) for name in values)), "train")
            if not records.has(kind, step):
                service.scalars(step, values)
                records.note(kind, step)
        case {"picture": png, "name": name, "step": step}:
            if not records.has(f"pictures/{name}", step):
                service.picture(step, name, picture_of(png))
                records.note(f"pictures/{name}", step)
        case {"text": text, "name": name, "step": step}:
            service.text(step, name, text)
        case {"finished": finished}:
            service.finish(finished)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # meant for the run, which says when to end
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print goes to the log

    def answer(**values) -> None:
        with suppress(OSError):  # a run that was killed hears nothing; what it had said is still recorded
            print(json.dumps(values), file=answers, flush=True)

    about = json.loads(sys.stdin.readline())
    folder, name = Path(about["records"]), about["service"]
    with open(folder / f"{name}.lock", "w") as lock:
        with suppress(OSError):  # a file system without locks: two starts of a run never overlap for long
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Whatever a package raises is its own: the run goes on, and is told.
        try:
            records = Records(folder / f"{name}.json").of(about["place"], about["id"])
            service = SERVICES[name](about["settings"], about | {"id": records.id})
        except BaseException as error:
            answer(trouble=reason(error))
            return 1
        listen(service, records, answer)
    return 0


def listen(service, records: Records, answer) -> None:
    failing = False
    for line in sys.stdin:
        message = json.loads(line)
        ends = "finished" in message
        if ends:
            end_within(LAST_WAIT)
        try:
            record(service, records, message)
        except Exception as error:
            if not failing:
                answer(trouble=reason(error))
            failing = True
        else:
            if failing:
                answer(well=True)
            failing = False
        answer(taken=True)
        if ends:  # without waiting for the end of the input, which the run's loader workers hold open
            return
    end_within(LAST_WAIT)  # the run is gone without a word
    service.finish(False)


def end_within(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


def reason(error: BaseException) -> str:
    text = in_one_line(error)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # whatever a package wants to do at the end of its process, it may not make it hang
