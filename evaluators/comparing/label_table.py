"""Several findings by label: how often each is there, and how well it is told by each encoder."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.text import Text

from prelude.evaluators.results import Result
from prelude.evaluators.table_text import PlainTable


def print_labels(results: Sequence[Result], console: Console | None = None) -> None:
    """One row a label: positives in train and test, and AUC by the features that each encoder chose (first seed)."""
    table = PlainTable(box=box.SIMPLE, title="AUC % by label", pad_edge=False, collapse_padding=True)
    table.add_column("label", overflow="fold", min_width=6)
    for name in ("positives in train", "in test"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_column(Text(result.encoder["name"]), justify="right", overflow="fold")
    found = [labels_of(result.outcome.details, result.outcome.chosen) for result in results]
    for label, numbers in found[0].items():
        aucs = [f"{each[label]['auc']:.1f}" if "auc" in each[label] else "–" for each in found]
        aside = "" if numbers["counted"] else " (not in the mean)"
        counts = [str(numbers[key]) for key in ("num_present_train", "num_present")]
        table.add_row(f"{label}{aside}", *counts, *aucs)
    (console or Console()).print(table)


def labels_of(details: Mapping, chosen: Mapping) -> dict[str, dict]:
    """What a result of `multilabel` holds about each label, of the kind of feature that was chosen."""
    kind = chosen["features"].split(", ")[0]
    return details["by_features"][kind]["by_label"]


def positives(result: Mapping) -> str:
    """A sentence on a result's JSON: positives of each label in train and test, and which labels are in the mean."""
    found = labels_of(result["details"], result["chosen"])
    shown = []
    for label, numbers in found.items():
        aside = "" if numbers["counted"] else " (not in the mean)"
        shown.append(f"{label} {numbers['num_present_train']} / {numbers['num_present']}{aside}")
    return f"Positives in train / test: {', '.join(shown)}."
