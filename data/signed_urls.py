"""URLs without what lets their holder in: a signature, a token, a name and a password.

What a shard is must not change with them, and neither messages nor records may hand them on.
"""

import re
from urllib.parse import unquote_plus

_SIGNING = re.compile(  # parameters that stores add to a URL of a whole name: S3, Google, CloudFront, others alike
    r"x-(amz|goog|oss|cos)-.+|x-id|response-(content-.+|cache-control|expires)|expires|signature|awsaccesskeyid|googleaccessid|ossaccesskeyid|policy|key-pair-id"
    r"|q-(sign-algorithm|ak|sign-time|key-time|header-list|url-param-list|signature)"
    r"|x-[a-z]+-(signature|expires|date|credential|algorithm|signedheaders|security-token)|temp_url_.+|accesskeyid"
)
_OF_AZURE = re.compile(  # short enough to mean something else elsewhere, so only where there is a `sig`
    r"sig|sv|ss|srt|sr|sp|st|se|sip|spr|si|sdd|scid|skoid|sktid|skt|ske|sks|skv|saoid|suoid|ses|rsc[cdelt]"
)
_TOKENS = re.compile(r"(access|auth|security|session|private|job)?[-_]?token|authorization|auth|api[-_]?key|password")
_URL = re.compile(  # `::` joins several, and is in addresses too; quotes end one, and an apostrophe in a name does not
    r"https?://(?:\[[\w:.%]+\]|'(?=[.(]?[\w%-])|(?!::(?:\w+:|[/.~]))[^\s'\"<>])+", re.IGNORECASE
)
_ENDS_SENTENCE = re.compile(r"[.,:;)\]]*$")


def without_signature(url: str) -> str:
    """The URL of the same file, whoever asks for it and however it was signed. A token is dropped only where a tar is
    named without it: elsewhere it may be what names the file."""
    bare = _without(url, _SIGNING, _TOKENS)
    return bare if ".tar" in bare.lower() else _without(url, _SIGNING)


def shown(text: str) -> str:
    """A text for messages and records, with the URLs in it without what lets their holder in."""
    return _URL.sub(_shown, text) if "://" in text else text


def shown_in(values):
    """Values as JSON knows them, with the texts in them `shown`."""
    if isinstance(values, str):
        return shown(values)
    if isinstance(values, dict):
        return {key: shown_in(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(map(shown_in, values))
    return list(map(shown_in, values)) if isinstance(values, list) else values


def _shown(found: re.Match) -> str:
    end = _ENDS_SENTENCE.search(found[0])[0]
    return _without(found[0].removesuffix(end), _SIGNING, _TOKENS) + end


def _without(url: str, *dropped: re.Pattern) -> str:
    if not _URL.match(url):
        return url
    plain, _, query = url.partition("?")
    scheme, _, rest = plain.partition("://")
    host, slash, path = rest.partition("/")
    plain = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    parts = query.partition("#")[0].split("&")
    names = [unquote_plus(part.partition("=")[0]).lower() for part in parts]
    if "sig" in names:
        dropped = (*dropped, _OF_AZURE)
    kept = [part for part, name in zip(parts, names, strict=True) if not any(one.fullmatch(name) for one in dropped)]
    if len(kept) == len(parts):
        return f"{plain}?{query}" if query else plain
    return f"{plain}?{'&'.join(kept)}" if kept else plain
