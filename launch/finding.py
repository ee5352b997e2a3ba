"""What `prelude doctor` finds of one thing."""

from dataclasses import dataclass, field


@dataclass
class Finding:
    """found: at least one line. wrong: a sentence for each thing that is, with what to do about it."""

    title: str
    found: list[str]
    wrong: list[str] = field(default_factory=list)


GIB = 2**30


def size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.0f} MiB"
