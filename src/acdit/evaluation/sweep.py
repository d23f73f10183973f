"""The same measures over sampling settings (guidance, solver steps) and over models, of other block sizes for instance.

Small blocks may need fewer denoising steps (paper section 4.4): a block size is a model's, so a grid of block sizes and
steps is a sweep of steps over several models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acdit import storage
from acdit.errors import ConfigError

KEYS = {"guidance_scale": float, "num_inference_steps": int}
_ALIASES = {"steps": "num_inference_steps"}
_PLOTTED = ("fid", "sfid", "inception_score", "fvd", "frame_frechet", "precision", "recall")


@dataclass(frozen=True)
class Axis:
    """One setting and its values."""

    key: str
    values: tuple[float, ...]


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """One or two "key=value,value,…".

    Raises:
        ConfigError: another key, the same key twice, more than two, no number, a value twice.
    """
    axes: list[Axis] = []
    for text in texts:
        name, _, listed = text.partition("=")
        key = _ALIASES.get(name.replace("-", "_"), name.replace("-", "_"))
        if key not in KEYS:
            raise ConfigError("--sweep", found=text, expected=f"one of {', '.join(KEYS)}, like guidance_scale=1.0,1.5")
        try:
            values = tuple(KEYS[key](part) for part in listed.split(","))
        except ValueError:
            raise ConfigError(f"--sweep {key}", found=repr(listed), expected="numbers like 1.0,1.25,1.5") from None
        usable = all(math.isfinite(value) and value > 0 for value in values) or key == "guidance_scale"
        if not usable or not all(math.isfinite(value) for value in values) or len(set(values)) < len(values):
            raise ConfigError(f"--sweep {key}", found=listed, expected="different finite numbers, steps above 0")
        axes.append(Axis(key, values))
    if len(axes) > 2 or len({axis.key for axis in axes}) < len(axes):
        raise ConfigError("--sweep", found=" ".join(texts), expected="at most two, of different settings")
    return axes


def combinations(axes: Sequence[Axis]) -> list[dict[str, float]]:
    """Every point of the grid; without axes the one empty point."""
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, point, strict=True)) for point in itertools.product(*(axis.values for axis in axes))]


def require_matplotlib(what: str = "--sweep") -> None:
    """Raises ConfigError, for the command or option `what`, where the plot could not be drawn at the end: better said
    before the work."""
    try:
        import matplotlib.figure  # noqa: F401 (only whether it is there)
    except ImportError:
        raise ConfigError(
            what, found="no matplotlib to draw its plot with", expected="the extra eval",
            fix="pip install 'acdit[eval]'",
        ) from None  # fmt: skip


def series_names(models: Sequence[str], blocks: Sequence[Sequence[int]]) -> list[str]:
    """A line's name for each model: its block size, and its folder where block sizes repeat."""
    sizes = ["block " + "×".join(map(str, block)) for block in blocks]
    if len(set(sizes)) == len(sizes):
        return sizes
    folders = [path.parent.name if path.name == "model" else path.name for path in map(Path, models)]
    named = [f"{folder}, {size}" for folder, size in zip(folders, sizes, strict=True)]
    return named if len(set(named)) == len(named) else list(models)


def plot_sweep(x: str, results: Sequence[dict[str, Any]], lines: Sequence[str], title: str, path: str | Path) -> None:
    """One panel a metric over the setting `x`.

    Args:
        x: key of the rows that goes to the right.
        results: rows of metrics and settings.
        lines: a row's line, by name; "" for all where there is one line.
        title: of the figure.
        path: of the PNG.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [name for name in _PLOTTED if any(row.get(name) is not None for row in results)]
    figure = Figure(figsize=(3.4 * len(metrics), 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # explicit, so that no global backend is touched
    for place, metric in enumerate(metrics, start=1):
        panel = figure.add_subplot(1, len(metrics), place)
        for line in dict.fromkeys(lines):
            rows = [row for row, name in zip(results, lines, strict=True) if name == line and row[metric] is not None]
            rows = sorted(rows, key=lambda row: row[x])
            panel.plot([row[x] for row in rows], [row[metric] for row in rows], marker="o", label=line or None)
        panel.set(xlabel=x, title=metric)
        panel.grid(True, color="#e8ebf0", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    if len(set(lines)) > 1:
        figure.axes[0].legend(fontsize=7, framealpha=1)
    figure.suptitle(title, fontsize=9)
    with storage.atomic_file(path) as file:
        figure.savefig(file, format="png")
