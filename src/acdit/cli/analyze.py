"""acdit analyze: figures as JSON and as pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from acdit.cli.parser import AddCommand, adder, finite, positive, seed
from acdit.cli.plan import share

_SUBJECT = "a model's folder, a shipped recipe's name (see `acdit recipes`) or a YAML path"


def add(command: AddCommand) -> None:
    """Declare the command, its verbs and their options."""
    made = command(
        "analyze", None, "What blocks cost and what they are worth, as JSON and pictures.",
        "acdit analyze flops imagenet256-b\n  acdit analyze mask digits --copies 2",
    )  # fmt: skip
    verbs = adder(made.add_subparsers(dest="verb", required=True, metavar="what"), nested=True)
    _add_flops(verbs)
    _add_memory(verbs)
    _add_mask(verbs)
    _add_loss(verbs)
    _add_tradeoff(verbs)
    _add_scaling(verbs)


def _add_flops(command: AddCommand) -> None:
    made = command(
        "flops", _flops,
        "FLOPs of a sample and of a training step: closed forms beside torch's counter, part by part, and what blocks "
        "save. Nothing is computed: models of any size are counted.",
        "acdit analyze flops imagenet256-b --output flops.json",
    )  # fmt: skip
    _subject(made, "flops.json")
    made.add_argument("--steps", type=positive, help="model calls a block (default: the recipe's, 25; of text L)")


def _add_memory(command: AddCommand) -> None:
    made = command(
        "memory", _memory,
        "Memory of training and sampling against block size: closed forms beside what torch's CPU allocator hands out "
        "(a step and a sample in fp32, with random weights).",
        "acdit analyze memory digits --micro-batch 4",
    )  # fmt: skip
    _subject(made, "memory.json")
    made.add_argument("--micro-batch", type=positive, default=1, help="samples at once (default 1)")
    made.add_argument("--no-measure", action="store_true", help="closed forms only: for models that do not fit here")


def _add_mask(command: AddCommand) -> None:
    made = command(
        "mask", _mask, "The attention mask of a layout as a picture: rows are queries, columns keys.",
        "acdit analyze mask imagenet256-b --output mask.png\n"
        "  acdit analyze mask --grid 8 4 4 --block 1 4 4 --window 2 --sinks 1 --copies 2",
    )  # fmt: skip
    made.add_argument("subject", nargs="?", metavar="MODEL|RECIPE", help=_SUBJECT)
    made.add_argument("overrides", nargs="*", metavar="key.key=value", help="change recipe fields")
    made.add_argument("--grid", type=positive, nargs="+", help="without MODEL: cells per axis")
    made.add_argument("--block", type=positive, nargs="+", help="without MODEL: tokens per axis of a block")
    made.add_argument("--patch", type=positive, nargs="+", help="without MODEL: cells per axis of a token (default 1)")
    made.add_argument("--window", type=positive, help="without MODEL: clean blocks that are seen (default all)")
    made.add_argument("--sinks", type=int, default=0, help="without MODEL: blocks at the beginning that stay in sight")
    made.add_argument("--copies", type=positive, default=1, help="noisy copies that share the clean blocks (default 1)")
    made.add_argument("--unit", choices=("token", "block"), help="of a cell (default: tokens where they can be seen)")
    made.add_argument("--output", default="mask.png", metavar="FILE", help="the PNG; a JSON lies beside it")


def _add_loss(command: AddCommand) -> None:
    made = command(
        "loss", _loss,
        "Which blocks are hard: the loss of each block over timesteps on a split of the data, and the variational "
        "bound of the likelihood in bits a dimension, of the whole and of each block.",
        "acdit analyze loss runs/demo/model data.split=held_out",
    )  # fmt: skip
    made.add_argument("model", help="the folder of a saved pipeline, of pictures, clips or latents")
    made.add_argument("overrides", nargs="*", metavar="data.key=value", help="what to measure on: data.split=…")
    made.add_argument("--data", metavar="RECIPE", help="whose data and corruption (default: recipe.yaml by the model)")
    made.add_argument(
        "--labels", choices=("data", "none"), default="data",
        help="of a model with classes: the data's (a bound given the label), or none (default data)",
    )  # fmt: skip
    made.add_argument(
        "--variance", choices=("large", "small"), default="large",
        help="of the ancestral steps: β (large) or the posterior's (small); default large, the tighter bound",
    )  # fmt: skip
    made.add_argument("--clip", action="store_true", help="clip predicted pixels to their range, as DDPM's evaluation")
    made.add_argument("--timesteps", type=positive, default=8, help="of a draw of the bound (default 8)")
    made.add_argument(
        "--draws", type=positive, default=4, help="of the bound, a sample; from 2 on an interval (default 4)"
    )
    made.add_argument("--points", type=positive, default=20, help="timesteps of the curve (default 20)")
    made.add_argument("--num-samples", type=positive, help="how many (default: the whole split)")
    made.add_argument("--batch-size", type=positive, default=64, help="samples at once (default 64)")
    made.add_argument("--seed", type=seed, default=0, help="of timesteps and noise (default 0)")
    made.add_argument("--device", help="default: cuda where there is one")
    made.add_argument("--output", default="loss.json", metavar="FILE", help="a PNG lies beside it (default loss.json)")


def _add_tradeoff(command: AddCommand) -> None:
    made = command(
        "tradeoff", _tradeoff,
        "Time and memory of sampling against AR length, measured on this machine beside what FLOPs and closed forms "
        "predict. Kept after every measurement: the same command goes on where it was stopped.",
        "acdit analyze tradeoff imagenet256-b model.num_layers=2 --steps 2 --blocks 32x32 16x16 8x8",
    )  # fmt: skip
    _subject(made, "tradeoff.json")
    made.add_argument(
        "--steps", type=positive, default=2, help="solver steps a block, measured and predicted (default 2)"
    )
    made.add_argument("--batch-size", type=positive, default=1, help="samples at once (default 1)")
    made.add_argument("--rounds", type=positive, default=3, help="measurements a size (default 3)")
    made.add_argument("--minutes", type=finite, default=30.0, help="no measurement is begun after so many (default 30)")
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def _add_scaling(command: AddCommand) -> None:
    made = command(
        "scaling", _scaling, "Loss over model size, of finished runs of the same data and corruption.",
        "acdit analyze scaling runs/s runs/m runs/l\n"
        "  acdit analyze scaling runs/s runs/m runs/l --metrics loss.json --key bound.bits_per_dim",
    )  # fmt: skip
    made.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, with recipe.yaml, log.jsonl and model/")
    made.add_argument("--metrics", metavar="NAME", help="a JSON in each run's folder (default: log.jsonl's loss)")
    made.add_argument("--key", default="bound.bits_per_dim", help="of the figure in it (default bound.bits_per_dim)")
    made.add_argument(
        "--tail", type=share, default=0.1, help="share of the steps at the end that the log's loss is averaged over "
        "(default 0.1)",
    )  # fmt: skip
    made.add_argument("--output", default="scaling.json", metavar="FILE", help="a PNG lies beside it")


def _subject(made: argparse.ArgumentParser, output: str) -> None:
    made.add_argument("subject", metavar="MODEL|RECIPE", help=_SUBJECT)
    made.add_argument("overrides", nargs="*", metavar="key.key=value", help="change recipe fields")
    made.add_argument(
        "--blocks", nargs="+", default=[], metavar="SIZE",
        help="block sizes to compare, like 16x16 8x8 (default: from the whole grid down)",
    )  # fmt: skip
    made.add_argument("--no-guidance", action="store_true", help="one branch (default: two where there are labels)")
    made.add_argument("--output", default=output, metavar="FILE", help=f"a PNG lies beside it (default {output})")


def _loaded(options: argparse.Namespace) -> tuple[Any, list[tuple[int, ...]], Path]:
    """The subject, its block sizes and the result's place; refuses first what would fail last."""
    from acdit.analysis.subject import block_family, load_subject, parse_blocks
    from acdit.evaluation.sweep import require_matplotlib

    require_matplotlib(f"acdit analyze {options.verb}")
    output = require_suffix(options.output, ".json")
    subject = load_subject(options.subject, options.overrides)
    return subject, parse_blocks(options.blocks, subject.layout) or block_family(subject.layout), output


