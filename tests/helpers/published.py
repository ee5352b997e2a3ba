"""Files exactly as methods publish them, at small widths, each with features computed without the code under test.

Values are drawn anew for every tensor (norms, tokens and running statistics too), so that none could be at its initial
value by chance. Vision transformers in facebookresearch's layout are computed here from plain tensors; others by the
classes of torchvision.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from prelude.pretrain.position import sincos_table

WIDTH, HEADS, DEPTH, PATCH, SIDE = 24, 2, 2, 4, 16
GRID = SIDE // PATCH


@dataclass(frozen=True)
class Published:
    tree: dict  # what torch.save is given
    network: dict  # of `tree`: the one that is to be loaded, which a test may damage
    features: Callable  # images (B, 3, H, W) float64 to (B, D)
    format: str
    loaded: int  # tensors that an encoder takes
    words: str = f"#num_heads={HEADS}"
    needs: tuple[str, ...] = ()  # of `network`: a tensor to leave out, for a damaged file
    maps: bool = False  # `features` are those before the pooling


def drawn(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values whose scale lets a network of two blocks answer; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * 0.2
        is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma"))
        values[name] = value + 1 if is_scale else value
    return values


def block(prefix: str, width: int = WIDTH, hidden: int = 4 * WIDTH) -> dict[str, tuple]:
    return {
        f"{prefix}norm1.weight": (width,),
        f"{prefix}norm1.bias": (width,),
        f"{prefix}attn.qkv.weight": (3 * width, width),
        f"{prefix}attn.qkv.bias": (3 * width,),
        f"{prefix}attn.proj.weight": (width, width),
        f"{prefix}attn.proj.bias": (width,),
        f"{prefix}norm2.weight": (width,),
        f"{prefix}norm2.bias": (width,),
        f"{prefix}mlp.fc1.weight": (hidden, width),
        f"{prefix}mlp.fc1.bias": (hidden,),
        f"{prefix}mlp.fc2.weight": (width, hidden),
        f"{prefix}mlp.fc2.bias": (width,),
    }


def fair_shapes(rows: int = 1 + GRID * GRID, *, cls: bool = True, norm: str = "norm", channels: int = 3) -> dict:
    shapes = {"cls_token": (1, 1, WIDTH)} if cls else {}
    shapes |= {"pos_embed": (1, rows, WIDTH), "patch_embed.proj.weight": (WIDTH, channels, PATCH, PATCH)}
    shapes |= {"patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        shapes |= block(f"blocks.{i}.")
    return shapes | {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}


def fixed_table(cls: bool) -> torch.Tensor:
    table = sincos_table(WIDTH, (GRID, GRID))
    return torch.cat([torch.zeros(int(cls), WIDTH), table])[None]


def fair_tokens(p: dict, images, *, heads: int = HEADS, class_row: bool = True, eps: float = 1e-6, last: bool = True):
    """Tokens of a vision transformer whose tensors are in facebookresearch's layout. (B, prefix + N, D) float64."""
    p = {name: tensor.double() for name, tensor in p.items()}
    x = F.conv2d(
        images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=p["patch_embed.proj.weight"].shape[-1]
    )
    x = x.flatten(2).transpose(1, 2)
    table = p["pos_embed"]
    if "cls_token" in p:
        cls = p["cls_token"].expand(len(x), -1, -1)
        x = torch.cat([cls, x], 1) + table if class_row else torch.cat([cls, x + table], 1)
    else:
        x = x + table
    if "register_tokens" in p:
        x = torch.cat([x[:, :1], p["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    depth = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    for i in range(depth):
        b = {name.removeprefix(f"blocks.{i}."): t for name, t in p.items() if name.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, x.shape[-1:], b["norm1.weight"], b["norm1.bias"], eps)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2)
                   for part in F.linear(y, b["attn.qkv.weight"], b["attn.qkv.bias"]).chunk(3, -1))  # fmt: skip
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        y = F.linear((weights @ v).transpose(1, 2).flatten(2), b["attn.proj.weight"], b["attn.proj.bias"])
        x = x + y * b.get("ls1.gamma", 1)
        y = F.layer_norm(x, x.shape[-1:], b["norm2.weight"], b["norm2.bias"], eps)
        if "mlp.w12.weight" in b:
            gate, value = F.linear(y, b["mlp.w12.weight"], b["mlp.w12.bias"]).chunk(2, -1)
            y = F.linear(F.silu(gate) * value, b["mlp.w3.weight"], b["mlp.w3.bias"])
        else:
            y = F.linear(
                F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"])), b["mlp.fc2.weight"], b["mlp.fc2.bias"]
            )
        x = x + y * b.get("ls2.gamma", 1)
    return F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"], eps) if last else x


def decoder_shapes(width: int = 16) -> dict:
    shapes = {"mask_token": (1, 1, width), "decoder_pos_embed": (1, 1 + GRID * GRID, width)}
    shapes |= {"decoder_embed.weight": (width, WIDTH), "decoder_embed.bias": (width,)}
    shapes |= block("decoder_blocks.0.", width, 4 * width)
    shapes |= {"decoder_norm.weight": (width,), "decoder_norm.bias": (width,)}
    return shapes | {"decoder_pred.weight": (PATCH * PATCH * 3, width), "decoder_pred.bias": (PATCH * PATCH * 3,)}


# ---- methods


def mae(full: bool = True) -> Published:
    encoder = drawn(fair_shapes()) | {"pos_embed": fixed_table(True)}
    model = encoder | (drawn(decoder_shapes(), 1) if full else {})
    tree = {"model": model, "epoch": 800, "args": Namespace(lr=1e-4)} if full else {"model": model}
    name = "MAE" if full else "MAE (encoder)"
    return Published(tree, model, lambda x: fair_tokens(encoder, x)[:, 0], name, 6 + 12 * DEPTH, needs=("norm.bias",))


def mae_finetuned() -> Published:
    """Global pooling: `fc_norm` after the mean of patches, and a classifier."""
    model = drawn(fair_shapes(norm="fc_norm") | {"head.weight": (5, WIDTH), "head.bias": (5,)})

    def features(x):
        pooled = fair_tokens(model, x, last=False)[:, 1:].mean(1)
        return F.layer_norm(pooled, (WIDTH,), model["fc_norm.weight"].double(), model["fc_norm.bias"].double(), 1e-6)

    return Published({"model": model}, model, features, "MAE, fine-tuned", 30, needs=("fc_norm.bias",))


def predictor(width: int = 16) -> dict:
    shapes = {"mask_token": (1, 1, width), "predictor_pos_embed": (1, GRID * GRID, width)}
    shapes |= {"predictor_embed.weight": (width, WIDTH), "predictor_embed.bias": (width,)}
    shapes |= block("predictor_blocks.0.", width, 4 * width)
    shapes |= {"predictor_norm.weight": (width,), "predictor_norm.bias": (width,)}
    return drawn(shapes | {"predictor_proj.weight": (WIDTH, width), "predictor_proj.bias": (WIDTH,)}, 9)


def jepa(cls: bool = False, part: str = "target_encoder") -> Published:
    """I-JEPA, and with a class token that has no position DSeq-JEPA."""
    nets = {
        name: drawn(fair_shapes(GRID * GRID, cls=cls), seed) | {"pos_embed": fixed_table(False)}
        for seed, name in enumerate(("encoder", "target_encoder"))
    }
    tree = {name: {f"module.{key}": t for key, t in net.items()} for name, net in nets.items()}
    tree |= {"predictor": {f"module.{key}": t for key, t in predictor().items()}, "opt": {}, "scaler": None, "epoch": 3}
    method = "DSeq-JEPA" if cls else "I-JEPA"
    return Published(
        tree,
        tree[part],
        lambda x: fair_tokens(nets[part], x, class_row=False)[:, int(cls) :].mean(1),
        f"{method} ({part})",
        5 + cls + 12 * DEPTH,
        f"#num_heads={HEADS}" + (",encoder" if part == "encoder" else ""),
        ("module.norm.bias",),
    )


def dino() -> Published:
    student, teacher = (drawn(fair_shapes(), seed) for seed in (3, 4))
    head = drawn({f"head.mlp.{i}.weight": (8, 8) for i in (0, 2, 4)} | {"head.last_layer.weight_v": (9, 8)})
    tree = {
        "student": {f"module.backbone.{n}": t for n, t in student.items()}
        | {f"module.{n}": t for n, t in head.items()},
        "teacher": {f"backbone.{n}": t for n, t in teacher.items()} | head,
        "epoch": 5,
        "args": Namespace(arch="vit_small"),
    }
    features = lambda x: fair_tokens(teacher, x)[:, 0]  # noqa: E731
    return Published(tree, tree["teacher"], features, "DINO (teacher)", 30, needs=("backbone.norm.bias",))


def dinov2(registers: int = 0, swiglu: bool = False, chunked: bool = False) -> Published:
    shapes = fair_shapes() | {"mask_token": (1, WIDTH)}
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.ls{j}.gamma": (WIDTH,) for j in (1, 2)}
        if swiglu:
            for kind in ("weight", "bias"):
                del shapes[f"blocks.{i}.mlp.fc1.{kind}"], shapes[f"blocks.{i}.mlp.fc2.{kind}"]
            shapes |= {f"blocks.{i}.mlp.w12.weight": (128, WIDTH), f"blocks.{i}.mlp.w12.bias": (128,)}
            shapes |= {f"blocks.{i}.mlp.w3.weight": (WIDTH, 64), f"blocks.{i}.mlp.w3.bias": (WIDTH,)}
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    model = drawn(shapes)
    network = tree = dict(model)
    if chunked:
        network = {
            name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): t for name, t in model.items()
        }
        network = {f"backbone.{name}": t for name, t in network.items()} | drawn({"dino_head.mlp.0.weight": (4, 4)})
        tree = {"teacher": network}
    name = "DINOv2 with registers" if registers else "DINOv2"
    counts = 6 + 14 * DEPTH + bool(registers)
    features = lambda x: fair_tokens(model, x)[:, 0]  # noqa: E731
    return Published(tree, network, features, name, counts, needs=(("backbone." if chunked else "") + "norm.bias",))


