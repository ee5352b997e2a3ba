"""Every objective of ours with a small encoder, and the images that it is tried on."""

from jepa_models import a_batch

from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.pretrain.recipes import validate_config

IMAGES = a_batch(16)
VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8}
SHAPE = {"depth": 2, "embed_dim": 32, "num_heads": 2}
RESNET = {
    "name": "resnet10t",
    "image_size": 32,
    "kwargs": {"channels": [8, 12, 16, 24], "stem_width": 8, "layers": [1, 1, 1, 1]},
}
PREDICTOR = {"predictor_dim": 16, "predictor_depth": 1, "predictor_num_heads": 2, "momentum": 0.95}
SAME_COLOURS = {"jitter": 0.0, "blur": 0.0}
PEACEFUL = {"view_1": SAME_COLOURS, "view_2": SAME_COLOURS, "crop_scale": [0.6, 1.0]}
SMALL_MAE = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2, "mask_ratio": 0.5}
STILL = {"volume_flip": 0.0, "volume_noise": 0.0}
OBJECTIVES = {
    "mae": (SMALL_MAE, VIT | {"kwargs": SHAPE}),
    "ijepa": (PREDICTOR, VIT | {"patch_size": 4, "kwargs": SHAPE}),
    "dseqjepa": (PREDICTOR, VIT | {"patch_size": 4, "kwargs": SHAPE}),
    "barlow_twins": ({"projector": [64, 64], "off_diagonal_weight": 0.02} | PEACEFUL, RESNET),
    "fcmae": (
        {"decoder_dim": 32, "mask_ratio": 0.5},
        {"name": "convnextv2_atto", "image_size": 32, "patch_size": 1}
        | {"kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}},
    ),
    "simmim": ({"mask_patch": 8, "mask_ratio": 0.5}, VIT | {"kwargs": SHAPE}),
    "vicreg": ({"projector": [64, 64]} | PEACEFUL, RESNET),
    "lejepa": ({"projector": [64, 16], "num_directions": 64, "num_local": 0, "colours": SAME_COLOURS}, RESNET),
    "msbreg": ({"projector": [64, 32], "predictor": [64], "momentum": 0.95} | PEACEFUL, RESNET),
    "rotation": ({"crop_scale": None}, RESNET),
    "uni4eye": (SMALL_MAE | {"volume_size": [16, 16, 8], "volume_patch": 4} | STILL, VIT | {"kwargs": SHAPE}),
    "spark": ({"decoder_dim": 32, "mask_ratio": 0.5}, RESNET | {"kwargs": RESNET["kwargs"] | {"output_stride": 8}}),
}


def config_of(name: str, **changes):
    options, encoder = OBJECTIVES[name]
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": encoder,
            "objective": {"name": name} | options | changes,
            "train": {"epochs": 1, "global_batch": len(IMAGES)},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )


def built(name: str, **changes):
    return build_objective(config_of(name, **changes))
