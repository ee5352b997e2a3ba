"""Where doors without a config keep remote shards."""

import argparse

from prelude.data.remote_shards import keep_remote_shards


def use_cache(args: argparse.Namespace) -> None:
    """Takes `--cache-dir` and `--cache-gib`."""
    keep_remote_shards(args.cache_dir, args.cache_gib)
