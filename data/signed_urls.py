"""URLs without what lets their holder in: a signature, a token, a name and a password.

What a shard is must not change with them, and neither messages nor records may hand them on.
"""

import re
from urllib.parse import unquote_plus

_SIGNING = re.compile(  # parameters that stores add to a URL of a whole name: S3, Google, CloudFront, others alike
    r"x-(amz|goog|oss|cos)-.+|x-id|response-(content-.+|cache-control|expires)|expires|signature|awsaccesskeyid|googleaccessid|ossaccesskeyid|policy|key-pair-id"
    r"|q-(sign-algorithm|ak|sign-time|key-time|header-list|url-param-list|signature)"
    r"|x-[a-z]+-(signature|expires|date|credential|algorithm|signedheaders|security-token)|temp_url_.+|accesskeyid"
    r"|hdn(ea|tl|ts)|tempauth"
)
_OF_AZURE = re.compile(  # short enough to mean something else elsewhere, so only where there is a `sig`
    r"sig|sv|ss|srt|sr|sp|st|se|sip|spr|si|sdd|scid|skoid|sktid|skt|ske|sks|skv|saoid|suoid|ses|rsc[cdelt]"
)
_TOKENS = re.compile(
    r"(aws[-_])?(access|auth|security|session|private|job|refresh|id)?[-_]?token|__token__|authorization|auth|(aws[-_])?(api|auth|access)[-_]?key([-_]?id)?|passw(or)?d|pwd"
    r"|jwt|sas|((client|aws)[-_]?)?secret([-_]?(access[-_]?)?key)?"
)
_OF_NGINX = re.compile("md5")  # what names a file elsewhere, so only where there is an `expires`, and as a token
_URL = re.compile(  # `::` joins several, and is in addresses too; quotes end one, and an apostrophe in a name does not
    r"https?://(?:\[[\w:.%]+\]|'(?=[.(]?[\w%-])|(?!::(?:\w+:|[/.~]))[^\s'\"<>])+", re.IGNORECASE
)
_ENDS_SENTENCE = re.compile(r"[.,:;)\]]*$")


def without_signature(url: str) -> str:
    """The URL of the same file, whoever asks for it and however it was signed. A token is dropped only where a tar is
    named without it: elsewhere it may be what names the file."""
    bare = _without(url)
    return bare if ".tar" in bare.lower() else _without(url, tokens=False)


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
    bare = _without(found[0].removesuffix(end))
    plain, _, fragment = bare.partition("#")
    parts = [part for part in re.split("[&;?]", fragment) if "=" in part]  # `#policy` is a heading
    return (plain if any(_let_in(parts)) else bare) + end


def _without(url: str, tokens: bool = True) -> str:
    if not _URL.match(url):
        return url
    plain, _, query = url.partition("?")
    scheme, _, rest = plain.partition("://")
    host, slash, path = rest.partition("/")
    plain = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    parts = query.partition("#")[0].split("&")
    kept = [part for part, lets_in in zip(parts, _let_in(parts, tokens), strict=True) if not lets_in]
    if len(kept) == len(parts):
        return f"{plain}?{query}" if query else plain
    return f"{plain}?{'&'.join(kept).removeprefix('amp;')}" if kept else plain


def _let_in(parts: list[str], tokens: bool = True) -> list[bool]:
    """Whether each `name=value` is what lets in; as an error page has them, all but the first begin with `amp;`."""
    names = [unquote_plus(part.partition("=")[0]).lower().removeprefix("amp;") for part in parts]
    dropped = [_SIGNING, *[_OF_AZURE] * ("sig" in names)]
    if tokens:
        dropped += [_TOKENS, *[_OF_NGINX] * ("expires" in names)]
    return [any(one.fullmatch(name) for one in dropped) for name in names]
