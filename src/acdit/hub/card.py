"""The model card: what a folder holds, where it comes from, how it is loaded. Nothing in it is made up: what is not
known is said not to be."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from acdit.hub.samples import FILM, PICTURE, Samples, kind_of
from acdit.recipe import DataRecipe, Recipe

PAPER = "https://arxiv.org/abs/2412.07720"
# The hub has no task for clips by class.
_TASKS = {"image": "unconditional-image-generation", "text": "text-generation"}
_TAGS = {"image": "image-generation", "video": "video-generation", "text": "masked-diffusion"}
_DIGITS = (
    "The built-in digits: 1,797 scans of 8×8 pixels (E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten "
    "Digits*, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49), CC BY 4.0"
)
_BUILT_IN = {
    "digits": _DIGITS,
    "moving_digits": f"Clips of moving digits, made from the built-in ones. {_DIGITS}",
    "builtin_text": (
        'The built-in text: 298,983 characters of "tiny Shakespeare" (W. Shakespeare, in the public domain; as '
        "A. Karpathy's char-rnn has it)"
    ),
}
_ORIGIN = ("command", "commit", "versions", "machine", "protocol", "targets")
_NOT_FIGURES = (*_ORIGIN, "seed")
_LONGEST = 4  # numbers of a list that stand in the table


@dataclass(frozen=True)
class Origin:
    """What the card tells besides the pipeline.

    Args:
        name: its title.
        place: what stands in the lines that load it: a repository or the folder's name.
        recipe, metrics: of the run; None: not known.
        classes: whether there is a classifier/.
        license_id: of the weights; None: not named.
        weights_sha256: of the transformer.
        exported_at: commit of this package.
    """

    name: str
    place: str
    recipe: Recipe | None
    metrics: Mapping[str, Any] | None
    classes: bool
    license_id: str | None
    weights_sha256: str
    exported_at: str | None


def model_card(pipeline: Any, origin: Origin, samples: Samples) -> str:
    """README.md, with the front matter that the hub reads."""
    kind = kind_of(pipeline)
    parts = [
        _front_matter(kind, origin),
        f"# {origin.name}\n\n{_summary(pipeline, kind, origin)}",
        f"## Samples\n\n{_samples(samples)}",
        f"## Load it\n\n{_loading(pipeline, kind, origin, samples)}",
        f"## Model\n\n{_table(('', ''), _model_rows(pipeline, kind))}",
        f"## Training\n\n{_training(origin.recipe)}",
        f"## Data\n\n{_data(origin.recipe)}",
        f"## Figures\n\n{_figures(origin.metrics)}",
        f"## Where it comes from\n\n{_provenance(origin)}",
        f"## Licence\n\n{_licence(origin)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(kind: str, origin: Origin) -> str:
    tags = ["acdit", "diffusion", "autoregressive", "block-diffusion", *([_TAGS[kind]] if kind in _TAGS else [])]
    fields: dict[str, Any] = {
        "library_name": "diffusers",
        "license": origin.license_id or "unknown",
        **({"pipeline_tag": _TASKS[kind]} if kind in _TASKS else {}),
        "tags": [*tags, *(["classification"] if origin.classes else [])],
    }
    data = None if origin.recipe is None else origin.recipe.data
    if data is not None and _on_the_hub(data):
        fields["datasets"] = [data.root]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _summary(pipeline: Any, kind: str, origin: Origin) -> str:
    model = pipeline.transformer
    classes = model.config.num_classes
    what = {"image": "pictures", "video": "clips", "text": "text"}.get(kind, "data")
    by = f" of {classes} classes" if classes is not None else ""
    blocks = model.layout.num_blocks
    told = (
        f"A blockwise autoregressive diffusion transformer ([ACDiT]({PAPER})) for {what}{by}: it denoises {blocks} "
        f"block{'s' * (blocks != 1)} one after the other, each against a cache of the clean ones before it."
    )
    return told + (" A classification head lies beside it (`classifier/`)." if origin.classes else "")


def _samples(samples: Samples) -> str:
    if samples.why_none:
        return samples.why_none
    shown = [f"![samples]({file})" for file in (FILM, PICTURE) if file in samples.files]
    shown += [_fenced(text, "text") for text in samples.texts]
    seeds = " The text after it has the next seed." if len(samples.texts) > 1 else ""
    return "\n\n".join([*shown, f"Not chosen: drawn by this folder's pipeline with `{samples.call}`.{seeds}"])


def _loading(pipeline: Any, kind: str, origin: Origin, samples: Samples) -> str:
    name, place = type(pipeline).__name__, json.dumps(origin.place, ensure_ascii=False)
    call = samples.call or ("pipe(generator=0).texts" if kind == "text" else 'pipe(generator=0, output_type="latent")')
    own = f"from acdit import {name}\n\npipe = {name}.from_pretrained({place})\nresult = {call}"
    theirs = (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({place}, trust_remote_code=True)"
    )
    parts = [
        "`pip install acdit` first: its classes are what is loaded. Then, without a flag, as none of this folder's "
        f"code is run:\n\n{_fenced(own, 'python')}",
        "or by diffusers, which imports `acdit` through files of one line (`pipeline_acdit.py` and its like), and asks "
        f"for leave to run them:\n\n{_fenced(theirs, 'python')}",
    ]
    command = f"acdit sample {origin.place}" + ("" if kind == "text" else " --output out/")
    parts.append(f"From the shell, of a folder on disk:\n\n{_fenced(command, 'bash')}")
    if origin.classes:
        code = (
            "from acdit import ACDiTClassifier\n\n"
            f"classifier = ACDiTClassifier.from_pretrained({json.dumps(Path(origin.place).name)})  # a folder on disk\n"
            "best = classifier.best(classifier(pixels), 5)  # pixels (B, C, H, W), uint8 or in [0, 1]"
        )
        parts.append(f"To classify:\n\n{_fenced(code, 'python')}")
    return "\n\n".join(parts)


def _model_rows(pipeline: Any, kind: str) -> list[tuple[str, str]]:
    model, layout = pipeline.transformer, pipeline.transformer.layout
    config = model.config
    rows = [
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("layers", f"{config.num_layers} of width {config.num_attention_heads * config.attention_head_dim}"),
        ("grid", f"{_times(layout.grid)}, tokens of {_times(layout.patch)}, blocks of {_times(layout.block)} tokens"),
        ("precision", str(model.dtype).removeprefix("torch.")),
    ]
    if kind == "text":
        tokenizer = pipeline.tokenizer
        rows.append(("vocabulary", f"{config.vocab_size:,} tokens ({type(tokenizer).__name__})"))
        return rows
    rows.append(("classes", "none: unconditional" if config.num_classes is None else str(config.num_classes)))
    rows.append(("scheduler", type(pipeline.scheduler).__name__))
    space = "pixels" if not pipeline.config.latents and pipeline.vae is None else "latents"
    inside = "" if space == "pixels" else f", {'without its' if pipeline.vae is None else 'with its'} autoencoder"
    channels = f"{config.in_channels} channel{'s' * (config.in_channels != 1)}"
    rows.append(("works on", f"{space} of {channels}{inside}"))
    if config.window is not None:
        rows.append(("window", f"{config.window} blocks"))
    return rows


def _training(recipe: Recipe | None) -> str:
    if recipe is None:
        return "Not known: no recipe.yaml lay beside the model."
    train, optim = recipe.train, recipe.optim
    length = f"{train.steps:,} steps" if train.steps is not None else f"{train.epochs} epochs"
    decays = ", ".join(f"{decay:g}" for decay in recipe.ema.decays[:1])
    rows = [
        ("recipe", recipe.name),
        ("length", f"{length} of {optim.batch_size * optim.accumulation} samples"),
        ("optimizer", f"AdamW, learning rate {optim.lr:g}, schedule {optim.schedule}"),
        ("precision", train.precision),
        ("weights", f"averaged, decay {decays}" if decays else "as trained, not averaged"),
        ("corruption", _corruption(recipe)),
        ("seed", str(recipe.seed)),
    ]
    if train.init_from is not None:
        source = Path(train.init_from)
        rows.append(("starts from", f"another model, `{source.name if source.is_absolute() else source}`"))
    if recipe.classification is not None:
        tuned = "a head on frozen features" if recipe.classification.tune == "head" else "head and transformer"
        rows.append(("classification", f"{tuned}; pooling {recipe.classification.pooling}"))
    again = "finetune" if recipe.classification is not None else "train"
    command = _fenced(f"acdit {again} recipe.yaml --output runs/again", "bash")
    return f"{_table(('', ''), rows)}\n\nThe whole of it is `recipe.yaml`. Once more:\n\n{command}"


def _corruption(recipe: Recipe) -> str:
    corruption = recipe.corruption
    if corruption.kind == "masking":
        return "masking"
    return f"{corruption.kind}, {corruption.prediction_type}, {corruption.num_train_timesteps} timesteps"


def _data(recipe: Recipe | None) -> str:
    if recipe is None:
        return "Not known: no recipe.yaml lay beside the model."
    data = recipe.data
    if data.kind in _BUILT_IN:
        return f"{_BUILT_IN[data.kind]}. Split `{data.split}`."
    if _on_the_hub(data):
        return f"[{data.root}](https://huggingface.co/datasets/{data.root}), split `{data.split}`."
    named = "" if data.root is None else f" named `{Path(data.root).name}`"
    return (
        f"Data of kind `{data.kind}`{named}, split `{data.split}`. recipe.yaml says no more of them; whoever shares "
        "this model may say here what they are and under which terms."
    )


def _on_the_hub(data: DataRecipe) -> bool:
    named = data.kind in ("hf", "hf_text") and data.root is not None and not Path(data.root).exists()
    return named and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data.root)) is not None


def _figures(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "None: no metrics.json lay beside the model, so nothing is claimed."
    targets = metrics.get("targets")
    targets = targets if isinstance(targets, Mapping) else {}
    rows = [
        (f"`{name}`", shown, _cell(targets.get(name, "")))
        for name, value in metrics.items()
        if name not in _NOT_FIGURES and (shown := _figure(value)) is not None
    ]
    parts = [_table(("figure", "value", "target of the run"), rows) if rows else "metrics.json holds no figures."]
    if isinstance(metrics.get("protocol"), str):
        parts.append(f"How they were measured: {_cell(metrics['protocol'])}")
    parts.append("All of them are in `metrics.json`, as the run wrote them.")
    return "\n\n".join(parts)


def _figure(value: Any) -> str | None:
    """As the table shows it; None: no figure, or too long a list."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, list) and 0 < len(value) <= _LONGEST:
        shown = [_figure(one) for one in value]
        return None if None in shown else " · ".join(map(str, shown))
    return None


