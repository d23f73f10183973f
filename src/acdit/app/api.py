"""The page's functions for programs: endpoints that gradio's client calls, settings as JSON in, events as JSON out.

Annotations are real objects in this file (no `from __future__`): gradio reads them.
"""

import asyncio
import base64
import functools
import itertools
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from acdit.app import files
from acdit.app.anatomy import anatomy
from acdit.app.events import LAST, Cancelled, Done, Failed, Picture, Text, Ticket, Waiting
from acdit.app.requests import Request, SampleRequest, TextRequest, whole
from acdit.app.service import Service
from acdit.errors import AcditError, ConfigError

_POLL = 0.03
_ANATOMY = {
    "height": 32, "width": 32, "block_height": 16, "block_width": 16, "frames": 1, "block_frames": 1, "size": "B",
    "steps": 25, "guided": True,
}  # fmt: skip


async def heard(ticket: Ticket) -> AsyncIterator[Any]:
    """The events of a ticket, up to the last; no thread waits for them."""
    while True:
        event = ticket.poll()
        if event is None:
            await asyncio.sleep(_POLL)
            continue
        yield event
        if isinstance(event, LAST):
            return


def request_of(service: Service, kind: str, settings: Any, upload: Any = None) -> Request:
    """A checked request from JSON.

    Args:
        service: whose models are asked.
        kind: "image", "video" or "text".
        settings: names and values of `SampleRequest` or `TextRequest`; "model" may be left out.
        upload: what gradio's client makes of a file.

    Raises:
        ConfigError: unknown names, fields out of bounds, no model of the kind.
        DataError: an upload that cannot be used.
    """
    if settings is not None and not isinstance(settings, dict):
        raise ConfigError("settings", found=type(settings).__name__, expected="an object of names and values")
    given = dict(settings or {})
    fields = set(TextRequest.__dataclass_fields__ if kind == "text" else SampleRequest.__dataclass_fields__) - {"given"}
    unknown = sorted(str(name)[:40] for name in set(given) - fields)
    if unknown:
        raise ConfigError("settings", found=", ".join(unknown[:5]), expected=f"some of {', '.join(sorted(fields))}")
    names = [name for name, served in service.models.items() if served.kind == kind]
    if not names:
        raise ConfigError(kind, found="no such model is served", expected="one: acdit app MODEL")
    if given.setdefault("model", names[0]) not in names:
        raise ConfigError("model", found=f"{given['model']!r:.60}", expected=f"one of {', '.join(names)}")
    if kind == "text":
        return service.checked(TextRequest(**given))
    if upload is not None:
        path = upload.get("path") if isinstance(upload, dict) else None
        if not isinstance(path, str):
            raise ConfigError("upload", found=type(upload).__name__, expected="a file of gradio_client.handle_file")
        keep = whole("keep", given.get("keep", 0), 1, service.limits.blocks)
        given["given"] = files.read_upload(service.models[given["model"]], Path(path), keep, service.limits)
    return service.checked(SampleRequest(**given))


def as_json(event: Any, name: str, kind: str) -> dict[str, Any]:
    """An event as JSON; pictures of previews are PNGs in base64, results are the files that the page offers."""
    told: dict[str, Any] = {"request": name}
    if isinstance(event, Waiting):
        return {**told, "event": "waiting", "ahead": event.ahead}
    if isinstance(event, Picture):
        frames = event.frames[:, :, -1]  # of a clip its last frame
        return {
            **told, "event": "block" if event.finished else "step", "block": event.block, "step": event.step,
            "steps": event.steps, "labels": list(event.labels), "done": event.done, "total": event.total,
            "seconds_left": event.seconds_left, "pictures": [_base64(files.png(one, {}, 1)) for one in frames],
        }  # fmt: skip
    if isinstance(event, Text):
        return {
            **told, "event": "block" if event.finished else "step", "block": event.block, "done": event.done,
            "total": event.total, "seconds_left": event.seconds_left, "texts": list(event.texts),
            "current": list(event.current),
        }  # fmt: skip
    assert isinstance(event, Done)
    settings = event.settings
    saved: list[dict[str, str]] = []
    for index in range(settings["samples"]):
        own = {**settings, "seed": settings["seed"] + index, "samples": 1}
        if event.frames is None:
            saved.append({"type": "txt", "data": _base64(files.text_file(event.texts[index], own))})
        elif kind == "image":
            saved.append({"type": "png", "data": _base64(files.png(event.frames[index, :, 0], own))})
        else:
            saved.append({"type": "gif", "data": _base64(files.film(event.frames[index], own, "gif"))})
    return {
        **told, "event": "done", "settings": settings, "labels": list(event.labels), "seconds": event.seconds,
        "texts": list(event.texts), "files": saved,
    }  # fmt: skip


