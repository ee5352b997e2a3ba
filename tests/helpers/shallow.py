"""Recipes of deep convnets, made quick to look at."""

from prelude.pretrain.config import EncoderConfig

_BLOCKS = {"resnet": "layers", "convnext": "depths"}


def one_block_a_stage(encoder: EncoderConfig) -> list[str]:
    """Overrides for a convnet whose recipe does not count blocks; none for another. Strides, widths and kinds of layers
    stay, and no setting of an objective depends on the rest."""
    keys = [key for family, key in _BLOCKS.items() if encoder.name.startswith(family) and key not in encoder.kwargs]
    return [f"encoder.kwargs.{key}=[1, 1, 1, 1]" for key in keys]
