"""Figures of bd3lm.py as targets and as a page."""

from __future__ import annotations

import statistics
from typing import Any

PEER = "BD3-LMs"
STEP_RATIO, SAMPLING_RATIO = 1.5, 3.0
MEBI = 2**20


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was hoped for, what was found, and whether it is met; one entry a target, seed or block and draw of ours."""
    found = []
    for seed, part in result["training"].items():
        theirs = part["sides"][PEER]
        for name, ours in part["sides"].items():
            if name == PEER:
                continue
            pair = (ours["bound"]["nats_per_token"], theirs["bound"]["nats_per_token"])
            what = f"seed {seed}, {name}"
            found.append(_target(f"{what}: bound at most theirs", f"{pair[0]:.4f}, {pair[1]:.4f}", pair[0] <= pair[1]))
            ratio = theirs["seconds"] / ours["seconds"]
            wanted = f"{what}: seconds a step, theirs / ours, at least {STEP_RATIO:g}"
            found.append(_target(wanted, f"{ratio:.2f}", ratio >= STEP_RATIO))
    for block, part in result["sampling"].items():
        ratio = sampling_ratio(part)
        wanted = f"block {block}: cached sampling at least {SAMPLING_RATIO:g} × as fast"
        found.append(_target(wanted, f"{ratio:.2f}", ratio >= SAMPLING_RATIO))
    return found


def _target(wanted: str, found: str, met: bool) -> dict[str, Any]:
    return {"target": wanted, "found": found, "met": met}


def sampling_ratio(part: dict[str, Any]) -> float:
    """Of tokens a second, ours / theirs."""
    return float(part["sides"]["ours"]["tokens_per_second"] / part["sides"][PEER]["tokens_per_second"])


def page(whole: dict[str, Any]) -> str:
    """The result as markdown."""
    settings, machine, peer = whole["settings"], whole["machine"], whole["peer"]
    parts = [*whole["training"].values(), *whole["sampling"].values()]
    lines = [
        "# Text beside BD3-LMs", "",
        f"{settings['data']} by characters, context {settings['context']} (BOS first), blocks of {settings['block']}, "
        f"{settings['steps']} steps of {settings['batch']} sequences; {settings['layers']} layers × "
        f"{settings['width']}, {settings['heads']} heads; AdamW, lr {settings['lr']:g}, betas {settings['betas']}, "
        f"clipped at 1; dropout of theirs {settings['dropout']:g}; fp32, {machine['threads']} threads of "
        f"{machine['processor']}, torch {whole['versions']['torch']}.", "",
        *_training(whole["training"]), "", *_sampling(whole["sampling"]), "",
        *(f"- {target['target']}: {target['found']}, **{_word(target)}**" for target in whole["targets"]), "",
        f"- {peer['repository']} {peer['commit']}, with these changes from outside:",
        *(f"  - {change}" for change in peer["changes"]),
        f"- `{whole['command']}`, {whole['commit']}, {whole['date']}; load average before each part: "
        + ", ".join(str(part["load_average_before"]) for part in parts),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _word(target: dict[str, Any]) -> str:
    return "met" if target["met"] else "not met"


def _training(training: dict[str, Any]) -> list[str]:
    lines = [
        "| seed | model | parameters | s a step, median (quartiles) | theirs / ours | peak of a step, MiB "
        "| bound, nats a token | … by its own code | … by our estimator count |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, part in training.items():
        theirs = part["sides"][PEER]
        for name, side in part["sides"].items():
            low, high = side["seconds_quartiles"]
            ratio = "" if name == PEER else f"{theirs['seconds'] / side['seconds']:.2f}"
            own = side.get("bound_by_its_own_code")
            lines.append(
                f"| {seed} | {name} | {side['parameters']:,} | {side['seconds']:.3f} ({low:.3f} … {high:.3f}) | "
                f"{ratio} | {side['activation_peak'] / MEBI:.0f} | {_bound(side['bound'])} | "
                f"{_bound(own) if own else ''} | {_bound(side['bound_by_count'])} |"
            )
    if len(training) > 1:
        for name in next(iter(training.values()))["sides"]:
            values = [part["sides"][name]["bound"]["nats_per_token"] for part in training.values()]
            lines.append(f"| mean | {name} | | | | | {statistics.fmean(values):.4f} | | |")
    apart = [part["sides"][PEER]["agreement_of_token_losses"] for part in training.values()]
    worst = max(found["largest_difference"] for found in apart)
    return [
        *lines, "",
        "± is of the draws of masks. At the same masks both codes give each token of their model the same part of the "
        f"bound, to {worst:.1g} of at most {max(found['largest'] for found in apart):.0f} nats.",
    ]  # fmt: skip


def _bound(bound: dict[str, Any]) -> str:
    half = (bound["interval_of_draws"][1] - bound["interval_of_draws"][0]) / 2
    return f"{bound['nats_per_token']:.4f} ± {half:.4f}"


def _sampling(sampling: dict[str, Any]) -> list[str]:
    lines = [
        "Cached sampling, one text, first-hitting, untrained weights:", "",
        "| block | tokens | model | model calls | s, median (quartiles) | tokens a second | ours / theirs |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for block, part in sampling.items():
        for name, side in part["sides"].items():
            low, high = side["seconds_quartiles"]
            ratio = f"{sampling_ratio(part):.2f}" if name == "ours" else ""
            lines.append(
                f"| {block} | {part['tokens']} | {name} | {side['calls']} | {side['seconds']:.2f} ({low:.2f} … "
                f"{high:.2f}) | {side['tokens_per_second']:.0f} | {ratio} |"
            )
    return lines
