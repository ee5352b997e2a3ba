"""One sentence for each mistake of a config: what is wrong, where, and what to write instead."""

import difflib

from pydantic import BaseModel


def sentence(error: dict, model: type[BaseModel], prefix: str) -> str:
    """One mistake in one sentence, ending with what to write instead."""
    loc = [str(part) for part in error["loc"] if not _names_a_branch(part)]
    where = prefix + ".".join(loc)
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, 1, 0.5)
        hint = f"did you mean {'.'.join([prefix + loc[0], *loc[1:-1], near[0]]) if len(loc) > 1 else prefix + near[0]}?"
        return f"{where} does not exist; {hint if near else 'the keys here are ' + ', '.join(known) + '.'}"
    if error["type"] == "missing":
        return f"{where} is missing: write a value for it."
    message = error["msg"].removeprefix("Value error, ")
    if not loc:
        return message + "."
    return f"{where}={error['input']!r} is refused: {message[0].lower() + message[1:]}."


def _names_a_branch(part) -> bool:
    """pydantic adds the branch of a union (`int`, `tuple[int, int]`, `literal['auto']`) to an error's place."""
    return isinstance(part, str) and (part in ("int", "str", "dict", "EvaluateConfig") or "[" in part)


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        options = [a for a in getattr(annotation, "__args__", (annotation,)) if isinstance(a, type)]
        model = next(a for a in options if issubclass(a, BaseModel))
    return list(model.model_fields)
