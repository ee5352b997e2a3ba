"""Fine-tunes an exported encoder with timm and torch alone.

    prelude export runs/mine --to encoder
    python examples/finetune_timm.py encoder photos/train photos/test --epochs 10

Images lie in class folders. Prints the accuracy after each epoch; writes the weights to --to.
"""

import argparse

import timm.data
import timm.optim
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("encoder", help="the folder of an export")
parser.add_argument("train", help="a folder of class folders")
parser.add_argument("test", help="another, with the same classes")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--learning-rate", type=float, default=5e-4)
parser.add_argument("--to", default="finetuned.pt", help="where the weights go (default: finetuned.pt)")
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
classes = ImageFolder(args.train).classes
model = timm.create_model(f"local-dir:{args.encoder}", pretrained=True, num_classes=len(classes)).to(device)
seen_as = timm.data.resolve_model_data_config(model)  # size, mean and deviation of the pretraining
train = ImageFolder(args.train, timm.data.create_transform(**seen_as, is_training=True))
test = ImageFolder(args.test, timm.data.create_transform(**seen_as))
assert test.classes == classes, f"{args.test} has other classes than {args.train}"

# Weights near the input keep most of what they have learned; biases and norms do not decay.
groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
optimizer = torch.optim.AdamW([{**g, "lr": args.learning_rate * g.get("lr_scale", 1.0)} for g in groups])
batches = DataLoader(train, args.batch_size, shuffle=True, num_workers=2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(batches))

for epoch in range(args.epochs):
    model.train()
    for images, labels in batches:
        loss = F.cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        tested = DataLoader(test, args.batch_size, num_workers=2)
        right = sum((model(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in tested)
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {right / len(test):.2%}", flush=True)
torch.save(model.state_dict(), args.to)
