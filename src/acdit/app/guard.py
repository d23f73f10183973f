"""Between the network and the page: who may ask, how much, for which files, and nothing foreign in the answers.

A plain ASGI layer, so that its rules hold whatever the web framework inside does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_JSON_BYTES = 2**20
_DEPTH = 32
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'; "
    "base-uri 'self'"
)
_ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]*:)?[/\\]{2}|\s*(file|data|ftp|gopher|hf):", re.IGNORECASE)
# Elements of the framework's page that would fetch from, or name, other hosts.
_FOREIGN = re.compile(
    r"<script[^>]*\ssrc=[\"'](?:https?:)?//[^>]*>\s*</script>|<(?:link|meta)[^>]*(?:href|content)=[\"'](?:https?:)?//[^>]*>",
    re.IGNORECASE | re.DOTALL,
)


class Guard:
    """Wrap an ASGI application.

    Args:
        app: what is guarded.
        uploads: the one folder whose files a request may name.
        upload_bytes: the largest body.
    """

    def __init__(self, app: Any, uploads: Path, upload_bytes: int) -> None:
        self._app, self._uploads = app, uploads.resolve()
        self._most = upload_bytes + 2**16  # a form around the file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websocket is needed
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        body = None
        if scope["method"] in ("POST", "PUT", "PATCH"):
            is_json = "json" in headers.get("content-type", "json")
            most = _JSON_BYTES if is_json else self._most
            body = await _read(receive, most)
            if body is None:
                await _answer(send, 413, f"the body is larger than {most:,} bytes")
                return
            if is_json and body:
                problem = self._problem(body)
                if problem is not None:
                    await _answer(send, *problem)
                    return
        await self._app(scope, receive if body is None else _replayed(body, receive), _cleaned(send))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if urlsplit(f"//{host}").hostname not in LOOPBACK:
            return 403, "this page answers to 127.0.0.1 and localhost only"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "requests of other pages are refused"
        if headers.get("sec-fetch-site", "same-origin") in ("cross-site", "same-site") and scope["method"] != "GET":
            return 403, "requests of other pages are refused"
        path = unquote(unquote(scope["path"]))
        if "proxy=" in path or ("file=" in path and not self._ours(path.partition("file=")[2])):
            return 403, "only uploads of this page are served"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > self._most:
            return 413, f"the body is larger than {self._most:,} bytes"
        return None

    def _problem(self, body: bytes) -> tuple[int, str] | None:
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            return 400, "the body is no JSON"
        return self._judged(found, 0)

    def _judged(self, found: Any, depth: int) -> tuple[int, str] | None:
        if depth > _DEPTH:
            return 400, "the body is nested too deeply"
        if isinstance(found, dict):
            names = {"path", "url"} if "path" in found or "meta" in found else set()
            for name in names & found.keys():
                value = found[name]
                if value is not None and not (isinstance(value, str) and self._fine(name, value)):
                    return 403, "only uploads of this page are taken, no other files and no addresses"
            found = list(found.values())
        if isinstance(found, list):
            for part in found:
                problem = self._judged(part, depth + 1)
                if problem is not None:
                    return problem
        return None

    def _fine(self, name: str, value: str) -> bool:
        if name == "url":  # what the page itself sends along with an upload
            parts = urlsplit(value)
            return (
                parts.hostname in (*LOOPBACK, None)
                and "file=" in parts.path
                and self._ours(unquote(parts.path.partition("file=")[2]))
            )
        return self._ours(value)

    def _ours(self, path: str) -> bool:
        if _ADDRESS.match(path) or "\0" in path:
            return False
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self._uploads)
        except (OSError, ValueError, RuntimeError):
            return False


async def _read(receive: Receive, most: int) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _cleaned(send: Send) -> Send:
    """Add headers that keep the browser here, and take foreign elements out of pages."""
    held: dict[str, Any] = {}

    async def cleaned(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value) for name, value in message["headers"] if not name.lower().startswith(b"access-control")
            ]
            kind = dict(kept).get(b"content-type", b"")
            kept += [
                (b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff"),
                (b"referrer-policy", b"no-referrer"), (b"cross-origin-resource-policy", b"same-origin"),
            ]  # fmt: skip
            message = {**message, "headers": kept}
            if kind.startswith(b"text/html"):
                held.update(start=message, body=[])
                return
        elif message["type"] == "http.response.body" and held:
            held["body"].append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = without_foreign(b"".join(held["body"]).decode()).encode()
            start = held["start"]
            headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
            await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            message = {"type": "http.response.body", "body": body}
        await send(message)

    return cleaned


def without_foreign(page: str) -> str:
    """A page without the elements that name other hosts."""
    return _FOREIGN.sub("", page)


async def _answer(send: Send, status: int, text: str) -> None:
    body = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
