"""README.md, examples/README.md, docs/**/*.md taken apart: fenced blocks, commands, what each is held against."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(DOCS.rglob("*.md"))]
TESTED = "<!-- tested -->"
_FENCE = re.compile(r"^(?P<tag><!-- tested -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block. `tested`: a shell block that is run; the others are only parsed. Python is always run."""

    page: Path
    line: int
    language: str
    code: str
    tested: bool

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The page's fenced blocks in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(page, line, match["language"], match["code"], match["tag"] is not None))
    return found


def commands_of(block: Block) -> list[list[str]]:
    """Words of each command of a shell block: lines joined at a backslash, comments gone."""
    lines = block.code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [command for command in words if command]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
