"""Ours against the reference, interleaved in one process: time of a training step and of a picture, and memory.

    make bench REFERENCE=PATH_TO_ACDiT
    python benchmarks/bench.py --reference PATH_TO_ACDiT [--dtype bf16] [--works step-1024 picture-1024] [--minutes 25]

Without a reference ours is timed alone. Both sides run the same works in the same dtype with the same weights: a step
under bf16 autocast over fp32 weights and a picture with bf16 weights (--dtype bf16), or everything in fp32. "auto" is
bf16 where the processor multiplies it in hardware and fp32 elsewhere. Results go to
benchmarks/results/<machine>-<date>.md and .json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
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
from workloads import (
    DTYPES,
    Run,
    TrainingStep,
    Work,
    build_ours,
    build_theirs,
    our_picture,
    our_step,
    their_picture,
    their_step,
)

SIDES = ("reference", "ours", "ours, compiled")
SHARES = {"step-1024": 0.3, "picture-1024": 0.4, "step-4096": 0.3}
"""Of the time for timing, per work."""
TIMING_PART = 0.75
"""Of the whole budget; the rest is for memory, which runs once a side."""
TARGETS = {
    "step-1024": {"speed": 2.0, "memory": 0.6},
    "picture-1024": {"speed": 2.0},
    "step-4096": {"speed": 3.0, "memory": 0.3},
}


def works(layers: int, long_layers: int) -> dict[str, Work]:
    """ACDiT-B's width with `layers` layers (12 is ACDiT-B) at 1024 tokens, and with `long_layers` at 4096."""
    return {
        "step-1024": Work("step-1024", "step", side=32, block=16, batch=2, layers=layers),
        "picture-1024": Work("picture-1024", "picture", side=32, block=16, batch=1, layers=layers),
        "step-4096": Work("step-4096", "step", side=64, block=16, batch=1, layers=long_layers),
    }


