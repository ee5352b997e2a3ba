"""An encoder's weights under timm's names, and what has to be known of them beside their values."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prelude.checkpoints.convert.layers import Layer
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.position import sincos_table

# A published table is a formula's values, rounded once or twice to float32.
_SINCOS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Weights:
    """What a source holds of an encoder."""

    where: str  # the source, as a message names it
    format: str  # for a person: "MAE", "I-JEPA (target_encoder)"
    tensors: dict[str, Tensor]  # under timm's names; float32 where they are no counters
    resampling: str = "timm"  # the rule for another grid, see `resample.RULES`
    grid: tuple[int, int] | None = None  # (rows, columns) of `pos_embed`; None: it has none, or nobody knows
    prefix_rows: int = 0  # rows of `pos_embed` before those of patches
    num_heads: int | None = None  # None: the file does not tell, and no table does
    norm_eps: float | None = None  # of LayerNorms; None: not known, or there are none
    layers: dict[str, Layer] = field(default_factory=dict)  # of the encoder that they were in; none: not known
    config: EncoderConfig | None = None  # that encoder's; None: not known
    # Mean and standard deviation that pixels in [0, 1] were normalised by, of each channel; None: not known.
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    may_lack: tuple[str, ...] = ()  # a norm of timm's that the method does not have
    moved_norm: bool = False  # `fc_norm` was pretrained as the norm of every token, and timm moved it behind the mean
    left_out: dict[str, int] = field(default_factory=dict)  # what has no place in an encoder -> number of tensors
    notes: tuple[str, ...] = ()  # what was done to the values on the way
    untold: str = ""  # what of the architecture no tensor tells, so that a configuration has to name it
    # An objective's own parts, by that objective's name and under its parameters' names.
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.tensors)

    @property
    def before_word(self) -> str:
        """The source, up to where another word about it is written: `FILE#` or `FILE#WORD,`."""
        return f"{self.where}{',' if '#' in self.where else '#'}"

    @property
    def has_sincos_table(self) -> bool:
        """Whether positions are the fixed sine and cosine table, rows of prefix tokens being zero."""
        table = self.tensors.get("pos_embed")
        if table is None or self.grid is None or table.ndim != 3 or table.shape[2] % 4:
            return False
        formula = sincos_table(table.shape[2], self.grid)
        rows = table[0, self.prefix_rows :]
        if rows.shape != formula.shape or table[0, : self.prefix_rows].any():
            return False
        return bool((rows - formula).abs().max() <= _SINCOS_TOLERANCE + _rounding(rows))


def _rounding(values: Tensor) -> float:
    """How far values up to 1 may be off that were kept in half precision, whatever they have now."""
    for dtype in (torch.bfloat16, torch.float16):  # what the first can hold, the second almost always can
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return torch.finfo(dtype).eps / 2
    return 0.0


def prefix_tokens(tensors: dict[str, Tensor]) -> int:
    """Tokens before those of patches: the class token and registers."""
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    return int("cls_token" in tensors) + registers


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A hash of names, shapes and bytes: the same for the same weights, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
