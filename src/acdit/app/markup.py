"""Results as HTML: pictures travel inside the markup, so no file of a result is ever left on the server."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from acdit.analysis.mask_picture import CONDITIONS, OWN, READS
from acdit.app import files, links
from acdit.app.events import Done, Picture, Text
from acdit.app.models import ServedModel
from acdit.errors import ConfigError
from acdit.layout import BlockLayout

STRIP_FRAMES = 16
"""Frames of a clip that are shown while it is made: the last ones."""

CSS = """
.acdit-cards {display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 130px), 1fr));}
.acdit-cards.single {grid-template-columns: minmax(0, 420px);}
.acdit-card {margin: 0; min-width: 0;}
.acdit-frame {position: relative; border-radius: 10px; overflow: hidden;
  border: 1px solid var(--border-color-primary);
  background: repeating-linear-gradient(45deg, var(--background-fill-secondary) 0 8px,
    var(--border-color-primary) 8px 9px);}
.acdit-frame img {display: block; width: 100%; height: 100%; image-rendering: pixelated; margin: 0;}
.acdit-at {position: absolute; box-sizing: border-box; border: 3px solid #d6563c; border-radius: 4px;
  transition: left .15s, top .15s; pointer-events: none;}
.acdit-strip {margin-top: 8px;}
.acdit-strip img {display: block; width: 100%; image-rendering: pixelated; border-radius: 6px;}
.acdit-card figcaption {display: flex; flex-wrap: wrap; gap: 4px 10px; padding: 6px 2px; min-height: 40px;
  font-size: 14px; color: var(--body-text-color-subdued); align-items: baseline;}
.acdit-card figcaption a, .acdit-links a {color: var(--link-text-color); text-decoration: underline;
  padding: 4px 2px; min-height: 24px;}
.acdit-status {font-size: 15px; margin: 0 0 6px; font-variant-numeric: tabular-nums; color: var(--body-text-color);}
.acdit-bar {height: 8px; border-radius: 4px; margin-bottom: 14px; overflow: hidden;
  background: var(--border-color-primary);}
