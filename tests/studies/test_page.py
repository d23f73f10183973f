"""docs/studies.md: its commands are ones that the parser takes, and it names every study."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from acdit.cli import _parsed
from acdit.studies.catalog import SETTINGS, studies

PAGE = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")


def test_every_command_on_the_page_is_one() -> None:
    block = re.search(r"```bash\n(.*?)```", PAGE, re.S)
    assert block is not None
    listed = re.findall(r"`(acdit study [^`]+)`", PAGE)
    known = studies(SETTINGS["digits"])
    named = set()
    for line in [*block[1].splitlines(), *listed]:
        options = _parsed(shlex.split(line, comments=True)[1:])
        assert options.name is None or options.name == "all" or options.name in known
        named.add(options.name)
    assert set(known) <= named