def tiny(work: Work) -> Work:
    """The same shape in small, to try the script out."""
    return dataclasses.replace(work, side=work.side // 4, block=4, layers=1, heads=1, inference_steps=2)


def build_runs(work: Work, dtype: str, checkout: Path | None, compiled: bool) -> dict[str, Run]:
    """One callable a side; eager and compiled share a model."""
    ours = build_ours(work)
    theirs = build_theirs(work, checkout, ours) if checkout is not None else None
    runs: dict[str, Run] = {}
    if work.kind == "step":
        if theirs is not None:
            runs["reference"] = their_step(work, theirs, dtype)
        runs["ours"] = our_step(work, ours, dtype, compiled=False)
        if compiled:
            runs["ours, compiled"] = our_step(work, ours, dtype, compiled=True)
    else:
        ours = ours.to(DTYPES[dtype])
        if theirs is not None:
            runs["reference"] = their_picture(work, theirs.to(DTYPES[dtype]))
        runs["ours"] = our_picture(work, ours, compiled=False)
        if compiled:
            runs["ours, compiled"] = our_picture(work, ours, compiled=True)
    return runs


def warm_up(work: Work, runs: dict[str, Run]) -> dict[str, Any]:
    """Run everything once on the same inputs: compiles, allocates, and shows that the sides agree.

    Pictures with two solver steps a block: the compiled verbs do not know the number of steps.
    """
    answers, seconds = {}, {}
    for side, run in runs.items():
        # Eager and compiled train one model: it goes back to where it was, so that all sides answer the same question.
        held = copy.deepcopy(run.model.state_dict()) if isinstance(run, TrainingStep) else None
        start = time.perf_counter()
        answers[side] = (run(0) if work.kind == "step" else run(0, 2)).float()
        seconds[side] = time.perf_counter() - start
        if isinstance(run, TrainingStep):
            run.model.load_state_dict(held)
        say(f"{work.name}: {side}: warm-up {seconds[side]:.1f} s")
    first = next(iter(answers.values()))
    scale = first.abs().max()
    apart = {side: float((value - first).abs().max() / scale) for side, value in answers.items()}
    return {"first_run_seconds": seconds, "apart_from_first": apart}


def interleave(runs: dict[str, Run], seconds: float, rounds: tuple[int, int], name: str) -> dict[str, list[float]]:
    """Seconds of every run: all sides once a round, in rotating order, with another seed each round."""
    times: dict[str, list[float]] = {side: [] for side in runs}
    sides = list(runs)
    begun = time.perf_counter()
    for index in range(rounds[1]):
        for side in sides[index % len(sides) :] + sides[: index % len(sides)]:
            gc.collect()
            start = time.perf_counter()
            runs[side](1 + index)
            times[side].append(time.perf_counter() - start)
        say(f"{name}: round {index + 1}: " + ", ".join(f"{side} {values[-1]:.2f} s" for side, values in times.items()))
        spent = time.perf_counter() - begun
        if index + 1 >= rounds[0] and spent * (index + 2) / (index + 1) > seconds:
            break
    return times


def time_work(work: Work, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Timing of one work."""
    runs = build_runs(work, options.dtype, options.reference, not options.no_compile)
    begun = time.perf_counter()
    warm = warm_up(work, runs)
    left = max(0.0, seconds - (time.perf_counter() - begun))
    times = interleave(runs, left, (2, options.max_rounds), work.name)
    result: dict[str, Any] = {"work": dataclasses.asdict(work), **warm, "seconds": times}
    result["tflop"] = {side: work.flops(side != "reference") / 1e12 for side in times}
    if "reference" in times:
        theirs = times["reference"]
        result["speedup"] = {
            side: {
                "of_medians": statistics.median(theirs) / statistics.median(values),
                "by_round": [a / b for a, b in zip(theirs, values, strict=True)],
            }
            for side, values in times.items()
            if side != "reference"
        }
    return result


def measure_memory(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """Memory of one work, a child process a side."""
    found = {}
    for side in SIDES:
        if (side == "reference" and options.reference is None) or (side == SIDES[2] and options.no_compile):
            continue
        found[side] = memory.in_child(work, side, options.dtype, options.reference)
        say(f"{work.name}: {side}: " + ", ".join(f"{key} {_mib(value)}" for key, value in found[side].items()))
    return found


def _mib(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f} MiB"


def report(result: dict[str, Any]) -> str:
    """The result as a page."""
    found, options = result["machine"], result["options"]
    emulated = options["dtype"] == "bf16" and not found["bf16_in_hardware"]
    rate = max(found["matmul_tflops"].values()) if emulated else found["matmul_tflops"][options["dtype"]]
    precision = {
        "fp32": "fp32 everywhere",
        "bf16": "training: bf16 autocast over fp32 weights; pictures: bf16 weights",
    }[options["dtype"]]
    lines = [
        f"# Ours and the reference, {found['date']}", "", "```", result["command"], "```", "",
        *machine.as_markdown(found), f"- precision, both sides: {precision}",
        "- both sides have the same weights and compute the same function (RoPE in the reference's form); the "
        "reference attends through its dense mask and steps torch's default AdamW, ours its fused one",
        "- the compiled step keeps matrix products and recomputes the rest (train.gradient_checkpointing=elementwise); "
        "the eager one keeps everything",
    ]  # fmt: skip
    if emulated:
        lines.append(
            "- this processor has no bf16 unit: torch's own bf16 kernels, which the reference uses, are slower there "
            "than its fp32 ones; ours multiplies the same bf16 factors on the fp32 units (acdit.products). The ratios "
            "say nothing of processors with AMX. Shares are of the fp32 rate."
        )
    if result["works"]:
        lines += [
            "- sides take turns in one process; seconds are medians (lowest … highest, runs)", "",
            "| work | side | seconds | × reference | arithmetic | share of the matmul rate | apart |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
    for name, entry in result["works"].items():
        for side, seconds in entry["seconds"].items():
            median = statistics.median(seconds)
            speed = entry.get("speedup", {}).get(side)
            ratio = "1" if side == "reference" else f"**{speed['of_medians']:.2f}**" if speed else "–"
            tflop = entry["tflop"][side]
            lines.append(
                f"| {name} | {side} | {machine.spread(seconds)} | {ratio} | {tflop:.2f} TFLOP | "
                f"{tflop / rate / median:.0%} | {entry['apart_from_first'][side]:.0e} |"
            )
    lines += ["", *(f"- {name}: {text}" for name, text in result["describe"].items()), ""]
    if result["works"]:
        lines += [
            "Arithmetic counts linears and attention: for ours 2N−1 blocks and the pairs that the rule allows, for the "
            "reference what it computes (2N blocks; in a step all pairs). Apart: largest difference of the first run's "
            "result from the reference's on the same inputs, over its largest value (loss of a step; picture after 2 "
            "steps a block).",
        ]
    if result["memory"]:
        lines += [
            "", "## Memory, a process for each side", "",
            "| work | side | weights | gradients | optimizer state | activation peak | × reference | resident peak |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, sides in result["memory"].items():
            for side, entry in sides.items():
                theirs = sides.get("reference", {}).get("activation_peak")
                ratio = f"{entry['activation_peak'] / theirs:.3f}" if theirs else "–"
                columns = [_mib(entry.get(key)) for key in ("weights", "gradients", "optimizer_state")]
                lines.append(
                    f"| {name} | {side} | {' | '.join(columns)} | {_mib(entry['activation_peak'])} | {ratio} | "
                    f"{_mib(entry['resident_peak'])} |"
                )
        lines += [
            "",
            "Activation peak: the most bytes that torch's allocator held at once during forward and backward (or a "
            "picture), above weights, gradients and optimizer state, from its own record of every allocation: exact, "
            "and the figure to trust. Resident peak: the same as the kernel saw it, libraries' scratch included.",
        ]
    lines += ["", "## Against the targets", "", "| work | figure | target | found |", "|---|---|---|---|"]
    for name, target in TARGETS.items():
        speeds = [entry["of_medians"] for entry in result["works"].get(name, {}).get("speedup", {}).values()]
        sides = result["memory"].get(name, {})
        if speeds:
            lines.append(f"| {name} | speed | ≥ {target['speed']} × | {max(speeds):.2f} × |")
        if "memory" in target and "reference" in sides:
            ratios = [
                entry["activation_peak"] / sides["reference"]["activation_peak"]
                for side, entry in sides.items()
                if side != "reference"
            ]
            lines.append(f"| {name} | activation peak | ≤ {target['memory']} × | {min(ratios):.3f} × |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="a checkout of thunlp/ACDiT")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--works", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--layers", type=int, default=12, help="of the works at 1024 tokens; 12 is ACDiT-B")
    parser.add_argument("--long-layers", type=int, help="layers of step-4096; default 12, and 4 on slow machines")
    parser.add_argument("--minutes", type=float, default=25.0, help="budget; every side still runs at least twice")
    parser.add_argument("--max-rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled runs out")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory children out")
    parser.add_argument("--no-timing", action="store_true", help="memory only: exact on any machine, however slow")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script out")
    parser.add_argument("--output", type=Path, default=machine.RESULTS)
    parser.add_argument("--name", help="of the result files; default <machine>-<date>")
    return parser.parse_args()


def main() -> None:
    options = parse()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    found = machine.describe(describe_reference(options.reference) if options.reference else None)
    if options.dtype == "auto":
        options.dtype = "bf16" if found["bf16_in_hardware"] else "fp32"
    # ACDiT-B at 4096 tokens takes the reference 13 TFLOP a sample.
    slow = found["matmul_tflops"][options.dtype] < 0.5
    chosen = {name: works(options.layers, options.long_layers or (4 if slow else 12))[name] for name in options.works}
    if options.tiny:
        chosen = {name: tiny(work) for name, work in chosen.items()}
    say("\n".join(machine.as_markdown(found)))
    seconds = 60 * options.minutes * TIMING_PART / sum(SHARES[name] for name in chosen)
    result: dict[str, Any] = {
        "command": command("bench.py"),
        "machine": found,
        "options": {"dtype": options.dtype, "minutes": options.minutes, "tiny": options.tiny},
        "describe": {name: work.describe() for name, work in chosen.items()},
        "works": {},
        "memory": {},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.name or machine.slug(found)
    begun = time.perf_counter()

    def write() -> None:
        (options.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.output / f"{name}.md").write_text(report(result))

    for key, work in () if options.no_timing else chosen.items():
        result["works"][key] = time_work(work, options, seconds * SHARES[key])
        torch.compiler.reset()
        gc.collect()
        write()  # what is measured is kept, whatever happens next
    if not options.no_memory:
        for key, work in chosen.items():
            result["memory"][key] = measure_memory(work, options)
            write()
    say((options.output / f"{name}.md").read_text())
    say(f"{(time.perf_counter() - begun) / 60:.1f} minutes; written to {name}.md and .json")


if __name__ == "__main__":
    main()
