"""What has to be the same on all ranks, compared before the first step.

Ranks with other shards, another config or other code would train together to the end, and nobody could say what was
trained.
"""

from prelude.data.counting import shortened
from prelude.data.errors import UserError
from prelude.pretrain import distributed
from prelude.pretrain.resume import flat


def refuse_differences(facts: dict) -> None:
    """facts: names and plain values, nested or not. Collective. Raises UserError, the same on every rank, naming the
    first rank that differs from rank 0, and in what."""
    distributed.gather()  # one may have had its shards to index
    mine = {name: str(value) for name, value in flat(facts).items()}
    (host, first), *others = distributed.of_all((distributed.host(), mine))
    different = [
        (rank, other_host, [name for name in sorted(first | other) if first.get(name) != other.get(name)], other)
        for rank, (other_host, other) in enumerate(others, start=1)
        if first != other
    ]
    if not different:
        return
    rank, other_host, names, other = different[0]
    listed = [f"{name} is {other.get(name)} there, {first.get(name)} on rank 0" for name in names]
    also = f" So do {len(different) - 1} other ranks." if len(different) > 1 else ""
    raise UserError(
        f"Rank {rank} on {other_host} differs from rank 0 on {host}: {shortened(listed, between='; ')}.{also} Give "
        "all nodes the same shards, config and code, and start again."
    )
