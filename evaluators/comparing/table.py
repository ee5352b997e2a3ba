"""A comparison as rows and columns: for the console, for Markdown, and as JSON.

- A column is an evaluator's headline. The best pretrained encoder of a column is bold, several that are equal all are.
- After a number comes its spread or standard error, the kind of feature that it is of, then in brackets the gain over
  the same architecture untrained by that kind.
- Names, notes and commands come from file names and recipes of others: none of them can become markup.
- Pretrained encoders come first, by objective in the order in which these were named; then what they started from,
  untrained ones and floors.
- Where it was asked what is kept, the old images have such a table too, and a third says what going on has changed.
"""

import html
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prelude.evaluators.comparing.comparison import Comparison, Entry
from prelude.evaluators.comparing.headline import evaluator_name, gain, headline, leads, number_name
from prelude.evaluators.comparing.label_table import positives
from prelude.evaluators.comparing.paired import pairs, sentences, unlike_encoders
from prelude.evaluators.comparing.retention import SIDES, Change, Side, changes, evaluators_of, gone_on, seen
from prelude.evaluators.table_text import fits, folded, print_plain, print_whole

NOTHING = "–"
CHANGES = (
    "Won, lost: the 95 % interval of the change from the untouched encoder, by the same kind of feature, leaves out 0; "
    "else level on the new images and kept on the old. ± behind a change is half of that interval; where one of the "
    "two numbers has none, there is no verdict."
)
SEEDS = (
    "Behind “seeds” stands the deviation over pretrainings that differ in their seed, of which the number is the mean."
)
_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[-+#=]|(?<=^\d)[.)]")


@dataclass(frozen=True)
class Cell:
    text: str
    kind: str  # of feature
    gain: str  # over the untrained encoder; "" where there is none to compare with
    best: bool


def title_of(comparison: Comparison, evaluator: str) -> str:
    """`linear probe, top-1 %`."""
    measured = next(filter(None, (headline(entry, evaluator) for entry in comparison.entries)), None)
    return ", ".join([evaluator_name(evaluator), *([number_name(evaluator, measured.number)] if measured else [])])


def in_order(comparison: Comparison) -> list[Entry]:
    objectives = list(dict.fromkeys(entry.objective for entry in comparison.entries if entry.kind == "pretrained"))
    kinds = ("pretrained", "untouched", "untrained", "floor")

    def place(entry: Entry) -> tuple[int, int]:
        return kinds.index(entry.kind), objectives.index(entry.objective) if entry.kind == "pretrained" else 0

    return sorted(comparison.entries, key=place)


def cells(comparison: Comparison, entry: Entry) -> list[Cell]:
    """One for each of `comparison.evaluators`."""
    found = []
    for evaluator in comparison.evaluators:
        number, more = headline(entry, evaluator), gain(entry, evaluator, comparison)
        if number is None:
            found.append(Cell(NOTHING, "", "", False))
            continue
        text = ", ".join(filter(None, (number.text, number.seeds)))
        marked = leads(entry, evaluator, comparison)
        found.append(Cell(text, number.kind, "" if more is None else f"{more:+.1f}", marked))
    return found


def notes(comparison: Comparison) -> list[str]:
    """What the numbers do not say: which entries have none, and every warning, each said once."""
    problems = [f"{entry.name}: {entry.problem}" for entry in comparison.entries if entry.problem]
    told: dict[str, list[str]] = {}
    for entry in comparison.entries:
        for place, results in (("", entry.results), (" on the old images", entry.kept)):
            for name, result in results.items():
                for warning in result.get("warnings", []):
                    told.setdefault(warning, []).append(f"{entry.name} ({name.replace('_', ' ')}{place})")
    warnings = [f"{', '.join(where) if len(where) < 4 else 'All or most'}: {text}" for text, where in told.items()]
    findings = [entry.results["multilabel"] for entry in comparison.entries if "multilabel" in entry.results]
    said = [*unlike_encoders(comparison), *map(positives, findings[:1]), *comparison.warnings]
    return [*problems, *said, *warnings]


def markdown(comparison: Comparison) -> str:
    """A table for GitHub, with what was compared, on what, and by which command."""
    lines = _rows(comparison)
    if comparison.old_data:
        lines += ["", "On the old images:", "", *_rows(seen(comparison, "old")), "", *_rows_of_changes(comparison)]
    encoders = {entry.name: entry.encoder for entry in in_order(comparison) if entry.kind == "pretrained"}
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+|$", comparison.command)))
    lines += ["", f"{_explanation(comparison)}", *_in_paragraphs(comparison), "", fence, comparison.command, fence]
    lines += ["", *(f"- {plain(name)}: {plain(encoder)}" for name, encoder in encoders.items() if encoder)]
    lines += ["", *(f"- {plain(note)}" for note in notes(comparison))] if notes(comparison) else []
    return "\n".join(lines) + "\n"


def _in_paragraphs(comparison: Comparison) -> list[str]:
    found = sentences(comparison)
    return ["", *(f"- {plain(sentence)}" for sentence in found)] if found else []


def _rows(comparison: Comparison) -> list[str]:
    titles = [plain(title_of(comparison, name)) for name in comparison.evaluators]
    columns = ["encoder", "objective", "images seen", *titles]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * 2}{'---:|' * (len(columns) - 2)}"]
    for entry in in_order(comparison):
        images = f"{entry.cost.num_images:,}" if entry.cost else ""
        numbers = []
        for cell in cells(comparison, entry):
            parts = [f"**{cell.text}**" if cell.best else cell.text, cell.kind, cell.gain and f"({cell.gain})"]
            numbers.append(" ".join(filter(None, parts)))
        lines.append(f"| {' | '.join([plain(entry.name), plain(_objective(entry)), images, *numbers])} |")
    return lines


