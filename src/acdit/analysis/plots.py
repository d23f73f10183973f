"""Figures of the analyses."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acdit import storage

_COLOURS = ("#2f6fb0", "#d6563c", "#e9a33c", "#5b9a68", "#8a6db1", "#8d99a8")


@contextmanager
def panels(path: str | Path, titles: Sequence[str], heading: str) -> Iterator[list[Any]]:
    """Axes side by side, a title each; the PNG is there when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(titles), 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # explicit, so that no global backend is touched
    axes = [figure.add_subplot(1, len(titles), place + 1) for place in range(len(titles))]
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.grid(True, color="#e8ebf0", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=9)
    yield axes
    with storage.atomic_file(path) as file:
        figure.savefig(file, format="png")


def plot_flops(figures: Mapping[str, Any], path: str | Path, heading: str) -> None:
    """Parts of sampling and training, closed beside counted; saving against block size."""
    with panels(path, ("a sample's FLOPs", "a training forward's FLOPs", "saved against one block"), heading) as axes:
        for panel, name in zip(axes[:2], ("sampling", "training_forward"), strict=True):
            _stacked(panel, figures[name])
        panel, rows = axes[2], figures["saving"]
        tokens = [row["block_tokens"] for row in rows]
        if all(row["paper"] is not None for row in rows):
            panel.plot(tokens, [row["paper"] for row in rows], color=_COLOURS[0], label="layers, the paper's formula")
        panel.plot(
            tokens, [row["everything"]["closed"] for row in rows], color=_COLOURS[1], linestyle="--",
            label="everything, closed form",
        )  # fmt: skip
        for key, colour in (("layers", _COLOURS[0]), ("everything", _COLOURS[1])):
            found = [(row["block_tokens"], row[key]["counted"]) for row in rows if row[key]["counted"] is not None]
            panel.plot(*zip(*found, strict=True), "o", color=colour, label=f"{key}, counted")
        panel.axhline(0.5, color="#b6bcc6", linewidth=1, linestyle=":")
        _token_axis(panel, tokens)
        panel.legend(fontsize=7)


def plot_memory(figures: Mapping[str, Any], path: str | Path, heading: str) -> None:
    """Activations of training and the peak of sampling against block size."""
    rows = figures["by_block"]
    tokens = [row["block_tokens"] for row in rows]
    with panels(path, ("training: activations, MiB", "sampling: cache and work, MiB"), heading) as axes:
        for panel, name in zip(axes, ("activations", "sampling_peak"), strict=True):
            panel.plot(tokens, [row[name]["closed"] / 2**20 for row in rows], color=_COLOURS[0], label="closed form")
            found = [(row["block_tokens"], row[name]["measured"]) for row in rows if row[name]["measured"] is not None]
            if found:
                panel.plot(
                    [at for at, _ in found], [value / 2**20 for _, value in found], "o", color=_COLOURS[1],
                    label="allocated",
                )  # fmt: skip
            panel.set_ylim(bottom=0)
            _token_axis(panel, tokens)
        axes[1].plot(
            tokens, [row["sampling"]["cache"] / 2**20 for row in rows], color=_COLOURS[2], linestyle="--",
            label="of which the cache",
        )  # fmt: skip
        for panel in axes:
            panel.legend(fontsize=7)


def plot_loss(figures: Mapping[str, Any], path: str | Path, heading: str) -> None:
    """Loss over timesteps, a line a block; the bound of each block."""
    curve, bound = figures["loss_over_timesteps"], figures["bound"]
    titles = ["loss over timesteps, by block"] + (["bits a dimension, by block"] if bound else [])
    with panels(path, titles, heading) as axes:
        blocks = list(range(len(curve["loss"][0])))
        for block in blocks:
            share = block / max(1, len(blocks) - 1)
            shade = (0.18 + 0.62 * share, 0.44 - 0.12 * share, 0.69 - 0.45 * share)
            label = f"block {block}" if len(blocks) <= 8 or block in (0, blocks[-1]) else None
            axes[0].plot(curve["timesteps"], [row[block] for row in curve["loss"]], color=shade, label=label)
        axes[0].set(xlabel="timestep", yscale="log")
        axes[0].legend(fontsize=7)
        if bound:
            parts, bottom = bound["by_block"], [0.0] * len(blocks)
            for name, colour in zip(("decoder", "diffusion", "prior"), _COLOURS, strict=False):
                heights = [row[name] for row in parts]
                axes[1].bar(blocks, heights, bottom=bottom, color=colour, label=name)
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
            totals = [row["bits_per_dim"] for row in parts]
            spread = [row["bits_per_dim"] - row["interval"][0] for row in parts]
            axes[1].errorbar(blocks, totals, spread, fmt="none", ecolor="#282c34", capsize=3)
            axes[1].set(xlabel="block")
            axes[1].xaxis.get_major_locator().set_params(integer=True)
            axes[1].legend(fontsize=7)


def plot_tradeoff(rows: Sequence[Mapping[str, Any]], path: str | Path, heading: str) -> None:
    """Time and memory against AR length, measured beside predicted, both relative to the longest block."""
    lengths = [row["num_blocks"] for row in rows]
    with panels(path, ("time of a sample, of the first", "peak beside the weights, MiB"), heading) as axes:
        axes[0].plot(lengths, [row["time"]["predicted"] for row in rows], color=_COLOURS[0], label="FLOPs predict")
        axes[0].plot(lengths, [row["time"]["measured"] for row in rows], "o-", color=_COLOURS[1], label="measured")
        for name, colour in (("predicted", _COLOURS[0]), ("measured", _COLOURS[1])):
            axes[1].plot(
                lengths, [row["memory"][name] / 2**20 for row in rows], "o-" if name == "measured" else "-",
                color=colour, label=name,
            )  # fmt: skip
        for panel in axes:
            panel.set_xscale("log", base=2)
            panel.set_xticks(lengths, labels=[str(length) for length in lengths])
            panel.set(xlabel="AR length (blocks)")
            panel.set_ylim(bottom=0)
            panel.legend(fontsize=7)


