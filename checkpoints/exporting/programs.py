"""An encoder as one program: a `torch.export` archive, or an ONNX file. Whoever runs it needs neither timm nor us.

It takes `images` (B, C, H, W), normalised, and gives `features` (B, D) and `unpooled`: tokens (B, N, D) or maps
(B, D, h, w). B is any number; H and W are where the architecture is not built for one size.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from prelude.checkpoints.exporting.formats import DType, Format
from prelude.checkpoints.exporting.parity import DTYPES, TOLERANCES, Proof, images_for, prove, rounded
from prelude.checkpoints.sources import EXPORT_SECTION, OpenedEncoder
from prelude.data.errors import UserError

TORCH_FILE, ONNX_FILE = "encoder.pt2", "encoder.onnx"
_NAMES = ("features", "unpooled")

Run = Callable[[Tensor], list[Tensor]]  # images to features (B, D) and unpooled ones
Traced = tuple[torch.export.ExportedProgram, bool]  # the program, and whether it takes images of other sizes


class _Program(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        unpooled = self.model.forward_features(images)
        return self.model.forward_head(unpooled), unpooled


def write_program(
    encoder: OpenedEncoder, folder: Path, format: Format, dtype: DType, section: dict, traced: Callable[[], Traced]
) -> Proof:
    """section: ours, for config.json, which says how to feed it. traced: `trace` of this encoder.

    Raises UserError where a package is missing, and for bfloat16 in ONNX, which onnxruntime does not compute on a CPU;
    RunStopped where the program computes something else.
    """
    if format == "onnx":
        _refuse_onnx(dtype)
    program, sizes = traced()
    config = {"input": ["images"], "output": list(_NAMES), "mean": list(encoder.mean), "std": list(encoder.std)}
    (folder / "config.json").write_text(json.dumps(config | {EXPORT_SECTION: section}, indent=2) + "\n")
    reader, run = (_write_onnx if format == "onnx" else _write_torch)(program, encoder, folder)

    def theirs(images: Tensor) -> tuple[Tensor, Tensor]:
        features, unpooled = run(images.to(DTYPES[dtype]))
        return unpooled, features

    return prove(
        encoder, reader, theirs, rounded(encoder, dtype), note=_sizes(sizes), images=_checked(encoder, sizes),
        tolerance=TOLERANCES[dtype],
    )  # fmt: skip


def _write_torch(program, encoder: OpenedEncoder, folder: Path) -> tuple[str, Run]:
    content = io.BytesIO()  # torch ends the whole process where a disk takes no more of its own file
    torch.export.save(program, content)
    (folder / TORCH_FILE).write_bytes(content.getbuffer())
    return f"torch {torch.__version__}", torch.export.load(folder / TORCH_FILE).module()


def _write_onnx(program, encoder: OpenedEncoder, folder: Path) -> tuple[str, Run]:
    import onnxruntime

    with _quiet():
        torch.onnx.export(
            program, f=str(folder / ONNX_FILE), input_names=["images"], output_names=list(_NAMES), dynamo=True,
            external_data=_is_large(encoder),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found) for found in session.run(list(_NAMES), {"images": images.numpy()})]

    return f"onnxruntime {onnxruntime.__version__}", run


def _refuse_onnx(dtype: DType) -> None:
    if dtype == "bfloat16":
        raise UserError("onnxruntime computes no bfloat16 on a CPU, where it would be compared; write --dtype float16.")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--format onnx needs {package}; write pip install 'prelude-ssl[onnx]'.")


def _is_large(encoder: OpenedEncoder) -> bool:
    """A protobuf holds 2 GiB at most; above, weights lie in a file of their own."""
    return sum(tensor.numel() * tensor.element_size() for tensor in encoder.model.state_dict().values()) > 2**30


def trace(encoder: OpenedEncoder, dtype: str, any_size: bool) -> Traced:
    """any_size: whether other sizes may be tried."""
    program = _Program(copy.deepcopy(encoder.model).to(DTYPES[dtype])).eval()
    images = images_for(encoder).to(DTYPES[dtype])
    any_dimension = torch.export.Dim.DYNAMIC
    if any_size:
        # What the tracer cannot prove of any size, or a model that asks for one, ends in an error of one of these.
        with contextlib.suppress(ValueError, RuntimeError, AssertionError), _quiet():
            shape = {"images": {0: any_dimension, 2: any_dimension, 3: any_dimension}}
            traced = torch.export.export(program, (images,), dynamic_shapes=shape)
            traced.module()(_larger(encoder).to(DTYPES[dtype]))
            return _without_traces(traced), True
    with _quiet():
        traced = torch.export.export(program, (images,), dynamic_shapes={"images": {0: any_dimension}})
        return _without_traces(traced), False


def _without_traces(traced: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Lines of source with the paths of this machine are nobody else's."""
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)
    return traced


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
