"""acdit sample"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from acdit.cli.models import add_sampling_options, asked_labels, averaging_of, is_text_model, load_pipeline
from acdit.cli.parser import AddCommand, positive, version
from acdit.cli.sample_text import TEXT_ONLY, add_text_options, require_no_text_options, sample_texts
from acdit.cli.sample_video import add_video_options, require_no_video_options, sample_clips


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "sample", _sample,
        "Draw pictures or clips with a model, a few, or with --num-samples as many as FID wants; or write texts.",
        "acdit sample runs/demo/model --labels 0 1 2 3 --steps 25 --guidance-scale 1.5 --seed 0 --output out/\n"
        "  torchrun --nproc-per-node 8 -m acdit.cli sample MODEL --num-samples 50000 --npz samples.npz --output out/\n"
        "  acdit sample VIDEO_MODEL --labels 3 --prompt clip.mp4 --futures 4 --output out/\n"
        "  acdit sample VIDEO_MODEL --labels 3 --stream --blocks 1000 --output out/\n"
        "  acdit sample TEXT_MODEL --prompt 'To be, or' --max-new-tokens 200 --stream",
    )  # fmt: skip
    made.add_argument("model", help="folder of a saved pipeline, or a hub id")
    add_sampling_options(made)
    made.add_argument("--per-label", type=positive, default=1, help="pictures a label (default 1)")
    made.add_argument("--count", type=positive, help="pictures of an unconditional model (default 1)")
    made.add_argument("--prefix-image", metavar="FILE", help="a picture whose first blocks are kept")
    made.add_argument("--prefix-blocks", type=positive, help="how many of them")
    made.add_argument(
        "--num-samples", type=positive, metavar="N",
        help="draw N pictures or clips in parts that are kept (go on after a kill by the same command), over all "
        "processes of torchrun; labels take turns, without --labels all classes",
    )  # fmt: skip
    made.add_argument("--npz", metavar="FILE", help="with --num-samples: write ADM's form (arr_0) instead of files")
    made.add_argument("--png", action="store_true", help="with --npz: PNGs as well")
    made.add_argument("--chunk-size", type=positive, default=256, help="pictures a kept part (default 256)")
    made.add_argument(
        "--output", help="folder for what is drawn and settings.json (default out; texts go to the terminal anyhow)"
    )
    add_video_options(made)
    add_text_options(made)


def _sample(options: argparse.Namespace) -> None:
    from acdit.errors import ConfigError

    if is_text_model(options.model):
        sample_texts(options)
        return
    require_no_text_options(options)
    options.output = options.output or "out"
    if options.num_samples is not None:
        _sample_many(options)
        return
    if options.npz or options.png:
        raise ConfigError("--npz" if options.npz else "--png", found="no --num-samples", expected="both")
    _sample_few(options)


def _sample_few(options: argparse.Namespace) -> None:
    import torch

    from acdit import pictures
    from acdit.errors import ConfigError
    from acdit.generation import SamplingSettings, draw_pictures, picture_name, require_pictures, save_png

    pipeline = load_pipeline(options)
    if pipeline.transformer.layout.ndim == 3:
        sample_clips(options, pipeline)
        return
    require_no_video_options(options)
    require_pictures(pipeline)
    asked = asked_labels(options, pipeline, default="first")
    labels = None if asked is None else [index for index in asked for _ in range(options.per_label)]
    prefix = _prefix(options, pipeline)
    if labels is not None and options.count is not None:
        raise ConfigError("--count", found="a model of classes", expected="--labels and --per-label")
    total = len(labels) if labels is not None else options.count or 1
    settings = SamplingSettings(
        options.steps, options.guidance_scale, options.seed, None if labels is None else tuple(labels)
    )
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    starts = range(0, total, options.batch_size)
    given = {"prefix": prefix, "num_prefix_blocks": options.prefix_blocks}
    images = torch.cat(
        [draw_pictures(pipeline, settings, start, min(start + options.batch_size, total), **given) for start in starts]
    )
    for index, picture in enumerate(images):
        save_png(picture, output / picture_name(index, settings))
    columns = options.per_label if options.per_label > 1 else min(8, total)
    pictures.image_grid(images, columns=columns).save(output / "grid.png")
    record = _typed(options) | {"labels": labels, "solver": type(pipeline.scheduler).__name__, "acdit": version()}
    (output / "settings.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{total} pictures in {output}; all of them: {output / 'grid.png'}")


def _sample_many(options: argparse.Namespace) -> None:
    from acdit import provenance, storage
    from acdit.errors import ConfigError
    from acdit.generation import SamplingSettings, draws_clips, generate, write_clips, write_grid, write_npz, write_pngs
    from acdit.processes import joined_processes

    for name in ("count", "prefix_image", "prefix_blocks", "prompt", "stream", "switch", "window"):
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')}", found="--num-samples as well", expected="one of them")
    if options.per_label != 1:
        raise ConfigError("--per-label", found="--num-samples as well", expected="one: labels take turns")
    output = Path(options.output)
    with joined_processes() as processes:
        pipeline = load_pipeline(options, processes.device(options.device))
        clips = draws_clips(pipeline)
        _require_files_of(options, clips)
        labels = asked_labels(options, pipeline, default="all")
        settings = SamplingSettings(
            options.steps, options.guidance_scale, options.seed, None if labels is None else tuple(labels)
        )
        store = generate(
            pipeline, settings, output / "parts", options.num_samples, batch_size=options.batch_size,
            chunk_size=options.chunk_size, processes=processes,
        )  # fmt: skip
        files = bool(options.png or options.format or not options.npz)
        if files and clips:
            write_clips(store, settings, output, processes, options.format or "frames", options.fps)
        elif files:
            write_pngs(store, settings, output, processes)
        if not processes.is_first:
            return
        record = {
            "model": options.model,
            "num_samples": options.num_samples,
            **store.description,
            "ema": averaging_of(options.model),
            "batch_size": options.batch_size,
            **provenance.facts(),
        }
        if options.npz:
            write_npz(store, options.npz, record, settings.labels_of(0, options.num_samples))
        write_grid(store, output / "grid.png")
        storage.write_json_atomic(output / "settings.json", record)
    made = [*([options.npz] if options.npz else []), *([str(output)] if files else [])]
    print(
        f"{options.num_samples} {'clips' if clips else 'pictures'} in {' and '.join(made)}; "
        f"the first of them: {output / 'grid.png'}; "
        f"{output / 'parts'} may be removed"
    )


def _require_files_of(options: argparse.Namespace, clips: bool) -> None:
    """Refuse kinds of files that the model's samples cannot have, and mp4 without PyAV, before anything is drawn."""
    from acdit.errors import ConfigError
    from acdit.videos import open_writer

    if clips and options.png:
        raise ConfigError("--png", found="a video model", expected="--format frames, which writes PNGs")
    if options.format and not clips:
        raise ConfigError("--format", found="a model of pictures", expected="none: PNGs are written")
    if clips and options.format:
        open_writer(options.output, options.format)


