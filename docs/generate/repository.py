"""Pages of what lies outside of docs/, and links that hold in the repository made to hold on the site."""

import os
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = "examples.md"
PAGES = {"benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changes.md", "README.md": "index.md"}
_LINK = re.compile(r"(!?\[)([^\]\[]*)(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_INCLUDED = re.compile(r"<!-- README: (.+?) -->")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def text(path: str) -> str:
    return (ROOT / path).read_text()


def relinked(markdown: str, source: str, page: str) -> str:
    """Links of a text that lies at `source` in the repository, for `page` of the site. One that leads to nothing that
    the site has stays as it is, and is told by a strict build."""
    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _relinked(part, source, page) for part in parts)


def _relinked(markdown: str, source: str, page: str) -> str:
    def link(match: re.Match) -> str:
        before, words, between, target, anchor, after = match.groups(default="")
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = page_of(path)
        if there is None:
            return match[0]
        there, own = there
        words = _title(path) if words == path and path.endswith(".md") else words
        return f"{before}{words}{between}{os.path.relpath(there, posixpath.dirname(page) or '.')}{anchor or own}{after}"

    return _LINK.sub(link, markdown)


def _title(path: str) -> str:
    """What a page calls itself, where a link only has its file's name to show."""
    return text(path).partition("\n")[0].removeprefix("# ") if (ROOT / path).is_file() else path


def page_of(path: str) -> tuple[str, str] | None:
    """The page of the site, and the anchor there, of a file of the repository."""
    if path in PAGES:
        return PAGES[path], ""
    if path.startswith("examples/") and path.endswith(".py"):
        return EXAMPLES, f"#{Path(path).stem}"
    return (path.removeprefix("docs/"), "") if path.startswith("docs/") else None


def with_parts_of_the_readme(markdown: str) -> str:
    """`<!-- README: Quick start -->` is that section of it, which has its one home there."""
    return _INCLUDED.sub(lambda match: relinked(_section(match[1]), "README.md", "index.md"), markdown)


def _section(title: str) -> str:
    """title: of a section; `` for what stands above the first one."""
    parts = re.split(r"^## (.+)$", text("README.md"), flags=re.MULTILINE)
    sections = {"": parts[0].partition("\n")[2], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    return sections["" if title == "the beginning" else title].strip()


def examples() -> str:
    parts = ["# Examples", "What a user does with an export, in plain timm and torch, without any of our packages."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts += [f"## {path.name} {{ #{path.stem} }}", f"```python\n{path.read_text().rstrip()}\n```"]
    return "\n\n".join(parts)
