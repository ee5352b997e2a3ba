"""Fine-tune an exported encoder with timm and torch alone.

    python examples/finetune_timm.py EXPORT TRAIN TEST

EXPORT: a folder that `prelude export` wrote, or any other that timm opens.
TRAIN, TEST: folders with a folder of images for each class.
"""

import argparse

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler


def main():
    parser = argparse.ArgumentParser()
    for name in ("export", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--layer-decay", type=float, default=0.75)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = (create_dataset("", root=root) for root in (args.train, args.test))
    classes = len(train.reader.class_to_idx)
    model = timm.create_model(f"local-dir:{args.export}", pretrained=True, num_classes=classes).to(device)
    data = timm.data.resolve_data_config({}, model=model)
    seen = dict(input_size=data["input_size"], mean=data["mean"], std=data["std"], interpolation=data["interpolation"])
    seen |= dict(batch_size=args.batch_size, use_prefetcher=False, num_workers=args.workers)
    train_loader = create_loader(train, is_training=True, **seen)
    test_loader = create_loader(test, is_training=False, **seen)

    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05, layer_decay=args.layer_decay)
    schedule = CosineLRScheduler(optimizer, args.epochs, warmup_t=1, warmup_prefix=True)
    for epoch in range(args.epochs):
        model.train()
        schedule.step(epoch)
        for images, labels in train_loader:
            loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            hits = sum((model(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in test_loader)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, top-1 {100 * hits / len(test):.2f} %", flush=True)
    torch.save(model.state_dict(), "finetuned.pt")


if __name__ == "__main__":
    main()