def timm_vit() -> Published:
    model = drawn(fair_shapes() | {"head.weight": (5, WIDTH), "head.bias": (5,)})
    words = f"#num_heads={HEADS},pixels=half"
    return Published(model, model, lambda x: fair_tokens(model, x)[:, 0], "ViT, timm layout", 30, words, ("norm.bias",))


def torchvision_vit() -> Published:
    model = torchvision.models.VisionTransformer(SIDE, PATCH, DEPTH, HEADS, WIDTH, 48, num_classes=5)
    state = _randomised(model)
    model.heads = torch.nn.Identity()
    return Published(state, state, model.double().eval(), "torchvision ViT", 30, needs=("encoder.ln.bias",))


def resnet(bottleneck: bool = False) -> tuple[ResNet, dict]:
    model = ResNet(Bottleneck if bottleneck else BasicBlock, [1, 1, 1, 1], num_classes=5)
    state = _randomised(model)
    model.fc = torch.nn.Identity()
    return model.double().eval(), state


def torchvision_resnet() -> Published:
    model, state = resnet()
    return Published(state, state, model, "ResNet", len(state) - 2, "", ("bn1.bias",))


def torchvision_resnext() -> Published:
    """Groups, and more channels within a block than a fourth of those between."""
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=32)
    state = _randomised(model)
    model.fc = torch.nn.Identity()
    return Published(state, state, model.double().eval(), "ResNet", len(state) - 2, "", ("bn1.bias",))


