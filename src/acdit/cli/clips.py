"""What `acdit evaluate` asks of clips: the options, and whether they fit the extractor and the model."""

from __future__ import annotations

import argparse
from typing import Any

from acdit.cli.parser import positive


def add_clip_options(made: argparse.ArgumentParser) -> None:
    """Declare how clips are measured."""
    made.add_argument(
        "--frames", type=positive, metavar="T",
        help="measure clips: the first T frames of each (default with an extractor of clips: 16)",
    )  # fmt: skip
    made.add_argument("--frame-stride", type=positive, metavar="N", help="of clips: take every N-th frame (default 1)")
    made.add_argument(
        "--span", type=positive, metavar="N", help="of clips: distances over time are of N frames each (default 1)"
    )


def asked_cut(options: argparse.Namespace, extractor: Any) -> Any:
    """Which frames of clips are measured, as a `ClipCut`; None: pictures are.

    Clips are measured where --frames or the extractor says so: a folder of gifs, or of folders of pictures, may be
    either.

    Raises:
        ConfigError: options of clips without clips, or too few frames for the extractor.
    """
    from acdit.errors import ConfigError
    from acdit.evaluation.clip_files import ClipCut

    if options.frames is None and extractor.kind == "frames":
        for name, value in (("--frame-stride", options.frame_stride), ("--span", options.span)):
            if value is not None:
                raise ConfigError(name, found="no --frames", expected="both, to measure clips")
        return None
    cut = ClipCut(options.frames or 16, options.frame_stride or 1)
    extractor.require_frames(cut.frames)
    return cut


def require_samples_of(pipeline: Any, cut: Any) -> None:
    """Refuse a model whose samples are not what is measured, before anything is drawn.

    Raises:
        ConfigError: a model of pictures for clips, or the reverse.
        DataError: its clips are too short.
    """
    from acdit.errors import ConfigError
    from acdit.evaluation.clip_sets import too_short
    from acdit.generation import draws_clips

    clips = draws_clips(pipeline)
    if clips and cut is None:
        raise ConfigError("model", found="a video model", expected="one of pictures", fix="--frames T measures clips")
    if cut is not None and not clips:
        raise ConfigError(
            "model", found="a model of pictures", expected="a video model",
            fix="no --frames, and an extractor of frames (inception, pixels, …)",
        )  # fmt: skip
    frames = pipeline.transformer.config.grid[0]  # an autoencoder may make more of them, and then it is seen later
    if cut is not None and pipeline.vae is None and frames < cut.span:
        raise too_short("clips of the model", frames, cut)
