"""DINOv3 and EVA-02 files as they are published, at small widths, with features computed from plain tensors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from published import DEPTH, GRID, HEADS, PATCH, WIDTH, Published, drawn

HEAD = WIDTH // HEADS
HIDDEN = 64


def periods(head: int = HEAD) -> torch.Tensor:
    return 100.0 ** (torch.arange(head // 4, dtype=torch.float64) * 4 / head)


def dinov3_angles(grid: tuple[int, int]) -> torch.Tensor:
    """(N, width of a head): rows and columns in [-1, 1], twice."""
    rows, columns = ((torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1 for side in grid)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)  # (N, 2)
    return (2 * torch.pi * places[:, :, None] / periods()).flatten(1).repeat(1, 2)


def eva02_angles(grid: tuple[int, int], reference: int = 16) -> torch.Tensor:
    """(N, width of a head): rows, then columns, as on a grid of 16 x 16, each angle for two neighbours."""
    rows, columns = (torch.arange(side, dtype=torch.float64) * reference / side for side in grid)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    frequencies = 10000.0 ** -(torch.arange(HEAD // 4, dtype=torch.float64) * 4 / HEAD)
    return (places[:, :, None] * frequencies).flatten(1).repeat_interleave(2, 1)


def halves_turned(x: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)


def neighbours_turned(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def attended(qkv, angles, turned: Callable, prefix: int):
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv)

    def rotated(x):
        patches = x[:, :, prefix:]
        return torch.cat([x[:, :, :prefix], patches * angles.cos() + turned(patches) * angles.sin()], 2)

    weights = (rotated(q) @ rotated(k).transpose(-1, -2) / HEAD**0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def linear(x, p: dict, name: str):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def norm(x, p: dict, name: str, eps: float):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def of_block(p: dict, i: int) -> dict:
    return {name.removeprefix(f"blocks.{i}."): t for name, t in p.items() if name.startswith(f"blocks.{i}.")}


def patches(p: dict, images):
    return F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=PATCH)


def dinov3_features(p: dict, images):
    """The class token after the last norm."""
    p = {name: tensor.double() for name, tensor in p.items()}
    maps = patches(p, images)
    prefix = torch.cat([p["cls_token"], p["storage_tokens"]], 1).expand(len(images), -1, -1)
    x = torch.cat([prefix, maps.flatten(2).transpose(1, 2)], 1)
    angles = dinov3_angles(tuple(maps.shape[2:]))
    for i in range(DEPTH):
        b = of_block(p, i)
        bias = b["attn.qkv.bias"] * b["attn.qkv.bias_mask"]
        qkv = F.linear(norm(x, b, "norm1", 1e-5), b["attn.qkv.weight"], bias).chunk(3, -1)
        x = x + b["ls1.gamma"] * linear(attended(qkv, angles, halves_turned, prefix.shape[1]), b, "attn.proj")
        y = norm(x, b, "norm2", 1e-5)
        if "mlp.w1.weight" in b:
            y = linear(F.silu(linear(y, b, "mlp.w1")) * linear(y, b, "mlp.w2"), b, "mlp.w3")
        else:
            y = linear(F.gelu(linear(y, b, "mlp.fc1")), b, "mlp.fc2")
        x = x + b["ls2.gamma"] * y
    return norm(x, p, "norm", 1e-5)[:, 0]


def eva02_features(p: dict, images):
    """The mean of the patches after the last norm, or the norm of their mean in a fine-tuned file."""
    p = {name: tensor.double() for name, tensor in p.items()}
    maps = patches(p, images)
    x = torch.cat([p["cls_token"].expand(len(images), -1, -1), maps.flatten(2).transpose(1, 2)], 1) + p["pos_embed"]
    angles = eva02_angles(tuple(maps.shape[2:]))
    for i in range(DEPTH):
        b = of_block(p, i)
        y = norm(x, b, "norm1", 1e-6)
        if "attn.qkv.weight" in b:
            q, k, v = linear(y, b, "attn.qkv").chunk(3, -1)
        else:
            q, k, v = (linear(y, b, f"attn.{which}_proj") for which in "qkv")
        y = attended((q + b["attn.q_bias"], k, v + b["attn.v_bias"]), angles, neighbours_turned, 1)
        y = norm(y, b, "attn.inner_attn_ln", 1e-6) if "attn.inner_attn_ln.weight" in b else y
        x = x + linear(y, b, "attn.proj")
        y = norm(x, b, "norm2", 1e-6)
        if "mlp.w12.weight" in b:
            gate, value = linear(y, b, "mlp.w12").chunk(2, -1)
        else:
            gate, value = linear(y, b, "mlp.w1"), linear(y, b, "mlp.w2")
        y = F.silu(gate) * value
        x = x + linear(norm(y, b, "mlp.ffn_ln", 1e-6) if "mlp.ffn_ln.weight" in b else y, b, "mlp.w3")
    if "fc_norm.weight" in p:
        return norm(x[:, 1:].mean(1), p, "fc_norm", 1e-6)
    return norm(x, p, "norm", 1e-6)[:, 1:].mean(1)


# ---- the files


def layer(name: str, rows: int, columns: int, bias: bool = True) -> dict:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def scale(name: str, width: int = WIDTH) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def stem() -> dict:
    return {"cls_token": (1, 1, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH)} | {
        "patch_embed.proj.bias": (WIDTH,)
    }


def dinov3(gated: bool = False, biases: bool = False, training: bool = False) -> Published:
    shapes = stem() | {"storage_tokens": (1, 4, WIDTH), "mask_token": (1, WIDTH)} | scale("norm")
    for i in range(DEPTH):
        b = f"blocks.{i}."
        shapes |= scale(f"{b}norm1") | scale(f"{b}norm2") | {f"{b}ls{j}.gamma": (WIDTH,) for j in (1, 2)}
        shapes |= layer(f"{b}attn.qkv", 3 * WIDTH, WIDTH) | layer(f"{b}attn.proj", WIDTH, WIDTH)
        if gated:
            shapes |= layer(f"{b}mlp.w1", HIDDEN, WIDTH) | layer(f"{b}mlp.w2", HIDDEN, WIDTH)
        shapes |= layer(f"{b}mlp.{'w3' if gated else 'fc2'}", WIDTH, HIDDEN)
        shapes |= {} if gated else layer(f"{b}mlp.fc1", HIDDEN, WIDTH)
    model = drawn(shapes) | {"rope_embed.periods": periods().bfloat16()}
    for i in range(DEPTH):
        mask = torch.tensor([float(biases), 0.0, float(biases)]).repeat_interleave(WIDTH)
        model[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    network, tree, prefix = model, model, ""
    if training:
        prefix = "backbone."
        network = {f"backbone.{name}": t for name, t in model.items()} | drawn({"dino_head.mlp.0.weight": (4, 4)})
        tree = {"teacher": network}
    loaded = 6 + (15 if gated else 13) * DEPTH + 2 * DEPTH * biases
    return Published(
        tree,
        network,
        lambda x: dinov3_features(model, x),
        "DINOv3",
        loaded,
        f"#image_size={GRID * PATCH}",
        (f"{prefix}norm.bias",),
    )


def eva02(packed: bool = False, finetuned: bool = False, inner_norm: bool = False) -> Published:
    shapes = stem() | {"pos_embed": (1, 1 + GRID * GRID, WIDTH)} | scale("fc_norm" if finetuned else "norm")
    for i in range(DEPTH):
        b = f"blocks.{i}."
        shapes |= scale(f"{b}norm1") | scale(f"{b}norm2") | {f"{b}attn.{which}_bias": (WIDTH,) for which in "qv"}
        if packed:
            shapes |= layer(f"{b}attn.qkv", 3 * WIDTH, WIDTH, bias=False) | layer(f"{b}mlp.w12", 2 * HIDDEN, WIDTH)
        else:
            for which in "qkv":
                shapes |= layer(f"{b}attn.{which}_proj", WIDTH, WIDTH, bias=False)
            shapes |= layer(f"{b}mlp.w1", HIDDEN, WIDTH) | layer(f"{b}mlp.w2", HIDDEN, WIDTH)
            shapes |= scale(f"{b}mlp.ffn_ln", HIDDEN)
        shapes |= scale(f"{b}attn.inner_attn_ln") if inner_norm else {}
        shapes |= layer(f"{b}attn.proj", WIDTH, WIDTH) | layer(f"{b}mlp.w3", WIDTH, HIDDEN)
    head = layer("head", 5, WIDTH) if finetuned else {"mask_token": (1, 1, WIDTH)} | layer("lm_head", 6, WIDTH)
    model = drawn(shapes | head)
    for name in ("rope", *(f"blocks.{i}.attn.rope" for i in range(DEPTH))):
        model[f"{name}.freqs_cos"] = eva02_angles((GRID, GRID)).cos().float()
        model[f"{name}.freqs_sin"] = eva02_angles((GRID, GRID)).sin().float()
    last = "fc_norm" if finetuned else "norm"
    name = "EVA-02, fine-tuned" if finetuned else "EVA-02"
    loaded = 6 + ((13 if packed else 19) + 2 * inner_norm) * DEPTH
    tree = {"module": model}
    return Published(tree, model, lambda x: eva02_features(model, x), name, loaded, "", (f"{last}.bias",))


ROTARY: dict[str, Callable[[], Published]] = {
    "DINOv3": dinov3,
    "DINOv3, gated, with biases": lambda: dinov3(gated=True, biases=True),
    "DINOv3 in training": lambda: dinov3(training=True),
    "EVA-02": eva02,
    "EVA-02, packed": lambda: eva02(packed=True),
    "EVA-02, fine-tuned, norm in the attention": lambda: eva02(finetuned=True, inner_norm=True),
}
