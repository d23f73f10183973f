"""acdit encode"""

from __future__ import annotations

import argparse

from acdit.cli.parser import AddCommand, positive

DTYPES = ("fp32", "fp16", "bf16")


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "encode", _encode, "Encode pictures to the latents of an autoencoder, once, for training to read.",
        "acdit encode /data/imagenet --vae /models/sd-vae --size 256 --flips --workers 8 --output latents/imagenet256",
    )  # fmt: skip
    made.add_argument("data", help="one folder a class, in a directory or a zip")
    made.add_argument("--vae", required=True, help="folder or hub id of a diffusers autoencoder")
    made.add_argument("--subfolder", help="where in it the autoencoder lies: vae in a saved pipeline")
    made.add_argument("--output", required=True, help="directory for the shards; one that was begun is gone on with")
    made.add_argument("--split", default="train", help="folder between the root and the classes (default train)")
    made.add_argument("--size", type=positive, default=256, help="pixels, after ADM's centre crop (default 256)")
    made.add_argument("--flips", action="store_true", help="encode the mirrored pictures too, for data.flip=true")
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
    made.add_argument("--batch-size", type=positive, default=16, help="pictures at once (default 16)")
    made.add_argument("--shard-size", type=positive, default=1024, help="pictures a shard (default 1024)")
    made.add_argument("--max-bad-files", type=int, default=0, help="how many pictures may be unreadable (default 0)")
    made.add_argument("--seed", type=int, default=0, help="of --posterior sample (default 0)")
    made.add_argument("--tiling", action="store_true", help="encode large pictures in tiles: less memory")
    made.add_argument("--slicing", action="store_true", help="encode a batch picture by picture: less memory")


def _encode(options: argparse.Namespace) -> None:
    import dataclasses

    from acdit.encoding import EncodeSettings, encode_dataset

    names = [field.name for field in dataclasses.fields(EncodeSettings)]
    manifest = encode_dataset(
        EncodeSettings(**{name: getattr(options, name) for name in names}),
        options.output,
        workers=options.workers,
        threads=options.threads,
        device=options.device,
    )
    channels, height, width = manifest.latent_shape
    print(
        f"done: {options.output}: {manifest.samples} pictures of {len(manifest.class_names)} classes as "
        f"{channels}×{height}×{width}, standard deviation {manifest.std:.3f}; train with data.kind=latents "
        f"data.root={options.output} codec.kind=vae codec.vae={options.vae}"
    )
