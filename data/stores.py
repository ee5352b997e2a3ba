"""Files behind a URL, through fsspec: what a store says of one, its bytes, and what went wrong, in words.

- `http(s)://`, `s3://`, `gs://` and `hf://`. Credentials come from where each library looks for them (AWS_PROFILE,
  GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc, fsspec's own configuration); nothing is asked for here.
- An answer that another attempt cannot change (404, 403, no credentials) is a `Refused`; all else may be tried again.
- A file system is asked for anew at each use: fsspec keeps them by process, and one from before a fork is dead.
"""

import base64
import binascii
import http.client
import importlib
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import quote, unquote, urlsplit

import fsspec

from prelude.data.errors import UserError
from prelude.data.host import own_fault
from prelude.data.waiting import patience

CHUNK = 2**23  # bytes of a request, where a store is asked for ranges
_PLAIN_IN_PATHS = "!$&'()*+,;=:@"  # as they are in one part of a path
_PROTOCOL = re.compile(r"(https?|s3|gs|gcs|hf)://", re.IGNORECASE)
_EXTRAS = {"http": "http", "s3": "s3", "gs": "gcs", "hf": "hf"}  # of this package, with the libraries of a scheme
_TRY_AGAIN = (408, 425, 429)  # of those below 500
_FAILURES = {  # what libraries raise beside OSError
    "http": ("aiohttp.ClientError", "aiohttp.InvalidURL"),
    "s3": ("botocore.exceptions.BotoCoreError", "botocore.exceptions.ClientError", "aiohttp.ClientError"),
    "gs": ("gcsfs.retry.HttpError", "google.auth.exceptions.GoogleAuthError", "aiohttp.ClientError"),
    "hf": (
        "huggingface_hub.errors.HfHubHTTPError",
        "httpx2.HTTPError",  # of huggingface_hub 2, the next of 1, the last of 0
        "httpx.HTTPError",
        "requests.RequestException",
    ),
}


class Refused(Exception):
    """What no further attempt changes; the message has the status, if an answer had one."""

    def __init__(self, why: str, status: int | None = None):
        super().__init__(why)
        self.status = status


class Failed(Exception):
    """What another attempt may change. pause: seconds that the store asks for until then."""

    def __init__(self, why: str, pause: float = 0.0):
        super().__init__(why)
        self.pause = pause


class Wrong(Failed):
    """A store that is there and brings something else than what was promised, or a host that there is not: what time
    alone seldom mends."""


@dataclass(frozen=True)
class Described:
    """What a store says of a file. checksums: hexadecimal, by name; `etag` is an MD5 in most cases, and not in all."""

    size: int
    checksums: dict[str, str] = field(default_factory=dict)
    version: str = ""  # changes with the content: the checksums, an ETag, a time of change


def is_stored(url: str) -> bool:
    """Whether a URL is a file in a store."""
    return bool(_PROTOCOL.match(url))


def name_of(url: str) -> str:
    """Of a file, as a copy on a disk is called: only a server has queries, and what is escaped."""
    path = unquote(urlsplit(url).path) if _scheme(url) == "http" else url
    return path.rpartition("/")[2]


def beside(url: str, name: str) -> str:
    """The URL of another file of that name in the same folder."""
    if _scheme(url) != "http":
        return f"{url.rpartition('/')[0]}/{name}"
    plain, _, query = url.partition("#")[0].partition("?")
    folder, _, last = plain.rpartition("/")
    inner, slash, _ = unquote(last).rpartition("/")  # of an escaped path, as some stores have it
    return f"{folder}/{quote(inner + slash + name, safe=_PLAIN_IN_PATHS)}" + (f"?{query}" if query else "")


def prepare(url: str) -> None:
    """Forgets what was listed before. Raises UserError where the library of a URL's scheme is not there."""
    _file_system(url).invalidate_cache()


def describe(url: str) -> Described:
    """Raises Refused and Failed."""
    with _told(url):
        info = _file_system(url).info(_path(url))
    if not info.get("size"):
        raise Refused("its size is not told" if info.get("size") is None else "it is empty")
    return described(info)