def require_suffix(output: str, suffix: str) -> Path:
    """The place of a result, whose picture or figures go beside it under the same name.

    Raises:
        ConfigError: another ending.
    """
    from acdit.errors import ConfigError

    path = Path(output)
    if path.suffix != suffix:
        raise ConfigError("--output", found=output, expected=f"a name that ends in {suffix}")
    return path


def write_figures(output: Path, figures: dict[str, Any]) -> None:
    """The result file, with where its figures come from."""
    from acdit import provenance, storage

    storage.write_figures(output, {**figures, **provenance.facts()})


def _flops(options: argparse.Namespace) -> None:
    from acdit.analysis.cost import flops_figures
    from acdit.analysis.plots import plot_flops

    subject, blocks, output = _loaded(options)
    steps, guided = subject.sampling(options.steps, not options.no_guidance)
    figures = flops_figures(subject, steps=steps, guided=guided, blocks=blocks)
    write_figures(output, {**subject.describe(), **figures})
    plot_flops(figures, output.with_suffix(".png"), f"{subject.name}, {steps} steps a block")
    for name, what in (("sampling", "a sample"), ("training_forward", "a training forward")):
        closed, counted, apart = (figures[name][key] for key in ("closed", "counted", "apart"))
        told = f"counted {counted['total']:.4g}, {_apart(apart)}" if counted else "not counted: too many blocks"
        print(f"{what}: {closed['total']:.4g} in closed form, {told}")
    step = figures["training_step"]
    print(f"a training step: {step['closed']:.4g} in closed form, counted {step['counted']:.4g} ({step['apart']:+.2%})")
    own = next((row for row in figures["saving"] if row["block"] == list(subject.layout.block)), None)
    if own is not None:
        print(f"blocks save {own['everything']['closed']:.1%} of a sample's FLOPs against one block")
    print(f"see {output} and {output.with_suffix('.png')}")


