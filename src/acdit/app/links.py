"""Settings ↔ the query of a link to the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from acdit.errors import ConfigError

TABS = ("image", "video", "text", "anatomy")
_NUMBERS = ("label", "samples", "seed", "steps", "guidance", "blocks", "keep", "new_tokens", "threshold",
            "temperature", "top_p")  # fmt: skip
_WORDS = ("model", "solver", "prompt", "sampler")
_LONGEST = 8000


def to_query(tab: str, settings: Mapping[str, Any]) -> str:
    """ "?tab=image&label=3&…": what `from_query` reads back. Settings that are None or empty are left out."""
    pairs: list[tuple[str, str]] = [("tab", tab)]
    for name, value in settings.items():
        if value is None or value in ("", [], ()):
            continue
        if name == "block":
            pairs.append((name, "x".join(str(size) for size in value)))
        elif name == "switches":
            pairs.append((name, ",".join(f"{block}:{label}" for block, label in value)))
        elif name in _NUMBERS:
            pairs.append((name, f"{value:.10g}" if isinstance(value, float) else str(value)))
        elif name in _WORDS:
            pairs.append((name, str(value)))
    return "?" + urlencode(pairs)


def from_query(query: Mapping[str, str]) -> tuple[str | None, dict[str, Any]]:
    """(tab, settings) of a link; unknown names are nobody's, bounds are checked when the request is made.

    Raises:
        ConfigError: a value that is no number, a block or switches that cannot be read.
    """
    tab = query.get("tab")
    settings: dict[str, Any] = {}
    for name, text in query.items():
        if len(text) > _LONGEST:
            raise ConfigError(f"link: {name}", found=f"{len(text)} characters", expected=f"at most {_LONGEST}")
        if name in _WORDS:
            settings[name] = text
        elif name in _NUMBERS:
            settings[name] = _number(name, text)
        elif name == "block":
            settings[name] = tuple(_integers(name, text, r"\d{1,6}(x\d{1,6})*"))
        elif name == "switches":
            flat = _integers(name, text, r"\d{1,6}:\d{1,6}(,\d{1,6}:\d{1,6})*")
            settings[name] = tuple(zip(flat[::2], flat[1::2], strict=True))
    return (tab if tab in TABS else None), settings


def _number(name: str, text: str) -> int | float:
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"-?\d{0,18}(\.\d{1,18})?(e[-+]?\d{1,3})?", text, re.IGNORECASE) and re.search(r"\d", text):
        try:
            return float(text)
        except ValueError:
            pass
    raise ConfigError(f"link: {name}", found=f"{text!r:.40}", expected="a number")


def _integers(name: str, text: str, form: str) -> list[int]:
    if not re.fullmatch(form, text):
        raise ConfigError(f"link: {name}", found=f"{text!r:.40}", expected="4x4, or of switches 2:5,3:7")
    return [int(part) for part in re.split(r"[x:,]", text)]