def add_api(blocks: Any, service: Service) -> None:
    """Add the endpoints to a `gradio.Blocks` that is being built."""
    import gradio as gr

    tickets: weakref.WeakValueDictionary[str, Ticket] = weakref.WeakValueDictionary()
    numbers = itertools.count(1)

    async def events(kind: str, settings: Any, upload: Any = None) -> AsyncIterator[dict[str, Any]]:
        try:
            ticket = service.submit(request_of(service, kind, settings, upload))
        except AcditError as error:
            raise gr.Error(str(error), print_exception=False) from None
        name = f"{kind}-{next(numbers)}"
        tickets[name] = ticket
        try:
            async for event in heard(ticket):
                if isinstance(event, Cancelled | Failed):
                    told = event.message if isinstance(event, Failed) else f"stopped: {event.why}"
                    raise gr.Error(told, print_exception=False)
                yield as_json(event, name, kind)
        finally:
            service.cancel(ticket, "nobody listens")

    async def image(settings: dict, upload: dict | None = None) -> AsyncIterator[dict]:
        """Pictures: events, the last one with the files. With an upload: its first `keep` blocks are continued."""
        async for told in events("image", settings, upload):
            yield told

    async def video(settings: dict, upload: dict | None = None) -> AsyncIterator[dict]:
        """Clips: events, the last one with the files. With an upload: its first `keep` blocks are continued."""
        async for told in events("video", settings, upload):
            yield told

    async def text(settings: dict) -> AsyncIterator[dict]:
        """Texts: events, the last one with the texts."""
        async for told in events("text", settings):
            yield told

    def named(name: Any) -> Ticket:
        ticket = tickets.get(name) if isinstance(name, str) else None
        if ticket is None or ticket.ended:
            raise gr.Error(f"request; found {name!r:.40}; expected one that runs", print_exception=False)
        return ticket

    def switch(name: str, label: int) -> dict:
        """Change the class of a running request from its next block on."""
        try:
            return {"label": service.switch(named(name), label)}
        except AcditError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def cancel(name: str) -> dict:
        """Stop a request within one denoising step."""
        service.cancel(named(name))
        return {"cancelled": name}

    def figures(settings: dict) -> dict:
        """What a grid and a block cost; the settings are those of `_ANATOMY`."""
        try:
            return {"figures": dict(anatomy(**_anatomy(settings)).figures)}
        except AcditError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def models() -> list:
        """What is served."""
        return [
            {
                "model": one.name, "kind": one.kind, "classes": one.num_classes, "blocks": one.layout.num_blocks,
                "block": list(one.layout.block), "solvers": list(one.solvers),
            }
            for one in service.models.values()
        ]  # fmt: skip

    checks = {kind: functools.partial(request_of, service, kind) for kind in ("image", "video", "text")} | {
        "anatomy": lambda settings: anatomy(**_anatomy(settings))
    }
    endpoints = {
        "image": image, "video": video, "text": text, "anatomy": figures, "switch": switch, "cancel": cancel,
        "models": models,
    }  # fmt: skip
    for name, function in endpoints.items():
        made = gr.api(function, api_name=name, concurrency_limit=None)
        if name in checks:  # bad fields are answered with 422 before anything is queued; gr.api has no argument for it
            blocks.fns[made["id"]].validator = _validator(checks[name])


def _anatomy(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict) or set(settings) - set(_ANATOMY):
        raise ConfigError("settings", found=f"{settings!r:.60}", expected=f"some of {', '.join(_ANATOMY)}")
    return {**_ANATOMY, **settings}


def _validator(check: Callable[..., Any]) -> Callable[..., Any]:
    """gradio's form of a function that raises what is wrong."""
    import gradio as gr

    def validator(*values: Any) -> Any:
        try:
            check(*values)
        except AcditError as error:
            return [gr.validate(False, str(error))] * len(values)
        return [gr.validate(True, "")] * len(values)

    return validator


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
