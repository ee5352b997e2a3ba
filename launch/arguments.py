"""What doors are told on the command line: how help looks, where words may stand, and options that several doors share.

Nothing here imports torch, and a door reads its arguments before it does: help and a wrong word are answered at once.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence

from pydantic import ValidationError

from prelude.checkpoints.source_names import expanded
from prelude.data.absent import refuse_absent
from prelude.data.class_list import read_classes
from prelude.data.errors import UserError
from prelude.pretrain import overrides
from prelude.pretrain.config import DataConfig, SelectConfig
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.config_words import sentences
from prelude.pretrain.data_sheets import KNOWN
from prelude.pretrain.recipe_yaml import written

ENCODERS = (
    "a run folder (its newest checkpoint), a checkpoint or export folder, a file or folder of published weights "
    "(FILE#WORD says what it does not tell), timm:NAME, hf-hub:ID, local-dir:FOLDER, "
    "random:SOURCE (the same architecture, untrained), start:RUN (what a run started from)"
)
SOURCES = f"{ENCODERS}, or pixels, pixels:SIZE"
FEATURES = (
    "cls, mean, last4, last4x2 of a vision transformer; pool, stages, stagesx2, stage2, stage2x4 of others "
    "(default: those that suit each encoder)"
)
KINDS = ("cls", "mean", "last4", "pool", "stages")
OUT = "where results are written (default: RUN/evaluations)"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")
_NUMBER = re.compile(r"\d+")
_SHARD = re.compile(r"\.(tar|tgz)\b|[*?{]|::|://")


def documented_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a door's docstring: its first line above the arguments, the rest below, as written."""
    first, _, rest = doc.partition("\n\n")
    return DoorParser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)


class DoorParser(argparse.ArgumentParser):
    """Takes `--range -1000,400`, whose value argparse before Python 3.14 holds for an option."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments in any order: settings stand on both sides of options, and a shell's `train-*.tar` may follow one."""
    words = _each_with_its_option(parser, sys.argv[1:] if argv is None else argv)
    if not any(action.dest == "overrides" for action in parser._actions):
        return with_settings_once(parser.parse_intermixed_args(words))
    settings = [word for word in words if _OVERRIDE.match(word)]
    args = parser.parse_intermixed_args([word for word in words if not _OVERRIDE.match(word)])
    args.overrides = [*args.overrides, *_gathered(settings)]
    return args


def with_settings_once(args: argparse.Namespace) -> argparse.Namespace:
    """Those behind `--set` and `--finetune RECIPE`, as those of a door that takes them anywhere."""
    if given := getattr(args, "set", None):
        args.set = _gathered(given)
    if recipes := getattr(args, "finetune", None):
        args.finetune = [[recipe, *_gathered(words)] for recipe, *words in recipes]
    return args


def parse_present(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The same, of a door that takes shards. Raises UserError for such that plainly are not there."""
    args = parse(parser, argv)
    for action in parser._actions:
        if isinstance(action, Shards) and (given := getattr(args, action.dest)):
            refuse_absent(given, f"{action.option_strings[0]} ")
    return args


class Shards(argparse.Action):
    """A pattern, or a list of several: the option may be given, or go on, more than once."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        if before is not None:
            values = [*(before if isinstance(before, list) else [before]), values]
        setattr(namespace, self.dest, values)


def offering(action: argparse.Action, values: Iterable[str]) -> None:
    """What a shell may complete there, of an option that is checked later, or that takes more than these."""
    action.offered = tuple(values)


def path(text: str) -> str:
    return os.path.expanduser(text)


def value_range(text: str) -> tuple[float, float] | str:
    """Of `--range`."""
    try:
        return "auto" if text == "auto" else DataConfig(shards="any", range=json.loads(f"[{text}]")).range
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no range; write LOW,HIGH, such as 0,4095, or auto") from None


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Of an option that takes whole numbers from `least` on, up to `most` where that is given."""

    def number(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            found = None
        if found is None or found < least or (most is not None and found > most):
            wanted = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} cannot be; write a whole number {wanted}")
        return found

    return number


seed = whole(0, 2**31 - 1)


def finite(text: str) -> float:
    """Of an option that takes any number but infinity and what is none."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be; write a finite number")
    return found


