"""A comparison as rows and columns: for the console, for Markdown, and as JSON.

- A column is an evaluator's headline. The best pretrained encoder of a column is bold, several that are equal all are.
- After a number comes its spread or standard error, the kind of feature that it is of, then in brackets the gain over
  the same architecture untrained by that kind.
- Names, notes and commands come from file names and recipes of others: none of them can become markup.
- Pretrained encoders come first, by objective in the order in which these were named; then untrained ones and floors.
"""

import html
import json
import re
from dataclasses import asdict, dataclass
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prelude.evaluators.comparing.comparison import Comparison, Entry
from prelude.evaluators.comparing.headline import best, evaluator_name, gain, headline, number_name
from prelude.evaluators.comparing.label_table import positives
from prelude.evaluators.table_text import fits, folded, print_whole

NOTHING = "–"
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
    kinds = ("pretrained", "untrained", "floor")

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
        leads = entry.kind == "pretrained" and number.value == headline(best(comparison, evaluator), evaluator).value
        found.append(Cell(number.text, number.kind, "" if more is None else f"{more:+.1f}", leads))
    return found


def notes(comparison: Comparison) -> list[str]:
    """What the numbers do not say: which entries have none, and every warning, each said once."""
    problems = [f"{entry.name}: {entry.problem}" for entry in comparison.entries if entry.problem]
    told: dict[str, list[str]] = {}
    for entry in comparison.entries:
        for name, result in entry.results.items():
            for warning in result.get("warnings", []):
                told.setdefault(warning, []).append(f"{entry.name} ({name.replace('_', ' ')})")
    warnings = [f"{', '.join(where) if len(where) < 4 else 'All or most'}: {text}" for text, where in told.items()]
    findings = [entry.results["multilabel"] for entry in comparison.entries if "multilabel" in entry.results]
    return [*problems, *map(positives, findings[:1]), *comparison.warnings, *warnings]


def markdown(comparison: Comparison) -> str:
    """A table for GitHub, with what was compared, on what, and by which command."""
    titles = [plain(title_of(comparison, name)) for name in comparison.evaluators]
    columns = ["encoder", "objective", "images seen", *titles]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * 2}{'---:|' * (len(columns) - 2)}"]
    for entry in in_order(comparison):
        seen = f"{entry.cost.num_images:,}" if entry.cost else ""
        numbers = []
        for cell in cells(comparison, entry):
            parts = [f"**{cell.text}**" if cell.best else cell.text, cell.kind, cell.gain and f"({cell.gain})"]
            numbers.append(" ".join(filter(None, parts)))
        lines.append(f"| {' | '.join([plain(entry.name), plain(_objective(entry)), seen, *numbers])} |")
    encoders = {entry.name: entry.encoder for entry in in_order(comparison) if entry.kind == "pretrained"}
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+|$", comparison.command)))
    lines += ["", f"{_explanation(comparison)}", "", fence, comparison.command, fence]
    lines += ["", *(f"- {plain(name)}: {plain(encoder)}" for name, encoder in encoders.items() if encoder)]
    lines += ["", *(f"- {plain(note)}" for note in notes(comparison))] if notes(comparison) else []
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table too: neither HTML nor a link, a line of its own or emphasis."""
    return html.escape(_MARKUP.sub(r"\\\g<0>", " ".join(text.split())), quote=False)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    console = console or Console()
    rows, left = in_order(comparison), list(range(len(comparison.evaluators)))
    found = [cells(comparison, entry) for entry in rows]

    def build(width: int, columns: list[int]) -> Table:
        table = Table(box=box.SIMPLE, title=comparison.title, pad_edge=False, collapse_padding=True)
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
    while True:  # what a terminal is too narrow for goes on in a table below
        some = next((left[:n] for n in range(len(left), 1, -1) if fits(console, build(1, left[:n]))), left[:1])
        print_whole(console, partial(build, columns=some), names)
        if not (left := left[len(some) :]):
            break
    for line in (_explanation(comparison), *notes(comparison)):
        console.print(line, highlight=False, markup=False)


def _told(cell: Cell) -> str:
    return "\n".join(filter(None, (f"[bold]{cell.text}[/]" if cell.best else cell.text, _below(cell))))


def _below(cell: Cell) -> str:
    return f"{cell.kind} {cell.gain}".strip()


def _group(entry: Entry) -> tuple[str, str | None]:
    return entry.kind, entry.objective if entry.kind == "pretrained" else None


def to_json(comparison: Comparison) -> str:
    """Everything but the pictures themselves."""
    values = asdict(comparison)
    for entry in values["entries"]:
        for picture in entry["pictures"]:
            picture["num_bytes"] = len(picture.pop("png"))
    return json.dumps(values, indent=1) + "\n"


def _objective(entry: Entry) -> str:
    return entry.objective or {"untrained": "none", "floor": "none", "pretrained": "unknown"}[entry.kind]


def _explanation(comparison: Comparison) -> str:
    train, test = (comparison.data.get(name, {}).get("num_samples") for name in ("train", "test"))
    sizes = f"Learned from {train:,} labelled images, tested on {test:,}. " if train and test else ""
    return (
        f"{sizes}± is the standard error of the test sample, or the deviation over seeds or draws; beside a "
        f"number stand its kind of feature and the gain over the untrained encoder by that kind; the best pretrained "
        f"encoder is bold."
    )
