"""Who learns most for the same minutes: our engine and its peers, method by method, on the same pictures and cores.

    python benchmarks/league.py --data 'DATA/train-{000000..000019}.tar' --test 'DATA/test-{000000..000004}.tar' \\
        --minutes 5 10 20 --seeds 0 1 2 --methods barlow_twins mae --arms prelude lightly stable-pretraining
    python benchmarks/league.py --table                    (prints what the record holds)
    python benchmarks/league.py --smoke --work /tmp/toy    (all of it at toy size, whose figures say nothing)

An entry is one method by one arm at one setting, with one seed, for one budget of minutes of training; it is written
as soon as it is judged, and the same command goes on where it stopped. Peers are run at their own settings (`their`)
and at ours (`ours`), on the same encoder. They may live in an interpreter of their own, see --peers-python.

Each budget is a run of its own, whose schedule ends with it: a longer run looked at halfway has not yet lowered its
rate, which no one with that budget would do. So a run is told its number of steps before it starts, from the speed of
the newest run of the same arm, setting and method, and at first from that of a few steps; all arms by the same rule.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # so that it runs as a script from anywhere

import torch  # noqa: E402
from league_arms import (  # noqa: E402
    PEERS,
    TRIED_STEPS,
    WAYS,
    Failed,
    OtherWork,
    Training,
    num_pictures,
    pictures_of,
    recipe,
    train,
    versions,
)
from league_judge import judged, trained, untrained  # noqa: E402
from league_table import OFFERED, read, refuse, tables  # noqa: E402

from prelude.data.errors import UserError  # noqa: E402
from prelude.data.host import num_cores  # noqa: E402
from prelude.data.shapes import write_shards  # noqa: E402
from prelude.data.shards import ShardIndex  # noqa: E402
from prelude.data.whole_files import write_whole  # noqa: E402
from prelude.evaluators.features.extraction import is_kind, kinds_among  # noqa: E402

ARMS = ("prelude", *PEERS)
METHODS = ("mae", "barlow_twins", "vicreg", "lejepa", "ijepa")  # those that a peer has, by default
OFFERS = {"lightly": METHODS[:-1], "stable-pretraining": METHODS}
SMOKE_STEPS, SMOKE = 4, ("train.global_batch=16", "train.precision=fp32")


def main() -> int:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    record = read(args.out) if args.out.is_file() else {}
    if args.table:
        print(tables(record) if record else f"{args.out} is not there yet")
        return 0
    check_features(args)
    if args.smoke:
        args.data, args.test = (str(args.work / "shapes" / f"{split}-*.tar") for split in ("train", "test"))
        for split, count in (("train", 64), ("test", 32)):
            write_shards(args.work / "shapes", split, count)
    record = begun(args, record)
    pictures = args.work / f"pictures-{record['fingerprints']['data'][:12]}"
    if any(arm in PEERS for arm in args.arms):
        pictures_of(args.data, pictures)
    failures = 0
    for method, arm, setting, seed, minutes in plan(args, record["versions"]):
        key = key_of(method, arm, setting, seed, minutes)
        found = record["entries"].get(key, {"failed": ""})
        is_due = "failed" in found or "anew" in found
        if not (is_due or (is_unjudged(found) and not args.train_only)):
            continue
        of = {"method": method, "arm": arm, "setting": setting, "seed": seed, "data": args.data, "pictures": pictures}
        of |= {"python": args.peers_python, "changes": args.set}
        if is_due:
            wait_for_cores(args.busy)
            record["entries"][key] = found = measured(args, record, of, minutes)
            keep(record, args.out)
        entry = found if "failed" in found or args.train_only else found | judged_run(args, record, of, found)
        record["entries"][key] = entry
        failures += "failed" in entry
        keep(record, args.out)
        print(f"{key}: {told(entry)}\n\n{tables(record)}\n", flush=True)
    if not args.train_only:
        judge_twins(args, record)
    print(tables(record))
    return 1 if failures else 0


def plan(args: argparse.Namespace, installed: dict) -> Iterator[tuple]:
    """Short budgets and first seeds of all before the longer ones."""
    for minutes, seed, method, arm in product(args.minutes, args.seeds, args.methods, args.arms):
        if arm == "prelude":
            yield method, arm, "ours", seed, minutes
        elif method in OFFERS[arm] and arm in installed:
            for setting in args.settings:
                yield method, arm, setting, seed, minutes


def key_of(method: str, arm: str, setting: str, seed: int, minutes: float) -> str:
    return f"{named(method)}/{arm}/{setting}/seed {seed}/{minutes:g} min"


def measured(args: argparse.Namespace, record: dict, of: dict, minutes: float) -> dict:
    """One entry: trained, and what is needed to redo it; or why it failed."""
    about = {key: of[key] for key in ("method", "arm", "setting", "seed")} | {"minutes": minutes}
    about["method"] = named(of["method"])
    try:
        way, speed = way_of(args, record, of)
        steps = SMOKE_STEPS if args.smoke else round(60 * minutes * speed["images_per_second"] / speed["batch"])
        training = Training(**of, steps=max(steps, 1), way=way, folder=folder_of(args, about))
        load, found = os.getloadavg()[0], train(training)
    except (Failed, UserError) as error:
        return about | {"failed": str(error), "log": str(folder_of(args, about) / "log.txt")}
    speed["images_per_second"] = found.batch * found.steps / found.seconds
    run = asdict(found) | {
        "images": found.batch * found.steps,
        "images_per_second": round(found.batch * found.steps / found.seconds, 1),
    }
    when = {"date": time.strftime("%Y-%m-%d %H:%M"), "load": round(load, 2), "command": shlex.join(sys.argv)}
    return about | run | {"way": dict(way)} | when


def judged_run(args: argparse.Namespace, record: dict, of: dict, entry: dict) -> dict:
    """By evaluator, of a run that is trained."""
    told = {key: entry[key] for key in ("steps", "way")}
    encoder = trained(Training(**of, **told, folder=folder_of(args, entry)))
    return judged(encoder, args.data, args.test, kinds=args.features, seed=of["seed"])


def judge_twins(args: argparse.Namespace, record: dict) -> None:
    """The untrained encoder of every method and seed that has a judged entry, once; after all entries, which they are
    of no use without."""
    for method, *arm, seed, minutes in plan(args, record["versions"]):
        twin = f"{named(method)}/seed {seed}"
        entry = record["entries"].get(key_of(method, *arm, seed, minutes), {})
        if "linear" in entry and twin not in record["untrained"]:
            encoder = untrained(method, seed, args.set)
            record["untrained"][twin] = judged(encoder, args.data, args.test, kinds=args.features, seed=seed)
            keep(record, args.out)


def is_unjudged(entry: dict) -> bool:
    return "failed" not in entry and "linear" not in entry


def folder_of(args: argparse.Namespace, about: dict) -> Path:
    return (
        args.work / "-".join(f"{about[key]}" for key in ("method", "arm", "setting", "seed")) / f"{about['minutes']:g}"
    )


def way_of(args: argparse.Namespace, record: dict, of: dict) -> tuple[dict, dict]:
    """How an arm shares the cores with a method, tried once at the first setting, the fastest kept; and its speed."""
    arm = f"{named(of['method'])}/{of['arm']}"
    setting = f"{arm}/{of['setting']}"
    ways = WAYS[of["arm"]][-1:] if args.smoke else WAYS[of["arm"]]
    if args.smoke and of["arm"] in PEERS:  # whose start takes longer than all the rest
        return ways[0], {"images_per_second": 1.0, "batch": 1}
    if arm not in record["ways"]:
        tried = [{"way": way, **speed_of(args, of, way)} for way in ways]
        best = max(tried, key=lambda each: each["images_per_second"])
        record["ways"][arm] = {"way": best["way"], "tried": tried}
        record["speeds"][setting] = {key: best[key] for key in ("images_per_second", "batch")}
        keep(record, args.out)
    way = record["ways"][arm]["way"]
    if setting not in record["speeds"]:
        record["speeds"][setting] = speed_of(args, of, way)
        keep(record, args.out)
    return way, record["speeds"][setting]


def speed_of(args: argparse.Namespace, of: dict, way: dict) -> dict:
    steps = SMOKE_STEPS if args.smoke else TRIED_STEPS
    found = train(Training(**of, steps=steps, way=way, folder=args.work / "trial", trial=True))
    what = " ".join(str(of[key]) for key in ("method", "arm", "setting"))
    print(f"{what}: {way}: {found.images_per_second:.0f} images/s", file=sys.stderr, flush=True)
    return {"images_per_second": round(found.images_per_second, 2), "batch": found.batch}


def wait_for_cores(share: float) -> None:
    """Refuses to measure beside others. share: of the cores, from which on they are too much."""
    if share >= 1:
        return
    watch = OtherWork()
    time.sleep(2)
    if (others := watch.share()) > share:
        raise SystemExit(
            f"other processes take {others:.0%} of the cores; run this again when they are done, or write --busy 1 to "
            "measure beside them, which the table then says."
        )


def check_features(args: argparse.Namespace) -> None:
    """Before minutes are spent on what cannot be judged. Exits where an encoder has none of the features."""
    if unknown := [kind for kind in args.features if not is_kind(kind)]:
        refuse(f"--features {unknown[0]} is no kind of feature; docs/evaluators.md lists them.")
    for method in args.methods if args.features else ():
        encoder = untrained(method, 0, args.set)
        try:
            kinds_among(encoder.model, args.features, named(method))
        except UserError as error:
            refuse(str(error))


def begun(args: argparse.Namespace, record: dict) -> dict:
    """The record, new or gone on with. Exits where it was made on another machine or other pictures."""
    cpu = next((line for line in open("/proc/cpuinfo") if line.startswith("model name")), ":").partition(":")[2].strip()
    machine = {"cpu": cpu or platform.processor(), "cores": num_cores(), "torch": torch.__version__}
    fingerprints = {split: ShardIndex(getattr(args, split), "cls").fingerprint for split in ("data", "test")}
    data = {"data": args.data, "test": args.test, "num_pictures": num_pictures(args.data), **fingerprints}
    same = {"machine": machine, "fingerprints": fingerprints, "settings": [*args.set]}
    features = {"features": [*args.features]}
    if record and any("linear" in each for each in (*record["entries"].values(), *record["untrained"].values())):
        same |= features
    for name, here in same.items():
        if record and (then := record.get(name, [])) != here:
            refuse(f"{args.out} was begun with {name} {then}, here it is {here}; write another --out.")
    recipes = {named(method): digest_of(method, args.set) for method in args.methods}
    for name, digest in recipes.items():
        if record.get("recipes", {}).get(name, digest) == digest:
            continue
        if has_measured(record, name):
            refuse(
                f"{args.out} has measured another recipe {name}; write another --out, or give the file another name."
            )
        for kind in ("ways", "speeds"):  # of the other one
            record[kind] = {key: value for key, value in record[kind].items() if not key.startswith(f"{name}/")}
    try:
        installed = versions(args.peers_python)
    except (OSError, subprocess.CalledProcessError) as error:
        refuse(
            f"--peers-python {args.peers_python} cannot be started ({error}); write an interpreter that has the peers."
        )
    for arm in args.arms:
        if arm in PEERS and arm not in installed:
            print(f"{arm} is not installed for {args.peers_python}: its arm is left out", file=sys.stderr)
    empty = {"ways": {}, "speeds": {}, "untrained": {}, "entries": {}}
    told = {"shards": data, "versions": record.get("versions", {}) | installed}
    told |= {"recipes": record.get("recipes", {}) | recipes}
    return empty | record | same | features | told


def has_measured(record: dict, name: str) -> bool:
    entries = record["entries"].items()
    return any(key.startswith(f"{name}/") and "failed" not in entry for key, entry in entries)


def digest_of(method: str, changes: list[str]) -> str:
    """Of all settings of a recipe: its file may be another one tomorrow, under the same name."""
    settings = json.dumps(recipe(method, changes).model_dump(mode="json"), sort_keys=True)
    return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()


def named(method: str) -> str:
    return Path(method).stem if method.endswith(".yaml") else method


def a_method(text: str) -> str:
    if text in OFFERED or (text.endswith(".yaml") and Path(text).is_file()):
        return text
    raise argparse.ArgumentTypeError(f"{text} is neither of {', '.join(OFFERED)} nor the file of a recipe")


def told(entry: dict) -> str:
    if is_unjudged(entry):
        return f"trained on {entry['images']:,} images in {entry['seconds']:.0f} s, not yet judged"
    if "failed" in entry:
        return f"failed: {entry['failed']}"
    return f"linear {entry['linear']['top1']:.1f}, k-NN {entry['knn']['top1']:.1f}, {entry['images']:,} images"


def keep(record: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="SHARDS", help="labelled; training reads no label")
    parser.add_argument("--test", metavar="SHARDS")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20], metavar="N", help="(default: 5 10 20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    methods = f"of {', '.join(OFFERED)}; or the file of a recipe, which our arm alone trains"
    parser.add_argument("--methods", nargs="+", type=a_method, default=METHODS, metavar="NAME", help=methods)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--settings", nargs="+", choices=("their", "ours"), default=("their", "ours"), help="of peers")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key.sub=value", help="settings of our recipes, for all"
    )
    features = "that the judge looks at, of those that an encoder has (default: those that suit it)"
    parser.add_argument("--features", nargs="+", default=[], metavar="KIND", help=features)
    parser.add_argument("--peers-python", default=sys.executable, metavar="FILE", help="interpreter that has the peers")
    parser.add_argument("--busy", type=float, default=0.2, metavar="SHARE", help="of the cores that others may take")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "league", metavar="DIR", help="of runs and logs")
    default = Path(__file__).resolve().parent / "records" / "league.json"
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the record (default: {default.name} in records/)")
    parser.add_argument("--train-only", action="store_true", help="judge nothing yet: a later start does, on any cores")
    parser.add_argument("--table", action="store_true", help="print the record's tables, and measure nothing")
    parser.add_argument("--smoke", action="store_true", help="all of it at toy size, on made pictures")
    args = parser.parse_args()
    args.work, args.features = args.work.resolve(), sorted({*args.features})
    args.out = args.out or (args.work / "smoke.json" if args.smoke else default)
    if args.smoke:
        args.seeds, args.minutes, args.busy, args.set = args.seeds[:1], args.minutes[:1], 1.0, [*args.set, *SMOKE]
    elif not (args.table or (args.data and args.test)):
        parser.error("there is nothing to learn from; write --data SHARDS and --test SHARDS")
    return args


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        refuse(str(error))
