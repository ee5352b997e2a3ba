"""Batches of images and batches of volumes in turn, each kind by a loader of its own.

- A turn is a whole global batch, so that all ranks have the same kind in every step. Whose turn it is depends on
  (seed, turn) alone: of every eight turns each kind has its share, in an order that is drawn.
- Each kind goes through its own endless order, as if there were no other: the same samples at any number of ranks and
  workers, and after any interruption.
- An epoch is as many samples as both kinds have together. A kind's pass may take more or less than one.
"""

from collections.abc import Mapping

from prelude.data.batch import Batch
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.mixed_order import Dealer
from prelude.data.pipeline import STATE_VERSION, EndlessLoader

BLOCK = 8  # turns that are mixed with each other: a logged step in ten would else always be of one kind
KINDS = ("images", "volumes")


class AlternatingLoader:
    """An endless iterator of one rank's micro-batches. `samples` is the number of positions used up by all ranks, of
    both kinds.

    share: of the turns, that are the volumes'. global_batch: samples of a turn, a multiple of what a micro-batch of all
    ranks has.
    """

    def __init__(self, images: EndlessLoader, volumes: EndlessLoader, share: float, global_batch: int, seed: int):
        self.loaders = dict(zip(KINDS, (images, volumes), strict=True))
        self.global_batch, self.share = global_batch, share
        self.dealer = Dealer(dict(zip(KINDS, (1 - share, share), strict=True)), seed, BLOCK, b"kinds")
        self.bad, self.samples = _Both(images.bad, volumes.bad), 0
        self.num_samples = images.num_samples + volumes.num_samples
        self.num_shards = images.num_shards + volumes.num_shards
        self.num_workers = images.num_workers + volumes.num_workers

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        """Raises as `EndlessLoader` does."""
        loader = self.loaders[self.kind_at(self.samples)]
        batch = next(loader)
        self.samples += loader.micro_batch * loader.world_size
        return batch

    def kind_at(self, position: int) -> str:
        block, turn = divmod(position // self.global_batch, BLOCK)
        return KINDS[self.dealer.dealt(block)[0][turn]]

    def preview(self, count: int) -> list[str]:
        """Where the next `count` samples of all ranks come from, as far as one turn goes."""
        return self.loaders[self.kind_at(self.samples)].preview(min(count, self.global_batch))

    def kinds(self) -> list[str]:
        """What each kind has of the steps, in a few words."""
        shares = zip(self.loaders.items(), (1 - self.share, self.share), strict=True)
        return [
            f"{name} in {100 * share:.3g} % of the steps ({counted(one.num_samples, 'sample')}, "
            f"{share * self.num_samples / one.num_samples:.3g} times an epoch)"
            for (name, one), share in shares
        ]

    def state_dict(self) -> dict:
        """Plain values, the same on every rank."""
        of_kinds = {name: loader.state_dict() for name, loader in self.loaders.items()}
        fingerprint = "_".join(filter(None, (state.get("fingerprint") for state in of_kinds.values())))
        told = {"samples": self.samples, "num_samples": self.num_samples, "fingerprint": fingerprint}
        return {**self._identity(), **told, **of_kinds}

    def load_state_dict(self, state: dict, allow_changed_data: bool = False) -> None:
        """Goes on from `state`, each kind where it was. Raises UserError as `EndlessLoader` does."""
        now = self._identity()
        changed = [f"{key} {state.get(key)} -> {now[key]}" for key in now if state.get(key) != now[key]]
        missing = [name for name in KINDS if not isinstance(state.get(name), Mapping)]
        if missing or (changed and not allow_changed_data):
            found = ", ".join([*changed, *(f"{name} none -> some" for name in missing)])
            allowed = "" if missing else ", or write resume.allow_changed_data=true"
            raise UserError(
                f"The data are not those that the checkpoint was made with ({found}); restore them{allowed}."
            )
        for name, loader in self.loaders.items():
            try:
                loader.load_state_dict(state[name], allow_changed_data)
            except UserError as error:
                raise UserError(f"Of {name}: {error}") from None
        self.samples = -(-state["samples"] // self.global_batch) * self.global_batch

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()

    def _identity(self) -> dict:
        return {"version": STATE_VERSION, "volume_share": self.share, "turn": self.global_batch}


class _Both:
    """What two ledgers of bad samples have together."""

    def __init__(self, *ledgers):
        self.ledgers = ledgers

    @property
    def num_bad(self) -> int:
        return sum(ledger.num_bad for ledger in self.ledgers)

    @property
    def num_read(self) -> int:
        return sum(ledger.num_read for ledger in self.ledgers)
