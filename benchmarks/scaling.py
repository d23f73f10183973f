"""How time and memory of sampling grow with the sequence length: ours in blocks, ours as full-sequence diffusion (one
block), and the reference.

    python benchmarks/scaling.py [--reference PATH_TO_ACDiT] [--layers 2] [--steps 2] [--minutes 20]

Pictures of 1k, 4k and 16k tokens in blocks of 256 and 1024, and in one block. The width is ACDiT-B's, so that linears
and attention stand to each other as in the real model; layers and solver steps are few, to fit a small machine. What
is measured is the whole sample at these few steps. The column for 25 steps is **extrapolated** from it: measured time
outside the solver steps (reading finished blocks) + 25 × measured time of a solver step; for the reference, which
reads a finished block inside the next block's first step, the difference between first and later steps is the reading.
Memory is that of one more run in a process of its own. Results, table and picture, go to
benchmarks/results/scaling-<machine>-<date>.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import machine
import memory
import torch
from machine import command, say
from reference import describe_reference
from torch import nn
from workloads import Work, build_ours, build_theirs, our_picture, their_picture

SIDES = (32, 64, 128)
METHODS = {
    "ours, L = 256": ("ours", 16),
    "ours, L = 1024": ("ours", 32),
    "full sequence": ("ours", None),
    "reference, L = 256": ("reference", 16),
    "reference, L = 1024": ("reference", 32),
}
PAPER_STEPS = 25
WARMED_UP = 64**2


class StepClock:
    """Records when the model is asked for a prediction, from outside."""

    def __init__(self, model: nn.Module, verb: str) -> None:
        self.seconds: list[float] = []
        inner = getattr(model, verb)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            answer = inner(*arguments, **options)
            self.seconds.append(time.perf_counter() - start)
            return answer

        setattr(model, verb, timed)


def measure(method: str, work: Work, checkout: Path | None) -> dict[str, Any]:
    """One sample; at 1k and 4k tokens after another one as a warm-up, which would take too long at 16k."""
    side, _ = METHODS[method]
    model: nn.Module = build_ours(work)
    if side == "reference":
        assert checkout is not None
        model = build_theirs(work, checkout, model)
        clock, run = StepClock(model, "inference_forward"), their_picture(work, model)
    else:
        clock, run = StepClock(model, "denoise"), our_picture(work, model, compiled=False)
    if work.tokens <= WARMED_UP:
        run(0)
        clock.seconds.clear()
    start = time.perf_counter()
    run(1)
    total = time.perf_counter() - start
    steps = work.inference_steps
    by_block = [clock.seconds[index : index + steps] for index in range(0, len(clock.seconds), steps)]
    later = [statistics.median(block[1:]) for block in by_block]
    if side == "reference":
        reading = sum(max(0.0, block[0] - usual) for block, usual in zip(by_block, later, strict=True))
    else:
        reading = total - sum(clock.seconds)
    return {
        "seconds": total,
        "reading": reading,
        "solver_step": sum(later),
        "extrapolated_25_steps": reading + PAPER_STEPS * sum(later),
    }


def table(rows: list[dict[str, Any]], steps: int) -> list[str]:
    """The measurements as a page's table."""
    lines = [
        f"| tokens | method | blocks | measured, {steps} steps: s | extrapolated, 25 steps: s | KV cache | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cache, peak = (f"{row[key] / 2**20:.0f} MiB" for key in ("cache", "peak"))
        lines.append(
            f"| {row['tokens']} | {row['method']} | {row['blocks']} | {row['seconds']:.2f} | "
            f"{row['extrapolated_25_steps']:.1f} | {cache} | {peak} |"
        )
    return lines


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time and memory against tokens, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {"ours, L = 256": "C0-o", "ours, L = 1024": "C1-o", "full sequence": "k--s"}
    styles |= {"reference, L = 256": "C0:x", "reference, L = 1024": "C1:x"}
    for method, style in styles.items():
        mine = [row for row in rows if row["method"] == method]
        if mine:
            tokens = [row["tokens"] for row in mine]
            left.plot(tokens, [row["extrapolated_25_steps"] for row in mine], style, label=method)
            right.plot(tokens, [row["peak"] / 2**20 for row in mine], style, label=method)
    ticks = [side**2 for side in SIDES]
    for axes, name in ((left, "seconds a sample (25 steps, extrapolated)"), (right, "peak memory of sampling, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens S", ylabel=name, xticks=ticks)
        axes.set_xticks(ticks, labels=[f"{tokens // 1024}k" for tokens in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="a checkout of thunlp/ACDiT")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=12, help="of 64; 12 is ACDiT-B's width")
    parser.add_argument("--steps", type=int, default=2, help="solver steps a block, at least 2")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="tokens are their squares")
    parser.add_argument("--minutes", type=float, default=20.0, help="no new measurement is begun after this")
    parser.add_argument("--output", type=Path, default=machine.RESULTS)
    options = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    found = machine.describe(describe_reference(options.reference) if options.reference else None)
    begun = time.perf_counter()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for side in options.sides:
        for method, (whose, edge) in METHODS.items():
            if whose == "reference" and options.reference is None:
                continue
            work = Work(
                f"{side}²", "picture", side=side, block=edge or side, batch=1, layers=options.layers,
                heads=options.heads, inference_steps=options.steps,
            )  # fmt: skip
            if edge is not None and edge >= side:
                continue  # the whole sequence is one block: that is the full-sequence line
            if time.perf_counter() - begun > 60 * options.minutes:
                left_out.append(f"{side**2} tokens, {method}")
                continue
            with torch.no_grad():
                row = measure(method, work, options.reference)
            held = memory.in_child(work, whose, "fp32", options.reference)
            # The reference keeps a copy for each guidance branch, and its last block's predecessor only once read.
            copies = 2 if whose == "reference" else 1
            cache = 2 * copies * (work.num_blocks - 1) * work.block_tokens * 64 * work.heads * work.layers * 4
            row |= {"tokens": side**2, "method": method, "blocks": work.num_blocks, "cache": cache}
            row["peak"] = held["activation_peak"]
            rows.append(row)
            say(f"{side**2} tokens, {method}: {row['seconds']:.2f} s, peak {row['peak'] / 2**20:.0f} MiB")
    size = f"{options.layers} layers × {64 * options.heads}, fp32, batch 1, guidance 1.5"
    title = f"Sampling, {size}; {found['processor']}, {found['cores']} cores, {found['date']}"
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"scaling-{machine.slug(found)}.md"
    draw(rows, path.with_suffix(".png"), title)
    lines = [
        f"# Sampling against sequence length, {found['date']}", "", "```", command("scaling.py"), "```", "",
        *machine.as_markdown(found), f"- {size}; ours eager, both sides with the same weights", "",
        *table(rows, options.steps), "",
        "Measured: one whole sample at this number of solver steps a block. Extrapolated: measured time of reading "
        "finished blocks + 25 × the measured time of one solver step over all blocks. Peak: the most bytes allocated "
        "at once while sampling, above the weights, in a process of its own; the cache is part of it. At 1024 tokens "
        "L = 1024 is the full sequence.",
        *([f"Left out, the time was up: {'; '.join(left_out)}."] if left_out else []), "",
        f"![time and memory against tokens]({path.with_suffix('.png').name})",
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps({"machine": found, "size": size, "rows": rows}, indent=2) + "\n")
    say("\n".join(lines))


if __name__ == "__main__":
    main()
