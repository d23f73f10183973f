"""acdit evaluate"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from acdit.cli.clips import add_clip_options, asked_cut, require_samples_of
from acdit.cli.evaluate_classifier import evaluate_classifier
from acdit.cli.evaluate_text import add_text_options, evaluate_text, require_no_text_options
from acdit.cli.generated_text import evaluate_generated
from acdit.cli.models import add_sampling_options, asked_labels, averaging_of, is_text_model, load_pipeline
from acdit.cli.parser import AddCommand, positive

_RECORDED = (
    "seed",
    "solver",
    "num_inference_steps",
    "guidance_scale",
    "labels",
    "dtype",
    "block",
    "model",
    "model_sha256",
    "ema",
)


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "evaluate", _evaluate,
        "FID, sFID, Inception Score, precision and recall of pictures, or of a model's samples; FVD and distances over "
        "time of clips (--frames, or --extractor i3d); the perplexity of a model of text; a classifier's accuracy.",
        "acdit evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --extractor inception "
        "--weights inception-2015-12-05.pt --output metrics.json\n"
        "  acdit evaluate runs/demo/model --reference digits:held_out --extractor digits-classifier --num-samples 500\n"
        "  acdit evaluate runs/b4/model runs/b8/model --reference REF --extractor pixels --sweep steps=5,10,25\n"
        "  acdit evaluate clips/ --reference real_clips/ --extractor i3d --weights i3d_torchscript.pt --frames 16\n"
        "  acdit evaluate runs/text/model data.split=held_out --draws 16\n"
        "  acdit evaluate texts/ --language-model gpt2-large/\n"
        "  acdit evaluate runs/finetune-mnist/model --classification data.split=test\n"
        "  acdit evaluate --self-test",
    )  # fmt: skip
    made.add_argument(
        "samples", nargs="*",
        help="folder or zip of pictures, .npz with arr_0, or a model's folder; clips: folder of videos, folder of "
        "folders of frames, .npz, or a video model; with --sweep several models, of other block sizes for instance",
    )  # fmt: skip
    made.add_argument(
        "--reference", "--data", metavar="REF",
        help="folder or zip of pictures, digits:train, digits:held_out, or ADM's .npz (arr_0, or mu, sigma, …); clips "
        "as in SAMPLES; for a model of text, or a classifier: a recipe",
    )  # fmt: skip
    made.add_argument(
        "--extractor", help="inception, classifier, digits-classifier, pixels, i3d (of clips), or module:factory"
    )
    made.add_argument(
        "--weights", metavar="FILE", help="of Inception or I3D (a state dict or TorchScript), or of a classifier"
    )
    made.add_argument(
        "--preprocessing", choices=("pytorch-fid", "tensorflow", "stylegan-v", "center-crop"),
        help="resize and scaling before Inception (the first two) or I3D (the last three)",
    )  # fmt: skip
    add_clip_options(made)
    made.add_argument("--output", default="metrics.json", metavar="FILE", help="the result file (default metrics.json)")
    made.add_argument("--work", metavar="DIR", help="where parts are kept for a second start (default: <output>.work)")
    made.add_argument("--size", type=positive, help="resize and crop reference pictures that are files, as ADM does")
    made.add_argument(
        "--num-samples", type=positive, help="of a model: how many to draw (default 50000, clips 2048); else: use only"
    )
    made.add_argument("--chunk-size", type=positive, default=500, help="pictures a kept part (default 500)")
    made.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V,V",
        help="of a model: guidance_scale=1.0,1.5 or num_inference_steps=10,25; twice, or over several models: a grid; "
        "draws a plot as well",
    )  # fmt: skip
    made.add_argument(
        "--classification", action="store_true",
        help="top-1 and top-5 accuracy of a model that acdit finetune left; behind it data.key=value (default: the "
        "run's own data, on its validation split)",
    )  # fmt: skip
    made.add_argument("--self-test", action="store_true", help="is the evaluation sane? On the built-in digits")
    add_sampling_options(made)
    add_text_options(made)
    made.set_defaults(overrides=())


def _evaluate(options: argparse.Namespace) -> None:
    from acdit.errors import ConfigError
    from acdit.evaluation.extractors import ExtractorOptions, build_extractor
    from acdit.evaluation.sweep import parse_axes, require_matplotlib
    from acdit.processes import joined_processes

    if options.classification:
        evaluate_classifier(options)
        return
    if options.language_model is not None:
        evaluate_generated(options)
        return
    if options.samples and is_text_model(options.samples[0]):
        evaluate_text(options)
        return
    require_no_text_options(options)
    if options.overrides:
        raise ConfigError("SAMPLES", found=options.overrides[0], expected="no key=value: only of a model of text")
    axes = parse_axes(options.sweep)
    if axes:
        require_matplotlib()
    if len(options.samples) > 1 and len(axes) != 1:
        raise ConfigError(
            "SAMPLES", found=f"{len(options.samples)} of them with {len(axes)} settings to sweep",
            expected="several models with one --sweep, or one",
        )  # fmt: skip
    if not options.self_test:
        for what, value in (("SAMPLES", options.samples), ("--reference", options.reference)):
            if not value:
                raise ConfigError(what, found="nothing", expected="what to measure, and what to compare it with")
    name = options.extractor or ("digits-classifier" if options.self_test else None)
    if name is None:
        raise ConfigError(
            "--extractor", found="nothing",
            expected="inception or classifier (with --weights), digits-classifier, pixels, …",
            fix="a figure means something only together with its extractor",
        )  # fmt: skip
    with joined_processes() as processes:
        extractor = build_extractor(name, ExtractorOptions(options.weights, options.preprocessing))
        if options.self_test:
            if processes.is_first:
                _self_test(options, extractor, processes)
            return
        _measure(options, axes, extractor, processes)


def _measure(options: argparse.Namespace, axes: list[Any], extractor: Any, processes: Any) -> None:
    from acdit import provenance, storage
    from acdit.errors import ConfigError
    from acdit.evaluation.clip_measure import CLIP_PROTOCOL, ClipEvaluator
    from acdit.evaluation.clip_sets import open_clips
    from acdit.evaluation.image_sets import open_images
    from acdit.evaluation.measure import PROTOCOL, Evaluator
    from acdit.evaluation.reference import open_reference

    started = time.perf_counter()
    output = Path(options.output)
    work = Path(options.work) if options.work else output.with_name(output.name + ".work")
    cut = asked_cut(options, extractor)
    evaluator = Evaluator(
        extractor, open_reference(options.reference, extractor.channels, options.size, cut), work,
        batch_size=options.batch_size, chunk_size=options.chunk_size, processes=processes,
        device=processes.device(options.device),
    )  # fmt: skip
    measure: Any = evaluator.measure if cut is None else ClipEvaluator(evaluator, options.span or 1).measure
    models = [where for where in options.samples if _is_model(where)]
    if models and len(models) == len(options.samples):
        results = [row for model in models for row in _measure_model(options, model, axes, evaluator, measure, cut)]
    elif axes:
        other = next(where for where in options.samples if where not in models)
        raise ConfigError("--sweep", found=f"{other}, which is no model", expected="a model's folder")
    else:
        where, channels = options.samples[0], extractor.channels
        samples = open_images(where, channels) if cut is None else open_clips(where, cut, channels)
        results = [{**measure(samples, options.num_samples), **_recorded(samples.settings or {})}]
    if not processes.is_first:
        return
    common = {
        "samples": options.samples[0] if len(options.samples) == 1 else options.samples,
        "reference": evaluator.reference.describe(),
        "extractor": extractor.describe(),
        "protocol": PROTOCOL if cut is None else CLIP_PROTOCOL,
        **provenance.facts(),
        "processes": processes.size,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if not axes:
        storage.write_json_atomic(output, {**results[0], **common})
        print(_summary(results[0]) + f"; see {output} (parts in {work} may be removed)")
        return
    _tell_sweep(axes, models, results, common, output)
    print(f"(parts in {work} may be removed)")


def _tell_sweep(
    axes: list[Any], models: list[str], results: list[dict[str, Any]], common: dict[str, Any], output: Path
) -> None:
    """File, plot and a line a point."""
    from acdit import storage
    from acdit.evaluation.sweep import plot_sweep, series_names

    swept = {axis.key: list(axis.values) for axis in axes}
    storage.write_json_atomic(output, {"sweep": swept, "results": results, **common})
    if len(models) > 1:
        a_model = len(results) // len(models)  # rows lie model after model
        lines = [
            name for name in series_names(models, [row["block"] for row in results[::a_model]]) for _ in range(a_model)
        ]
        title = f"{len(models)} models"
    else:
        lines = [", ".join(f"{axis.key} {row[axis.key]:g}" for axis in axes[1:]) for row in results]
        title = Path(models[0]).name
    plot = output.with_suffix(".png")
    extractor, count = common["extractor"]["name"], results[0]["num_samples"]
    plot_sweep(axes[0].key, results, lines, f"{title}, {extractor}, {count} samples", plot)
    for row, line in zip(results, lines, strict=True):
        told = [line] * (len(models) > 1) + [f"{axis.key} {row[axis.key]:g}" for axis in axes]
        print(", ".join(told) + ": " + _summary(row))
    print(f"see {output} and {plot}")


def _measure_model(
    options: argparse.Namespace, model: str, axes: list[Any], evaluator: Any, measure: Any, cut: Any
) -> list[dict[str, Any]]:
    from acdit.evaluation.clip_sets import stored_clips
    from acdit.evaluation.image_sets import stored_images
    from acdit.evaluation.sweep import combinations
    from acdit.generation import SamplingSettings, describe_sampling, generate

    options.model = model
    processes = evaluator.processes
    pipeline = load_pipeline(options, processes.device(options.device))
    require_samples_of(pipeline, cut)
    labels = asked_labels(options, pipeline, default="all")
    plain = SamplingSettings(
        options.steps, options.guidance_scale, options.seed, None if labels is None else tuple(labels)
    )
    averaging = averaging_of(model)
    block = list(pipeline.transformer.layout.block)
    results = []
    for point in combinations(axes):
        settings = dataclasses.replace(plain, **point)  # type: ignore[arg-type]  # a key has its field's type
        description = describe_sampling(pipeline, settings)
        key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
        store = generate(
            pipeline, settings, evaluator.work / f"samples-{key}",
            options.num_samples or (50_000 if cut is None else 2048), batch_size=options.batch_size,
            chunk_size=options.chunk_size, processes=processes,
        )  # fmt: skip
        channels = evaluator.extractor.channels
        figures = measure(stored_images(store, channels) if cut is None else stored_clips(store, cut, channels))
        recorded = _recorded({**description, "model": model, "ema": averaging, "block": block})
        results.append({**figures, **recorded, **point})
    return results


def _self_test(options: argparse.Namespace, extractor: Any, processes: Any) -> None:
    from acdit import provenance, storage
    from acdit.evaluation.self_test import self_test

    with tempfile.TemporaryDirectory() as work:
        result = self_test(extractor, work, processes.device(options.device))
    print(f"real against real        {_summary(result['real_against_real'])}")
    print(f"held-out against real    {_summary(result['held_out_against_real'])}")
    for row in result["noise"]:
        print(f"noise {row['level']:<5g}              {_summary(row)}")
    storage.write_json_atomic(options.output, {**result, "extractor": extractor.describe(), **provenance.facts()})
    print(f"sane: zero at no noise, growing with it; see {options.output}")


def _is_model(samples: str) -> bool:
    path = Path(samples)
    if (path / "model_index.json").is_file():
        return True
    return not path.exists() and not samples.startswith("digits:") and path.suffix.lower() not in (".npz", ".zip")


def _recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """How the samples were drawn; null where nothing beside them tells."""
    if "steps" in settings:  # `acdit sample` of a few pictures
        settings = {**settings, "num_inference_steps": settings["steps"]}
    return {name: settings.get(name) for name in _RECORDED}


def _summary(figures: dict[str, Any]) -> str:
    names = {
        "fid": "FID", "sfid": "sFID", "inception_score": "IS", "fvd": "FVD", "frame_frechet": "frame-wise Fréchet",
        "precision": "precision", "recall": "recall",
    }  # fmt: skip
    told = [f"{text} {figures[name]:.4g}" for name, text in names.items() if figures.get(name) is not None]
    over_time = figures.get("frame_frechet_over_time") or []
    if len(over_time) > 1:
        told.append(f"over time {over_time[0]:.4g} … {over_time[-1]:.4g}")
    return ", ".join(told) + f" ({figures['num_samples']} samples)"
