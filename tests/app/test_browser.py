"""The page as a person meets it: headless Chromium, driven by Playwright. Needs chromium and the package playwright.

With ACDIT_SCREENSHOTS=folder and ACDIT_MODELS=image,video,text (folders) the same walk leaves the pictures of docs/.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from acdit.app import files
from acdit.app.models import ServedModel
from acdit.app.requests import Limits
from acdit.app.service import Service
from tests.app.served import image_model, text_model, video_model
from tests.app.serving import served_page
from tests.app.test_service import settled

pytestmark = pytest.mark.campaign
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytest.importorskip("gradio", reason="the extra `app` is not installed")
if CHROMIUM is None:
    pytest.skip("no chromium here (apt-get install chromium)", allow_module_level=True)

SECOND = 1000


def models() -> list[ServedModel]:
    named = os.environ.get("ACDIT_MODELS")
    if not named:
        return [image_model(torch.float32), video_model(torch.float32), text_model(torch.float32)]
    from acdit import ACDiTPipeline, ACDiTTextPipeline

    image, video, text = named.split(",")
    return [
        ServedModel("image", ACDiTPipeline.from_pretrained(image)),
        ServedModel("video", ACDiTPipeline.from_pretrained(video)),
        ServedModel("text", ACDiTTextPipeline.from_pretrained(text)),
    ]


@pytest.fixture(scope="module")
def page() -> Iterator[tuple[str, Service]]:
    with served_page(models(), Limits(patience=20)) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Visitor:
    """A page in the browser; what it should not do is noted."""

    def __init__(self, browser: Any, address: str, query: str = "", **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda one: self.wrong.append(one.text) if one.type == "error" else None)
        self.page.on("pageerror", lambda one: self.wrong.append(str(one)))
        self.page.on("request", lambda one: self._asked(one.url, address))
        self.page.on("response", lambda one: self.wrong.append(one.url) if one.status >= 400 else None)
        self.page.goto(address + query)
        tab = re.search(r"tab=(\w+)", query)
        self.page.wait_for_selector(f"#view-{tab[1] if tab else 'image'}:visible", timeout=60 * SECOND)
        if tab:  # the fields are filled in after the page is there
            self.page.wait_for_timeout(1000)

    def _asked(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.wrong.append(f"another host: {url}")

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def shows(self, text: str, tab: str) -> None:
        self.page.wait_for_selector(f"#view-{tab} >> text={text}", timeout=90 * SECOND)

    def made(self, tab: str, path: Path) -> Path:
        """Generate, and keep the download with the path's suffix there."""
        self.press("Generate")
        self.shows("done in", tab)
        link = self.page.locator(f"#view-{tab} a[download$={path.suffix[1:]}]").first
        path.write_bytes(base64.b64decode(str(link.get_attribute("href")).partition(",")[2]))
        return path

    def steps(self, count: int) -> None:
        self.page.get_by_text("Solver and blocks").locator("visible=true").click()
        field = self.page.get_by_label("number input for Steps a block").locator("visible=true")
        field.fill(str(count))
        field.press("Tab")

    def photograph(self, name: str, whole: bool = False) -> None:
        folder = os.environ.get("ACDIT_SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=Path(folder) / f"app-{name}.png", full_page=whole)

    def leave(self) -> None:
        self.context.close()
        assert self.wrong == []


def watched(visitor: Visitor, tab: str) -> list[str]:
    """Every different picture or text that the view shows until it is done."""
    script = """(tab) => new Promise(done => {
      const view = document.getElementById('view-' + tab), seen = [];
      const look = () => {
        const shown = view.querySelector('.acdit-frame img, .acdit-text');
        const now = shown ? (shown.src || shown.textContent) : '';
        if (now && now !== seen[seen.length - 1]) seen.push(now);
        if (view.textContent.includes('done in')) { observer.disconnect(); done(seen); }
      };
      const observer = new MutationObserver(look);
      observer.observe(view, {childList: true, subtree: true, attributes: true, characterData: true});
    })"""
    return list(visitor.page.evaluate(script, tab))


def test_generate_and_watch(page: tuple[str, Service], browser: Any) -> None:
    visitor = Visitor(browser, page[0])
    visitor.press("Generate")
    seen = watched(visitor, "image")
    assert len(seen) >= page[1].models["image"].layout.num_blocks
    link = visitor.page.locator("#view-image a[download]").first
    data = base64.b64decode(str(link.get_attribute("href")).partition(",")[2])
    assert files.settings_in(data)["steps"] == 25
    again = Visitor(browser, page[0], str(visitor.page.locator(".acdit-links a").first.get_attribute("href")))
    again.press("Generate")
    again.shows("done in", "image")
    other = again.page.locator("#view-image a[download]").first.get_attribute("href")
    first, second = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(str(one).partition(",")[2]))), dtype=int)
        for one in (link.get_attribute("href"), other)
    )
    assert np.abs(first - second).max() <= 1  # the link makes the result again
    again.leave()
    visitor.leave()
    assert settled(page[1])


