"""acdit sample"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from acdit.cli.parser import AddCommand, positive, version

SOLVERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
FLOW_SOLVERS = ("dpm++", "unipc", "flow-euler")
DTYPES = ("fp32", "bf16", "fp16", "fp64")


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "sample", _sample, "Draw pictures with a trained model.",
        "acdit sample runs/demo/model --labels 0 1 2 3 --steps 25 --guidance-scale 1.5 --seed 0 --output out/",
    )  # fmt: skip
    made.add_argument("model", help="folder of a saved pipeline, or a hub id")
    made.add_argument("--labels", nargs="+", metavar="LABEL", help="class indices, ranges (0-9) or class names")
    made.add_argument("--per-label", type=positive, default=1, help="pictures a label (default 1)")
    made.add_argument("--count", type=positive, help="pictures of an unconditional model (default 1)")
    made.add_argument("--steps", type=positive, default=25, help="solver steps a block (default 25)")
    made.add_argument("--guidance-scale", type=float, default=1.5, help="1 is off (default 1.5)")
    made.add_argument("--solver", choices=sorted(SOLVERS), help="default: the one saved with the model")
    made.add_argument("--seed", type=int, default=0, help="picture i gets seed + i (default 0)")
    made.add_argument("--batch-size", type=positive, default=64, help="pictures at once (default 64)")
    made.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default fp32)")
    made.add_argument("--device", help="default: cuda where there is one")
    made.add_argument("--vae", metavar="PATH", help="autoencoder to decode with, for a model saved without its own")
    made.add_argument("--vae-tiling", action="store_true", help="decode large pictures in tiles: less memory")
    made.add_argument("--vae-slicing", action="store_true", help="decode picture by picture: less memory")
    made.add_argument("--prefix-image", metavar="FILE", help="a picture whose first blocks are kept")
    made.add_argument("--prefix-blocks", type=positive, help="how many of them")
    made.add_argument("--output", default="out", help="folder for PNGs, grid.png and settings.json (default out)")


def _sample(options: argparse.Namespace) -> None:
    import torch

    from acdit import pictures
    from acdit.errors import ConfigError

    pipeline = _load_pipeline(options)
    labels = _labels(options, pipeline)
    prefix = _prefix(options, pipeline)
    total = len(labels) if labels is not None else options.count or 1
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    done = []
    for start in range(0, total, options.batch_size):
        size = min(options.batch_size, total - start)
        (images,) = pipeline(
            labels[start : start + size] if labels is not None else None,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            generator=options.seed + start,
            batch_size=size,
            prefix=prefix,
            num_prefix_blocks=options.prefix_blocks,
            output_type="pt",
            return_dict=False,
        )
        if images.ndim != 4:
            raise ConfigError("model", found="a video model", expected="a model of pictures")
        done.append(images.float().cpu())
    images = torch.cat(done)
    from diffusers.image_processor import VaeImageProcessor

    for index, picture in enumerate(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))):
        label = f"-label-{labels[index]}" if labels is not None else ""
        picture.save(output / f"{index:05d}{label}-seed-{options.seed + index}.png")
    columns = options.per_label if options.per_label > 1 else min(8, total)
    pictures.image_grid(images, columns=columns).save(output / "grid.png")
    settings = {key: value for key, value in vars(options).items() if key not in ("run", "debug", "verbose", "command")}
    settings |= {"labels": labels, "solver": type(pipeline.scheduler).__name__, "acdit": version()}
    (output / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"{total} pictures in {output}; all of them: {output / 'grid.png'}")


def _load_pipeline(options: argparse.Namespace) -> Any:
    import diffusers
    import torch

    from acdit import ACDiTPipeline
    from acdit.errors import ConfigError

    folder = Path(options.model)
    if not (folder / "model_index.json").is_file() and (
        folder.exists() or options.model.startswith((".", "/", "runs/"))
    ):
        raise ConfigError(
            f"model {options.model}", found="no model_index.json there", expected="the folder of a saved pipeline",
            fix="train one (make demo leaves runs/demo/model), or check the path",
        )  # fmt: skip
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[options.dtype]
    try:
        pipeline = ACDiTPipeline.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ConfigError(
            f"model {options.model}", found=f"no such folder, and no such model on the hub ({reason})",
            expected="a saved ACDiTPipeline", fix="make demo leaves one in runs/demo/model",
        ) from error  # fmt: skip
    if options.vae is not None:
        from acdit.codecs import load_vae

        pipeline.register_modules(vae=load_vae(options.vae))
    if options.vae_tiling or options.vae_slicing:
        from acdit.codecs.autoencoders import set_memory_savers

        if pipeline.vae is None:
            raise ConfigError("--vae-tiling, --vae-slicing", found="a model without an autoencoder", expected="neither")
        set_memory_savers(pipeline.vae, tiling=options.vae_tiling, slicing=options.vae_slicing)
    if dtype != torch.float32:
        pipeline.transformer.to(dtype)
    if options.solver is not None:
        kind = getattr(pipeline.scheduler.config, "prediction_type", None)
        flow = kind == "flow_prediction" or type(pipeline.scheduler).__name__ == SOLVERS["flow-euler"]
        if flow != (options.solver in FLOW_SOLVERS) and (flow or options.solver == "flow-euler"):
            expected = ", ".join(FLOW_SOLVERS) if flow else ", ".join(sorted(set(SOLVERS) - {"flow-euler"}))
            raise ConfigError("--solver", found=options.solver, expected=f"one that fits this model: {expected}")
        extra = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if flow else {}
        if options.solver == "flow-euler":
            extra = {}
        solver = getattr(diffusers, SOLVERS[options.solver])
        pipeline.scheduler = solver.from_config(pipeline.scheduler.config, **extra)
    return pipeline.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _labels(options: argparse.Namespace, pipeline: Any) -> list[int] | None:
    """Every asked label `per_label` times; checked before anything runs."""
    from acdit.errors import ConfigError

    classes = pipeline.transformer.config.num_classes
    if classes is None:
        if options.labels:
            raise ConfigError("--labels", found=" ".join(options.labels), expected="none: this model is unconditional")
        return None
    asked = options.labels or [f"0-{min(classes, 10) - 1}"]
    indices: list[int] = []
    for text in asked:
        span = re.fullmatch(r"(\d+)-(\d+)", text)
        if span:
            indices += range(int(span[1]), int(span[2]) + 1)
        elif re.fullmatch(r"-?\d+", text):
            indices.append(int(text))
        else:
            indices += pipeline.get_label_ids(text)
    wrong = [index for index in indices if not 0 <= index < classes]
    if wrong:
        raise ConfigError("--labels", found=str(wrong[0]), expected=f"0 … {classes - 1}, the classes of this model")
    return [index for index in indices for _ in range(options.per_label)]


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
    from PIL import Image, UnidentifiedImageError

    grid = pipeline.transformer.config.grid
    from acdit.codecs import spatial_factor

    factor = spatial_factor(pipeline.vae) if pipeline.vae is not None else 1
    channels = pipeline.transformer.config.in_channels if pipeline.vae is None else pipeline.vae.config.in_channels
    gray = channels == 1
    try:
        with Image.open(options.prefix_image) as file:
            picture = file.convert("L" if gray else "RGB").resize((grid[1] * factor, grid[0] * factor))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{options.prefix_image}", found=str(error), expected="a picture") from None
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    return (values[None] if gray else values.permute(2, 0, 1))[None]
