"""A stand-in for the Hugging Face hub on this machine: what its API answers about data sets and their files."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """repos: files by path, by `namespace/name` of a data set; large ones (LFS, as shards are) have a SHA-256.
    private: which want the `token`. faults: statuses of the next answers to a request for a file's bytes."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    token: str = "hf_right"
    gone: set[str] = field(default_factory=set)  # about which the connection breaks off
    faults: list[int] = field(default_factory=list)
    asked: Counter = field(default_factory=Counter)  # by kind of request


@contextlib.contextmanager
def serving(hub: Hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer()

        do_HEAD = do_GET

        def do_POST(self):
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer()

        def answer(self):
            words = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = words[0] == "api"
            words = words[api:]
            if words[0] != "datasets" or len(words) < 3:
                return self.refuse(404, "RepoNotFound", "Repository not found")
            repo, what, rest = "/".join(words[1:3]), *(words[3:4] or ["revision"]), words[4:]
            hub.asked[what] += 1
            if repo in hub.gone:
                self.close_connection = True
                return self.connection.close()
            if repo not in hub.repos or (
                repo in hub.private and self.headers.get("Authorization") != f"Bearer {hub.token}"
            ):
                # The hub does not say whether there is what one may not see.
                return self.refuse(401, "RepoNotFound", "Invalid username or password.")
            if rest and rest[0] != "main":
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
            path = "/".join(rest[1:])
            if what == "revision":
                return self.tell({"id": repo, "sha": "0" * 40, "private": repo in hub.private, "siblings": []})
            if what == "tree":
                return self.tree(hub.repos[repo], path)
            if what == "paths-info":
                wanted = json.loads(self.body)["paths"]
                return self.tell([entry(p, hub.repos[repo][p]) for p in wanted if p in hub.repos[repo]])
            return self.file(hub.repos[repo].get(path))

        def tree(self, files: dict[str, bytes], folder: str):
            inside = {path: content for path, content in files.items() if path.startswith(folder and f"{folder}/")}
            if not inside:
                return self.refuse(404, "EntryNotFound", f"{folder} does not exist on main")
            start = len(folder) + bool(folder)
            found = [entry(p, c) for p, c in inside.items() if "/" not in p[start:]]
            folders = {p[: p.index("/", start)] for p in inside if "/" in p[start:]}
            return self.tell(found + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in folders])

        def file(self, content: bytes | None):
            if content is None:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            if hub.faults:
                return self.refuse(hub.faults.pop(0), "", "Something went wrong")
            begin, end = 0, len(content)
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.partition("=")[2].partition("-")
                begin, end = int(first), min(int(last) + 1 if last else end, end)
            self.send(206 if wanted else 200, content[begin:end], "application/octet-stream")

        def tell(self, found):
            self.send(200, json.dumps(found).encode(), "application/json")

        def refuse(self, status: int, code: str, message: str):
            self.send(status, json.dumps({"error": message}).encode(), "application/json",
                      {"X-Error-Code": code, "X-Error-Message": message})  # fmt: skip

        def send(self, status: int, body: bytes, kind: str, headers=()):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "Content-Type": kind, **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{running.server_port}"
        yield hub
        running.shutdown()


def entry(path: str, content: bytes) -> dict:
    """A file as the hub lists it."""
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path, "lfs": lfs}
