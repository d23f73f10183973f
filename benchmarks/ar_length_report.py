"""What ar_length.py shows: the page and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import machine
from ar_length_case import PAPER_STEPS, Case

PAPER = {
    "image, MAR-B": 2.74,
    "image, MAR-L": 3.58,
    "image, ACDiT-L": 2.29,
    "image, ACDiT-XL": 3.22,
    "video, MAR-B": 49.27,
    "video, MAR-L": 63.82,
    "video, ACDiT-L": 4.08,
    "video, ACDiT-XL": 5.16,
}
"""Seconds of the paper's Table 6, which names neither device nor batch, nor MAR's settings."""
Rows = list[dict[str, Any]]


def of_figure(rows: Rows) -> dict[int, Rows]:
    """Rows of the figure by tokens."""
    found: dict[int, Rows] = {}
    for row in rows:
        if row["case"].name.startswith("figure"):
            found.setdefault(row["case"].tokens, []).append(row)
    return found


def full_sequence(rows: Rows) -> dict[str, Any] | None:
    """The row of one block."""
    return next((row for row in rows if row["case"].blocks == 1), None)


def mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f} MiB"


def describe(case: Case) -> str:
    """Size and precision in words."""
    guided = "unguided" if case.guidance_scale == 1 else f"guidance {case.guidance_scale}"
    return f"{case.layers} layers × {64 * case.heads}, {case.dtype}, batch {case.batch}, {guided}"


def figure_table(rows: Rows) -> list[str]:
    """AR length against time and memory."""
    first = rows[0]["case"]
    seconds = f"{PAPER_STEPS} steps{', extrapolated' if first.extrapolated else ''}: s"
    measured = f"measured, {first.steps} steps: s"
    lines = [
        f"| tokens | AR length | {measured} | {seconds} (n) | of full sequence, time | … FLOPs predicted | "
        "TFLOP predicted | GFLOP/s | KV cache | peak | of full sequence, peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for tokens, mine in of_figure(rows).items():
        full = full_sequence(mine)
        for row in mine:
            case, flops = row["case"], row["case"].flops()
            time, work, peak = ("–", "–", "–")
            if full is not None:
                time = f"{row['seconds_25'] / full['seconds_25']:.2f}"
                work = f"{flops / full['case'].flops():.2f}"
                peak = f"{row['activation_peak'] / full['activation_peak']:.2f}"
            length = "1 (full sequence)" if case.blocks == 1 else str(case.blocks)
            lines.append(
                f"| {tokens} | {length} | {row['seconds']:.2f} | {row['seconds_25']:.1f} ({row['rounds']}) | {time} | "
                f"{work} | {flops / 1e12:.3f} | {flops / row['seconds_25'] / 1e9:.0f} | {mib(case.cache_bytes())} | "
                f"{mib(row['activation_peak'])} | {peak} |"
            )
    return lines


def peer_table(rows: Rows) -> list[str]:
    """Ours beside MAR."""
    lines = [
        "| what | tokens | size | parameters | steps | seconds (lowest … highest, n) | peak | the paper's Table 6: s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row["case"]
        if case.side == "mar":
            steps = f"{case.iterations} iterations, {case.steps} steps of the MLP"
            size = (
                f"{case.layers // 2} + {case.layers // 2} layers × {64 * case.heads}, MLP {case.mlp[1]} × {case.mlp[0]}"
            )
        else:
            steps = f"{case.blocks} blocks × {case.steps} steps"
            size = f"{case.layers} layers × {64 * case.heads}, {case.dtype}"
        low, high = row["range"]
        lines.append(
            f"| {case.name} | {case.tokens} | {size} | {row['parameters'] / 1e6:.1f} M | {steps} | "
            f"{row['seconds']:.2f} ({low:.2f} … {high:.2f}, n={row['rounds']}) | {mib(row['activation_peak'])} | "
            f"{PAPER.get(case.name, '–')} |"
        )
    return lines


def page(rows: Rows, record: dict[str, Any], left: list[str]) -> str:
    """Everything as one page."""
    found = record["machine"]
    loads = [entry["load_average"] for entry in record["measured"]]
    commits = sorted({entry["commit"] for entry in record["measured"]})
    lines = [
        f"# Sampling against AR length, {found['date']}", "", "```bash", record["command"], "```", "",
        *machine.as_markdown(found),
        f"- device {found['device']}; load average before each measurement {min(loads)} … {max(loads)}; measured at "
        f"commit {', '.join(commits)}", "",
    ]  # fmt: skip
    figure = [row for row in rows if row["case"].name.startswith("figure")]
    peers = [row for row in rows if row not in figure]
    if figure:
        first = figure[0]["case"]
        lines += [
            "## Time and memory against AR length (the paper's Figure 5)", "",
            f"{describe(first)}; 16 frames, blocks of whole frames; one block is full-sequence diffusion of the same "
            "transformer.", "", *figure_table(rows), "",
        ]  # fmt: skip
        if first.extrapolated:
            lines += [
                f"**Extrapolated** from {first.steps} solver steps a block: measured time outside the steps + "
                f"{PAPER_STEPS} × the median measured step of every block. Medians of n rounds.",
            ]
        lines += [
            "FLOPs: `acdit.costs.picture_flops` at 25 steps; GFLOP/s: these over the time. Peak: the most bytes "
            "allocated at once above the weights, from the allocator's record; the KV cache is part of it.", "",
            "![time and memory against AR length](ar-length.png)", "",
        ]  # fmt: skip
    if peers:
        lines += [
            "## Beside MAR (the paper's Table 6)", "", *peer_table(peers), "",
            "Seconds of one sample, the autoencoders left out. MAR: its own code with the random weights of its own "
            "initialisation, `img_size` 512 and 1024 for 1024 and 4096 tokens (an image of 256² has 256 of its "
            "tokens), timm's layer stood in for by one of the same products, nothing else changed; its learned "
            "positions, 3 · S · W parameters, are in its number. The paper names neither device nor batch.",
        ]  # fmt: skip
    if left:
        lines += ["", f"Left out, the time was up or the process ended: {'; '.join(left)}."]
    return "\n".join(lines) + "\n"


def draw(rows: Rows, found: dict[str, Any], path: Path) -> None:
    """Time and memory against AR length, a line for each number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = of_figure(rows)
    if not groups:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for index, (tokens, mine) in enumerate(groups.items()):
        mine, colour = sorted(mine, key=lambda row: row["case"].blocks), f"C{index}"
        name = f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
        full, ours = full_sequence(mine), [row for row in mine if row["case"].blocks > 1]
        lengths = [row["case"].blocks for row in ours]
        for axes, key, scale in ((left, "seconds_25", 1), (right, "activation_peak", 2**20)):
            axes.plot(lengths, [row[key] / scale for row in ours], f"{colour}-o", label=f"{name} tokens, ACDiT")
            if full is not None:
                axes.axhline(full[key] / scale, color=colour, linestyle="--", linewidth=1)
                axes.plot([1], [full[key] / scale], f"{colour}s", label=f"{name} tokens, full sequence")
        if full is not None:
            of_full = [row["case"].flops() / full["case"].flops() * full["seconds_25"] for row in mine]
            left.plot([row["case"].blocks for row in mine], of_full, f"{colour}:", linewidth=1)
    first = next(iter(groups.values()))[0]["case"]
    seconds = f"seconds a batch ({PAPER_STEPS} steps{', extrapolated' if first.extrapolated else ''})"
    ticks = sorted({row["case"].blocks for mine in groups.values() for row in mine})
    for axes, name in ((left, seconds), (right, "peak memory of sampling, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="AR length (blocks)", ylabel=name)
        axes.set_xticks(ticks, labels=[str(value) for value in ticks], minor=False)
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    left.plot([], [], "k:", linewidth=1, label="full sequence × FLOPs predicted")
    left.plot([], [], "k--", linewidth=1, label="height of full sequence")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    where = found["device"] if found["device"] != "CPU" else f"{found['processor']}, {found['threads']} thread(s)"
    figure.suptitle(f"Sampling, {describe(first)}; {where}; {found['date']}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
