"""A stand-in for the Hugging Face Hub: the calls that a push and a download make, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


@dataclass
class Hub:
    """What the server holds and what it was asked; `refuse` answers every call with that status."""

    token: str
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    refuse: int | None = None


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is set by `serve`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.calls.append(f"{self.command} {path}")
        if self.hub.refuse:
            return self._json({"error": "refused"}, self.hub.refuse)
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
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if fnmatch(file["path"], LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": modes})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {
                **{key: one[key] for key in ("oid", "size")},
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}},
            }
            for one in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._send(b"")

    def commit(self, body: bytes, name: str) -> None:
        repo = self.hub.repos[name]
        for line in body.splitlines():
            entry = json.loads(line)
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
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
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
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
