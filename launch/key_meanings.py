"""What a key of a typed section means: the comment at its line, which is the one place where that is written.

A comment behind the field, or lines of comment right above it. A field that a section inherits, or defines anew without
a comment, has the meaning that the section above gives it.
"""

import ast
import functools
import inspect
import io
import tokenize

from pydantic import BaseModel


def meaning(model: type[BaseModel], name: str) -> str:
    """ "" where nothing is said."""
    for owner in model.__mro__:
        if name in owner.__dict__.get("__annotations__", {}):
            if said := _comments(inspect.getsourcefile(owner)).get((owner.__qualname__, name)):
                return said
    return ""


@functools.cache
def _comments(path: str) -> dict[tuple[str, str], str]:
    """By class and field."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    lines = source.splitlines()
    comments = {
        token.start[0]: token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for owner in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[owner.name, node.target.id] = _said(node, comments, lines)
    return {key: text for key, text in found.items() if text}


def _said(node: ast.AnnAssign, comments: dict[int, tokenize.TokenInfo], lines: list[str]) -> str:
    said = [_text(comments[node.end_lineno])] if node.end_lineno in comments else []
    above = node.lineno - 1
    while above in comments and lines[above - 1].lstrip().startswith("#"):
        said.insert(0, _text(comments[above]))
        above -= 1
    return " ".join(said)


def _text(comment: tokenize.TokenInfo) -> str:
    return comment.string.lstrip("# ").strip()