def plot_scaling(runs: Sequence[Mapping[str, Any]], fit: Mapping[str, Any] | None, path: str | Path, key: str) -> None:
    """Loss over parameters with its fit; loss over training FLOPs, a line a run."""
    with panels(path, (f"{key} over parameters", "training loss over FLOPs"), f"{len(runs)} runs") as axes:
        sizes = [run["parameters"] for run in runs]
        axes[0].plot(sizes, [run["value"] for run in runs], "o", color=_COLOURS[1])
        for run in runs:
            axes[0].annotate(run["name"], (run["parameters"], run["value"]), fontsize=7, xytext=(4, 4),
                             textcoords="offset points")  # fmt: skip
        if fit is not None:
            ends = sorted((min(sizes), max(sizes)))
            grid = [ends[0] * (ends[1] / ends[0]) ** (step / 50) for step in range(51)]
            axes[0].plot(
                grid, [fit["factor"] * size ** fit["exponent"] for size in grid], color=_COLOURS[0],
                label=f"∝ parameters^{fit['exponent']:.3f}",
            )  # fmt: skip
            axes[0].legend(fontsize=7)
        axes[0].set(xscale="log", xlabel="parameters")
        for run, colour in zip(runs, _COLOURS * len(runs), strict=False):
            axes[1].plot(run["curve"]["flops"], run["curve"]["loss"], color=colour, label=run["name"], linewidth=1)
        axes[1].set(xscale="log", yscale="log", xlabel="training FLOPs")
        axes[1].legend(fontsize=7)


def plot_arms(
    metrics: Sequence[Mapping[str, Any]], path: str | Path, heading: str, axis: str, log_axis: bool = False
) -> None:
    """A panel a metric: means of arms with their intervals, and every value.

    Args:
        metrics: each with "title", "log" (the values' axis) and "arms": "line" (the curve it belongs to), "x", "tick",
            "values", "mean" and "interval" (None: none is drawn).
        path: of the PNG.
        heading: of the picture.
        axis: what goes to the right.
        log_axis: its places are ratios.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    wrapped = "\n".join(textwrap.fill(line, 80 * len(metrics)) for line in heading.splitlines())
    with panels(path, [metric["title"] for metric in metrics], wrapped) as axes:
        for panel, metric in zip(axes, metrics, strict=True):
            arms = metric["arms"]
            ticks = {arm["x"]: arm["tick"] for arm in arms}
            room = max(ticks) - min(ticks) or 1
            lines = list(dict.fromkeys(arm["line"] for arm in arms))
            for place, (name, colour) in enumerate(zip(lines, _COLOURS * len(lines), strict=False)):
                # Curves stand a little beside each other, so that no interval hides another.
                beside = place - (len(lines) - 1) / 2
                mine = sorted((arm for arm in arms if arm["line"] == name), key=lambda arm: arm["x"])
                xs = [arm["x"] * 1.04**beside if log_axis else arm["x"] + 0.012 * room * beside for arm in mine]
                for x, arm in zip(xs, mine, strict=True):
                    panel.plot([x] * len(arm["values"]), arm["values"], ".", color=colour, alpha=0.45, zorder=2)
                    if arm["interval"] is not None:
                        panel.vlines(x, *arm["interval"], color=colour, linewidth=1.4, zorder=2)
                panel.plot(
                    xs, [arm["mean"] for arm in mine], "o-" if name else "o", color=colour, label=name or None,
                    linewidth=1.3, markersize=6, zorder=3,
                )  # fmt: skip
            panel.set_xscale("log" if log_axis else "linear")
            panel.set_xticks(list(ticks), labels=list(ticks.values()))
            panel.xaxis.minorticks_off()
            if metric["log"]:
                panel.set_yscale("log")
                plain = FuncFormatter(lambda value, _: f"{value:.3g}")
                low, high = panel.get_ylim()
                panel.yaxis.set_major_formatter(plain)
                panel.yaxis.set_minor_formatter(plain if high < 20 * low else NullFormatter())
            if not log_axis:
                panel.set_xlim(min(ticks) - 0.15 * room, max(ticks) + 0.15 * room)
            panel.set(xlabel=axis)
            if any(lines):
                panel.legend(fontsize=7, framealpha=0.5)


def _stacked(panel: Any, figures: Mapping[str, Any]) -> None:
    columns = [name for name in ("closed", "counted") if figures[name] is not None]
    parts = [name for name in figures["closed"] if name != "total" and figures["closed"][name]]
    bottom = [0.0] * len(columns)
    for part, colour in zip(parts, _COLOURS, strict=False):
        heights = [figures[column][part] for column in columns]
        panel.bar(columns, heights, bottom=bottom, color=colour, label=part, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    panel.legend(fontsize=7)


def _token_axis(panel: Any, tokens: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(tokens, labels=[str(count) for count in tokens], rotation=45, fontsize=7)
    panel.set(xlabel="tokens a block, L")
