"""What a study says: figures of every arm with their intervals, verdicts, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acdit import provenance, storage
from acdit.analysis.plots import plot_arms
from acdit.evaluation.intervals import mean_interval
from acdit.flops import picture_flops, training_flops
from acdit.recipe import Recipe, load_recipe
from acdit.studies.plan import RUN_NAME, Reading, apart
from acdit.studies.runs import Job, kept, trained
from acdit.studies.study import OPEN, Claim, Metric, Study
from acdit.studies.verdict import RULE, contrast_of, leans, verdict_of
from acdit.training.build import architecture


def figures_of(
    study: Study, readings: Sequence[Reading], jobs: Sequence[Job], overrides: Sequence[str], setting: str
) -> dict[str, Any]:
    """Everything a study found, as its JSON has it.

    Args:
        study: what was asked.
        readings: of `plan`, all taken.
        jobs: of `jobs_of`.
        overrides: of all arms.
        setting: name of the data.
    """
    by_key = {job.run.key: job for job in jobs}
    base = load_recipe(study.recipe, [f"name={RUN_NAME}"])
    arms = []
    for arm in study.arms:
        mine = [reading for reading in readings if reading.arm.label == arm.label]
        taken = [kept(by_key[reading.run.key], reading) for reading in mine]
        arms.append(
            {
                "label": arm.label, "line": arm.line, "x": arm.x, "tick": arm.tick, "weights": arm.weights,
                "recipe_difference": apart(mine[0].run.recipe, base),
                **_cost(mine[0]),
                "metrics": {metric.key: _values(metric, taken) for metric in study.metrics},
                "runs": [
                    _run_told(by_key[reading.run.key], reading, one) for reading, one in zip(mine, taken, strict=True)
                ],
            }
        )  # fmt: skip
    costs = {
        metric.key: {arm["label"]: [metric.cost(value) for value in arm["metrics"][metric.key]["values"]]
                     for arm in arms}
        for metric in study.metrics
    }  # fmt: skip
    return {
        "study": study.name, "figure": study.figure, "question": study.question, "data": setting,
        "recipe": study.recipe, "overrides": [*study.overrides, *overrides],
        "seeds": list(dict.fromkeys(reading.seed for reading in readings)),
        "claims": [
            judged_claim(claim, study.metric(claim.metric), costs[claim.metric], _unlearned(study, claim, arms))
            for claim in study.claims
        ],
        "arms": arms,
        "rule": RULE,
        "note": study.note,
        **provenance.facts(),
    }  # fmt: skip


def _unlearned(study: Study, claim: Claim, arms: Sequence[Mapping[str, Any]]) -> str:
    """Why a claim is not judged: no arm of it has learned enough; "" where one has."""
    if study.floor is None:
        return ""
    key, floor = study.floor
    named = {label for label, weight in claim.contrast if weight}
    best = max(float(arm["metrics"][key]["mean"]) for arm in arms if arm["label"] in named)
    return "" if best >= floor else f"no arm has learned enough: {study.metric(key).label} {best:.2f}, below {floor:g}"


def judged_claim(claim: Claim, metric: Metric, costs: Mapping[str, Sequence[float]], unlearned: str) -> dict[str, Any]:
    """A claim's verdict, as the JSON of a study has it.

    Args:
        claim: of the study.
        metric: the claim's.
        costs: of each arm, one a seed.
        unlearned: why it is not judged; "" where it is.
    """
    contrast = contrast_of(claim.contrast, costs)
    if claim.presumes is not None and contrast_of(claim.presumes, costs).estimate <= 0:
        unlearned = unlearned or "the means do not show what the finding takes for granted"
    verdict = OPEN if unlearned else verdict_of(claim, contrast)
    told = metric.shown(contrast.estimate)
    if contrast.interval is not None:
        told += f" (95 %: {metric.shown(contrast.interval[0])} to {metric.shown(contrast.interval[1])})"
    if verdict == OPEN:
        told += f"; {unlearned or leans(claim, contrast)}"
    return {
        "claim": claim.text, "verdict": verdict, "shown": told, "metric": metric.key, "margin": claim.margin,
        "contrast": dict(claim.contrast), "estimate": contrast.estimate,
        "interval": None if contrast.interval is None else list(contrast.interval), "freedom": contrast.freedom,
    }  # fmt: skip


def _values(metric: Metric, taken: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a distance the geometric mean and the interval of the logarithms, as arms are compared."""
    values = [float(one["figures"][metric.key]) for one in taken]
    scaled = [math.log(value) for value in values] if metric.ratio else values
    back = math.exp if metric.ratio else float
    interval = mean_interval(scaled)
    return {
        "values": values, "mean": back(sum(scaled) / len(scaled)),
        "interval": None if interval is None else [back(end) for end in interval],
    }  # fmt: skip