def barlow_twins(release: bool = False) -> Published:
    model, state = resnet(bottleneck=True)
    backbone = {name: t for name, t in state.items() if not name.startswith("fc.")}
    if release:
        return Published(backbone, backbone, model, "ResNet", len(backbone), "", ("bn1.bias",))
    inner = {f"module.backbone.{name}": t for name, t in backbone.items()}
    inner |= {f"module.{name}": t for name, t in projector_state().items()}
    inner |= {f"module.bn.running_{name}": torch.zeros(6) for name in ("mean", "var")}
    inner["module.bn.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    tree = {"epoch": 9, "model": inner, "optimizer": {}}
    return Published(tree, inner, model, "Barlow Twins, ResNet", len(backbone), "", ("module.backbone.bn1.bias",))


def projector_state(width: int = 6, inputs: int = 2048) -> dict:
    layers = [torch.nn.Linear(inputs, width, bias=False), torch.nn.BatchNorm1d(width), torch.nn.ReLU()]
    layers += [torch.nn.Linear(width, width, bias=False), torch.nn.BatchNorm1d(width), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, width, bias=False))
    return {f"projector.{name}": t for name, t in _randomised(model).items()}


def convnext_model() -> tuple[ConvNeXt, dict]:
    dims = (8, 12, 16, 20)
    settings = [CNBlockConfig(c, out, 1) for c, out in zip(dims, (*dims[1:], None), strict=True)]
    model = ConvNeXt(settings, num_classes=5)
    state = _randomised(model)
    model.classifier[2] = torch.nn.Identity()
    return model.double().eval(), state


