"""acdit sample, of a video model: clips, continuations of a given one, and streams."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acdit.cli.models import asked_labels
from acdit.cli.parser import positive, version

_ONLY_STREAM = ("blocks", "resume")


def add_video_options(made: argparse.ArgumentParser) -> None:
    """Declare what only video models have a use for."""
    group = made.add_argument_group("video models")
    group.add_argument(
        "--format",
        choices=("mp4", "gif", "frames"),
        help="default: mp4 with PyAV there, else gif; of --num-samples frames",
    )
    group.add_argument("--fps", type=float, default=8.0, help="frames a second of mp4 and gif (default 8)")
    group.add_argument(
        "--prompt", metavar="FILE", help="a clip to continue at its end, or a picture to begin with (of text: the text)"
    )
    group.add_argument(
        "--prompt-blocks", type=positive, metavar="N",
        help="how many blocks of it are given (default: all but the last step of the model's grid; of a picture the "
        "first step)",
    )  # fmt: skip
    group.add_argument("--futures", type=positive, default=1, metavar="N", help="clips a label from the same prompt")
    group.add_argument(
        "--switch", action="append", default=[], metavar="BLOCK:LABEL", help="from that block on, another label"
    )
    group.add_argument(
        "--window", type=positive, metavar="W", help="see only W blocks of the past (default: the model's)"
    )
    group.add_argument("--sinks", type=int, default=0, metavar="N", help="with --window: and the first N blocks")
    group.add_argument("--stream", action="store_true", help="go on beyond the model's length, in constant memory")
    group.add_argument("--blocks", type=positive, help="with --stream: how many blocks more (default: until stopped)")
    group.add_argument(
        "--resume", action="store_true", help="with --stream: go on where the stream in --output stopped"
    )


def require_no_video_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for a picture model asked for what only videos have."""
    from acdit.errors import ConfigError

    for name in ("format", "prompt", "prompt_blocks", "window", "stream", "blocks", "resume", "switch"):
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')}", found="a model of pictures", expected="a video model")


def sample_clips(options: argparse.Namespace, pipeline: Any) -> None:
    """What `acdit sample` does with a video model."""
    from acdit.errors import ConfigError
    from acdit.mask import Window
    from acdit.streaming import Stream

    for name in _ONLY_STREAM:
        if getattr(options, name) and not options.stream:
            raise ConfigError(f"--{name}", found="no --stream", expected="both")
    if options.prefix_image is not None:
        raise ConfigError("--prefix-image", found="a video model", expected="--prompt, a clip or a picture")
    if options.sinks and options.window is None:
        raise ConfigError("--sinks", found="no --window", expected="both")
    switches = _switches(options, pipeline)
    asked = asked_labels(options, pipeline, default="first")
    if asked is not None and options.count is not None:
        raise ConfigError("--count", found="a model of classes", expected="--labels and --per-label")
    copies = options.per_label * options.futures
    labels = None if asked is None else [index for index in asked for _ in range(copies)]
    window = None if options.window is None else Window(options.window, options.sinks)
    layout = pipeline.transformer.layout
    if labels is not None and len(labels) > options.batch_size:
        raise ConfigError(
            "--batch-size", found=f"{len(labels)} clips", expected=f"at most {options.batch_size}, drawn at once",
            fix="--num-samples draws any number, or raise --batch-size",
        )  # fmt: skip
    stream = Stream(
        pipeline, labels, batch_size=None if labels is not None else (options.count or 1) * options.futures,
        num_inference_steps=options.steps, guidance_scale=options.guidance_scale, seed=options.seed, window=window,
        max_blocks=options.blocks if options.stream else layout.num_blocks,
    )  # fmt: skip
    given = _prompt(options, pipeline)
    if given is not None:
        if options.resume:
            raise ConfigError("--prompt", found="--resume as well", expected="one: a stream has begun already")
        stream.give(given)
    if options.stream:
        _run_stream(options, stream, switches, given)
    else:
        _run_clips(options, stream, switches, given)


