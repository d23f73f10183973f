"""Row 35: foreign origins, paths and addresses; and sizes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from acdit.app.guard import Guard, without_foreign


def ask(
    guard: Guard, path: str = "/", method: str = "GET", body: bytes = b"", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    sent: list[Any] = []
    given = {"host": "127.0.0.1:7860", "content-length": str(len(body)), **headers}
    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    parts = [body[i : i + 1000] for i in range(0, len(body), 1000)] or [b""]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    answer = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], b"".join(part.get("body", b"") for part in sent[1:]), answer


def echo(kind: str = "text/plain", page: bytes | None = None) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive() if scope["method"] == "POST" else {"body": b"page"}
        headers = [(b"content-type", kind.encode()), (b"access-control-allow-origin", b"*")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": page or message["body"]})

    return app


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return Guard(echo(), tmp_path, 10_000)


def test_own_requests_pass(guard: Guard, tmp_path: Path) -> None:
    status, body, headers = ask(guard)
    assert (status, body) == (200, b"page")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    assert ask(guard, host="localhost:1", origin="http://localhost:1")[0] == 200
    assert ask(guard, host="[::1]:1")[0] == 200
    assert ask(guard, f"/gradio_api/file={tmp_path}/a.png")[0] == 200
    own = {"data": [{"path": f"{tmp_path}/a.png", "url": f"http://127.0.0.1:7860/gradio_api/file={tmp_path}/a.png",
                     "meta": {"_type": "gradio.FileData"}}, 3, "http://in.a.prompt/"]}  # fmt: skip
    sent = json.dumps(own).encode()
    assert ask(guard, method="POST", body=sent, content_type="application/json")[:2] == (200, sent)


@pytest.mark.parametrize("headers", [
    {"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}, {"host": ""}, {"host": "169.254.169.254"},
    {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9999"},
])  # fmt: skip
def test_foreign_origins(guard: Guard, headers: dict[str, str]) -> None:
    assert ask(guard, **headers)[0] == 403


def test_cross_site_posts(guard: Guard) -> None:
    assert ask(guard, method="POST", sec_fetch_site="cross-site")[0] == 403


PATHS = [
    "/etc/passwd", "../../etc/passwd", "{here}/../x", "{here}/a/../../x", "relative.png", "", "~/x", "\0", "C:\\x",
    "http://evil.example/x.png", "HTTPS://evil.example/x", "//evil.example/x", "\\\\evil\\x", "file:///etc/passwd",
    "ftp://x/y", "data:text/plain,x", " http://x/", "{here}x/a.png",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_foreign_paths(guard: Guard, path: str, tmp_path: Path) -> None:
    path = path.replace("{here}", str(tmp_path))
    for found in ({"path": path}, {"a": [[{"path": path, "meta": {}}]]}, {"path": f"{tmp_path}/a", "url": path or "x"}):
        body = json.dumps({"data": [found]}).encode()
        assert ask(guard, "/gradio_api/queue/join", "POST", body, content_type="application/json")[0] == 403
    assert ask(guard, f"/gradio_api/file={path}")[0] == 403
    assert ask(guard, f"/gradio_api/file={path}".replace("/", "%2f"))[0] == 403


def test_other_kinds_of_paths(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    assert ask(guard, f"/gradio_api/file={tmp_path}/link/passwd")[0] == 403
    assert ask(guard, "/gradio_api/proxy=http://evil.example/")[0] == 403
    for path in (3, ["/etc/passwd"], {"a": 1}, True):
        body = json.dumps({"data": [{"path": path}]}).encode()
        assert ask(guard, method="POST", body=body, content_type="application/json")[0] == 403


def test_sizes_and_shapes(guard: Guard) -> None:
    assert ask(guard, method="POST", body=b"x" * 100_000, content_type="multipart/form-data")[0] == 413
    assert (
        ask(guard, method="POST", body=b"x" * 100_000, content_type="multipart/form-data", content_length="5")[0] == 413
    )
    assert ask(guard, method="POST", body=b"x" * 9_000, content_type="multipart/form-data")[0] == 200
    assert ask(guard, content_length="-1")[0] == 413
    assert ask(guard, method="POST", body=b"{", content_type="application/json")[0] == 400
    assert ask(guard, method="POST", body=b"[" * 900 + b"]" * 900, content_type="application/json")[0] == 400
    assert ask(guard, method="POST", body=b"[" * 9000, content_type="application/json")[0] == 400


def test_pages_name_no_other_host(tmp_path: Path) -> None:
    page = (
        '<head><link rel="preconnect" href="https://fonts.example" /><script src="https://cdn.example/x.js" async>'
        '</script><meta property="og:image" content="https://pictures.example/a.jpg"/><script src="./own.js"></script>'
        '<link rel="stylesheet" href="./own.css"></head>'
    )
    status, body, headers = ask(Guard(echo("text/html; charset=utf-8", page.encode()), tmp_path, 1000))
    assert status == 200
    assert body.decode() == '<head><script src="./own.js"></script><link rel="stylesheet" href="./own.css"></head>'
    assert headers["content-length"] == str(len(body))
    assert without_foreign("<p>https://in.a.text/</p>") == "<p>https://in.a.text/</p>"
