"""Train a segmentation head on the maps of an exported encoder, with timm and torch alone.

    python examples/segmentation.py EXPORT TRAIN TEST --classes 3

EXPORT: a folder that `prelude export` wrote, or any other that timm opens.
TRAIN, TEST: folders with images/NAME.jpg (or .png) and masks/NAME.png, whose grey values are classes; 255 is ignored.
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Masks(Dataset):
    def __init__(self, root, size, mean, std):
        self.root, self.size = Path(root), size
        self.images = sorted((self.root / "images").iterdir())
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = Image.open(self.images[i]).convert("RGB").resize(self.size, Image.Resampling.BICUBIC)
        mask = Image.open(self.root / "masks" / f"{self.images[i].stem}.png").resize(
            self.size, Image.Resampling.NEAREST
        )
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return (pixels - self.mean) / self.std, torch.from_numpy(np.array(mask)).long()


class Segmenter(nn.Module):
    """Every map of the encoder through a 1 x 1 convolution, brought to the size of the finest one and added."""

    def __init__(self, export, classes, width=64):
        super().__init__()
        self.encoder = timm.create_model(f"local-dir:{export}", pretrained=True, features_only=True)
        channels = self.encoder.feature_info.channels()
        self.sides = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, classes, 3, padding=1))

    def forward(self, images):
        maps = [side(features) for side, features in zip(self.sides, self.encoder(images), strict=True)]
        finest = max((features.shape[-2:] for features in maps), key=lambda size: size[0])
        summed = sum(F.interpolate(features, finest, mode="bilinear") for features in maps)
        return F.interpolate(self.head(summed), images.shape[-2:], mode="bilinear")


def main():
    parser = argparse.ArgumentParser()
    for name in ("export", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Segmenter(args.export, args.classes).to(device)
    about = model.encoder.pretrained_cfg
    size = about["input_size"][:0:-1]  # width, height
    train, test = (Masks(root, size, about["mean"], about["std"]) for root in (args.train, args.test))
    train_loader = DataLoader(train, args.batch_size, shuffle=True, num_workers=args.workers)
    test_loader = DataLoader(test, args.batch_size, num_workers=args.workers)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    for epoch in range(args.epochs):
        model.train()
        for images, masks in train_loader:
            loss = F.cross_entropy(model(images.to(device)), masks.to(device), ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        both, either = torch.zeros(2, args.classes)
        with torch.no_grad():
            for images, masks in test_loader:
                found, known = model(images.to(device)).argmax(1).cpu(), masks != 255
                for c in range(args.classes):
                    ours, theirs = (found == c) & known, masks == c
                    both[c] += (ours & theirs).sum()
                    either[c] += (ours | theirs).sum()
        iou = (both / either)[either > 0].mean()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, mean IoU {100 * iou:.2f} %", flush=True)


if __name__ == "__main__":
    main()
