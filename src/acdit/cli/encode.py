"""acdit encode"""

from __future__ import annotations

import argparse
import re

from acdit.cli.parser import AddCommand, positive

DTYPES = ("fp32", "fp16", "bf16")
KINDS = ("images", "webdataset", "hf", "clips")
# Settings of a recipe's data that this command takes too: errors about them are to name what was typed here.
_TYPED = {
    "root": "DATA", "kind": "--kind", "split": "--split", "size": "--size", "classes": "--classes",
    "image_column": "--image-column", "label_column": "--label-column", "max_bad_files": "--max-bad-files",
    "frames": "--frames", "frame_stride": "--frame-stride", "fps": "--fps", "start": "--start",
    "short_clips": "--short-clips", "split_file": "--split-file",
}  # fmt: skip


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "encode", _encode, "Encode pictures or clips to the latents of an autoencoder, once, for training to read.",
        "acdit encode /data/imagenet --vae /models/sd-vae --size 256 --flips --workers 8 --output latents/imagenet256",
    )  # fmt: skip
    made.add_argument("data", metavar="DATA", help="where the pictures or clips lie; in which form says --kind")
    made.add_argument(
        "--kind", choices=KINDS, default="images",
        help="images: one folder a class, in a directory or a zip (default); webdataset: tars, as a file, a folder or "
        "a pattern like shards-{000..010}.tar; hf: parquet or arrow files, a saved data set, a name on the hub; "
        "clips: video files, one folder a class or a --split-file, encoded frame by frame",
    )  # fmt: skip
    made.add_argument("--vae", required=True, help="folder or hub id of a diffusers autoencoder")
    made.add_argument("--subfolder", help="where in it the autoencoder lies: vae in a saved pipeline")
    made.add_argument("--output", required=True, help="directory for the shards; one that was begun is gone on with")
    made.add_argument("--split", default="train", help="folder below DATA, or split of the data set (default train)")
    made.add_argument(
        "--classes", metavar="FILE", help="the classes in order, a line each, or JSON; default: the data's"
    )
    made.add_argument("--image-column", default="image", help="of --kind hf (default image)")
    made.add_argument(
        "--label-column", default="label", help="of --kind hf, or field of a .json of --kind webdataset (default label)"
    )
    made.add_argument("--size", type=positive, default=256, help="pixels, after ADM's centre crop (default 256)")
    _add_clip_options(made)
    made.add_argument("--flips", action="store_true", help="encode the mirrored view too, for data.flip=true")
    made.add_argument(
        "--posterior", choices=("mode", "sample", "moments"), default="mode",
        help="what to store; moments lets training sample anew at each step (default mode)",
    )  # fmt: skip
    made.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the stored latents (default fp16)")
    made.add_argument("--precision", choices=DTYPES, default="fp32", help="of the autoencoder (default fp32)")
    made.add_argument(
        "--workers", type=positive, default=1, help="processes; any number gives the same bits (default 1)"
    )
    made.add_argument("--threads", type=positive, default=1, help="of each process (default 1)")
    made.add_argument("--device", help="cpu, cuda (workers are dealt over all devices) or cuda:N; default: cuda if any")
    made.add_argument("--batch-size", type=positive, default=16, help="pictures, or frames, at once (default 16)")
    made.add_argument("--shard-size", type=positive, help="samples a shard (default 1024 pictures, or 64 clips)")
    made.add_argument("--max-bad-files", type=int, default=0, help="how many files may be unreadable (default 0)")
    made.add_argument("--seed", type=int, default=0, help="of --posterior sample (default 0)")
    made.add_argument("--tiling", action="store_true", help="encode large pictures in tiles: less memory")
    made.add_argument("--slicing", action="store_true", help="encode a batch picture by picture: less memory")


def _add_clip_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--frames", type=positive, default=16, metavar="T", help="of a clip (default 16)")
    made.add_argument("--frame-stride", type=positive, default=1, metavar="N", help="of clips: every N-th frame")
    made.add_argument("--fps", type=float, help="of clips: count frames of so many a second, by the video's times")
    made.add_argument(
        "--start", choices=("center", "first"), default="center", help="where in its file a clip lies (default center)"
    )
    made.add_argument(
        "--clips-per-file", type=positive, default=1, metavar="N",
        help="instead of one: N clips from places evenly spread over each file (default 1)",
    )  # fmt: skip
    made.add_argument(
        "--short-clips", choices=("error", "loop"), default="error",
        help="what becomes of shorter files: bad files, or begun anew (default error)",
    )  # fmt: skip
    made.add_argument("--split-file", metavar="FILE", help="of clips: one of UCF-101's lists, instead of all folders")


def _encode(options: argparse.Namespace) -> None:
    import dataclasses

    from acdit.encoding import encode_dataset
    from acdit.encoding_plan import EncodeSettings
    from acdit.errors import AcditError

    names = [field.name for field in dataclasses.fields(EncodeSettings)]
    try:
        manifest = encode_dataset(
            EncodeSettings(**{name: getattr(options, name) for name in names}),
            options.output,
            workers=options.workers,
            threads=options.threads,
            device=options.device,
        )
    except AcditError as error:
        what, found, expected, fix = map(_typed, (error.what, error.found, error.expected, error.fix))
        raise type(error)(what, found=found, expected=expected, fix=fix) from error
    what, shape = "pictures" if manifest.clips is None else "clips", "×".join(map(str, manifest.latent_shape))
    print(
        f"done: {options.output}: {manifest.samples} {what} of {len(manifest.class_names)} classes as "
        f"{shape}, standard deviation {manifest.std:.3f}; train with data.kind=latents "
        f"data.root={options.output} codec.kind=vae codec.vae={options.vae}"
    )


def _typed(text: str) -> str:
    """A message about a recipe's data.classes is one about --classes; paths that happen to read like that stay."""
    return re.sub(r"(?<![\w/.-])data\.(\w+)(?![\w/.-])", lambda key: _TYPED.get(key[1], key[0]), text)
