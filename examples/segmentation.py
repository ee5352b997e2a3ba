"""A segmentation head on the feature maps of an exported encoder, with timm and torch alone.

    prelude export runs/mine --to encoder
    python examples/segmentation.py encoder scenes/train scenes/test --num-classes 21

A folder has images/NAME.jpg (or .png) and masks/NAME.png, whose pixels are class numbers; 255 counts nowhere.
Prints the mean intersection over union after each epoch; writes the weights to --to.
"""

import argparse
from pathlib import Path

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

IGNORED = 255
STEPS = {"L;2": 85, "L;4": 17}  # PIL spreads grey values of 2 and 4 bits over 0 to 255


class Scenes(Dataset):
    """Images (3, S, S), normalised, and masks (S, S) int64."""

    def __init__(self, folder: str, size: int, mean, std):
        self.masks = sorted(Path(folder, "masks").glob("*.png"))
        self.images = {path.stem: path for path in Path(folder, "images").iterdir()}
        self.size = (size, size)
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, place):
        mask = Image.open(self.masks[place])
        step = STEPS.get(mask.tile[0][3], 1)
        classes = np.array(mask.resize(self.size, Image.Resampling.NEAREST)) // step
        image = (
            Image.open(self.images[self.masks[place].stem]).convert("RGB").resize(self.size, Image.Resampling.BICUBIC)
        )
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return (pixels - self.mean) / self.std, torch.from_numpy(classes).long()


class Segmenter(nn.Module):
    """Maps of all stages, brought to the finest grid and to one width, added up, and read by a convolution."""

    def __init__(self, encoder: str, num_classes: int, width: int = 128):
        super().__init__()
        self.encoder = timm.create_model(f"local-dir:{encoder}", pretrained=True, features_only=True)
        self.narrow = nn.ModuleList(nn.Conv2d(count, width, 1) for count in self.encoder.feature_info.channels())
        self.head = nn.Sequential(
            nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, num_classes, 1),
        )  # fmt: skip

    def forward(self, images):
        """(B, 3, S, S) to (B, C, S, S)."""
        maps = [narrow(found) for narrow, found in zip(self.narrow, self.encoder(images), strict=True)]
        grid = max(found.shape[-2:] for found in maps)
        mixed = sum(F.interpolate(found, grid, mode="bilinear", align_corners=False) for found in maps)
        return F.interpolate(self.head(mixed), images.shape[-2:], mode="bilinear", align_corners=False)


def mean_iou(model: nn.Module, batches: DataLoader, num_classes: int, device: str) -> float:
    """Over the classes that occur."""
    model.eval()
    counts = torch.zeros(num_classes, num_classes)
    with torch.no_grad():
        for images, masks in batches:
            found, there = model(images.to(device)).argmax(1).cpu(), masks != IGNORED
            counts += torch.bincount(masks[there] * num_classes + found[there], minlength=counts.numel()).view_as(
                counts
            )
    both, either = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
    return (both / either)[counts.sum(1) > 0].mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="the folder of an export")
    parser.add_argument("train", help="a folder with images and masks")
    parser.add_argument("test", help="another")
    parser.add_argument("--num-classes", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the head; a tenth for the encoder")
    parser.add_argument("--to", default="segmenter.pt", help="where the weights go (default: segmenter.pt)")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Segmenter(args.encoder, args.num_classes).to(device)
    seen_as = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{args.encoder}", pretrained=True))
    view = seen_as["input_size"][-1], seen_as["mean"], seen_as["std"]
    train, test = (Scenes(folder, *view) for folder in (args.train, args.test))
    own, encoder = [*model.narrow.parameters(), *model.head.parameters()], model.encoder.parameters()
    groups = [{"params": own}, {"params": encoder, "lr": args.learning_rate / 10}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate)
    batches = DataLoader(train, args.batch_size, shuffle=True, num_workers=2)
    tested = DataLoader(test, args.batch_size, num_workers=2)
    for epoch in range(args.epochs):
        model.train()
        for images, masks in batches:
            loss = F.cross_entropy(model(images.to(device)), masks.to(device), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        score = mean_iou(model, tested, args.num_classes, device)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, mean IoU {score:.2%}", flush=True)
    torch.save(model.state_dict(), args.to)


if __name__ == "__main__":
    main()
