"""The command line: acdit train · sample · convert · demo · recipes.

Heavy imports happen inside the commands, so that help is instant.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_CODES = """exit codes:
  0  done                           4  NaN or infinite loss or gradient
  2  wrong recipe or option         5  storage: no room, damaged or missing checkpoint
  3  wrong or missing input data    6  another process of the run is gone
  130, 143  interrupted or terminated; a training run has saved first"""

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None: the process's own.

    Returns:
        The exit code; see `EXIT_CODES`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parsed([_dashes(argument) for argument in given])
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    if options.debug:
        return int(options.run(options) or 0)
    return _guarded(options)


def _guarded(options: argparse.Namespace) -> int:
    """Run the command; a user's mistake or a fault outside becomes one line and an exit code."""
    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError as error:
        return _fail(_out_of_memory(str(error)), 1)
    except Exception as error:
        from acdit.errors import AcditError

        if isinstance(error, AcditError):
            return _fail(str(error), error.exit_code)
        text = str(error)
        if type(error).__name__ == "OutOfMemoryError" or re.search(r"can't allocate memory|out of memory", text, re.I):
            return _fail(_out_of_memory(text), 1)
        return _fail(f"{type(error).__name__}: {text} (this looks like a bug; --debug shows where)", 1)


def _fail(message: str, code: int) -> int:
    print(f"acdit: error: {message}", file=sys.stderr)
    return code


def _out_of_memory(detail: str) -> str:
    first = detail.strip().splitlines()[0] if detail.strip() else "no detail"
    return (
        f"out of memory ({first[:120]}). Fix: a smaller optim.batch_size, a larger optim.accumulation (same result, "
        "less memory), or train.gradient_checkpointing=elementwise (or layers: least memory, a forward more)"
    )


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; recipe overrides (key.key=value) may stand anywhere, where argparse wants positionals together."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    overrides: list[str] | None = getattr(options, "overrides", None)
    if overrides is not None:
        if "=" in (getattr(options, "resume", None) or ""):  # `--resume train.steps=9`: latest, and an override
            overrides.append(options.resume)
            options.resume = "latest"
        overrides += [argument for argument in left if "=" in argument and not argument.startswith("-")]
        left = [argument for argument in left if argument not in overrides]
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return options


def _dashes(argument: str) -> str:
    """`--guidance_scale` and `--guidance-scale` are one flag."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--verbose", action="store_true", help="log what is chosen and done")
    parser = argparse.ArgumentParser(
        prog="acdit",
        description="Blockwise autoregressive diffusion transformers (ACDiT).",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"acdit {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, parents=[common], help=summary, description=summary, epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(run=run)
        return made

    train = command("train", _train, "Train from a recipe.", "acdit train digits optim.lr=1e-3 --output runs/digits")
    train.add_argument("recipe", help="a shipped recipe's name (see `acdit recipes`) or a YAML path")
    train.add_argument("overrides", nargs="*", metavar="key.key=value", help="change recipe fields")
    train.add_argument("--output", help="the run's directory (default: runs/<recipe's name>)")
    train.add_argument(
        "--resume", nargs="?", const="latest", metavar="CHECKPOINT",
        help="go on exactly where the run stopped; checkpoint-N picks one, default the latest that is whole",
    )  # fmt: skip
    train.add_argument(
        "--from", dest="branch_from", metavar="RUN/checkpoint-N",
        help="start from another run's checkpoint with this recipe's schedule (the WSD decay, for instance)",
    )  # fmt: skip
    train.add_argument("--allow-inexact", action="store_true", help="resume even without generator states")

    sample = command(
        "sample", _sample, "Draw pictures with a trained model.",
        "acdit sample runs/demo/model --labels 0 1 2 3 --steps 25 --guidance-scale 1.5 --seed 0 --output out/",
    )  # fmt: skip
    sample.add_argument("model", help="folder of a saved pipeline, or a hub id")
    sample.add_argument("--labels", nargs="+", metavar="LABEL", help="class indices, ranges (0-9) or class names")
    sample.add_argument("--per-label", type=_positive, default=1, help="pictures a label (default 1)")
    sample.add_argument("--count", type=_positive, help="pictures of an unconditional model (default 1)")
    sample.add_argument("--steps", type=_positive, default=25, help="solver steps a block (default 25)")
    sample.add_argument("--guidance-scale", type=float, default=1.5, help="1 is off (default 1.5)")
    sample.add_argument("--solver", choices=sorted(SOLVERS), help="default: the one saved with the model")
    sample.add_argument("--seed", type=int, default=0, help="picture i gets seed + i (default 0)")
    sample.add_argument("--batch-size", type=_positive, default=64, help="pictures at once (default 64)")
    sample.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default fp32)")
    sample.add_argument("--device", help="default: cuda where there is one")
    sample.add_argument("--prefix-image", metavar="FILE", help="a picture whose first blocks are kept")
    sample.add_argument("--prefix-blocks", type=_positive, help="how many of them")
    sample.add_argument("--output", default="out", help="folder for PNGs, grid.png and settings.json (default out)")

    convert = command(
        "convert", _convert, "Convert a released checkpoint of the reference (thunlp/ACDiT) to a model folder.",
        "acdit convert ACDiT-XL-img.pt models/acdit-xl-img",
    )  # fmt: skip
    convert.add_argument("checkpoint", help="the .pt file; no code in it is executed")
    convert.add_argument("output", help="the folder to make")

    demo = command(
        "demo", _demo, "Train on the built-in digits and look at the result.", "acdit demo --output runs/demo"
    )
    demo.add_argument("overrides", nargs="*", metavar="key.key=value", help="change fields of the recipe `digits`")
    demo.add_argument("--output", default="runs/demo", help="default runs/demo")
    demo.add_argument("--seed", type=int, default=0)

    command("recipes", _recipes, "List the shipped recipes.", "acdit recipes")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _version() -> str:
    from acdit import __version__

    return __version__


# --- commands ----------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    from acdit.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # before torch: a typo answers at once
    from acdit.training import Trainer

    output = Path(options.output or f"runs/{recipe.name}")
    Trainer(
        recipe,
        output,
        resume=options.resume,
        branch_from=options.branch_from,
        allow_inexact=options.allow_inexact,
    ).train()
    print(f"done: {output / 'model'} (look at {output / 'loss.png'}; sample with: acdit sample {output / 'model'})")


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
    settings |= {"labels": labels, "solver": type(pipeline.scheduler).__name__, "acdit": _version()}
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
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1) if pipeline.vae is not None else 1
    gray = pipeline.vae is None and pipeline.transformer.config.in_channels == 1
    try:
        with Image.open(options.prefix_image) as file:
            picture = file.convert("L" if gray else "RGB").resize((grid[1] * factor, grid[0] * factor))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{options.prefix_image}", found=str(error), expected="a picture") from None
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    return (values[None] if gray else values.permute(2, 0, 1))[None]


def _convert(options: argparse.Namespace) -> None:
    from acdit.convert import convert_reference

    convert_reference(options.checkpoint, options.output)
    print(f"done: {options.output}")


def _demo(options: argparse.Namespace) -> None:
    from acdit.demo import run_demo

    run_demo(options.output, seed=options.seed, overrides=options.overrides)


def _recipes(options: argparse.Namespace) -> None:
    from acdit.recipe import shipped_recipes

    print("\n".join(shipped_recipes()))


if __name__ == "__main__":
    sys.exit(main())
