"""The league's record as tables: each method by minutes, who is ahead, which method when, who offers what."""

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from scipy import stats

OFFERED = {  # by the peers' packages, of what we have; what is run here, or why not
    "barlow_twins": ("loss, head, CIFAR-10 benchmark", "loss, class, CIFAR-10 script"),
    "vicreg": ("loss, head, Imagenette benchmark", "loss, class, CIFAR-10 script"),
    "lejepa": ("loss, head, ImageNet benchmark", "loss, class for transformers"),
    "mae": ("parts, Imagenette benchmark", "class"),
    "ijepa": ("an example alone; not run", "class"),
    "simmim": ("an example for plain ViT; our small recipe is a Swin: not run", "class for plain ViT; not run"),
    "msbreg": ("no", "no"),
    "dseqjepa": ("no", "no"),
    "spark": ("no", "no"),
    "fcmae": ("no", "no"),
    "rotation": ("no", "no"),
}
COLUMNS = {"linear": "linear probe, top-1 %", "knn": "k-NN, top-1 %"}
BUSY = 0.05  # share of the cores from which on an entry is marked
OFF = 0.1  # share of the budget from which on a run's time is marked


def refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def read(path: Path) -> dict:
    """What league.py has kept there."""
    try:
        record = json.loads(path.read_text())
        if not isinstance(record["entries"], dict):
            raise ValueError("its entries are no object")
        record["machine"]["cores"], record["shards"], record["settings"]
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        refuse(f"{path} is no record of benchmarks/league.py ({why}); write another file, or measure one.")


def tables(record: dict) -> str:
    entries = [entry for entry in record["entries"].values() if "linear" in entry]
    failed = {key: entry["failed"] for key, entry in record["entries"].items() if "failed" in entry}
    features = ", ".join(record.get("features", []))
    parts = [f"Judged on {features}, of those that an encoder has." if features else ""]
    parts += [by_method(entries, record["untrained"]), ahead(entries), by_minutes(entries), offered(record)]
    parts += ["\n".join(f"- failed: {key}: {why}" for key, why in failed.items())] if failed else []
    return "\n\n".join(filter(None, parts))


def by_method(entries: list[dict], untrained: dict) -> str:
    head = "| method | minutes | arm | settings | " + " | ".join(COLUMNS.values())
    lines = [f"{head} | images seen | images/s | |", f"|---|---:|---|---|{'---:|' * (len(COLUMNS) + 2)}---|"]
    for (method, minutes), group in grouped(entries, "method", "minutes").items():
        rows = grouped(group, "arm", "setting")
        best = {name: max(mean(row, name) for row in rows.values()) for name in COLUMNS}
        for (arm, setting), row in rows.items():
            cells = [cell(row, name, untrained, bold=mean(row, name) == best[name]) for name in COLUMNS]
            seen, speed = (statistics.mean(each[key] for each in row) for key in ("images", "images_per_second"))
            what = [method, f"{minutes:g}", arm, setting, *cells, f"{seen:,.0f}", f"{speed:,.0f}", marks(row)]
            lines.append(f"| {' | '.join(what)} |")
    return "\n".join(lines) if entries else ""


def cell(row: list[dict], name: str, untrained: dict, *, bold: bool) -> str:
    values = [each[name]["top1"] for each in row]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else f" (se {row[0][name]['se']:.1f})"
    text = f"{statistics.mean(values):.1f}{spread}"
    twins = [untrained.get(f"{each['method']}/seed {each['seed']}") for each in row]
    gain = ""
    if all(twins):
        floor = statistics.mean(twin[name]["top1"] for twin in twins)
        gain = f" ({statistics.mean(values) - floor:+.1f})"
    return (f"**{text}**" if bold else text) + gain


def marks(row: list[dict]) -> str:
    found = [f"{len(row)} seeds"] if len(row) > 1 else []
    found += ["to be measured anew"] if any("anew" in each for each in row) else []
    found += [f"busy {max(each['others'] for each in row):.0%}"] if any(each["others"] > BUSY for each in row) else []
    off = max((abs(each["seconds"] / 60 / each["minutes"] - 1) for each in row), default=0)
    return ", ".join(found + ([f"off by {off:.0%}"] if off > OFF else []))


def ahead(entries: list[dict]) -> str:
    """Our arm against the better setting of each peer, over the seeds that both have, but for what is to be measured
    anew."""
    entries = [each for each in entries if "anew" not in each]
    lines = ["| method | minutes | against | its settings | linear probe | k-NN |", "|---|---:|---|---|---|---|"]
    for (method, minutes), group in grouped(entries, "method", "minutes").items():
        arms = grouped(group, "arm")
        us = arms.pop(("prelude",), None)
        for (arm,), theirs in arms.items() if us else ():
            best = max(grouped(theirs, "setting").values(), key=lambda row: mean(row, "linear"))
            told = [difference(us, best, name) for name in COLUMNS]
            lines.append(f"| {method} | {minutes:g} | {arm} | {best[0]['setting']} | {' | '.join(told)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def difference(us: list[dict], them: list[dict], name: str) -> str:
    """Of the means; its 95 % interval from the test sample and, with several seeds, from these: Student's t at the
    degrees of freedom of Welch and Satterthwaite, where those of a test sample are beyond counting."""
    found, variance, by_freedom = mean(us, name) - mean(them, name), 0.0, 0.0
    for row in (us, them):
        values = [each[name]["top1"] for each in row]
        of_mean = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
        variance += row[0][name]["se"] ** 2 + of_mean
        by_freedom += of_mean**2 / max(len(values) - 1, 1)
    half = float(stats.t.ppf(0.975, variance**2 / by_freedom if by_freedom else math.inf)) * math.sqrt(variance)
    return f"{found:+.1f} ± {half:.1f}, {'level' if abs(found) <= half else 'ahead' if found > 0 else 'behind'}"


def by_minutes(entries: list[dict]) -> str:
    """Our arm's linear probe and k-NN by method and budget."""
    us = grouped([each for each in entries if each["arm"] == "prelude"], "method", "minutes")
    budgets = sorted({minutes for _, minutes in us})
    if not budgets:
        return ""
    lines = ["| method | " + " | ".join(f"{minutes:g} min" for minutes in budgets) + " |"]
    lines.append("|---" * (1 + len(budgets)) + "|")
    for method in dict.fromkeys(method for method, _ in us):
        rows = [us.get((method, minutes)) for minutes in budgets]
        cells = [f"{mean(row, 'linear'):.1f}, {mean(row, 'knn'):.1f}" if row else "" for row in rows]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def offered(record: dict) -> str:
    peers = [f"{name} {record['versions'].get(name, '(not installed)')}" for name in ("lightly", "stable-pretraining")]
    lines = ["| method | " + " | ".join(peers) + " |", "|---|---|---|"]
    return "\n".join(lines + [f"| {method} | {' | '.join(what)} |" for method, what in OFFERED.items()])


def grouped(entries: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for entry in entries:
        found.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return found


def mean(row: list[dict], name: str) -> float:
    return statistics.mean(each[name]["top1"] for each in row)
