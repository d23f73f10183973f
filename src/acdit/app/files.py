"""Files in and out: uploads, judged before they are decoded, and results with their settings inside."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from acdit import __version__
from acdit.app.models import ServedModel
from acdit.app.requests import Limits
from acdit.codecs import spatial_factor
from acdit.data.frame_choice import FrameChoice
from acdit.data.picture import BadPicture, decode_picture, fitted
from acdit.errors import ConfigError, DataError
from acdit.videos import write_clip

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".mp4", ".webm", ".gif", ".mov", ".mkv")
_SMALL = 256  # shorter edges are enlarged to at least this, by whole pixels


def upload_suffixes(kind: str) -> tuple[str, ...]:
    """What may be uploaded to a model of a kind."""
    return PICTURES if kind == "image" else (*CLIPS, *PICTURES)


def read_upload(served: ServedModel, path: str | Path, keep: int, limits: Limits) -> Tensor:
    """A picture or clip as a model wants it.

    Args:
        served: the model.
        path: of the uploaded file.
        keep: blocks that will be kept; of a clip its first frames are read. A picture makes a still clip.
        limits: `upload_bytes` at most.

    Returns:
        uint8 (C, T, H, W); T = 1 of pictures.

    Raises:
        DataError: too large, of another format, damaged, too short.
    """
    path = Path(path)
    suffix, formats = path.suffix.lower(), upload_suffixes(served.kind)
    named = f"upload {path.name[-60:]!r}"
    if suffix not in formats:
        raise DataError(named, found=f"a file {suffix[:12] or 'without an ending'}", expected=", ".join(formats))
    size = path.stat().st_size
    if size > limits.upload_bytes:
        raise DataError(named, found=f"{size:,} bytes", expected=f"at most {limits.upload_bytes:,}")
    pipeline, layout = served.pipeline, served.layout
    factor = spatial_factor(pipeline.vae) if pipeline.vae is not None else 1
    channels = pipeline.transformer.config.in_channels if pipeline.vae is None else pipeline.vae.config.in_channels
    edges = (layout.grid[-2] * factor, layout.grid[-1] * factor)
    steps = -(-max(1, keep) // served.blocks_a_step)
    frames = steps * layout.block[0] * layout.patch[0] if served.kind == "video" else 1
    try:
        if suffix in PICTURES:
            picture = decode_picture(path.read_bytes(), channels, edges)
            return picture[:, None].expand(-1, frames, -1, -1).contiguous()
        from acdit.data.video import read_clip, require_av

        require_av()
        return read_clip(path, FrameChoice(frames, start="first"), lambda one: fitted(one, channels, edges), edges)
    except BadPicture as error:
        raise DataError(named, found=str(error)[:200], expected=f"a whole file of {frames} frames or more") from None


def enlarged(frame: Tensor, smallest: int = _SMALL) -> np.ndarray:
    """(C, H, W) uint8 → (H, W, C), small ones enlarged, each pixel a square."""
    array = frame.permute(1, 2, 0).cpu().numpy()
    factor = max(1, -(-smallest // min(array.shape[:2])))
    return np.ascontiguousarray(array.repeat(factor, axis=0).repeat(factor, axis=1))


def as_picture(array: np.ndarray) -> Image.Image:
    """(H, W, 1, 3 or 4) uint8 → a picture."""
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def png(frame: Tensor, settings: dict[str, Any], smallest: int = _SMALL) -> bytes:
    """A picture (C, H, W) as a PNG file, with its settings in the text chunk "acdit"."""
    info = PngInfo()
    info.add_text("acdit", _json(settings))
    file = io.BytesIO()
    as_picture(enlarged(frame, smallest)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def film(frames: Tensor, settings: dict[str, Any], kind: str, fps: float = 8.0) -> bytes:
    """A clip (C, T, H, W) as a gif or mp4 file, with its settings as the comment.

    Raises:
        ConfigError: mp4 without PyAV, or another kind.
    """
    if kind not in ("gif", "mp4"):
        raise ConfigError("format", found=repr(kind), expected="gif or mp4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{kind}"
        write_clip(frames.transpose(0, 1), path, kind, fps, comment=_json(settings))
        return path.read_bytes()


def text_file(text: str, settings: dict[str, Any]) -> bytes:
    """A text as a file; its settings are the last line."""
    return f"{text}\n\nacdit {_json(settings)}\n".encode()


def settings_in(data: bytes) -> dict[str, Any]:
    """The settings inside a file that this module wrote.

    Raises:
        DataError: there are none.
    """
    text: Any = None
    if data[:4] == b"\x89PNG" or data[:3] == b"GIF":
        info = Image.open(io.BytesIO(data), formats=("PNG", "GIF")).info
        text = info.get("acdit", info.get("comment"))
    elif data[4:8] == b"ftyp":
        import av

        with av.open(io.BytesIO(data)) as container:
            text = container.metadata.get("comment")
    else:
        last = data.decode(errors="replace").rstrip("\n").rpartition("\n")[2]
        text = last.removeprefix("acdit ") if last.startswith("acdit {") else None
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        raise DataError("file", found="no settings inside", expected="one that the page wrote") from None


def _json(settings: dict[str, Any]) -> str:
    return json.dumps({**settings, "acdit": __version__}, ensure_ascii=True)
