"""What mkdocs does besides: pages made from the code, links that hold in the repository, a strict look at docstrings.

Nothing that is made here is kept: each build makes it anew.
"""

import ast
import contextlib
import logging
import re

import commands
import configuration
import messages
import repository
from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks.prelude")  # a warning of mkdocs fails a strict build

MADE = {
    "reference/configuration.md": configuration.page,
    "reference/commands.md": commands.page,
    "reference/messages.md": messages.page,
    "examples.md": repository.examples,
}
_PACKAGES = ("data", "pretrain", "objectives", "checkpoints", "evaluators", "launch")
_STATED = re.compile(r"^::: (\S+)", re.MULTILINE)


def on_startup(command, dirty):
    """The package as it is once installed, which is how docstrings are looked for: a folder of links."""
    package = repository.ROOT / "build" / "documented" / "prelude"
    package.mkdir(parents=True, exist_ok=True)
    for path in [repository.ROOT / "src" / "prelude" / "__init__.py", *(repository.ROOT / name for name in _PACKAGES)]:
        with contextlib.suppress(FileExistsError):
            (package / path.name).symlink_to(path)


def on_files(files, config):
    for path, make in MADE.items():
        files.append(File.generated(config, path, content=make()))
    for source, path in repository.PAGES.items():
        if files.get_file_from_path(path) is None:
            content = repository.relinked(repository.text(source), source, path)
            files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    path = page.file.src_uri
    if path in MADE or path in repository.PAGES.values() and path != "index.md":
        return markdown
    for name in _STATED.findall(markdown):
        tell_what_has_no_docstring(name, path)
    markdown = repository.with_parts_of_the_readme(markdown)
    return repository.relinked(markdown, f"docs/{path}", path)


def tell_what_has_no_docstring(name: str, page: str) -> None:
    """Of what a page of the API shows: a function, or a class with its public methods."""
    module, _, shown = name.removeprefix("prelude.").rpartition(".")
    path = repository.ROOT / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    found = next((node for node in tree.body if getattr(node, "name", None) == shown), None)
    if found is None:
        log.warning("%s: %s is not there", page, name)
        return
    public = [node for node in found.body if _is_public(node)] if isinstance(found, ast.ClassDef) else []
    for node in [found, *public]:
        if not ast.get_docstring(node):
            log.warning("%s: %s has no docstring", page, name if node is found else f"{name}.{node.name}")


def _is_public(node: ast.stmt) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