def _cost(reading: Reading) -> dict[str, Any]:
    """What an arm's training and one of its samples take, in closed form."""
    recipe, arch = reading.run.recipe, architecture(reading.run.recipe.model)
    assert recipe.train.steps is not None
    steps = recipe.train.steps if reading.step is None else reading.step
    guided = recipe.sampling.guidance_scale != 1 and recipe.model.num_classes is not None
    return {
        "parameters": arch.parameters, "tokens": arch.layout.num_tokens, "num_blocks": arch.layout.num_blocks,
        "steps": steps, "samples_seen": steps * recipe.optim.batch_size,
        "training_flops": steps * _step_flops(recipe),
        "sample_flops": picture_flops(arch, recipe.sampling.num_inference_steps, guided),
    }  # fmt: skip


def _step_flops(recipe: Recipe) -> float:
    return training_flops(
        architecture(recipe.model), recipe.optim.batch_size, recipe.corruption.copies,
        recipe.train.gradient_checkpointing,
    )  # fmt: skip


def _run_told(job: Job, reading: Reading, one: Mapping[str, Any]) -> dict[str, Any]:
    told = trained(job)
    return {
        "seed": reading.seed, "run": reading.run.key,
        "branched_from": None if reading.run.parent is None else [reading.run.parent.key, reading.run.start],
        "seconds_training": told["seconds"], "threads": told["threads"], "commit_training": told["commit"],
        "seconds_measuring": one["seconds"], "commit_measuring": one["commit"], "figures": one["figures"],
    }  # fmt: skip


# --- as text and as a picture ---------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any], study: Study) -> str:
    """Verdicts and figures as Markdown."""
    seeds = figures["seeds"]
    spread = f"one seed, {seeds[0]}: no interval"
    if len(seeds) > 1:
        numbers = ", ".join(map(str, seeds))
        spread = f"mean (of distances the geometric one) and 95 % interval over seeds {numbers}"
    lines = [f"# {study.figure}: {study.question}", "", f"Data: {figures['data']}; {spread}.", ""]
    lines += ["| the paper's finding | at this scale | effect |", "|---|---|---|"]
    lines += [f"| {one['claim']} | **{one['verdict']}** | {one['shown']} |" for one in figures["claims"]]
    names = [metric.label for metric in study.metrics]
    lines += ["", f"| arm | {' | '.join(names)} | steps | samples seen | training FLOPs | a sample's FLOPs |"]
    lines += ["|---" * (len(names) + 5) + "|"]
    first = figures["arms"][0]["training_flops"]
    for arm in figures["arms"]:
        shown = [_shown(metric, arm["metrics"][metric.key]) for metric in study.metrics]
        lines.append(
            f"| {arm['label']} | {' | '.join(shown)} | {arm['steps']} | {arm['samples_seen']:,} | "
            f"{arm['training_flops']:.3g} (× {arm['training_flops'] / first:.2f}) | {arm['sample_flops']:.3g} |"
        )
    lines += ["", figures["rule"], *(["", figures["note"]] if figures["note"] else []), ""]
    told = {run["commit_training"] for arm in figures["arms"] for run in arm["runs"]}
    commits = ", ".join(sorted(str(commit)[:12] for commit in told))
    lines += [f"`{figures['command']}`, trained at {commits}, {figures['machine']['processor']}.", ""]
    return "\n".join(lines)


def _shown(metric: Metric, values: Mapping[str, Any]) -> str:
    def number(value: float) -> str:
        return f"{value:.3g}" if metric.ratio else f"{value:.3f}"

    if values["interval"] is None:
        return number(values["mean"])
    low, high = values["interval"]
    return f"{number(values['mean'])} [{number(low)}, {number(high)}]"


def write(figures: Mapping[str, Any], study: Study, output: Path) -> list[Path]:
    """NAME.json, NAME.md and NAME.png in the study's folder."""
    files = [output / f"{study.name}.{ending}" for ending in ("json", "md", "png")]
    storage.write_figures(files[0], figures)
    storage.write_text_atomic(files[1], table(figures, study))
    panels = [
        {
            "title": metric.label + (" (less is better)" if metric.lower_is_better else ""), "log": metric.ratio,
            "arms": [{**{key: arm[key] for key in ("line", "x", "tick")}, **arm["metrics"][metric.key]}
                     for arm in figures["arms"]],
        }
        for metric in study.metrics
    ]  # fmt: skip
    seeds = ", ".join(map(str, figures["seeds"]))
    verdicts = [f"{one['claim']}: {one['verdict']}" for one in figures["claims"]]
    heading = "\n".join([f"{study.figure}, in small: {figures['data']}, seeds {seeds}", *verdicts])
    plot_arms(panels, files[2], heading, study.axis, study.log_axis)
    return files
