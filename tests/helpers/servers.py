"""Servers on this machine for tests of what is behind a URL: one that misbehaves as told, and a stand-in for S3."""

import base64
import contextlib
import hashlib
import http.server
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

WAYS = ("silent", "stalls", "hangs-up", "longer", "shorter", "damaged")


@dataclass
class Server:
    """files: contents by name; any other name is `default`. faults: by name, what happens at each GET, one after the
    other: a status, or one of `WAYS`; a name that begins with one of these always does so."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    default: bytes | None = None
    faults: dict[str, list[str]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # sent with every file
    refusing: dict[str, str] = field(default_factory=dict)  # headers sent with every status in place of a file
    ranges: bool = True
    refused_ranges: bool = False  # with 403
    by_query: tuple[str, ...] = ()  # the parameters that name a file, with its path
    checksums: bool = True  # whether Content-MD5 is sent
    pause: float = 0.0  # seconds, between two pieces of a file
    asked: Counter = field(default_factory=Counter)  # GETs by name
    parts: list[str] = field(default_factory=list)  # the ranges that were asked for
    over: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def serving(server: Server):
    class Handler(http.server.BaseHTTPRequestHandler):
        def end_headers(self):
            for header, value in server.refusing.items() if self.refusing else ():
                self.send_header(header, value)
            super().end_headers()

        refusing = False

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body: bool):
            name, _, query = self.path[1:].partition("?")
            named = [part for part in query.split("&") if part.partition("=")[0] in server.by_query]
            name = "?".join([name, *named])
            content = server.files.get(name, server.default)
            way = self.way(name, with_body)
            if way.isdigit() or content is None:
                self.refusing = True
                return self.send_error(int(way or 404))
            if way == "silent":
                return server.over.wait(100)
            if server.refused_ranges and self.headers.get("Range"):
                return self.send_error(403)
            begin, status = 0, 200
            if with_body and server.ranges and self.headers.get("Range"):
                server.parts.append(self.headers["Range"])
                begin, status = int(self.headers["Range"].split("=")[1].partition("-")[0]), 206
            body = content[begin:]
            told = len(body) + {"longer": 1, "shorter": -1}.get(way, 0)
            self.send_response(status)
            self.send_header("Content-Length", str(told))
            if server.checksums:
                self.send_header("Content-MD5", base64.b64encode(hashlib.md5(content).digest()).decode())
            for header, value in server.headers.items():
                self.send_header(header, value)
            self.end_headers()
            if not with_body:
                return None
            if way == "damaged":
                body = body[:-700] + bytes([body[-700] ^ 1]) + body[-699:]
            body = body[: len(body) // 2] if way in ("stalls", "hangs-up") else body[:told]
            with contextlib.suppress(OSError):  # nobody may be there any more
                for at in range(0, len(body), 8192):
                    self.wfile.write(body[at : at + 8192])
                    time.sleep(server.pause)
            if way == "stalls":
                server.over.wait(100)
            return None

        def way(self, name: str, with_body: bool) -> str:
            always = next((way for way in WAYS if name.startswith(way)), name[:3] if name[:3].isdigit() else "")
            if always in server.files or name in server.files:
                always = ""
            if not with_body:
                return always if always.isdigit() else ""
            server.asked[name] += 1
            faults = server.faults.get(name)
            return faults.pop(0) if faults else always

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{running.server_port}"
        yield server
        server.over.set()
        running.shutdown()


class Bucket:
    """`s3://bucket/` of a stand-in for S3. environment: how s3fs and boto3 find it."""

    url = "s3://bucket"

    def __init__(self, port: int):
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def client(self):
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], **keys)

    def put(self, paths, folder: str = "") -> None:
        for path in paths:
            with open(path, "rb") as file:
                self.client.put_object(Bucket="bucket", Key=folder + os.path.basename(path), Body=file.read())


@contextlib.contextmanager
def stand_in_for_s3():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        bucket = Bucket(server.get_host_and_port()[1])
        bucket.client.create_bucket(Bucket="bucket")
        yield bucket
    finally:
        server.stop()