def _rows_of_changes(comparison: Comparison) -> list[str]:
    columns = columns_of_changes(comparison)
    lines = [f"| encoder | started from | {' | '.join(plain(title) for title, _ in columns)} |"]
    lines.append(f"|{'---|' * 2}{'---:|' * len(columns)}")
    for i, entry in enumerate(gone_on(comparison)):
        told = [_in_a_line(found[i]) for _, found in columns]
        lines.append(f"| {' | '.join([plain(entry.name), plain(entry.started), *told])} |")
    return lines


def _in_a_line(change: Change | None) -> str:
    if change is None:
        return NOTHING
    course, points, verdict = change_lines(change)
    return f"{course} ({points}): {verdict}"


def columns_of_changes(comparison: Comparison) -> list[tuple[str, list[Change | None]]]:
    """(title, change of each that has gone on from weights): an evaluator on the new images, then on the old."""
    names = [entry.name for entry in gone_on(comparison)]
    evaluators = list(dict.fromkeys(name for side in SIDES for name in evaluators_of(comparison, side)))
    pairs = [(name, side) for name in evaluators for side in SIDES if name in evaluators_of(comparison, side)]
    return [(title_of_change(comparison, *pair), changes(comparison, names, pair[1], pair[0])) for pair in pairs]


def title_of_change(comparison: Comparison, evaluator: str, side: Side) -> str:
    """`linear probe, top-1 %, old images`."""
    return f"{title_of(seen(comparison, side), evaluator)}, {side} images"


