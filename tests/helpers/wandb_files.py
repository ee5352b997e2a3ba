"""What W&B wrote of an offline run, read without any code of its package but the declaration of its records.

The file is a log of LevelDB's format: blocks of 32 KiB, records cut into fragments with a header of 7 bytes each.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 2**15, 7
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator:
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        piece = content[place + HEADER : place + HEADER + length]
        whole = piece if kind in (FULL, FIRST) else whole + piece
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
        place += HEADER + length


def runs(folder: Path) -> list[dict]:
    """Of each start, by time: id, config, history (a dictionary for each step), summary and how it ended."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run = {"history": [], "config": {}, "summary": {}, "exit": None, "files": path.parent / "files"}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
                run["config"] |= values_of(record.run.config.update)
            elif kind == "history":
                run["history"].append(values_of(record.history.item))
            elif kind == "summary":
                run["summary"] |= values_of(record.summary.update)
            elif kind == "exit":
                run["exit"] = record.exit.exit_code
        found.append(run)
    return found


def values_of(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
