"""The arm of lightly in the league: its losses, heads, transforms and schedule, in the plain loop of its examples.

- Setting `their`: Barlow Twins as in its CIFAR-10 benchmark; VICReg as in its Imagenette benchmark, whose pictures are
  small too; MAE as in its Imagenette benchmark and its timm example; LeJEPA as in its ImageNet benchmark, the only
  recipe that it has. As its CIFAR-10 benchmark says, no view is blurred.
- Setting `ours`: widths, weights, views, optimizer and batch of our recipe, in the same modules of lightly's.
- Kinder than its scripts: workers stay from epoch to epoch, rates follow the step and not the epoch, and nothing is
  probed while it trains.
"""

from collections.abc import Callable, Iterable

import torch
from league_peer import Clock, batch_of, encoder_of, finish, told
from lightly.data import LightlyDataset
from lightly.loss import BarlowTwinsLoss, LeJEPALoss, VICRegLoss
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM, heads
from lightly.transforms import DINOTransform, MAETransform, SimCLRTransform, VICRegTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn
from torch.optim import SGD, AdamW


class TwoViews(nn.Module):
    def __init__(self, encoder: nn.Module, head: nn.Module, criterion: nn.Module):
        super().__init__()
        self.backbone, self.projection_head, self.criterion = encoder, head, criterion

    def forward(self, views: list[Tensor]) -> Tensor:
        first, second = (self.projection_head(self.backbone(view).flatten(start_dim=1)) for view in views)
        return self.criterion(first, second)


class LeJEPA(TwoViews):
    def forward(self, views: list[Tensor]) -> Tensor:
        of_globals, of_locals = (self._projected(part) for part in (views[:2], views[2:]))
        return self.criterion(local_proj=of_locals, global_proj=of_globals)

    def _projected(self, views: list[Tensor]) -> Tensor:
        found = self.projection_head(self.backbone(torch.cat(views)).flatten(start_dim=1))
        return torch.stack(found.chunk(len(views)))


class MAE(nn.Module):
    def __init__(self, encoder: nn.Module, *, width: int, depth: int, num_heads: int, normalised: bool):
        super().__init__()
        self.patch, self.normalised = encoder.patch_embed.patch_size[0], normalised
        self.masked = MaskedVisionTransformerTIMM(vit=encoder)
        self.backbone = encoder
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(encoder.patch_embed.num_patches, width, depth, num_heads)
        self.head = nn.Linear(width, 3 * self.patch**2)

    def forward(self, views: list[Tensor]) -> Tensor:
        (images,) = views
        keep, masked = utils.random_token_mask(
            size=(len(images), self.masked.sequence_length), mask_ratio=0.75, device=images.device
        )
        seen = self.embed(self.masked.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), self.masked.sequence_length))
        tokens = utils.set_at_index(tokens.to(seen.dtype), keep, seen)
        predicted = self.head(utils.get_at_index(self.decoder(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)  # without the class token
        if self.normalised:
            target = utils.normalize_mean_var(target)
        return nn.functional.mse_loss(predicted.float(), target)


def barlow_twins(spec, encoder):
    width, size = encoder.num_features, spec.image_size
    if spec.setting == "ours":
        model = TwoViews(encoder, head_of(width, spec), BarlowTwinsLoss(spec.ours.objective["off_diagonal_weight"]))
        return model, our_views(spec), our_optimizer(spec, model), 128
    # two layers, as its CIFAR-10 benchmark has them
    layers = [(width, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True)), (2048, 2048, None, None)]
    model = TwoViews(encoder, heads.ProjectionHead(layers), BarlowTwinsLoss())
    optimizer = SGD(model.parameters(), lr=6e-2, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.steps)
    return model, SimCLRTransform(input_size=size, gaussian_blur=0.0), (optimizer, schedule), 128


def vicreg(spec, encoder):
    width, size = encoder.num_features, spec.image_size
    if spec.setting == "ours":
        weights = [spec.ours.objective[f"{name}_weight"] for name in ("invariance", "variance", "covariance")]
        model = TwoViews(encoder, head_of(width, spec), VICRegLoss(*weights))
        return model, our_views(spec), our_optimizer(spec, model), 256
    model = TwoViews(encoder, heads.BarlowTwinsProjectionHead(width, 2048, 2048), VICRegLoss())
    optimizer = LARS(model.parameters(), lr=0.3, weight_decay=1e-4, momentum=0.9)
    transform = VICRegTransform(input_size=size, gaussian_blur=0.0)
    return model, transform, (optimizer, cosine(optimizer, spec, share=0.1)), 256


def lejepa(spec, encoder):
    of, width = spec.ours.objective, encoder.num_features
    sizes = {"global_crop_size": spec.image_size, "local_crop_size": of["local_size"]}
    sharp = {"gaussian_blur": (0.0, 0.0, 0.0)}
    if spec.setting == "ours":
        head = head_of(width, spec)
        criterion = LeJEPALoss(of["sigreg_weight"], sigreg_num_vectors=of["num_directions"])
        scales = {"global_crop_scale": tuple(of["global_scale"]), "local_crop_scale": tuple(of["local_scale"])}
        transform = DINOTransform(**sizes, **scales, **sharp, n_local_views=of["num_local"], solarization_prob=0.0)
        model = LeJEPA(encoder, head, criterion)
        return model, transform, our_optimizer(spec, model), 64
    model = LeJEPA(encoder, heads.LeJEPAProjectionHead(width), LeJEPALoss())
    scales = {"global_crop_scale": (0.3, 1.0), "local_crop_scale": (0.05, 0.3)}
    optimizer = AdamW(model.parameters(), lr=5e-4, weight_decay=5e-2)
    transform = DINOTransform(**sizes, **scales, **sharp, n_local_views=6)
    return model, transform, (optimizer, cosine(optimizer, spec, share=0.01)), 64


def mae(spec, encoder):
    of, size = spec.ours.objective, spec.image_size
    if spec.setting == "ours":
        shape = {"width": of["decoder_dim"], "depth": of["decoder_depth"], "num_heads": of["decoder_num_heads"]}
        model = MAE(encoder, **shape, normalised=of["norm_pix_loss"])
        transform = MAETransform(input_size=size, min_scale=of["crop_scale"][0])
        return model, transform, our_optimizer(spec, model), 256
    model = MAE(encoder, width=512, depth=1, num_heads=16, normalised=False)
    optimizer = AdamW(model.parameters(), lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95))
    return model, MAETransform(input_size=size), (optimizer, cosine(optimizer, spec, share=0.1)), 256