def torchvision_convnext() -> Published:
    model, state = convnext_model()
    return Published(state, state, model, "torchvision ConvNeXt", len(state) - 2, "", ("features.0.1.bias",))


def original_convnext(norm: bool = True) -> tuple[dict, ConvNeXt]:
    """torchvision's values under the names of the paper's code."""
    model, state = convnext_model()
    inner = {"0": "dwconv", "2": "norm", "3": "pwconv1", "5": "pwconv2"}
    renamed = {}
    for name, tensor in state.items():
        part = name.split(".")
        if part[0] == "classifier":
            if norm:
                renamed[f"{'norm' if part[1] == '0' else 'head'}.{part[2]}"] = tensor
        elif int(part[1]) % 2 == 0:
            renamed[f"downsample_layers.{int(part[1]) // 2}.{part[2]}.{part[3]}"] = tensor
        elif part[3] == "layer_scale":
            renamed[f"stages.{int(part[1]) // 2}.{part[2]}.gamma"] = tensor.flatten()
        else:
            renamed[f"stages.{int(part[1]) // 2}.{part[2]}.{inner[part[4]]}.{part[5]}"] = tensor
    return renamed, model


def convnext() -> Published:
    state, model = original_convnext()
    first = ("downsample_layers.0.1.bias",)
    return Published({"model": state}, state, model, "ConvNeXt, original names", len(state) - 2, "", first)


def spark(full: bool = True) -> Published:
    """Without a last norm, so what is compared are the maps before it."""
    encoder, model = original_convnext(norm=False)
    features = lambda x: model.features(x)  # noqa: E731
    if not full:
        first = ("downsample_layers.0.1.bias",)
        return Published(encoder, encoder, features, "ConvNeXt, original names", len(encoder), "", first, maps=True)
    module = {f"sparse_encoder.sp_cnn.{name}": t for name, t in encoder.items()}
    module |= drawn({"dense_decoder.proj.weight": (3, 2, 1, 1), "mask_tokens.0": (1, 20, 1, 1), "imn_m": (1, 3, 1, 1)})
    module["config"] = {"mask_ratio": 0.6}
    tree = {"args": "...", "input_size": 224, "arch": "convnext_small", "module": module, "is_pretrain": True}
    first = ("sparse_encoder.sp_cnn.downsample_layers.0.1.bias",)
    name = "SparK, ConvNeXt, original names"
    return Published(tree, module, features, name, len(encoder), "", first, maps=True)


def _randomised(model: torch.nn.Module) -> dict:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.fill_(7)
            elif name.endswith("running_var") or tensor.ndim == 1 and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                scale = 1 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.2
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


METHODS: dict[str, Callable[[], Published]] = {
    "MAE": mae,
    "MAE, encoder alone": lambda: mae(full=False),
    "MAE, fine-tuned": mae_finetuned,
    "I-JEPA": jepa,
    "I-JEPA, context encoder": lambda: jepa(part="encoder"),
    "DSeq-JEPA": lambda: jepa(cls=True),
    "DINO": dino,
    "DINOv2": dinov2,
    "DINOv2 with registers": lambda: dinov2(registers=2),
    "DINOv2 with SwiGLU": lambda: dinov2(swiglu=True),
    "DINOv2 in training, chunked": lambda: dinov2(chunked=True),
    "timm ViT": timm_vit,
    "torchvision ViT": torchvision_vit,
    "torchvision ResNet": torchvision_resnet,
    "torchvision ResNeXt": torchvision_resnext,
    "Barlow Twins": barlow_twins,
    "Barlow Twins, released": lambda: barlow_twins(release=True),
    "torchvision ConvNeXt": torchvision_convnext,
    "ConvNeXt": convnext,
    "SparK": spark,
    "SparK, timm style": lambda: spark(full=False),
}
