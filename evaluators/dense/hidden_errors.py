"""How well a masked autoencoder fills in each patch of an image, over many masks.

A patch is hidden in as many of an image's masks as any other, up to one: an order of the patches is drawn once, and the
mask moves along it. So the mean over masks is over as many guesses everywhere, and few masks are enough.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prelude.pretrain.draws import random_bits

MASKS_STREAM = 163  # of pretrain.draws

# (images (B, C, H, W) normalised, noise (B, L)) to (hidden patches (B, R), squared errors (B, R)); the patches with the
# largest noise are hidden
Fill = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def errors_by_patch(fill: Fill, images: Tensor, seeds: Tensor, num_patches: int, num_masks: int) -> Tensor:
    """(B, L) float32: the mean squared error of each patch over the masks that hide it; 0 for one that none hides.

    images: (B, C, H, W), normalised. seeds: (B,), of the order of an image's patches.
    """
    places = random_bits(seeds, num_patches, MASKS_STREAM).argsort(1).argsort(1)  # (B, L)
    total, count = torch.zeros(2, *places.shape, device=images.device)
    for mask in range(num_masks):
        noise = (places + mask * num_patches // num_masks) % num_patches
        hidden, errors = fill(images, noise)
        total.scatter_add_(1, hidden, errors.float())
        count.scatter_add_(1, hidden, torch.ones_like(errors, dtype=torch.float32))
    return total / count.clamp(min=1)