def _apart(parts: dict[str, float]) -> str:
    worst = max((name for name in parts if name != "total"), key=lambda name: abs(parts[name]))
    return f"{parts['total']:+.2%}; the worst part is {worst}, {parts[worst]:+.2%}"


def _memory(options: argparse.Namespace) -> None:
    from acdit.analysis.cost import memory_figures
    from acdit.analysis.plots import plot_memory
    from acdit.errors import ConfigError

    subject, blocks, output = _loaded(options)
    _, guided = subject.sampling(None, not options.no_guidance)
    if not options.no_measure and subject.config.get("vocab_size") is not None:
        raise ConfigError("MODEL", found="a model of text", expected="--no-measure: only pictures and clips are run")
    figures = memory_figures(
        subject, micro_batch=options.micro_batch, guided=guided, blocks=blocks, measure=not options.no_measure
    )
    write_figures(output, {**subject.describe(), **figures})
    plot_memory(figures, output.with_suffix(".png"), f"{subject.name}, fp32, {options.micro_batch} at once")
    for row in figures["by_block"]:
        size = "×".join(map(str, row["block"]))
        print(f"block {size}: " + ", ".join(
            f"{what} {row[name]['closed'] / 2**20:.1f} MiB"
            + ("" if row[name]["measured"] is None else f" (measured {row[name]['apart']:+.1%})")
            for name, what in (("activations", "activations"), ("sampling_peak", "sampling beside weights"))
        ))  # fmt: skip
    print(f"see {output} and {output.with_suffix('.png')}")


def _mask(options: argparse.Namespace) -> None:
    from acdit import storage
    from acdit.analysis.mask_picture import mask_picture
    from acdit.analysis.subject import load_subject
    from acdit.errors import ConfigError
    from acdit.layout import BlockLayout
    from acdit.mask import Streams, dense_mask, make_window

    output = require_suffix(options.output, ".png")
    given = [name for name in ("grid", "block", "patch", "window") if getattr(options, name) is not None]
    if options.subject is not None:
        if given or options.sinks:
            name = (given or ["sinks"])[0]
            raise ConfigError(f"--{name}", found="with MODEL|RECIPE", expected="a layout of its own, or a model's")
        arch = load_subject(options.subject, options.overrides).architecture
        layout, window = arch.layout, arch.window
    else:
        if options.grid is None or options.block is None:
            raise ConfigError("MODEL|RECIPE", found="nothing", expected="one, or --grid and --block")
        layout = BlockLayout(options.grid, options.block, options.patch or 1)
        window = make_window(options.window, options.sinks, "true", can_turn=True)
    streams = Streams(layout.num_blocks - 1, layout.num_blocks, options.copies, layout.block_tokens, window)
    picture = mask_picture(streams, unit=options.unit)
    with storage.atomic_file(output) as file:
        picture.image.save(file, format="png")
    one_a_block = Streams(streams.num_clean, streams.num_blocks, streams.copies, 1, window)
    pairs = int(dense_mask(one_a_block).sum()) * layout.block_tokens**2
    tokens = streams.total * layout.block_tokens
    figures = {
        "grid": list(layout.grid), "patch": list(layout.patch), "block": list(layout.block),
        "window": None if window is None else window.blocks, "sink_blocks": 0 if window is None else window.sinks,
        "copies": options.copies, "tokens": tokens, "pairs": pairs, "share": pairs / tokens**2,
        "origin": list(picture.origin), "cell": picture.cell, "unit": picture.unit,
    }  # fmt: skip
    write_figures(output.with_suffix(".json"), figures)
    print(f"{pairs:,} of {tokens**2:,} pairs are attended ({pairs / tokens**2:.1%}); see {output}")


