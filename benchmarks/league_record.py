"""The record: the recipe of this engine whose encoder has the best linear probe after so many minutes of two cores.

    python benchmarks/league_record.py --minutes 20

Reads what league.py has measured, and takes the best of our entries with three seeds or more. It becomes the record for
its machine's number of cores where it beats the one before, judged on the same features, by more than the larger
deviation over seeds of the two, and is written to benchmarks/records/ with every seed's figures, command, commit and
curve of the loss. Entries beside which other processes took more than 5 % of the cores, or which missed their minutes
by more than a tenth, are no records. Exit code 0 where there is a new record, 1 where the old one stays.
"""

import argparse
import json
import statistics
from pathlib import Path

from league_table import BUSY, OFF, grouped, mean, read

RECORDS = Path(__file__).resolve().parent / "records"
LEAST_SEEDS = 3


def main() -> int:
    args = parse_arguments()
    measured = read(args.measured)
    place = args.folder / f"linear-{args.minutes:g}min-{measured['machine']['cores']}cores.json"
    old = json.loads(place.read_text()) if place.is_file() else None
    best, why_not = best_of(measured, args.minutes)
    if best is None:
        print(f"no recipe can be a record yet: {why_not or 'nothing of ours was measured for so long'}")
        return 1
    about = {key: measured.get(key, []) for key in ("machine", "shards", "settings", "features")}
    for key in ("settings", "features"):
        if old and old.get(key, []) != about[key]:
            print(f"the record was measured with {key} {old.get(key, [])}, this with {about[key]}: not to be compared")
            return 1
    for key, of in (("shards", ("data", "test")), ("machine", ("cpu", "cores"))):
        then, now = ({name: each[key].get(name) for name in of} for each in (old or about, about))
        if then != now:
            print(f"the record was measured on {key} {then}, this on {now}: not to be compared")
            return 1
    told = f"{best[0]['method']}: {mean(best, 'linear'):.1f} ± {spread(best):.1f} over {len(best)} seeds"
    if old and not beats(best, old["entries"]):
        before = old["entries"]
        print(f"{told}; the record stays {old['method']}: {mean(before, 'linear'):.1f} ± {spread(before):.1f}")
        return 1
    record = {"method": best[0]["method"], "minutes": args.minutes, **about, "entries": best}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{told}: a new record, written to {place}")
    return 0


def best_of(measured: dict, minutes: float) -> tuple[list[dict] | None, str]:
    """The seeds of the best recipe that may be a record, and why others may not."""
    entries = [each for each in measured["entries"].values() if "linear" in each]
    ours = [each for each in entries if each["arm"] == "prelude" and each["minutes"] == minutes]
    fit, why_not = [], []
    for (method,), row in grouped(ours, "method").items():
        sound = [each for each in row if is_sound(each)]
        if len(sound) >= LEAST_SEEDS:
            fit.append(sound)
        else:
            why_not.append(f"{method} has {len(sound)} sound seeds of {len(row)}, of {LEAST_SEEDS} that it needs")
    return max(fit, key=lambda row: mean(row, "linear"), default=None), "; ".join(why_not)


def is_sound(entry: dict) -> bool:
    return entry["others"] <= BUSY and abs(entry["seconds"] / 60 / entry["minutes"] - 1) <= OFF


def beats(new: list[dict], old: list[dict]) -> bool:
    return mean(new, "linear") - mean(old, "linear") > max(spread(new), spread(old))


def spread(row: list[dict]) -> float:
    return statistics.stdev(each["linear"]["top1"] for each in row)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, metavar="N", help="of training (default: 20)")
    measured = RECORDS / "league.json"
    parser.add_argument(
        "--measured", type=Path, default=measured, metavar="FILE", help="(default: records/league.json)"
    )
    parser.add_argument("--folder", type=Path, default=RECORDS, metavar="DIR", help="of records (default: records/)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
