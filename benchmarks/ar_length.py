"""Sampling time and memory against AR length, and beside MAR's: the paper's Figure 5 and Table 6, measured here.

    python benchmarks/ar_length.py [--mar PATH_TO_MAR] [--output runs/ar-length] [--minutes 30]

**Figure 5.** Videos of 16 frames and 4k, 16k and 64k tokens, cut into 1, 2, 4, 8 and 16 blocks of whole frames. One
block is full-sequence diffusion of the same transformer by the same code: there is nothing to cache. On a CPU a small
transformer, unguided, in 2 solver steps a block; the figure for 25 is **extrapolated**: measured time outside the steps
(reading finished blocks) + 25 × the median solver step of every block. On CUDA ACDiT-B, batch 4 as the paper, all 25.

**Table 6.** A picture of 1024 tokens in 4 blocks (guidance 1.5) and a video of 4096 in 4 (guidance 2.5), 25 steps,
beside MAR's own sampling code (LTH14/mar, see mar.py) at as many tokens: 64 iterations, its MLP in 100 steps, guided.
Nothing is extrapolated. On CUDA ACDiT-L and XL in bf16, MAR-B and L, batch 1, beside the paper's seconds; on a CPU the
small transformer, and a MAR of the same width and layers whose MLP is as wide as makes it of the same size.

Every measurement is taken in a process of its own (ar_length_case.py), in rounds in which all take turns, the order
turned by one each round. What is measured stands in ar-length.json at once: the same command goes on where it was
stopped. Table and plot, ar-length.md and .png, are written at the end, or with `--minutes 0` from what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ar_length_case
import machine
import torch
from ar_length_case import PAPER_STEPS, Case, as_request, picture, video
from ar_length_report import draw, page
from machine import command, say
from mar import DIFFUSION_DEPTH, describe_mar, diffusion_width, require_mar

from acdit.model import PRESETS

MARS = {"MAR-B": (24, 12, (1024, 6)), "MAR-L": (32, 16, (1280, 8))}
"""Layers, heads, and width and layers of the MLP, from its README."""
ROUNDS = 3


def figure_cases(options: argparse.Namespace) -> Iterator[list[Case]]:
    """A group for each number of tokens."""
    for tokens in options.tokens:
        yield [
            Case(
                name=f"figure, {tokens} tokens, {blocks} blocks", side="ours", **video(tokens, blocks),
                layers=options.layers, heads=options.heads, batch=options.batch, steps=options.steps,
                guidance_scale=options.guidance_scale, device=options.device, dtype=options.dtype,
            )
            for blocks in options.blocks
        ]  # fmt: skip


def table_cases(options: argparse.Namespace) -> Iterator[list[Case]]:
    """A group for the picture and one for the video."""
    if options.device == "cuda":
        ours = {f"ACDiT-{size}": PRESETS[size] for size in ("L", "XL")}
    else:
        ours = {"ours": {"num_layers": options.layers, "num_attention_heads": options.heads}}
    edges = (16, 8) if options.tiny else (32, 16)
    kinds = {"image": picture(*edges), "video": video(256 if options.tiny else 4096, 4)}
    for kind, shape in kinds.items():
        group = []
        common: dict[str, Any] = {
            **shape, "batch": 1, "guidance_scale": 1.5 if kind == "image" else 2.5, "device": options.device
        }  # fmt: skip
        for name, size in ours.items():
            case = Case(
                name=f"{kind}, {name}", side="ours", layers=size["num_layers"], heads=size["num_attention_heads"],
                steps=2 if options.tiny else PAPER_STEPS, dtype=options.dtype, **common,
            )  # fmt: skip
            group.append(case)
        mars = {} if options.mar is None else MARS
        if mars and options.device != "cuda":
            depth = max(1, options.layers // 2)
            wide = diffusion_width(group[0].architecture.parameters, depth, 64 * options.heads)
            mars = {"MAR": (2 * depth, options.heads, (wide, DIFFUSION_DEPTH))}
        for name, (layers, heads, mlp) in mars.items():
            case = Case(
                name=f"{kind}, {name}", side="mar", layers=layers, heads=heads, mlp=mlp, dtype="fp32",
                steps=4 if options.tiny else 100, iterations=4 if options.tiny else 64, **common,
            )  # fmt: skip
            group.append(case)
        yield group


def plan(groups: list[list[Case]], rounds: list[int]) -> list[tuple[int, Case]]:
    """All measurements in the order they are taken: round by round, each group from another case on."""
    order = []
    for index in range(max(rounds)):
        for group, count in zip(groups, rounds, strict=True):
            turn = index % len(group)
            order += [(index, case) for case in group[turn:] + group[:turn] if index < count]
    return order


def measure(case: Case, checkout: Path | None) -> dict[str, Any] | None:
    """One measurement in a child; None, with the reason said, if it ends without an answer."""
    script = [sys.executable, ar_length_case.__file__, as_request(case)]
    child = subprocess.run(
        [*script, *([str(checkout)] if checkout else [])], capture_output=True, text=True, check=False
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        why = lines[-1] if lines else "killed, perhaps for lack of memory"
        say(f"{case.name}: no answer, the process ended with {child.returncode}: {why}")
        return None
    return json.loads(child.stdout.splitlines()[-1])


def opened(path: Path, cases: list[Case], options: argparse.Namespace) -> dict[str, Any]:
    """What was measured before, or a new record.

    Raises:
        SystemExit: the file holds measurements of other settings or of another machine.
    """
    here = {"processor": machine.processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    described = json.loads(json.dumps({case.name: asdict(case) for case in cases}))  # tuples as a file gives them back
    if path.exists():
        record = json.loads(path.read_text())
        apart = [key for key, value in here.items() if record["machine"][key] != value]
        apart += [name for name, case in described.items() if record["cases"].get(name, case) != case]
        if apart:
            raise SystemExit(
                f"{path} holds measurements of other settings ({apart[0]}): give a new --output, or remove it"
            )
        record["cases"] |= described
        record["command"] = command("ar_length.py")
        if options.mar is not None:
            record["machine"]["reference"] = describe_mar(options.mar)
        return record
    found = machine.describe(describe_mar(options.mar) if options.mar else None)
    found["device"] = torch.cuda.get_device_name(0) if options.device == "cuda" else "CPU"
    return {"machine": found, "command": command("ar_length.py"), "cases": described, "measured": []}


def write(path: Path, record: dict[str, Any]) -> None:
    """At once or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def run(order: list[tuple[int, Case]], record: dict[str, Any], path: Path, options: argparse.Namespace) -> list[str]:
    """Take the measurements that are missing; names of those still missing when the time is up."""
    done = {(entry["name"], entry["round"]) for entry in record["measured"]}
    begun, left = time.perf_counter(), []
    commit = machine.commit()
    for index, case in order:
        if (case.name, index) in done:
            continue
        if time.perf_counter() - begun > 60 * options.minutes:
            left.append(f"{case.name} (round {index + 1})")
            continue
        found = measure(case, options.mar)
        if found is None:
            left.append(f"{case.name} (round {index + 1}: no answer)")
            continue
        if not found["finite"]:
            raise SystemExit(f"{case.name}: the sample is not finite, so its time is not worth having")
        record["measured"].append({"name": case.name, "round": index, "commit": commit, **found})
        write(path, record)
        extra = f", extrapolated to 25 steps {found['seconds_25']:.1f} s" if case.extrapolated else ""
        peak = found["activation_peak"] / 2**20
        say(f"round {index + 1}, {case.name}: {found['seconds']:.2f} s{extra}, peak {peak:.0f} MiB")
    say(f"{(time.perf_counter() - begun) / 60:.1f} minutes")
    return left


