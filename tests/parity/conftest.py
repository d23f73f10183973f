"""What the reference answered, recorded by benchmarks/record_reference.py: weights, inputs, outputs."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Recorded:
    """One recorded layout."""

    name: str
    args: argparse.Namespace
    num_inference_steps: int
    guidance_scale: float
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def checkpoint(self, folder: Path, dtype: torch.dtype) -> Path:
        """The weights as the `.pt` that the reference's training writes."""
        path = folder / f"{self.name}-{dtype}.pt"
        weights = {name: value.to(dtype) for name, value in self.weights.items()}
        torch.save({"model": weights, "args": self.args}, path)
        return path


def recorded(name: str) -> Recorded:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return Recorded(
        name=name,
        args=argparse.Namespace(**json.loads(metadata["args"])),
        num_inference_steps=int(metadata["num_inference_steps"]),
        guidance_scale=float(metadata["guidance_scale"]),
        weights={key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")},
        inputs={key.removeprefix("inputs."): value for key, value in tensors.items() if key.startswith("inputs.")},
        outputs={key: value for key, value in tensors.items() if key.startswith("fp")},
    )


@pytest.fixture(scope="session", params=["image", "video"])
def reference(request: pytest.FixtureRequest) -> Recorded:
    return recorded(request.param)
