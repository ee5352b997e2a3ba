"""What an export can be, where a door's help can quote it without importing torch."""

from typing import Literal

Format = Literal["timm", "onnx", "torch", "transformers"]
DType = Literal["float32", "float16", "bfloat16"]
VOLUMES = "volume_embed.safetensors"  # what projects patches of volumes, beside the encoder
FILES = (  # that any of them writes
    "README.md", "config.json", "preprocessor_config.json", "model.safetensors", VOLUMES,
    "encoder.pt2", "encoder.onnx", "encoder.onnx.data",
)  # fmt: skip