def summed(record: dict[str, Any], cases: list[Case]) -> list[dict[str, Any]]:
    """A row a case that was measured: medians over its rounds."""
    rows = []
    for case in cases:
        mine = [entry for entry in record["measured"] if entry["name"] == case.name]
        if not mine:
            continue
        row: dict[str, Any] = {"case": case, "rounds": len(mine), "parameters": mine[0]["parameters"]}
        for key in ("seconds", "seconds_25", "activation_peak"):
            row[key] = statistics.median(entry[key] for entry in mine)
        row["range"] = (min(entry["seconds"] for entry in mine), max(entry["seconds"] for entry in mine))
        rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    """The options, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mar", type=Path, help="a checkout of LTH14/mar")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of ours; default fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--tokens", type=int, nargs="+", help="16 · h²; default 4096 16384 65536")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="AR lengths")
    parser.add_argument("--layers", type=int, help="default 2; on CUDA 12")
    parser.add_argument("--heads", type=int, help="of 64; default 4; on CUDA 12")
    parser.add_argument("--batch", type=int, help="of the figure; default 1; on CUDA 4")
    parser.add_argument("--steps", type=int, help="solver steps a block of the figure; default 2; on CUDA 25")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="of the figure; 1: none")
    parser.add_argument("--rounds", type=int, nargs="+", help="for each of --tokens; default 3 2 1; on CUDA 3")
    parser.add_argument("--table-rounds", type=int, help="default 2; on CUDA 3")
    parser.add_argument("--minutes", type=float, default=30.0, help="no new measurement is begun after this")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script out")
    parser.add_argument("--output", type=Path, default=Path("runs/ar-length"))
    options = parser.parse_args()
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise SystemExit("--device cuda: torch sees no CUDA device here; give --device cpu")
    if options.device == "auto":
        options.device = "cuda" if has_cuda else "cpu"
    on_cuda = options.device == "cuda"
    tokens = [256, 1024] if options.tiny else [4096, 16384, 65536]
    given = {"dtype": ("fp32", "bf16"), "layers": (2, 12), "heads": (4, 12), "batch": (1, 4), "steps": (2, 25)}
    given |= {"table_rounds": (2, ROUNDS), "tokens": (tokens, tokens)}
    for name, defaults in given.items():
        if getattr(options, name) is None:
            setattr(options, name, defaults[on_cuda])
    if options.rounds is None:
        options.rounds = [ROUNDS] * len(options.tokens) if on_cuda else [3, 2, 1][: len(options.tokens)]
    options.rounds += options.rounds[-1:] * (len(options.tokens) - len(options.rounds))
    least = min(options.layers, options.heads, options.batch, options.steps, options.table_rounds, *options.rounds)
    if least < 1 or len(options.rounds) != len(options.tokens):
        raise SystemExit(
            "layers, heads, batch, steps and rounds are at least 1, and --rounds has one for each of --tokens"
        )
    return options


def main() -> None:
    options = parse()
    if options.mar is not None:
        require_mar(options.mar)
    try:
        groups = [*figure_cases(options), *table_cases(options)]
    except ValueError as error:
        raise SystemExit(f"--tokens, --blocks: {error}") from None
    if options.device != "cuda":
        say("Left out: ACDiT-B against AR length and ACDiT-L, XL and MAR-B, L on CUDA: torch sees no such device.")
    if options.mar is None:
        say("Left out: MAR: no --mar PATH given.")
    cases = [case for group in groups for case in group]
    rounds = [*options.rounds, *[options.table_rounds] * (len(groups) - len(options.rounds))]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "ar-length.json"
    record = opened(path, cases, options)
    left = run(plan(groups, rounds), record, path, options)
    rows = summed(record, cases)
    if not rows:
        raise SystemExit("nothing was measured")
    draw(rows, record["machine"], path.with_suffix(".png"))
    text = page(rows, record, left)
    path.with_suffix(".md").write_text(text)
    say(text)


if __name__ == "__main__":
    main()
