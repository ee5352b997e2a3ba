"""Where doors without a config keep remote shards."""

import argparse

from prelude.data.errors import UserError
from prelude.data.remote_shards import keep_remote_shards


def use_cache(args: argparse.Namespace) -> None:
    """Takes `--cache-dir` and `--cache-gib`. Raises UserError for a size that is none."""
    if args.cache_gib is not None and not args.cache_gib > 0:
        raise UserError(f"--cache-gib {args.cache_gib:g} leaves no room for a shard; write more than 0.")
    keep_remote_shards(args.cache_dir, args.cache_gib)
