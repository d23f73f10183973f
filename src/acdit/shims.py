"""Model folders as they travel: with files of one line that import this package, so that diffusers, given leave
(`trust_remote_code=True`), loads them in a process that knows nothing of it.

    DIR/  model_index.json, pipeline_acdit.py
          transformer/  modeling_acdit.py …
          tokenizer/    tokenization_acdit.py …     (of text)

The pipelines of this package read such a folder as any other: what a file of one line would import is known, so the
file is not run and no leave is asked. Code under another name stays diffusers' affair, which refuses it without leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PIPELINE = "pipeline_acdit"
ABOUT = ("README.md", "recipe.yaml", "metrics.json", "samples.png", "samples.gif")
"""Files of such a folder that tell of its run: of another model's, once that is made from it."""
TEXT_CLASS = "ACDiTTextPipeline"
PIPELINES = ("ACDiTPipeline", TEXT_CLASS)
# Component → (its file, its class, the module that file imports it from).
_COMPONENTS = {
    "transformer": ("modeling_acdit", "ACDiTTransformer", "acdit.model"),
    "tokenizer": ("tokenization_acdit", "Tokenizer", "acdit.codecs"),
}
# All that a pipeline needs: weights in safetensors, JSON, a tokenizer's files. Not code: none is run.
_FILES = ("*.json", "*.safetensors", "tokenizer/*")


def class_name(index: Mapping[str, Any]) -> str | None:
    """The pipeline's class as a model_index.json names it, with or without its file; None: it names none."""
    named = index.get("_class_name")
    named = named[1] if isinstance(named, list | tuple) and len(named) == 2 and named[0] == PIPELINE else named
    return named if isinstance(named, str) else None


def with_shims(index: Mapping[str, Any], tokenizer: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """A model_index.json in the form that travels.

    Args:
        index: as `save_pretrained` writes it.
        tokenizer: whether the folder has one.

    Returns:
        The index, and the content of the files of one line by their paths in the folder.
    """
    name = class_name(index)
    changed = {**index, "_class_name": [PIPELINE, name]}
    files = {f"{PIPELINE}.py": f"from acdit import {name}  # noqa: F401\n"}
    for component, (file, kind, module) in _COMPONENTS.items():
        if component == "transformer" or tokenizer:
            changed[component] = [file, kind]
            files[f"{component}/{file}.py"] = f"from {module} import {kind}  # noqa: F401\n"
    return changed, files


def without_shims(index: Mapping[str, Any]) -> dict[str, Any]:
    """The index as `save_pretrained` writes it. What other files than ours are named in it is left as it is."""
    plain = dict(index)
    if class_name(index) in PIPELINES:
        plain["_class_name"] = class_name(index)
    for component, (file, kind, module) in _COMPONENTS.items():
        if list(index.get(component) or ()) == [file, kind]:
            plain[component] = [module, kind]
    if plain.get("tokenizer") == ["acdit.codecs", "Tokenizer"]:
        del plain["tokenizer"]  # the pipeline finds it in the folder by itself
    return plain


class ReadsTravelledFolders:
    """Put before `DiffusionPipeline`: folders and repositories in the form that travels load without leave."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """diffusers' own; of a hub id weights and settings are fetched, and no code."""
        base: Any = super()  # diffusers' class, which this one stands before
        return base.from_pretrained(local_folder(pretrained_model_name_or_path, options), **options)

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """diffusers' own, without files of one line."""
        base: Any = super()
        found = base.load_config(*arguments, **options)
        return (without_shims(found[0]), *found[1:]) if isinstance(found, tuple) else without_shims(found)


def local_folder(name: Any, options: Mapping[str, Any]) -> Any:
    """Where a pipeline's files are: its folder, or what is fetched of it from the hub (or found in its cache).

    diffusers fetches by the modules that model_index.json names, and refuses those it does not know.

    Args:
        name: a folder or a hub id.
        options: of `from_pretrained`.
    """
    if Path(name).exists():
        return name
    import huggingface_hub

    names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    known = {key: options[key] for key in names if key in options}
    pickles = ("*.bin",) if options.get("use_safetensors") is False else ()
    return huggingface_hub.snapshot_download(str(name), allow_patterns=[*_FILES, *pickles], **known)
