"""Small served models that the tests of the app share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler

from acdit import ACDiTPipeline, ACDiTTextPipeline
from acdit.app.models import ServedModel
from acdit.codecs import CharacterTokenizer
from tests.autoencoders import kl
from tests.conftest import tiny_model
from tests.texts import text_model as character_model


def image_model(dtype: torch.dtype = torch.float64, name: str = "image", **options: Any) -> ServedModel:
    """8×8 pixels in four blocks, five classes."""
    model = tiny_model(dtype=dtype, in_channels=1, **options)
    names = {str(i): f"class {i}" for i in range(5)}
    # A small deviation: random weights give large numbers, and black and white would hide what differs.
    pipeline = ACDiTPipeline(model, DPMSolverMultistepScheduler(), pixel_std=0.001, id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return ServedModel(name, pipeline)


def video_model(dtype: torch.dtype = torch.float64, **options: Any) -> ServedModel:
    """Steps of two frames of 4×4 pixels, one block each, under a window."""
    settings: dict[str, Any] = {"grid": (6, 4, 4), "block": (2, 4, 4), "window": 2, "sink_blocks": 0, **options}
    return image_model(dtype, "video", **settings)


def text_model(dtype: torch.dtype = torch.float64) -> ServedModel:
    """Twelve characters in blocks of four."""
    model = character_model(12, 4, vocab=5).to(dtype)
    return ServedModel("text", ACDiTTextPipeline(model, CharacterTokenizer("abcd")))


def latent_model(dtype: torch.dtype = torch.float64, name: str = "latent", **options: Any) -> ServedModel:
    """16×16 colour pixels through an autoencoder of factor 2: 8×8 latents of four channels in four blocks."""
    model = tiny_model(dtype=dtype, in_channels=4, **options)
    names = {str(i): f"class {i}" for i in range(5)}
    pipeline = ACDiTPipeline(model, DPMSolverMultistepScheduler(), vae=kl(), id2label=names, latents=True)
    pipeline.set_progress_bar_config(disable=True)
    return ServedModel(name, pipeline)


def latent_video_model(dtype: torch.dtype = torch.float64) -> ServedModel:
    """Clips of 8×8 colour pixels, frame by frame through the same autoencoder: steps of two frames, a block each."""
    return latent_model(dtype, "latent video", grid=(6, 4, 4), block=(2, 4, 4), window=2, sink_blocks=0)
