"""What the data path uses of the machine that it is on; `prelude doctor` asks too, where torch may be broken."""

import os
import tempfile
from pathlib import Path

SHARED_MEMORY = "/dev/shm"
"""What large batches travel through between processes."""


def cache_folder() -> Path:
    """Where indexes, features and remote shards are kept: $PRELUDE_CACHE, or ~/.cache/prelude, or where
    there is no home a folder of the user's among temporary files."""
    if asked := os.environ.get("PRELUDE_CACHE"):
        return Path(asked)
    try:
        return Path.home() / ".cache" / "prelude"
    except RuntimeError:  # a user without a name, and no HOME: `docker run --user 1234`
        return Path(tempfile.gettempdir()) / f"prelude-{os.getuid()}"