def _loss(options: argparse.Namespace) -> None:
    import dataclasses
    import time

    from acdit.analysis.loss import measure_loss
    from acdit.analysis.plots import plot_loss
    from acdit.cli.models import averaging_of, chosen_device
    from acdit.evaluation.sweep import require_matplotlib

    require_matplotlib("acdit analyze loss")
    output = require_suffix(options.output, ".json")
    started = time.perf_counter()
    found = measure_loss(
        options.model, options.data, options.overrides, labelled=options.labels == "data", variance=options.variance,
        clip=options.clip, num_timesteps=options.timesteps, num_draws=options.draws, num_points=options.points,
        num_samples=options.num_samples, batch_size=options.batch_size, seed=options.seed,
        device=chosen_device(options.device),
    )  # fmt: skip
    bound = found.bound
    figures = {
        **found.settings,
        "bound": None if bound is None else {**dataclasses.asdict(bound)},
        "no_bound_because": found.no_bound_because,
        "loss_over_timesteps": {
            "timesteps": found.timesteps.tolist(),
            "loss": found.loss.tolist(),
            "standard_error": found.error.tolist(),
        },
        "loss_by_block": found.loss.mean(0).tolist(),
        "model": options.model,
        "ema": averaging_of(options.model),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_figures(output, figures)
    plot_loss(figures, output.with_suffix(".png"), f"{options.model}, {found.settings['samples']} samples")
    if bound is None:
        print(f"no bound: {found.no_bound_because}")
    else:
        low, high = bound.interval
        print(
            f"bits a dimension ≤ {bound.bits_per_dim:.4g} (95 % of the draws {low:.4g} … {high:.4g}); {bound.protocol}"
        )
    hardest = int(found.loss.mean(0).argmax())
    print(f"the hardest block over all timesteps is {hardest}; see {output} and {output.with_suffix('.png')}")


def _tradeoff(options: argparse.Namespace) -> None:
    from acdit.analysis.plots import plot_tradeoff
    from acdit.analysis.tradeoff import measure_tradeoff
    from acdit.cli.models import chosen_device

    subject, blocks, output = _loaded(options)
    _, guided = subject.sampling(None, not options.no_guidance)
    device = chosen_device(options.device).type
    record = measure_tradeoff(
        subject, blocks, output, steps=options.steps, guided=guided, batch=options.batch_size, rounds=options.rounds,
        minutes=options.minutes, dtype=options.dtype, device=device,
    )  # fmt: skip
    write_figures(output, record)
    for row in record["rows"]:
        times, held = row["time"], row["memory"]
        print(
            f"{row['num_blocks']} blocks of {'×'.join(map(str, row['block']))}: {row['seconds']:.3g} s "
            f"({times['measured']:.2f} of the first, FLOPs say {times['predicted']:.2f}), peak beside the weights "
            f"{held['measured'] / 2**20:.1f} MiB (predicted {held['predicted'] / 2**20:.1f})"
        )
    if record["left"]:
        print(f"{len(record['left'])} measurements are left: start the same command again")
    if not record["rows"]:
        return
    plot_tradeoff(
        record["rows"], output.with_suffix(".png"), f"{subject.name}, {options.steps} steps a block, {device}"
    )
    print(f"see {output} and {output.with_suffix('.png')}")


def _scaling(options: argparse.Namespace) -> None:
    from acdit.analysis.plots import plot_scaling
    from acdit.analysis.scaling import fit_power, read_runs
    from acdit.evaluation.sweep import require_matplotlib

    require_matplotlib("acdit analyze scaling")
    output = require_suffix(options.output, ".json")
    rows = read_runs(options.runs, options.metrics, options.key, options.tail)
    fit = fit_power(rows)
    key = "training loss" if options.metrics is None else options.key
    write_figures(output, {"key": key, "metrics": options.metrics, "tail": options.tail, "runs": rows, "fit": fit})
    plot_scaling(rows, fit, output.with_suffix(".png"), key)
    for row in rows:
        print(f"{row['name']}: {row['parameters']:,} parameters, {key} {row['value']:.5g}")
    if fit is None:
        print("no power law is fitted: it takes three sizes and positive losses")
    else:
        print(f"{key} ∝ parameters^{fit['exponent']:.3f}, at most {fit['largest_deviation']:.1%} off")
    print(f"see {output} and {output.with_suffix('.png')}")