def _run_clips(options: argparse.Namespace, stream: Any, switches: dict[int, int], given: Any) -> None:
    import torch

    from acdit.videos import contact_sheet, write_clip

    total = stream.pipeline.transformer.layout.num_blocks
    parts = [] if given is None else [_bytes(stream.decode(given)).expand(stream.batch_size, -1, -1, -1, -1)]
    parts += [_bytes(frames) for frames in _generated(stream, total - stream.num_blocks, switches)]
    clips = torch.cat(parts, dim=1)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    kind = _format(options)
    for index, clip in enumerate(clips):
        write_clip(clip, output / _name(stream, index, kind), kind, options.fps)
    shown = clips[:16]
    names = None if stream.labels is None else [str(label) for label in stream.first_labels[: len(shown)]]
    contact_sheet(shown, row_labels=names).save(output / "grid.png")
    _record(options, stream, output)
    print(f"{len(clips)} clips of {clips.shape[1]} frames in {output}; frames of them: {output / 'grid.png'}")


def _run_stream(options: argparse.Namespace, stream: Any, switches: dict[int, int], given: Any) -> None:
    from acdit import storage
    from acdit.errors import StorageError
    from acdit.videos import open_writer

    output, kept = Path(options.output), Path(options.output) / "state"
    output.mkdir(parents=True, exist_ok=True)
    with storage.RunLock(output):
        if options.resume:
            stream.load(kept)
        elif kept.exists():
            raise StorageError(
                f"{output}", found="a stream that has begun", expected="an empty folder", fix="--resume goes on with it"
            )
        kind, begun = _format(options), stream.num_blocks
        with contextlib.ExitStack() as stack:
            # A file a start: an mp4 cannot be appended to. Frames go on in their folder.
            suffix = f"-from-block-{begun:06d}" if kind != "frames" and options.resume else ""
            writers = [
                stack.enter_context(open_writer(output / _name(stream, index, kind, suffix), kind, options.fps))
                for index in range(stream.batch_size)
            ]
            if given is not None:
                for writer, clip in zip(
                    writers, _bytes(stream.decode(given)).expand(len(writers), -1, -1, -1, -1), strict=True
                ):
                    writer.add(clip)
            stopped = stack.enter_context(_stop_signals())
            # Whatever ends it, what was made is kept: the state lies beside the frames.
            stack.callback(lambda: stream.save(kept))
            for frames in _generated(stream, options.blocks, switches, stopped):
                for writer, clip in zip(writers, _bytes(frames), strict=True):
                    writer.add(clip)
        _record(options, stream, output)
    made = stream.num_blocks - begun
    print(f"{made} blocks, {stream.num_blocks} in all, in {output}; --resume goes on from {kept}")
    if stopped:
        raise SystemExit(128 + stopped[0])