def _typed(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the command as they were typed."""
    ours = (
        "run", "debug", "verbose", "command", "num_samples", "npz", "png", "chunk_size", "format", "fps", *TEXT_ONLY,
    )  # fmt: skip
    return {key: value for key, value in vars(options).items() if key not in ours}


def _prefix(options: argparse.Namespace, pipeline: Any) -> Any:
    """The given picture as a tensor (1, C, H, W) in [0, 1] of the model's size."""
    from acdit.errors import ConfigError, DataError

    if options.prefix_image is None:
        if options.prefix_blocks is not None:
            raise ConfigError("--prefix-blocks", found="no --prefix-image", expected="both or neither")
        return None
    blocks = pipeline.transformer.layout.num_blocks
    if options.prefix_blocks is None or options.prefix_blocks >= blocks:
        raise ConfigError("--prefix-blocks", found=str(options.prefix_blocks), expected=f"1 … {blocks - 1}")
    import numpy as np
    import torch
    from PIL import Image

    grid = pipeline.transformer.config.grid
    from acdit.codecs import spatial_factor
    from acdit.data.picture import BadPicture, decode_picture

    factor = spatial_factor(pipeline.vae) if pipeline.vae is not None else 1
    channels = pipeline.transformer.config.in_channels if pipeline.vae is None else pipeline.vae.config.in_channels
    gray = channels == 1
    try:
        given = decode_picture(Path(options.prefix_image).read_bytes(), 1 if gray else 3, None)
    except (OSError, BadPicture) as error:
        raise DataError(f"{options.prefix_image}", found=str(error), expected="a picture") from None
    picture = Image.fromarray(given[0].numpy() if gray else given.permute(1, 2, 0).numpy())
    values = np.asarray(picture.resize((grid[1] * factor, grid[0] * factor)), dtype=np.float32) / 255
    pixels = torch.from_numpy(values)
    return (pixels[None] if gray else pixels.permute(2, 0, 1))[None]
