"""The arm of stable-pretraining in the league: its module, forwards, losses, transforms and schedules, run by
Lightning's trainer, as its scripts do.

- Setting `their`: Barlow Twins and VICReg as in its CIFAR-10 scripts; MAE, I-JEPA and LeJEPA as in its pipelines for
  Imagenette with a tiny ViT, the smallest that it has.
- Setting `ours`: widths, weights, views, optimizer and batch of our recipe, in the same modules of its own.
- Kinder than its scripts: a picture is not twice in a batch, workers stay from epoch to epoch, rates follow the step
  and not the epoch, and no probe trains or looks beside it.
"""

import types
from collections.abc import Callable

import lightning as pl
import stable_pretraining as spt
import torch
from league_peer import Clock, batch_of, encoder_of, finish, told
from stable_pretraining import forward
from stable_pretraining.backbone import MLP
from stable_pretraining.data import transforms
from stable_pretraining.methods.ijepa import IJEPA
from stable_pretraining.methods.lejepa import LeJEPA, SlicedEppsPulley
from stable_pretraining.methods.mae import MAE
from torch import nn
from torchvision.datasets import ImageFolder

STATISTICS = spt.data.static.CIFAR10


def view(size: int, scale, *, flip: bool = True, colours: bool = False) -> transforms.Compose:
    parts = [transforms.RGB(), transforms.RandomResizedCrop((size, size), scale=tuple(scale))]
    parts += [transforms.RandomHorizontalFlip(p=0.5)] if flip else []
    if colours:
        parts.append(transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8))
        parts.append(transforms.RandomGrayscale(p=0.2))
    return transforms.Compose(*parts, transforms.ToImage(**STATISTICS))


def barlow_twins(spec, encoder):
    weight = spec.ours.objective.get("off_diagonal_weight") if spec.setting == "ours" else 0.1
    loss = {"forward": forward.barlow_twins, "barlow_loss": spt.losses.BarlowTwinsLoss(lambd=weight)}
    return two_views(spec, encoder, loss, scales=((0.2, 1.0), (0.08, 1.0)))


def vicreg(spec, encoder):
    of = spec.ours.objective if spec.setting == "ours" else {}
    names = {"sim_coeff": "invariance", "std_coeff": "variance", "cov_coeff": "covariance"}
    weights = {name: of[f"{ours}_weight"] for name, ours in names.items() if of}
    loss = {"forward": forward.vicreg, "vicreg_loss": spt.losses.VICRegLoss(**weights)}
    return two_views(spec, encoder, loss, scales=((0.08, 1.0), (0.08, 1.0)))


def two_views(spec, encoder, loss, scales):
    """scales: of the crops of both views, at the setting `their`."""
    ours = spec.setting == "ours"
    scales = [spec.ours.objective["crop_scale"]] * 2 if ours else scales
    views = transforms.MultiViewTransform([view(spec.image_size, scale, colours=True) for scale in scales])
    optim = our_optimizer(spec) if ours else {"type": "LARS", "lr": 5, "weight_decay": 1e-6}
    projector = projector_of(encoder.num_features, spec.ours.objective["projector"] if ours else [2048, 2048, 2048])
    module = spt.Module(backbone=encoder, projector=projector, optim=scheduled(spec, optim), **loss)
    return module, encoder, views, 256


def lejepa(spec, encoder):
    """Its class builds vision transformers alone; its loss and its test of normality take any encoder."""
    ours, of = spec.setting == "ours", spec.ours.objective
    num_local = of["num_local"] if ours else 2
    scales = (of["global_scale"], of["local_scale"]) if ours else ((0.3, 1.0), (0.05, 0.3))
    both = zip((spec.image_size, of["local_size"]), scales, strict=True)
    whole, part = (view(size, scale, flip=ours, colours=ours) for size, scale in both)
    views = {"global_0": whole, "global_1": whole} | {f"local_{i}": part for i in range(num_local)}
    width = encoder.num_features
    if ours:
        projector = projector_of(width, of["projector"])
    else:
        hidden = {"in_channels": 512, "hidden_channels": [2048, 2048, 512], "norm_layer": "batch_norm", "inplace": True}
        projector = nn.Sequential(nn.Linear(width, 512), MLP(**hidden))
    optim = our_optimizer(spec) if ours else adamw(5e-4, (0.9, 0.999))
    weight = of["sigreg_weight"] if ours else 0.02
    scale = 1 - weight if ours else 1.0  # ours is a convex combination of both terms
    module = spt.Module(
        backbone=encoder,
        projector=projector,
        sigreg=SlicedEppsPulley(num_slices=of["num_directions"] if ours else 1024),
        forward=lejepa_forward,
        weight=weight / scale,
        scale=scale,
        optim=scheduled(spec, optim),
    )
    return module, encoder, transforms.MultiViewTransform(views), 128


