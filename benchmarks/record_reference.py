"""Records what the reference answers: tiny models with random weights, for tests/parity to compare ours with.

    python benchmarks/record_reference.py --reference PATH_TO_ACDiT --output tests/parity/fixtures
    python benchmarks/record_reference.py --reference PATH_TO_ACDiT --output tests/parity/fixtures --check

Each layout gives one safetensors file: weights (the reference's names, prefix "weights."), inputs ("inputs."), and for
fp32 and fp64 the training forward and the 25-step guided sample ("fp32.forward", …). In fp32 the reference runs as it
is; in fp64 with its casts to fp32 lifted, in its solver too. Weights are rounded to float8: random weights lose
nothing by it, the files stay small, and both precisions read the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from reference import build_reference, describe_reference, load_reference, perturb, reference_forward, reference_sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))  # the tests read what is recorded here, with the same solver
from tests.parity.solver import FP64Solver

COMMON = {"vae_patch_pixels": 8, "vae_latent_size": 4, "image_size": 64}
CASES: dict[str, dict[str, Any]] = {
    "image": {
        "args": {
            **COMMON, "model": "ACDiT-B", "dataset": "ImageNet", "patch_size": 1, "num_frames": 1, "block_size": 16,
            "ar_len": 4, "nd_split": None, "square_block": True,
        },
        "sizes": {"hidden_size": 128, "depth": 2, "mlp_ratio": 1.0, "num_classes": 5},
    },
    "video": {
        "args": {
            **COMMON, "model": "ACDiT-B", "dataset": "UCF101", "patch_size": 2, "num_frames": 6, "block_size": 32,
            "ar_len": 3, "nd_split": "2_3_3", "square_block": False,
        },
        "sizes": {"hidden_size": 64, "depth": 2, "mlp_ratio": 4.0, "num_classes": 3},
    },
}  # fmt: skip
BATCH, STEPS, GUIDANCE = 2, 25, 1.5


def draw_inputs(args: Namespace, num_classes: int, seed: int) -> dict[str, Tensor]:
    """Inputs of forward and sample; labels include "no label", timesteps both ends of the schedule."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, args.ar_len, args.block_size, args.vae_latent_size * args.patch_size**2)
    timestep = torch.randint(1000, (BATCH, args.ar_len), generator=generator)
    timestep[0, 0], timestep[1, -1] = 0, 999
    return {
        "clean": torch.randn(shape, generator=generator),
        "noisy": torch.randn(shape, generator=generator),
        "timestep": timestep,
        "labels": torch.tensor([1, num_classes]),
        "sample_labels": torch.tensor([num_classes - 1, 0]),
        "noises": torch.randn((args.ar_len, BATCH, *shape[2:]), generator=generator),
    }


def answers(
    module: ModuleType, case: dict[str, Any], weights: dict[str, Tensor], inputs: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Forward and guided sample of the reference in one precision."""
    lifted = dtype == torch.float64
    model = build_reference(module, Namespace(**case["args"]), **case["sizes"]).to(dtype).eval()
    model.load_state_dict({name: value.to(dtype) for name, value in weights.items()})
    real = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        forward = reference_forward(model, real["clean"], real["noisy"], real["timestep"], real["labels"], lifted)
    solver = FP64Solver if lifted else DPMSolverMultistepScheduler
    sample = reference_sample(
        module,
        model,
        solver.from_config(DDIMScheduler().config),
        real["sample_labels"],
        real["noises"],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        lifted=lifted,
    )
    return {"forward": forward, "sample": sample}


def record(module: ModuleType, checkout: Path, name: str, path: Path) -> None:
    """Write one fixture."""
    case = CASES[name]
    model = build_reference(module, Namespace(**case["args"]), **case["sizes"])
    perturb(model, seed=7)
    weights = {key: value.to(torch.float8_e4m3fn) for key, value in model.state_dict().items()}
    inputs = draw_inputs(Namespace(**case["args"]), case["sizes"]["num_classes"], seed=11)
    tensors = {f"weights.{key}": value for key, value in weights.items()}
    tensors |= {f"inputs.{key}": value for key, value in inputs.items()}
    for prefix, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        for key, value in answers(module, case, weights, inputs, dtype).items():
            tensors[f"{prefix}.{key}"] = value.contiguous()
    metadata = {
        "args": json.dumps(case["args"]),
        "sizes": json.dumps(case["sizes"]),
        "num_inference_steps": str(STEPS),
        "guidance_scale": str(GUIDANCE),
        "reference": f"thunlp/ACDiT {describe_reference(checkout)}",
        "torch": torch.__version__,
        "command": "python benchmarks/record_reference.py --reference PATH --output tests/parity/fixtures",
    }
    save_file(tensors, path, metadata)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def check(module: ModuleType, name: str, path: Path) -> None:
    """Ask the reference again and print how far its answers are from the recorded ones."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        recorded_by = file.metadata()["torch"]
    parts = {
        kind: {key.removeprefix(f"{kind}."): value for key, value in tensors.items() if key.startswith(f"{kind}.")}
        for kind in ("weights", "inputs", "fp32", "fp64")
    }
    for kind, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        for key, value in answers(module, CASES[name], parts["weights"], parts["inputs"], dtype).items():
            error = (value - parts[kind][key]).abs().max() / parts[kind][key].abs().max()
            print(f"{name} {kind} {key}: relative error {error:.1e} against the record (torch {recorded_by})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of thunlp/ACDiT")
    parser.add_argument("--output", type=Path, required=True, help="folder of the fixtures")
    parser.add_argument("--check", action="store_true", help="compare with what is recorded there instead of writing")
    options = parser.parse_args()
    module = load_reference(options.reference)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        path = options.output / f"{name}.safetensors"
        if options.check:
            check(module, name, path)
        else:
            record(module, options.reference, name, path)


if __name__ == "__main__":
    main()
