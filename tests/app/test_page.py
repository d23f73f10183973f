"""The page as programs meet it: gradio's client against a running server. Browsers: test_browser.py."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acdit.app import files
from acdit.app.models import ServedModel
from acdit.app.requests import Limits
from acdit.app.service import Service
from tests.app.served import image_model, text_model, video_model
from tests.app.serving import WATCHED, served_page
from tests.app.test_service import eight_bits, settled

gradio_client = pytest.importorskip("gradio_client", reason="the extra `app` is not installed")
httpx = pytest.importorskip("httpx")
LIMITS = Limits(patience=1.0, upload_bytes=200_000)


@pytest.fixture(scope="module")
def page() -> Iterator[tuple[str, Service]]:
    models = [image_model(torch.float32), video_model(torch.float32), text_model(torch.float32)]
    with served_page(models, LIMITS) as served:
        yield served


@pytest.fixture(scope="module")
def client(page: tuple[str, Service], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gradio_client.Client(page[0], verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def picture(result: dict[str, Any], index: int = 0) -> torch.Tensor:
    """The pixels of a result's file, as they were before they were enlarged."""
    data = base64.b64decode(result["files"][index]["data"])
    pixels = np.array(Image.open(io.BytesIO(data)))
    return torch.from_numpy(pixels[16::32, 16::32].copy())


def test_pictures_through_the_api(page: tuple[str, Service], client: Any) -> None:
    job = client.submit({"label": 2, "seed": 4, "samples": 2, "steps": 3}, api_name="/image")
    done = job.result(timeout=60)
    told = [event["event"] for event in job.outputs()]
    assert told.count("block") == 4
    assert done["event"] == "done"
    wanted = page[1].models["image"].pipeline(
        class_labels=[2, 2], num_inference_steps=3, generator=4, output_type="pt"
    ).images  # fmt: skip
    assert torch.equal(picture(done, 1), eight_bits(wanted)[1, 0])
    settings = files.settings_in(base64.b64decode(done["files"][1]["data"]))
    assert settings["seed"] == 5
    again = client.predict({name: settings[name] for name in done["settings"]}, api_name="/image")
    assert (picture(again).int() - picture(done, 1).int()).abs().max() <= 1  # alone, and in a batch of two
    assert settled(page[1])


def test_an_upload_is_continued(page: tuple[str, Service], client: Any, tmp_path: Path) -> None:
    given = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    (tmp_path / "given.png").write_bytes(files.png(given, {}))
    done = client.predict(
        {"keep": 2, "samples": 3, "steps": 2}, gradio_client.handle_file(str(tmp_path / "given.png")), api_name="/image"
    )
    assert len(done["files"]) == 3
    assert all(torch.equal(picture(done, index)[:4], given[0, :4]) for index in range(3))
    assert not torch.equal(picture(done, 0), picture(done, 1))


def test_a_switch_and_a_cancel(page: tuple[str, Service], client: Any) -> None:
    job = client.submit({"blocks": 60, "steps": 40, "label": 1}, api_name="/video")  # seconds: longer than a call takes
    while not any(output["event"] in ("step", "block") for output in job.outputs()):
        time.sleep(0.005)
    assert client.predict(job.outputs()[0]["request"], 3, api_name="/switch") == {"label": 3}
    labels = job.result(timeout=120)["labels"]
    assert (labels[0], labels[-1]) == (1, 3)
    job = client.submit({"blocks": 60, "steps": 100}, api_name="/video")
    while not job.outputs():
        time.sleep(0.01)
    client.predict(job.outputs()[0]["request"], api_name="/cancel")
    with pytest.raises(Exception, match="stopped"):
        job.result(timeout=20)
    assert settled(page[1])


def test_another_model_brings_its_own_fields() -> None:
    """Chosen on the page: its classes, solvers, blocks, how many may be kept and made."""
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from acdit.app.page import Page

    other = ServedModel("other", video_model(grid=(8, 8, 4), block=(2, 4, 4), window=None).pipeline)
    with Service([video_model(torch.float32), other, image_model()]) as service:
        page = Page(service)
        page.build()
        keep, blocks = page._model_changed("other")[3], page._model_changed("other")[5]
        assert (keep["minimum"], keep["maximum"], keep["step"], keep["value"]) == (2, 6, 2, 4)
        assert (blocks["minimum"], blocks["maximum"], blocks["step"], blocks["value"]) == (2, 8, 2, 8)
        assert page._model_changed("video")[5]["maximum"] == service.limits.blocks  # under a window clips go on
        assert len(page._model_changed("image")) == 5


def test_text_anatomy_and_models(client: Any) -> None:
    done = client.predict({"prompt": "ab", "seed": 1}, api_name="/text")
    assert done["texts"][0].startswith("ab")
    assert base64.b64decode(done["files"][0]["data"]).decode().startswith(done["texts"][0])
    assert client.predict({"block_height": 8}, api_name="/anatomy")["figures"]["tokens"] == "1,024 = 8 blocks × 128"
    clip = client.predict({"frames": 4, "block_frames": 2}, api_name="/anatomy")["figures"]
    assert clip["tokens"] == "4,096 = 8 blocks × 512"
    assert [one["kind"] for one in client.predict(api_name="/models")] == ["image", "video", "text"]


