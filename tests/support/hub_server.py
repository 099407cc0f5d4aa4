"""A stand-in for the Hugging Face Hub: the calls that a push and a download make, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = "*.safetensors"


@dataclass
class Repo:
    """One repository: files by path at its only revision."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def head(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


def object_id(path: str, data: bytes) -> str:
    """What the hub calls a file's oid: sha256 of a large one, git's sha1 of another."""
    if fnmatch(path, LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Trouble:
    """What becomes of calls "METHOD /path" that match `calls`: a status, or a connection cut midway (None).

    The first `after` of them go well, the next `times` do not. The message repeats the caller's token, as a
    careless server might; or it is `answer`, with `headers`, after `pause` seconds.
    """

    calls: str
    status: int | None = None
    times: int = 1_000_000
    after: int = 0
    answer: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0

    def strikes(self, call: str) -> bool:
        if not re.fullmatch(self.calls, call):
            return False
        self.after -= 1
        self.times -= self.after < 0
        return self.after < 0 <= self.times


@dataclass
class Hub:
    """What the server holds, what it was asked, what came whole into its store, and what goes wrong."""

    token: str
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def trouble(self, call: str) -> Trouble | None:
        with self.lock:
            self.calls.append(call)
            return next((one for one in self.troubles if one.strikes(call)), None)


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is set by `serve`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        trouble = self.hub.trouble(f"{self.command} {path}")
        if trouble and trouble.status is None and trouble.answer is None:
            return self._cut(length)
        body = self.rfile.read(length)
        if trouble and trouble.answer is not None:
            threading.Event().wait(trouble.pause)
            with suppress(OSError):  # the caller may have gone
                self._send(trouble.answer, trouble.status or 200, **trouble.headers)
            return None
        if trouble:
            text = (
                f"refused: {self.headers.get('Authorization')} for http://store/x?signature={self.hub.token}"
            )
            return self._json({"error": text}, trouble.status)
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}" and not path.startswith("/lfs/"):
            return self._json({"error": "Invalid username or password."}, 401)
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, body, *match.groups())
        return self._json({"error": f"no such call: {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _route

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _cut(self, length: int) -> None:
        self.rfile.read(length // 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _missing(self, code: str) -> None:
        self._json({"error": code}, 404, X_Error_Code=code)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return self._json({"error": "exists", "url": url}, 409)
        private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
        self.hub.repos[name] = Repo(private)
        self._json({"url": url})

    def preupload(self, body: bytes, name: str) -> None:
        there = self.hub.repos[name].files
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if fnmatch(file["path"], LARGE) else "regular",
                "shouldIgnore": False,
                **({"oid": object_id(file["path"], there[file["path"]])} if file["path"] in there else {}),
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": modes})

    def batch(self, body: bytes, name: str) -> None:
        objects = [{key: one[key] for key in ("oid", "size")} for one in json.loads(body)["objects"]]
        for one in objects:
            if one["oid"] not in self.hub.blobs:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        with self.hub.lock:
            self.hub.blobs[oid] = body
            self.hub.stored.append(oid)
        self._send(b"")

    def commit(self, body: bytes, name: str) -> None:
        repo = self.hub.repos[name]
        entries = [json.loads(line) for line in body.splitlines()]
        if entries[0]["value"].get("parentCommit", repo.head) != repo.head:
            return self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repo.files[value["path"]]
        repo.commits += 1
        url = f"{self.hub.url}/{name}/commit/{repo.head}"
        self._json({"success": True, "commitOid": repo.head, "commitUrl": url})

    def info(self, body: bytes, name: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._missing("RepoNotFound")
        files = [{"rfilename": path} for path in repo.files]
        self._json({"id": name, "sha": repo.head, "private": repo.private, "siblings": files, "tags": []})

    def tree(self, body: bytes, name: str) -> None:
        files = self.hub.repos[name].files.items()
        found = [
            {"type": "file", "path": path, "size": len(data), "oid": object_id(path, data)}
            for path, data in files
        ]
        self._json(found)

    def resolve(self, body: bytes, name: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._missing("RepoNotFound")
        if path not in repo.files:
            return self._missing("EntryNotFound")
        data = repo.files[path]
        self._send(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=repo.head)

    def validate_yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{NAME}/preupload/main", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/([0-9a-f]+)", Handler.put_blob),
    ("POST", f"/api/models/{NAME}/commit/main", Handler.commit),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{NAME}/tree/[^/]+", Handler.tree),
    ("GET", f"/api/models/{NAME}(?:/revision/[^/]+)?", Handler.info),
    ("GET HEAD", rf"/{NAME}/resolve/[^/]+/(.+)", Handler.resolve),
]


@contextmanager
def serve(token: str) -> Iterator[Hub]:
    """A hub at `hub.url` that knows one token."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
