"""Parity at full size: ACDiT-B with random weights, ours and the reference side by side, nothing recorded.

    python benchmarks/check_reference.py --reference PATH_TO_ACDiT [--layers 12] [--steps 25]

An image (32×32 latent, four blocks of 16×16) and a video (16 frames of 16×16, patch 2, blocks of 4 frames): the
converted checkpoint must give the same training forward and the same guided sample. In fp32 the reference runs as it
is; in fp64 its casts to fp32 are lifted, and the solver's on both sides. Results go to
benchmarks/results/parity-<machine>-<date>.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import machine
import torch
from machine import command, say
from reference import (
    LiftedCasts,
    build_reference,
    describe_reference,
    load_reference,
    perturb,
    reference_forward,
    reference_sample,
)
from torch import Tensor, nn

from acdit import ACDiTTransformer, sampling
from acdit.convert import read_reference
from acdit.corruption.gaussian import GaussianCorruption
from acdit.rope import base_for_extent

COMMON = {"vae_patch_pixels": 8, "vae_latent_size": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "image": {
        **COMMON, "image_size": 256, "patch_size": 1, "num_frames": 1, "block_size": 256, "ar_len": 4,
        "nd_split": None, "square_block": True,
    },
    "video": {
        **COMMON, "image_size": 128, "patch_size": 2, "num_frames": 16, "block_size": 256, "ar_len": 4,
        "nd_split": "2_3_3", "square_block": False,
    },
}  # fmt: skip
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
GUIDANCE = 1.5


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def converted(theirs: nn.Module, args: Namespace) -> ACDiTTransformer:
    """The reference's weights by way of its checkpoint file and our converter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.pt"
        torch.save({"model": theirs.state_dict(), "args": args}, path)
        read = read_reference(path)
        model = ACDiTTransformer(**read.config).to(read.dtype)
        model.load_state_dict(read.weights)
    return model


@torch.no_grad()
def our_sample(model: ACDiTTransformer, labels: Tensor, noises: Tensor, steps: int, lifted: bool) -> Tensor:
    """Our guided sample from given noises, (B, N, L, D)."""
    remaining = iter(noises)
    drawn = sampling._noise
    # The same noise for both sides: the module's own draw gives way.
    sampling._noise = lambda *_: next(remaining)  # type: ignore[assignment]  # their noise in the place of ours
    try:
        with LiftedCasts() if lifted else contextlib.nullcontext():
            blocks = sampling.sample_blocks(
                model,
                GaussianCorruption().sampling_scheduler(),
                class_labels=labels,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
            )
            return torch.stack(list(blocks), dim=1)
    finally:
        sampling._noise = drawn


def compare(module: ModuleType, name: str, options: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Errors of one layout in one precision."""
    args = Namespace(**LAYOUTS[name])
    lifted = dtype == torch.float64
    theirs = build_reference(module, args, hidden_size=64 * options.heads, depth=options.layers, num_classes=1000)
    perturb(theirs, seed=3)
    theirs = theirs.to(dtype).eval()
    ours = converted(theirs, args)
    generator = torch.Generator().manual_seed(5)
    shape = (1, args.ar_len, args.block_size, args.vae_latent_size * args.patch_size**2)
    clean, noisy, noises = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    timestep, labels = torch.tensor([[0, 999, 500, 37]]), torch.tensor([207])
    rows = []
    for what in ("training forward", f"{options.steps}-step guided sample"):
        start = time.perf_counter()
        if what == "training forward":
            with torch.no_grad():
                answer = ours(clean, noisy, timestep, labels).sample
                expected = reference_forward(theirs, clean, noisy, timestep, labels, lifted)
        else:
            answer = our_sample(ours, labels, noises.transpose(0, 1), options.steps, lifted)
            expected = reference_sample(
                module,
                theirs,
                GaussianCorruption().sampling_scheduler(),
                labels,
                noises.transpose(0, 1),
                num_inference_steps=options.steps,
                guidance_scale=GUIDANCE,
                lifted=lifted,
            )
        error, bound = relative_error(answer, expected), BOUNDS[dtype]
        rows.append(
            {"layout": name, "dtype": str(dtype).removeprefix("torch."), "what": what, "error": error, "bound": bound}
        )
        seconds = time.perf_counter() - start
        say(f"{name}, {rows[-1]['dtype']}, {what}: {error:.1e} (bound {bound:.0e}; both sides {seconds:.0f} s)")
    return rows


def compare_bases(module: ModuleType, extents: range) -> int:
    """How many extents get another RoPE base than the reference's."""
    rope = module.RopeND
    theirs = []
    with contextlib.redirect_stdout(None):
        for extent in extents:
            theirs.append(rope(nd=2, nd_split=[1, 1], max_lens=[extent, extent]).bases[0])
    return sum(base_for_extent(extent) != base for extent, base in zip(extents, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of thunlp/ACDiT")
    parser.add_argument("--layers", type=int, default=12, help="12 is ACDiT-B")
    parser.add_argument("--heads", type=int, default=12, help="12 is ACDiT-B")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    parser.add_argument("--output", type=Path, default=machine.RESULTS)
    options = parser.parse_args()
    module = load_reference(options.reference)
    found = machine.describe(describe_reference(options.reference))
    differing = compare_bases(module, range(1, 16385))
    say(f"RoPE bases: {differing} of 16384 extents differ")
    rows = []
    for name in options.layouts:
        for dtype in options.dtypes:
            rows += compare(module, name, options, getattr(torch, dtype))
    lines = [
        f"# Parity with the reference, {found['date']}", "", "```", command("check_reference.py"), "```", "",
        *machine.as_markdown(found),
        f"- {options.layers} layers × {64 * options.heads}, random weights everywhere, by way of the converter; "
        "relative error: largest difference over the largest value",
        f"- RoPE bases: {differing} of the extents 1 … 16384 differ", "",
        "| layout | precision | what | relative error | bound | |", "|---|---|---|---|---|---|",
        *(
            f"| {row['layout']} | {row['dtype']} | {row['what']} | {row['error']:.1e} | {row['bound']:.0e} | "
            f"{'holds' if row['error'] <= row['bound'] else '**fails**'} |"
            for row in rows
        ),
    ]  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"parity-{machine.slug(found)}.md"
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps({"machine": found, "rows": rows}, indent=2) + "\n")
    if differing or any(row["error"] > row["bound"] for row in rows):
        raise SystemExit("ours and the reference disagree")


if __name__ == "__main__":
    main()
