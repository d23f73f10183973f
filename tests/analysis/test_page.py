"""docs/analysis.md: its commands are ones that the parser takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from acdit.cli import _parsed

PAGE = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")


def test_every_command_on_the_page_is_one() -> None:
    block = re.search(r"```bash\n(.*?)```", PAGE, re.S)
    assert block is not None
    verbs = set()
    for line in block[1].splitlines():
        options = _parsed(shlex.split(line, comments=True)[1:])
        assert callable(options.run)
        verbs.add(options.verb)
    assert verbs == {"flops", "memory", "mask", "loss", "tradeoff", "scaling"}
