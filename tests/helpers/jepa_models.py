"""Small I-JEPA and DSeq-JEPA models and the batches that they are tested on."""

import torch
from torch.nn import functional as F

from prelude.data.batch import Batch
from prelude.objectives.blocks import BlockMasks
from prelude.objectives.dseqjepa import DSeqJEPA
from prelude.objectives.ijepa import IJEPA
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, seeded
from prelude.pretrain.schedules import Progress

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
START = Progress(0, 100, 10.0)
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def encoder_config(size=32, patch=4, class_token=False, **kwargs) -> EncoderConfig:
    shape = {"embed_dim": 32, "depth": 3, "num_heads": 4} | ({} if class_token else NO_CLASS_TOKEN) | kwargs
    return EncoderConfig(name="vit_base_patch16_224", image_size=size, patch_size=patch, kwargs=shape)


def tiny(cls=IJEPA, size=32, patch=4, **options):
    config = encoder_config(size, patch, class_token=cls is DSeqJEPA)
    options = cls.Options(**{"predictor_dim": 16, "predictor_depth": 2, "predictor_num_heads": 2, **options})
    cls.check(options, config)
    with seeded(1):
        return cls(build_encoder(config, seed=0), options, image_size=config.size, mean=MEAN, std=STD)


def a_batch(count=4, size=(32, 32), first=0) -> Batch:
    """Samples first .. first + count - 1 of an endless made-up data set of bright shapes on a dark ground."""
    ids = torch.arange(first, first + count)
    pixels = torch.stack([blobs(size, seed=int(i)) for i in ids])
    boxes = torch.tensor([0, 0, *size], dtype=torch.int32).expand(count, 1, 4)
    return Batch((pixels,), boxes, (ids[:, None] % 2).bool(), ids * 1000, ids, ids)


def blobs(size, seed) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 3, max(size[0] // 8, 2), max(size[1] // 8, 2), generator=generator)
    smooth = F.interpolate(noise, size=size, mode="bicubic")[0].clamp(0, 1)
    return (255 * smooth).to(torch.uint8)


def some_images(count=2, size=(32, 32), seed=0) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels_of(chosen: torch.Tensor, grid, patch=4) -> torch.Tensor:
    """(B, N) bool over patches to (B, 1, H, W) bool over pixels."""
    return F.interpolate(chosen.view(len(chosen), 1, *grid).double(), scale_factor=patch) > 0.5


def mark(ids: torch.Tensor, num_patches: int) -> torch.Tensor:
    """(B, K) indices to (B, N) bool."""
    return torch.zeros(len(ids), num_patches, dtype=torch.bool).scatter_(1, ids.flatten(1), True)


def predictions_of(model: IJEPA, images: torch.Tensor, masks: BlockMasks) -> torch.Tensor:
    """(B, M, T, D): what the predictor says of every target patch."""
    return model.predict_targets(model.encode_context(images, masks), masks)


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
