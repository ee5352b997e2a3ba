"""`prelude shards info`, `verify` and `index`: what is in a data set, what is wrong with it, and where it lies."""

import argparse
import json
import os

from rich.console import Console
from rich.progress import Progress

from prelude.data.absent import told_as
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.image_folder import ImageFolder
from prelude.data.remote_index import write_for
from prelude.data.shards import ShardIndex
from prelude.data.survey import NEAR_BITS, Survey, spread, survey
from prelude.data.value_range import channels_of, tell_if_dark
from prelude.evaluators.table_text import PlainTable
from prelude.pretrain.distributed import cores_per_rank
from prelude.pretrain.files import reason, remedy

_MOST_LISTED = 20


def info(args: argparse.Namespace) -> int:
    """Exit code 1 where something is wrong, for scripts."""
    index = _index(args)
    table = _counts(index, args.label)
    if args.images:
        chosen = spread(index.num_samples, args.images)
        found = survey(index, chosen, channels=index.channels, threads=args.workers or cores_per_rank())
        _describe(
            table, found, f"of {counted(len(chosen), 'image')}" if len(chosen) < index.num_samples else "of all images"
        )
    Console().print(table)
    if args.images:
        tell_if_dark(index)
        _paste(index, found)
    problems = _problems(index) + (_undecodable(index, found) if args.images else [])
    _list(problems)
    return 1 if problems else 0


