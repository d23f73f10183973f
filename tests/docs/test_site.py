"""The site builds strictly; every link, anchor and picture in the built pages leads somewhere; what is made by a script
is what the script makes."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.docs.pages import DOCS, ROOT

pytest.importorskip("mkdocs", reason="the extra docs")


class _Page(HTMLParser):
    """A page's ids, and what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.update(value for name in ("id", "name") if (value := given.get(name)))
        self.targets += [value for name in ("href", "src") if (value := given.get(name)) is not None]


def broken_links(site: Path) -> list[str]:
    """ "page → target" of all that lead nowhere inside the site."""
    pages: dict[Path, _Page] = {}
    for path in site.rglob("*.html"):
        pages[path.resolve()] = page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are from the site's root
            continue
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            fragment = unquote(parts.fragment)
            known = pages.get(place)
            if not place.is_file() or (fragment and known is not None and fragment not in known.ids):
                broken.append(f"{path.relative_to(site.resolve())} → {target}")
    return broken


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(site)],
        cwd=config.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_site_builds_and_no_link_is_broken(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert broken_links(tmp_path) == []
    api = (tmp_path / "api" / "model.html").read_text(encoding="utf-8")
    assert "Blockwise autoregressive diffusion transformer" in api  # the docstrings are there
    assert (tmp_path / "benchmarks" / "results").is_dir()
    assert not (tmp_path / "tools").exists()


@pytest.mark.parametrize("link", ["nowhere.md", "other.md#no-such-heading", "#no-such-heading", "images/none.png"])
def test_a_broken_link_or_anchor_ends_the_build(tmp_path: Path, link: str) -> None:
    """The site's own rules, on two pages."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "other.md").write_text("# Other\n\n## There\n", encoding="utf-8")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    for name in ("nav", "not_in_nav", "hooks", "extra_css"):
        config.pop(name)
    config |= {"plugins": [], "theme": {"name": "mkdocs"}, "docs_dir": "docs", "site_dir": "site"}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    outcomes = []
    for target in ("other.md#there", link):
        (docs / "index.md").write_text(f"# Index\n\n[a link]({target})\n", encoding="utf-8")
        outcomes.append(build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode)
    assert outcomes == [0, 1]


def test_a_link_that_only_the_built_page_has_is_followed_too(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="x"></p><a href="b.html#y">b</a><a href="#x">x</a><img src="c.png">')
    (tmp_path / "b.html").write_text('<p id="z"></p><a href="https://elsewhere.example/">e</a>')
    assert sorted(broken_links(tmp_path)) == ["a.html → b.html#y", "a.html → c.png"]


def tool(name: str) -> ModuleType:
    """A script of docs/tools."""
    spec = importlib.util.spec_from_file_location(f"docs_tools_{name}", DOCS / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_recipes_is_current() -> None:
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert page == tool("recipes").page(page), "run: python docs/tools/recipes.py"


def test_the_pictures_are_what_the_library_draws_and_small() -> None:
    """Pixels, not bytes: another Pillow may compress in another way, and draw letters a little otherwise."""
    script = tool("pictures")
    for name, picture in script.all_pictures().items():
        file = DOCS / "images" / name
        assert file.stat().st_size <= 60_000, name
        kept = np.asarray(Image.open(file).convert("RGB"), dtype=float)
        drawn = np.asarray(Image.open(io.BytesIO(script.as_png(picture))).convert("RGB"), dtype=float)
        assert kept.shape == drawn.shape, f"{name}: run python docs/tools/pictures.py"
        assert abs(kept - drawn).mean() < 2, f"{name}: run python docs/tools/pictures.py"


def test_every_page_is_reached_from_the_navigation() -> None:
    assert shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is not None
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        written = page.parent.name in ("results", "studies")  # tables that benchmarks and studies write
        if not written or page.name == "README.md":
            assert page.relative_to(DOCS).as_posix() in text
