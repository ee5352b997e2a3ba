"""The page of errors: every sentence that the code can end a command with, collected from its source.

- What is raised: the text of each `UserError`, `RunStopped` and `Stopped`, and of the refusals of typed settings.
- What is passed on to whoever raises or tells it: every other sentence that is written in a function.

A text is followed to where it is written: through names in the same function, and functions of the same file. What is
filled in is told by its name, in ‹ ›; texts that the code chooses between stand in ⟨ ⟩, parted by |.
"""

import ast
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prelude.data.counting import named

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("launch", "pretrain", "data", "objectives", "checkpoints", "evaluators")
CODES = {"UserError": "2", "NothingReadable": "2", "_NoSetting": "2", "RunStopped": "3", "Stopped": "75"}
_OF_SETTINGS = ("ValueError", "PydanticCustomError", "ArgumentTypeError")  # refusals become part of a UserError
_DEEPEST = 4
_PAGES = ("evaluators/comparing", "checkpoints/exporting/card", "launch/prelude")  # texts that are no errors

# By the beginning of a file's path: the first that fits, so that what is special comes first.
TOPICS = {
    "Making shards": ("data/packing", "launch/packing", "launch/shards"),
    "Settings": ("pretrain/config", "pretrain/recipe", "pretrain/overrides", "pretrain/options",
                 "pretrain/foreign_keys", "pretrain/annotations", "pretrain/log_config", "objectives/options",
                 "objectives/building", "objectives/__init__", "evaluators/finetuning/recipe", "launch/arguments"),
    "Launchers and ranks": ("pretrain/launchers", "pretrain/meeting", "pretrain/attendance", "pretrain/distributed",
                            "launch/alone", "pretrain/data_wait", "pretrain/stopping"),
    "The run folder": ("pretrain/run_lock", "pretrain/files", "launch/run_folder", "launch/outlook", "pretrain/resume"),
    "Checkpoints and weights": ("checkpoints", "pretrain/warm_start"),
    "Shards behind a URL": ("data/stores", "data/remote", "data/node_cache", "data/fetching", "data/index_file",
                            "data/stream"),
    "Data": ("data", "launch/inspection", "launch/peek"),
    "Encoders": ("pretrain/encoder", "pretrain/own_encoder", "pretrain/named_code", "pretrain/kept_patches",
                 "pretrain/layer_decay", "launch/encoder_report"),
    "Objectives": ("objectives", "launch/objective", "launch/check_objective", "pretrain/objective"),
    "Evaluating": ("evaluators",),
    "Training": ("pretrain", "launch/training", "launch/planning"),
    "Commands": ("launch",),
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    text: str
    code: str  # "" where it depends on who tells it
    path: str
    line: int


def page() -> str:
    parts = [(Path(__file__).parents[1] / "reference" / "messages_introduction.md").read_text().rstrip()]
    found = [message for path in sources() for message in messages(path)]
    for topic in TOPICS:
        of_topic = {message.text: message for message in found if topic_of(message.path) == topic}
        lines = "\n".join(_line(of_topic[text]) for text in sorted(of_topic, key=_without_what_is_filled_in))
        parts.append(f'## {topic}\n\n<ul class="messages">\n{lines}\n</ul>')
    return "\n\n".join(parts)


def topic_of(path: str) -> str:
    return next(topic for topic, beginnings in TOPICS.items() if path.startswith(beginnings))


def _line(message: Message) -> str:
    text = re.sub(r"‹(.*?)›", r"<var>\1</var>", html.escape(message.text, quote=False))
    code = f'<span class="code" title="exit code">{message.code}</span> ' if message.code else ""
    return f"<li>{code}{text}</li>"


def _without_what_is_filled_in(text: str) -> str:
    return re.sub(r"‹.*?›|\W", "", text).lower()


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def messages(path: Path) -> list[Message]:
    """Of one file."""
    file = _File(ast.parse(path.read_text()))
    name, found = str(path.relative_to(ROOT)), []
    for call, function in file.raised():
        of = _name(call.func)
        text = call.args[-1] if of == "PydanticCustomError" else call.args[0]
        code = CODES.get(of, "2")  # of a class' own `__init__`, too: they are all the user's mistakes
        found += [Message(one, code, name, call.lineno) for one in file.texts(text, function)]
    raised = [message.text for message in found]
    for value, function in file.written() if not name.startswith(_PAGES) else ():
        texts = [one.strip() for one in file.texts(value, function)]
        others = [one for one in texts if _is_a_sentence(one) and not any(one in text for text in raised)]
        found += [Message(one, "", name, value.lineno) for one in others]
    return [message for message in found if re.search(r"\w", _without_what_is_filled_in(message.text))]


def _is_a_sentence(text: str) -> bool:
    return text.rstrip("⟩").endswith((".", "?")) and len(text.split()) > 4 and "\n" not in text


class _File:
    def __init__(self, tree: ast.Module):
        looked_at = (ast.Call, ast.ClassDef, ast.FunctionDef, ast.Constant, ast.JoinedStr)
        self.nodes = [(node, function) for node, function in _within(tree) if isinstance(node, looked_at)]
        self.functions = {node.name: node for node, _ in self.nodes if isinstance(node, ast.FunctionDef)}
        self.constants = _assigned(tree.body)
        self.assigned: dict = {}
        self.returned: dict = {}

    def raised(self) -> Iterator[tuple[ast.Call, ast.FunctionDef | None]]:
        """Calls of the classes of errors that have a text, with the innermost function that each is in."""
        for node, function in self.nodes:
            if isinstance(node, ast.ClassDef) and node.name in CODES:
                found = [one for one in ast.walk(node) if isinstance(one, ast.Call) and _name(one.func) == "__init__"]
                yield from ((one, None) for one in found)
            elif isinstance(node, ast.Call) and node.args and _name(node.func) in (*CODES, *_OF_SETTINGS):
                yield node, function

    def written(self) -> Iterator[tuple[ast.expr, ast.FunctionDef]]:
        """Every text in a function that is no part of another one, and no docstring."""
        for node, function in self.nodes:
            if function and isinstance(node, (ast.Constant, ast.JoinedStr)):
                yield node, function

    def texts(self, node: ast.expr, function: ast.FunctionDef | None, depth: int = 0) -> list[str]:
        """What an expression may say; [] where it is not written here."""
        if depth > _DEEPEST:
            return []
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return [self._joined(parts, function, depth)]
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                pairs = self.texts(left, function, depth) or ["…"], self.texts(right, function, depth) or ["…"]
                return [f"{one}{other}" for one in pairs[0] for other in pairs[1] if (one, other) != ("…", "…")]
            case ast.IfExp(body=one, orelse=other):
                return self._each([one, other], function, depth)
            case ast.BoolOp(values=values):
                return self._each(values, function, depth)
            case ast.Name(id=name):
                values = self._assigned_in(function).get(name, []) if function else []
                return self._each(values or self.constants.get(name, []), function, depth + 1)
            case ast.Call(func=ast.Attribute(value=inside, attr="replace" | "format" | "strip" | "capitalize")):
                return self.texts(inside, function, depth)
            case ast.Call(func=ast.Name(id="counted" | "named" as how), args=[number, what]):
                words = [named(2, word) for word in self.texts(what, function, depth + 1)]
                return [f"‹{_label(number)}› {word}" for word in words] if how == "counted" else words
            case ast.Call(func=called) if (inner := self.functions.get(_name(called))) is not None:
                return self._each(self._returned_by(inner), inner, depth + 1)
        return []

    def _assigned_in(self, function: ast.FunctionDef) -> dict[str, list[ast.expr]]:
        if function not in self.assigned:
            self.assigned[function] = _assigned(ast.walk(function))
        return self.assigned[function]

    def _returned_by(self, function: ast.FunctionDef) -> list[ast.expr]:
        if function not in self.returned:
            nodes = (node for node, of in _within(function) if of is function)
            self.returned[function] = [node.value for node in nodes if isinstance(node, ast.Return) and node.value]
        return self.returned[function]

    def _each(self, values: list[ast.expr], function: ast.FunctionDef | None, depth: int) -> list[str]:
        """Of one of several expressions: of those that are not written here their names, unless none is."""
        found = [self.texts(value, function, depth) for value in values]
        named = [texts or [f"‹{_label(value)}›"] for value, texts in zip(values, found, strict=True)]
        return [text for texts in named for text in texts] if any(found) else []

    def _joined(self, parts: list[ast.expr], function: ast.FunctionDef | None, depth: int) -> str:
        said = []
        for part in parts:
            if isinstance(part, ast.Constant):
                said.append(str(part.value))
                continue
            inside = self.texts(part.value, function, depth + 1)
            said.append(_either(list(dict.fromkeys(inside))) or f"‹{_label(part.value)}›")
        return re.sub(r"\s*\n\s*", " ", "".join(said))


def _either(texts: list[str]) -> str:
    return f"⟨{'|'.join(texts)}⟩" if len(texts) > 1 else "".join(texts)


def _within(top: ast.AST) -> Iterator[tuple[ast.AST, ast.FunctionDef | None]]:
    """All nodes, each with the innermost function around it."""
    waiting: list = [(top, top if isinstance(top, ast.FunctionDef) else None)]
    while waiting:
        node, function = waiting.pop()
        yield node, function
        inner = node if isinstance(node, ast.FunctionDef) else function
        children = [] if isinstance(node, ast.JoinedStr) else list(ast.iter_child_nodes(node))
        waiting += [(child, inner) for child in children if not _is_a_docstring(child)]


def _is_a_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _assigned(nodes) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.NamedExpr):
            found.setdefault(node.target.id, []).append(node.value)
    return found


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _label(node: ast.expr) -> str:
    """What is filled in, in a word."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").replace("_", " ")
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(key)), *_]):
            return key.replace("_", " ")
        case ast.Call(func=ast.Attribute(attr="join"), args=[inside, *_]):
            return _label(inside)
        case ast.Call(func=ast.Attribute(value=inside, attr="name" | "hex" | "strip" | "item" | "split" | "decode")):
            return _label(inside)
        case ast.Call(func=ast.Name(id="len" | "map" | "sorted" | "str" | "list"), args=arguments):
            return "number" if _name(node.func) == "len" else _label(arguments[-1])
        case ast.Call(func=called):
            return _label(called)
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            return key.replace("_", " ")
        case ast.Subscript(value=inside) | ast.Starred(value=inside):
            return _label(inside)
        case ast.GeneratorExp(generators=[first, *_]) | ast.ListComp(generators=[first, *_]):
            return _label(first.iter)
        case ast.BinOp(left=left, right=right):
            return _label(right if isinstance(left, ast.Constant) else left)
    return "…"
