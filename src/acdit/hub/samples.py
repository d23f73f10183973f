"""What a model card shows: pictures, a film or texts, drawn by the pipeline from fixed seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acdit.errors import ConfigError
from acdit.generation import SamplingSettings, draw_pictures
from acdit.pictures import generation_gif, image_grid
from acdit.pipelines_text import ACDiTTextPipeline
from acdit.recipe import Recipe, SamplingRecipe
from acdit.videos import contact_sheet

PICTURE, FILM = "samples.png", "samples.gif"
_CLASSES = 10
_USUAL = {"image": 40, "video": 4, "text": 2}
_NEW_TOKENS = 200
_FRAME_MS = 125


@dataclass(frozen=True)
class SampleOptions:
    """How they are drawn.

    Args:
        count: pictures, clips or texts at most; 0: none; None: 40, 4 or 2.
        num_inference_steps, guidance_scale: of pictures and clips; None: the recipe's, or 25 and 1.5.
        seed: sample i is drawn from seed + i.
    """

    count: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Samples:
    """What was drawn.

    Args:
        call: the call of the pipeline that draws the same.
        files: names in the folder.
        texts: of a model of text.
        why_none: where nothing was drawn.
    """

    call: str = ""
    files: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    why_none: str = ""


def kind_of(pipeline: Any) -> str:
    """image, video, text, or data of another number of axes."""
    if isinstance(pipeline, ACDiTTextPipeline):
        return "text"
    return {2: "image", 3: "video"}.get(pipeline.transformer.layout.ndim, "data")


def draw(pipeline: Any, recipe: Recipe | None, options: SampleOptions, folder: Path) -> Samples:
    """Draw samples into a folder.

    Raises:
        ConfigError: steps or guidance for a model of text.
        NonFiniteError: a picture has NaN or infinite values.
    """
    kind = kind_of(pipeline)
    count = _USUAL.get(kind, 0) if options.count is None else options.count
    given = {"--steps": options.num_inference_steps, "--guidance-scale": options.guidance_scale}
    for name, value in given.items():
        if kind == "text" and value is not None:
            raise ConfigError(name, found="a model of text", expected="a model of pictures or clips")
    if why := _why_none(pipeline, kind, count):
        return Samples(why_none=why)
    if kind == "text":
        return _texts(pipeline, options, count)
    usual = SamplingRecipe() if recipe is None else recipe.sampling
    return _pixels(pipeline, options, count, usual, folder)


def _why_none(pipeline: Any, kind: str, count: int) -> str:
    if count == 0:
        return "None were asked for." if kind != "data" else "Data of this kind have no picture."
    if kind == "text":
        return "" if pipeline.tokenizer is not None else "This folder has no tokenizer, so there is no text to show."
    if pipeline.vae is None and (pipeline.config.latents or pipeline.transformer.config.in_channels not in (1, 3)):
        return "This is a model of latents without its autoencoder, so there is no picture to show."
    return ""


def _texts(pipeline: Any, options: SampleOptions, count: int) -> Samples:
    length = min(_NEW_TOKENS, pipeline.transformer.layout.num_tokens - 1)
    texts = [pipeline(None, length, options.seed + index).texts[0] for index in range(count)]
    call = f"pipe(max_new_tokens={length}, generator={options.seed}).texts[0]"
    return Samples(call, texts=tuple(texts))


def _pixels(pipeline: Any, options: SampleOptions, count: int, usual: SamplingRecipe, folder: Path) -> Samples:
    classes = pipeline.transformer.config.num_classes
    labels, columns = None, min(8, count)
    if classes is not None:
        rows = min(classes, count, _CLASSES)
        columns = count // rows
        labels = [row * classes // rows for row in range(rows) for _ in range(columns)]
        count = len(labels)
    settings = SamplingSettings(
        options.num_inference_steps or usual.num_inference_steps,
        usual.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        options.seed, None if labels is None else tuple(labels),
    )  # fmt: skip
    quiet = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        drawn = draw_pictures(pipeline, settings, 0, count)
    finally:
        pipeline.set_progress_bar_config(**quiet)
    if drawn.ndim == 5:
        _save_film(drawn, folder / FILM)
        sheet = contact_sheet(drawn, row_labels=_names(pipeline, labels))
    else:
        sheet = image_grid(drawn, columns, row_labels=_names(pipeline, None if labels is None else labels[::columns]))
    sheet.save(folder / PICTURE)
    what = f"batch_size={count}" if labels is None else f"class_labels={labels}"
    guided = "" if labels is None else f"guidance_scale={settings.guidance_scale:g}, "
    call = f"pipe({what}, num_inference_steps={settings.num_inference_steps}, {guided}generator={options.seed}).images"
    return Samples(call, (FILM, PICTURE) if drawn.ndim == 5 else (PICTURE,))


def _save_film(clips: torch.Tensor, file: Path) -> None:
    """All clips (M, T, C, H, W) side by side in one film."""
    frames = list(clips.unbind(1))
    generation_gif(frames, [None] * len(frames), file, min(4, len(clips)), frame_ms=_FRAME_MS, hold_ms=4 * _FRAME_MS)


def _names(pipeline: Any, labels: list[int] | None) -> list[str] | None:
    """Of classes; None of an unconditional model."""
    if labels is None:
        return None
    known = pipeline.config.get("id2label") or {}
    return [str(known.get(str(label), label))[:24] for label in labels]
