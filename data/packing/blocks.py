"""Images that can only be read a block at a time (a Parquet row group, a Zarr chunk): which blocks are kept."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

CACHE_BYTES = 512 * 2**20
"""Of decoded blocks in each process; a source that fits is shuffled as a whole, a larger one in windows of blocks."""


class BlockCache:
    """The blocks that were used last, up to CACHE_BYTES, and at least the last one. A copy for another process is
    empty."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.num_bytes = 0

    def get(self, key: Hashable, load: Callable[[], tuple[Any, int]]) -> Any:
        """The block of this key; `load` returns it with its size in bytes."""
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key][0]
        block, size = load()
        while self.kept and self.num_bytes + size > CACHE_BYTES:
            _, (_, freed) = self.kept.popitem(last=False)
            self.num_bytes -= freed
        self.kept[key] = block, size
        self.num_bytes += size
        return block

    def __getstate__(self):
        return {"kept": OrderedDict(), "num_bytes": 0}
