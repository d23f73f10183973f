"""Time and memory of sampling against AR length, measured on the machine at hand beside what closed forms predict.

Every measurement is written down at once: the same command goes on where it was stopped. Block sizes take turns, round
by round, so that a machine that slows down slows all of them down. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from acdit import costs, provenance, storage
from acdit.analysis.allocations import allocated_peak, random_model, sampler
from acdit.analysis.subject import Subject
from acdit.errors import ConfigError, StorageError
from acdit.flops import picture_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure_tradeoff(
    subject: Subject,
    blocks: Sequence[Sequence[int]],
    path: Path,
    *,
    steps: int,
    guided: bool,
    batch: int,
    rounds: int,
    minutes: float,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Take the measurements that `path` does not hold yet.

    Args:
        subject: what is sampled from, a model of continuous data.
        blocks: sizes to compare.
        path: of the JSON; written after every measurement.
        steps: solver steps a block, measured and predicted alike.
        guided: both branches of guidance.
        batch: samples at once.
        rounds: measurements a size.
        minutes: none is begun after so many.
        dtype: "fp32" or "bf16".
        device: "cpu" or "cuda".

    Returns:
        The record with its `rows`, a row a size that was measured; `left` names what is missing.

    Raises:
        ConfigError: a model of text; a file that holds measurements of other settings or of another machine.
    """
    if subject.config.get("vocab_size") is not None:
        raise ConfigError("MODEL", found="a model of text", expected="one of continuous data")
    settings = {
        **subject.describe(), "num_inference_steps": steps, "guided": guided, "batch": batch, "dtype": dtype,
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "processor": provenance.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    del settings["block"], settings["num_blocks"], settings["block_tokens"]  # what is varied
    record = _opened(path, settings)
    done = {(tuple(entry["block"]), entry["round"]) for entry in record["measured"]}
    begun, left = time.perf_counter(), []
    for turn in range(rounds):
        first = turn % len(blocks)
        for size in [*blocks[first:], *blocks[:first]]:
            if (tuple(size), turn) in done:
                continue
            if time.perf_counter() - begun > 60 * minutes:
                left.append({"block": list(size), "round": turn})
                continue
            found = _measure(subject.with_block(size), steps, guided, batch, dtype, device)
            record["measured"].append({"block": list(size), "round": turn, **found})
            storage.write_json_atomic(path, record)
    record["rows"], record["left"] = _rows(subject, record, blocks), left
    return record


def _opened(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {"settings": settings, "measured": []}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        before, measured = kept["settings"], kept["measured"]
    except (ValueError, KeyError, TypeError):
        raise StorageError(
            f"{path}", found="no record of measurements", expected="one of this command, or nothing",
            fix="give a new --output",
        ) from None  # fmt: skip
    apart = [name for name in settings if before.get(name) != settings[name]]
    if apart:
        raise ConfigError(
            f"{path}", found=f"measurements of {apart[0]} {before.get(apart[0])!r}",
            expected=f"{settings[apart[0]]!r}, as asked now", fix="give a new --output, or remove the file",
        )  # fmt: skip
    return {"settings": settings, "measured": measured}


def _measure(subject: Subject, steps: int, guided: bool, batch: int, dtype: str, device: str) -> dict[str, Any]:
    """Seconds of one batch, and the bytes above the weights of a batch of one step before, which warms up."""
    model = random_model(subject.config).to(device, DTYPES[dtype])
    sample = sampler(model, batch, guided)

    def draw(count: int) -> None:
        sample(count)
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        draw(steps)  # kernels are chosen, the allocator filled
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        draw(1)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = allocated_peak(lambda: draw(1))
    start = time.perf_counter()
    draw(steps)
    return {"seconds": time.perf_counter() - start, "peak": peak}


def _rows(subject: Subject, record: dict[str, Any], blocks: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """A row a size: medians over its rounds; times as shares of the first row's."""
    settings, rows = record["settings"], []
    for size in blocks:
        mine = [entry for entry in record["measured"] if entry["block"] == list(size)]
        if not mine:
            continue
        arch = subject.with_block(size).architecture
        held = costs.sampling_memory(
            arch, settings["batch"], guided=settings["guided"], precision=settings["dtype"]
        )  # fmt: skip
        seconds = [entry["seconds"] for entry in mine]
        rows.append(
            {
                "block": list(size),
                "num_blocks": arch.layout.num_blocks,
                "rounds": len(mine),
                "seconds": statistics.median(seconds),
                "seconds_range": [min(seconds), max(seconds)],
                "flops": settings["batch"] * picture_flops(arch, settings["num_inference_steps"], settings["guided"]),
                "memory": {
                    "predicted": held.cache + held.working,
                    "cache": held.cache,
                    "measured": int(statistics.median(entry["peak"] for entry in mine)),
                },
            }
        )
    for row in rows:
        row["time"] = {
            "predicted": row["flops"] / rows[0]["flops"],
            "measured": row["seconds"] / rows[0]["seconds"],
        }
        row["flops_a_second"] = row["flops"] / row["seconds"]
    return rows