def test_seen_while_it_is_denoised(page: tuple[str, Service], browser: Any) -> None:
    visitor = Visitor(browser, page[0], "?tab=image&label=3")
    visitor.steps(120)
    visitor.press("Generate")
    visitor.shows("block 3 of", "image")
    assert visitor.page.locator("#view-image .acdit-at").count() >= 1
    assert visitor.page.locator("#view-image [role=progressbar]").get_attribute("aria-valuenow") not in (
        None,
        "0",
        "100",
    )
    visitor.photograph("image")
    visitor.press("Cancel")
    visitor.shows("Stopped", "image")
    visitor.leave()
    assert settled(page[1])


def test_continue_from_an_upload(page: tuple[str, Service], browser: Any, tmp_path: Path) -> None:
    served = page[1].models["image"]
    height, width = served.layout.grid
    visitor = Visitor(browser, page[0], "?tab=image&label=3&seed=11&samples=1")
    file = visitor.made("image", tmp_path / "given.png")
    visitor.page.get_by_label("number input for How many").locator("visible=true").fill("4")
    visitor.page.get_by_text("Continue a picture").click()
    visitor.page.locator("input[type=file]:visible, input[type=file]").first.set_input_files(str(file))
    visitor.page.get_by_text("given.png").wait_for(timeout=30 * SECOND)
    visitor.press("Continue")
    visitor.page.wait_for_function(
        "() => document.querySelectorAll('#view-image a[download]').length === 4", timeout=90 * SECOND
    )
    given = np.asarray(Image.open(file).resize((width, height), Image.Resampling.BOX))
    for link in visitor.page.locator("#view-image a[download]").all():
        made = base64.b64decode(str(link.get_attribute("href")).partition(",")[2])
        (tmp_path / "made.png").write_bytes(made)
        pixels = np.asarray(Image.open(tmp_path / "made.png").resize((width, height), Image.Resampling.BOX))
        assert np.array_equal(pixels[: height // 2], given[: height // 2])
    visitor.photograph("continue")
    visitor.leave()
    assert settled(page[1])


def test_continue_a_clip(page: tuple[str, Service], browser: Any, tmp_path: Path) -> None:
    """A gif that the page has made goes in again; its first frames come out as they were."""
    layout = page[1].models["video"].layout
    height, width = layout.grid[1:]
    visitor = Visitor(browser, page[0], "?tab=video&label=0&seed=5&samples=1&steps=10")
    file = visitor.made("video", tmp_path / "given.gif")
    visitor.page.get_by_label("number input for How many").locator("visible=true").fill("2")
    visitor.page.get_by_text("Continue a clip or picture").click()
    chosen = visitor.page.locator("[role=tabpanel]:visible input[type=file]").first
    chosen.set_input_files(str(file))
    visitor.page.get_by_text("given.gif").wait_for(timeout=30 * SECOND)
    visitor.page.get_by_label("number input for Blocks to keep").locator("visible=true").fill("1")
    visitor.press("Continue")
    visitor.page.wait_for_function(
        "() => document.querySelectorAll('#view-video a[download$=gif]').length === 2", timeout=90 * SECOND
    )
    kept = layout.block[0] * layout.patch[0]
    given, made = frames_of(file, height, width), []
    for index, link in enumerate(visitor.page.locator("#view-video a[download$=gif]").all()):
        path = tmp_path / f"made-{index}.gif"
        path.write_bytes(base64.b64decode(str(link.get_attribute("href")).partition(",")[2]))
        made.append(frames_of(path, height, width))
    for clip in made:
        assert clip.shape == given.shape
        assert np.abs(clip[:kept] - given[:kept]).mean() < 4  # gif has 256 colours, and its reader decodes to YUV
        assert np.abs(clip[kept:] - given[kept:]).max() > 4  # another future: another draw
    assert np.abs(made[0][kept:] - made[1][kept:]).max() > 4
    visitor.leave()
    assert settled(page[1])


def frames_of(path: Path, height: int, width: int) -> np.ndarray:
    """(T, H, W) gray levels, as they were before they were enlarged."""
    with Image.open(path) as film:
        return np.stack([
            np.asarray(frame.convert("L").resize((width, height), Image.Resampling.BOX), dtype=int)
            for frame in ImageSequence.Iterator(film)
        ])  # fmt: skip


def test_switch_while_it_runs(page: tuple[str, Service], browser: Any) -> None:
    # Long enough that a class is switched while it runs, on a fast machine too.
    visitor = Visitor(browser, page[0], "?tab=video&label=0&blocks=32&steps=150")
    visitor.press("Generate")
    visitor.page.locator("#view-video").locator("text=/block \\d+ of/").wait_for(timeout=90 * SECOND)
    visitor.press("Switch")
    visitor.page.wait_for_selector("text=The next block will be of class", timeout=30 * SECOND)
    visitor.page.wait_for_timeout(1500)  # a block or two of the new class are in the picture
    visitor.photograph("switch")
    visitor.shows("done in", "video")
    told = visitor.page.locator("#view-video [role=status]").inner_text()
    names = [name for name, _ in page[1].models["video"].class_names]
    assert told.endswith(f"class {names[0]} {names[1]}")
    visitor.leave()
    assert settled(page[1])


def test_text_is_watched(page: tuple[str, Service], browser: Any) -> None:
    visitor = Visitor(browser, page[0], "?tab=text&prompt=bad")
    visitor.press("Write")
    seen = watched(visitor, "text")
    assert len(seen) >= 2
    visitor.photograph("text")
    visitor.leave()


def test_anatomy_changes_live(page: tuple[str, Service], browser: Any) -> None:
    visitor = Visitor(browser, page[0], "?tab=anatomy")
    visitor.shows("4 blocks × 256", "anatomy")
    field = visitor.page.get_by_label("number input for Block height")
    field.fill("8")
    field.press("Tab")
    visitor.shows("8 blocks × 128", "anatomy")
    visitor.photograph("anatomy")
    field.fill("7")
    field.press("Tab")
    visitor.shows("does not divide", "anatomy")
    for name, number in (("Block height", 8), ("Frames", 8), ("Block frames", 2)):
        field = visitor.page.get_by_label(f"number input for {name}", exact=True)
        field.fill(str(number))
        field.press("Tab")
    visitor.shows("32 blocks × 256", "anatomy")
    visitor.photograph("anatomy-clip")
    visitor.leave()


def test_by_keyboard_alone(page: tuple[str, Service], browser: Any) -> None:
    visitor = Visitor(browser, page[0])
    for _ in range(40):
        visitor.page.keyboard.press("Tab")
        if visitor.page.evaluate("document.activeElement.innerText") == "Generate":
            break
    visitor.page.keyboard.press("Enter")
    visitor.shows("done in", "image")
    visitor.leave()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(page: tuple[str, Service], browser: Any, scheme: str) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "color_scheme": scheme}
    visitor = Visitor(browser, page[0], "?tab=image&label=2", **phone)
    visitor.press("Generate")
    visitor.shows("done in", "image")
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    colour = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3]))
    assert (brightness < 200) == (scheme == "dark")
    visitor.photograph(f"phone-{scheme}", whole=True)
    visitor.leave()
