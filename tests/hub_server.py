"""A Hugging Face hub on the loopback, in memory: repositories that are created, written in commits, and read."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "c" * 40


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        address: http://127.0.0.1:PORT
        token: The one that may write.
        repositories: The files of each by name, as bytes.
        private: Whether it was asked to be.
        messages: Of all commits.
    """

    address: str = ""
    token: str = "hf_right"
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer(401, {"error": "Invalid username or password."})
        path = self.path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            self.hub.private[name] = asked.get("visibility") or {True: "private"}.get(asked.get("private"))
            return self._answer(200, {"url": f"{self.hub.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            ok = json.loads(body)["content"].startswith("---\n")
            return self._answer(200 if ok else 400, {} if ok else {"error": "no metadata"})
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": [{**f, "shouldIgnore": False} for f in files]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.address}/large/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            return self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        self._answer(404, {"error": path})

    def _commit(self, name: str, body: bytes) -> None:
        files = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        self._answer(200, {"commitOid": COMMIT, "commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}"})

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.removeprefix("/large/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[oid] = content
        self._answer(200, {})

    def do_GET(self) -> None:
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.hub.repositories:
                return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if parts[4] == "tree":
                files = self.hub.repositories[name]
                tree = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
                return self._answer(200, tree)
            siblings = [{"rfilename": file} for file in self.hub.repositories[name]]
            return self._answer(200, {"id": name, "sha": COMMIT, "siblings": siblings})
        content = self.hub.repositories.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._answer(200, content, headers)

    do_HEAD = do_GET

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""