def test_the_documented_program_runs(
    page: tuple[str, Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "app.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```text\n(import base64.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(program.replace("http://127.0.0.1:7860", page[0]), "docs/app.md", "exec"), {})
    assert Image.open("three.png").size == (256, 256)
    assert settled(page[1])


def join(address: str, name: str, *values: Any) -> Any:
    """What the server answers at once to a request that is to be queued."""
    text = json.dumps({"data": list(values)})  # NaN and huge numbers too, as a client may write them
    return httpx.post(f"{address}/gradio_api/call/{name}", content=text, headers={"content-type": "application/json"})


@pytest.mark.parametrize("settings", [
    {"steps": 10**9}, {"steps": -1}, {"steps": "x"}, {"samples": 10**6}, {"seed": 2**70}, {"guidance": float("nan")},
    {"guidance": 1e300}, {"label": 99}, {"block": [3, 3]}, {"block": "x"}, {"solver": "flow-euler"}, {"model": "/etc"},
    {"keep": 2}, {"blocks": 10**12}, {"unknown": 1}, {"switches": [[1]] * 100}, [1, 2], 7, "text",
])  # fmt: skip
def test_bad_fields_are_4xx_at_once(page: tuple[str, Service], settings: Any) -> None:
    answer = join(page[0], "image", settings, None)
    assert 400 <= answer.status_code < 500, answer.text
    assert page[1].waiting == page[1].running == page[1].live_caches == 0


def test_foreign_files_and_addresses_are_403(page: tuple[str, Service], tmp_path: Path) -> None:
    for path in ("/etc/passwd", "http://127.0.0.1:1/x.png", "http://evil.example/x.png", str(tmp_path / "a.png")):
        upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
        assert join(page[0], "image", {"keep": 1}, upload).status_code == 403
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=http://evil.example/",
        "/gradio_api/proxy=http://x/",
    ):
        assert httpx.get(page[0] + path).status_code == 403
    assert httpx.get(page[0], headers={"host": "evil.example"}).status_code == 403
    assert (
        httpx.post(
            page[0] + "/gradio_api/call/models", json={"data": []}, headers={"origin": "http://evil.example"}
        ).status_code
        == 403
    )
    many = {"files": ("a.png", b"x" * 400_000, "image/png")}
    assert httpx.post(page[0] + "/gradio_api/upload", files=many).status_code == 413


def test_the_page_names_no_other_host(page: tuple[str, Service]) -> None:
    got = httpx.get(page[0])
    assert got.status_code == 200
    fetched = re.findall(r"<(?:script|link|img|iframe|meta)[^>]*https?://([^/\"'>]+)", got.text)
    assert {host for host in fetched if not host.startswith("127.0.0.1")} == set()


def test_who_leaves_is_forgotten(page: tuple[str, Service]) -> None:
    event = join(page[0], "video", {"blocks": 64, "steps": 200, "samples": 8}, None).json()["event_id"]
    with httpx.stream("GET", f"{page[0]}/gradio_api/call/video/{event}", timeout=20) as stream:
        for line in stream.iter_lines():
            if '"event": "step"' in line:
                break
    started = time.monotonic()
    assert settled(page[1])
    assert time.monotonic() - started < 60  # left alone it would take far longer


def test_a_full_queue_says_busy() -> None:
    with served_page([image_model(torch.float32)], Limits(waiting=1, batch=8)) as (address, service):
        client = gradio_client.Client(address, verbose=False)
        first = client.submit({"steps": 200, "block": [1, 1]}, api_name="/image")
        while not service.running:
            time.sleep(0.01)
        second = client.submit({"steps": 1}, api_name="/image")
        while not service.waiting:
            time.sleep(0.01)
        with pytest.raises(Exception, match="busy"):
            client.predict({"steps": 1}, api_name="/image")
        client.predict(first.outputs()[0]["request"], api_name="/cancel")
        assert second.result(timeout=30)["event"] == "done"
        assert settled(service)


def test_sigterm_ends_everything_and_nobody_was_called(tmp_path: Path) -> None:
    """Row 36: while a request runs; no process, no file is left. Row 35: no other machine was asked for anything."""
    psutil = pytest.importorskip("psutil")
    image_model(torch.float32).pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(tmp_path / "called"), "app", str(tmp_path / "model"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found, process.stderr.read() if process.stderr is not None else ""
        client = gradio_client.Client(found[0], verbose=False)
        job = client.submit({"steps": 200, "block": [1, 1]}, api_name="/image")
        while not job.outputs():
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
        assert not [child for child in children if child.is_running()]
        assert list((tmp_path / "tmp").glob("acdit-app-*")) == []
        assert not (tmp_path / "called").exists(), (tmp_path / "called").read_text()
    finally:
        process.kill()
        process.wait()