def described(info: dict) -> Described:
    """From what fsspec's `info` says."""
    checksums = {
        "md5": _hexadecimal(info.get("md5Hash") or info.get("Content-MD5")),
        "crc32c": _hexadecimal(info.get("crc32c")),
        "sha256": _field(info.get("lfs"), "sha256"),
        "etag": _md5_of_etag(info["ETag"]) if "ETag" in info and "mimetype" not in info else "",  # not those of servers
    }
    checksums = {name: digest for name, digest in checksums.items() if digest}
    told = (info.get(name) for name in ("ETag", "etag", "blob_id", "generation", "LastModified", "Last-Modified"))
    version = next((str(one) for one in (*checksums.values(), *told) if one), "")
    return Described(int(info["size"]), checksums, version)


def of_headers(headers) -> dict[str, str]:
    """The checksums of a body, from the headers that came with it."""
    found = {"md5": _hexadecimal(headers.get("Content-MD5"))}
    for value in headers.getall("x-goog-hash", []) if hasattr(headers, "getall") else []:
        for part in value.split(","):
            name, _, digest = part.strip().partition("=")
            found[name] = _hexadecimal(digest) or found.get(name, "")
    if "AmazonS3" in headers.get("Server", "") and "kms" not in headers.get("x-amz-server-side-encryption", ""):
        found["etag"] = _md5_of_etag(headers.get("ETag", ""))
    return {name: digest for name, digest in found.items() if digest and name in ("md5", "crc32c", "etag")}


def stream(url: str, size: int, start: int = 0) -> Iterator[tuple[int, bytes, dict[str, str]]]:
    """(offset, bytes, checksums told on the way) from `start` on, or from 0 where the server knows no ranges; one
    after the other. size: of the whole. Raises Refused and Failed."""
    with _told(url):
        if _scheme(url) == "http":
            yield from _streamed(url, size, start)
        else:
            with _file_system(url).open(_path(url), "rb", block_size=CHUNK, cache_type="none") as file:
                file.seek(start)
                while start < size and (chunk := file.read(min(CHUNK, size - start))):
                    yield start, chunk, {}
                    start += len(chunk)


def read_range(url: str, size: int, offset: int, length: int) -> bytes | None:
    """A few bytes of a file of `size`; None where the server knows or gives no ranges. Raises Refused and Failed."""
    content = bytearray()
    if _scheme(url) != "http":
        with _told(url):
            return _file_system(url).cat_file(_path(url), start=offset, end=offset + length)
    try:
        for place, chunk, _ in stream(url, size, offset):
            if place != offset + len(content):
                return None
            content += chunk
            if len(content) >= length:
                break
    except Refused as error:
        if offset and error.status != 404:
            return None
        raise
    return bytes(content[:length])


def read_whole(url: str) -> bytes | None:
    """A small file; None where there is none. Raises Failed."""
    try:
        with _told(url):
            return _file_system(url).cat_file(_path(url))
    except Refused:
        return None


def matching(pattern: str) -> list[str]:
    """The URLs that match a pattern with `*` and `?`, sorted; of a store that lists. Raises Refused and Failed."""
    with _told(pattern):
        system = _file_system(pattern)
        return sorted(system.unstrip_protocol(path) for path in system.glob(_path(pattern)))


def list_folder(url: str) -> None:
    """Asks for all files beside `url` at once, so that `describe` need not ask for each; refusal is no matter."""
    try:
        with _told(url):
            _file_system(url).ls(_path(url).rpartition("/")[0])
    except (Refused, Failed):
        pass  # each is asked for by itself


def _streamed(url: str, size: int, start: int) -> Iterator[tuple[int, bytes, dict[str, str]]]:
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with _file_system(url).open(url, "rb", block_size=0, size=size, headers=headers) as file:
        answer = file.r
        start = start if answer.status == 206 else 0
        promised = answer.headers.get("Content-Length")
        if promised is not None and int(promised) != size - start:
            raise Wrong(f"{promised} bytes are sent where {size - start} were promised")
        checksums = of_headers(answer.headers) if not start else {}
        while chunk := file.read(CHUNK):
            yield start, chunk, checksums
            start += len(chunk)


def _scheme(url: str) -> str:
    scheme = url.partition(":")[0].lower()
    return {"https": "http", "gcs": "gs"}.get(scheme, scheme)


def _path(url: str) -> str:
    return url if _scheme(url) == "http" else url.partition("://")[2]


def _file_system(url: str):
    scheme = _scheme(url)
    seconds = stall_seconds()
    try:
        if scheme == "http":
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=min(30.0, seconds), sock_read=seconds)
            return fsspec.filesystem("http", client_kwargs={"timeout": timeout, "trust_env": True})
        if scheme == "s3":
            waits = {"connect_timeout": min(30.0, seconds), "read_timeout": seconds}
            return fsspec.filesystem("s3", config_kwargs=waits)
        return fsspec.filesystem(scheme)
    except ImportError:
        name = f"prelude-ssl[{_EXTRAS[scheme]}]"
        raise UserError(f"{url} needs a library that is not installed: pip install '{name}'.") from None


