"""What an export can be, where a door's help can quote it without importing torch."""

from typing import Literal

Format = Literal["timm", "onnx", "torch", "transformers"]
DType = Literal["float32", "float16", "bfloat16"]
