"""acdit convert"""

from __future__ import annotations

import argparse
from pathlib import Path

from acdit.cli.parser import AddCommand, positive


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "convert", _convert,
        "Convert a released checkpoint of the reference (thunlp/ACDiT), or of DiT, to a model folder.",
        "acdit convert ACDiT-XL-img.pt models/acdit-xl-img",
    )  # fmt: skip
    made.add_argument("checkpoint", help="the .pt file; no code in it is executed")
    made.add_argument("output", help="the folder to make")
    made.add_argument("--vae", metavar="FOLDER", help="of a DiT: the AutoencoderKL to put into its pipeline")
    made.add_argument("--heads", type=positive, help="of a DiT whose width is not that of a released one")


def _convert(options: argparse.Namespace) -> None:
    from acdit.convert import convert_reference
    from acdit.dit import convert_dit, state_dict_of
    from acdit.errors import ConfigError
    from acdit.pickles import load_checkpoint

    if state_dict_of(load_checkpoint(Path(options.checkpoint))) is not None:
        config = convert_dit(options.checkpoint, options.output, options.vae, options.heads)
        size = f"{config['num_layers']} blocks, {config['num_attention_heads']} heads"
        print(f"done: {options.output} (a DiT of {size}; import acdit.dit, then DiTPipeline.from_pretrained)")
        return
    for name in ("vae", "heads"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}", found=str(getattr(options, name)), expected="a DiT checkpoint to use it for")
    convert_reference(options.checkpoint, options.output)
    print(f"done: {options.output}")