def change_lines(change: Change | None) -> list[str]:
    """Before and after, the change, the verdict with the kind of feature."""
    if change is None:
        return [NOTHING]
    verdict = f"{change.verdict}, {change.after.kind}" if change.after.kind else change.verdict
    return [f"{change.before.value:.1f} → {change.after.value:.1f}", change.text, verdict]


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table too: neither HTML nor a link, a line of its own or emphasis."""
    return html.escape(_MARKUP.sub(r"\\\g<0>", " ".join(text.split())), quote=False)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    console = console or Console()
    _print_entries(comparison, console)
    if comparison.old_data:
        _print_entries(replace(seen(comparison, "old"), title="On the old images"), console)
        _print_changes(comparison, console)
    for line in (_explanation(comparison), *sentences(comparison), *notes(comparison)):
        print_plain(console, line)


def _print_entries(comparison: Comparison, console: Console) -> None:
    rows = in_order(comparison)
    found = [cells(comparison, entry) for entry in rows]

    def build(width: int, columns: list[int]) -> Table:
        table = Table(box=box.SIMPLE, title=Text(comparison.title), pad_edge=False, collapse_padding=True)
        table.add_column("encoder", no_wrap=True)
        table.add_column("objective", no_wrap=True)
        for column in columns:
            widest = max(len(text) for row in found for text in (row[column].text, _below(row[column])))
            title = title_of(comparison, comparison.evaluators[column])
            table.add_column(folded(title, max(widest, 10)), justify="right", no_wrap=True)
        for entry, row, following in zip(rows, found, [*rows[1:], None], strict=True):
            named = Text(folded(entry.name, width)), Text(folded(_objective(entry), width))
            ends = following is not None and _group(entry) != _group(following)
            table.add_row(*named, *(_told(row[column]) for column in columns), end_section=ends)
        return table

    names = [name for entry in rows for name in (entry.name, _objective(entry))]
    _print_in_parts(console, build, len(comparison.evaluators), names)


def _print_changes(comparison: Comparison, console: Console) -> None:
    rows, found = gone_on(comparison), columns_of_changes(comparison)

    def build(width: int, columns: list[int]) -> Table:
        table = Table(box=box.SIMPLE, title="What going on has won and lost", pad_edge=False, collapse_padding=True)
        table.add_column("encoder", no_wrap=True)
        table.add_column("started from", no_wrap=True)
        for title, each in (found[column] for column in columns):
            widest = max(len(line) for change in each for line in change_lines(change))
            table.add_column(folded(title, max(widest, 10)), justify="right", no_wrap=True)
        for i, entry in enumerate(rows):
            named = Text(folded(entry.name, width)), Text(folded(entry.started, width))
            table.add_row(
                *named, *("\n".join(change_lines(found[column][1][i])) for column in columns), end_section=True
            )
        return table

    if rows:
        names = [name for entry in rows for name in (entry.name, entry.started)]
        _print_in_parts(console, build, len(found), names)


def _print_in_parts(
    console: Console, build: Callable[[int, list[int]], Table], num_columns: int, names: list[str]
) -> None:
    """What a terminal is too narrow for goes on in a table below. build: see `print_whole`; of some of the columns."""
    left = list(range(num_columns))
    while True:
        some = next((left[:n] for n in range(len(left), 1, -1) if fits(console, build(1, left[:n]))), left[:1])
        print_whole(console, partial(build, columns=some), names)
        if not (left := left[len(some) :]):
            break


def _told(cell: Cell) -> str:
    return "\n".join(filter(None, (f"[bold]{cell.text}[/]" if cell.best else cell.text, _below(cell))))


def _below(cell: Cell) -> str:
    return f"{cell.kind} {cell.gain}".strip()


def _group(entry: Entry) -> tuple[str, str | None]:
    return entry.kind, entry.objective if entry.kind == "pretrained" else None


def to_json(comparison: Comparison) -> str:
    """Everything but the pictures themselves."""
    values = asdict(comparison) | {"pairs": [asdict(pair) for pair in pairs(comparison)]}
    for entry in values["entries"]:
        for picture in entry["pictures"]:
            picture["num_bytes"] = len(picture.pop("png"))
    return json.dumps(values, indent=1) + "\n"


def _objective(entry: Entry) -> str:
    return entry.objective or ("unknown" if entry.kind == "pretrained" else "none")


def _explanation(comparison: Comparison) -> str:
    train, test = (comparison.data.get(name, {}).get("num_samples") for name in ("train", "test"))
    sizes = f"Learned from {train:,} labelled images, tested on {test:,}. " if train and test else ""
    text = (
        f"{sizes}± is the standard error of the test sample, or the deviation over seeds or draws; beside a "
        f"number stand its kind of feature and the gain over the untrained encoder by that kind; the best pretrained "
        f"encoder is bold."
    )
    if any(entry.repeats for entry in comparison.entries):
        text += f" {SEEDS}"
    if not gone_on(comparison):
        return text
    train, test = (comparison.old_data.get(name, {}).get("num_samples") for name in ("train", "test"))
    sizes = f" On the old images: learned from {train:,}, tested on {test:,}." if train and test else ""
    return f"{text}{sizes} {CHANGES}"
