"""What our own export to transformers had to say otherwise, said as the encoder had it. Features stay the same.

- Dinov2Model has layer scales, which were written as ones where the encoder has none.
- It has one row of positions, the class token's. Where the encoder has a row for each prefix token, those of registers
  were added to the registers; where it has none for any, a row of zeros was written.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from prelude.checkpoints.convert.weights import Weights

_SCALES = (".ls1.gamma", ".ls2.gamma")


def as_it_was(weights: Weights, wanted: Mapping[str, Tensor], prefix_rows: int) -> dict[str, Tensor]:
    """Tensors for the encoder that has those of `wanted`, and `prefix_rows` rows of prefix tokens in its table."""
    tensors = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if name in wanted or not (name.endswith(_SCALES) and (tensor == 1).all())
    }
    table, missing = tensors.get("pos_embed"), prefix_rows - weights.prefix_rows
    if table is None or table.ndim != 3:
        return tensors
    if missing > 0:
        before, after = table[:, : weights.prefix_rows], table[:, weights.prefix_rows :]
        tensors["pos_embed"] = torch.cat([before, table.new_zeros(1, missing, table.shape[2]), after], dim=1)
    elif missing == -1 and not table[:, 0].any():
        tensors["pos_embed"] = table[:, 1:]
    return tensors