def _generated(
    stream: Any, blocks: int | None, switches: dict[int, int], stopped: list[int] | None = None
) -> Iterator[Any]:
    """Frames as they come; labels change where asked for, and between two blocks a signal ends it."""
    from tqdm import tqdm

    with tqdm(total=blocks, unit="block", dynamic_ncols=True) as bar:
        done = 0
        while blocks is None or done < blocks:
            past = [block for block in switches if block <= stream.num_blocks]
            if past and stream.labels is not None:
                stream.labels = [switches[max(past)]] * len(stream.labels)
            started = time.perf_counter()
            yield from stream.frames(1)
            done += 1
            bar.update(1)
            bar.set_postfix(
                seconds_a_block=f"{time.perf_counter() - started:.2f}", cache_MB=f"{stream.cache_nbytes / 1e6:.1f}"
            )
            if stopped:
                return


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that holds the first SIGINT or SIGTERM; a second one ends the process at once."""
    received: list[int] = []
    kept: dict[int, Any] = {}

    def request(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, kept[number])

    try:
        for number in map(int, (signal.SIGTERM, signal.SIGINT)):
            kept[number] = signal.signal(number, request)
    except ValueError:  # not in the main thread: the caller handles signals
        kept = {}
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _switches(options: argparse.Namespace, pipeline: Any) -> dict[int, int]:
    """Block → label from there on."""
    from acdit.errors import ConfigError

    switches: dict[int, int] = {}
    for text in options.switch:
        found = re.fullmatch(r"(\d+):(.+)", text)
        if found is None:
            raise ConfigError("--switch", found=text, expected="BLOCK:LABEL, like 8:5")
        label = asked_labels(argparse.Namespace(labels=[found[2]]), pipeline, default="first")
        if label is None or len(label) != 1:
            raise ConfigError("--switch", found=text, expected="one label of a model of classes")
        switches[int(found[1])] = label[0]
    return switches


def _prompt(options: argparse.Namespace, pipeline: Any) -> Any:
    """The given clip's last blocks, or a picture as the first step, (1, n, L, D) in model space."""
    from acdit.data.picture import SUFFIXES, BadPicture
    from acdit.errors import ConfigError, DataError

    if options.prompt is None:
        if options.prompt_blocks is not None:
            raise ConfigError("--prompt-blocks", found="no --prompt", expected="both or neither")
        return None
    layout = pipeline.transformer.layout
    a_step = layout.num_blocks // layout.block_grid[0]
    picture = options.prompt.lower().endswith(SUFFIXES) and not options.prompt.lower().endswith(".gif")  # a clip
    most = None if options.stream else layout.num_blocks - a_step
    count = options.prompt_blocks or (a_step if picture else layout.num_blocks - a_step)
    if count % a_step or count < 1 or (most is not None and count > most):
        raise ConfigError(
            "--prompt-blocks", found=str(count), expected=f"a multiple of {a_step}, the blocks of a step of time"
            + ("" if most is None else f", at most {most}"),
        )  # fmt: skip
    frames = count // a_step * layout.block[0] * layout.patch[0]
    try:
        clip = _read_prompt(Path(options.prompt), frames, pipeline, picture)
    except BadPicture as error:
        raise DataError(options.prompt, found=str(error), expected=f"a picture, or a clip of {frames} frames") from None
    step = type(layout)((frames, *layout.grid[1:]), layout.block, layout.patch)
    return step.to_blocks(pipeline.codec.encode(clip[None].to(pipeline.transformer.device)))


def _read_prompt(path: Path, frames: int, pipeline: Any, picture: bool) -> Any:
    """uint8 (C, T, H, W) of the model's size: the last frames of a clip, or one picture again and again."""
    from acdit.codecs import spatial_factor
    from acdit.data.frame_choice import FrameChoice
    from acdit.data.picture import BadPicture, decode_picture, fitted
    from acdit.data.video import read_clip, require_av

    vae, config = pipeline.vae, pipeline.transformer.config
    factor = spatial_factor(vae) if vae is not None else 1
    size = (config.grid[1] * factor, config.grid[2] * factor)
    channels = config.in_channels if vae is None else vae.config.in_channels
    if picture:
        try:
            one = decode_picture(path.read_bytes(), channels, size)
        except OSError as error:
            raise BadPicture(str(error)) from None
        return one[:, None].expand(-1, frames, -1, -1)
    require_av()
    at_the_end = 1 - 2**-40  # the last place that a random start may take
    choice = FrameChoice(frames, start="random")
    return read_clip(path, choice, lambda frame: fitted(frame, channels, size), size, at_the_end)


def _format(options: argparse.Namespace) -> str:
    if options.format is not None:
        return str(options.format)
    try:
        import av  # noqa: F401 (only whether it is there)
    except ImportError:
        return "gif"
    return "mp4"


def _name(stream: Any, index: int, kind: str, suffix: str = "") -> str:
    label = "" if stream.first_labels is None else f"-label-{stream.first_labels[index]}"
    return f"{index:05d}{label}-seed-{stream.seed + index}{suffix}" + ("" if kind == "frames" else f".{kind}")


def _bytes(frames: Any) -> Any:
    """(B, T, C, H, W) in [0, 1] → uint8 on the CPU."""
    import torch

    from acdit.errors import NonFiniteError

    if not bool(frames.isfinite().all()):
        raise NonFiniteError(
            "frames", found="NaN or infinite values", expected="finite ones",
            fix="--dtype fp32, a lower guidance scale, or another checkpoint",
        )  # fmt: skip
    return (frames.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def _record(options: argparse.Namespace, stream: Any, output: Path) -> None:
    ours = ("run", "debug", "verbose", "command", "num_samples", "npz", "png", "chunk_size")
    record = {key: value for key, value in vars(options).items() if key not in ours}
    record |= {"blocks": stream.num_blocks, "acdit": version(), "solver": type(stream.pipeline.scheduler).__name__}
    (output / "settings.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