def _provenance(origin: Origin) -> str:
    metrics = origin.metrics or {}
    rows = [("sha256 of the weights", f"`{origin.weights_sha256}`")]
    for name, title in (("command", "measured by"), ("commit", "at commit")):
        if isinstance(metrics.get(name), str):
            rows.append((title, f"`{metrics[name]}`"))
    if isinstance(versions := metrics.get("versions"), Mapping):
        rows.append(("with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if isinstance(machine := metrics.get("machine"), Mapping):
        told = [machine.get("cuda") or machine.get("processor"), f"{machine.get('cores')} cores", machine.get("system")]
        rows.append(("on", ", ".join(str(one) for one in told if one)))
    at = f", commit `{origin.exported_at}`" if origin.exported_at else ""
    rows.append(("exported by", f"acdit {sys.modules['acdit'].__version__}{at}"))
    unknown = "" if metrics.get("commit") else "\n\nThe commit that trained it is not recorded beside the model."
    return _table(("", ""), rows) + unknown


def _licence(origin: Origin) -> str:
    weights = (
        f"The weights: {origin.license_id}."
        if origin.license_id is not None
        else "For the weights none was named (`acdit export --license`): ask whoever shares them."
    )
    return f"{weights} The package `acdit`, whose classes load them, is under MIT. The data have terms of their own."


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: Any) -> str:
    """One line that ends no cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _times(sizes: Any) -> str:
    return "×".join(map(str, sizes))


def _fenced(text: str, language: str) -> str:
    """A block that nothing in the text can end."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
