"""An encoder that does not start at random: what builds an objective and what initialises one have to know of it.

- The weights are put in before the objective is built around the encoder, so that whatever it copies (a momentum
  teacher) is a copy of them.
- An objective initialises its own parts and leaves such an encoder alone (`initialises`); one that does not, be it
  anybody's, is found out: every value is compared afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prelude.data.counting import shortened
from prelude.data.errors import UserError

_MARK = "_keeps_its_weights"  # of an encoder


@dataclass(frozen=True)
class WarmStart:
    where: str  # the source of the weights, for messages
    fill: Callable[[nn.Module], object]  # puts them into an encoder, strictly. Raises UserError
    own: dict[str, Tensor] | None = None  # the objective's own parts, by its parameters' names; None: they start fresh

    def begin(self, encoder: nn.Module) -> dict[str, Tensor]:
        """Fills the encoder, and returns a copy of what it now holds."""
        self.fill(encoder)
        keep(encoder)
        return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}

    @torch.no_grad()
    def finish(self, objective: nn.Module, filled: dict[str, Tensor], name: str) -> None:
        """Puts the own parts in, and makes sure that encoder and teacher still are what they were filled with.

        Raises UserError where the objective has changed them, and for parts that do not fit.
        """
        exported = objective.exported_encoder()
        for part in {id(module): module for module in (objective.encoder, exported)}.values():
            found = part.state_dict()
            changed = [key for key in filled if key not in found or not torch.equal(found[key], filled[key])]
            if changed:
                raise UserError(
                    f"objective.name={name} gives new values to {changed[0]} ({len(changed)} of {len(filled)} tensors) "
                    f"of an encoder that starts from {self.where}; let it ask prelude.pretrain.warm_start.is_warm "
                    "first."
                )
        if self.own is not None:
            _put(objective, self.own, name, self.where)


def keep(encoder: nn.Module) -> None:
    """This encoder's weights are not to be drawn: they come from a source, or from the user's own function."""
    setattr(encoder, _MARK, True)


def is_warm(encoder: nn.Module) -> bool:
    """Whether this encoder's weights come from somewhere, and are not to be drawn."""
    return getattr(encoder, _MARK, False)


def drawn_parts(objective: nn.Module, *parts: nn.Module) -> list[nn.Module]:
    """Those of `parts` whose weights the objective is to draw: all, but for an encoder that comes with its own."""
    return [part for part in parts if not (part is objective.encoder and is_warm(part))]


def own_names(objective: nn.Module) -> list[str]:
    """The tensors of an objective that are no encoder's, student or teacher."""
    exported = objective.exported_encoder()
    encoders = {n for n, module in objective.named_modules() if module is objective.encoder or module is exported}
    return [name for name in objective.state_dict() if not any(name.startswith(f"{part}.") for part in encoders)]


def _put(objective: nn.Module, parts: dict[str, Tensor], name: str, where: str) -> None:
    state, wanted = objective.state_dict(), own_names(objective)
    mistakes = [f"{key} is missing" for key in wanted if key not in parts]
    mistakes += [f"{key} has no place" for key in parts if key not in wanted]
    mistakes += [
        f"{key} is {tuple(parts[key].shape)} instead of {tuple(state[key].shape)}"
        for key in wanted
        if key in parts and parts[key].shape != state[key].shape
    ]
    if mistakes:
        raise UserError(
            f"{where} does not hold the own parts of objective.name={name}: {shortened(mistakes)}; write the "
            "options that they were trained with, or encoder.own_parts=false."
        )
    for key in wanted:
        state[key].copy_(parts[key])
