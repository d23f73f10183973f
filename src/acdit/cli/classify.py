"""acdit classify"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acdit.cli.parser import AddCommand, positive


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "classify", _classify, "Say what pictures or clips show, with a model that `acdit finetune` left.",
        "acdit classify runs/finetune-mnist/model five.png pictures/ --top 3\n"
        "  acdit classify VIDEO_MODEL clip.mp4 --stream --format csv --output classes.csv",
    )  # fmt: skip
    made.add_argument("model", help="folder of a model with a classifier/")
    made.add_argument("files", nargs="+", help="pictures, or clips for a video model; folders: all pictures below them")
    made.add_argument("--top", type=positive, default=5, metavar="K", help="how many classes each (default 5)")
    made.add_argument("--format", choices=("json", "csv"), default="json", help="a JSON object a line, or CSV")
    made.add_argument("--output", metavar="FILE", help="default: the terminal")
    made.add_argument("--stream", action="store_true", help="of clips: an answer after every block that is read")
    made.add_argument("--batch-size", type=positive, default=64, help="pictures at once (default 64)")
    made.add_argument("--device", help="default: cuda where there is one")
    made.add_argument(
        "--vae", metavar="PATH", help="autoencoder to read pixels with, for a model saved without its own"
    )


def load_classifier(model: str, device: str | None = None, vae: str | None = None) -> Any:
    """The classifier of a model folder, on its device.

    Raises:
        ConfigError: none there, or no such device.
    """
    from acdit.classifiers import ACDiTClassifier
    from acdit.cli.models import chosen_device

    classifier = ACDiTClassifier.from_pretrained(model)
    if vae is not None:
        from acdit.codecs import load_vae

        classifier.pipeline.register_modules(vae=load_vae(vae))
    return classifier.to(chosen_device(device))


def _classify(options: argparse.Namespace) -> None:
    from acdit import storage
    from acdit.errors import ConfigError

    classifier = load_classifier(options.model, options.device, options.vae)
    clips = classifier.classifier.transformer.layout.ndim == 3
    if options.stream and not clips:
        raise ConfigError("--stream", found="a model of pictures", expected="a video model")
    rows = _clip_rows(options, classifier) if clips else _picture_rows(options, classifier)
    if options.output is None:
        for row in rows:
            print(_line(row, options.format), end="")
            sys.stdout.flush()
        return
    storage.write_text_atomic(options.output, "".join(_line(row, options.format) for row in rows))
    print(f"see {options.output}")


def _line(row: dict[str, Any], form: str) -> str:
    """A JSON object, or CSV: file, block (of streams), then class, name and probability of each of the top K."""
    if form == "json":
        return json.dumps(row, ensure_ascii=False) + "\n"
    text = io.StringIO()
    cells = [row["file"], *([row["block"]] if "block" in row else [])]
    for one in row["top"]:
        cells += [one["class"], one["name"], f"{one['probability']:.6f}"]
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _picture_rows(options: argparse.Namespace, classifier: Any) -> Iterator[dict[str, Any]]:
    import torch

    from acdit.data.picture import SUFFIXES, BadPicture, decode_picture
    from acdit.errors import DataError

    files: list[Path] = []
    for named in map(Path, options.files):
        inside = sorted(path for path in named.rglob("*") if path.suffix.lower() in SUFFIXES) if named.is_dir() else []
        if named.is_dir() and not inside:
            raise DataError(str(named), found="no pictures", expected=f"files that end in {', '.join(SUFFIXES)}")
        files += inside or [named]
    channels, size = _pixels(classifier)
    for first in range(0, len(files), options.batch_size):
        part, pictures = files[first : first + options.batch_size], []
        for path in part:
            try:
                pictures.append(decode_picture(path.read_bytes(), channels, size))
            except (BadPicture, OSError) as error:
                raise DataError(str(path), found=f"a bad picture ({error})", expected="one that can be read") from None
        best = classifier.best(classifier(torch.stack(pictures), first), options.top)
        yield from ({"file": str(path), "top": top} for path, top in zip(part, best, strict=True))


def _clip_rows(options: argparse.Namespace, classifier: Any) -> Iterator[dict[str, Any]]:
    """Clip by clip: the first frames of each, as many as the model has."""
    from acdit.data.frame_choice import TooShort
    from acdit.data.picture import SUFFIXES, BadPicture
    from acdit.errors import DataError
    from acdit.evaluation.clip_files import ClipCut, natural, read_frames, read_video

    channels, size = _pixels(classifier)
    cut = ClipCut(classifier.classifier.transformer.config.grid[0])
    for number, path in enumerate(map(Path, options.files)):
        try:
            if path.is_dir():
                frames = [frame for frame in path.iterdir() if frame.suffix.lower() in SUFFIXES]
                clip = read_frames(sorted(frames, key=lambda frame: natural(frame.name)), cut, channels, size)
            else:
                clip = read_video(path, cut, channels, size)
        except (BadPicture, TooShort, OSError) as error:
            raise DataError(
                str(path), found=f"no clip that can be read ({error})", expected=f"{cut.frames} frames"
            ) from None
        blocks = classifier.blocks(clip.transpose(0, 1)[None])
        if not options.stream:
            yield {"file": str(path), "top": classifier.best(classifier.of_blocks(blocks, number), options.top)[0]}
            continue
        for block, logits in enumerate(classifier.stream(blocks)):
            yield {"file": str(path), "block": block, "top": classifier.best(logits, options.top)[0]}


def _pixels(classifier: Any) -> tuple[int, int]:
    """Channels and edge of the pictures or frames that the model reads."""
    from acdit.errors import ConfigError

    transformer, vae = classifier.classifier.transformer, classifier.pipeline.vae
    height, width = transformer.config.grid[-2:]
    if height != width:
        raise ConfigError(
            "model", found=f"a grid of {height}×{width}", expected="a square one: files are cropped to it"
        )
    if vae is None:
        return transformer.config.in_channels, height
    from acdit.codecs.autoencoders import spatial_factor

    return int(getattr(vae.config, "in_channels", 3)), height * spatial_factor(vae)