.acdit-bar > div {height: 100%; background: #2f6fb0; transition: width .15s;}
.acdit-note {border-left: 4px solid #d6563c; padding: 8px 12px; background: var(--background-fill-secondary);
  border-radius: 4px; color: var(--body-text-color); overflow-wrap: anywhere;}
.acdit-empty {border: 1px dashed var(--border-color-primary); border-radius: 10px; padding: 40px 16px;
  text-align: center; color: var(--body-text-color-subdued);}
.acdit-text {font-family: var(--font-mono); font-size: 15px; line-height: 1.5; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 0; padding: 12px; border: 1px solid var(--border-color-primary);
  border-radius: 10px; color: var(--body-text-color); background: var(--background-fill-primary); min-height: 96px;}
.acdit-text .prompt {color: var(--body-text-color-subdued);}
.acdit-text mark {background: #e9a33c55; color: inherit; border-radius: 3px;}
.acdit-links {margin-top: 8px; font-size: 14px; color: var(--body-text-color-subdued); overflow-wrap: anywhere;}
.acdit-table {width: 100%; border-collapse: collapse; border: 0 !important; margin: 16px 0 0;
  font-size: 15px; color: var(--body-text-color);}
.acdit-table tr, .acdit-table tbody {border: 0 !important;}
.acdit-pair figcaption span {color: inherit;}
.acdit-table th, .acdit-table td {text-align: left; padding: 7px 8px; border: 0;
  border-bottom: 1px solid var(--border-color-primary); vertical-align: top; font-weight: 400;}
.acdit-table th {color: var(--body-text-color-subdued); width: 45%;}
.acdit-pair {display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));}
.acdit-pair figure {margin: 0;}
.acdit-key {display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin: 0 4px 0 8px;}
.acdit-pair img {width: 100%; max-width: 560px; border-radius: 10px; display: block; margin: 0;}
.acdit-pair figcaption {font-size: 14px; color: var(--body-text-color-subdued); padding: 6px 2px;}
@media (prefers-reduced-motion: reduce) {.acdit-at, .acdit-bar > div {transition: none;}}
"""


def empty(text: str) -> str:
    """Where a result will be."""
    return f'<div class="acdit-empty">{html.escape(text)}</div>'


def note(text: str) -> str:
    """An error or a refusal, read out by screen readers."""
    return f'<div class="acdit-note" role="alert">{html.escape(text)}</div>'


def waiting(ahead: int) -> str:
    """In the queue."""
    told = "starting" if ahead == 0 else f"waiting: {ahead} {'request' if ahead == 1 else 'requests'} before this one"
    return _progress(0, 1, told)


class Gallery:
    """The view of one request for pictures or clips; it keeps what is finished.

    Args:
        served: the model.
        layout: with the request's block.
        blocks: of the request.
        seed: of the first sample.
    """

    def __init__(self, served: ServedModel, layout: BlockLayout, blocks: int, seed: int) -> None:
        self._served, self._layout, self._blocks, self._seed = served, layout, blocks, seed
        self._past: list[Tensor] = []
        """uint8 (B, C, T, H, W) of the last steps of time that are finished."""

    def progress(self, event: Picture) -> str:
        """While it is made."""
        inside = event.block % self._served.blocks_a_step if self._served.kind == "video" else event.block
        shown = inside + 1
        label = self._label(event.labels[-1])
        what = f"block {event.block + 1} of {self._blocks}" + (f", class {label}" if label else "")
        step = "finished" if event.finished else f"step {event.step} of {event.steps}"
        status = f"{what} · {step}{_left(event.seconds_left)}"
        cards = [
            self._card(
                index, self._stage(frames, shown, None if event.finished else inside, f"sample {index + 1}, {what}"),
                self._strip([past[index] for past in self._past]), f"seed {self._seed + index}",
            )
            for index, frames in enumerate(event.frames)
        ]  # fmt: skip
        if event.finished and self._served.kind == "video" and inside + 1 == self._served.blocks_a_step:
            frames_a_step = event.frames.shape[2]
            self._past = [*self._past, event.frames][-max(1, STRIP_FRAMES // frames_a_step) :]
        return _progress(event.done, event.total, status) + self._cards(cards)

    def done(self, event: Done) -> str:
        """The result, with its downloads and its link."""
        assert event.frames is not None
        tab, settings = self._served.kind, event.settings
        names = [self._label(label) for label in event.labels]
        classes = " ".join(name for index, name in enumerate(names) if name and name != ([None, *names])[index])
        cards = []
        for index, frames in enumerate(event.frames):
            own = {**settings, "seed": settings["seed"] + index, "samples": 1}
            name = f"acdit-{tab}-seed-{own['seed']}"
            if tab == "image":
                data = files.png(frames[:, 0], own)
                stage, saved = (
                    _img(data, "image/png", f"sample {index + 1}, seed {own['seed']}"),
                    [("PNG", data, "png")],
                )
            else:
                gif = files.film(frames, own, "gif")
                stage = _img(gif, "image/gif", f"clip {index + 1}, seed {own['seed']}, {frames.shape[1]} frames")
                saved = [("gif", gif, "gif"), *_mp4(frames, own)]
            stage = f'<div class="acdit-frame">{stage}</div>'
            saves = " ".join(_download(title, data, f"{name}.{end}") for title, data, end in saved)
            strip = self._strip([frames]) if tab == "video" else ""
            cards.append(self._card(index, stage, strip, f"seed {own['seed']} {saves}"))
        batch = f", in a batch of {event.batch}" if event.batch > len(event.frames) else ""
        status = f"done in {event.seconds:.1f} s{batch}" + (f" · class {classes}" if classes else "")
        return _progress(1, 1, status) + self._cards(cards) + link(tab, settings)

    def _label(self, label: int | None) -> str:
        names = {index: name for name, index in self._served.class_names}
        return "" if label is None else names.get(label, str(label))

    @staticmethod
    def _cards(cards: Sequence[str]) -> str:
        return f'<div class="acdit-cards{" single" if len(cards) == 1 else ""}">{"".join(cards)}</div>'

    @staticmethod
    def _card(index: int, stage: str, strip: str, caption: str) -> str:
        return f'<figure class="acdit-card">{stage}{strip}<figcaption>{caption}</figcaption></figure>'

    def _stage(self, frames: Tensor, shown: int, at: int | None, alternative: str) -> str:
        """The step of time at work, (C, T, H, W), its frames side by side; blocks that are not there are empty."""
        layout = self._layout
        rows, columns = layout.block_grid[-2:]
        height, width = frames.shape[-2:]
        alpha = np.zeros((height, width, 1), np.uint8)
        for index in range(shown):
            row, column = divmod(index, columns)
            alpha[
                row * height // rows : (row + 1) * height // rows,
                column * width // columns : (column + 1) * width // columns,
            ] = 255
        parts = [np.concatenate([_rgb(frame), alpha], axis=2) for frame in frames.unbind(1)]
        count = len(parts)
        image = _img(_png(np.concatenate(parts, axis=1)), "image/png", alternative)
        marks = ""
        if at is not None:
            row, column = divmod(at, columns)
            for frame in range(count):
                left, top = (frame + column / columns) / count, row / rows
                size = f"left:{left:.4%};top:{top:.4%};width:{1 / count / columns:.4%};height:{1 / rows:.4%}"
                marks += f'<span class="acdit-at" style="{size}"></span>'
        return f'<div class="acdit-frame" style="aspect-ratio:{count * width}/{height}">{image}{marks}</div>'

    def _strip(self, past: Sequence[Tensor]) -> str:
        """Finished frames in one row."""
        if not past:
            return ""
        frames = [frame for part in past for frame in part.unbind(1)]
        first = max(0, len(frames) - STRIP_FRAMES)
        row = np.concatenate([_rgb(frame) for frame in frames[first:]], axis=1)
        told = f"the last {len(frames) - first} finished frames"
        return f'<div class="acdit-strip">{_img(_png(row), "image/png", told)}</div>'


def writing(event: Text, prompt: str, seed: int) -> str:
    """Texts while they are written."""
    current = event.current or [""] * len(event.texts)
    cards = [
        f'<figure class="acdit-card">{_text(text, prompt, f"<mark>{html.escape(now)}</mark>")}'
        f"<figcaption>seed {seed + index}</figcaption></figure>"
        for index, (text, now) in enumerate(zip(event.texts, current, strict=True))
    ]
    status = f"block {event.block + 1} · {event.done} of {event.total} characters or tokens{_left(event.seconds_left)}"
    return _progress(event.done, event.total, status) + f"<div>{''.join(cards)}</div>"


def written(event: Done) -> str:
    """Finished texts, with their downloads and their link."""
    settings, cards = event.settings, []
    for index, text in enumerate(event.texts):
        own = {**settings, "seed": settings["seed"] + index, "samples": 1}
        save = _download("txt", files.text_file(text, own), f"acdit-text-seed-{own['seed']}.txt", "text/plain")
        cards.append(
            f'<figure class="acdit-card">{_text(text, settings["prompt"], "")}'
            f"<figcaption>seed {own['seed']} {save}</figcaption></figure>"
        )
    done = _progress(1, 1, f"done in {event.seconds:.1f} s")
    return done + f"<div>{''.join(cards)}</div>" + link("text", settings)


def link(tab: str, settings: dict[str, Any]) -> str:
    """The address that makes a result again."""
    upload = " (the upload is not in it: choose the file again)" if settings.get("keep") else ""
    query = html.escape(links.to_query(tab, settings), quote=True)
    return f'<p class="acdit-links"><a href="{query}">Link to these settings</a>{upload}</p>'


def anatomy_view(mask: Image.Image, order: Image.Image, figures: Sequence[tuple[str, str]], clip: bool = False) -> str:
    """Mask, order and figures; of a clip it is said how its frames stand."""
    together = "; frames of one block stand together" if clip else ""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in figures)
    return (
        f'<div class="acdit-pair"><figure>{_img(_saved(order), "image/png", "blocks numbered in their order")}'
        f"<figcaption>The order of the blocks{together}</figcaption></figure>"
        f"<figure>{_img(_saved(mask), 'image/png', 'skip-causal mask: rows are queries, columns are keys')}"
        f"<figcaption>The skip-causal mask: rows read columns. {_key()}</figcaption></figure></div>"
        f'<table class="acdit-table"><tbody>{rows}</tbody></table>'
    )


def _key() -> str:
    """What the mask's colours mean."""
    named = ((READS, "clean reads clean"), (CONDITIONS, "noisy reads clean"), (OWN, "noisy reads its own block"))
    return "".join(
        f'<span style="white-space:nowrap"><span class="acdit-key" style="background:rgb{colour}"></span>{name}</span> '
        for colour, name in named
    )


