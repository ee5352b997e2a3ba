"""Raw pixels as an encoder of their own: the floor that anything learned has to clear."""

from torch import Tensor, nn

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.batch import IMAGENET_MEAN, IMAGENET_STD
from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig

LARGEST = 32  # pixels a side of plain `pixels`: "tiny images", as in Torralba et al., 2008


class Pixels(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C * H * W) float32."""
        return pixels.flatten(1).float()


def is_pixels(source: str) -> bool:
    return source.partition(":")[0] == "pixels"


def open_pixels(source: str, beside: OpenedEncoder | None = None, largest: int = LARGEST) -> OpenedEncoder:
    """`pixels:32` sees images at 32 x 32; plain `pixels` as the encoder `beside` it does, if need be smaller, with
    `largest` pixels a side at most. Where that reads other channels than three, so does `pixels:32`.

    Raises UserError where there is no size to take.
    """
    text = source.partition(":")[2]
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"{source!r} is no source; write pixels:32, with the side of the view in pixels.")
        other = beside is not None and beside.config.in_chans != 3
        statistics = (beside.mean, beside.std) if other else (IMAGENET_MEAN, IMAGENET_STD)
        return _opened((int(text), int(text)), *statistics, beside.shown if beside else ())
    if beside is None:
        raise UserError("pixels alone has no image size; write pixels:32, or name an encoder beside it.")
    return _opened(pixel_size(beside.config.size, largest), beside.mean, beside.std, beside.shown)


def pixel_size(size: tuple[int, int], largest: int = LARGEST) -> tuple[int, int]:
    """(height, width) of plain `pixels` beside an encoder of images of this size."""
    shrink = min(1.0, largest / max(size))
    height, width = (max(round(side * shrink), 1) for side in size)
    return height, width


def _opened(size: tuple[int, int], mean, std, shown: tuple[int, ...] = ()) -> OpenedEncoder:
    config = EncoderConfig(name="pixels", image_size=size, in_chans=len(mean))
    return OpenedEncoder(Pixels(), config, mean, std, f"pixels {size[0]}x{size[1]}", "no weights", shown=shown)
