"""Images as rows of patches, or of cells, and the pixels of hidden ones as a target.

A patch's values are in the order of its rows, columns and channels, the channel fastest. As a target they have mean 0
and variance 1 within the patch (arXiv 2111.06377, section 3), or are plain pixels.
"""

import torch
from einops import rearrange
from torch import Tensor

from prelude.data.errors import UserError
from prelude.pretrain.feature_health import TRIVIAL_LOSS
from prelude.pretrain.kept_patches import gather_patches
from prelude.pretrain.objective import Loss

_EPSILON = 1e-6  # added to a patch's variance, so that a flat patch has target 0


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) to (B, L, p_h * p_w * C), patches in raster order."""
    height, width = patch_size
    return rearrange(images, "b c (r h) (k w) -> b (r k) (h w c)", h=height, w=width)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`; grid is (rows, columns)."""
    (height, width), (rows, columns) = patch_size, grid
    return rearrange(patches, "b (r k) (h w c) -> b c (r h) (k w)", r=rows, k=columns, h=height, w=width)


def patch_values(images: Tensor, patch_size: tuple[int, int], ids: Tensor) -> Tensor:
    """(B, R, p_h * p_w * C) of patches ids (B, R)."""
    return rearrange(gather_patches(images, patch_size, ids), "b r c h w -> b r (h w c)")


def target_statistics(pixels: Tensor, standardised: bool) -> tuple[Tensor, Tensor]:
    """(mean, scale) of each patch, so that target = (pixels - mean) / scale.

    pixels: (B, R, P), the P values of a patch. Returns (B, R, 1) each; 0 and 1 where the target is plain pixels.
    """
    if not standardised:
        return torch.zeros_like(pixels[..., :1]), torch.ones_like(pixels[..., :1])
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True, correction=1)  # unbiased, as in the official code
    return mean, (variance + _EPSILON).sqrt()


def refuse_single_values(num_values: int, standardised: bool, patches: str) -> None:
    """Raises UserError for targets of one value, which have no variance to be standardised by."""
    if standardised and num_values == 1:
        raise UserError(
            f"objective.norm_pix_loss=true standardises each of the {patches}, which has a single value and so no "
            "variance; write objective.norm_pix_loss=false."
        )


def blind_error(target: Tensor, standardised: bool) -> Tensor:
    """Mean squared error, of a target (B, R, P), of the best prediction that is the same for every patch of every
    image: 0 where patches are standardised, else their mean. What lies between images is estimated as over all of
    them, for the mean of few images is nearer to these; of one image nothing is known but its distance from 0."""
    if standardised or len(target) == 1:
        return target.square().mean()
    mean = target.mean((0, 1))
    between = (target.mean(1) - mean).square().mean() / (len(target) - 1)
    return (target - mean).square().mean() + between


def pixel_loss(predicted: Tensor, pixels: Tensor, standardised: bool) -> Loss:
    """Mean squared error of what is predicted of patches (B, R, P), whose pixels are these.

    `pixel_mse` in the parts is the error in normalised pixels whatever the target, so that runs with and without
    standardised ones compare. `trivial_loss` is `blind_error`: of standardised targets (P - 1) / P, and less where
    patches are flat.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        mean, scale = target_statistics(pixels, standardised)
        target = (pixels - mean) / scale
        residual = predicted.to(target.dtype) - target  # (B, R, P)
        error = residual.square().mean(dim=-1, keepdim=True)  # (B, R, 1)
        parts = {
            "pixel_mse": (error.detach() * scale.square()).mean(),
            TRIVIAL_LOSS: blind_error(target.detach(), standardised),
        }
        return Loss(error.mean(), parts)


def as_pixels(predicted: Tensor, pixels: Tensor, standardised: bool) -> Tensor:
    """(B, R, P) predictions as normalised pixels, with the true mean and deviation of each patch where the model was
    not taught them."""
    mean, scale = target_statistics(pixels, standardised)
    return predicted.to(scale.dtype) * scale + mean


def panels(images: Tensor, values: Tensor, patch_size: tuple[int, int], ids: Tensor) -> list[Tensor]:
    """Images (B, C, H, W) without patches ids (B, R), with values (B, R, P) in their place, and as they are."""
    original = patchify(images, patch_size)  # (B, L, P)
    where = ids[..., None].expand_as(values)
    grid = images.shape[2] // patch_size[0], images.shape[3] // patch_size[1]
    drawn = [original.scatter(1, where, 0.0), original.scatter(1, where, values), original]
    return [unpatchify(panel, patch_size, grid) for panel in drawn]
