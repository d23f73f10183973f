"""A hub of a few lines on this machine: it takes repositories and commits as the real one does, and can refuse."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories by name: {"private": …, "files": {path: content}}; `refuse`: status codes by path of the request."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.refuse: dict[str, int] = {}
        self.commits: list[str] = []
        self.tokens: set[str | None] = set()
        self.address = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        for pattern, status in self.refuse.items():
            if re.search(pattern, path):
                return status, {"error": f"refused with {status}"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.repositories[name] = {"private": private, "files": {}}
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        found = re.match(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|tree|revision)/main)?(?:/.*)?$", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[found[1]]
        if found[2] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return 200, {
                "files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for one in paths]
            }
        if found[2] == "commit":
            return self._commit(found[1], body)
        if found[2] == "tree":
            return 200, [
                {"type": "file", "path": one, "size": len(content), "oid": "0" * 40}
                for one, content in repository["files"].items()
            ]
        siblings = [{"rfilename": one} for one in repository["files"]]
        return 200, {"id": found[1], "private": repository["private"], "siblings": siblings, "sha": "0" * 40}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        repository = self.repositories[name]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.commits.append(entry["value"]["summary"])
            elif entry["key"] == "file":
                repository["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del repository["files"][entry["value"]["path"]]
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/{name}/commit/0"}


@contextmanager
def served(hub: Hub) -> Iterator[str]:
    """The address of a running hub."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            hub.tokens.add(self.headers.get("authorization"))
            status, answer = hub.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            if status >= 400:
                self.send_header("x-error-message", answer["error"])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _handle

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
