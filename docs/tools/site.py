"""What the site takes from outside docs/: the tables of benchmarks/results.

A page says `](../benchmarks/results/x.md)`, which is right on GitHub; on the site the tables lie in
benchmarks/results/ below its root, so the link is shortened by what leads out of docs/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
_OUTSIDE = re.compile(r"\]\(((?:\.\./)+)benchmarks/results/")


def on_files(files: Files, config: Any) -> Files:
    """Add the tables and the pictures beside them; they are reached by links, not by the navigation."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*")):
        if path.suffix in (".md", ".png"):
            name = path.relative_to(ROOT).as_posix()
            added = File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to the tables, as seen from inside the site."""
    return _OUTSIDE.sub(lambda found: f"]({found[1][3:]}benchmarks/results/", markdown)
