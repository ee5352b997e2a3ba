"""Features of shards by one loop, without a bank: what the bank's are held against."""

from prelude.data.loader import one_pass
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.extraction import Features, encode, evaluation_plan


def extract(
    encoder,
    index: ShardIndex,
    label: str = "cls",
    *,
    kinds=None,
    batch_size: int = 256,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Features]:
    """Of every sample of `index`, or of a rank's share of it, by kind. encoder: as for `Extractor`."""
    reading = {"batch_size": batch_size, "num_workers": num_workers, "rank": rank, "world_size": world_size}
    batches = one_pass(index, evaluation_plan(encoder), label=label, **reading)
    return encode(encoder, batches, index.num_samples, index.fingerprint, label, kinds=kinds)
