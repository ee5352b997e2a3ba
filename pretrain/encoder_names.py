"""The name of an architecture that somebody may have meant."""

import difflib
import re

_CLOSE = 0.85  # share of the letters that agree; below it a guess is of another architecture


def hint(name: str, known: list[str]) -> str:
    """The end of a sentence on a name that timm does not know: those that are meant, or how names are listed."""
    found = meant(name, known)
    if found:
        return f"did you mean {' or '.join(found)}?"
    start = (re.findall(r"[a-z]+", name.lower()) or ["vit"])[0]
    return f"""timm.list_models("*{start}*") names what there is."""


def meant(name: str, known: list[str]) -> list[str]:
    """At most three of `known`: the same but for case and separators, else those that it is a part of, shortest first,
    else the closest, of which those with the same numbers come first."""
    plain = {each: _plain(each) for each in known}
    wanted = _plain(name)
    if len(wanted) < 3:
        return []
    same = [each for each, letters in plain.items() if letters == wanted]
    longer = [each for each, letters in plain.items() if letters.startswith(wanted)]
    longer = longer or [each for each, letters in plain.items() if wanted in letters]
    if same or longer:
        return same[:1] or sorted(longer, key=lambda each: (len(each), each))[:3]
    names = {letters: each for each, letters in plain.items()}
    close = [names[letters] for letters in difflib.get_close_matches(wanted, names, 3, _CLOSE)]
    alike = [each for each in close if _numbers(each) == _numbers(name)]
    return (alike or close)[:1]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().partition(".")[0])


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name)
