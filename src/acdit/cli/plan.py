"""acdit plan"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from acdit.cli.parser import AddCommand, positive

if TYPE_CHECKING:
    from acdit.costs import Architecture, TrainingMemory
    from acdit.recipe import Recipe

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "plan", _plan, "What a recipe costs: parameters, memory, FLOPs, days; and whether it fits.",
        "acdit plan imagenet256-xl --devices 8 --memory 80GB",
    )  # fmt: skip
    made.add_argument("recipe", help="a shipped recipe's name (see `acdit recipes`) or a YAML path")
    made.add_argument("overrides", nargs="*", metavar="key.key=value", help="change recipe fields")
    made.add_argument("--devices", type=positive, default=1, help="how many share the batch (default 1)")
    made.add_argument("--memory", type=memory, default="80GB", help="of one device: 80GB, 24GiB (default 80GB)")
    made.add_argument(
        "--sharding", choices=("ddp", "fsdp"), default="ddp", help="fsdp: FSDP2, full shard (default ddp)"
    )
    made.add_argument("--keep-free", type=share, default=0.1, help="share of the memory left to driver, libraries and "
                      "fragmentation (default 0.1)")  # fmt: skip
    made.add_argument("--tflops", type=rate, default=312.0, help="peak rate of one device in the recipe's precision, "
                      "TFLOP/s (default 312, the bf16 rate in an A100's data sheet)")  # fmt: skip
    made.add_argument("--utilisation", type=share, default=0.4, help="share of that rate that is reached (default 0.4)")


def memory(text: str) -> int:
    """ "80GB" or "24GiB" in bytes, as argparse wants its types."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 80GB (10^9) or 80GiB (2^30)")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def share(text: str) -> float:
    """A number in [0, 1], as argparse wants its types."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value:g} is not between 0 and 1")
    return value


def rate(text: str) -> float:
    """A positive number, as argparse wants its types."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value:g} is no rate")
    return value


def _plan(options: argparse.Namespace) -> None:
    from acdit.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.classification is not None:
        from acdit.errors import ConfigError

        raise ConfigError(
            "classification", found="a recipe that trains a classifier", expected="one that trains a model: only its "
            "costs are known",
        )  # fmt: skip
    micro_batch = _micro_batch(recipe, options.devices)
    if recipe.corruption.kind == "masking" and recipe.model.vocab_size is None:
        from acdit.errors import ConfigError

        raise ConfigError(
            "model.vocab_size", found="null, for the data to fill in", expected="a number: no data are read here",
            fix="add model.vocab_size=50257 (GPT-2's), or what `acdit data` shows",
        )  # fmt: skip
    from acdit import costs
    from acdit.training.build import architecture

    arch = architecture(recipe.model)

    def needed(batch: int, accumulation: int) -> TrainingMemory:
        return costs.training_memory(
            arch, batch, recipe.corruption.copies, checkpointing=recipe.train.gradient_checkpointing,
            precision=recipe.train.precision, averages=len(recipe.ema.decays), accumulation=accumulation,
            devices=options.devices, sharding=options.sharding,
        )  # fmt: skip

    usable = int(options.memory * (1 - options.keep_free))
    plan = needed(micro_batch, recipe.optim.accumulation)
    for line in _description(recipe, arch, options, micro_batch, plan):
        print(line)
    print(f"{'fits':<22}", end="")
    room = f"{_bytes(usable)} usable of {_bytes(options.memory)} ({options.keep_free:.0%} kept free)"
    if plan.total <= usable:
        print(f"yes: {_bytes(plan.total)} needed, {room}")
        return
    print(f"no: {_bytes(plan.total)} needed, {room}")
    largest = _largest(lambda batch: needed(batch, accumulation=2).total <= usable)  # smaller ones are accumulated
    print(f"{'what would':<22}{_what_would_fit(recipe, options, largest)}")


def _micro_batch(recipe: Recipe, devices: int) -> int:
    """Samples that one device computes at once."""
    from acdit.errors import ConfigError

    parts = recipe.optim.accumulation * devices
    if recipe.optim.batch_size % parts:
        raise ConfigError(
            "optim.batch_size", found=str(recipe.optim.batch_size),
            expected=f"a multiple of accumulation × devices = {parts}",
        )  # fmt: skip
    return recipe.optim.batch_size // parts


def _description(
    recipe: Recipe, arch: Architecture, options: argparse.Namespace, micro_batch: int, plan: TrainingMemory
) -> list[str]:
    from acdit import costs

    layout, optim, train = arch.layout, recipe.optim, recipe.train
    flops = costs.training_flops(arch, optim.batch_size, recipe.corruption.copies, train.gradient_checkpointing)
    text = arch.vocab_size is not None
    steps = layout.block_tokens if text else recipe.sampling.num_inference_steps  # of text a call a token
    drawn = costs.picture_flops(arch, steps, not text and recipe.sampling.guidance_scale != 1)
    speed = options.devices * options.tflops * 1e12 * options.utilisation
    at = f"{options.devices} × {options.tflops:g} TFLOP/s at {options.utilisation:.0%} (assumed)"
    if not speed:
        duration = "none at utilisation 0"
    elif train.steps is None:
        duration = f"{flops / speed:.3g} s a step on {at}; how many steps its epochs are, the data say"
    else:
        duration = f"{train.steps * flops / speed / 86400:.3g} for {train.steps:,} steps on {at}"
    rows = {
        "recipe": recipe.name,
        "parameters": f"{arch.parameters:,} ({arch.num_layers} layers × {arch.width})",
        "tokens": f"{layout.num_tokens} = {layout.num_blocks} blocks × {layout.block_tokens}",
        "batch": f"{optim.batch_size} = {options.devices} devices × {optim.accumulation} accumulated × {micro_batch}",
        "how": f"{train.precision}, gradient_checkpointing={train.gradient_checkpointing}, {options.sharding}",
        "memory of a device": "",
        "  weights": _bytes(plan.weights),
        "  gradients": _bytes(plan.gradients),
        "  optimizer": f"{_bytes(plan.optimizer)} (AdamW's two moments)",
        "  EMA": f"{_bytes(plan.ema)} ({len(recipe.ema.decays)} kept)",
        "  communication": _bytes(plan.communication),
        "  activation peak": f"{_bytes(plan.activations)} (micro-batch {micro_batch})",
        "  at most at once": f"{_bytes(plan.total)} (gradients come while activations go)",
        "FLOPs a step": f"{flops:.4g}",
        "FLOPs a sample drawn": f"{drawn:.4g} ({steps} steps a block)",
        "days": duration,
    }
    return [f"{name:<22}{value}".rstrip() for name, value in rows.items()]


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest micro-batch that fits; memory grows with it. 0: none does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _what_would_fit(recipe: Recipe, options: argparse.Namespace, largest: int) -> str:
    if largest == 0:
        return "no micro-batch, not even 1: try train.gradient_checkpointing=layers, --sharding fsdp, more devices"
    a_device = recipe.optim.batch_size // options.devices
    divisors = (parts for parts in range(1, a_device + 1) if a_device % parts == 0)
    parts = next(parts for parts in divisors if a_device // parts <= largest)
    return f"micro-batches of at most {largest}: optim.accumulation={parts} (micro-batch {a_device // parts})"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1000:.1f} kB"
