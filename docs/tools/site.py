"""What the site takes from outside docs/: the tables of benchmarks/results, and examples/.

A page says `](../benchmarks/results/x.md)`, which is right on GitHub; on the site the tables lie in
benchmarks/results/ below its root, so the link is shortened by what leads out of docs/. A page of examples/ says
`](../docs/x.md)`, and on the site docs/ is the root.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
_OUTSIDE = re.compile(r"\]\(((?:\.\./)+)(benchmarks/results/|examples/)")


def on_files(files: Files, config: Any) -> Files:
    """Add the tables and the pictures beside them, which are reached by links; the page of examples and its scripts."""
    results = sorted((ROOT / "benchmarks" / "results").glob("*"))
    examples = sorted((ROOT / "examples").glob("*"))
    for path in (*results, *examples):
        if path.suffix in (".md", ".png", ".py"):
            reached = InclusionLevel.INCLUDED if path in examples else InclusionLevel.NOT_IN_NAV
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=reached))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to the tables and examples, as seen from inside the site."""
    markdown = _OUTSIDE.sub(lambda found: f"]({found[1][3:]}{found[2]}", markdown)
    return markdown.replace("](../docs/", "](../") if page.file.src_uri.startswith("examples/") else markdown
