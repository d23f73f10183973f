"""The page in this process, on a free port, for tests that speak to it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from acdit.app import server
from acdit.app.models import ServedModel
from acdit.app.requests import Limits
from acdit.app.service import Service


@contextlib.contextmanager
def served_page(models: Sequence[ServedModel], limits: Limits | None = None) -> Iterator[tuple[str, Service]]:
    """(address, service); at the end the server has ended and left no thread."""
    found: list[Service] = []
    addresses: list[str] = []
    ready, stop = threading.Event(), threading.Event()
    errors: list[BaseException] = []
    made = server.Service

    class Noted(made):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append(self)

    def started(address: str) -> None:
        addresses.append(address)
        ready.set()

    def run() -> None:
        try:
            server.serve(models, 0, limits, started, stop)
        except BaseException as error:
            errors.append(error)
            ready.set()

    server.Service = Noted  # type: ignore[misc]
    thread = threading.Thread(target=run, name="page")
    try:
        thread.start()
        assert ready.wait(120), "the page did not start"
        if errors:
            raise errors[0]
        yield addresses[0], found[0]
    finally:
        server.Service = made  # type: ignore[misc]
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


WATCHED = """
import socket, sys
from pathlib import Path

connect, lookup, log = socket.socket.connect, socket.getaddrinfo, Path(sys.argv[1])
HERE = ("127.0.0.1", "localhost", "::1", None)

def refuse(what):
    with log.open("a") as file:
        file.write(f"{what}\\n")
    raise OSError(f"{what} is another machine")

def guarded(self, address):
    return connect(self, address) if not isinstance(address, tuple) or address[0] in HERE else refuse(address)

def looked_up(host, *arguments, **options):
    return lookup(host, *arguments, **options) if host in HERE else refuse(host)

socket.socket.connect, socket.getaddrinfo = guarded, looked_up
from acdit.cli import main
sys.exit(main(sys.argv[2:]))
"""
"""acdit in a process that can reach no other machine, and notes every attempt in the file of its first argument."""
