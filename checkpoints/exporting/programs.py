"""An encoder as one program: a `torch.export` archive, or an ONNX file. Whoever runs it needs neither timm nor us.

It takes `images` (B, C, H, W), normalised, and gives `features` (B, D) and `unpooled`: tokens (B, N, D) or maps
(B, D, h, w). B is any number; H and W are where the architecture is not built for one size.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from prelude.checkpoints.exporting.parity import DTYPES, TOLERANCES, Proof, images_for, prove, rounded
from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.errors import UserError

TORCH_FILE, ONNX_FILE = "encoder.pt2", "encoder.onnx"
_NAMES = ("features", "unpooled")


class _Program(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        unpooled = self.model.forward_features(images)
        return self.model.forward_head(unpooled), unpooled


def write_torch(encoder: OpenedEncoder, folder: Path, dtype: str, any_size: bool) -> Proof:
    program, sizes = _traced(encoder, dtype, any_size)
    torch.export.save(program, folder / TORCH_FILE)
    loaded = torch.export.load(folder / TORCH_FILE).module()

    def theirs(images: Tensor) -> tuple[Tensor, Tensor]:
        features, unpooled = loaded(images.to(DTYPES[dtype]))
        return unpooled, features

    return prove(
        encoder, f"torch {torch.__version__}", theirs, rounded(encoder, dtype), note=_sizes(sizes),
        images=_checked(encoder, sizes), tolerance=TOLERANCES[dtype],
    )  # fmt: skip


def write_onnx(encoder: OpenedEncoder, folder: Path, dtype: str, any_size: bool) -> Proof:
    """Raises UserError where a package is missing, and for bfloat16, which onnxruntime does not compute on a CPU."""
    if dtype == "bfloat16":
        raise UserError(
            "onnxruntime computes no bfloat16 on a CPU, so nothing could be compared; write --dtype float16."
        )
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it, and says so in a traceback
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}; write pip install 'prelude-ssl[onnx]'.") from None
    program, sizes = _traced(encoder, dtype, any_size)
    with _quiet():
        torch.onnx.export(
            program, f=str(folder / ONNX_FILE), input_names=["images"], output_names=list(_NAMES), dynamo=True,
            external_data=_is_large(encoder),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])

    def theirs(images: Tensor) -> tuple[Tensor, Tensor]:
        features, unpooled = session.run(list(_NAMES), {"images": images.to(DTYPES[dtype]).numpy()})
        return torch.from_numpy(unpooled), torch.from_numpy(features)

    return prove(
        encoder, f"onnxruntime {onnxruntime.__version__}", theirs, rounded(encoder, dtype), note=_sizes(sizes),
        images=_checked(encoder, sizes), tolerance=TOLERANCES[dtype],
    )  # fmt: skip


def _is_large(encoder: OpenedEncoder) -> bool:
    """A protobuf holds 2 GiB at most; above, weights lie in a file of their own."""
    return sum(tensor.numel() * tensor.element_size() for tensor in encoder.model.state_dict().values()) > 2**30


def _traced(encoder: OpenedEncoder, dtype: str, any_size: bool) -> tuple[torch.export.ExportedProgram, bool]:
    """The program, and whether it takes images of other sizes."""
    program = _Program(copy.deepcopy(encoder.model).to(DTYPES[dtype])).eval()
    images = images_for(encoder).to(DTYPES[dtype])
    any_dimension = torch.export.Dim.DYNAMIC
    if any_size:
        # What the tracer cannot prove of any size, or a model that asks for one, ends in an error of one of these.
        with contextlib.suppress(ValueError, RuntimeError, AssertionError), _quiet():
            shape = {"images": {0: any_dimension, 2: any_dimension, 3: any_dimension}}
            traced = torch.export.export(program, (images,), dynamic_shapes=shape)
            traced.module()(_larger(encoder).to(DTYPES[dtype]))
            return traced, True
    with _quiet():
        return torch.export.export(program, (images,), dynamic_shapes={"images": {0: any_dimension}}), False


def _larger(encoder: OpenedEncoder) -> Tensor:
    height, width = encoder.config.size
    return images_for(encoder, 3, (height + 32, width + 64))


def _checked(encoder: OpenedEncoder, sizes: bool) -> list[Tensor]:
    return [images_for(encoder), _larger(encoder) if sizes else images_for(encoder, 3)]


def _sizes(sizes: bool) -> str:
    return "any number of images of any size from there on" if sizes else "any number of images of this size"


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print their progress and warn of what they do by themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
