"""acdit export"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from acdit.cli.models import OF_PICTURES, is_text_model, load_pipeline, load_text_pipeline
from acdit.cli.parser import AddCommand, finite, positive, seed


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "export", _export,
        "Make a folder to share out of a saved pipeline: weights, recipe, figures, a model card with samples, and what "
        "diffusers needs to load it. With --push it goes to the Hugging Face hub.",
        "acdit export runs/demo/model --hub shared/digits --license mit\n"
        "  acdit export runs/demo/model --hub shared/digits --push OWNER/digits --private",
    )  # fmt: skip
    made.add_argument("model", help="folder of a saved pipeline, or a hub id")
    made.add_argument("--hub", required=True, metavar="DIR", help="the folder to make; an earlier export is replaced")
    made.add_argument("--push", metavar="REPO_ID", help="upload it to OWNER/NAME (needs a token: hf auth login)")
    made.add_argument("--private", action="store_true", help="with --push: a repository that only its owner sees")
    made.add_argument("--license", metavar="ID", help='of the weights, as the hub names it: "mit" (default: not named)')
    made.add_argument("--samples", type=_count, metavar="N", help="in the card (default 40 pictures, 4 clips, 2 texts)")
    made.add_argument("--steps", type=positive, help="solver steps a block (default: the recipe's)")
    made.add_argument("--guidance-scale", type=finite, help="of the samples (default: the recipe's)")
    made.add_argument("--seed", type=seed, default=0, help="of the samples (default 0)")
    made.add_argument("--device", help="default: cuda where there is one")
    made.add_argument("--vae", metavar="PATH", help="autoencoder to put into the folder, for a model without its own")


def _export(options: argparse.Namespace) -> None:
    from acdit.errors import ConfigError
    from acdit.hub import push, require_pushable, share
    from acdit.hub.folder import require_ours
    from acdit.hub.samples import SampleOptions

    if options.push is not None:
        require_pushable(options.push)
    elif options.private:
        raise ConfigError("--private", found="no --push", expected="both or neither")
    require_ours(Path(options.hub))
    shared = share(
        _pipeline(options), options.model, options.hub, license_id=options.license, repo_id=options.push,
        options=SampleOptions(options.samples, options.steps, options.guidance_scale, options.seed),
    )  # fmt: skip
    print(f"done: {shared.folder}; its card: {shared.folder / 'README.md'}")
    if shared.missing:
        print(f"the card has nothing to say about: {', '.join(shared.missing)}")
    if shared.private_paths:
        print(f"recipe.yaml names places on this machine: {', '.join(shared.private_paths)}")
    if options.push is not None:
        print(f"pushed: {push(shared.folder, options.push, private=options.private)}")


def _pipeline(options: argparse.Namespace) -> Any:
    given = {"vae": options.vae, "steps": options.steps or 1, "dtype": "fp32", "model": options.model}
    asked = argparse.Namespace(**{**OF_PICTURES, **given, "device": options.device})
    return load_text_pipeline(asked) if is_text_model(options.model) else load_pipeline(asked)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value
