"""Settings as links, and back."""

from __future__ import annotations

from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acdit.app.links import from_query, to_query
from acdit.errors import ConfigError

SETTINGS = {
    "model": "runs/demo/model", "label": 3, "samples": 2, "seed": 12345678901, "steps": 10, "guidance": 1.25,
    "solver": "dpm++", "block": (4, 16, 16), "blocks": 8, "keep": 2, "switches": ((2, 5), (4, 7)),
    "prompt": "To be, or\nnot & = #?", "sampler": "confidence", "threshold": 0.9, "temperature": 0.0, "top_p": 1e-3,
    "new_tokens": 7,
}  # fmt: skip


def test_there_and_back() -> None:
    tab, back = from_query(dict(parse_qsl(to_query("video", SETTINGS)[1:])))
    assert tab == "video"
    assert back == SETTINGS
    assert to_query("image", {"solver": None, "switches": [], "prompt": ""}) == "?tab=image"


def test_a_result_s_settings_may_hold_lists() -> None:
    """As they come out of a file."""
    query = to_query("image", {"block": [2, 2], "switches": [[1, 4]]})
    assert from_query(dict(parse_qsl(query[1:])))[1] == {"block": (2, 2), "switches": ((1, 4),)}


@pytest.mark.parametrize("query", [
    {"steps": "ten"}, {"block": "4x"}, {"switches": "1:"}, {"seed": "9" * 9000}, {"guidance": "nan"},
    {"guidance": "inf"}, {"steps": "0x10"}, {"label": ""},
])  # fmt: skip
def test_nonsense_is_named(query: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="link: " + next(iter(query))):
        from_query(query)


@given(st.dictionaries(st.sampled_from([*SETTINGS, "tab", "other"]), st.text(max_size=30)))
def test_whatever_stands_there(query: dict[str, str]) -> None:
    try:
        tab, settings = from_query(query)
    except ConfigError:
        return
    assert tab in (None, "image", "video", "text", "anatomy")
    assert set(settings) <= set(SETTINGS)
