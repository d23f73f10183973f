"""The same measures over one or two sampling settings: guidance, solver steps, or both."""

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
_PLOTTED = ("fid", "sfid", "inception_score", "precision", "recall")


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


def require_matplotlib() -> None:
    """Raises ConfigError where the plot could not be drawn at the end: better said before the sampling."""
    try:
        import matplotlib.figure  # noqa: F401 (only whether it is there)
    except ImportError:
        raise ConfigError(
            "--sweep", found="no matplotlib to draw its plot with", expected="the extra eval",
            fix="pip install 'acdit[eval]'",
        ) from None  # fmt: skip


def plot_sweep(axes: Sequence[Axis], results: Sequence[dict[str, Any]], title: str, path: str | Path) -> None:
    """One panel a metric over the first axis; a line for each value of the second."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [name for name in _PLOTTED if any(row[name] is not None for row in results)]
    figure = Figure(figsize=(3.4 * len(metrics), 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # explicit, so that no global backend is touched
    lines: list[dict[str, float]] = combinations(axes[1:])
    for place, metric in enumerate(metrics, start=1):
        panel = figure.add_subplot(1, len(metrics), place)
        for line in lines:
            rows = [row for row in results if all(row[key] == value for key, value in line.items())]
            rows = sorted((row for row in rows if row[metric] is not None), key=lambda row: row[axes[0].key])
            label = ", ".join(f"{key} {value:g}" for key, value in line.items()) or None
            panel.plot([row[axes[0].key] for row in rows], [row[metric] for row in rows], marker="o", label=label)
        panel.set(xlabel=axes[0].key, title=metric)
        panel.grid(True, color="#e8ebf0", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    if len(axes) > 1:
        figure.axes[0].legend(fontsize=7, framealpha=1)
    figure.suptitle(title, fontsize=9)
    with storage.atomic_file(path) as file:
        figure.savefig(file, format="png")