def lejepa_forward(self, batch, stage):
    names = sorted(name for name in batch if name.startswith(("global", "local")))
    groups = [[batch[name]["image"] for name in names if name.startswith(kind)] for kind in ("global", "local")]
    features = torch.cat([self.backbone(torch.cat(views)) for views in groups])
    projected = self.projector(features).view(len(names), len(groups[0][0]), -1)
    loss, *_ = LeJEPA._compute_loss(projected, len(groups[0]), self.sigreg, self.weight)
    return {"loss": self.scale * loss}


def mae(spec, encoder):
    ours, of = spec.setting == "ours", spec.ours.objective
    shape = (of["decoder_dim"], of["decoder_depth"], of["decoder_num_heads"]) if ours else (192, 4, 3)
    names = dict(zip(("decoder_embed_dim", "decoder_depth", "decoder_num_heads"), shape, strict=True))
    module = MAE(encoder, **names, norm_pix_loss=of["norm_pix_loss"] if ours else True)
    module.forward = types.MethodType(
        lambda self, batch, stage: {"loss": MAE.forward(self, batch["image"]).loss}, module
    )
    module.optim = scheduled(spec, our_optimizer(spec) if ours else adamw(5e-4, (0.9, 0.95)))
    return module, encoder, view(spec.image_size, of["crop_scale"] if ours else (0.2, 1.0)), 256


def ijepa(spec, encoder):
    """The evaluated network is the teacher as in the paper at the setting `ours`, the student as in its scripts at
    `their`."""
    ours, of = spec.setting == "ours", spec.ours.objective
    shape = {"predictor_embed_dim": 192, "predictor_depth": 6}
    if ours:
        shape = {"predictor_embed_dim": of["predictor_dim"], "predictor_depth": of["predictor_depth"]}
        shape |= {"target_scale": tuple(of["target_scale"]), "ema_decay_start": of["momentum"]}
    module = IJEPA(encoder, **shape)
    module.forward = types.MethodType(
        lambda self, batch, stage: {"loss": IJEPA.forward(self, batch["image"]).loss}, module
    )
    module.optim = scheduled(spec, our_optimizer(spec) if ours else adamw(6e-4, (0.9, 0.95)))
    network = module.encoder.teacher if ours else module.encoder.student
    scale, flip = (of["crop_scale"], bool(of["flip"])) if ours else ((0.3, 1.0), False)
    return module, network.vit, view(spec.image_size, scale, flip=flip), 64


METHODS: dict[str, Callable] = {
    "barlow_twins": barlow_twins,
    "vicreg": vicreg,
    "lejepa": lejepa,
    "mae": mae,
    "ijepa": ijepa,
}


def projector_of(width: int, widths: list[int]) -> nn.Sequential:
    *hidden, last = widths
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.BatchNorm1d(size), nn.ReLU(inplace=True)]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, last))


def adamw(lr: float, betas: tuple[float, float]) -> dict:
    return {"type": "AdamW", "lr": lr, "weight_decay": 0.05, "betas": betas}


def our_optimizer(spec) -> dict:
    ours = spec.ours
    decay = {"weight_decay": ours.weight_decay, "exclude_bias_norm": True}
    return {"type": "AdamW", "lr": ours.lr, "betas": tuple(ours.betas), **decay}


def scheduled(spec, optimizer: dict) -> dict:
    """Its linear warm-up and cosine, by step; over a hundredth of the run at the setting `their`, as by default."""
    share, end = (spec.ours.warmup, spec.ours.min_lr) if spec.setting == "ours" else (0.01, 0.0)
    cosine = {"total_steps": spec.steps, "peak_step": max(round(share * spec.steps), 1), "end_lr": end}
    schedule = {"type": "LinearWarmupCosineAnnealing", "start_factor": 0.01, **cosine}
    return {"optimizer": optimizer, "scheduler": schedule, "interval": "step"}


class Timed(pl.Callback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_start(self, trainer, module) -> None:
        self.clock.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = self.clock.step(outputs["loss"])


def main() -> None:
    spec = told()
    module, encoder, transform, their_batch = METHODS[spec.method](spec, encoder_of(spec))
    batch, clock = batch_of(spec, their_batch), Clock(spec.steps)
    loader = torch.utils.data.DataLoader(
        spt.data.FromTorchDataset(ImageFolder(spec.pictures), names=["image", "label"], transform=transform),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=spec.workers,
        persistent_workers=spec.workers > 0,
    )
    teachers = [spt.callbacks.TeacherStudentCallback(update_frequency=1, update_after_backward=True)]
    trainer = pl.Trainer(
        max_steps=spec.steps,
        max_epochs=-(-spec.steps // len(loader)),  # by which the teacher's momentum rises: without it, -1
        precision="bf16-mixed" if spec.precision == "bf16" else 32,
        callbacks=[*(teachers if spec.method == "ijepa" else []), Timed(clock)],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(spec.folder),
    )
    trainer.fit(module, train_dataloaders=loader)
    finish(spec, clock, encoder, batch=batch, statistics=STATISTICS, package="stable-pretraining")


if __name__ == "__main__":
    main()