METHODS: dict[str, Callable] = {"barlow_twins": barlow_twins, "vicreg": vicreg, "lejepa": lejepa, "mae": mae}


def head_of(width: int, spec) -> nn.Module:
    *hidden, last = spec.ours.objective["projector"]
    layers = []
    for size in hidden:
        layers.append((width, size, nn.BatchNorm1d(size), nn.ReLU(inplace=True)))
        width = size
    return heads.ProjectionHead([*layers, (width, last, None, None)])


def our_views(spec) -> SimCLRTransform:
    """Both views of our recipes for small pictures are alike: no blur, no solarisation."""
    colours = {"cj_bright": 0.4, "cj_contrast": 0.4, "cj_sat": 0.2, "cj_hue": 0.1, "gaussian_blur": 0.0}
    return SimCLRTransform(input_size=spec.image_size, min_scale=spec.ours.objective["crop_scale"][0], **colours)


def our_optimizer(spec, model: nn.Module):
    decayed, spared = utils.get_weight_decay_parameters([model])
    wanted = [[each for each in part if each.requires_grad] for part in (decayed, spared)]
    groups = [{"params": wanted[0]}, {"params": wanted[1], "weight_decay": 0.0}]
    ours = spec.ours
    optimizer = AdamW(groups, lr=ours.lr, betas=tuple(ours.betas), weight_decay=ours.weight_decay)
    return optimizer, cosine(optimizer, spec, share=ours.warmup, end=ours.min_lr / ours.lr)


def cosine(optimizer, spec, share: float, end: float = 0.001) -> CosineWarmupScheduler:
    """share: of the run, in which the rate rises."""
    return CosineWarmupScheduler(optimizer, max(round(share * spec.steps), 1), spec.steps, end_value=end)


def endless(loader: Iterable) -> Iterable:
    while True:
        yield from loader


def main() -> None:
    spec = told()
    model, transform, (optimizer, schedule), their_batch = METHODS[spec.method](spec, encoder_of(spec))
    batch = batch_of(spec, their_batch)
    loader = torch.utils.data.DataLoader(
        LightlyDataset(spec.pictures, transform=transform),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=spec.workers,
        persistent_workers=spec.workers > 0,
    )
    clock = Clock(spec.steps)
    clock.start()
    for views, _, _ in endless(loader):
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            loss = model(views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if clock.step(loss):
            break
    finish(spec, clock, model.backbone, batch=batch, statistics=IMAGENET_NORMALIZE, package="lightly")


if __name__ == "__main__":
    main()
