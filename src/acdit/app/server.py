"""The page as a web server on the loopback address, from its start to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from acdit.allocator import give_back_freed_memory
from acdit.app.guard import Guard
from acdit.app.leavers import Forgetting
from acdit.app.models import ServedModel
from acdit.app.requests import Limits
from acdit.app.service import Service
from acdit.errors import ConfigError, StorageError, first_line

HOST = "127.0.0.1"
IDLE_SECONDS = 2.0
"""So long without a request, what the requests before it needed goes back to the system: nobody knows when the next
comes, and a page that stays open all day should not hold the memory of its busiest minute."""
_OFF = {
    "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_SSR_MODE": "False", "GRADIO_MCP_SERVER": "False",
    # Times of requests, for a page of statistics that is not served: a table of all of them was made anew after every
    # request, in memory (pyarrow's) that grows with them.
    "GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(2**62),
}  # fmt: skip


def require_gradio() -> None:
    """Refuse to go on without gradio.

    Raises:
        ConfigError: it is not installed, or too old.
    """
    try:
        os.environ.update(_OFF)
        import gradio
    except ImportError as error:
        raise ConfigError(
            "acdit app", found=f"no library `gradio` ({first_line(error)})", expected="the extra `app`",
            fix="pip install 'acdit[app]'",
        ) from None  # fmt: skip
    numbers = [int(part) for part in gradio.__version__.split(".")[:2]]
    if numbers < [6, 31]:  # what older ones lack: docs/installing.md
        raise ConfigError(
            "acdit app", found=f"gradio {gradio.__version__}", expected="6.31 or newer", fix="pip install 'acdit[app]'"
        )


@contextlib.contextmanager
def application(models: Sequence[ServedModel], limits: Limits | None = None) -> Iterator[tuple[Any, Service]]:
    """The ASGI application and the service behind it; what it kept on disk goes at the end.

    Args:
        models: what is served; none: only the anatomy.
        limits: see `Limits`.
    """
    require_gradio()
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="acdit-app-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder  # where gradio puts uploads, and looks for them
        try:
            with Service(models, limits) as service:
                page, forgetting = _mounted(service, limits)
                service.when_idle = forgetting.finished
                yield Guard(page, Path(folder), limits.upload_bytes), service
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def _mounted(service: Service, limits: Limits) -> tuple[Any, Forgetting]:
    import fastapi
    import gradio as gr

    from acdit.app.markup import CSS
    from acdit.app.page import Page

    system = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=system, font_mono=mono).set(
        button_primary_background_fill="#2f6fb0", button_primary_background_fill_hover="#25588d",
        button_primary_background_fill_dark="#2f6fb0", button_primary_background_fill_hover_dark="#3f83c8",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        slider_color="#2f6fb0", slider_color_dark="#5c9bd9",
    )  # fmt: skip
    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    blocks = Page(service).build()
    mounted = gr.mount_gradio_app(
        outer, blocks, path="/", server_name=HOST, show_error=True, max_file_size=limits.upload_bytes,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, footer_links=[], theme=theme,
        css=CSS, allowed_paths=[], run_history=False,
    )  # fmt: skip
    return mounted, Forgetting(blocks._queue)


def serve(
    models: Sequence[ServedModel], port: int = 7860, limits: Limits | None = None,
    started: Callable[[str], None] | None = None, stop: threading.Event | None = None,
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM, or `stop`.

    Args:
        models: what is served.
        port: on 127.0.0.1; 0 takes a free one.
        limits: see `Limits`.
        started: told the address once it answers.
        stop: for servers inside of other programs.

    Raises:
        ConfigError: without gradio.
        StorageError: the port is taken.
        SystemExit: a signal has ended it, and everything is closed.
    """
    require_gradio()
    import uvicorn

    with application(models, limits) as (app, service), _listening(port) as listener:
        address = f"http://{HOST}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=3, ws="none", server_header=False,
            timeout_keep_alive=5, loop="asyncio",
        )  # fmt: skip

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:  # its own would end the process before files are removed
                yield

        server = Server(config)
        received: list[int] = []

        def end(number: int) -> None:
            received.append(number)
            server.should_exit = True
            server.force_exit = len(received) > 1

        async def run() -> None:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGTERM, signal.SIGINT):
                    asyncio.get_running_loop().add_signal_handler(number, end, number)

            async def watch() -> None:
                while not server.started:
                    await asyncio.sleep(0.02)
                if started is not None:
                    started(address)
                given_back = time.monotonic()
                while not server.should_exit:
                    now = time.monotonic()
                    if service.last_worked > given_back and service.idle_seconds(now) > IDLE_SECONDS:
                        given_back = now
                        service.when_idle()
                        await asyncio.to_thread(give_back_freed_memory)
                    server.should_exit = server.should_exit or (stop is not None and stop.is_set())
                    await asyncio.sleep(0.05)
                await asyncio.to_thread(service.close)  # listeners hear that it ends, and their connections close

            watching = asyncio.create_task(watch())
            await server.serve(sockets=[listener])
            await watching

        asyncio.run(run())
    if received:
        raise SystemExit(128 + received[0])


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise StorageError(
                f"port {port}", found=first_line(error), expected="a free one", fix="--port 0 takes any"
            ) from None
        yield listener
    finally:
        listener.close()
