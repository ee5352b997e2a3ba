"""Shapes with several findings an image, in a JSON member, and a patient of three images each."""

import io
import json
import tarfile
from pathlib import Path

from prelude.data.shapes import write_shards

NAMES = ["odd", "small", "rare"]


def answers(number: int, sample: int) -> dict:
    """Of the class `number`: some uncertain, some not told."""
    small = -1 if sample % 7 == 3 else None if sample % 11 == 5 else int(number < 5)
    return {"odd": number % 2, "small": small, "rare": int(number == 0 and sample % 4 == 0)}


def write_findings(folder: Path, name: str, num_samples: int, *, image_size: int = 16, first_patient: int = 0) -> str:
    """Returns the pattern of the shards."""
    made = folder / "made"
    write_shards(made, name, num_samples, image_size=image_size)
    sample = 0
    for shard in sorted(made.glob(f"{name}-*.tar")):
        with tarfile.open(shard) as source, tarfile.open(folder / shard.name, "w") as target:
            for member in source.getmembers():
                content = source.extractfile(member).read()
                if member.name.endswith(".cls"):
                    found = {"findings": answers(int(content), sample), "patient": first_patient + sample // 3}
                    found["kind"] = int(content)
                    content, member.name = json.dumps(found).encode(), member.name.replace(".cls", ".json")
                    member.size, sample = len(content), sample + 1
                target.addfile(member, io.BytesIO(content))
    return f"{folder}/{name}-*.tar"
