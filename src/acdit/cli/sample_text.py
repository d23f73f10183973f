"""acdit sample, of a model of text: to the terminal, block by block with --stream, and into files with --output."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from acdit.cli.models import averaging_of, load_text_pipeline
from acdit.cli.parser import finite, positive

TEXT_ONLY = ("prompt_file", "max_new_tokens", "temperature", "top_p", "sampler", "threshold", "ignore_eos")
# Of pictures and clips: texts have no use for them.
_OTHERS = (
    "count", "prefix_image", "prefix_blocks", "npz", "png", "format", "prompt_blocks", "switch", "window", "sinks",
    "blocks", "resume",
)  # fmt: skip
_SAMPLERS = {"first-hitting": "first_hitting", "ancestral": "ancestral", "confidence": "confidence"}
_USUAL_STEPS = 25


def add_text_options(made: argparse.ArgumentParser) -> None:
    """Declare what only models of text have a use for; --prompt, --stream, --steps and --num-samples serve them too."""
    group = made.add_argument_group("models of text (--prompt TEXT, --steps of ancestral, --stream, --num-samples)")
    group.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with the text to go on from")
    group.add_argument("--max-new-tokens", type=positive, metavar="N", help="default: to the end of the context")
    group.add_argument("--temperature", type=finite, help="0 takes the likeliest (default 1)")
    group.add_argument("--top-p", type=finite, help="nucleus: the likeliest tokens of this probability (default 1)")
    group.add_argument(
        "--sampler", choices=tuple(_SAMPLERS), help="how the tokens of a block are revealed (default first-hitting)"
    )
    group.add_argument("--threshold", type=finite, help="confidence: reveal at once what is surer (default 0.9)")
    group.add_argument("--ignore-eos", action="store_true", help="go on behind an end of text")


def require_no_text_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for a model of pictures or clips asked for what only text has."""
    from acdit.errors import ConfigError

    for name in TEXT_ONLY:
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')}", found="no model of text", expected="a model of text")


def sample_texts(options: argparse.Namespace) -> None:
    """Write texts; with --output also 00000-seed-S.txt, … and settings.json."""
    from acdit import provenance, storage
    from acdit.errors import ConfigError

    _require_fitting(options)
    pipeline = load_text_pipeline(options)
    if pipeline.tokenizer is None:
        raise ConfigError(
            f"model {options.model}", found="no tokenizer in it", expected="its tokenizer/ folder",
            fix="ACDiTTextPipeline of Python writes token ids without one",
        )  # fmt: skip
    prompt, count = _prompt(options), options.num_samples or 1
    settings = {
        "sampler": _SAMPLERS[options.sampler or "first-hitting"],
        "num_inference_steps": options.steps,
        "threshold": 0.9 if options.threshold is None else options.threshold,
        "temperature": 1.0 if options.temperature is None else options.temperature,
        "top_p": 1.0 if options.top_p is None else options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "eos_token": -1 if options.ignore_eos else None,
    }
    output = None if options.output is None else Path(options.output)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    at_once = 1 if options.stream else options.batch_size
    for start in range(0, count, at_once):
        rows = min(at_once, count - start)
        given = {"prompts": prompt, "batch_size": rows, "generator": options.seed + start, **settings}
        texts = _streamed(pipeline, given) if options.stream else pipeline(**given).texts
        for index, text in enumerate(texts, start):
            if not options.stream:
                print(text)
            if index + 1 < count:
                print("\n----\n")
            if output is not None:
                (output / f"{index:05d}-seed-{options.seed + index}.txt").write_text(text, encoding="utf-8")
    if output is None:
        return
    record = {
        "model": options.model, "prompt": prompt, "num_samples": count, "seed": options.seed, **settings,
        "dtype": options.dtype, "ema": averaging_of(options.model), **provenance.facts(),
    }  # fmt: skip
    storage.write_json_atomic(output / "settings.json", record)
    print(f"{count} texts in {output}", file=sys.stderr)


def _streamed(pipeline: Any, given: dict[str, Any]) -> list[str]:
    """One text, shown block by block."""
    text = ""
    for (new,) in pipeline.stream(**given):
        print(new, end="", flush=True)
        text += new
    print()
    return [text]


def _require_fitting(options: argparse.Namespace) -> None:
    from acdit.errors import ConfigError

    for name in _OTHERS:
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')}", found="a model of text", expected="one of pictures")
    for name in ("per_label", "futures"):
        if getattr(options, name) != 1:
            raise ConfigError(f"--{name.replace('_', '-')}", found="a model of text", expected="--num-samples")
    if options.prompt is not None and options.prompt_file is not None:
        raise ConfigError("--prompt, --prompt-file", found="both", expected="one of the two")
    sampler = options.sampler or "first-hitting"
    for name, needed, unset in (("threshold", "confidence", None), ("steps", "ancestral", _USUAL_STEPS)):
        if getattr(options, name) != unset and sampler != needed:
            raise ConfigError(f"--{name}", found=f"--sampler {sampler}", expected=f"--sampler {needed}")


def _prompt(options: argparse.Namespace) -> str | None:
    from acdit.errors import DataError

    if options.prompt_file is None:
        return options.prompt or None
    try:
        return Path(options.prompt_file).read_text(encoding="utf-8") or None
    except (OSError, UnicodeDecodeError) as error:
        reason = "bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise DataError(f"--prompt-file {options.prompt_file}", found=reason, expected="a text in UTF-8") from None