def above_zero(text: str) -> float:
    """Of an option that takes finite numbers above 0."""
    if (found := finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be; write a number above 0")
    return found


def from_zero(text: str) -> float:
    """Of an option that takes 0 and finite numbers above it."""
    if (found := finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be; write 0 or a number above it")
    return found


def percent(text: str) -> float:
    """Of an option that takes a share in percent, but not nothing."""
    if not 0 < (found := finite(text)) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be; write a number above 0, of 100 at most")
    return found


def source(text: str) -> str:
    """Of an option or argument that takes one, as `encoder.weights` does."""
    return expanded(text)


def add_config(parser: argparse.ArgumentParser) -> None:
    """What doors that train take."""
    parser.add_argument("--config", required=True, type=path, help="a YAML file, or the name of a recipe in configs/")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("--ranks", type=whole(1), metavar="N", help="of a dry run: as if N ranks had been started")
    device = parser.add_argument("--device", metavar="NAME", help="of a dry run: as on an h100, a100, l40s or another")
    offering(device, (known.name for known in KNOWN))
    parser.add_argument("--measure", action="store_true", help="of a dry run: take a few steps, and tell the time")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it; the environment says more
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the config's")


def refuse_without_dry_run(args: argparse.Namespace) -> None:
    """Raises UserError for what only a dry run reads."""
    for name in ("ranks", "device", "measure"):
        if getattr(args, name) and not args.dry_run:
            raise UserError(f"--{name} is read by a dry run only; add --dry-run, or leave it out.")
    if args.device and args.measure:
        raise UserError("--measure times this machine, and --device is another one; write one of the two.")


def add_labelled(parser: argparse.ArgumentParser, *, label: str = "", default: str = "the run's evaluate section"):
    """The shards to be judged on. label: the help of --label."""
    train, test = (f"labelled shards to {what} (default: {default})" for what in ("learn from", "report on"))
    parser.add_argument("--train", action=Shards, metavar="SHARDS", help=train)
    parser.add_argument("--test", action=Shards, metavar="SHARDS", help=test)
    label = label or "where the class is: cls, txt, json:FIELD, ... (default: the run's evaluate section, else cls)"
    parser.add_argument("--label", metavar="EXT", help=label)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Which images and classes of the labelled shards."""
    for name in ("train", "test"):
        add_select(parser, f"--{name}-select", name)
    parser.add_argument("--classes", type=path, metavar="FILE", help="names in the order of their numbers, one a line")
    add_image(parser)


def add_select(parser: argparse.ArgumentParser, option: str, whole: str) -> None:
    """whole: what a part is taken of, in a word."""
    parser.add_argument(
        option,
        action="append",
        metavar="KEY=VALUE",
        help=f"a part of {whole}: keys=FILE, label=NAME with values=[...], share=0.1, seed=N",
    )


def add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="EXT", help="the image of samples that hold several, such as left.jpg")


def chosen(args: argparse.Namespace) -> dict:
    """What `add_choice` was told, as `labelled_shards` takes it; parts as a config has them. Raises UserError."""
    found = {"image": args.image}
    for name in ("train_select", "test_select"):
        found[name] = select_section(getattr(args, name), f"--{name.replace('_', '-')}")
    if args.classes:
        found["classes"] = read_classes(args.classes)
    return found


def select_section(words: Sequence[str] | None, option: str) -> SelectConfig | None:
    if not words:
        return None
    values: dict = {}
    for word in words:
        overrides.apply(values, f"data.select.{word}", Keys())
    try:
        return SelectConfig.model_validate(values["data"]["select"])
    except ValidationError as error:
        (sentence, *_) = sentences(error, values, Keys(), above=("data", "select"))
        raise UserError(sentence.replace("data.select", option)) from None


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Of shards behind a URL."""
    parser.add_argument(
        "--cache-dir", type=path, metavar="DIR", help="where remote shards are kept (default: in $PRELUDE_CACHE)"
    )
    parser.add_argument("--cache-gib", type=above_zero, metavar="N", help="of them at most (default: 64)")


def door_parser(
    doc: str, *, sources: str = SOURCES, out: str = OUT, label: str = "", features: str = FEATURES
) -> argparse.ArgumentParser:
    """A parser whose help is a door's docstring, with the arguments that every evaluation takes.

    sources, out, label, features: the help of these.
    """
    parser = documented_parser(doc)
    parser.add_argument("sources", nargs="+", type=source, metavar="SOURCE", help=sources)
    add_labelled(parser, label=label)
    add_choice(parser)
    add_range(parser)
    offering(parser.add_argument("--features", nargs="+", metavar="KIND", help=features), KINDS)
    parser.add_argument("--bank", type=path, metavar="DIR", help="where features are kept (default: RUN/bank)")
    parser.add_argument("--out", type=path, metavar="DIR", help=out)
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of every random choice and of random: (default: 0)"
    )
    parser.add_argument(
        "--seeds", type=whole(1), default=1, metavar="N", help="mean and spread over N seeds (default: 1)"
    )
    add_reading(parser)
    return parser


def add_range(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument(
        "--range",
        type=value_range,
        metavar="LOW,HIGH",
        help="values of 16-bit images that are black and white, or auto (default: data.range of the run's config)",
    )
    offering(action, ["auto"])


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How images are read, by a door that several ranks may share."""
    parser.add_argument(
        "--num-workers",
        type=whole(0),
        metavar="N",
        help="processes that read images (default: a rank's share of the cores)",
    )
    parser.add_argument("--batch-size", type=whole(1), default=256, metavar="N", help="(default: 256)")
    parser.add_argument(
        "--timeout-seconds",
        type=above_zero,
        metavar="N",
        help="how long to wait for images that do not come (default: 300)",
    )
    add_cache(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it; the environment says more


def _each_with_its_option(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """`--train a.tar b.tar` as `--train a.tar --train b.tar`. Only what looks like shards goes on with the option, so
    that a source or a setting may stand behind it."""
    options = {name for action in parser._actions if isinstance(action, Shards) for name in action.option_strings}
    found, option, first = [], None, False
    for word in words:
        if word.startswith("-"):
            option, first = (word, True) if word in options else (None, False)
        elif option and not first and _SHARD.search(word) and not _OVERRIDE.match(word):
            found.append(option)
        elif first:
            first = False
        else:
            option = None
        found.append(word)
    return found


def _gathered(settings: list[str]) -> list[str]:
    """The shell makes several words of `data.shards=train-{0..9}.tar` without quotes; they are one list again. Any
    other key that is set twice is refused, and so are other values for shards: which is meant nobody knows. Words that
    set nothing stay, for whoever refuses them."""
    values: dict[str, list[str]] = {}
    others = [word for word in settings if "=" not in word]
    keys = [word.partition("=")[0] for word in settings if "=" in word]
    for word in settings:
        key, equals, value = word.partition("=")
        if equals:
            values.setdefault(key, []).append(value)
    for key, given in values.items():
        if len(given) == 1:
            continue
        in_a_row = keys[keys.index(key) :][: len(given)] == [key] * len(given)
        if key.endswith("shards") and not (in_a_row and _numbered(given)):
            listed = json.dumps(given[:3] + ["..."] if len(given) > 3 else given)
            raise UserError(
                f"{key} is set {len(given)} times; write it once, and where all are meant as '{key}={listed}'."
            )
        if not key.endswith("shards"):
            raise UserError(f"{key} is set {len(given)} times, to {' and '.join(given)}; write it once.")
    return [*(f"{key}={written(given) if len(given) > 1 else given[0]}" for key, given in values.items()), *others]


def _numbered(values: list[str]) -> bool:
    """Whether they differ in a number alone, as what a shell makes of {000..009} does."""
    return len({_NUMBER.sub("#", value) for value in values}) == 1 and len(set(values)) == len(values)
