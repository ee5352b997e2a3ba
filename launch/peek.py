"""`prelude shards peek`: a sheet of what an objective sees after augmentation."""

import argparse
import os
import sys
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prelude.data.absent import told_as
from prelude.data.batch import View, ViewPlan
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.loader import build_loader
from prelude.data.shards import ShardIndex
from prelude.data.value_range import channels_of
from prelude.data.whole_files import whole
from prelude.launch.training import seen_as as read_as
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.objectives.patch_pictures import page
from prelude.pretrain.images import denormalise, images
from prelude.pretrain.recipe_yaml import written
from prelude.pretrain.recipes import load_config

_PLAIN_VIEW = View((128, 128), crop="center", flip=0.0)
_MADE_BY = "Software", "prelude shards peek"  # in a sheet's PNG, so that it is known again
_LEAST_SIDE = 96  # pixels of a picture in a sheet; smaller ones are enlarged by whole factors


def peek(args: argparse.Namespace) -> int:
    plan, seen_as, image = None, {}, args.image or ""
    if args.config:
        given = ["data.mix={}", f"data.shards={written(args.shards)}", *args.set]
        config = load_config(args.config, given, options_for)
        plan = build_objective(config).views
        seen_as = read_as(config.data)
        image = image or seen_as["image"]
    elif args.set:
        raise UserError(f"--set {args.set[0]} has no effect without --config; leave it out.")
    else:
        with told_as(""):
            channels = channels_of(ShardIndex(args.shards, image=image))
        plan = ViewPlan((_PLAIN_VIEW,), (0.5,) * channels, (0.25,) * channels)
    if args.count < 1:
        raise UserError(f"--count {args.count} leaves nothing to draw; write 1 or more.")
    _refuse_to_replace(args.to)
    with told_as(""):
        loader = build_loader(args.shards, plan, seed=args.seed, micro_batch=args.count, **seen_as | {"image": image})
    names = loader.preview(args.count)
    batch = next(loader)
    rows: list[list] = [[] for _ in range(args.count)]
    for v, view in enumerate(images(batch, plan)):
        pictures = denormalise(view, plan).permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
        for row, picture in zip(rows, pictures, strict=True):
            row.append((f"view {v + 1}" if args.config else "", _enlarged(picture)))
    _write(page(rows), args.to)
    print("\n".join(names), file=sys.stderr)
    print(f"{counted(args.count, 'image')}, {counted(len(plan.views), 'view')} each: {args.to}")
    return 0


def _refuse_to_replace(to: str) -> None:
    """A photo of the user's, such as the first of a shell's list behind --to."""
    if not to.lower().endswith(".png"):
        raise UserError(f"--to {to} is no PNG; write the name of a .png file.")
    try:
        is_ours = Image.open(to).info.get(_MADE_BY[0]) == _MADE_BY[1]
    except (OSError, ValueError, Image.DecompressionBombError):
        is_ours = False
    if os.path.lexists(to) and not is_ours:
        raise UserError(f"--to {to} is there already, and only a .png that peek drew is replaced; write another file.")


def _write(sheet: Image.Image, to: str) -> None:
    mark = PngInfo()
    mark.add_text(*_MADE_BY)
    try:
        with whole(Path(to)) as file:
            sheet.save(file, format="PNG", pnginfo=mark)
    except OSError as error:
        raise UserError(f"--to {to} cannot be written ({error}); write the name of a .png file.") from None


def _enlarged(picture):
    factor = max(1, -(-_LEAST_SIDE // min(picture.shape[:2])))
    return Image.fromarray(picture.repeat(factor, 0).repeat(factor, 1))