def _text(text: str, prompt: str, behind: str) -> str:
    given = prompt if text.startswith(prompt) else ""
    own = html.escape(text[len(given) :])
    return f'<pre class="acdit-text"><span class="prompt">{html.escape(given)}</span>{own}{behind}</pre>'


def _progress(done: int, total: int, status: str) -> str:
    share = min(100, 100 * done / max(1, total))
    return (
        f'<p class="acdit-status" role="status">{html.escape(status)}</p>'
        f'<div class="acdit-bar" role="progressbar" aria-label="progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share:.0f}"><div style="width:{share:.1f}%"></div></div>'
    )


def _left(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return ""
    return f" · {seconds / 60:.0f} min left" if seconds >= 120 else f" · {seconds:.0f} s left"


def _rgb(frame: Tensor) -> np.ndarray:
    """(C, H, W) → (H, W, 3)."""
    array = frame.permute(1, 2, 0).numpy()
    return array.repeat(3, axis=2) if array.shape[2] == 1 else array


def _png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _saved(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _mp4(frames: Tensor, settings: dict[str, Any]) -> list[tuple[str, bytes, str]]:
    try:
        return [("mp4", files.film(frames, settings, "mp4"), "mp4")]
    except ConfigError:  # without PyAV there is the gif
        return []


def _img(data: bytes, kind: str, alternative: str) -> str:
    return f'<img alt="{html.escape(alternative, quote=True)}" src="{data_address(data, kind)}">'


def _download(title: str, data: bytes, name: str, kind: str = "application/octet-stream") -> str:
    return f'<a download="{name}" href="{data_address(data, kind)}" aria-label="download {name}">{title}</a>'


def data_address(data: bytes, kind: str) -> str:
    """A file as a data: address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