def verify(args: argparse.Namespace) -> int:
    """Exit code 1 where an image is damaged; duplicates are told of."""
    index = _index(args)
    if args.to:
        _refuse_to_write(args.to, index)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("decoding", total=index.num_samples)
        every = spread(index.num_samples, index.num_samples)
        found = survey(
            index,
            every,
            channels=index.channels,
            threads=args.workers or cores_per_rank(),
            duplicates=True,
            progress=lambda: bar.advance(task),
        )
    table = _counts(index, args.label)
    _describe(table, found, "of all images")
    table.add_row(
        "byte-identical",
        f"{counted(sum(map(len, found.identical)), 'image')} in {counted(len(found.identical), 'group')}",
    )
    near = f"{len(found.near)} pairs ({NEAR_BITS} bits of pHash or fewer apart)"
    table.add_row(
        "near-identical", near if found.looked_for_near else "not looked for: pip install 'prelude-ssl[duplicates]'"
    )
    Console().print(table)
    _paste(index, found)
    name = lambda sample: f"{index.shard_of(sample)}:{index.key(sample)}"  # noqa: E731
    problems = _problems(index) + _undecodable(index, found)
    twice = [{"kind": "byte-identical", "images": [name(n) for n in group]} for group in found.identical]
    twice += [{"kind": "near-identical", "images": [name(a), name(b)]} for a, b in found.near]
    _list(problems)
    _list([f"{pair['kind']}: {', '.join(pair['images'])}" for pair in twice])
    if args.to:
        lines = [{"kind": "problem", "what": problem} for problem in problems] + twice
        try:
            with open(args.to, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise UserError(
                f"--to {args.to} cannot be written ({reason(error)}); {remedy(error, 'choose another file')}."
            ) from None
    return 1 if problems else 0


def _is_list(path: str) -> bool:
    """Whether a file is what an earlier `verify` wrote: lines that each say their kind, or none."""
    try:
        with open(path, encoding="utf-8") as file:
            first = file.readline()
        return not first or "kind" in json.loads(first)
    except (OSError, ValueError, TypeError):
        return False


def _refuse_to_write(to: str, index: ShardIndex) -> None:
    """Before hours of decoding: what could not be written then, and what must not be, such as the first of a shell's
    list of shards behind --to."""
    if to.endswith(".tar") or os.path.realpath(to) in map(os.path.realpath, index.paths):
        raise UserError(f"--to {to} is a shard, which a list would replace; write a file such as found.jsonl.")
    if os.path.isfile(to) and not _is_list(to):
        raise UserError(f"--to {to} is there already and is no list of findings; write another file.")
    folder = os.path.dirname(to) or "."
    if os.path.isdir(to) or not os.access(folder, os.W_OK):
        raise UserError(f"--to {to} cannot be written; write a file in a folder that is there and can be written.")


def index_file(args: argparse.Namespace) -> int:
    """Exit code 1 where something is wrong, for scripts."""
    # Of samples that hold several images an index file says nothing; packed by the one that is named, they hold one.
    with told_as("", image="in prelude shards pack SHARDS --to DIR --image "):
        index = ShardIndex(args.shards)
        _refuse_folders(index)
        try:
            written = write_for(index.paths, args.to)
        except OSError as error:
            raise UserError(f"--to {args.to} cannot be written ({reason(error)}); choose another folder.") from None
    print(
        "\n".join(
            f"{counted(index.num_samples, 'sample')} in {counted(index.num_shards, 'shard')}: {path}"
            for path in written
        )
    )
    _list(_problems(index))
    return 1 if index.num_problems else 0


def _refuse_folders(index: ShardIndex) -> None:
    for path in index.paths:
        if isinstance(path, ImageFolder):
            raise UserError(
                f"{path} is a folder of images, which needs no index file; leave it out, or pack it first: prelude "
                f"shards pack {path} --to DIR."
            )


def _index(args: argparse.Namespace) -> ShardIndex:
    """With the channels that are asked for, or as many as there are."""
    with told_as(""):
        index = _labelled(args)
        channels = args.channels or channels_of(index.with_range(args.range))  # of deep values, where they are read
        return index.with_range(args.range, channels=channels)


def _labelled(args: argparse.Namespace) -> ShardIndex:
    image = args.image or ""
    if args.label:
        return ShardIndex(args.shards, args.label, image=image)
    try:
        return ShardIndex(args.shards, "cls", image=image)
    except UserError:  # a folder whose labels are not clear, or what raises again
        return ShardIndex(args.shards, "", image=image)


def _counts(index: ShardIndex, label: str) -> PlainTable:
    table = PlainTable(show_header=False)
    table.add_row("shards", str(index.num_shards))
    table.add_row("samples", str(index.num_samples))
    table.add_row("samples a shard", f"{index.counts.min()} to {index.counts.max()}")
    table.add_row("bytes an image", f"{index.images[:, 1].mean():.0f} on average, {index.images[:, 1].max()} at most")
    labelled = int((index.labels[:, 1] > 0).sum())
    if label or labelled:
        table.add_row(f"with .{index.label}", str(labelled))
    table.add_row("fingerprint", index.fingerprint)
    table.add_row("problems", str(index.num_problems))
    if index.num_lost:
        table.add_row("samples lost", f"about {index.num_lost}")
    if index.unended:
        table.add_row("without an end marker", f"{counted(len(index.unended), 'shard')}: {index.unended[0]} ...")
    return table


def _describe(table: PlainTable, found: Survey, of: str) -> None:
    table.add_section()
    table.add_row(f"undecodable {of}", str(len(found.undecodable)))
    if not found.num_images:
        return
    heights, widths = zip(*found.sizes, strict=True)
    table.add_row(f"height x width {of}", f"{_range(heights)} x {_range(widths)}")
    for (name, channels, bits, frames), count in found.forms.most_common():
        depth = f"{bits} bits" if bits else "depth unknown"
        pages = f", {counted(frames, 'page')}" if frames > 1 else ""
        table.add_row("", f"{count} x {name}, {counted(channels, 'channel')}, {depth}{pages}")
    if found.classes:
        counts = found.classes.values()
        table.add_row(f"labels {of}", f"{len(counts)} different, {min(counts)} to {max(counts)} images each")


def _paste(index: ShardIndex, found: Survey) -> None:
    if found.num_images:
        written = [",".join(f"{value:.4f}" for value in values) for values in (found.mean, found.std)]
        settings = f"data.mean=[{written[0]}] data.std=[{written[1]}]"
        if len(found.mean) != 3:
            settings = f"data.channels={len(found.mean)} {settings}"
        if index.value_range is not None:
            settings += f" data.range=[{','.join(f'{value:g}' for value in index.value_range)}]"
        print(settings)


def _range(values) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _problems(index: ShardIndex) -> list[str]:
    return [
        f"{path}: {problem.reason} at {problem.where}" for path, found in index.problems.items() for problem in found
    ]


def _undecodable(index: ShardIndex, found: Survey) -> list[str]:
    return [f"{index.shard_of(sample)}: {reason} at {index.key(sample)}" for sample, reason in found.undecodable]


def _list(lines: list[str]) -> None:
    for line in lines[:_MOST_LISTED]:
        print(line.encode("utf-8", "backslashreplace").decode())  # names of files may be no text
    if len(lines) > _MOST_LISTED:
        print(f"... and {len(lines) - _MOST_LISTED} more")
