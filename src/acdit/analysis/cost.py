"""FLOPs and memory of a subject: closed forms beside what is counted and allocated, and what smaller blocks save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from acdit import costs
from acdit.analysis.allocations import allocated_by_sampling, allocated_by_training
from acdit.analysis.counting import count_sampling, count_training
from acdit.analysis.subject import Subject
from acdit.flops import FlopsByPart, forward_parts, layer_flops, sampling_parts, saving, training_flops

MOST_COUNTED = 16
"""Layouts of more blocks than this are not counted: every block is a call of the whole model."""


def flops_figures(
    subject: Subject,
    *,
    steps: int,
    guided: bool,
    blocks: Sequence[Sequence[int]],
    most_counted: int = MOST_COUNTED,
) -> dict[str, Any]:
    """FLOPs of one sample: trained on and drawn, closed beside counted, part by part; and the saving over block sizes.

    Args:
        subject: what is analysed.
        steps: model calls a block.
        guided: both branches of guidance.
        blocks: sizes for the saving.
        most_counted: layouts of more blocks have closed forms only.
    """
    arch, copies, checkpointing = subject.architecture, subject.copies, subject.checkpointing
    counts = subject.layout.num_blocks <= most_counted
    step = training_flops(arch, 1, copies, checkpointing)
    trained = count_training(subject.config, copies, checkpointing)
    return {
        "num_inference_steps": steps,
        "guided": guided,
        "copies": copies,
        "gradient_checkpointing": checkpointing,
        "sampling": _beside(
            sampling_parts(arch, steps, guided), count_sampling(subject.config, steps, guided) if counts else None
        ),
        "training_forward": _beside(forward_parts(arch, copies), trained.forward),
        "training_step": {"closed": step, "counted": trained.total, "apart": trained.total / step - 1},
        "layer": {"theta": arch.theta, "closed": layer_flops(arch), "full_sequence": layer_flops(arch, True)},
        "saving": _savings(subject, steps, guided, blocks, most_counted),
    }


def memory_figures(
    subject: Subject,
    *,
    micro_batch: int,
    guided: bool,
    blocks: Sequence[Sequence[int]],
    measure: bool,
) -> dict[str, Any]:
    """Bytes of training and of sampling in fp32: closed forms beside what torch's CPU allocator hands out.

    Args:
        subject: what is analysed.
        micro_batch: samples at once, in both.
        guided: both branches of guidance.
        blocks: sizes to do it for.
        measure: run a step and draw a sample; False: closed forms only.
    """
    copies, checkpointing = subject.copies, subject.checkpointing
    rows = []
    for size in blocks:
        resized = subject.with_block(size)
        arch = resized.architecture
        training = costs.training_memory(arch, micro_batch, copies, checkpointing=checkpointing, averages=1)
        sampling = costs.sampling_memory(arch, micro_batch, guided=guided)
        row: dict[str, Any] = {
            "block": list(size),
            "num_blocks": arch.layout.num_blocks,
            "block_tokens": arch.layout.block_tokens,
            "training": asdict(training),
            "activations": {"closed": training.activations, "measured": None, "apart": None},
            "sampling": {**asdict(sampling), "total": sampling.total},
            "sampling_peak": {"closed": sampling.cache + sampling.working, "measured": None, "apart": None},
        }
        if measure:
            found = allocated_by_training(resized.config, micro_batch, copies, checkpointing)
            drawn = allocated_by_sampling(resized.config, micro_batch, guided)
            for name, value in (("activations", found), ("sampling_peak", drawn)):
                row[name] |= {"measured": value, "apart": value / row[name]["closed"] - 1}
        rows.append(row)
    return {
        "micro_batch": micro_batch,
        "copies": copies,
        "gradient_checkpointing": checkpointing,
        "guided": guided,
        "dtype": "fp32",
        "by_block": rows,
    }


def _beside(closed: FlopsByPart, counted: FlopsByPart | None) -> dict[str, Any]:
    """Part by part; `apart` is counted by closed, less one."""
    expected = {**asdict(closed), "total": closed.total}
    if counted is None:
        return {"closed": expected, "counted": None, "apart": None}
    found = {**asdict(counted), "total": counted.total}
    apart = {name: found[name] / value - 1 if value else float(found[name] > 0) for name, value in expected.items()}
    return {"closed": expected, "counted": found, "apart": apart}


def _savings(
    subject: Subject, steps: int, guided: bool, blocks: Sequence[Sequence[int]], most_counted: int
) -> list[dict[str, Any]]:
    """A row a block size, against the whole sequence as one block of the same model."""
    whole = subject.with_block(subject.layout.token_grid)
    windowed = subject.architecture.window is not None
    base = sampling_parts(whole.architecture, steps, guided)
    counted_base = count_sampling(whole.config, steps, guided)
    rows = []
    for size in blocks:
        resized = subject.with_block(size)
        arch = resized.architecture
        parts = sampling_parts(arch, steps, guided)
        counted = count_sampling(resized.config, steps, guided) if arch.layout.num_blocks <= most_counted else None
        rows.append(
            {
                "block": list(size),
                "num_blocks": arch.layout.num_blocks,
                "block_tokens": arch.layout.block_tokens,
                # The paper's formula is of all clean blocks in sight.
                "paper": None if windowed else saving(arch),
                "layers": {
                    "closed": 1 - parts.layers / base.layers,
                    "counted": None if counted is None else 1 - counted.layers / counted_base.layers,
                },
                "everything": {
                    "closed": 1 - parts.total / base.total,
                    "counted": None if counted is None else 1 - counted.total / counted_base.total,
                },
            }
        )
    return rows
