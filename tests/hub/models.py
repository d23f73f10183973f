"""Small saved models of every kind, with random weights, that the tests of sharing take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from acdit import ACDiTPipeline, ACDiTTextPipeline
from acdit.classifiers import ACDiTClassifier
from acdit.codecs import CharacterTokenizer
from acdit.corruption import GaussianCorruption
from acdit.heads import ClassificationHead, Classifier
from tests import autoencoders
from tests.conftest import awaken, tiny_model
from tests.texts import text_model

KINDS = ("image", "unconditional", "video", "latent", "text", "ids")
FIGURES = {
    "accuracy": 0.9312345, "interval": [0.91, 0.95], "long": [0.1] * 20, "seed": 3,
    "targets": {"accuracy": ">= 0.9", "met": True}, "protocol": "100 | pictures", "command": "acdit demo",
    "commit": "c0ffee", "versions": {"torch": "2.9"}, "machine": {"processor": "abacus", "cores": 2, "cuda": None},
}  # fmt: skip


def pipeline_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind in ("text", "ids"):
        tokenizer = CharacterTokenizer("ab`d") if kind == "text" else None
        return ACDiTTextPipeline(text_model(12, 3, vocab=5).float(), tokenizer)
    sizes = {
        "image": {"in_channels": 1}, "unconditional": {"in_channels": 3, "num_classes": None},
        "latent": {"in_channels": 4},
        "video": {"grid": (4, 8, 8), "block": (2, 4, 4), "in_channels": 1, "patch": (1, 2, 2)},
    }[kind]  # fmt: skip
    return ACDiTPipeline(
        tiny_model(dtype=torch.float32, **sizes), GaussianCorruption().sampling_scheduler(),
        vae=autoencoders.kl() if kind == "latent" else None, latents=kind == "latent",
        id2label=None if kind == "unconditional" else {str(index): f"class {index}" for index in range(5)},
    )  # fmt: skip


def save(kind: str, run: Path, head: bool = False) -> Path:
    """The model's folder in a run of its own; figures beside it of pictures."""
    pipeline = pipeline_of(kind)
    pipeline.save_pretrained(run / "model")
    if kind == "image":
        (run / "metrics.json").write_text(json.dumps(FIGURES))
    if head:
        made = awaken(ClassificationHead(width=32, num_classes=3), 0.5)
        ACDiTClassifier(Classifier(pipeline.transformer, made), pipeline).save(run / "model", whole=True)
    return run / "model"
