"""Rotation prediction (Gidaris, Singh and Komodakis, "Unsupervised Representation Learning by Predicting Image
Rotations", arXiv 1803.07728).

Every image is shown in its four right-angle rotations, and a linear classifier on the encoder's pooled features says
which is which:

    loss = mean over images and rotations k of cross_entropy(head(encoder(rotated(image, k))), k)

- Rotations are exact, by transposition and flips on the device: no pixel is interpolated.
- All rotations of an image are in one batch, so that batch norm sees every orientation equally; the real batch is
  four times the number of images. Batch norm is taken over all ranks.
- Images are square, and nothing that depends on the orientation comes after the rotation.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, View, ViewPlan
from prelude.data.errors import UserError
from prelude.objectives.options import RotationOptions
from prelude.objectives.pictures import evaluating, sheet
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import check_encoder, pooled_width
from prelude.pretrain.feature_health import TRIVIAL_LOSS, feature_health
from prelude.pretrain.images import as_device_likes, denormalise
from prelude.pretrain.images import images as device_images
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.schedules import Progress

_NUM_PICTURES = 8
_FRAME = 2  # pixels
_GREEN, _RED = (0, 160, 60), (220, 30, 30)


class Rotation(Objective):
    Options = RotationOptions
    remedies = {
        "trivial_loss": "look whether the images have an upright, raise objective.crop_scale, or lower optimizer.lr"
    }

    def __init__(self, encoder: nn.Module, options: RotationOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        crop = {"crop": "random_resized", "scale": options.crop_scale} if options.crop_scale else {"crop": "center"}
        view = View(size=image_size, interpolation="bilinear", flip=options.flip, shift=options.shift, **crop)
        self.views = ViewPlan(views=(view,), mean=mean, std=std)
        self.quarter_turns = [degrees // 90 for degrees in options.rotations]
        self.head = nn.Linear(pooled_width(encoder), len(self.quarter_turns))
        synchronise(self)

    @classmethod
    def check(cls, options: RotationOptions, encoder: EncoderConfig) -> None:
        height, width = encoder.size
        if height != width:
            raise UserError(
                f"encoder.image_size={height}x{width} is not square, and a quarter turn would not fit; write "
                f"encoder.image_size={min(height, width)}."
            )
        check_encoder(encoder, tokens=False)

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        (images,) = device_images(batch, self.views)  # (B, C, S, S)
        features = self.encoder(rotated(images, self.quarter_turns))  # (B * K, D)
        loss = self.loss(self.head(features))
        return Loss(loss.total, loss.parts | feature_health(features.detach()))

    def loss(self, logits: Tensor) -> Loss:
        """logits: (B * K, K), as `rotated` orders its samples. `accuracy_90` is that on images turned by 90 degrees.

        An accuracy that stays at chance for one rotation says that the data has no upright, or shows it by a
        watermark.
        """
        num_classes = logits.shape[1]
        labels = torch.arange(num_classes, device=logits.device).repeat(len(logits) // num_classes)
        right = (logits.detach().argmax(1) == labels).float().view(-1, num_classes).mean(0)  # (K,)
        parts = {f"accuracy_{degrees}": share for degrees, share in zip(self.options.rotations, right, strict=True)}
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            trivial = logits.new_full((), num_classes).log()  # every rotation equally likely
            return Loss(F.cross_entropy(logits, labels), {"accuracy": right.mean(), **parts, TRIVIAL_LOSS: trivial})

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """One row an image: its rotations, framed in green where they are recognised and in red where not."""
        (images,) = device_images(batch, self.views)
        samples = rotated(images[:_NUM_PICTURES], self.quarter_turns)  # (B * K, C, S, S)
        with evaluating(self):
            guesses = self.head(self.encoder(samples)).argmax(1)
        num_classes = len(self.quarter_turns)
        right = guesses.view(-1, num_classes) == torch.arange(num_classes, device=guesses.device)  # (B, K)
        drawn = denormalise(samples, self.views).unflatten(0, (-1, num_classes))  # (B, K, 3, S, S)
        return {"rotations": sheet(_framed(drawn, right))}


def rotated(images: Tensor, quarter_turns: list[int]) -> Tensor:
    """(B, C, S, S) to (B * K, C, S, S): sample i * K + k is image i turned counter-clockwise by quarter_turns[k]."""
    turned = torch.stack([torch.rot90(images, k, dims=(-2, -1)) for k in quarter_turns], dim=1)
    return as_device_likes(turned.flatten(0, 1))


def _framed(images: Tensor, right: Tensor) -> Tensor:
    """images: (B, K, 3, S, S) uint8; right: (B, K) bool."""
    green, red = (torch.tensor(colour, dtype=torch.uint8, device=images.device) for colour in (_GREEN, _RED))
    colour = torch.where(right[..., None], green, red)[..., None, None]  # (B, K, 3, 1, 1)
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
    inside[_FRAME:-_FRAME, _FRAME:-_FRAME] = True
    return torch.where(inside, images, colour)
