"""A saved pipeline as a folder that explains itself and loads by itself.

DIR/  README.md             the model card
      model_index.json      names the files of one line, through which diffusers finds this package
      pipeline_acdit.py, transformer/modeling_acdit.py, tokenizer/tokenization_acdit.py
      transformer/, scheduler/, vae/, tokenizer/, classifier/
      recipe.yaml, metrics.json   of the run, where they lay beside the model
      samples.png, samples.gif    drawn by the pipeline
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acdit import provenance, shims, storage
from acdit.classifiers import FOLDER as CLASSIFIER
from acdit.errors import DataError, StorageError, first_line
from acdit.hub.card import Origin, model_card
from acdit.hub.samples import SampleOptions, draw
from acdit.model_folder import beside_model
from acdit.recipe import flatten, load_recipe, recipe_to_dict

RECIPE, METRICS, INDEX = "recipe.yaml", "metrics.json", "model_index.json"


@dataclass(frozen=True)
class Shared:
    """What was written.

    Args:
        folder: where.
        missing: what the card has nothing to say about.
        private_paths: fields of recipe.yaml that name places on this machine.
    """

    folder: Path
    missing: tuple[str, ...]
    private_paths: tuple[str, ...]


def share(
    pipeline: Any,
    model: str | Path,
    output: str | Path,
    *,
    options: SampleOptions | None = None,
    license_id: str | None = None,
    repo_id: str | None = None,
) -> Shared:
    """Write the folder, wholly or not at all.

    Args:
        pipeline: an `ACDiTPipeline` or `ACDiTTextPipeline`; its weights are saved in the precision they have.
        model: the folder it was loaded from: recipe, metrics and classifier/ are looked for there.
        output: nothing, or an earlier export that nobody has changed since; it is replaced.
        options: how the samples of the card are drawn.
        license_id: of the weights, as the hub names licences ("mit"); None: the card says that none was named.
        repo_id: the repository that it will be pushed to, for the card's lines of code.

    Raises:
        StorageError: `output` holds something else, or cannot be written.
        DataError: a recipe.yaml or metrics.json beside the model that cannot be read.
        ConfigError: samples that the model cannot draw.
    """
    model, output = Path(model), Path(output)
    require_ours(output)
    files = {name: found for name in (RECIPE, METRICS) if (found := beside_model(model, name)) is not None}
    recipe = load_recipe(files[RECIPE]) if RECIPE in files else None
    metrics = _json(files[METRICS]) if METRICS in files else None
    bytes_needed = sum(value.nbytes for value in pipeline.transformer.state_dict().values())
    with storage.atomic_directory(output, bytes_needed) as temporary:
        pipeline.save_pretrained(temporary)
        _add_shims(temporary)
        for name, file in files.items():
            shutil.copyfile(file, temporary / name)
        classes = (model / CLASSIFIER / "config.json").is_file()
        if classes:
            shutil.copytree(model / CLASSIFIER, temporary / CLASSIFIER)
        forget_places(temporary)
        samples = draw(pipeline, recipe, options or SampleOptions(), temporary)
        origin = Origin(
            name=(repo_id or output.resolve().name).rpartition("/")[2], place=repo_id or output.name, recipe=recipe,
            metrics=metrics, classes=classes, license_id=license_id,
            weights_sha256=provenance.weights_sha256(pipeline.transformer), exported_at=provenance.commit(),
        )  # fmt: skip
        (temporary / storage.FOR_PEOPLE).write_text(model_card(pipeline, origin, samples), encoding="utf-8")
    missing = [name for name in (RECIPE, METRICS) if name not in files]
    missing += [] if license_id is not None else ["a licence (--license)"]
    return Shared(output, tuple(missing), () if recipe is None else _places_named(recipe))


def require_ours(output: Path) -> None:
    """Refuse to replace anything but an export that nobody has changed.

    Raises:
        StorageError: something else is there; it is named.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    marks = (storage.MANIFEST, storage.FOR_PEOPLE, f"{shims.PIPELINE}.py")  # a run's model/ has not all of them
    if not all((output / name).is_file() for name in marks):
        raise StorageError(
            f"{output}", found="a file" if output.is_file() else "a folder that is no export of a model",
            expected="nothing there, or an earlier export", fix="choose another --hub",
        )  # fmt: skip
    listed = storage.verify(output).files
    there = {file.relative_to(output).as_posix() for file in output.rglob("*") if not file.is_dir()}
    strange = sorted(there - set(listed) - {storage.MANIFEST})
    card = output / storage.FOR_PEOPLE
    if not strange and storage.file_sha256(card) != listed[storage.FOR_PEOPLE][1]:
        strange = [f"a {storage.FOR_PEOPLE} that was edited"]
    if strange:
        raise StorageError(
            f"{output}", found=", ".join(strange[:5]), expected="an export as it was written, to be replaced",
            fix="move that away, or choose another --hub",
        )  # fmt: skip


def _add_shims(folder: Path) -> None:
    index, files = shims.with_shims(_json(folder / INDEX), tokenizer=(folder / "tokenizer").is_dir())
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def forget_places(folder: Path) -> None:
    """diffusers writes down where a model was loaded from: nobody else's business."""
    for file in (folder / INDEX, *folder.rglob("config.json"), *folder.rglob("scheduler_config.json")):
        content = _json(file)
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _places_named(recipe: Any) -> tuple[str, ...]:
    fields = flatten(recipe_to_dict(recipe))
    return tuple(f"{name}={value}" for name, value in fields.items() if isinstance(value, str) and value[:1] in "/~")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(file), found=first_line(error), expected="a JSON object") from None
    if not isinstance(found, dict):
        raise DataError(str(file), found=type(found).__name__, expected="a JSON object")
    return found
