"""acdit app"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from acdit.cli.models import DTYPES, OF_PICTURES, is_text_model, load_pipeline, load_text_pipeline
from acdit.cli.parser import AddCommand, positive, seed

_USUAL = {"runs/demo/model": "digits", "runs/demo-video/model": "moving-digits", "runs/demo-text/model": "text"}
"""What the demos leave, and the built-in model in the place of one that is not there."""


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "app", _app,
        "A live page on this machine: see blocks being denoised, continue uploads, switch classes, take layouts apart. "
        "Needs the extra `app`; it listens on 127.0.0.1 only, and sends nothing anywhere.",
        "acdit app runs/demo/model runs/demo-text/model\n  acdit app --port 0",
    )  # fmt: skip
    made.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="folders of saved pipelines, or built-in names (default: what the demos left in runs/, else the built-in "
        "models)",
    )
    made.add_argument("--port", type=seed, default=7860, help="on 127.0.0.1 (default 7860; 0: any free one)")
    made.add_argument(
        "--queue", type=positive, default=16, help='requests that may wait; more hear "busy" (default 16)'
    )
    made.add_argument("--batch-size", type=positive, default=16, help="samples that are denoised at once (default 16)")
    made.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (default fp32)")
    made.add_argument("--device", help="default: cuda where there is one")
    made.add_argument("--vae", metavar="PATH", help="autoencoder for models that were saved without their own")
    made.set_defaults(steps=1, **OF_PICTURES)  # what loading a model looks at: here a request brings it


def _app(options: argparse.Namespace) -> None:
    from acdit.app.models import ServedModel
    from acdit.app.requests import Limits
    from acdit.app.server import require_gradio, serve
    from acdit.errors import ConfigError

    if options.port > 65535:
        raise ConfigError("--port", found=str(options.port), expected="0 … 65535")
    require_gradio()
    names = options.models or [
        demo if Path(demo, "model_index.json").is_file() else small for demo, small in _USUAL.items()
    ]
    models = [ServedModel(name, _pipeline(options, name)) for name in dict.fromkeys(names)]
    limits = Limits(waiting=options.queue, batch=max(options.batch_size, Limits.samples))

    def started(address: str) -> None:
        print(f"serving {', '.join(model.name for model in models)} on {address} (Ctrl-C ends it)")

    serve(models, options.port, limits, started)


def _pipeline(options: argparse.Namespace, name: str) -> Any:
    asked = argparse.Namespace(**{**vars(options), "model": name})
    if is_text_model(name):
        asked.vae = None
        return load_text_pipeline(asked)
    return load_pipeline(asked)