def stall_seconds() -> float:
    """How long a server may be silent before it is asked again: less than a wait of the run may last."""
    return min(60.0, max(patience.timeout_seconds / 4, 0.5))


# ---- what went wrong


class _told:
    """Turns what a library raises into Refused and Failed, and NoMoreFiles where it is no fault of the store."""

    def __init__(self, url: str):
        self.url = url

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is None or isinstance(error, (Refused, Failed)) or not isinstance(error, _failures(self.url)):
            return False
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        for one in chain:
            if isinstance(one, OSError):
                own_fault(one)
        status = next((code for one in chain if (code := _status_of(one))), None)
        if status is None and isinstance(error, PermissionError | FileNotFoundError) and len(chain) == 1:
            status = 403 if isinstance(error, PermissionError) else 404
        if status is None and str(error).startswith("Forbidden: "):  # gcsfs
            status = 403
        served = [text for one in chain if (text := getattr(one, "server_message", None))]  # the hub's own words
        words = next((text for one in reversed(chain) if (text := _words(one, self.url))), _phrase(status, error))
        words = " ".join(served[0].split()).rstrip(".") if served else words
        told = words if status is None or str(status) in words else f"{status} {words}"
        lacks = next((one for one in chain if "Credentials" in type(one).__name__ or "DefaultCreds" in str(one)), None)
        if lacks is not None:
            raise Refused(f"{words}; give credentials where {_scheme(self.url)} looks for them") from error
        if status is not None and 400 <= status < 500 and status not in _TRY_AGAIN:
            raise Refused(told, status) from error
        if any(isinstance(one, socket.gaierror) and one.errno == socket.EAI_NONAME for one in chain):
            raise Wrong(told) from error
        raise Failed(told, next((seconds for one in chain if (seconds := _asked_pause(one))), 0.0)) from error


def _failures(url: str) -> tuple[type[Exception], ...]:
    found: list[type[Exception]] = [OSError, EOFError]
    for name in _FAILURES[_scheme(url)]:
        module, _, kind = name.rpartition(".")
        try:
            found.append(getattr(importlib.import_module(module), kind))
        except (ImportError, AttributeError):
            continue  # of a library that this store does not use here
    return tuple(found)


def _status_of(error: BaseException) -> int | None:
    """The status of an answer, wherever a library keeps it."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for place in (error, answer):
        for name in ("status", "status_code", "code"):
            if name == "code" and not type(place).__module__.startswith(("gcsfs", "google")):
                continue  # aiohttp's parser has 400 for a body that was cut off
            code = getattr(place, name, None)
            if isinstance(code, int | str) and str(code).isdigit() and 300 <= int(code) < 600:
                return int(code)
    return None


def _asked_pause(error: BaseException) -> float:
    """Seconds that an answer asks to wait, as a number or until a date; 0 where it asks for none."""
    answer = getattr(error, "response", None)
    headers = getattr(error, "headers", None) or getattr(answer, "headers", None)
    if isinstance(answer, dict):  # botocore
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders")
    asked = str(next((headers[name] for name in ("Retry-After", "retry-after") if name in (headers or {})), "")).strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return 0.0


def _phrase(status: int | None, error: BaseException) -> str:
    """The usual words for a status."""
    return type(error).__name__ if status is None else http.client.responses.get(status, "")


def _words(error: BaseException, url: str) -> str:
    """What an error says, in one line and without the URL, which is said already."""
    said = getattr(error, "message", None) or getattr(error, "strerror", None) or str(error)
    said = " ".join(str(said).split())
    return "" if said in (url, _path(url)) else said[:200].rstrip(".")


def _field(value, name: str) -> str:
    return (value.get(name) if isinstance(value, dict) else getattr(value, name, None)) or ""


def _hexadecimal(value: str | None) -> str:
    """Of base64."""
    try:
        return base64.b64decode(value, validate=True).hex() if value else ""
    except (binascii.Error, ValueError):
        return ""


def _md5_of_etag(etag: str) -> str:
    """Of an object that was put there in one part; "" of others."""
    plain = etag.strip('"').lower()
    return plain if re.fullmatch(r"[0-9a-f]{32}", plain) else ""
