"""Small encoders that are fine-tuned, and a recipe for them."""

from prelude.checkpoints.sources import OpenedEncoder, fingerprint
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
VIT = EncoderConfig(
    name="vit_tiny_patch16_224", image_size=16, patch_size=4, kwargs={"depth": 2, "embed_dim": 32, "num_heads": 2}
)
RESNET = EncoderConfig(
    name="resnet10t", image_size=16, kwargs={"channels": [4, 6, 8, 12], "stem_width": 8, "layers": [1, 1, 1, 1]}
)
SHAPE = {"depth": 2, "embed_dim": 32, "num_heads": 2}
NORMED = {"use_fc_norm": False, "use_post_transformer_norm": True}
SOURCES = {
    "resnet": RESNET,
    "dinov3": EncoderConfig(name="vit_small_patch16_dinov3", image_size=16, patch_size=4, kwargs=SHAPE),
    "eva02": EncoderConfig(name="eva02_base_patch14_224", image_size=16, patch_size=4, kwargs=SHAPE | NORMED),
    "beit": EncoderConfig(
        name="beit_base_patch16_224", image_size=16, patch_size=4, kwargs=SHAPE | {"global_pool": "token"}
    ),
    "siglip": EncoderConfig(name="vit_base_patch16_siglip_224", image_size=16, patch_size=4, kwargs=SHAPE),
    "gap": EncoderConfig(name="vit_huge_patch14_gap_224", image_size=16, patch_size=4, kwargs=SHAPE),
    "intern": EncoderConfig(name="vit_intern300m_patch14_448", image_size=16, patch_size=4, kwargs=SHAPE),
    "own_swin": EncoderConfig(name="own_networks:swin_as_it_is", image_size=16),
    "swin": EncoderConfig(
        name="swin_tiny_patch4_window7_224",
        image_size=16,
        kwargs={"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "drop_path_rate": 0.3},
    ),
}
RECIPE = {
    "run_dir": "tuned",
    "train": {"epochs": 2, "global_batch": 16, "precision": "fp32"},
    "optimizer": {"lr": 0.01},
}


def opened(config: EncoderConfig, seed: int = 0, name: str = "run") -> OpenedEncoder:
    model = build_encoder(config, seed=seed)
    return OpenedEncoder(model, config, MEAN, STD, name, fingerprint(model))
