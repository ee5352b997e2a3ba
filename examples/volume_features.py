"""Features of volumes by the encoder of an exported Uni4Eye run, with timm and torch alone.

    prelude export runs/mine --to encoder
    python examples/volume_features.py encoder scans/*.npy --to features.npz

Each volume is an array (H, W, Z), or (H, W, Z, C) where the run learned from several channels, of the size that the run
resampled its volumes to. Writes one row a volume: the mean of all patches after the final norm.
"""

import argparse

import numpy as np
import timm
import torch
from safetensors.torch import load_file


def positions(grid: tuple[int, int, int], width: int) -> torch.Tensor:
    """(rows * columns * depths, width): sines and cosines of a patch's column, row and depth."""
    y, x, z = (axis.reshape(-1, 1) for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    part = 2 * (width // 6)
    codes = []
    for place, numbers in ((x, part), (y, part), (z, width - 2 * part)):
        angles = place * 10000.0 ** -(torch.arange(numbers // 2, dtype=torch.float64) / (numbers // 2))
        codes += [angles.sin(), angles.cos()]
    return torch.cat(codes, dim=1).float()


def standardised(volumes: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W, Z): what is not 0 at mean 0 and variance 1; 0 stays."""
    inside = volumes > 0
    count = inside.sum((2, 3, 4), keepdim=True).clamp(min=1)
    centred = torch.where(inside, volumes - volumes.sum((2, 3, 4), keepdim=True) / count, 0.0)
    return centred / (centred.square().sum((2, 3, 4), keepdim=True) / count).sqrt().clamp(min=1e-6)


@torch.no_grad()
def features(model: torch.nn.Module, embed: dict[str, torch.Tensor], volumes: torch.Tensor) -> torch.Tensor:
    """volumes: (B, C, H, W, Z) in [0, 1]. Returns (B, D)."""
    patches = torch.nn.functional.conv3d(
        standardised(volumes), embed["weight"], embed["bias"], stride=embed["weight"].shape[2:]
    )
    tokens = patches.flatten(2).mT + positions(patches.shape[2:], patches.shape[1])
    prefix = [token.expand(len(tokens), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    encoded = model.norm(model.blocks(model.norm_pre(torch.cat([*prefix, tokens], dim=1))))
    return encoded[:, -tokens.shape[1] :].mean(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("encoder")
    parser.add_argument("volumes", nargs="+")
    parser.add_argument("--range", type=float, nargs=2, default=(0, 255), help="values that are black and white")
    parser.add_argument("--to", default="features.npz")
    args = parser.parse_args()
    model = timm.create_model(f"local-dir:{args.encoder}", pretrained=True).eval()
    embed = {name: tensor.float() for name, tensor in load_file(f"{args.encoder}/volume_embed.safetensors").items()}
    low, high = args.range
    rows = []
    for path in args.volumes:
        volume = torch.from_numpy(np.load(path).astype(np.float32))
        volume = (volume[None] if volume.ndim == 3 else volume.movedim(-1, 0))[None]
        rows.append(features(model, embed, ((volume - low) / (high - low)).clamp(0, 1)))
    np.savez(args.to, features=torch.cat(rows).numpy(), names=args.volumes)
    print(f"{len(rows)} volumes: {args.to}")


if __name__ == "__main__":
    main()
