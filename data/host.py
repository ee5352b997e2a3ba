"""What the data path uses of the machine that it is on; `prelude doctor` asks too, where torch may be broken."""

import os
from pathlib import Path

SHARED_MEMORY = "/dev/shm"
"""What batches travel through between processes."""


def cache_folder() -> Path:
    """Where indexes, features and remote shards are kept: $PRELUDE_CACHE, or ~/.cache/prelude."""
    return Path(os.environ.get("PRELUDE_CACHE") or Path.home() / ".cache" / "prelude")
