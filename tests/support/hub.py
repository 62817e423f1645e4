"""A stand-in of the Hugging Face Hub on 127.0.0.1: the requests that uploads of a dataset make, with its limits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

MAX_OPERATIONS = 100  # in a commit: more are slow on the real one, and fail in the end
LFS = (".tar", ".parquet")


class Hub:
    """The content of one repository, and what was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}  # by SHA-256
        self.commits: list[list[str]] = []  # the paths in each
        self.num_puts = 0
        self.seconds = 0.0  # that storing an object takes

    def commit(self, lines: list[Any]) -> None:
        operations = [line for line in lines if line["key"] != "header"]
        assert 0 < len(operations) <= MAX_OPERATIONS, f"{len(operations)} operations in a commit"
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            else:
                assert operation["key"] == "deletedFile", operation["key"]
                del self.files[value["path"]]
        self.commits.append([operation["value"]["path"] for operation in operations])

    def list_tree(self) -> list[Any]:
        return [describe_file(path, data) for path, data in sorted(self.files.items())]


def describe_file(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(200)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/tree/" in path:
            self.answer(self.hub.list_tree())
        elif "/resolve/" in path:
            data = self.hub.files[path.partition("/resolve/main/")[2]]
            self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit="1" * 40)
        else:
            self.answer({"id": "me/photos", "sha": "1" * 40, "siblings": []})

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        data, name = self.read_body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == name
        time.sleep(self.hub.seconds)
        self.hub.objects[name] = data
        self.hub.num_puts += 1
        self.answer({})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.read_body()
        if path.endswith("/repos/create"):
            self.answer({"url": f"{self.hub.url}/datasets/me/photos"})
        elif path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self.answer({"files": [self.choose_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(
                {"transfer": "basic", "objects": [self.plan_upload(one) for one in json.loads(body)["objects"]]}
            )
        elif "/commit/" in path:
            self.hub.commit([json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.url}/datasets/me/photos/commit/{'1' * 40}"
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.send_error(404)

    def choose_mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LFS) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def plan_upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Starts it; clients find it by HF_ENDPOINT."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
